"""Attack the trained systems of a finished run again, with other attacks, budgets or threat models; train none."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file

from mocosfl_priv.config import ExperimentConfig, load_config
from mocosfl_priv.data.image_set import ImageSet
from mocosfl_priv.data.roles import Role, check_disjoint, check_groups, role_record
from mocosfl_priv.errors import ConfigurationError, RunFailedError
from mocosfl_priv.experiment.attack_system import link_system, target_of, with_own_plugin
from mocosfl_priv.experiment.conditions import ONLY_IN_TRAINING
from mocosfl_priv.experiment.context import EvaluationContext
from mocosfl_priv.experiment.linkage import Linked, linkage_info, linkage_table
from mocosfl_priv.experiment.plan import Plan, check_attacks, lay_out
from mocosfl_priv.experiment.provenance import common_info, gather, pictures
from mocosfl_priv.experiment.rows import CellResult, try_attack
from mocosfl_priv.experiment.system import System
from mocosfl_priv.experiment.train import restored_model
from mocosfl_priv.models.split import SplitModel
from mocosfl_priv.results import (
    ATTACK_COSTS,
    CELL_KEYS,
    GUARANTEE,
    METRICS,
    RunRecord,
)
from mocosfl_priv.runtime.progress import Progress, Segment, Silent
from mocosfl_priv.training.state import within

# keys that change nothing about the systems
SETTABLE = ("threat", "compute", "attacks", "evaluation.recognition_epochs", "evaluation.lpips_network",
            "evaluation.linkage_candidates",
            "evaluation.bootstrap_samples", "evaluation.confidence")  # fmt: skip
# columns of a row that are about the attack; all others are about the system
OF_THE_ATTACK = {*CELL_KEYS, *METRICS, *GUARANTEE, *ATTACK_COSTS, "mse_floor", "leak_ratio", "failure", "flags"}
FORMER_FOLDER = "checkpoints"  # of models, in runs of earlier versions


@dataclass(frozen=True)
class AgainPlan:
    """Checked attacks on the systems of a finished run.

    folder: of that run. record: what it left. plan: its grid, with the attacks and the threat model of now.
    """

    folder: Path
    record: RunRecord
    plan: Plan

    @property
    def warnings(self) -> tuple[str, ...]:
        """Defenses whose code is not what it was when the run was made."""
        then = {plugin["label"]: plugin["code_sha256"] for plugin in self.record.info["plugins"]["defenses"]}
        defenses = {system.defense.label: system.defense for system in self.plan.systems}
        return tuple(
            f"the code of defense {label!r} has changed since {self.folder} was made"
            for label, defense in defenses.items()
            if then.get(label) != defense.code_sha256
        )

    @property
    def context(self) -> EvaluationContext:
        """What all attacks share."""
        return self.plan.context

    @property
    def segments(self) -> list[Segment]:
        """Linkage and attacks, in the order in which they run."""
        return [
            segment
            for system in self.plan.systems
            for segment in (
                *self.plan.linkage_segments(system),
                *(self.plan.attack_segment(system, attack) for attack in self.plan.attacks),
            )
        ]

    @property
    def picture_bytes(self) -> int:
        """See :class:`mocosfl_priv.experiment.plan.Plan`."""
        return self.context.victims.images.numel() * (self.plan.cells + 1)


def plan_again(
    folder: Path,
    record: RunRecord,
    attacks: Sequence[str | Mapping[str, Any]],
    overrides: Sequence[str] = (),
    victims: ImageSet | None = None,
) -> AgainPlan:
    """Check new attacks on the systems of the run in `folder`.

    Args:
        folder: A run directory.
        record: What it holds.
        attacks: Names or references, or mappings with parameters; they take the place of the run's own, unless
            `overrides` set the key `attacks`.
        overrides: ``key=value`` texts for the sections `threat`, `evaluation` and `compute`, and for `attacks`.
        victims: Other images to attack, of the same size; None for the run's own.

    Returns:
        The plan.

    Raises:
        ConfigurationError: `folder` holds no trained systems, its data is no longer what it was, a key would change
            the systems, or an attack does not fit (ThreatModelError if it is not granted what it needs).

    """
    if "systems" not in record.info or record.info.get("own_model"):
        raise ConfigurationError(f"{folder} is an audit, and holds no trained systems; audit the model again instead")
    require_settable(overrides, "the systems are trained already")
    own = [f"attacks={json.dumps(list(attacks), default=str)}"] if attacks else []
    config = load_config(folder / "config.yaml", [*own, "leakage.every=0", *overrides])
    plan = _attacked(config)
    kept, found = record.info["roles"], plan.context.roles.records
    changed = [role for role, now in found.items() if kept[role]["content_sha256"] != now.content_sha256]
    if changed:
        raise ConfigurationError(f"{folder}: images of {', '.join(changed)} have changed since the run was made")
    if victims is not None:
        plan = _with_victims(plan, victims)
    for system in plan.systems:
        _open_model(folder, system)
    check_attacks(plan)
    return AgainPlan(folder, record, plan)


def require_settable(overrides: Sequence[str], why: str) -> None:
    """Raise ConfigurationError for an override of another key than `SETTABLE`. why: the reason, for the message."""
    for override in overrides:
        key = override.partition("=")[0].strip()
        if not any(key == known or key.startswith(f"{known}.") for known in SETTABLE):
            raise ConfigurationError(f"--set {override}: {why}; only {', '.join(SETTABLE)} may be set")


def _attacked(config: ExperimentConfig) -> Plan:
    """The grid of `config`, without what a run does not keep of its training."""
    plan = lay_out(config)
    reachable = plan.context.threat.without(ONLY_IN_TRAINING)
    for attack in plan.attacks:
        reachable.require(attack.plugin.needs, attack.label)
    return replace(plan, context=replace(plan.context, threat=reachable))


def _with_victims(plan: Plan, victims: ImageSet) -> Plan:
    """The same plan with other victims."""
    context = plan.context
    shape, needed = tuple(victims.images.shape[1:]), tuple(context.roles[Role.VICTIMS].images.shape[1:])
    if shape != needed:
        raise ConfigurationError(f"victims: images of shape {shape}, but those of the run have {needed}")
    digests = victims.digests()
    known = (Role.AUXILIARY_TARGET, Role.AUXILIARY_SOURCE)
    check_disjoint({**{role: context.roles[role].digests() for role in known}, Role.VICTIMS: digests})
    check_groups({**{role: context.roles[role] for role in known}, Role.VICTIMS: victims})
    roles = replace(
        context.roles,
        sets={**context.roles.sets, Role.VICTIMS: victims},
        records={**context.roles.records, Role.VICTIMS: role_record(victims, torch.arange(len(victims)), digests)},
        reading=(*context.roles.reading, victims.description),
    )
    context = replace(context, roles=roles)
    context.scoring.use(None)  # the judge of recognition knows the labels of the run's own victims only
    return replace(plan, context=context)


def stored_system(context: EvaluationContext, system: System, folder: Path) -> tuple[System, SplitModel]:
    """Load a trained system from a run directory: the system with what its defense has learned, and its model.

    Raises ConfigurationError when its file is missing, damaged, or of another architecture.
    """
    path = _open_model(folder, system)
    stored = load_file(path)
    system = system.with_own_defense()
    model = restored_model(context, system)
    for name, value in model.named_state().items():
        if name not in stored or stored[name].shape != value.shape:
            raise ConfigurationError(f"{path}: {name} is missing, or of another shape than the configuration says")
        value.copy_(stored[name])
    system.defense.plugin.load_state(within(stored, "defense"))
    model.to(context.compute.device)
    return system, model


def _open_model(folder: Path, system: System) -> Path:
    """The file of a trained system, which is there and complete; raises ConfigurationError otherwise."""
    places = [folder / place / f"{system.file_stem}.safetensors" for place in ("models", FORMER_FOLDER)]
    path = next((path for path in places if path.is_file()), None)
    if path is None:
        raise ConfigurationError(f"{folder}: there is no model of {system.title} in models/")
    try:
        with safe_open(path, "pt"):
            return path
    except (OSError, SafetensorError) as error:
        raise ConfigurationError(f"{path} cannot be read: {error}") from error


def run_again(again: AgainPlan, progress: Progress | None = None) -> RunRecord:
    """Attack every system of the run, and gather the record: its rows keep what the run measured of the systems.

    progress: was given the plan's segments before.
    """
    progress = progress or Silent()
    started = time.monotonic()
    plan, context, stored = again.plan, again.context, again.record
    context.scoring.judge  # noqa: B018 - trained before the first attack is timed
    cells: list[CellResult] = []
    linked: list[Linked] = []
    try:
        for planned in plan.systems:
            system, model = stored_system(context, planned, again.folder)
            for _ in plan.linkage_segments(planned):
                progress.segment()
            linkage = link_system(context, system, model)  # anew: threat model or victims may be others
            linked.append((system.keys, linkage))
            measured = _measured(stored.cells, system) | context.scoring.recognition_levels | linkage.columns
            target = target_of(context, system, model)
            for attack in plan.attacks:
                progress.segment()
                (scored,) = try_attack(
                    context.conditions, context.scoring, target, with_own_plugin(attack), [context.victims], progress
                )
                cells.append(CellResult.of(scored, {**system.keys, "attack": attack.label}, measured))
    except ConfigurationError as error:  # found too late to be called a request that was refused
        raise RunFailedError(str(error)) from error
    defenses = {system.defense.label: system.defense for system in plan.systems}
    table, per_image, flags = gather(context, cells, plan.attacks, defenses, [context.victims], stored.training)
    return RunRecord(
        cells=table,
        per_image=per_image,
        probe=stored.probe,
        training=stored.training,
        linkage=linkage_table(linked),
        images=pictures(cells, [context.victims]),
        info={
            **common_info(context, plan.attacks, defenses, flags, time.monotonic() - started),
            "linkage": linkage_info(linked),
            "systems": stored.info["systems"],
            "hijacked": [],
            "trained_in": {"folder": str(again.folder), "config_sha256": stored.info["config_sha256"]},
        },
        config_yaml=plan.config.to_yaml(),
    )


def _measured(cells: pd.DataFrame, system: System) -> dict[str, Any]:
    """What the rows of the run say of a system, whatever attacked it."""
    keys = system.keys
    rows = cells
    for name, value in keys.items():
        rows = rows[rows[name] == value]
    if rows.empty:
        raise ConfigurationError(f"the run has no row of {system.title}")
    return {str(name): value for name, value in rows.iloc[0].items() if name not in OF_THE_ATTACK}
