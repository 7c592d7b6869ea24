"""Confidence intervals of shares of runs or images, and of quantiles over images.

Unlike a mean, they show how much the most affected images leak.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.stats import beta, norm

from mocosfl_priv.evaluation.statistics import Interval, mean_interval


@dataclass(frozen=True)
class Rate:
    """The share `count` of `of`, with its interval [low, high] by Clopper and Pearson (Biometrika 1934).

    If `of` is 0, the interval is [0, 1].
    """

    count: int
    of: int
    low: float
    high: float

    @classmethod
    def of_runs(cls, count: int, of: int, confidence: float = 0.95) -> Rate:
        """Make the rate of `count` among `of` runs.

        The interval is exact, and therefore wide if there are few runs: for 0 of 3 runs it reaches to 0.71.
        """
        return cls(count, of, *_clopper_pearson(count, of, confidence))

    def __str__(self) -> str:
        if self.of == 0:
            return "no run"
        return f"{self.count} of {self.of} runs [{100 * self.low:.0f}, {100 * self.high:.0f}] %"


def share_interval(
    hits: Sequence[np.ndarray], *, groups: np.ndarray | None = None, samples: int, confidence: float
) -> Interval:
    """Return the interval of the share of images that are hits.

    The interval is that of Clopper and Pearson for an effective number of independent images, chosen to have the same
    variance as these images over seeds and groups (Korn and Graubard, Survey Methodology 1998). It stays within [0, 1],
    and its upper end is above 0 even if there is no hit.

    hits: bool (images,), one array per training seed. groups: (images,); images of a group are not independent.
    samples: of the bootstrap. confidence: in (0, 1).
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
    """Return the interval of the quantile at `level`, in [0, 1], over images and seeds.

    The ends of the interval of the share of images below the quantile are turned into quantiles of the same images
    (Woodruff, JASA 1952). If there are too few images to bound the quantile, the interval ends at the smallest or
    largest value.

    per_seed: (images,), one array per training seed. Other arguments: see :func:`share_interval`.
    """
    values = np.concatenate([np.asarray(of_seed, dtype=np.float64) for of_seed in per_seed])
    estimate = float(np.quantile(values, level))
    below = share_interval(
        [np.asarray(of_seed) <= estimate for of_seed in per_seed], groups=groups, samples=samples, confidence=confidence
    )
    low, high = np.quantile(values, [min(below.low, level), max(below.high, level)])
    return Interval(estimate, float(low), float(high), below.seeds)


def _independent_images(share: Interval, groups: int, confidence: float) -> float:
    """The number of independent images whose share would be as uncertain; the number of groups if nothing varies."""
    reach = (share.high - share.low) / 2
    variance = share.value * (1 - share.value)
    if variance == 0 or reach == 0:
        return float(groups)
    return variance * float(norm.ppf((1 + confidence) / 2) / reach) ** 2


def _clopper_pearson(count: float, of: float, confidence: float) -> tuple[float, float]:
    """The exact interval of a share; `count` and `of` need not be whole numbers."""
    tail = (1 - confidence) / 2
    low = float(beta.ppf(tail, count, of - count + 1)) if count > 0 else 0.0
    high = float(beta.ppf(1 - tail, count + 1, of - count)) if count < of else 1.0
    return low, high
