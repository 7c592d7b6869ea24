"""What all trials of an experiment share, made from its configuration and its data roles.

Each part knows one thing, and functions take the parts that they need:

    conditions   what attacks are granted, for how long, with which auxiliary images
    victims      the images under attack, with their floor
    scoring      how reconstructions are compared with victims
    library      the images among which linkage looks for the victims'
    probes       what models have learned, with the floors of utility
    models       fresh models
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from mocosfl_priv.config import ExperimentConfig
from mocosfl_priv.data.image_set import ImageSet
from mocosfl_priv.data.roles import DataRoles, Role
from mocosfl_priv.evaluation.perceptual import load_lpips
from mocosfl_priv.evaluation.recognition import RecognitionJudge, build_judge
from mocosfl_priv.evaluation.utility import ProbeData, to_unit_range
from mocosfl_priv.experiment.conditions import AttackConditions
from mocosfl_priv.experiment.linkage import Library
from mocosfl_priv.experiment.model_builder import ModelBuilder
from mocosfl_priv.experiment.probes import Probes
from mocosfl_priv.experiment.scoring import Scoring
from mocosfl_priv.experiment.victims import VictimSet
from mocosfl_priv.plugins import Attack, AuxiliaryData, Loaded, ThreatModel
from mocosfl_priv.results import ROLES, TEST_VICTIMS
from mocosfl_priv.runtime.compute import Compute


@dataclass
class EvaluationContext:
    """The parts of an experiment that do not depend on the system under attack; each is made at its first use."""

    config: ExperimentConfig
    roles: DataRoles
    compute: Compute
    threat: ThreatModel
    curve_attacks: tuple[Loaded[Attack], ...] = ()

    @property
    def private(self) -> ImageSet:
        """The clients' private images, with which they train."""
        return self.roles[Role.CLIENT_PRIVATE]

    @property
    def represented(self) -> ImageSet:
        """The images that the victims should be like: the clients' own."""
        return self.private

    @property
    def class_names(self) -> tuple[str, ...]:
        """The classes that accuracies are about."""
        return self.probes.data.train.class_names

    @property
    def clients_add_noise(self) -> bool:
        """Whether messages are random without a defense: clients that this package trains make none."""
        return False

    @cached_property
    def conditions(self) -> AttackConditions:
        """What attacks work with."""
        target, source = self.roles[Role.AUXILIARY_TARGET], self.roles[Role.AUXILIARY_SOURCE]
        auxiliary = AuxiliaryData(
            torch.cat([target.images, source.images]),
            torch.arange(len(target) + len(source), device=self.compute.device) < len(target),
        )
        return AttackConditions.of(self.config.threat, self.threat, auxiliary, self.compute)

    @cached_property
    def victims(self) -> VictimSet:
        """The victims of the data roles."""
        role = self.roles[Role.VICTIMS]
        return self.victim_set(TEST_VICTIMS, to_unit_range(role.images), ROLES, role.groups)

    def victim_set(self, name: str, images: Tensor, origin: str, groups: Tensor | None = None) -> VictimSet:
        """`images` as victims, with the floor that the clients' private images give for them."""
        return VictimSet.of(name, images, origin, to_unit_range(self.private.images), groups)

    @cached_property
    def scoring(self) -> Scoring:
        """The metrics."""
        return Scoring(*load_lpips(self.config.evaluation.lpips_network), self._build_judge)

    @cached_property
    def library(self) -> Library:
        """The images among which linkage looks for those of the victims."""
        unseen = [Role.PROBE_TEST, Role.PROBE_VALIDATION, Role.AUXILIARY_TARGET]
        return Library.draw(
            self.roles[Role.VICTIMS],
            [self.roles[role] for role in unseen],
            [self.private],
            self.config.evaluation.linkage_candidates,
            self.config.data.role_seed,
        )

    def _build_judge(self) -> RecognitionJudge | None:
        """Train what judges recognition; None where it is switched off, or where there are no labels.

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

    @cached_property
    def probes(self) -> Probes:
        """The probes."""
        data = ProbeData(
            self.roles[Role.PROBE_TRAIN], self.roles[Role.PROBE_VALIDATION], self.roles[Role.PROBE_TEST]
        )  # fmt: skip
        return Probes(
            data, self.roles.labelled, self.config.evaluation, self.config.training, self.compute, self.models
        )  # fmt: skip

    @cached_property
    def models(self) -> ModelBuilder:
        """The builder of fresh models."""
        images = to_unit_range(self.private.images)
        means, deviations = images.mean((0, 2, 3)).tolist(), images.std((0, 2, 3)).tolist()
        return ModelBuilder(self.config.data.image_size, tuple(means), tuple(deviations))
