"""The server's side of a step: trunk, projector, feature memory and the contrastive loss (MoCo, He et al., 2020)."""

from __future__ import annotations

import copy
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mocosfl_priv.config import TrainingConfig
from mocosfl_priv.models.convolution import in_fast_layout
from mocosfl_priv.runtime.compute import Compute
from mocosfl_priv.training.state import State, load_optimiser_state, optimiser_state, under, within


class FeatureMemory:
    """The queue of recent keys, which are the negatives of the loss (MoCo's queue), as one or more ring buffers.

    rings: 1 for a memory that all clients share, else the number of clients, with a ring buffer for each.
    keys: (rings, size, dim), of unit length; random directions at the start, as in MoCo.
    """

    def __init__(self, rings: int, size: int, dim: int, generator: torch.Generator) -> None:
        random = torch.randn(rings, size, dim, generator=generator, device=generator.device)
        self.keys = F.normalize(random, dim=2)
        self._next = torch.zeros(rings, dtype=torch.long)  # on the CPU, so that no slot needs a GPU synchronisation

    def of(self, client_ids: Tensor) -> Tensor:
        """Return the negatives for queries of the clients `client_ids`, int64 (n,): (size, dim) if shared by all
        clients, else (n, size, dim).
        """
        return self.keys[0] if len(self.keys) == 1 else self.keys[client_ids]

    def enqueue(self, keys: Tensor, client_ids: Tensor) -> None:
        """Overwrite the oldest keys with new ones; if there are more than fit into a ring, the last ones are kept.

        keys: (m, dim). client_ids: int64 (m,) on the CPU, the client of each key; keys of a client are contiguous.
        """
        rings, size = self.keys.shape[:2]
        client_ids = client_ids if rings > 1 else torch.zeros_like(client_ids)
        ring, count = torch.unique_consecutive(client_ids, return_counts=True)
        rank = torch.arange(len(client_ids)) - (count.cumsum(0) - count).repeat_interleave(count)
        newest = (rank >= (count - size).repeat_interleave(count)).nonzero().squeeze(1)
        slots = (self._next[client_ids] + rank) % size
        self.keys[client_ids[newest], slots[newest]] = keys[newest]
        self._next[ring] = (self._next[ring] + count) % size

    def state(self) -> State:
        """Return the keys and the next position in each ring."""
        return {"keys": self.keys, "next": self._next}

    def load_state(self, state: State) -> None:
        """Restore what :meth:`state` returned."""
        self.keys.copy_(state["keys"])
        self._next.copy_(state["next"])


def info_nce(queries: Tensor, keys: Tensor, memory: Tensor, temperature: float,
             reduction: Literal["mean", "sum"] = "mean") -> Tensor:  # fmt: skip
    """InfoNCE of each query against its key and a memory of other keys.

    The loss of MoCo: He et al., "Momentum Contrast for Unsupervised Visual Representation Learning", CVPR 2020.

    Args:
        queries: float (n, d), of unit length.
        keys: float (n, d), of unit length; keys[i] is the positive of queries[i].
        memory: float (K, d) for all queries, or (n, K, d): the negatives.
        temperature: positive; logits are divided by it.
        reduction: mean or sum over the batch.

    Returns:
        A scalar, at least 0.

    >>> queries = torch.eye(2)
    >>> round(float(info_nce(queries, queries, memory=-torch.eye(2), temperature=1.0)), 3)
    0.408
    """
    positive = (queries * keys).sum(1, keepdim=True)
    negative = queries @ memory.T if memory.dim() == 2 else torch.einsum("nd,nkd->nk", queries, memory)
    logits = torch.cat([positive, negative], dim=1) / temperature
    target = torch.zeros(len(logits), dtype=torch.long, device=logits.device)
    return F.cross_entropy(logits, target, reduction=reduction)


