"""Which clients take part in a step, and which of their images they use."""

from __future__ import annotations

from collections.abc import Iterator, Sequence, Set
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from mocosfl_priv.config import TrainingConfig
from mocosfl_priv.data.partitions import make_partition
from mocosfl_priv.errors import ConfigurationError
from mocosfl_priv.runtime.seeding import generator
from mocosfl_priv.training.state import State


@dataclass(frozen=True)
class ClientBatch:
    """The images of one step, grouped by client.

    pool: int64 (P,), the numbers of the clients.
    sizes: how many images each of them has, in the order of `pool`.
    images: uint8 (B, 3, h, w), grouped by client in the same order; B is the sum of `sizes`.
    pool_changes: whether the next step has another pool. What this pool learned must then be averaged now, since the
        next averaging would overwrite it.
    """

    pool: Tensor
    sizes: tuple[int, ...]
    images: Tensor
    pool_changes: bool = False

    def chunks(self, most_images: int) -> Iterator[ClientBatch]:
        """Split the batch between clients, into parts of at most `most_images` images or a single client."""
        first, begin, end = 0, 0, 0
        for position, size in enumerate(self.sizes):
            if end > begin and end + size - begin > most_images:
                yield ClientBatch(self.pool[first:position], self.sizes[first:position], self.images[begin:end])
                first, begin = position, end
            end += size
        yield ClientBatch(self.pool[first:], self.sizes[first:], self.images[begin:end])

    def without(self, clients: Set[int]) -> ClientBatch:
        """Return the batch without these clients and their images."""
        if not clients:
            return self
        stays = torch.tensor([client not in clients for client in self.pool.tolist()])
        images = self.images[stays.repeat_interleave(torch.tensor(self.sizes))]
        sizes = tuple(size for size, here in zip(self.sizes, stays.tolist(), strict=True) if here)
        return ClientBatch(self.pool[stays], sizes, images, self.pool_changes)


class Batches(Protocol):
    """An endless source of batches, one per step.

    clients: the number of all clients. images_per_epoch: the number of images of all clients.
    """

    clients: int
    images_per_epoch: int

    def next(self) -> ClientBatch:
        """Return the images of the next step."""

    def state(self) -> State:
        """Return everything that determines the following batches."""

    def load_state(self, state: State) -> None:
        """Restore what :meth:`state` returned."""


