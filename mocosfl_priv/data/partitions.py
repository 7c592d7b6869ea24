"""Partitions of the private data among the clients."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from mocosfl_priv.config import TrainingConfig
from mocosfl_priv.errors import ConfigurationError


def make_partition(
    labels: Tensor, training: TrainingConfig, weights: Sequence[float] | None, generator: torch.Generator
) -> list[Tensor]:
    """Return the partition that `training.partition` names: each client's indices, int64, without overlap.

    labels: int64 (n,), the classes of the private images.
    weights: every client's relative share of the data, each above 0; None for equal shares.
    Raises ConfigurationError when there are too few images.
    """
    if training.partition == "iid":
        return iid(len(labels), training.clients, generator, weights)
    if training.partition == "classes_per_client":
        return classes_per_client(labels, training.clients, training.classes_per_client, generator, weights)
    return dirichlet(labels, training.clients, training.dirichlet_alpha, generator, weights)


def iid(n: int, clients: int, generator: torch.Generator, weights: Sequence[float] | None = None) -> list[Tensor]:
    """Shuffle `n` indices and deal them out in proportion to `weights`; equal shares differ by at most one image."""
    _require(n, clients, "clients")
    sizes = _sizes(n, _shares(weights, clients))
    return list(torch.randperm(n, generator=generator).split(sizes))


def classes_per_client(
    labels: Tensor,
    clients: int,
    shards_each: int,
    generator: torch.Generator,
    weights: Sequence[float] | None = None,
) -> list[Tensor]:
    """Sort images by label, cut them into shards, and deal `shards_each` shards to each client (McMahan et al., 2017).

    Shards are dealt at random. The shards of a client are equally long, up to one image; without `weights` all shards
    are. If shards are no longer than a class, a client sees about `shards_each` classes. A client with a large weight
    has longer shards, which may contain more classes; a client with fewer images than shards has some empty shards.
    """
    shards = clients * shards_each
    _require(len(labels), shards, f"shards ({clients} clients x {shards_each})")
    sizes = _sizes(len(labels), _shares(weights, clients))
    shuffled = torch.randperm(len(labels), generator=generator)  # ties within a class in random order
    by_label = shuffled[torch.argsort(labels[shuffled], stable=True)]
    deal = torch.randperm(shards, generator=generator).view(clients, shards_each)
    lengths = torch.empty(shards, dtype=torch.long)
    for hand, size in zip(deal, sizes, strict=True):
        lengths[hand] = torch.tensor(_sizes(size, [1.0] * shards_each, least=0))
    pieces = by_label.split(lengths.tolist())
    return [torch.cat([pieces[int(i)] for i in hand]) for hand in deal]


def dirichlet(
    labels: Tensor,
    clients: int,
    alpha: float,
    generator: torch.Generator,
    weights: Sequence[float] | None = None,
) -> list[Tensor]:
    """Deal the images with Dirichlet label skew (Hsu et al., 2019), drawn per class as by Yurochkin et al. (ICML 2019).

    For each class, the clients' shares of images are drawn from Dir(alpha): nearly equal for a large `alpha`, almost
    everything for one client for a small one. So the number of images of a client is random. With `weights` w, shares
    are drawn from Dir(alpha * clients * w / sum(w)), so that a client's expected number is proportional to its w.
    Each client left without images, in the order of clients, gets the last image of the client that then has the most
    (the first of several), so that every client has at least one.
    """
    _require(len(labels), clients, "clients")
    concentration = alpha * clients * np.array(_shares(weights, clients))
    # numpy's sampler, seeded from `generator`: torch's Dirichlet sampler has no public argument for a generator
    rng = np.random.default_rng(int(torch.randint(2**62, (1,), generator=generator)))
    hands: list[list[int]] = [[] for _ in range(clients)]
    for label in labels.unique().tolist():
        members = (labels == label).nonzero().flatten()
        members = members[torch.randperm(len(members), generator=generator)]
        sizes = _sizes(len(members), rng.dirichlet(concentration).tolist(), least=0)
        for client, part in enumerate(members.split(sizes)):
            hands[client] += part.tolist()
    for hand in hands:
        if not hand:
            hand.append(max(hands, key=len).pop())
    return [torch.tensor(hand) for hand in hands]


def _shares(weights: Sequence[float] | None, clients: int) -> list[float]:
    """`weights` scaled to sum 1; equal shares for None."""
    if weights is None:
        weights = [1.0] * clients
    if len(weights) != clients:
        raise ConfigurationError(f"training.clients: {len(weights)} data shares for {clients} clients")
    if not all(math.isfinite(weight) and weight > 0 for weight in weights):
        raise ConfigurationError("training.clients: every client's share of the data must be a number above 0")
    total = math.fsum(weights)
    return [weight / total for weight in weights]


def _sizes(n: int, weights: Sequence[float], least: int = 1) -> list[int]:
    """Divide `n` in proportion to `weights` by the largest-remainder method, lowest index first among equals.

    Entries below `least` (0 or 1) then take one from the largest entry. The result sums to `n`.
    """
    total = math.fsum(weights)
    quotas = [n * weight / total for weight in weights]
    sizes = [int(quota) for quota in quotas]
    # rounded, so that equal remainders compare as equal despite rounding errors of the division
    by_remainder = sorted(range(len(sizes)), key=lambda i: (-round(quotas[i] - sizes[i], 9), i))
    for i in by_remainder[: n - sum(sizes)]:
        sizes[i] += 1
    for i, size in enumerate(sizes):
        if size < least:
            sizes[sizes.index(max(sizes))] -= 1
            sizes[i] += 1
    return sizes


def _require(samples: int, parts: int, what: str) -> None:
    if parts > samples:
        raise ConfigurationError(f"training.clients: {parts} {what} but only {samples} private images")
