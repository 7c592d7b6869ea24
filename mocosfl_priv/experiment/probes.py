"""Utility of an experiment's models, and its floors, on the probe roles."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np

from mocosfl_priv.config import EvaluationConfig, ModelConfig, TrainingConfig
from mocosfl_priv.evaluation.linear_probe import linear_probe
from mocosfl_priv.evaluation.utility import (
    ProbeData,
    Utility,
    measure_utility,
    probe_features,
    raw_pixel_knn,
    selection_knn,
)
from mocosfl_priv.experiment.model_builder import ModelBuilder
from mocosfl_priv.models.split import SplitModel
from mocosfl_priv.runtime.compute import Compute
from mocosfl_priv.runtime.seeding import generator
from mocosfl_priv.training.hooks import ClientHooks, NoHooks


@dataclass
class Probes:
    """Measures what models have learned.

    data: the images of the probe roles. labelled: whether they have labels; without, no accuracy means anything.
    """

    data: ProbeData
    labelled: bool
    evaluation: EvaluationConfig
    training: TrainingConfig
    compute: Compute
    models: ModelBuilder
    _untrained: dict[tuple[str, int, int], np.ndarray] = field(default_factory=dict, init=False)

    def select(self, model: SplitModel, defense: ClientHooks, seed: int) -> float:
        """The kNN accuracy, in [0, 1], by which a checkpoint is selected; NaN without labels, so that the last one is
        kept.
        """
        if not self.labelled:
            return math.nan
        return selection_knn(
            model, self.data, defense, self.evaluation, self.compute, seed, self.training.select_on, self.training.codec
        )

    def select_expert(self, model: SplitModel, seed: int) -> float:
        """The kNN accuracy, in [0, 1], by which a defender may select a checkpoint of its expert, on the same images.

        There is no defense yet, and nothing is sent, so no codec.
        """
        return selection_knn(
            model, self.data, NoHooks(), self.evaluation, self.compute, seed, self.training.select_on
        )  # fmt: skip

    def measure(self, model: SplitModel, defense: ClientHooks, seed: int) -> Utility:
        """The utility of a trained model behind its defense."""
        return measure_utility(model, self.data, defense, self.evaluation, self.compute, seed, self.training.codec)

    @cached_property
    def raw_pixels(self) -> np.ndarray:
        """Utility floor: correctness of raw-pixel kNN on the probe test role."""
        return raw_pixel_knn(self.data, self.evaluation)

    def untrained(self, model: ModelConfig, cut_layer: int, seed: int) -> np.ndarray:
        """Utility floor: correctness of a linear probe on the same network before training."""
        key = (model.model_dump_json(), cut_layer, seed)
        if key not in self._untrained:
            network = self.models.build_untrained(model, cut_layer, seed).to(self.compute.device)
            rng = generator(seed, "untrained", device=self.compute.device)
            train, selection, test = probe_features(
                network, self.data, NoHooks(), self.evaluation, self.compute, rng, self.training.codec
            )
            self._untrained[key] = linear_probe(train, selection, test, self.evaluation.linear_probe_penalties).correct
        return self._untrained[key]
