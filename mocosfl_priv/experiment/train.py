"""One system: train -> measure utility -> let every attack try -> score."""

from __future__ import annotations

import copy
import hashlib
import json
import math
import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn

from mocosfl_priv.config import ModelConfig
from mocosfl_priv.data.roles import Role
from mocosfl_priv.device.accounting import MEBIBYTE, paper_traffic
from mocosfl_priv.device.codecs import sizes
from mocosfl_priv.errors import ConfigurationError, MocosflPrivError, RunFailedError, StorageError
from mocosfl_priv.evaluation.utility import Utility, measure_utility, selection_knn
from mocosfl_priv.experiment.attack import Attempt, Target, attack_seed, attempt, on_device, protect_afresh
from mocosfl_priv.experiment.context import EvaluationContext, fresh_model
from mocosfl_priv.experiment.observers import (
    MaliciousServer,
    ObserverGroup,
    Training,
    attach,
    copied_auxiliary,
    live_server,
    visible_to,
)
from mocosfl_priv.experiment.rows import CellResult, ScoredAttack, SystemResult, score_attempt, try_attack
from mocosfl_priv.models.custom_backbone import backbone_code
from mocosfl_priv.models.footprint import participation_flops, tensor_bytes, training_flops
from mocosfl_priv.models.split import SplitModel, count_parameters, forward_flops
from mocosfl_priv.plugins import (
    Attack,
    DefenderContext,
    Defense,
    ExpertDefense,
    Loaded,
    PreparedModel,
    StreamView,
    TrainedExpert,
    detector_in,
)
from mocosfl_priv.plugins.guarantee import Guarantee
from mocosfl_priv.results import ANALYTIC_COSTS, semi_column, short_name
from mocosfl_priv.runtime.progress import Progress, Silent
from mocosfl_priv.runtime.seeding import derive_seed, generator
from mocosfl_priv.training.checkpoints import Checkpoints
from mocosfl_priv.training.codecs import as_received
from mocosfl_priv.training.loop import TrainedModel, train_mocosfl
from mocosfl_priv.training.message_count import messages_per_draw, most_draws, rows_per_image
from mocosfl_priv.training.participants import RemoteParticipants
from mocosfl_priv.training.sampling import PooledClients, PoolShape, seeded_partition, total_steps
from mocosfl_priv.training.state import under

HONEST = Training((), ())
LONGEST_LABEL = 80  # bytes of a label in a file name; a hijacked system's name has two
DEFENDER = "defender"  # where, among a system's checkpoints, its defense keeps those of its pre-training


@dataclass(frozen=True)
class System:
    """What is trained once and then attacked by every attack: a point of the grid without its attack."""

    defense: Loaded[Defense]
    cut_layer: int
    target_fraction: float
    seed: int

    @property
    def keys(self) -> dict[str, Any]:
        """The columns that identify it in a result."""
        return {
            "defense": self.defense.label,
            "cut_layer": self.cut_layer,
            "target_fraction": self.target_fraction,
            "seed": self.seed,
        }

    @property
    def title(self) -> str:
        """For people."""
        fraction = f", {self.target_fraction:.3g} target data" if self.defense.plugin.uses_target_data else ""
        return f"{self.defense.label}, cut {self.cut_layer}{fraction}, seed {self.seed}"

    @property
    def file_stem(self) -> str:
        """A file name that is unique within a run."""
        return f"{_in_file_name(self.defense.label)}_cut{self.cut_layer}_target{self.target_fraction:g}_seed{self.seed}"

    def with_own_defense(self) -> System:
        """The same with a copy of the defense, which its training may change and no other system sees."""
        return replace(self, defense=replace(self.defense, plugin=copy.deepcopy(self.defense.plugin)))

    def trained_title(self, training: Training) -> str:
        """For people: this system, trained in that way."""
        return f"{self.title}, hijacked by {training.hijacker.label}" if training.hijacker else self.title

    def trained_stem(self, training: Training) -> str:
        """A file name for what `training` of this system leaves, unique within a run."""
        hijacker = f"_hijacked_by_{_in_file_name(training.hijacker.label)}" if training.hijacker else ""
        return self.file_stem + hijacker


def _in_file_name(label: str) -> str:
    return short_name("".join(c if c.isalnum() or c in "-_." else "_" for c in label), LONGEST_LABEL)


