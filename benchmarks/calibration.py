"""How often intervals miss the truth: ours beside the plain two-level percentile bootstrap.

uv run python -m benchmarks.calibration

Prints a Markdown table: percent of 95 % intervals that miss, for seeds and images that matter more or less.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from mocosfl_priv.evaluation.statistics import Interval, leak_ratio_interval, mean_interval

REPETITIONS, IMAGES, SAMPLES, CONFIDENCE = 2000, 128, 500, 0.95
Draw = Callable[["Effects", int, np.random.Generator], np.ndarray]


@dataclass(frozen=True)
class Effects:
    """Standard deviations of what belongs to a seed, to an image, and to one image under one seed."""

    seed: float
    image: float
    residual: float


MIXTURES = {
    "only seeds differ": Effects(1.0, 0.0, 0.05),
    "seeds as much as images": Effects(1.0, 1.0, 1.0),
    "the means of seeds as much as those of images": Effects(0.15, 1.0, 0.5),
    "seeds hardly": Effects(0.05, 1.0, 0.5),
    "only images differ": Effects(0.0, 1.0, 0.1),
    "each image under each seed by itself": Effects(0.0, 0.0, 1.0),
}


def null_values(effects: Effects, seeds: int, rng: np.random.Generator, images: int = IMAGES) -> np.ndarray:
    """Values whose true mean is zero, (seeds, images): every seed meets the same images."""
    return (
        effects.seed * rng.normal(size=(seeds, 1))
        + effects.image * rng.normal(size=images)
        + effects.residual * rng.normal(size=(seeds, images))
    )


def miss_rate(
    interval: Callable[[np.ndarray], Interval], effects: Effects, seeds: int, repetitions: int, seed: int = 0
) -> float:
    """Share of `repetitions` in which `interval` of :func:`null_values` leaves the truth out."""
    rng = np.random.default_rng(seed)
    found = (interval(null_values(effects, seeds, rng)) for _ in range(repetitions))
    return sum(not each.low <= 0 <= each.high for each in found) / repetitions


def skewed_errors(
    effects: Effects, seeds: int, rng: np.random.Generator, images: int = IMAGES
) -> tuple[np.ndarray, np.ndarray]:
    """Errors (seeds, images) and floors (images,) of log-normal images; the effects are those of log errors.

    Without effects an error is half its floor.
    """
    floors = 0.05 * np.exp(0.7 * rng.normal(size=images))
    return 0.5 * floors * np.exp(null_values(effects, seeds, rng, images)), floors


def true_leak_ratio(effects: Effects) -> float:
    """R of :func:`skewed_errors` over all seeds and images: the mean of a log-normal variable is known."""
    return 1 - 0.5 * float(np.exp((effects.seed**2 + effects.image**2 + effects.residual**2) / 2))


def leak_miss_rate(effects: Effects, seeds: int, repetitions: int, seed: int = 0) -> float:
    """The same of R, a ratio of means of skewed values."""
    rng, truth, missed = np.random.default_rng(seed), true_leak_ratio(effects), 0
    for _ in range(repetitions):
        errors, floors = skewed_errors(effects, seeds, rng)
        found = leak_ratio_interval(list(errors), [floors] * seeds, samples=SAMPLES, confidence=CONFIDENCE)
        missed += not found.low <= truth <= found.high
    return missed / repetitions


def ours(values: np.ndarray) -> Interval:
    """The interval of all reports."""
    return mean_interval(list(values), samples=SAMPLES, confidence=CONFIDENCE)


def percentile(values: np.ndarray) -> Interval:
    """Draw seeds, then images anew within each drawn seed, and read off the quantiles."""
    seeds, images = values.shape
    rng = np.random.default_rng(0)
    drawn = rng.integers(seeds, size=(SAMPLES, seeds, 1))
    means = values[drawn, rng.integers(images, size=(SAMPLES, seeds, images))].mean((1, 2))
    low, high = np.quantile(means, [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2])
    return Interval(float(values.mean()), float(low), float(high), seeds)


def main() -> None:
    """Print the table."""
    print("| what varies | seeds | percentile bootstrap (%) | ours (%) |\n|---|---|---|---|")
    for name, effects in MIXTURES.items():
        for seeds in (3, 5):
            missed = [100 * miss_rate(method, effects, seeds, REPETITIONS) for method in (percentile, ours)]
            print(f"| {name} | {seeds} | {missed[0]:.1f} | {missed[1]:.1f} |")
    for seeds in (3, 5):
        skewed = Effects(0.05, 0.3, 0.2)
        print(f"| leak ratio of skewed errors | {seeds} | | {100 * leak_miss_rate(skewed, seeds, REPETITIONS):.1f} |")


if __name__ == "__main__":
    main()
