"""What all trials of an experiment share: data in their roles, victims and their floors, metrics, the machine."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from mocosfl_priv.config import ExperimentConfig, ModelConfig
from mocosfl_priv.data.roles import DataRoles, Role
from mocosfl_priv.evaluation.floor import Floor, blind_guess_floor, hindsight_floor
from mocosfl_priv.evaluation.linear_probe import linear_probe
from mocosfl_priv.evaluation.perceptual import Lpips, load_lpips
from mocosfl_priv.evaluation.recognition import RecognitionJudge, build_judge
from mocosfl_priv.evaluation.utility import ProbeData, probe_features, raw_pixel_knn, to_unit_range
from mocosfl_priv.models.split import SplitModel, build_split_model
from mocosfl_priv.plugins import Attack, AuxiliaryData, Loaded, ThreatModel
from mocosfl_priv.plugins.guarantee import Guarantee
from mocosfl_priv.results import RECOGNITION_LEVELS, ROLES, TEST_VICTIMS
from mocosfl_priv.runtime.compute import Compute
from mocosfl_priv.runtime.seeding import generator, global_seed
from mocosfl_priv.training.hooks import NoHooks


@dataclass(frozen=True)
class VictimSet:
    """Images whose smashed data an attacker holds, under the name that results call them by.

    images: float (n, 3, h, w) in [0, 1]; only scoring reads them. groups: (n,) which images belong together.
    floor: the blind guess for them. origin: where they come from, `ROLES` or `RELEASE`.
    """

    name: str
    images: Tensor
    groups: Tensor
    floor: Floor
    origin: str

    def mse_lower_bound(self, guarantee: Guarantee) -> np.ndarray:
        """Terms (n,) of the mean MSE on these images that `guarantee` promises of any attacker."""
        return guarantee.bound(hindsight_floor(self.images).numpy())


@dataclass
class EvaluationContext:
    """Everything that does not depend on which client is attacked."""

    config: ExperimentConfig
    roles: DataRoles
    compute: Compute
    threat: ThreatModel
    curve_attacks: tuple[Loaded[Attack], ...] = ()
    lpips: Lpips | None = field(init=False)
    lpips_note: str = field(init=False)
    _untrained: dict[tuple[str, int, int], np.ndarray] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.lpips, self.lpips_note = load_lpips(self.config.evaluation.lpips_network)

    @cached_property
    def probe_data(self) -> ProbeData:
        """The probe roles."""
        return ProbeData(self.roles[Role.PROBE_TRAIN], self.roles[Role.PROBE_VALIDATION], self.roles[Role.PROBE_TEST])

    @cached_property
    def victims(self) -> VictimSet:
        """The victims of the data roles."""
        role = self.roles[Role.VICTIMS]
        return self.victim_set(TEST_VICTIMS, to_unit_range(role.images), ROLES, role.groups)

    def victim_set(self, name: str, images: Tensor, origin: str, groups: Tensor | None = None) -> VictimSet:
        """`images` as victims, with the floor that the clients' private images give for them."""
        known = to_unit_range(self.roles[Role.CLIENT_PRIVATE].images)
        groups = torch.arange(len(images)) if groups is None else groups
        return VictimSet(name, images, groups, blind_guess_floor(known, images), origin)

    @cached_property
    def recognition(self) -> RecognitionJudge | None:
        """What judges whether reconstructions are recognised, trained here and now; None where it is switched off, or
        where there are no labels.

        It learns from the labels of the whole training split, the attacker's share included: it is no attacker, and
        only scoring uses it. The same judge serves all seeds.
        """
        epochs = self.config.evaluation.recognition_epochs
        if not epochs or not self.roles.labelled:
            return None
        seen = [Role.PROBE_TRAIN, Role.PROBE_VALIDATION, Role.AUXILIARY_TARGET, Role.DEFENDER_TARGET]
        training = [self.roles[role] for role in seen]
        return build_judge(
            training,
            self.roles[Role.VICTIMS],
            [self.roles[Role.PROBE_TEST], *training],
            epochs=epochs,
            device=self.compute.device,
            seed=self.config.data.role_seed,
        )

    @property
    def recognition_levels(self) -> dict[str, float]:
        """Chance levels and ceilings of recognition, by column; NaN where it is not measured."""
        return self.recognition.levels if self.recognition else dict.fromkeys(RECOGNITION_LEVELS, float("nan"))

    @cached_property
    def raw_pixels(self) -> np.ndarray:
        """Utility floor: correctness of raw-pixel kNN on the probe test role."""
        return raw_pixel_knn(self.probe_data, self.config.evaluation)

    @cached_property
    def auxiliary(self) -> AuxiliaryData:
        """The attacker's images."""
        target, source = self.roles[Role.AUXILIARY_TARGET], self.roles[Role.AUXILIARY_SOURCE]
        return AuxiliaryData(
            torch.cat([target.images, source.images]),
            torch.arange(len(target) + len(source), device=self.compute.device) < len(target),
        )

    @cached_property
    def colour_statistics(self) -> tuple[list[float], list[float]]:
        """Mean and deviation per colour of the clients' private images, which clients normalise with."""
        images = to_unit_range(self.roles[Role.CLIENT_PRIVATE].images)
        return images.mean((0, 2, 3)).tolist(), images.std((0, 2, 3)).tolist()

    def build_model(self, model: ModelConfig, cut_layer: int, seed: int) -> SplitModel:
        """A fresh model; equal for equal seeds whatever the defense, so that defenses can be compared in pairs."""
        return fresh_model(model, cut_layer, self.config.data.image_size, self.colour_statistics, seed)

    def untrained_probe(self, model: ModelConfig, cut_layer: int, seed: int) -> np.ndarray:
        """Utility floor: correctness of a linear probe on the same network before training."""
        key = (model.model_dump_json(), cut_layer, seed)
        if key not in self._untrained:
            network = self.build_model(model, cut_layer, seed).to(self.compute.device)
            evaluation, rng = self.config.evaluation, generator(seed, "untrained", device=self.compute.device)
            train, selection, test = probe_features(
                network, self.probe_data, NoHooks(), evaluation, self.compute, rng, self.config.training.codec
            )
            self._untrained[key] = linear_probe(train, selection, test, evaluation.linear_probe_penalties).correct
        return self._untrained[key]


def fresh_model(
    model: ModelConfig, cut_layer: int, image_size: int, colour_statistics: tuple[list[float], list[float]], seed: int
) -> SplitModel:
    """A model with weights drawn by `seed`; a function of settings only, so that it can be handed to an attacker."""
    with global_seed(seed, "initialisation"):
        return build_split_model(model, cut_layer, image_size, *colour_statistics)