@dataclass
class TrainedSystem:
    """A trained system with its utility and cost, and those who attended its training.

    system: with the defense as training left it.
    guarantee: what it promises of any attacker that sees every message that training makes of an image; None for
        nothing.
    """

    system: System
    training: Training
    audience: ObserverGroup
    trained: TrainedModel
    utility: Utility
    untrained: np.ndarray
    cost: dict[str, float]
    frozen: bool
    guarantee: Guarantee | None = None

    @property
    def model(self) -> SplitModel:
        """The selected checkpoint."""
        return self.trained.model

    @property
    def file_stem(self) -> str:
        """A file name that is unique within a run."""
        return self.system.trained_stem(self.training)

    def checkpoint(self) -> dict[str, np.ndarray]:
        """Client, trunk and projector, and what the defense has learned, as named arrays."""
        state = {**self.model.named_state(), **under("defense", self.system.defense.plugin.state())}
        return {name: value.detach().cpu().contiguous().numpy() for name, value in state.items()}

    def result(self) -> SystemResult:
        """What results say of it."""
        outcome, hijacker = self.trained, self.training.hijacker
        return SystemResult(
            keys=self.system.keys,
            hijacker=hijacker.label if hijacker else "",
            file_stem=self.file_stem,
            utility=self.utility,
            untrained=self.untrained,
            cost=self.cost,
            history=outcome.history,
            observations=outcome.observations,
            detection=self._detection(),
            info={
                "steps": outcome.steps,
                "selected_step": outcome.selected_step,
                "frozen_client": self.frozen,
                "guarantee": self.guarantee.as_json() if self.guarantee else None,
                "smashed_shape": list(self.model.smashed_shape),
                "linear_probe_penalty": self.utility.linear_penalty,
                "semi_supervised": {
                    semi_column(fraction): {"labels": result.labels, "epoch": result.epoch}
                    for fraction, result in self.utility.semi_supervised.items()
                },
                "traffic_bytes": vars(outcome.traffic),
                "analytic_cost": {name: self.cost[name] for name in ANALYTIC_COSTS},
                "client_kernel": outcome.kernel,
                "replay_epochs": outcome.replay_epochs,
            },
        )

    def _detection(self) -> dict[str, Any] | None:
        detector, hijacker = detector_in(self.system.defense.plugin), self.training.hijacker
        if detector is None:
            return None
        detection = detector.detection()
        attendee = self.audience.of(hijacker.label) if hijacker else None
        return {
            "hijacked_by": hijacker.label if hijacker else "",
            "alarm": detection.alarm,
            **asdict(detection),
            "failure": attendee.failure if attendee else "",
        }


def planned_training_steps(lab: EvaluationContext) -> int:
    """Steps of one training of this experiment."""
    training = lab.config.training
    return total_steps(len(lab.roles[Role.CLIENT_PRIVATE]), PoolShape.of(training).images, training.epochs)


