"""Intervals for values that vary over training seeds and over images.

Seeds are few and images many, so the two are treated differently. Images are resampled (bootstrap); the variance over
seeds, which three runs cannot be resampled for, enters with Student's t. Seeds and images are crossed: every seed meets
the same victims, so what an image adds is not averaged away by more seeds. `benchmarks.calibration` measures how often
the intervals miss.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Literal

import numpy as np
from scipy.optimize import brentq
from scipy.stats import norm
from scipy.stats import t as student

SMALLEST_EFFECT = 0.01  # difference of two leak ratios below which none is claimed
# Between the critical value of the seeds and that of the images, by the seeds' share of the variance to this power.
# Cochran and Cox interpolate with power 1, which is too wide for three seeds; `benchmarks.calibration` measures this.
INTERPOLATION = 1.5
SMALLEST_P = 1e-12
SMALLEST_LEAK = 0.02  # what may pass for a leak ratio of zero
Finding = Literal["leaks", "blind", "undecided"]


@dataclass(frozen=True)
class Interval:
    """An estimate with its interval and the number of seeds it rests on."""

    value: float
    low: float
    high: float
    seeds: int

    def __str__(self) -> str:
        return f"{self.value:.4f} [{self.low:.4f}, {self.high:.4f}]"


@dataclass(frozen=True)
class Spread:
    """An estimate with the variances of which its interval and its p-value are made.

    seed_variance: of the mean over seeds; NaN with one seed, whose interval covers the choice of images only.
    below, above: variance that the choice of images adds, from the estimate downwards and upwards.
    """

    value: float
    seeds: int
    groups: int
    seed_variance: float
    below: float
    above: float

    def interval(self, confidence: float) -> Interval:
        """The interval that covers the truth in a share `confidence` of repetitions."""
        low, high = (self._reach(images, confidence) for images in (self.below, self.above))
        return Interval(self.value, self.value - low, self.value + high, self.seeds)

    @property
    def p_value(self) -> float:
        """Two-sided, of the hypothesis that the true value is zero; at least `SMALLEST_P`.

        It is one minus the confidence at which the interval begins to contain zero.
        """
        images, distance = (self.below if self.value > 0 else self.above), abs(self.value)

        def surplus(p: float) -> float:
            return self._reach(images, 1 - p) - distance

        if distance == 0:
            return 1.0
        if surplus(SMALLEST_P) <= 0:
            return SMALLEST_P
        return float(brentq(surplus, SMALLEST_P, 1.0, xtol=1e-12))

    def _reach(self, images: float, confidence: float) -> float:
        """How far the interval reaches to the side on which the choice of images adds the variance `images`."""
        among_images = critical_value(confidence, max(1, self.groups - 1))
        if self.seeds == 1:
            return among_images * images**0.5
        total = self.seed_variance + images
        if total == 0:
            return 0.0
        share = (self.seed_variance / total) ** INTERPOLATION
        among_seeds = critical_value(confidence, self.seeds - 1)
        return (among_images + (among_seeds - among_images) * share) * total**0.5


def hierarchical_bootstrap(
    per_seed: Sequence[np.ndarray],
    statistic: Callable[[np.ndarray], np.ndarray],
    *,
    groups: np.ndarray | None = None,
    samples: int = 2000,
    confidence: float = 0.95,
    seed: int = 0,
) -> Interval:
    """Interval over training seeds and images; see :func:`spread` for arguments."""
    return spread(per_seed, statistic, groups=groups, samples=samples, confidence=confidence, seed=seed).interval(
        confidence
    )


def spread(
    per_seed: Sequence[np.ndarray],
    statistic: Callable[[np.ndarray], np.ndarray],
    *,
    groups: np.ndarray | None = None,
    samples: int = 2000,
    confidence: float = 0.95,
    seed: int = 0,
) -> Spread:
    """How much an estimate varies with training seeds and with images.

    per_seed: one array per training seed, (images, values) each, rows in the same image order.
    statistic: maps means over images, shape (..., values), to the quantity of interest, shape (...). The mean over
        images and seeds is taken first, so that a ratio is a ratio of means.
    groups: (images,) which images belong together, such as overlapping patches of one place: they are drawn
        together, since they are not independent. Every image is its own group if left out.
    confidence: at which the bootstrap's quantiles are read; they are those of few images, widened for their number
        (Hesterberg, The American Statistician 2015).
    """
    data = np.stack([np.asarray(values, dtype=np.float64) for values in per_seed])
    seeds, images, values = data.shape
    _, member = np.unique(np.arange(images) if groups is None else groups, return_inverse=True)
    sizes = np.bincount(member).astype(np.float64)
    sums = np.zeros((seeds, len(sizes), values))
    for one, total in zip(data, sums, strict=True):
        np.add.at(total, member, one)
    value = float(statistic(data.mean((0, 1))))
    below, above = _image_variances(sums.mean(0), sizes, statistic, value, samples, confidence, seed)
    if seeds == 1:
        return Spread(value, 1, len(sizes), np.nan, below, above)
    per_training = statistic(data.mean(1))
    own = _own_share(sums, sizes, statistic)
    return Spread(value, seeds, len(sizes), float(np.var(per_training, ddof=1)) / seeds, own * below, own * above)


@lru_cache(maxsize=4096)
def critical_value(confidence: float, degrees: int) -> float:
    """How many standard errors a two-sided interval of Student's t reaches."""
    return float(student.ppf((1 + confidence) / 2, degrees))


