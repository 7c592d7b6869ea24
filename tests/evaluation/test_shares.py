from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from scipy.stats import binomtest

from benchmarks.calibration import Effects, null_values
from mocosfl_priv.evaluation.shares import Rate, quantile_interval, share_interval

OPTIONS: dict[str, Any] = {"samples": 500, "confidence": 0.95}


def test_rates_of_few_runs_are_exact_and_wide() -> None:
    none, all_of_them, some = Rate.of_runs(0, 3), Rate.of_runs(3, 3), Rate.of_runs(2, 5, confidence=0.9)
    assert (none.low, none.high) == pytest.approx((0, 1 - 0.025 ** (1 / 3)))
    assert (all_of_them.low, all_of_them.high) == pytest.approx((0.025 ** (1 / 3), 1))

    def at_least(count: int, of: int, share: float) -> float:
        return sum(math.comb(of, k) * share**k * (1 - share) ** (of - k) for k in range(count, of + 1))

    assert at_least(2, 5, some.low) == pytest.approx(0.05) and 1 - at_least(3, 5, some.high) == pytest.approx(0.05)
    assert str(Rate.of_runs(0, 0)) == "no run" and (Rate.of_runs(0, 0).low, Rate.of_runs(0, 0).high) == (0, 1)


def test_a_share_of_independent_images_has_about_the_exact_interval() -> None:
    hits = np.arange(200) < 30
    found, exact = share_interval([hits], **OPTIONS), binomtest(30, 200).proportion_ci(0.95, "exact")
    assert found.value == 0.15
    assert (found.low, found.high) == pytest.approx((exact.low, exact.high), abs=0.01)


@pytest.mark.parametrize("hit", [0.0, 1.0])
def test_no_hit_among_few_images_is_not_never(hit: float) -> None:
    found = share_interval([np.full(20, hit)] * 3, **OPTIONS)
    exact = binomtest(int(20 * hit), 20).proportion_ci(0.95, "exact")
    assert (found.low, found.high) == pytest.approx((exact.low, exact.high))
    places = share_interval([np.full(20, hit)] * 3, groups=np.arange(20) // 10, **OPTIONS)
    assert places.high - places.low > 2 * (found.high - found.low)


def test_seeds_that_disagree_widen_a_share() -> None:
    agreed = share_interval([np.arange(100) < 50] * 3, **OPTIONS)
    disagreed = share_interval([np.arange(100) < hits for hits in (20, 50, 80)], **OPTIONS)
    assert agreed.value == disagreed.value == 0.5
    assert disagreed.high - disagreed.low > 3 * (agreed.high - agreed.low)
    assert 0 <= disagreed.low <= disagreed.high <= 1


@pytest.mark.parametrize("seeds", [1, 3])
def test_quantiles_are_covered(seeds: int) -> None:
    """The true 95th percentile of a sum of normal effects is known; one seed can only speak of its own images."""
    effects = Effects(0.0 if seeds == 1 else 0.2, 1.0, 0.5)
    truth = 1.6449 * math.hypot(effects.seed, effects.image, effects.residual)
    rng, missed = np.random.default_rng(0), 0
    for _ in range(300):
        values = null_values(effects, seeds, rng, images=200)
        found = quantile_interval(list(values), 0.95, samples=200, confidence=0.95)
        missed += not found.low <= truth <= found.high
    assert missed / 300 <= 0.08


def test_a_quantile_is_numpys_and_within_its_interval() -> None:
    values = [np.random.default_rng(seed).uniform(size=50) for seed in range(3)]
    found = quantile_interval(values, 0.95, **OPTIONS)
    assert found.value == pytest.approx(np.quantile(np.concatenate(values), 0.95))
    assert found.low < found.value <= found.high <= max(map(max, values))
