"""Train one system and measure its utility and cost; attacks on it are in `attack_system`."""

from __future__ import annotations

import hashlib
import json
import time
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor

from mocosfl_priv.config import ModelConfig
from mocosfl_priv.data.roles import Role
from mocosfl_priv.device.accounting import MEBIBYTE, paper_traffic
from mocosfl_priv.device.codecs import sizes
from mocosfl_priv.errors import ConfigurationError, MocosflPrivError, RunFailedError, StorageError
from mocosfl_priv.experiment.attack_system import leakage_points, observers_of
from mocosfl_priv.experiment.context import EvaluationContext
from mocosfl_priv.experiment.observers import Training
from mocosfl_priv.experiment.system import HONEST, System, TrainedSystem
from mocosfl_priv.models.custom_backbone import backbone_code
from mocosfl_priv.models.footprint import participation_flops, tensor_bytes, training_flops
from mocosfl_priv.models.split import SplitModel, count_parameters, forward_flops
from mocosfl_priv.plugins import (
    CheckpointScore,
    DefenderContext,
    ExpertDefense,
    Loaded,
    PreparedModel,
    TrainedExpert,
    detector_in,
)
from mocosfl_priv.plugins.guarantee import Guarantee
from mocosfl_priv.runtime.progress import Progress, Silent
from mocosfl_priv.runtime.seeding import derive_seed, generator
from mocosfl_priv.training.checkpoints import Checkpoints
from mocosfl_priv.training.loop import train_mocosfl
from mocosfl_priv.training.message_count import messages_per_draw, most_draws, rows_per_image
from mocosfl_priv.training.participants import RemoteParticipants
from mocosfl_priv.training.sampling import PooledClients, PoolShape, seeded_partition, total_steps

DEFENDER = "defender"  # where, among a system's checkpoints, its defense keeps those of its pre-training


def planned_training_steps(context: EvaluationContext) -> int:
    """Steps of one training of this experiment."""
    training = context.config.training
    return total_steps(len(context.private), PoolShape.of(training).images, training.epochs)


def train_system(
    context: EvaluationContext,
    system: System,
    progress: Progress | None = None,
    checkpoints: Path | None = None,
    how: Training = HONEST,
    remote: RemoteParticipants | None = None,
    expert: TrainedExpert | None = None,
) -> TrainedSystem:
    """Train one system, select its checkpoint on validation data, and measure its utility and cost.

    how: which attacks observe, and whether one of them chooses the gradients. A hijacked training has no leakage curve.
    expert: of :func:`train_expert`, which this changes; without it the defense trains its own, if it wants one.
    checkpoints: folder in which the training keeps its state, and from which it goes on.
    remote: see :func:`train_mocosfl`.
    """
    progress = progress or Silent()
    system = system.with_own_defense()
    config, defense, seed = context.config, system.defense.plugin, system.seed
    training = config.training
    model_config = defense.architecture(config.model)
    started = time.monotonic()
    kept = checkpoints_of(context, system, checkpoints, how)
    prepared = _prepare(system, defender_context(context, system, model_config, progress, kept, expert))
    guarantee = training_guarantee(context, system, prepared.frozen_client)
    if detector_in(defense) is not None and prepared.frozen_client:
        raise ConfigurationError(f"{system.title}: a detector judges gradients, and frozen clients get none")
    observers = observers_of(context, system, prepared.model, how)
    if prepared.client_learning_rate is not None:
        training = training.model_copy(update={"client_learning_rate": prepared.client_learning_rate})

    batches = _client_batches(context, seed, context.private.images)
    steps = planned_training_steps(context)

    progress.begin("training", steps)
    try:
        trained = train_mocosfl(
            prepared.model,
            batches,
            training,
            steps=steps,
            compute=context.compute,
            seed=seed,
            hooks=defense,
            server_hooks=observers,
            frozen_client=prepared.frozen_client,
            learning_rate=prepared.learning_rate,
            remote=remote,
            validate=lambda model: context.probes.select(model, defense, seed),
            leakage_points=partial(leakage_points, context, system),
            leakage_every=0 if how.hijacker else config.leakage.every,
            checkpoints=kept,
            progress=progress,
        )
    except Exception as error:
        raise _failure(system.trained_title(how), error) from error
    finally:
        progress.end()
    seconds = time.monotonic() - started + prepared.earlier_seconds + trained.earlier_seconds - observers.seconds

    progress.begin("utility", 1)
    utility = context.probes.measure(trained.model, defense, seed)
    untrained = context.probes.untrained(model_config, system.cut_layer, seed)
    progress.end()
    elements = int(np.prod(trained.model.smashed_shape))
    parameters = count_parameters(trained.model.client)
    paper = paper_traffic(
        parameters,
        elements,
        images=round(len(context.private) / training.clients),
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
        **_analytic_cost(context, trained.model, prepared.frozen_client),
    }
    return TrainedSystem(system, how, observers, trained, utility, untrained, cost, prepared.frozen_client, guarantee)


