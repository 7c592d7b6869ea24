"""Utility of a split model: kNN, linear probe and semi-supervised heads, with kNN on raw pixels as a floor.

Features are computed once per split, from images without augmentation, through client, defense, codec and trunk, as in
the defended system in use.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from mocosfl_priv.config import EvaluationConfig
from mocosfl_priv.data.image_set import ImageSet
from mocosfl_priv.device.codecs import Codec
from mocosfl_priv.evaluation.knn import weighted_knn
from mocosfl_priv.evaluation.linear_probe import linear_probe
from mocosfl_priv.evaluation.semi_supervised import SemiSupervisedResult, semi_supervised
from mocosfl_priv.models.convolution import in_fast_layout
from mocosfl_priv.models.modes import in_eval_mode
from mocosfl_priv.models.split import SplitModel
from mocosfl_priv.runtime.compute import Compute
from mocosfl_priv.runtime.seeding import generator
from mocosfl_priv.training.codecs import as_received
from mocosfl_priv.training.hooks import ClientHooks

BATCH = 256

LabelledFeatures = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class ProbeData:
    """The images of the three probe roles: for training, selection and test of probes."""

    train: ImageSet
    validation: ImageSet
    test: ImageSet

    @property
    def classes(self) -> int:
        """Number of classes."""
        return len(self.train.class_names)


@dataclass(frozen=True)
class Utility:
    """Whether each image of the probe test role was classified correctly.

    knn, linear: bool (m,). linear_penalty: the chosen inverse L2 strength. semi_supervised: results by label fraction.
    """

    knn: np.ndarray
    linear: np.ndarray
    linear_penalty: float
    semi_supervised: Mapping[float, SemiSupervisedResult]


def to_unit_range(images: Tensor) -> Tensor:
    """Convert uint8 images to float32 in [0, 1]."""
    return images.float() / 255


@torch.no_grad()
def features(
    model: SplitModel,
    images: Tensor,
    hooks: ClientHooks,
    compute: Compute,
    rng: torch.Generator,
    codec: Codec = "fp32",
) -> Tensor:
    """Compute the trunk's features of uint8 images (n, 3, h, w): float32 (n, feature_dim), on the run's device.

    The defense `hooks` is applied to the smashed data, with fresh randomness for each image, and messages are rounded
    as `codec` does. The networks run in evaluation mode, which matters for a user's Dropout.
    """
    out = []
    with in_eval_mode(model.client, model.trunk):
        for batch in images.split(BATCH):
            with compute.autocast():
                smashed = model.client(to_unit_range(batch.to(compute.device)))
            smashed = as_received(hooks.protect(smashed.float(), rng), codec)
            with compute.autocast():
                out.append(model.trunk(in_fast_layout(smashed, model.trunk)).float())
    return torch.cat(out)


def selection_knn(
    model: SplitModel,
    data: ProbeData,
    hooks: ClientHooks,
    config: EvaluationConfig,
    compute: Compute,
    seed: int,
    on: Literal["validation", "test"] = "validation",
    codec: Codec = "fp32",
) -> float:
    """Return the kNN accuracy, in [0, 1], by which checkpoints are selected; neighbours are of the probe train role.

    on: the role whose images are classified; "test" only repeats a published protocol, which selects on test images.
    """
    chosen = data.validation if on == "validation" else data.test
    rng = generator(seed, "monitor", device=compute.device)
    bank = features(model, data.train.images, hooks, compute, rng, codec)
    queries = features(model, chosen.images, hooks, compute, rng, codec)
    predicted = weighted_knn(
        bank, data.train.labels.to(bank.device), queries, classes=data.classes,
        neighbours=config.knn_neighbours, temperature=config.knn_temperature,
    )  # fmt: skip
    return float((predicted.cpu() == chosen.labels).float().mean())


def probe_features(
    model: SplitModel,
    data: ProbeData,
    hooks: ClientHooks,
    config: EvaluationConfig,
    compute: Compute,
    rng: torch.Generator,
    codec: Codec = "fp32",
) -> tuple[LabelledFeatures, LabelledFeatures, LabelledFeatures]:
    """Return the data for training, selecting and testing probes, each as (features float32 (n, d), labels int64 (n,)).

    Probes are selected on the validation role, or on the test role with `probe_selection: test`, which repeats a
    published protocol that does so.
    """
    train, validation, test = (
        (features(model, split.images, hooks, compute, rng, codec), split.labels)
        for split in (data.train, data.validation, data.test)
    )
    return train, test if config.probe_selection == "test" else validation, test


def measure_utility(
    model: SplitModel,
    data: ProbeData,
    hooks: ClientHooks,
    config: EvaluationConfig,
    compute: Compute,
    seed: int,
    codec: Codec = "fp32",
) -> Utility:
    """Measure kNN, linear probe and semi-supervised heads on the probe test role, all on the same features."""
    rng = generator(seed, "probe", device=compute.device)
    train, selection, test = probe_features(model, data, hooks, config, compute, rng, codec)
    predicted = weighted_knn(
        train[0], train[1].to(train[0].device), test[0], classes=data.classes,
        neighbours=config.knn_neighbours, temperature=config.knn_temperature,
    )  # fmt: skip
    probe = linear_probe(train, selection, test, config.linear_probe_penalties)
    few_labels = {
        fraction: semi_supervised(train, selection, test, classes=data.classes, fraction=fraction, seed=seed)
        for fraction in config.label_fractions
    }
    return Utility((predicted.cpu() == data.test.labels).numpy(), probe.correct, probe.penalty, few_labels)


RAW_PIXEL_NEIGHBOURS = (1, 5, 20, 200)


def raw_pixel_knn(data: ProbeData, config: EvaluationConfig) -> np.ndarray:
    """Measure the floor of utility: weighted kNN on centred pixels, with the number of neighbours chosen on validation.

    Returns whether each image of the probe test role was classified correctly, bool (m,). An encoder that is not better
    has learned nothing useful.
    """
    mean = to_unit_range(data.train.images).mean(0)
    train, validation, test = (
        (to_unit_range(split.images) - mean).flatten(1) for split in (data.train, data.validation, data.test)
    )

    def correct(queries: Tensor, labels: Tensor, neighbours: int) -> Tensor:
        return labels == weighted_knn(
            train, data.train.labels, queries, classes=data.classes,
            neighbours=neighbours, temperature=config.knn_temperature,
        )  # fmt: skip

    best = max(RAW_PIXEL_NEIGHBOURS, key=lambda k: float(correct(validation, data.validation.labels, k).float().mean()))
    return correct(test, data.test.labels, best).numpy()