def train_system(
    lab: EvaluationContext,
    system: System,
    progress: Progress | None = None,
    checkpoints: Path | None = None,
    how: Training = HONEST,
    remote: RemoteParticipants | None = None,
    expert: TrainedExpert | None = None,
) -> TrainedSystem:
    """Train one system, select its checkpoint on validation data, and measure its utility and cost.

    how: who attends, and whether one of them chooses the gradients. A hijacked training has no leakage curve.
    expert: of :func:`train_expert`, which this changes; without it the defense trains its own, if it wants one.
    checkpoints: folder in which the training keeps its state, and from which it goes on.
    remote: see :func:`train_mocosfl`.
    """
    progress = progress or Silent()
    system = system.with_own_defense()
    config, defense, seed = lab.config, system.defense.plugin, system.seed
    training = config.training
    model_config = defense.architecture(config.model)
    started = time.monotonic()
    kept = checkpoints_of(lab, system, checkpoints, how)
    prepared = _prepare(system, defender_context(lab, system, model_config, progress, kept, expert))
    guarantee = training_guarantee(lab, system, prepared.frozen_client)
    if detector_in(defense) is not None and prepared.frozen_client:
        raise ConfigurationError(f"{system.title}: a detector judges gradients, and frozen clients get none")
    audience = audience_of(lab, system, prepared.model, how)
    if prepared.client_learning_rate is not None:
        training = training.model_copy(update={"client_learning_rate": prepared.client_learning_rate})

    private = lab.roles[Role.CLIENT_PRIVATE]
    batches = _client_batches(lab, seed, private.images)
    steps = planned_training_steps(lab)

    def validate(model: SplitModel) -> float:
        if not lab.roles.labelled:  # all models would score alike; so the last one is kept
            return math.nan
        return selection_knn(
            model, lab.probe_data, defense, config.evaluation, lab.compute, seed, training.select_on, training.codec
        )

    progress.begin("training", steps)
    try:
        trained = train_mocosfl(
            prepared.model,
            batches,
            training,
            steps=steps,
            compute=lab.compute,
            seed=seed,
            hooks=defense,
            server_hooks=audience,
            frozen_client=prepared.frozen_client,
            learning_rate=prepared.learning_rate,
            remote=remote,
            validate=validate,
            observe=lambda model, step, epoch: _leakage(lab, system, model, step, epoch),
            observe_every=0 if how.hijacker else config.leakage.every,
            checkpoints=kept,
            progress=progress,
        )
    except Exception as error:
        raise _failure(system.trained_title(how), error) from error
    finally:
        progress.end()
    seconds = time.monotonic() - started + prepared.earlier_seconds + trained.earlier_seconds - audience.seconds

    progress.begin("utility", 1)
    utility = measure_utility(
        trained.model, lab.probe_data, defense, config.evaluation, lab.compute, seed, training.codec
    )
    untrained = lab.untrained_probe(model_config, system.cut_layer, seed)
    progress.end()
    elements = int(np.prod(trained.model.smashed_shape))
    parameters = count_parameters(trained.model.client)
    paper = paper_traffic(
        parameters,
        elements,
        images=round(len(private) / training.clients),
        epochs=training.epochs,
        frozen=prepared.frozen_client,
    )
    cost = {
        "client_parameters": parameters,
        "client_flops": forward_flops(trained.model.client, trained.model.image_shape),
        "smashed_bytes_per_image": sum(sizes((1, *trained.model.smashed_shape), training.codec)),
        "training_megabytes": trained.traffic.total / MEBIBYTE,
        "paper_megabytes_per_client": paper.total,
        "training_seconds": seconds,
        **_analytic_cost(lab, trained.model, prepared.frozen_client),
    }
    return TrainedSystem(system, how, audience, trained, utility, untrained, cost, prepared.frozen_client, guarantee)


def _analytic_cost(lab: EvaluationContext, model: SplitModel, frozen: bool) -> dict[str, float]:
    """What an average client would compute in the whole training, and keep of one image, were it a device."""
    training, client = lab.config.training, model.client
    rows = rows_per_image(training, frozen) * training.epochs * len(lab.roles[Role.CLIENT_PRIVATE]) / training.clients
    forward = forward_flops(client, model.image_shape)
    both = 0 if frozen else training_flops(client, model.image_shape)
    return {
        "participation_flops": participation_flops(forward, both, rows=round(rows), frozen=frozen),
        "client_tensor_bytes": tensor_bytes(client, model.image_shape, frozen),
    }


def _client_batches(lab: EvaluationContext, seed: int, images: Tensor) -> PooledClients:
    """Who trains with which of the private images, step by step; `images` stand for them."""
    training = lab.config.training
    return PooledClients(
        images,
        seeded_partition(lab.roles[Role.CLIENT_PRIVATE].labels, training, seed),
        PoolShape.of(training),
        generator(seed, "client batches"),
        training.partial_batches == "drop",
    )


def _most_draws(lab: EvaluationContext, seed: int) -> int:
    """How often a training of `seed` draws the private image that it draws most."""
    images = len(lab.roles[Role.CLIENT_PRIVATE])
    return most_draws(_client_batches(lab, seed, torch.arange(images)), images, planned_training_steps(lab))


def training_guarantee(lab: EvaluationContext, system: System, frozen: bool) -> Guarantee | None:
    """What the defense promises of whoever sees every message that training makes of an image; None for nothing."""
    try:
        if system.defense.plugin.guarantee(1) is None:
            return None
        messages = _most_draws(lab, system.seed) * messages_per_draw(lab.config.training, frozen)
        return system.defense.plugin.guarantee(messages)
    except Exception as error:
        raise _failure(system.title, error) from error


def checkpoints_of(
    lab: EvaluationContext, system: System, folder: Path | None, how: Training = HONEST
) -> Checkpoints | None:
    """Where `system` keeps the state of its training below `folder`; None for nowhere."""
    if folder is None:
        return None
    document = training_document(lab, system, how)
    # with other threads only the last digits are others, and a machine may have to do with fewer than before
    document["compute"] = {name: value for name, value in document["compute"].items() if name != "threads"}
    text = json.dumps(document, sort_keys=True, default=str)
    shown = {
        **document,
        "model": {**document["model"][0], "code": document["model"][1]},
        "defense": dict(zip(("class", "code", "parameters"), document["defense"], strict=True)),
    }
    return Checkpoints(folder / system.trained_stem(how), hashlib.sha256(text.encode()).hexdigest(), shown)


