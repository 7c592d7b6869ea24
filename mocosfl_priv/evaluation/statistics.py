"""Confidence intervals for values that vary over training seeds and over images.

There are few seeds and many images, so the two are treated differently. Images are resampled (bootstrap). Three seeds
are too few to resample, so the variance over seeds enters through Student's t. Seeds and images are crossed: every seed
has the same victims, so more seeds do not average away the variance that comes from the choice of images.
`benchmarks.calibration` measures how often the intervals miss the true value.
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

SMALLEST_EFFECT = 0.01  # smaller differences of two leak ratios are not claimed
# The critical value of an interval lies between those for the number of seeds and for the number of images. The weight
# of the former is the seeds' share of the variance to this power. Cochran and Cox use the power 1, which makes
# intervals too wide for three seeds; `benchmarks.calibration` measures this.
INTERPOLATION = 1.5
SMALLEST_P = 1e-12
SMALLEST_LEAK = 0.02  # leak ratios below this are treated as zero
Finding = Literal["leaks", "blind", "undecided"]


@dataclass(frozen=True)
class Interval:
    """An estimate `value` with its confidence interval [low, high] and the number of training seeds behind it."""

    value: float
    low: float
    high: float
    seeds: int

    def __str__(self) -> str:
        return f"{self.value:.4f} [{self.low:.4f}, {self.high:.4f}]"


@dataclass(frozen=True)
class Spread:
    """An estimate with the variances from which its interval and its p-value are computed.

    seeds, groups: the numbers of training seeds and of groups of images.
    seed_variance: of the mean over seeds; NaN with one seed, whose interval covers only the choice of images.
    below, above: variance due to the choice of images, for the interval below and above the estimate.
    """

    value: float
    seeds: int
    groups: int
    seed_variance: float
    below: float
    above: float

    def interval(self, confidence: float) -> Interval:
        """Return the interval that contains the true value in a fraction `confidence`, in (0, 1), of repetitions."""
        low, high = (self._reach(images, confidence) for images in (self.below, self.above))
        return Interval(self.value, self.value - low, self.value + high, self.seeds)

    @property
    def p_value(self) -> float:
        """The two-sided p-value for the hypothesis that the true value is zero; at least `SMALLEST_P`.

        It is 1 - c, where c is the confidence from which on the interval contains zero.
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
        """Distance from the estimate to an end of the interval; `images` is the variance due to images on that side."""
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
    """Return the confidence interval over training seeds and images; see :func:`spread` for the arguments."""
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
    """Estimate a quantity, and how much the estimate varies with training seeds and with images.

    per_seed: one array per training seed, (images, values) each, with images in the same order.
    statistic: maps means over images, shape (..., values), to the quantity of interest, shape (...). It is applied to
        the mean over images and seeds, so that a ratio is a ratio of means.
    groups: (images,), the group of each image. Images of a group, such as overlapping patches, are not independent, so
        they are resampled together. If left out, every image is its own group.
    samples: number of bootstrap samples.
    confidence: in (0, 1), determines the bootstrap quantiles from which variances are computed. The quantiles are
        widened to correct for small numbers of groups (Hesterberg, The American Statistician 2015).
    seed: of the bootstrap.
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
    """Return the two-sided critical value of Student's t: half the width of an interval, in standard errors."""
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
    """Variance due to the choice of groups, below and above `value`, by resampling groups.

    It is the squared distance from `value` to a bootstrap quantile, in units of the critical value.
    sums: (groups, values), the sum over each group's images, averaged over seeds. sizes: (groups,), images per group.
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
    """How often each of `count` groups is drawn in each bootstrap sample, float32 (samples, count).

    Estimates with equally many groups use the same draws.
    """
    rng = np.random.default_rng(seed)
    drawn = np.empty((samples, count), dtype=np.float32)
    for row in drawn:
        row[:] = np.bincount(rng.integers(count, size=count), minlength=count)
    return drawn


def _own_share(sums: np.ndarray, sizes: np.ndarray, statistic: Callable[[np.ndarray], np.ndarray]) -> float:
    """Share of the variance between groups, in [0, 1], that is the same for all seeds.

    The rest is interaction between seeds and images, which the variance between seeds includes already. The share is
    computed from the mean squares of a two-way table (seeds by groups, without repetitions) of jackknife influences,
    that is, of how the estimate changes when a group is left out.
    sums: (seeds, groups, values). sizes: (groups,).
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
    """Return the interval of a mean. per_seed: (images,), one array per training seed; see also :func:`spread`."""
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
    """Return the interval of the leak ratio R = 1 - mean error / mean floor.

    Error and floor of an image are resampled together. The upper end is at most 1, which R cannot exceed.
    errors, floors: (images,), one array per training seed. Other arguments: see :func:`spread`.
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
    """Estimate the difference of two leak ratios, R of `errors` minus R of `other_errors`, paired by image and seed.

    Both refer to the same images and seeds, and therefore have the same floors. Arguments as of
    :func:`leak_ratio_interval`.
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
    """Return the interval of the difference that :func:`leak_difference_spread` estimates."""
    return leak_difference_spread(
        errors, other_errors, floors, groups=groups, samples=samples, confidence=confidence
    ).interval(confidence)


def leak_finding(leak_ratios: Sequence[Interval]) -> Finding:
    """Say what the leak ratios of several single attacks on one system show.

    "blind" if all intervals end below `SMALLEST_LEAK`; otherwise "leaks" if at least one interval is above zero;
    otherwise "undecided", since there are too few seeds or images to tell.
    """
    if all(leak.high < SMALLEST_LEAK for leak in leak_ratios):
        return "blind"
    return "leaks" if any(leak.low > 0 for leak in leak_ratios) else "undecided"
