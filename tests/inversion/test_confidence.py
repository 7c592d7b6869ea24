"""How far what was learned on one client's messages is believed about another's."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mocosfl_priv.inversion.confidence import confidence, explained, trust


def maps(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_explained_is_the_share_of_variance() -> None:
    some = maps(7, 200, 2, 4, 4)
    assert explained(some, some) == 1
    assert explained(some, torch.zeros_like(some)) == pytest.approx(0, abs=0.01)
    assert explained(some, 0.5 * some) == pytest.approx(0.75, abs=0.01)
    assert explained(torch.ones(3, 2), torch.zeros(3, 2)) == 0


def test_a_loud_channel_does_not_decide_alone_and_a_dead_one_not_at_all() -> None:
    some = maps(8, 100, 3, 4, 4) * torch.tensor([100.0, 1.0, 0.0]).view(3, 1, 1)
    half = some * torch.tensor([1.0, 0.0, 1.0]).view(3, 1, 1)
    assert explained(some, half) == pytest.approx(0.5, abs=0.01)


@given(st.floats(-1, 1), st.floats(-1, 1))
def test_confidence_is_a_share(theirs: float, own: float) -> None:
    assert 0 <= confidence(max(theirs, 0.0), own) <= 1
    assert confidence(0.5, 0.0) == 0 and confidence(2.0, 1.0) == 1


@given(st.integers(0, 10**6), st.floats(0, 1), st.floats(0.1, 3))
def test_trust_is_the_step_towards_the_truth_times_the_squared_confidence(seed: int, sure: float, scale: float) -> None:
    guess = maps(seed, 1, 3, 1, 1)
    images = maps(seed + 1, 20, 3, 4, 4)
    decoded = guess + scale * (images - guess)  # right but for its contrast
    assert trust(sure, decoded, images, guess) == pytest.approx(sure**2 * min(1.0, 1 / scale))
    unrelated = maps(seed + 2, 20, 3, 4, 4)
    best = min(
        (float((guess + step * (unrelated - guess) - images).square().sum()), step)
        for step in torch.linspace(0, 1, 101).tolist()
    )[1]
    assert trust(1.0, unrelated, images, guess) == pytest.approx(best, abs=0.011)
