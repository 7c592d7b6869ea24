"""Utility where there are only a few labelled images: probes trained on one part of them and tested on another.

Every image is tested once, by probes that were trained and chosen on other images, so that all images count.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from mocosfl_priv.evaluation.knn import weighted_knn
from mocosfl_priv.evaluation.linear_probe import linear_probe
from mocosfl_priv.runtime.seeding import generator

FOLDS = 5
FEWEST = 10 * FOLDS  # labelled images; below, accuracies have no use
FEW_NEIGHBOURS = 20  # 200, as for a whole training set, would be most of the images


def folds_of(groups: Tensor, seed: int) -> Tensor:
    """Return the fold of every image, int64 (n,), below `FOLDS`; images of one group, int64 (n,), share a fold."""
    names, place = torch.unique(groups, return_inverse=True)
    order = torch.randperm(len(names), generator=generator(seed, "folds"))
    return (torch.arange(len(names)) % FOLDS)[order.argsort()][place]


def cross_validated_knn(
    features: Tensor, labels: Tensor, folds: Tensor, classes: int, temperature: float
) -> np.ndarray:
    """Return whether weighted kNN classifies each image correctly by the images of the other folds, bool (n,).

    features: float (n, d). labels: int64 (n,), below `classes`. folds: int64 (n,), see :func:`folds_of`.
    """
    correct = np.zeros(len(labels), dtype=bool)
    for fold in range(FOLDS):
        tested = folds == fold
        predicted = weighted_knn(
            features[~tested], labels[~tested], features[tested], classes=classes,
            neighbours=FEW_NEIGHBOURS, temperature=temperature,
        )  # fmt: skip
        correct[tested.numpy()] = (predicted == labels[tested]).numpy()
    return correct


def cross_validated_probe(features: Tensor, labels: Tensor, folds: Tensor, penalties: Sequence[float]) -> np.ndarray:
    """Return whether a linear probe classifies each image correctly, bool (n,).

    A fold is tested by the probe of three others, whose penalty is chosen on the fourth. Arguments: see
    :func:`cross_validated_knn`; penalties: inverse L2 strengths.
    """
    correct = np.zeros(len(labels), dtype=bool)
    for fold in range(FOLDS):
        tested, chosen = folds == fold, folds == (fold + 1) % FOLDS
        train, selection, test = ((features[part], labels[part]) for part in (~(tested | chosen), chosen, tested))
        correct[tested.numpy()] = linear_probe(train, selection, test, penalties).correct
    return correct