def training_document(lab: EvaluationContext, system: System, how: Training) -> dict[str, Any]:
    """Everything that decides how a system's training runs, save the code around it."""
    config, defense = lab.config, system.defense
    model_config = defense.plugin.architecture(config.model)
    curve = lab.curve_attacks if config.leakage.every else ()
    return {
        "system": system.keys,
        "model": [model_config.model_dump(mode="json"), backbone_code(model_config.backbone)],
        "training": config.training.model_dump(mode="json", exclude={"checkpoint_every"}),
        "monitor": [config.evaluation.knn_neighbours, config.evaluation.knn_temperature],
        "leakage": [
            config.leakage.every,
            *([attack.origin, attack.code_sha256, attack.parameters] for attack in curve),
        ],
        "threat": config.threat.model_dump(mode="json") if curve or how.attending else None,
        "attending": [[attack.label, attack.origin, attack.code_sha256, attack.parameters] for attack in how.attending],
        "hijacked": how.hijacker is not None,
        "compute": lab.compute.describe(),
        "roles": {role: [r.content_sha256, r.label_sha256] for role, r in lab.roles.records.items()},
        "defense": [defense.origin, defense.code_sha256, defense.parameters],
    }


def audience_of(lab: EvaluationContext, system: System, model: SplitModel, how: Training) -> ObserverGroup:
    """The listeners of those who attend the training of `model`, in it from its first message on."""
    model.to(lab.compute.device)
    limit = lab.config.threat.seconds
    seated = [
        attach(attack, grant_stream(lab, system, model, attack), attack_seed(system.seed, attack), limit)
        for attack in how.attending
    ]
    kind = MaliciousServer if how.hijacker else ObserverGroup
    return kind(attendee for attendee in seated if attendee is not None)


def defender_context(
    lab: EvaluationContext,
    system: System,
    model_config: ModelConfig,
    progress: Progress,
    checkpoints: Checkpoints | None = None,
    expert: TrainedExpert | None = None,
) -> DefenderContext:
    """What the defense of `system` may use before training."""
    return DefenderContext(
        target_images=lab.roles.defender_target(system.target_fraction).images,
        source_images=lab.roles[Role.DEFENDER_SOURCE].images,
        build_model=lambda: lab.build_model(model_config, system.cut_layer, system.seed),
        training=lab.config.training,
        compute=lab.compute,
        seed=derive_seed(system.seed, "defender"),
        progress=progress,
        checkpoints=checkpoints.below(DEFENDER) if checkpoints else None,
        training_steps=planned_training_steps(lab),
        most_draws=partial(_most_draws, lab, system.seed),
        expert=expert,
    )


def expert_trainer(
    lab: EvaluationContext, system: System
) -> tuple[Loaded[ExpertDefense], DefenderContext, dict[str, Any]] | None:
    """The defense of `system`, or the part of it, that trains an expert, with what it has for that and what decides
    about it; None if nobody does.
    """
    plugin = system.defense.plugin
    context = defender_context(lab, system, plugin.architecture(lab.config.model), Silent())
    for part in (*plugin.parts, system.defense):
        trainer = part.plugin
        if isinstance(trainer, ExpertDefense) and (document := trainer.expert_document(context)) is not None:
            return cast(Loaded[ExpertDefense], part), context, document
    return None


def train_expert(lab: EvaluationContext, system: System, checkpoints: Checkpoints | None = None) -> TrainedExpert:
    """The expert of `system` alone, for a system that has one.

    checkpoints: where its training keeps its state, and from where it goes on.
    """
    found = expert_trainer(lab, system.with_own_defense())
    assert found is not None, f"{system.title} has no expert"
    part, context, _ = found
    started = time.monotonic()
    try:
        expert = part.plugin.train_expert(replace(context, checkpoints=checkpoints))
    except Exception as error:
        raise _failure(system.title, error) from error
    return replace(expert, earlier_seconds=expert.earlier_seconds + time.monotonic() - started)


def _prepare(system: System, context: DefenderContext) -> PreparedModel:
    try:
        prepared = system.defense.plugin.prepare(context)
    except Exception as error:
        raise _failure(system.title, error) from error
    return prepared or PreparedModel(context.build_model())


def restored_model(lab: EvaluationContext, system: System) -> SplitModel:
    """A model of `system`, whose weights are to be replaced; its defense is ready for :meth:`Defense.load_state`."""
    model_config = system.defense.plugin.architecture(lab.config.model)
    context = defender_context(lab, system, model_config, Silent())
    restored = system.defense.plugin.restore(context)
    return restored.model if restored else context.build_model()