def _analytic_cost(context: EvaluationContext, model: SplitModel, frozen: bool) -> dict[str, float]:
    """What an average client would compute in the whole training, and keep of one image, were it a device."""
    training, client = context.config.training, model.client
    rows = rows_per_image(training, frozen) * training.epochs * len(context.private) / training.clients
    forward = forward_flops(client, model.image_shape)
    both = 0 if frozen else training_flops(client, model.image_shape)
    return {
        "participation_flops": participation_flops(forward, both, rows=round(rows), frozen=frozen),
        "client_tensor_bytes": tensor_bytes(client, model.image_shape, frozen),
    }


def _client_batches(context: EvaluationContext, seed: int, images: Tensor) -> PooledClients:
    """Who trains with which of the private images, step by step; `images` stand for them."""
    training = context.config.training
    return PooledClients(
        images,
        seeded_partition(context.private.labels, training, seed),
        PoolShape.of(training),
        generator(seed, "client batches"),
        training.partial_batches == "drop",
    )


def _most_draws(context: EvaluationContext, seed: int) -> int:
    """How often a training of `seed` draws the private image that it draws most."""
    images = len(context.private)
    return most_draws(_client_batches(context, seed, torch.arange(images)), images, planned_training_steps(context))


def training_guarantee(context: EvaluationContext, system: System, frozen: bool) -> Guarantee | None:
    """What the defense promises of whoever sees every message that training makes of an image; None for nothing."""
    try:
        if system.defense.plugin.guarantee(1) is None:
            return None
        messages = _most_draws(context, system.seed) * messages_per_draw(context.config.training, frozen)
        return system.defense.plugin.guarantee(messages)
    except Exception as error:
        raise _failure(system.title, error) from error


def checkpoints_of(
    context: EvaluationContext, system: System, folder: Path | None, how: Training = HONEST
) -> Checkpoints | None:
    """Where `system` keeps the state of its training below `folder`; None for nowhere."""
    if folder is None:
        return None
    document = training_document(context, system, how)
    # with other threads only the last digits are others, and a machine may have to do with fewer than before
    document["compute"] = {name: value for name, value in document["compute"].items() if name != "threads"}
    text = json.dumps(document, sort_keys=True, default=str)
    shown = {
        **document,
        "model": {**document["model"][0], "code": document["model"][1]},
        "defense": dict(zip(("class", "code", "parameters"), document["defense"], strict=True)),
    }
    return Checkpoints(folder / system.trained_stem(how), hashlib.sha256(text.encode()).hexdigest(), shown)


def training_document(context: EvaluationContext, system: System, how: Training) -> dict[str, Any]:
    """Everything that decides how a system's training runs, save the code around it."""
    config, defense = context.config, system.defense
    model_config = defense.plugin.architecture(config.model)
    curve = context.curve_attacks if config.leakage.every else ()
    return {
        "system": system.keys,
        "model": [model_config.model_dump(mode="json"), backbone_code(model_config.backbone)],
        "training": config.training.model_dump(mode="json", exclude={"checkpoint_every"}),
        "monitor": [config.evaluation.knn_neighbours, config.evaluation.knn_temperature],
        "leakage": [
            config.leakage.every,
            *([attack.origin, attack.code_sha256, attack.parameters] for attack in curve),
        ],
        "threat": config.threat.model_dump(mode="json") if curve or how.observing else None,
        "observing": [[attack.label, attack.origin, attack.code_sha256, attack.parameters] for attack in how.observing],
        "hijacked": how.hijacker is not None,
        "compute": context.compute.describe(),
        "roles": {role: [r.content_sha256, r.label_sha256] for role, r in context.roles.records.items()},
        "defense": [defense.origin, defense.code_sha256, defense.parameters],
    }


