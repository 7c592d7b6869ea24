"""Shares of runs and of images, and quantiles over images: where a mean would hide who fares worst."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.stats import beta, norm

from mocosfl_priv.evaluation.statistics import Interval, mean_interval


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
        return cls(count, of, *_clopper_pearson(count, of, confidence))

    def __str__(self) -> str:
        if self.of == 0:
            return "no run"
        return f"{self.count} of {self.of} runs [{100 * self.low:.0f}, {100 * self.high:.0f}] %"


def share_interval(
    hits: Sequence[np.ndarray], *, groups: np.ndarray | None = None, samples: int, confidence: float
) -> Interval:
    """Interval of the share of images that are hits; each array is (images,) of truth values, one per training seed.

    That of Clopper and Pearson for as many independent images as would vary like these do over seeds and groups (Korn
    and Graubard, Survey Methodology 1998): it stays within [0, 1], and of no hit at all it does not say "never".
    """
    plain = mean_interval(hits, groups=groups, samples=samples, confidence=confidence)
    independent = _independent_images(plain, len(np.unique(groups)) if groups is not None else len(hits[0]), confidence)
    low, high = _clopper_pearson(plain.value * independent, independent, confidence)
    return Interval(plain.value, min(low, plain.value), max(high, plain.value), plain.seeds)


def quantile_interval(
    per_seed: Sequence[np.ndarray],
    level: float,
    *,
    groups: np.ndarray | None = None,
    samples: int,
    confidence: float,
) -> Interval:
    """Interval of the quantile at `level` over images and seeds; each array is (images,), one per training seed.

    The interval of the share of images below the quantile, read off the same images (Woodruff, JASA 1952). Where they
    are too few to bound the quantile, it ends at the largest or smallest of them.
    """
    values = np.concatenate([np.asarray(of_seed, dtype=np.float64) for of_seed in per_seed])
    estimate = float(np.quantile(values, level))
    below = share_interval(
        [np.asarray(of_seed) <= estimate for of_seed in per_seed], groups=groups, samples=samples, confidence=confidence
    )
    low, high = np.quantile(values, [min(below.low, level), max(below.high, level)])
    return Interval(estimate, float(low), float(high), below.seeds)


def _independent_images(share: Interval, groups: int, confidence: float) -> float:
    """How many independent images give a share as uncertain as this; as many as groups where nothing varies."""
    reach = (share.high - share.low) / 2
    variance = share.value * (1 - share.value)
    if variance == 0 or reach == 0:
        return float(groups)
    return variance * float(norm.ppf((1 + confidence) / 2) / reach) ** 2


def _clopper_pearson(count: float, of: float, confidence: float) -> tuple[float, float]:
    """The exact interval of a share; of a whole number of trials, or of as many as they are worth."""
    tail = (1 - confidence) / 2
    low = float(beta.ppf(tail, count, of - count + 1)) if count > 0 else 0.0
    high = float(beta.ppf(1 - tail, count + 1, of - count)) if count < of else 1.0
    return low, high
