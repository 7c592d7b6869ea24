"""Where a defense touches a client's training step. :class:`mocosfl_priv.Defense` implements all of it."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor


class ClientHooks(Protocol):
    """The three places, in the order in which a step meets them, and what a checkpoint keeps."""

    def client_loss(self, images: Tensor, smashed: Tensor) -> Tensor | None:
        """A scalar, averaged over the batch, that is added to the clients' loss; None for none."""

    def protect(self, smashed: Tensor, rng: torch.Generator) -> Tensor:
        """The smashed data on its way out, same shape; gradients flow back through it."""

    def filter_gradient(self, gradient: Tensor, rng: torch.Generator) -> Tensor:
        """The server's gradient on its way in, same shape."""

    def state(self) -> dict[str, Tensor]:
        """What changes while training goes on, for a checkpoint."""

    def load_state(self, state: dict[str, Tensor]) -> None:
        """Go on where :meth:`state` was taken."""


class NoHooks:
    """A client that sends what it computes."""

    def client_loss(self, images: Tensor, smashed: Tensor) -> Tensor | None:
        """No extra loss."""
        return None

    def protect(self, smashed: Tensor, rng: torch.Generator) -> Tensor:
        """Unchanged."""
        return smashed

    def filter_gradient(self, gradient: Tensor, rng: torch.Generator) -> Tensor:
        """Unchanged."""
        return gradient

    def state(self) -> dict[str, Tensor]:
        """Nothing changes."""
        return {}

    def load_state(self, state: dict[str, Tensor]) -> None:
        """Nothing changes."""