def _image_variances(
    sums: np.ndarray,
    sizes: np.ndarray,
    statistic: Callable[[np.ndarray], np.ndarray],
    value: float,
    samples: int,
    confidence: float,
    seed: int,
) -> tuple[float, float]:
    """Variance by resampling groups, below and above `value`: squared distance of a quantile in critical values.

    sums: (groups, values) sum over the images of each group, mean over seeds. sizes: (groups,) images in each.
    """
    count = len(sizes)
    if count == 1:
        return 0.0, 0.0
    centre = sums.sum(0) / sizes.sum()
    drawn = _drawn_groups(count, samples, seed)
    deviations = drawn @ (sums - centre * sizes[:, None]).astype(np.float32)
    estimates = statistic(centre + deviations / (drawn @ sizes.astype(np.float32))[:, None])
    critical = critical_value(confidence, count - 1)
    tail = float(norm.sf(critical * (count / (count - 1)) ** 0.5))
    low, high = np.quantile(estimates, [tail, 1 - tail])
    return max(0.0, float(value - low) / critical) ** 2, max(0.0, float(high - value) / critical) ** 2


@lru_cache(maxsize=4)
def _drawn_groups(count: int, samples: int, seed: int) -> np.ndarray:
    """How often each group is drawn, float32 (samples, count); the same for all estimates over as many groups."""
    rng = np.random.default_rng(seed)
    drawn = np.empty((samples, count), dtype=np.float32)
    for row in drawn:
        row[:] = np.bincount(rng.integers(count, size=count), minlength=count)
    return drawn


def _own_share(sums: np.ndarray, sizes: np.ndarray, statistic: Callable[[np.ndarray], np.ndarray]) -> float:
    """Share of the variance between images, in [0, 1], that is the images' own and not a seed's whim with each.

    The latter stands in the variance between seeds already. From the mean squares of a two-way table without
    repetitions, of what leaving out a group changes (jackknife).
    sums: (seeds, groups, values); sizes: (groups,).
    """
    seeds, count, _ = sums.shape
    if count == 1:
        return 0.0
    totals = sums.sum(1, keepdims=True)
    without = statistic((totals - sums) / (sizes.sum() - sizes)[:, None])
    changes = (count - 1) * (statistic(totals / sizes.sum()) - without)
    between_groups = seeds * float(np.var(changes.mean(0), ddof=1))
    residuals = changes - changes.mean(0) - changes.mean(1, keepdims=True) + changes.mean()
    within = float((residuals**2).sum()) / ((seeds - 1) * (count - 1))
    return max(0.0, between_groups - within) / between_groups if between_groups > 0 else 0.0


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
    """Interval of R = 1 - mean error / mean floor, resampling error and floor of an image together.

    It ends at 1: with few seeds Student's t reaches beyond what R can be.
    """
    pairs = [np.column_stack([error, floor]) for error, floor in zip(errors, floors, strict=True)]
    found = hierarchical_bootstrap(
        pairs, lambda means: 1 - means[..., 0] / means[..., 1], groups=groups, samples=samples, confidence=confidence
    )
    return replace(found, high=min(found.high, 1.0))


def leak_difference_spread(
    errors: Sequence[np.ndarray],
    other_errors: Sequence[np.ndarray],
    floors: Sequence[np.ndarray],
    *,
    groups: np.ndarray | None = None,
    samples: int,
    confidence: float,
) -> Spread:
    """R of the first minus R of the others, where both face the same images and so the same floors.

    Keeps together what belongs to an image and a seed, so that the difference is paired by both.
    """
    pairs = [
        np.column_stack([other - error, floor])
        for error, other, floor in zip(errors, other_errors, floors, strict=True)
    ]
    return spread(
        pairs, lambda means: means[..., 0] / means[..., 1], groups=groups, samples=samples, confidence=confidence
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
    """Interval of :func:`leak_difference_spread`."""
    return leak_difference_spread(
        errors, other_errors, floors, groups=groups, samples=samples, confidence=confidence
    ).interval(confidence)


def leak_finding(leak_ratios: Sequence[Interval]) -> Finding:
    """What the leak ratios of several single attacks on one system show.

    "blind" where all stay below `SMALLEST_LEAK`, "leaks" where one is shown to be above zero; else the seeds and images
    are too few to tell.
    """
    if all(leak.high < SMALLEST_LEAK for leak in leak_ratios):
        return "blind"
    return "leaks" if any(leak.low > 0 for leak in leak_ratios) else "undecided"
