from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from mocosfl_priv.config import TrainingConfig
from mocosfl_priv.data.partitions import classes_per_client, dirichlet, iid, make_partition
from mocosfl_priv.errors import ConfigurationError

NAMES = ["iid", "classes_per_client", "dirichlet"]


def rng(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def sizes(parts: list[Tensor]) -> list[int]:
    return [len(part) for part in parts]


@given(n=st.integers(1, 300), clients=st.integers(1, 40), seed=st.integers(0, 5))
def test_iid_deals_out_everything_evenly(n: int, clients: int, seed: int) -> None:
    if clients > n:
        with pytest.raises(ConfigurationError, match="clients"):
            iid(n, clients, rng(seed))
        return
    parts = iid(n, clients, rng(seed))
    assert len(parts) == clients
    assert sorted(torch.cat(parts).tolist()) == list(range(n))
    assert max(sizes(parts)) - min(sizes(parts)) <= 1


@given(
    labels=st.lists(st.integers(0, 9), min_size=1, max_size=300),
    clients=st.integers(1, 20),
    shards=st.integers(1, 5),
)
def test_shards_are_disjoint_and_complete(labels: list[int], clients: int, shards: int) -> None:
    if clients * shards > len(labels):
        with pytest.raises(ConfigurationError, match="shards"):
            classes_per_client(torch.tensor(labels), clients, shards, rng())
        return
    parts = classes_per_client(torch.tensor(labels), clients, shards, rng())
    assert sorted(torch.cat(parts).tolist()) == list(range(len(labels)))
    assert max(sizes(parts)) - min(sizes(parts)) <= 1


@given(seed=st.integers(0, 50))
def test_two_classes_per_client_when_shards_divide_classes(seed: int) -> None:
    labels = torch.arange(10).repeat(20)
    parts = classes_per_client(labels, 10, 2, rng(seed))
    assert all(len(labels[part].unique()) <= 2 for part in parts)
    assert all(len(part) == 20 for part in parts)


@given(
    name=st.sampled_from(NAMES),
    labels=st.lists(st.integers(0, 6), min_size=24, max_size=200),
    weights=st.none() | st.lists(st.floats(1e-3, 1e3), min_size=1, max_size=12),
    alpha=st.floats(1e-6, 1e6),
    seed=st.integers(0, 3),
)
def test_every_partition_is_one(
    name: str, labels: list[int], weights: list[float] | None, alpha: float, seed: int
) -> None:
    """Disjoint, complete, nobody empty, and the same for the same seed; also for absurd shares and concentrations."""
    training = TrainingConfig.model_validate(
        {"clients": len(weights) if weights else 7, "partition": name, "dirichlet_alpha": alpha}
    )
    parts = make_partition(torch.tensor(labels), training, weights, rng(seed))
    assert len(parts) == training.clients and min(sizes(parts)) >= 1
    assert all(part.dtype == torch.int64 for part in parts)
    assert sorted(torch.cat(parts).tolist()) == list(range(len(labels)))
    again = make_partition(torch.tensor(labels), training, weights, rng(seed))
    assert all(torch.equal(first, second) for first, second in zip(parts, again, strict=True))


@pytest.mark.parametrize("name", NAMES)
def test_another_seed_gives_another_partition(name: str) -> None:
    labels = torch.arange(10).repeat(20)
    training = TrainingConfig.model_validate({"clients": 5, "partition": name})
    first, second = (make_partition(labels, training, None, rng(seed)) for seed in (0, 1))
    assert any(not torch.equal(a, b) for a, b in zip(first, second, strict=True))


@given(weights=st.lists(st.floats(0.1, 10), min_size=1, max_size=12), n=st.integers(100, 400))
def test_sizes_follow_the_shares_to_one_image(weights: list[float], n: int) -> None:
    labels = torch.arange(n) % 7
    for parts in (iid(n, len(weights), rng(), weights), classes_per_client(labels, len(weights), 2, rng(), weights)):
        for size, weight in zip(sizes(parts), weights, strict=True):
            quota = n * weight / sum(weights)
            # where somebody would have got nothing, the largest client has given up one image for it
            assert abs(size - quota) <= 1 or size == 1 or quota == pytest.approx(n * max(weights) / sum(weights))


def test_largest_remainders_by_hand() -> None:
    assert sizes(iid(10, 3, rng(), [1, 2, 4])) == [1, 3, 6]  # quotas 1.43, 2.86, 5.71: both spare images by remainder
    assert sizes(iid(11, 4, rng(), None)) == [3, 3, 3, 2]
    assert sizes(iid(10, 3, rng(), [1e-9, 1e-9, 1.0])) == [1, 1, 8]  # nobody is left without an image


@pytest.mark.parametrize("weights", [[1.0, 2.0], [1.0, 0.0, 1.0], [1.0, float("nan"), 1.0], [1.0, -1.0, 1.0]])
@pytest.mark.parametrize("name", NAMES)
def test_impossible_shares_are_refused(name: str, weights: list[float]) -> None:
    training = TrainingConfig.model_validate({"clients": 3, "partition": name})
    with pytest.raises(ConfigurationError, match="share"):
        make_partition(torch.arange(30) % 3, training, weights, rng())


def skew(labels: Tensor, parts: list[Tensor]) -> float:
    """Mean total variation distance between a client's classes and everybody's, each client by its size."""
    classes = int(labels.max()) + 1
    overall = torch.bincount(labels, minlength=classes) / len(labels)
    total = 0.0
    for part in parts:
        own = torch.bincount(labels[part], minlength=classes) / len(part)
        total += len(part) * float((own - overall).abs().sum()) / 2
    return total / len(labels)


@given(seed=st.integers(0, 20))
def test_the_smaller_alpha_the_less_iid(seed: int) -> None:
    labels = torch.arange(10).repeat(200)
    skews = [skew(labels, dirichlet(labels, 10, alpha, rng(seed))) for alpha in (1e3, 10.0, 1.0, 0.1, 1e-3)]
    assert skews == sorted(skews)
    assert skews[0] < 0.05 and skews[-1] > 0.5


def test_dirichlet_shares_have_the_expectation_and_variance_of_the_distribution() -> None:
    """Var of one share under Dir(a, ..., a) over N is (1/N)(1 - 1/N)/(N a + 1)."""
    labels, clients, alpha = torch.zeros(1000, dtype=torch.long), 4, 2.0
    draws = torch.tensor([sizes(dirichlet(labels, clients, alpha, rng(seed))) for seed in range(600)]) / 1000
    assert draws.mean(0) == pytest.approx([0.25] * 4, abs=0.02)
    assert draws.var(0) == pytest.approx([0.25 * 0.75 / (clients * alpha + 1)] * 4, rel=0.2)
    weighted = torch.tensor([sizes(dirichlet(labels, 3, alpha, rng(seed), [1, 2, 5])) for seed in range(600)]) / 1000
    assert weighted.mean(0) == pytest.approx([0.125, 0.25, 0.625], abs=0.02)


def test_nobody_is_empty_when_one_client_would_get_everything() -> None:
    parts = dirichlet(torch.zeros(50, dtype=torch.long), 8, 1e-6, rng())
    assert sorted(sizes(parts)) == [1] * 7 + [43]


def test_too_few_images_are_refused() -> None:
    with pytest.raises(ConfigurationError, match="8 clients but only 7 private images"):
        dirichlet(torch.zeros(7, dtype=torch.long), 8, 0.5, rng())
