"""Top-k pruning: only the largest elements of a message are sent."""

from __future__ import annotations

import math
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor

from mocosfl_priv import Defense, MessageKind


class TopKPruning(Defense):
    """Of every message the elements of largest magnitude are sent, the others become zero.

    Per message and by magnitude: a public implementation takes the largest signed values of a whole batch, which
    drops all negative ones and lets one image decide about another. The traffic that a sparse code would save is not
    counted.

    keep: share of the elements that is sent; at least one is.
    """

    def __init__(self, keep: Annotated[float, Field(gt=0, le=1)] = 0.1) -> None:
        self.keep = keep

    def protect(self, smashed: Tensor, rng: torch.Generator, kind: MessageKind = MessageKind.INFERENCE) -> Tensor:
        flat = smashed.flatten(1)
        count = max(1, math.ceil(self.keep * flat.shape[1]))
        largest = flat.detach().abs().topk(count, dim=1).indices
        mask = torch.zeros_like(flat).scatter_(1, largest, 1.0)
        return (flat * mask).view_as(smashed)
