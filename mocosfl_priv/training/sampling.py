"""Which clients take part in a step, and which of their images they use."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from mocosfl_priv.config import TrainingConfig
from mocosfl_priv.errors import ConfigurationError


@dataclass(frozen=True)
class ClientBatch:
    """One step's images: `pool` (P,) client indices, `images` uint8 (P, micro-batch, 3, h, w).

    pool_changes: the next step has another pool, so this one's models must be averaged now or are lost.
    """

    pool: Tensor
    images: Tensor
    pool_changes: bool = False


class Batches(Protocol):
    """An endless source of steps for a number of clients."""

    clients: int
    images_per_epoch: int

    def next(self) -> ClientBatch:
        """The next step's images."""


@dataclass(frozen=True)
class PoolShape:
    """How the server batch is made up: `pool` clients with `micro_batch` images each."""

    pool: int
    micro_batch: int

    @classmethod
    def of(cls, training: TrainingConfig) -> PoolShape:
        """The paper's rule: all clients below 200, else a random pool of server_batch; at least one image each."""
        pool = training.pool or (training.clients if training.clients < 200 else training.server_batch)
        pool = min(pool, training.clients)
        return cls(pool, training.micro_batch or max(1, training.server_batch // pool))

    @property
    def images(self) -> int:
        """Images per step."""
        return self.pool * self.micro_batch


def total_steps(images_per_epoch: int, images_per_step: int, epochs: int) -> int:
    """Steps in `epochs` passes over the data; at least one."""
    return max(1, images_per_epoch * epochs // images_per_step)


class PooledClients:
    """Every client walks through its own shuffled data, and starts again when it is through.

    A round is the time in which an average client sees its data once. Where fewer clients take part than there
    are, each round draws a new random pool.
    """

    def __init__(
        self, images: Tensor, partition: Sequence[Tensor], shape: PoolShape, generator: torch.Generator
    ) -> None:
        if min(len(part) for part in partition) == 0:
            raise ConfigurationError("training.clients: a client got no image; use fewer clients or more data")
        self.clients = len(partition)
        self.images_per_epoch = sum(len(part) for part in partition)
        self._images = images
        self._partition = partition
        self._shape = shape
        self._generator = generator
        self._queues = [torch.empty(0, dtype=torch.long) for _ in partition]
        self._steps_per_round = max(1, self.images_per_epoch // self.clients // shape.micro_batch)
        self._step = 0
        self._pool = torch.arange(self.clients)

    def next(self) -> ClientBatch:
        """See :class:`Batches`."""
        if self._shape.pool < self.clients and self._step % self._steps_per_round == 0:
            order = torch.randperm(self.clients, generator=self._generator)
            self._pool = order[: self._shape.pool].sort().values
        self._step += 1
        chosen = torch.stack([self._draw(client) for client in self._pool.tolist()])
        changes = self._shape.pool < self.clients and self._step % self._steps_per_round == 0
        return ClientBatch(self._pool, self._images[chosen], changes)

    def _draw(self, client: int) -> Tensor:
        part = self._partition[client]
        while len(self._queues[client]) < self._shape.micro_batch:
            fresh = part[torch.randperm(len(part), generator=self._generator)]
            self._queues[client] = torch.cat([self._queues[client], fresh])
        drawn = self._queues[client][: self._shape.micro_batch]
        self._queues[client] = self._queues[client][self._shape.micro_batch :]
        return drawn