@dataclass(frozen=True)
class PoolShape:
    """The composition of the server batch: `pool` clients with `micro_batch` images each.

    Args:
        pool: clients that take part in a step.
        micro_batch: images of each of them.
        rich: how many of all `clients`, the first ones, have the memory for `rich_micro_batch` images instead.
        rich_micro_batch: images of each of these.
        clients: all clients of the system; only used where `rich` is not 0.

    >>> PoolShape.of(TrainingConfig(clients=4, server_batch=32)).images
    32
    """

    pool: int
    micro_batch: int
    rich: int = 0
    rich_micro_batch: int = 0
    clients: int = 0

    @classmethod
    def of(cls, training: TrainingConfig) -> PoolShape:
        """Return the shape that `training` asks for.

        Where `pool` is not set, the paper's rule holds: all clients take part if there are fewer than 200, otherwise a
        random pool of `server_batch` clients. Where `micro_batch` is not set, it is server_batch // pool, at least 1.
        """
        pool = training.pool or (training.clients if training.clients < 200 else training.server_batch)
        pool = min(pool, training.clients)
        micro_batch = training.micro_batch or max(1, training.server_batch // pool)
        mixed = training.heterogeneity
        if mixed is None:
            return cls(pool, micro_batch)
        return cls(pool, micro_batch, mixed.rich(training.clients), mixed.micro_batch, training.clients)

    def size_of(self, client: int) -> int:
        """Number of images that `client` contributes to a step."""
        return self.rich_micro_batch if client < self.rich else self.micro_batch

    @property
    def images_per_client(self) -> float:
        """Number of images in a step of a client, averaged over all clients."""
        if self.rich == 0:
            return self.micro_batch
        return (self.rich * self.rich_micro_batch + (self.clients - self.rich) * self.micro_batch) / self.clients

    @property
    def images(self) -> int:
        """Number of images in a step, averaged over pools and rounded."""
        return round(self.pool * self.images_per_client)


def data_weights(training: TrainingConfig) -> list[float] | None:
    """Return each client's share of the data (summing to 1), or None if all clients have equal shares."""
    mixed = training.heterogeneity
    if mixed is None:
        return None
    rich = mixed.rich(training.clients)
    poor = training.clients - rich
    return [mixed.data / rich] * rich + [(1 - mixed.data) / max(1, poor)] * poor


def seeded_partition(labels: Tensor, training: TrainingConfig, seed: int) -> list[Tensor]:
    """Return the partition of the private images in a training with `seed`: each client's indices, int64.

    labels: int64 (n,), the classes of the private images. Simulated training and the export of shards to real devices
    both use this function, so that they agree. Raises ConfigurationError when there are too few images.
    """
    return make_partition(labels, training, data_weights(training), generator(seed, "partition"))


def total_steps(images_per_epoch: int, images_per_step: int, epochs: int) -> int:
    """Return the number of whole steps in `epochs` passes over the data, at least one."""
    return max(1, images_per_epoch * epochs // images_per_step)


class PooledClients:
    """Batches for clients that each pass through their own data in random order, and shuffle it anew for every pass.

    A round is the number of steps in which an average client sees its data once. If the pool is smaller than the number
    of clients, a new random pool is drawn every round.

    images: (n, ...), of all clients. partition: the indices of each client's images, int64.
    drop_partial: skip the last images of a client's pass if they do not fill a micro-batch, as in the research code;
        otherwise the micro-batch is filled from the next pass.
    Raises ConfigurationError when a client has no image.
    """

    def __init__(
        self, images: Tensor, partition: Sequence[Tensor], shape: PoolShape, generator: torch.Generator,
        drop_partial: bool = False,
    ) -> None:  # fmt: skip
        if min(len(part) for part in partition) == 0:
            raise ConfigurationError("training.clients: a client got no image; use fewer clients or more data")
        self.clients = len(partition)
        self.images_per_epoch = sum(len(part) for part in partition)
        self._images = images
        self._partition = partition
        self._shape = shape
        self._generator = generator
        self._drop_partial = drop_partial
        self._queues: list[list[int]] = [[] for _ in partition]  # lists, since slicing them is faster than tensors
        self._steps_per_round = max(1, int(self.images_per_epoch / self.clients / shape.images_per_client))
        self._step = 0
        self._pool = torch.arange(self.clients)

    def next(self) -> ClientBatch:
        """See :class:`Batches`."""
        if self._shape.pool < self.clients and self._step % self._steps_per_round == 0:
            order = torch.randperm(self.clients, generator=self._generator)
            self._pool = order[: self._shape.pool].sort().values
        self._step += 1
        drawn = [self._draw(client) for client in self._pool.tolist()]
        changes = self._shape.pool < self.clients and self._step % self._steps_per_round == 0
        chosen = torch.tensor([image for images in drawn for image in images])
        return ClientBatch(self._pool, tuple(map(len, drawn)), self._images[chosen], changes)

    def _draw(self, client: int) -> list[int]:
        part, size = self._partition[client], self._shape.size_of(client)
        while len(self._queues[client]) < size:
            fresh = part[torch.randperm(len(part), generator=self._generator)].tolist()
            # a client with fewer images than a micro-batch always carries them over, or it would never fill one
            carried = self._queues[client] if not self._drop_partial or len(part) < size else []
            self._queues[client] = carried + fresh
        drawn = self._queues[client][:size]
        self._queues[client] = self._queues[client][size:]
        return drawn

    def state(self) -> State:
        """See :class:`Batches`."""
        return {
            "queues": torch.tensor([image for queue in self._queues for image in queue], dtype=torch.long),
            "queue_lengths": torch.tensor([len(queue) for queue in self._queues]),
            "pool": self._pool.clone(),
            "step": torch.tensor(self._step),
            "generator": self._generator.get_state(),
        }

    def load_state(self, state: State) -> None:
        """See :class:`Batches`."""
        self._queues = [queue.tolist() for queue in state["queues"].split(state["queue_lengths"].tolist())]
        self._pool = state["pool"]
        self._step = int(state["step"])
        self._generator.set_state(state["generator"])
