"""How the private data is spread over the clients."""

from __future__ import annotations

import torch
from torch import Tensor

from mocosfl_priv.errors import ConfigurationError


def iid(n: int, clients: int, generator: torch.Generator) -> list[Tensor]:
    """Shuffle `n` indices and deal them out; sizes differ by at most one."""
    _require(n, clients, "clients")
    return list(torch.randperm(n, generator=generator).tensor_split(clients))


def classes_per_client(labels: Tensor, clients: int, shards_each: int, generator: torch.Generator) -> list[Tensor]:
    """Label-sorted shards (McMahan et al., 2017): `clients * shards_each` equal shards, dealt without replacement.

    With as many shards per class as clients allow, a client sees about `shards_each` classes. Images that do
    not fill a last equal shard stay with the last shards, so that nothing is dropped.
    """
    shards = clients * shards_each
    _require(len(labels), shards, f"shards ({clients} clients x {shards_each})")
    shuffled = torch.randperm(len(labels), generator=generator)  # ties within a class in random order
    by_label = shuffled[torch.argsort(labels[shuffled], stable=True)]
    pieces = by_label.tensor_split(shards)
    deal = torch.randperm(shards, generator=generator).view(clients, shards_each)
    return [torch.cat([pieces[int(i)] for i in hand]) for hand in deal]


def _require(samples: int, parts: int, what: str) -> None:
    if parts > samples:
        raise ConfigurationError(f"training.partition: {parts} {what} but only {samples} private images")