def defender_context(
    context: EvaluationContext,
    system: System,
    model_config: ModelConfig,
    progress: Progress,
    checkpoints: Checkpoints | None = None,
    expert: TrainedExpert | None = None,
) -> DefenderContext:
    """What the defense of `system` may use before training."""
    return DefenderContext(
        target_images=context.roles.defender_target(system.target_fraction).images,
        source_images=context.roles[Role.DEFENDER_SOURCE].images,
        build_model=lambda: context.models.build(model_config, system.cut_layer, system.seed),
        training=context.config.training,
        compute=context.compute,
        seed=derive_seed(system.seed, "defender"),
        progress=progress,
        checkpoints=checkpoints.below(DEFENDER) if checkpoints else None,
        training_steps=planned_training_steps(context),
        most_draws=partial(_most_draws, context, system.seed),
        expert=expert,
        checkpoint_score=_checkpoint_score(context, system.seed) if context.roles.labelled else None,
    )


def _checkpoint_score(context: EvaluationContext, seed: int) -> CheckpointScore:
    """What a defender may choose a checkpoint of its expert by: kNN on the images that `training.select_on` names."""
    config = context.config
    on = config.training.select_on
    records = [
        context.roles.records[role]
        for role in (Role.PROBE_TRAIN, Role.PROBE_VALIDATION if on == "validation" else Role.PROBE_TEST)
    ]
    return CheckpointScore(
        lambda model: context.probes.select_expert(model, seed),
        {
            "select_on": on,
            "knn": [config.evaluation.knn_neighbours, config.evaluation.knn_temperature],
            "images": [[record.content_sha256, record.label_sha256] for record in records],
        },
    )


def expert_trainer(
    context: EvaluationContext, system: System
) -> tuple[Loaded[ExpertDefense], DefenderContext, dict[str, Any]] | None:
    """The defense of `system`, or the part of it, that trains an expert, with what it has for that and what decides
    about it; None if nobody does.
    """
    plugin = system.defense.plugin
    prepared_with = defender_context(context, system, plugin.architecture(context.config.model), Silent())
    for part in (*plugin.parts, system.defense):
        trainer = part.plugin
        if isinstance(trainer, ExpertDefense) and (document := trainer.expert_document(prepared_with)) is not None:
            return cast(Loaded[ExpertDefense], part), prepared_with, document
    return None


def train_expert(context: EvaluationContext, system: System, checkpoints: Checkpoints | None = None) -> TrainedExpert:
    """The expert of `system` alone, for a system that has one.

    checkpoints: where its training keeps its state, and from where it goes on.
    """
    found = expert_trainer(context, system.with_own_defense())
    assert found is not None, f"{system.title} has no expert"
    part, prepared_with, _ = found
    started = time.monotonic()
    try:
        expert = part.plugin.train_expert(replace(prepared_with, checkpoints=checkpoints))
    except Exception as error:
        raise _failure(system.title, error) from error
    return replace(expert, earlier_seconds=expert.earlier_seconds + time.monotonic() - started)


def _prepare(system: System, context: DefenderContext) -> PreparedModel:
    try:
        prepared = system.defense.plugin.prepare(context)
    except Exception as error:
        raise _failure(system.title, error) from error
    return prepared or PreparedModel(context.build_model())


def restored_model(context: EvaluationContext, system: System) -> SplitModel:
    """A model of `system`, whose weights are to be replaced; its defense is ready for :meth:`Defense.load_state`."""
    model_config = system.defense.plugin.architecture(context.config.model)
    prepared_with = defender_context(context, system, model_config, Silent())
    restored = system.defense.plugin.restore(prepared_with)
    return restored.model if restored else prepared_with.build_model()


def _failure(title: str, error: Exception) -> MocosflPrivError:
    """What a failed training is reported as; a user's defense can fail in any way."""
    if isinstance(error, RunFailedError) and not isinstance(error, StorageError):
        return RunFailedError(f"{title}: {error}")
    if isinstance(error, MocosflPrivError):
        return error
    return RunFailedError(f"training {title} failed: {type(error).__name__}: {error}")
