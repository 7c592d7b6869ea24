from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.stats import kstest, ttest_1samp

from benchmarks.calibration import MIXTURES, Effects, leak_miss_rate, miss_rate, null_values, ours
from mocosfl_priv.evaluation.floor import blind_guess_floor, leak_ratio
from mocosfl_priv.evaluation.statistics import (
    Interval,
    hierarchical_bootstrap,
    leak_difference_interval,
    leak_ratio_interval,
    mean_interval,
    spread,
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


def test_the_standard_error_is_that_of_crossed_analysis_of_variance() -> None:
    """Against mean squares written as loops, on values with effects of seeds, of images and of both."""
    values = null_values(Effects(0.3, 1.0, 0.5), 4, np.random.default_rng(3), images=40)
    found = spread([row[:, None] for row in values], lambda means: means[..., 0], samples=20000)
    seeds, images = values.shape
    grand = sum(map(sum, values.tolist())) / (seeds * images)
    of_seed = [sum(row) / images for row in values.tolist()]
    of_image = [sum(values[s, i] for s in range(seeds)) / seeds for i in range(images)]
    between_seeds = sum((mean - grand) ** 2 for mean in of_seed) / (seeds - 1)
    between_images = seeds * sum((mean - grand) ** 2 for mean in of_image) / (images - 1)
    residual = sum(
        (values[s, i] - of_seed[s] - of_image[i] + grand) ** 2 for s in range(seeds) for i in range(images)
    ) / ((seeds - 1) * (images - 1))
    assert found.seed_variance == pytest.approx(between_seeds / seeds)
    expected = (between_images - residual) / (seeds * images)
    assert (found.below, found.above) == pytest.approx((expected, expected), rel=0.15)


@pytest.mark.parametrize("seeds", [3, 5])
@pytest.mark.parametrize("name", ["only seeds differ", "the means of seeds as much as those of images"])
def test_intervals_miss_as_often_as_they_say(name: str, seeds: int) -> None:
    assert 0.025 <= miss_rate(ours, MIXTURES[name], seeds, 500) <= 0.075


@pytest.mark.slow
@pytest.mark.parametrize("seeds", [3, 5])
@pytest.mark.parametrize("name", list(MIXTURES))
def test_intervals_miss_in_five_percent_whatever_varies(name: str, seeds: int) -> None:
    assert 0.035 <= miss_rate(ours, MIXTURES[name], seeds, 5000) <= 0.065


@pytest.mark.slow
def test_the_leak_ratio_of_skewed_errors_is_covered() -> None:
    for seeds in (3, 5):
        assert 0.035 <= leak_miss_rate(Effects(0.05, 0.3, 0.2), seeds, 5000) <= 0.065


def test_p_values_are_where_the_interval_begins_to_contain_zero() -> None:
    values = null_values(Effects(0.05, 1.0, 0.5), 3, np.random.default_rng(0)) + 0.25
    found = spread([row[:, None] for row in values], lambda means: means[..., 0])
    assert 1e-6 < found.p_value < 0.5
    assert found.interval(1 - 0.99 * found.p_value).low < 0 < found.interval(1 - 1.01 * found.p_value).low


def test_with_images_only_the_p_value_is_that_of_the_t_test() -> None:
    values = np.random.default_rng(1).normal(0.2, 1, 200)
    found = spread([values[:, None]], lambda means: means[..., 0], samples=20000)
    assert found.p_value == pytest.approx(ttest_1samp(values, 0).pvalue, rel=0.3)
    seeds = np.array([0.1, 0.35, 0.2])
    apart = spread([np.full((50, 1), mean) for mean in seeds], lambda means: means[..., 0])
    assert apart.p_value == pytest.approx(ttest_1samp(seeds, 0).pvalue)


def test_p_values_of_no_difference_are_uniform() -> None:
    rng, effects = np.random.default_rng(5), Effects(0.1, 0.0, 1.0)
    drawn = [null_values(effects, 3, rng) for _ in range(400)]
    p = [spread([row[:, None] for row in each], lambda means: means[..., 0], samples=300).p_value for each in drawn]
    assert kstest(p, "uniform").pvalue > 0.01


def test_one_image_or_no_variation_gives_an_interval_without_width() -> None:
    for values in ([np.array([2.0])], [np.array([2.0])] * 3, [np.full(5, 2.0)] * 3):
        assert mean_interval(values, samples=100, confidence=0.95) == Interval(2.0, 2.0, 2.0, len(values))


def test_a_leak_ratio_is_never_said_to_be_above_one() -> None:
    floors = [np.full(20, 0.06)] * 3
    errors = [np.full(20, error) for error in (0.001, 0.02, 0.04)]
    found = leak_ratio_interval(errors, floors, samples=200, confidence=0.95)
    assert found.low < found.value < found.high == 1.0
