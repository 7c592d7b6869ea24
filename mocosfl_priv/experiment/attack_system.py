"""Attacks on a system of an experiment: while it trains, and when it is trained."""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

from torch import nn

from mocosfl_priv.experiment.attack import Attempt, Target, attack_seed, attempt, on_device, protect_afresh
from mocosfl_priv.experiment.context import EvaluationContext
from mocosfl_priv.experiment.linkage import Linkage, link
from mocosfl_priv.experiment.observers import (
    MaliciousServer,
    ObserverGroup,
    Training,
    attach,
    live_server,
)
from mocosfl_priv.experiment.rows import CellResult, score_attempt, try_attack
from mocosfl_priv.experiment.system import System, TrainedSystem
from mocosfl_priv.models.split import SplitModel
from mocosfl_priv.plugins import Attack, Loaded, StreamView
from mocosfl_priv.runtime.progress import Progress
from mocosfl_priv.runtime.seeding import derive_seed
from mocosfl_priv.training.codecs import as_received


def target_of(context: EvaluationContext, system: System, model: SplitModel) -> Target:
    """What attackers of a system are up against, whose training has led to `model`."""
    return Target(
        title=system.title,
        client=model.client,
        image_shape=model.image_shape,
        defense=system.defense.plugin,
        server=nn.Sequential(OrderedDict(trunk=model.trunk, projector=model.projector)),
        participants=model.participants,
        build_client=_client_builder(context, system),
        seed=system.seed,
        codec=context.config.training.codec,
    )


def attempt_on(
    context: EvaluationContext, trained: TrainedSystem, attack: Loaded[Attack], progress: Progress | None = None
) -> Attempt:
    """Let one attack try the victims of a trained system.

    Raises ThreatModelError when it reaches for more than it was granted.
    """
    target = target_of(context, trained.system, trained.model)
    if trained.guarantee is not None:
        target = replace(target, training_messages=trained.guarantee.messages)
    observer = trained.observers.of(attack.label)
    (attempted,) = attempt(context.conditions, target, attack, [context.victims], progress, observer)
    return attempted


def link_system(context: EvaluationContext, system: System, model: SplitModel) -> Linkage:
    """Match the messages of the victims of a trained system with candidate images; see :func:`link`."""
    (found,) = link(context.conditions, context.library, target_of(context, system, model), [context.victims])
    return found


def attack_system(
    context: EvaluationContext,
    trained: TrainedSystem,
    attack: Loaded[Attack],
    progress: Progress | None = None,
    *,
    linkage: Linkage | None = None,
) -> CellResult:
    """Let one attack try the victims of a trained system, and score what it returns.

    linkage: what :func:`link_system` found, for the row.
    An attack that fails leaves a row that says why. Raises ThreatModelError when it reaches for more than it was
    granted.
    """
    scored = score_attempt(context.scoring, context.victims, attempt_on(context, trained, attack, progress))
    keys = {**trained.system.keys, "attack": attack.label}
    columns = trained.result().columns(context.probes, context.scoring)
    return CellResult.of(scored, keys, columns | (linkage.columns if linkage else {}))


def with_own_plugin(attack: Loaded[Attack]) -> Loaded[Attack]:
    """The same with a copy of the attack, so that what it remembers does not reach its trial of another system."""
    return replace(attack, plugin=copy.deepcopy(attack.plugin))


def leakage_points(
    context: EvaluationContext, system: System, model: SplitModel, step: int, epoch: float
) -> list[dict[str, Any]]:
    """A point of the leakage curve of a training, for every attack of the curve; it does not change the training.

    The attacks start afresh at every point, with the seed they have against the finished model.
    """
    rows = []
    for attack in context.curve_attacks:
        target = target_of(context, system, model)
        (scored,) = try_attack(context.conditions, context.scoring, target, attack, [context.victims])
        rows.append({"attack": attack.label, "step": step, "epoch": epoch, **scored.summary})
    return rows


def observers_of(context: EvaluationContext, system: System, model: SplitModel, how: Training) -> ObserverGroup:
    """The observers of the training of `model`, from its first message on."""
    model.to(context.compute.device)
    limit = context.conditions.seconds
    attached = [
        attach(attack, grant_stream(context, system, model, attack), attack_seed(system.seed, attack), limit)
        for attack in how.observing
    ]
    kind = MaliciousServer if how.hijacker else ObserverGroup
    return kind(observer for observer in attached if observer is not None)


def grant_stream(
    context: EvaluationContext, system: System, model: SplitModel, attack: Loaded[Attack]
) -> StreamView:  # fmt: skip
    """What one attack holds while it observes the training of `model`, whose server networks it sees live."""
    conditions, defense, codec = context.conditions, system.defense.plugin, context.config.training.codec
    undefended = partial(as_received, codec=codec)
    return StreamView(
        smashed_shape=model.smashed_shape,
        image_shape=model.image_shape,
        compute=conditions.compute,
        visible=conditions.visible_to(attack),
        server=live_server(model.trunk, model.projector, conditions.compute),
        protect=partial(protect_afresh, defense, codec=codec) if conditions.threat.adaptive else undefended,
        auxiliary=conditions.auxiliary.copy(),
        build_client=partial(on_device, _client_builder(context, system), conditions.compute.device),
    )


def _client_builder(context: EvaluationContext, system: System) -> Callable[[], nn.Module]:
    """Builds untrained clients; bound to settings only: a closure over the context would carry the victims along."""
    model = system.defense.plugin.architecture(context.config.model)
    seed = derive_seed(system.seed, "attacker's clone")
    return partial(context.models.build_client, model, system.cut_layer, seed)