class MocoServer:
    """The server: online and momentum models (trunk and projector), optimiser, and feature memory.

    A step consists of :meth:`score`, called once per part of the server batch, and then :meth:`learn`. Since a query is
    compared only with its own key and the memory, and norms work per sample, the gradients of the parts add up to those
    of the whole batch. Memory use therefore does not grow with the number of clients.
    """

    def __init__(
        self, trunk: nn.Module, projector: nn.Module, training: TrainingConfig, compute: Compute,
        generator: torch.Generator,
    ) -> None:  # fmt: skip
        self.online = nn.Sequential(trunk, projector)
        self.key = copy.deepcopy(self.online).requires_grad_(False)
        self._training = training
        self._compute = compute
        self._optimiser = torch.optim.SGD(
            self.online.parameters(), lr=1.0, momentum=training.momentum, weight_decay=training.weight_decay
        )
        dim = [m.out_features for m in projector.modules() if isinstance(m, nn.Linear)][-1]
        per_client = training.feature_memory == "per_client"
        rings = training.clients if per_client else 1
        size = max(1, training.queue_size // training.clients) if per_client else training.queue_size
        self.memory = FeatureMemory(rings, size, dim, generator)
        self._new_keys: list[tuple[Tensor, Tensor]] = []

    def score(
        self, queries: Tensor, keys: Tensor, client_ids: Tensor, scale: float, want_gradient: bool
    ) -> tuple[Tensor, Tensor | None]:
        """Compute the loss of a part of the batch and add its gradients to those of the step.

        queries, keys: (m, *smashed_shape); queries[i] and keys[i] encode two views of the same image.
        client_ids: int64 (m,) on the CPU, the client of each row.
        scale: the loss is `scale` times the sum over the m queries.
        Returns the loss, a detached scalar, and its gradient with respect to `queries` (None without `want_gradient`).
        """
        if self._training.ema_update == "before_encoding" and not self._new_keys:
            self._update_key_model()
        received = in_fast_layout(queries.detach(), self.online).requires_grad_(want_gradient)
        # Cast the input as well: with a float32 shortcut, the sums of residual blocks would be float32 again.
        kind = torch.bfloat16 if self._compute.bfloat16 else received.dtype
        with self._compute.autocast():
            q = self.online(received.to(kind))
            with torch.no_grad():
                k = self.key(in_fast_layout(keys.detach(), self.key).to(kind))
        q = F.normalize(q.to(received.dtype), dim=1)
        k = F.normalize(k.to(received.dtype), dim=1)
        memory = self.memory.of(client_ids).to(q.dtype)
        loss = scale * info_nce(q, k, memory, self._training.temperature, reduction="sum")
        loss.backward()
        self._new_keys.append((k.to(self.memory.keys.dtype), client_ids))
        return loss.detach(), received.grad

    def learn(self, learning_rate: float) -> None:
        """End the step: update the online model, the momentum model and the feature memory."""
        for group in self._optimiser.param_groups:
            group["lr"] = learning_rate
        self._optimiser.step()
        self._optimiser.zero_grad(set_to_none=True)
        if self._training.ema_update == "after_step":
            self._update_key_model()
        keys, client_ids = (torch.cat(column) for column in zip(*self._new_keys, strict=True))
        self.memory.enqueue(keys, client_ids)
        self._new_keys = []

    @torch.no_grad()
    def _update_key_model(self) -> None:
        torch._foreach_lerp_(list(self.key.parameters()), list(self.online.parameters()), 1 - self._training.ema)

    def state(self) -> State:
        """Return all state except the configuration, as named tensors."""
        return {
            **under("online", self.online.state_dict()),
            **under("key", self.key.state_dict()),
            **under("memory", self.memory.state()),
            **under("optimiser", optimiser_state(self._optimiser)),
        }

    def load_state(self, state: State) -> None:
        """Restore what :meth:`state` returned."""
        self.online.load_state_dict(within(state, "online"))
        self.key.load_state_dict(within(state, "key"))
        self.memory.load_state(within(state, "memory"))
        load_optimiser_state(self._optimiser, within(state, "optimiser"))
