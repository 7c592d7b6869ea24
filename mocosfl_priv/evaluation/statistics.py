"""Intervals for values that vary over training seeds and over images."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from scipy.stats import beta

CHUNK = 50
SMALLEST_EFFECT = 0.01  # difference of two leak ratios below which none is claimed


@dataclass(frozen=True)
class Interval:
    """An estimate with its bootstrap interval and the number of seeds it rests on."""

    value: float
    low: float
    high: float
    seeds: int

    def __str__(self) -> str:
        return f"{self.value:.4f} [{self.low:.4f}, {self.high:.4f}]"


def hierarchical_bootstrap(
    per_seed: Sequence[np.ndarray],
    statistic: Callable[[np.ndarray], np.ndarray],
    *,
    groups: np.ndarray | None = None,
    samples: int = 2000,
    confidence: float = 0.95,
    seed: int = 0,
) -> Interval:
    """Percentile interval by resampling seeds, then groups of images within each drawn seed.

    per_seed: one array per training seed, (images, values) each, rows in the same image order.
    statistic: maps means over images, shape (..., values), to the quantity of interest, shape (...). The mean over
        images and seeds is taken first, so that a ratio is a ratio of means.
    groups: (images,) which images belong together, such as overlapping patches of one place: they are drawn
        together, since they are not independent. Every image is its own group if left out.
    With one seed the interval covers the choice of images only, not of training.
    """
    data = np.stack([np.asarray(values, dtype=np.float64) for values in per_seed])
    seeds, images, values = data.shape
    _, member = np.unique(np.arange(images) if groups is None else groups, return_inverse=True)
    sizes = np.bincount(member).astype(np.float64)
    sums = np.zeros((seeds, len(sizes), values))
    for one, total in zip(data, sums, strict=True):
        np.add.at(total, member, one)
    rng = np.random.default_rng(seed)
    estimates = []
    for start in range(0, samples, CHUNK):  # vectorised, in chunks that stay small beside the data
        count = min(CHUNK, samples - start)
        drawn_seeds = rng.integers(seeds, size=(count, seeds, 1))
        drawn_groups = rng.integers(len(sizes), size=(count, seeds, len(sizes)))
        totals = sums[drawn_seeds, drawn_groups].sum(2)
        means = totals / sizes[drawn_groups].sum(2, keepdims=True)
        estimates.append(statistic(means.mean(1)))
    tail = (1 - confidence) / 2
    low, high = np.quantile(np.concatenate(estimates), [tail, 1 - tail])
    return Interval(float(statistic(data.mean((0, 1)))), float(low), float(high), seeds)


def mean_interval(
    per_seed: Sequence[np.ndarray], *, groups: np.ndarray | None = None, samples: int, confidence: float
) -> Interval:
    """Interval of a mean; each array is (images,)."""
    columns = [np.asarray(values, dtype=np.float64)[:, None] for values in per_seed]
    return hierarchical_bootstrap(
        columns, lambda means: means[..., 0], groups=groups, samples=samples, confidence=confidence
    )


def leak_ratio_interval(
    errors: Sequence[np.ndarray],
    floors: Sequence[np.ndarray],
    *,
    groups: np.ndarray | None = None,
    samples: int,
    confidence: float,
) -> Interval:
    """Interval of R = 1 - mean error / mean floor, resampling error and floor of an image together."""
    pairs = [np.column_stack([error, floor]) for error, floor in zip(errors, floors, strict=True)]
    return hierarchical_bootstrap(
        pairs, lambda means: 1 - means[..., 0] / means[..., 1], groups=groups, samples=samples, confidence=confidence
    )


def leak_difference_interval(
    errors: Sequence[np.ndarray],
    other_errors: Sequence[np.ndarray],
    floors: Sequence[np.ndarray],
    *,
    groups: np.ndarray | None = None,
    samples: int,
    confidence: float,
) -> Interval:
    """Interval of R of the first minus R of the others, where both face the same images and so the same floors.

    Resamples what belongs to an image and a seed together, so that the difference is paired by both.
    """
    pairs = [
        np.column_stack([other - error, floor])
        for error, other, floor in zip(errors, other_errors, floors, strict=True)
    ]
    return hierarchical_bootstrap(
        pairs, lambda means: means[..., 0] / means[..., 1], groups=groups, samples=samples, confidence=confidence
    )


@dataclass(frozen=True)
class Rate:
    """How many of how many, with the interval of Clopper and Pearson (Biometrika 1934); all of [0, 1] of none."""

    count: int
    of: int
    low: float
    high: float

    @classmethod
    def of_runs(cls, count: int, of: int, confidence: float = 0.95) -> Rate:
        """Exact, so wide where runs are few: 0 of 3 may still be 7 in 10."""
        tail = (1 - confidence) / 2
        low = float(beta.ppf(tail, count, of - count + 1)) if count else 0.0
        high = float(beta.ppf(1 - tail, count + 1, of - count)) if count < of else 1.0
        return cls(count, of, low, high)

    def __str__(self) -> str:
        if self.of == 0:
            return "no run"
        return f"{self.count} of {self.of} runs [{100 * self.low:.0f}, {100 * self.high:.0f}] %"
