"""Whether a set of images looks as if drawn from a distribution: colour and contrast, by permutation tests.

Un-normalising with the wrong constants, or twice, leaves every metric plausible and none comparable; the mean colours
and the contrast of the images show it.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

LARGEST_SAMPLE = 2000
PERMUTATIONS = 2000
SIGNIFICANCE = 0.001
SMALLEST_SHIFT = 0.3  # in deviations of the target's images
STATISTICS = ("red", "green", "blue", "contrast")


@dataclass(frozen=True)
class ImageStatistics:
    """Per image the mean of each colour and the contrast, float (n, 4); groups (n,): images that share pixels."""

    values: np.ndarray
    groups: np.ndarray


@dataclass(frozen=True)
class Shift:
    """How a statistic differs: means over victims and target, `effect` in the target's deviations, and the p-value."""

    statistic: str
    victims: float
    target: float
    effect: float
    p_value: float

    @property
    def matters(self) -> bool:
        """Whether it is neither chance nor too small to care about."""
        return self.p_value <= SIGNIFICANCE and abs(self.effect) >= SMALLEST_SHIFT


def image_statistics(images: np.ndarray, groups: np.ndarray) -> ImageStatistics:
    """Mean of each colour and contrast (the deviation over pixels, averaged over colours), in [0, 1].

    images: uint8 (n, 3, h, w); groups: (n,).
    """
    pixels = images.reshape(len(images), 3, -1).astype(np.float32) / 255
    return ImageStatistics(np.column_stack([pixels.mean(2), pixels.std(2).mean(1)]), groups)


def distribution_shifts(victims: ImageStatistics, target: ImageStatistics) -> list[Shift]:
    """How the victims' statistics differ from the target's: two-sample permutation tests of the mean, per statistic.

    Images of a group share pixels and count as one observation, their mean. Of large sets a fixed sample is taken.
    """
    rng = np.random.default_rng(0)
    first, second = _group_means(victims, rng), _group_means(target, rng)
    both = np.concatenate([first, second])
    differences = first.mean(0) - second.mean(0)
    total, extreme = both.sum(0), np.zeros(len(STATISTICS))
    for _ in range(PERMUTATIONS):
        drawn_sum = both[rng.permutation(len(both))[: len(first)]].sum(0)
        drawn = drawn_sum / len(first) - (total - drawn_sum) / len(second)
        extreme += np.abs(drawn) >= np.abs(differences)
    deviations = target.values.std(0) + np.finfo(np.float32).eps
    return [
        Shift(name, float(first[:, i].mean()), float(second[:, i].mean()), float(differences[i] / deviations[i]),
              float((1 + extreme[i]) / (1 + PERMUTATIONS)))
        for i, name in enumerate(STATISTICS)
    ]  # fmt: skip


def _group_means(statistics: ImageStatistics, rng: np.random.Generator) -> np.ndarray:
    """The mean statistics of at most `LARGEST_SAMPLE` groups, (groups, 4)."""
    _, member = np.unique(statistics.groups, return_inverse=True)
    sums = np.zeros((member.max() + 1, len(STATISTICS)))
    np.add.at(sums, member, statistics.values)
    means = sums / np.bincount(member)[:, None]
    return means[rng.permutation(len(means))[:LARGEST_SAMPLE]]
