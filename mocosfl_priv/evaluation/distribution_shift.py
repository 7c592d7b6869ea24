"""Permutation tests of whether two sets of images have the same mean colours and contrast.

They detect, for example, images that were un-normalised with wrong constants, or twice. Metrics of such images look
plausible but cannot be compared with others.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

LARGEST_SAMPLE = 2000  # groups of a set that take part in a test
PERMUTATIONS = 2000
SIGNIFICANCE = 0.001
SMALLEST_SHIFT = 0.3  # in standard deviations of the statistic over the target's images
STATISTICS = {1: ("brightness", "contrast"), 3: ("red", "green", "blue", "contrast")}  # by channels


@dataclass(frozen=True)
class ImageStatistics:
    """Statistics of n images.

    values: float (n, c + 1), the mean of each colour and the contrast. groups: (n,); images of a group share pixels.
    """

    values: np.ndarray
    groups: np.ndarray


@dataclass(frozen=True)
class Shift:
    """The difference of a statistic between victims and target data.

    victims, target: means over the images. effect: their difference, in standard deviations over the target's images.
    """

    statistic: str
    victims: float
    target: float
    effect: float
    p_value: float

    @property
    def matters(self) -> bool:
        """Whether the difference is significant (`SIGNIFICANCE`) and large enough (`SMALLEST_SHIFT`)."""
        return self.p_value <= SIGNIFICANCE and abs(self.effect) >= SMALLEST_SHIFT


def image_statistics(images: np.ndarray, groups: np.ndarray) -> ImageStatistics:
    """Compute the mean of each colour and the contrast of images, in [0, 1].

    Contrast is the standard deviation over pixels, averaged over colours. images: uint8 (n, c, h, w), grey or
    colour. groups: (n,).
    """
    pixels = images.reshape(len(images), images.shape[1], -1).astype(np.float32) / 255
    return ImageStatistics(np.column_stack([pixels.mean(2), pixels.std(2).mean(1)]), groups)


def distribution_shifts(victims: ImageStatistics, target: ImageStatistics) -> list[Shift]:
    """Compare each statistic's mean between victims and target by a two-sample permutation test.

    A group of images that share pixels counts as one observation, the mean of its images. Of sets with more than
    `LARGEST_SAMPLE` groups, a fixed sample is taken.
    """
    rng = np.random.default_rng(0)
    first, second = _group_means(victims, rng), _group_means(target, rng)
    both = np.concatenate([first, second])
    differences = first.mean(0) - second.mean(0)
    total, extreme = both.sum(0), np.zeros_like(both[0])
    for _ in range(PERMUTATIONS):
        drawn_sum = both[rng.permutation(len(both))[: len(first)]].sum(0)
        drawn = drawn_sum / len(first) - (total - drawn_sum) / len(second)
        extreme += np.abs(drawn) >= np.abs(differences)
    deviations = target.values.std(0) + np.finfo(np.float32).eps
    return [
        Shift(name, float(first[:, i].mean()), float(second[:, i].mean()), float(differences[i] / deviations[i]),
              float((1 + extreme[i]) / (1 + PERMUTATIONS)))
        for i, name in enumerate(STATISTICS[len(differences) - 1])
    ]  # fmt: skip


def _group_means(statistics: ImageStatistics, rng: np.random.Generator) -> np.ndarray:
    """Mean statistics of each group, (groups, c + 1), for at most `LARGEST_SAMPLE` groups."""
    _, member = np.unique(statistics.groups, return_inverse=True)
    sums = np.zeros((member.max() + 1, statistics.values.shape[1]))
    np.add.at(sums, member, statistics.values)
    means = sums / np.bincount(member)[:, None]
    return means[rng.permutation(len(means))[:LARGEST_SAMPLE]]
