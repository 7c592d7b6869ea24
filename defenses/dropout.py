"""Dropout at the cut: part of every message is not sent (He et al., IEEE Internet of Things Journal 2020)."""

from __future__ import annotations

from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor

from mocosfl_priv import Defense, MessageKind


class DropoutDefense(Defense):
    """Every message loses a random share of its elements, in training and in use, with a mask of its own.

    What stays is scaled by 1 / (1 - rate), so that the server sees the same mean. Who may ask often sees everything:
    attacks are told how the defense draws, and average where they get several messages.

    rate: probability of being lost. unit: single elements, or whole channels of a message.
    """

    randomised = True

    def __init__(
        self, rate: Annotated[float, Field(ge=0, lt=1)] = 0.5, unit: Literal["element", "channel"] = "element"
    ) -> None:
        self.rate = rate
        self.unit = unit

    def protect(self, smashed: Tensor, rng: torch.Generator, kind: MessageKind = MessageKind.INFERENCE) -> Tensor:
        n, channels, *places = smashed.shape
        shape = smashed.shape if self.unit == "element" else (n, channels, *[1] * len(places))
        kept = torch.rand(shape, generator=rng, device=smashed.device) >= self.rate
        return smashed * kept.to(smashed.dtype) / (1 - self.rate)