def _failure(title: str, error: Exception) -> MocosflPrivError:
    """What a failed training is reported as; a user's defense can fail in any way."""
    if isinstance(error, RunFailedError) and not isinstance(error, StorageError):
        return RunFailedError(f"{title}: {error}")
    if isinstance(error, MocosflPrivError):
        return error
    return RunFailedError(f"training {title} failed: {type(error).__name__}: {error}")


def attempt_on(
    lab: EvaluationContext, trained: TrainedSystem, attack: Loaded[Attack], progress: Progress | None = None
) -> Attempt:
    """Let one attack try the victims of a trained system.

    Raises ThreatModelError when it reaches for more than it was granted.
    """
    attended = trained.audience.of(attack.label)
    target = target_of(lab, trained.system, trained.model)
    if trained.guarantee is not None:
        target = replace(target, training_messages=trained.guarantee.messages)
    (attempted,) = attempt(lab, target, attack, [lab.victims], progress, attended)
    return attempted


def attack_system(
    lab: EvaluationContext, trained: TrainedSystem, attack: Loaded[Attack], progress: Progress | None = None
) -> CellResult:
    """Let one attack try the victims of a trained system, and score what it returns.

    An attack that fails leaves a row that says why. Raises ThreatModelError when it reaches for more than it was
    granted.
    """
    attempted = attempt_on(lab, trained, attack, progress)
    trial = ScoredAttack(lab.victims, attempted, score_attempt(lab, lab.victims, attempted))
    return CellResult.of(trial, {**trained.system.keys, "attack": attack.label}, trained.result().columns(lab))


def with_own_plugin(attack: Loaded[Attack]) -> Loaded[Attack]:
    """The same with a copy of the attack, which may remember what it likes: no other system's trial sees it."""
    return replace(attack, plugin=copy.deepcopy(attack.plugin))


def target_of(lab: EvaluationContext, system: System, model: SplitModel) -> Target:
    """What attackers of a trained system are up against."""
    defense = system.defense.plugin
    return Target(
        title=system.title,
        client=model.client,
        image_shape=model.image_shape,
        defense=defense,
        server=nn.Sequential(OrderedDict(trunk=model.trunk, projector=model.projector)),
        participants=model.participants,
        build_client=_client_builder(lab, system),
        seed=system.seed,
        codec=lab.config.training.codec,
    )


def _leakage(
    lab: EvaluationContext, system: System, model: SplitModel, step: int, epoch: float
) -> list[dict[str, Any]]:
    """A point of the training-time leakage curve: every curve attack on the live model. It leaves training alone.

    The attacks start afresh at every point, with the seed they have against the finished model.
    """
    rows = []
    for attack in lab.curve_attacks:
        (trial,) = try_attack(lab, target_of(lab, system, model), attack, [lab.victims])
        rows.append({"attack": attack.label, "step": step, "epoch": epoch, **trial.summary})
    return rows


def grant_stream(lab: EvaluationContext, system: System, model: SplitModel, attack: Loaded[Attack]) -> StreamView:
    """What one attack holds while it attends the training of `model`, whose server networks it sees live."""
    defense, codec = system.defense.plugin, lab.config.training.codec
    undefended = partial(as_received, codec=codec)
    return StreamView(
        smashed_shape=model.smashed_shape,
        image_shape=model.image_shape,
        compute=lab.compute,
        visible=visible_to(attack, lab.threat),
        server=live_server(model.trunk, model.projector, lab.compute),
        protect=partial(protect_afresh, defense, codec=codec) if lab.threat.adaptive else undefended,
        auxiliary=copied_auxiliary(lab.auxiliary),
        build_client=partial(on_device, _client_builder(lab, system), lab.compute.device),
    )


def _client_builder(lab: EvaluationContext, system: System) -> Callable[[], nn.Module]:
    """Builds untrained clients; bound to settings only: a closure over the context would carry the victims along."""
    return partial(
        _untrained_client,
        system.defense.plugin.architecture(lab.config.model),
        system.cut_layer,
        lab.config.data.image_size,
        lab.colour_statistics,
        derive_seed(system.seed, "attacker's clone"),
    )


def _untrained_client(
    model: ModelConfig, cut_layer: int, image_size: int, colours: tuple[list[float], list[float]], seed: int
) -> nn.Module:
    return fresh_model(model, cut_layer, image_size, colours, seed).client
