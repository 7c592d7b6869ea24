"""The server side of a step: trunk, projector, feature memory and the contrastive loss (MoCo, He et al., 2020)."""

from __future__ import annotations

import copy

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mocosfl_priv.compute import Compute
from mocosfl_priv.config import TrainingConfig


class FeatureMemory:
    """A ring of the last K keys, shared by all clients; it starts with random directions, as MoCo's does."""

    def __init__(self, size: int, dim: int, generator: torch.Generator) -> None:
        self.keys = F.normalize(torch.randn(size, dim, generator=generator, device=generator.device), dim=1)
        self._next = 0

    def enqueue(self, keys: Tensor) -> None:
        """Overwrite the oldest keys; keys (m, dim). Of more keys than fit, the last ones stay."""
        keys = keys[-len(self.keys) :]
        places = (self._next + torch.arange(len(keys), device=keys.device)) % len(self.keys)
        self.keys[places] = keys
        self._next = (self._next + len(keys)) % len(self.keys)


def info_nce(queries: Tensor, keys: Tensor, memory: Tensor, temperature: float) -> Tensor:
    """InfoNCE of each query against its key and the memory, averaged over the batch.

    queries, keys: (n, d) of unit length; memory: (K, d) of unit length. Scalar >= 0.
    """
    positive = (queries * keys).sum(1, keepdim=True)
    logits = torch.cat([positive, queries @ memory.T], dim=1) / temperature
    return F.cross_entropy(logits, torch.zeros(len(logits), dtype=torch.long, device=logits.device))


class MocoServer:
    """Online and momentum trunk, one optimiser, one feature memory."""

    def __init__(
        self,
        trunk: nn.Module,
        projector: nn.Module,
        training: TrainingConfig,
        compute: Compute,
        generator: torch.Generator,
    ) -> None:
        self.online = nn.Sequential(trunk, projector)
        self.key = copy.deepcopy(self.online).requires_grad_(False)
        self._training = training
        self._compute = compute
        self._optimiser = torch.optim.SGD(
            self.online.parameters(), lr=1.0, momentum=training.momentum, weight_decay=training.weight_decay
        )
        dim = [m.out_features for m in projector.modules() if isinstance(m, nn.Linear)][-1]
        self.memory = FeatureMemory(training.queue_size, dim, generator)

    def step(
        self, queries: Tensor, keys: Tensor, learning_rate: float, want_gradient: bool
    ) -> tuple[Tensor, Tensor | None]:
        """Train on one step's smashed data; return the loss and what goes back to the clients.

        queries, keys: (V, B, *smashed_shape); keys[v] belongs to the other view of the images of queries[v]. The
        loss is the sum over the V view pairs of the mean over the batch. Each query is scored against its own key
        and the memory only, so the result does not depend on the order of clients in the batch.

        Returns (loss, dL/dqueries or None if the clients do not want it).
        """
        views, batch = queries.shape[:2]
        received = queries.detach().flatten(0, 1).requires_grad_(want_gradient)
        with self._compute.autocast():
            q = self.online(received)
            with torch.no_grad():
                k = self.key(keys.detach().flatten(0, 1))
        q = F.normalize(q.to(received.dtype), dim=1)
        k = F.normalize(k.to(received.dtype), dim=1)
        # the mean over all V * B rows, times V, is the sum over views of the batch means
        loss = views * info_nce(q, k, self.memory.keys.to(q.dtype), self._training.temperature)
        self._optimiser.zero_grad(set_to_none=True)
        loss.backward()
        for group in self._optimiser.param_groups:
            group["lr"] = learning_rate
        self._optimiser.step()
        self._update_key_model()
        self.memory.enqueue(k.to(self.memory.keys.dtype))
        gradient = received.grad.unflatten(0, (views, batch)) if received.grad is not None else None
        return loss.detach(), gradient

    @torch.no_grad()
    def _update_key_model(self) -> None:
        torch._foreach_lerp_(list(self.key.parameters()), list(self.online.parameters()), 1 - self._training.ema)
