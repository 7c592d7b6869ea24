"""From one document to the grid of systems and attacks; everything that can be refused is refused here."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from mocosfl_priv.config import ExperimentConfig
from mocosfl_priv.data.given import GivenData
from mocosfl_priv.data.partitions import make_partition
from mocosfl_priv.data.roles import DataRoles, Role, assign_roles
from mocosfl_priv.errors import ConfigurationError, ThreatModelError
from mocosfl_priv.experiment.conditions import visible_to
from mocosfl_priv.experiment.context import EvaluationContext
from mocosfl_priv.experiment.linkage import linkage_segments
from mocosfl_priv.experiment.observers import Training, trainings
from mocosfl_priv.experiment.system import System
from mocosfl_priv.experiment.train import defender_context, planned_training_steps
from mocosfl_priv.models.split import validate_cut
from mocosfl_priv.plugins import ATTACKS, DEFENSES, Attack, Capability, Loaded, ThreatModel, expert_steps
from mocosfl_priv.runtime.compute import Compute
from mocosfl_priv.runtime.progress import Segment, Silent
from mocosfl_priv.runtime.seeding import generator
from mocosfl_priv.training.sampling import PoolShape

SECONDS_PER_STEP, SECONDS_PER_EXPERT_STEP, SECONDS_PER_ATTACK = 0.2, 0.2, 6.0  # first guesses, soon replaced


@dataclass(frozen=True)
class Plan:
    """A checked experiment, ready to run."""

    config: ExperimentConfig
    systems: tuple[System, ...]
    attacks: tuple[Loaded[Attack], ...]
    context: EvaluationContext

    @property
    def summary(self) -> str:
        """For people, before it runs."""
        return (
            f"{len(self.systems)} systems to train ({self.training_steps} steps each), {len(self.attacks)} attacks, "
            f"{self.cells} result rows"
        )

    @property
    def warnings(self) -> tuple[str, ...]:
        """What is known before training to weaken the results: one line for each such setting."""
        learning = [system for system in self.systems if not system.defense.plugin.freezes_clients]
        if not learning or not self.config.training.has_short_cut:
            return ()
        return (
            "training.average_momentum_models is false: clients that learn from different classes "
            f"(training.partition: {self.config.training.partition}) then give their keys a signature, and the server "
            "learns to tell clients apart instead of images (docs/LEARNING.md)",
        )

    @property
    def cells(self) -> int:
        """Rows of the result."""
        return len(self.systems) * len(self.attacks)

    @property
    def picture_bytes(self) -> int:
        """Bytes of the pictures that the result will hold: what is large in it, besides models."""
        side = self.config.data.image_size
        return 3 * side * side * self.config.data.victims * (self.cells + 1)

    @property
    def trainings(self) -> tuple[Training, ...]:
        """How every system is trained, the honest training first, and which attacks try what comes of it."""
        return trainings(self.attacks, self.context.threat)

    def expert_steps(self, system: System) -> int:
        """Steps that the defense of `system` will report before training."""
        model_config = system.defense.plugin.architecture(self.config.model)
        return expert_steps(system.defense.plugin, defender_context(self.context, system, model_config, Silent()))

    def training_segment(self, system: System, training: Training, steps_before: int) -> Segment:
        """What `training` of `system` is called, and how long it may take, `steps_before` before it included."""
        guess = SECONDS_PER_STEP * self.training_steps + SECONDS_PER_EXPERT_STEP * steps_before
        observing = "".join(f", {attack.label} observes" for attack in training.observing)
        kind = f"train with {steps_before} expert steps{observing}"
        return Segment(f"train {system.trained_title(training)}", kind, guess * (1 + len(training.observing)))

    def attack_segment(self, system: System, attack: Loaded[Attack]) -> Segment:
        """The same of `attack` on `system`."""
        seconds = 0.0 if attack.plugin.blind else SECONDS_PER_ATTACK
        return Segment(f"attack {system.title}: {attack.label}", attack.label, seconds)

    def linkage_segments(self, system: System, training: Training | None = None) -> list[Segment]:
        """The same of matching its messages with candidate images; none where that is not measured."""
        context, title = self.context, system.trained_title(training) if training else system.title
        return linkage_segments(title, context.conditions, context.library, [context.victims])

    @property
    def training_steps(self) -> int:
        """Steps of one training."""
        return planned_training_steps(self.context)


def plan(config: ExperimentConfig, given: GivenData | None = None) -> Plan:
    """Lay out the grid of `config`, and check everything that can be checked before training.

    given: images that are given in Python, which `config` names by their content.
    Raises ConfigurationError (ThreatModelError for attacks that are not granted what they need).
    """
    laid_out = lay_out(config, given)
    context = laid_out.context
    _check_partition(context)
    check_attacks(laid_out)
    for system in laid_out.systems:  # a defense refuses here what it cannot prepare with
        model_config = system.defense.plugin.architecture(config.model)
        prepared_with = defender_context(context, system, model_config, Silent())
        system.defense.plugin.check(prepared_with)
        expert_steps(system.defense.plugin, prepared_with)
    return laid_out


def check_attacks(laid_out: Plan) -> None:
    """Raise ConfigurationError unless all attacks have the data they need, and fit the smashed data of all systems."""
    config, context = laid_out.config, laid_out.context
    attacks = (*laid_out.attacks, *context.curve_attacks)
    _check_auxiliary_data(context.roles, attacks)
    _check_colluder(config, attacks)
    for system in laid_out.systems:  # a bottleneck that does not fit is found by building
        architecture = system.defense.plugin.architecture(config.model)
        model = context.models.build_untrained(architecture, system.cut_layer, system.seed)
        for attack in attacks:
            attack.plugin.check(model.smashed_shape, model.image_shape)


def lay_out(config: ExperimentConfig, given: GivenData | None = None) -> Plan:
    """The grid of `config`, against plugins, models and threat model: what :func:`plan` has checked once before.

    A defense that sees no target data runs once, with target fraction 0, however many fractions are asked for.
    """
    compute = Compute.resolve(config.compute)
    threat = ThreatModel.of(config.threat.grants, config.threat.adaptive)
    attacks = tuple(ATTACKS.create(spec) for spec in config.attacks)
    for attack in attacks:
        threat.require(attack.plugin.needs, attack.label)
    defenses = tuple(DEFENSES.create(spec) for spec in config.defenses)
    for defense in defenses:
        for cut_layer in config.cut_layers:
            validate_cut(defense.plugin.architecture(config.model), cut_layer)
    used = config.target_fractions if any(d.plugin.uses_target_data for d in defenses) else (0.0,)
    roles = assign_roles(config.data, max(used), given)
    curve = tuple(ATTACKS.create(spec) for spec in config.leakage.attacks) or attacks
    for attack in curve:
        threat.require(attack.plugin.needs, attack.label)
        if config.leakage.every and Capability.TRAINING_STREAM in visible_to(attack, threat):
            raise ConfigurationError(
                f"leakage: attack {attack.label!r} observes a whole training and has no place in a leakage curve, "
                "whose points are single moments; name the attacks of the curve in leakage.attacks"
            )
    context = EvaluationContext(config, roles, compute, threat, curve)
    systems = tuple(
        System(defense, cut_layer, fraction, seed)
        for seed in config.seeds
        for cut_layer in config.cut_layers
        for defense in defenses
        for fraction in (config.target_fractions if defense.plugin.uses_target_data else (0.0,))
    )
    _check_file_names(systems)
    return Plan(config, systems, attacks, context)


def _check_file_names(systems: Sequence[System]) -> None:
    """What two systems leave must not have one name, nor names that some file systems take for one."""
    names: dict[str, str] = {}
    for system in systems:
        other = names.setdefault(system.file_stem.casefold(), system.defense.label)
        if other != system.defense.label:
            raise ConfigurationError(
                f"defenses: {other!r} and {system.defense.label!r} would leave files of one name: give one of them "
                "another label"
            )


def _check_partition(context: EvaluationContext) -> None:
    """Make one as training will: whether it is possible depends on the numbers of clients and images, not on seeds."""
    training, private = context.config.training, context.private
    make_partition(private.labels, training, None, generator(context.config.seeds[0], "partition"))
    if PoolShape.of(training).images > len(private):
        raise ConfigurationError(f"training.server_batch: a step needs {PoolShape.of(training).images} images, "
                                 f"but there are only {len(private)} private ones")  # fmt: skip


def _check_auxiliary_data(roles: DataRoles, attacks: Sequence[Loaded[Attack]]) -> None:
    """A threat model may grant auxiliary data of which there is none."""
    if len(roles[Role.AUXILIARY_TARGET]) + len(roles[Role.AUXILIARY_SOURCE]) > 0:
        return
    for attack in attacks:
        if Capability.AUXILIARY_DATA in attack.plugin.needs:
            raise ThreatModelError(
                f"attack {attack.label!r} needs auxiliary_data, but data.auxiliary_target_fraction and "
                "data.auxiliary_source_fraction leave the attacker no image"
            )


def _check_colluder(config: ExperimentConfig, attacks: Sequence[Loaded[Attack]]) -> None:
    """A single client has nobody to collude with."""
    for attack in attacks:
        if PoolShape.of(config.training).pool < 2 and Capability.COLLUDING_CLIENT in attack.plugin.needs:
            raise ThreatModelError(f"attack {attack.label!r} needs colluding_client, but only one client takes part")
