from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from defenses.nopeek import NoPeek, distance_correlation

Array = NDArray[np.float64]


def by_the_definition(some: Array, others: Array) -> float:
    """Szekely, Rizzo and Bakirov (2007), definition 4: loops over pairs, in float64."""

    def centred(rows: Array) -> Array:
        n = len(rows)
        distances = np.array([[np.linalg.norm(rows[i] - rows[j]) for j in range(n)] for i in range(n)])
        return np.array(
            [
                [distances[i, j] - distances[i, :].mean() - distances[:, j].mean() + distances.mean() for j in range(n)]
                for i in range(n)
            ]
        )

    a, b = centred(some), centred(others)
    return float(np.sqrt((a * b).mean() / np.sqrt((a * a).mean() * (b * b).mean())))


@given(st.integers(0, 10**6), st.integers(2, 12), st.integers(1, 5), st.integers(1, 5), st.floats(0, 1))
def test_distance_correlation_is_that_of_the_definition(seed: int, n: int, d: int, e: int, share: float) -> None:
    random = np.random.default_rng(seed)
    some = random.normal(size=(n, d))
    others = share * some[:, :1] + (1 - share) * random.normal(size=(n, e))
    found = float(distance_correlation(torch.from_numpy(some), torch.from_numpy(others)))
    assert found == pytest.approx(by_the_definition(some, others), abs=1e-4)


def test_similar_samples_have_one_and_independent_ones_little() -> None:
    some = torch.randn(400, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    turned = -3 * some.flip(1) + 5
    assert float(distance_correlation(some, turned)) == pytest.approx(1, abs=1e-6)
    other = torch.randn(400, 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    assert float(distance_correlation(some, other)) < 0.2
    # what Pearson's correlation misses
    assert float(distance_correlation(some[:, :1], some[:, :1].square())) > 0.4


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_equal_messages_have_a_finite_gradient(dtype: torch.dtype) -> None:
    images = torch.rand(6, 3, 8, 8)
    smashed = torch.ones(6, 4, 4, 4, dtype=dtype, requires_grad=True)
    loss = NoPeek(2.0).client_loss(images, smashed)
    assert loss is not None
    loss.backward()
    assert float(loss.detach()) == 0
    assert smashed.grad is not None and bool(smashed.grad.isfinite().all())
    assert NoPeek().client_loss(images[:1], smashed[:1]) is None


def test_it_falls_during_training_of_a_client() -> None:
    torch.manual_seed(0)
    images = torch.rand(48, 3, 1, 1).expand(
        -1, -1, 6, 6
    )  # one colour each: independent rows of many columns look alike
    client = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3, padding=1), torch.nn.ReLU())
    defense, optimiser = NoPeek(1.0), torch.optim.Adam(client.parameters(), lr=0.02)
    found = []
    for _ in range(60):
        loss = defense.client_loss(images, client(images))
        assert loss is not None
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        found.append(float(loss.detach()))
    assert found[0] > 0.7 and found[-1] < found[0] - 0.1
