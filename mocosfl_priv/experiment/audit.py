"""Attack clients that others have published, instead of training any."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import Any

import pandas as pd
from torch import nn

from mocosfl_priv.config import ExperimentConfig, PluginSpec
from mocosfl_priv.data.given import GivenData
from mocosfl_priv.data.roles import assign_roles
from mocosfl_priv.errors import ConfigurationError, RunFailedError
from mocosfl_priv.experiment.attack import Target
from mocosfl_priv.experiment.conditions import ONLY_IN_TRAINING
from mocosfl_priv.experiment.context import EvaluationContext
from mocosfl_priv.experiment.linkage import Linked, link, linkage_info, linkage_segments, linkage_table
from mocosfl_priv.experiment.provenance import common_info, gather, pictures
from mocosfl_priv.experiment.rows import CellResult, client_cost, try_attack
from mocosfl_priv.experiment.victims import VictimSet
from mocosfl_priv.models.initialisation import reinitialised
from mocosfl_priv.plugins import ATTACKS, DEFENSES, Attack, Capability, Defense, Loaded, ThreatModel
from mocosfl_priv.published.discovery import PublishedCheckpoint, find_published, load_attack_images
from mocosfl_priv.published.loader import load_published_client
from mocosfl_priv.results import PUBLISHED_VICTIMS, RELEASE, SYSTEM_KEYS, RunRecord
from mocosfl_priv.runtime.compute import Compute
from mocosfl_priv.runtime.progress import Progress, Segment, Silent
from mocosfl_priv.runtime.seeding import derive_seed

IMAGE_SIZE = 32
IMAGE_SHAPE = (3, IMAGE_SIZE, IMAGE_SIZE)
SECONDS_PER_ATTACK = 120.0  # a first guess, soon replaced
# what only a training could grant
NOT_THERE = ONLY_IN_TRAINING | {Capability.SERVER_MODEL}


@dataclass(frozen=True)
class AuditPlan:
    """A checked audit, ready to run."""

    config: ExperimentConfig
    models: tuple[PublishedCheckpoint, ...]
    attacks: tuple[Loaded[Attack], ...]
    context: EvaluationContext
    victim_sets: tuple[VictimSet, ...]
    undefended: Loaded[Defense] = field(default_factory=lambda: DEFENSES.create(PluginSpec(name="none")))

    @property
    def summary(self) -> str:
        """For people, before it runs."""
        sets = " and ".join(f"{len(v.images)} {v.name} images" for v in self.victim_sets)
        return f"{len(self.models)} published clients, {len(self.attacks)} attacks, on {sets}"

    @property
    def warnings(self) -> tuple[str, ...]:
        """None: nothing is trained."""
        return ()

    @property
    def picture_bytes(self) -> int:
        """See :class:`mocosfl_priv.experiment.plan.Plan`."""
        cells = len(self.models) * len(self.attacks) * len(self.config.seeds)
        return sum(victims.images.numel() for victims in self.victim_sets) * (cells + 1)


def plan_audit(config: ExperimentConfig, given: GivenData | None = None) -> AuditPlan:
    """Check `config` and find what is to be attacked below ``config.audit_models``.

    given: images that are given in Python, which `config` names by their content.
    Raises ConfigurationError (ThreatModelError for attacks that are not granted what they need).
    """
    assert config.audit_models is not None
    if config.data.image_size != IMAGE_SIZE:
        raise ConfigurationError(f"data.image_size: the published clients take {IMAGE_SIZE} pixels")
    found = tuple(find_published(config.audit_models))
    compute = Compute.resolve(config.compute)
    reachable = ThreatModel.of(config.threat.grants, config.threat.adaptive).without(NOT_THERE)
    attacks = tuple(ATTACKS.create(spec) for spec in config.attacks)
    for attack in attacks:
        reachable.require(attack.plugin.needs, attack.label)
    context = EvaluationContext(config, assign_roles(config.data, 0.0, given), compute, reachable)
    published = load_attack_images(config.audit_models)
    sets = [context.victims]
    if published is not None:
        sets.append(context.victim_set(PUBLISHED_VICTIMS, published, RELEASE))
    return AuditPlan(config, found, attacks, context, tuple(sets))


def run_audit(plan: AuditPlan, progress: Progress | None = None) -> RunRecord:
    """Attack every checkpoint with every attack, all victims at once, and gather the record.

    In its rows, `defense` and `checkpoint` are the checkpoint's name; what would need the server is missing.
    """
    progress = progress or Silent()
    context, config = plan.context, plan.config
    started = time.monotonic()
    linking = [
        linkage_segments(checkpoint.name, context.conditions, context.library, plan.victim_sets)
        for checkpoint in plan.models
    ]
    progress.plan(
        [
            segment
            for checkpoint, before in zip(plan.models, linking, strict=True)
            for _ in config.seeds
            for segment in (*before, *(_attack_segment(plan, checkpoint, attack) for attack in plan.attacks))
        ]
    )
    cells: list[CellResult] = []
    described: list[dict[str, Any]] = []
    linked: list[Linked] = []
    try:
        for checkpoint, before in zip(plan.models, linking, strict=True):
            client = load_published_client(checkpoint.path)
            cost = client_cost(client, IMAGE_SHAPE)
            described.append(
                {**asdict(checkpoint), "path": str(checkpoint.path), "client_parameters": cost["client_parameters"]}
            )
            rest = {"checkpoint": checkpoint.name, **cost, **context.scoring.recognition_levels}
            for seed in config.seeds:
                target = _target(plan, checkpoint, client, seed)
                for _ in before:
                    progress.segment()
                found = link(context.conditions, context.library, target, plan.victim_sets)
                linked += [({**_keys(checkpoint), "seed": seed}, each) for each in found]
                columns = {each.victims: each.columns for each in found}
                for attack in plan.attacks:
                    progress.segment()
                    keys = {**_keys(checkpoint), "seed": seed, "attack": attack.label}
                    scored = try_attack(context.conditions, context.scoring, target, attack, plan.victim_sets, progress)
                    cells += [CellResult.of(each, keys, rest | columns[each.victims.name]) for each in scored]
    except ConfigurationError as error:  # found too late to be called a request that was refused
        raise RunFailedError(str(error)) from error
    # a published client stands for its defense; nothing is added to what it sends
    defenses: Mapping[str, Loaded[Defense]] = {}
    table, per_image, flags = gather(context, cells, plan.attacks, defenses, plan.victim_sets)
    return RunRecord(
        cells=table,
        per_image=per_image,
        probe=pd.DataFrame(columns=[*SYSTEM_KEYS, "image", "group"]),
        linkage=linkage_table(linked),
        images=pictures(cells, plan.victim_sets),
        info={
            **common_info(context, plan.attacks, defenses, flags, time.monotonic() - started),
            "linkage": linkage_info(linked),
            "audit": described,
            "victims": {victims.name: victims.origin for victims in plan.victim_sets},
        },
        config_yaml=config.to_yaml(),
    )


def _attack_segment(plan: AuditPlan, checkpoint: PublishedCheckpoint, attack: Loaded[Attack]) -> Segment:
    seconds = 0.0 if attack.plugin.blind else plan.config.threat.seconds or SECONDS_PER_ATTACK
    return Segment(f"attack {checkpoint.name}: {attack.label}", attack.label, seconds)


def _keys(checkpoint: PublishedCheckpoint) -> dict[str, Any]:
    return {
        "defense": checkpoint.name,
        "cut_layer": checkpoint.cut_layer,
        "target_fraction": float("nan") if checkpoint.target_fraction is None else checkpoint.target_fraction,
    }


def _target(plan: AuditPlan, checkpoint: PublishedCheckpoint, client: nn.Module, seed: int) -> Target:
    clone_seed = derive_seed(seed, "attacker's clone")
    # the attacker's builder must not carry the published weights along
    blank = reinitialised(client, clone_seed)
    return Target(
        title=checkpoint.name,
        client=client,
        image_shape=IMAGE_SHAPE,
        defense=plan.undefended.plugin,
        build_client=partial(reinitialised, blank, clone_seed),
        seed=seed,
    )
