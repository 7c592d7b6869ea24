from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from mocosfl_priv.evaluation.floor import blind_guess_floor, leak_ratio
from mocosfl_priv.evaluation.statistics import (
    Rate,
    hierarchical_bootstrap,
    leak_difference_interval,
    leak_ratio_interval,
    mean_interval,
)


def test_interval_of_one_seed_matches_the_normal_approximation() -> None:
    values = np.random.default_rng(0).normal(2.0, 1.0, 400)
    interval = mean_interval([values], samples=4000, confidence=0.95)
    half = 1.96 * values.std() / 20
    assert interval.value == pytest.approx(values.mean())
    assert interval.low == pytest.approx(values.mean() - half, abs=0.1 * half)
    assert interval.high == pytest.approx(values.mean() + half, abs=0.1 * half)


def test_seed_variation_widens_the_interval() -> None:
    rng = np.random.default_rng(0)
    image = rng.normal(0, 0.1, 100)
    alike = [image + 0.0 for _ in range(4)]
    apart = [image + shift for shift in (-1.0, 0.0, 0.5, 1.0)]
    narrow = mean_interval(alike, samples=500, confidence=0.95)
    wide = mean_interval(apart, samples=500, confidence=0.95)
    assert wide.high - wide.low > 5 * (narrow.high - narrow.low)
    assert (narrow.seeds, wide.seeds) == (4, 4)


def test_intervals_of_images_are_calibrated() -> None:
    rng = np.random.default_rng(1)
    hits = 0
    for _ in range(200):
        interval = mean_interval([rng.normal(0, 1, 60)], samples=300, confidence=0.9)
        hits += interval.low <= 0 <= interval.high
    assert 0.83 <= hits / 200 <= 0.96


def test_images_of_one_place_are_drawn_together() -> None:
    rng = np.random.default_rng(0)
    places = np.repeat(np.arange(30), 12)
    values = rng.normal(size=30)[places]  # twelve copies of thirty values: thirty observations, not 360
    naive = mean_interval([values], samples=2000, confidence=0.95)
    honest = mean_interval([values], groups=places, samples=2000, confidence=0.95)
    thirty = mean_interval([values[::12]], samples=2000, confidence=0.95)
    assert honest.high - honest.low == pytest.approx(thirty.high - thirty.low, rel=0.1)
    assert honest.high - honest.low > 2.5 * (naive.high - naive.low)


def test_leak_ratio_is_a_ratio_of_means() -> None:
    error, floor = np.array([0.0, 0.1]), np.array([0.1, 0.3])
    assert leak_ratio(error, floor) == pytest.approx(1 - 0.05 / 0.2)
    interval = leak_ratio_interval([error], [floor], samples=200, confidence=0.95)
    assert interval.value == pytest.approx(0.75)
    assert interval.low <= 0.75 <= interval.high


def test_bootstrap_is_repeatable() -> None:
    values = [np.random.default_rng(s).normal(size=(30, 1)) for s in range(3)]
    pick = lambda means: means[..., 0]  # noqa: E731
    assert hierarchical_bootstrap(values, pick, samples=100) == hierarchical_bootstrap(values, pick, samples=100)


def test_floor_is_the_better_blind_guess_and_never_looks_at_victims() -> None:
    rng = torch.Generator().manual_seed(0)
    ramp = torch.linspace(0, 1, 16).expand(3, 16, 16)
    known = (ramp + 0.1 * torch.randn((50, 3, 16, 16), generator=rng)).clamp(0, 1)
    victims = (ramp + 0.1 * torch.randn((20, 3, 16, 16), generator=rng)).clamp(0, 1)
    floor = blind_guess_floor(known, victims)
    assert floor.kind == "mean image"
    torch.testing.assert_close(floor.image, known.mean(0))
    uniform = torch.rand((3, 3, 16, 16), generator=rng)  # three images: their mean image is worse than a colour
    assert blind_guess_floor(uniform, torch.rand((20, 3, 16, 16), generator=rng)).kind == "constant colour"
    again = blind_guess_floor(known, victims.flip(0))
    assert torch.equal(again.image, floor.image)
    assert leak_ratio(floor.mse, floor.mse) == 0


def test_a_difference_of_leak_ratios_is_paired() -> None:
    """Errors that are a share of each image's own floor: R differs by the shares whatever is drawn."""
    floors = [np.random.default_rng(seed).uniform(0.01, 1, 40) for seed in range(3)]
    ours, theirs = ([share * floor for floor in floors] for share in (0.3, 0.5))
    interval = leak_difference_interval(ours, theirs, floors, samples=200, confidence=0.95)
    assert (interval.value, interval.low, interval.high) == pytest.approx((0.2, 0.2, 0.2))
    single = [leak_ratio_interval(errors, floors, samples=200, confidence=0.95) for errors in (ours, theirs)]
    assert interval.value == pytest.approx(single[0].value - single[1].value)


def test_rates_of_few_runs_are_exact_and_wide() -> None:
    none, all_of_them, some = Rate.of_runs(0, 3), Rate.of_runs(3, 3), Rate.of_runs(2, 5, confidence=0.9)
    assert (none.low, none.high) == pytest.approx((0, 1 - 0.025 ** (1 / 3)))
    assert (all_of_them.low, all_of_them.high) == pytest.approx((0.025 ** (1 / 3), 1))

    def at_least(count: int, of: int, share: float) -> float:
        return sum(math.comb(of, k) * share**k * (1 - share) ** (of - k) for k in range(count, of + 1))

    assert at_least(2, 5, some.low) == pytest.approx(0.05) and 1 - at_least(3, 5, some.high) == pytest.approx(0.05)
    assert str(none) == "0 of 3 runs [0, 71] %" and str(Rate.of_runs(0, 0)) == "no run"
