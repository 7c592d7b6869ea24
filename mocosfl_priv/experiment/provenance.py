"""What every run records of itself, whatever was attacked."""

from __future__ import annotations

import math
import platform
import shlex
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import pandas as pd

from mocosfl_priv.config import ExperimentConfig
from mocosfl_priv.data.image_set import ImageSet
from mocosfl_priv.data.roles import DataRoles, Role
from mocosfl_priv.evaluation.distribution_shift import image_statistics
from mocosfl_priv.evaluation.reliability import NO_LABELS, AttackFacts, Flag, RunFacts, reliability_flags
from mocosfl_priv.experiment.conditions import AttackConditions
from mocosfl_priv.experiment.rows import CellResult
from mocosfl_priv.experiment.scoring import Scoring
from mocosfl_priv.experiment.victims import VictimSet
from mocosfl_priv.plugins import Attack, Defense, Loaded
from mocosfl_priv.results import SCHEMA_VERSION, UNDEFENDED, cell_columns, image_key, victims_key


class Circumstances(Protocol):
    """What is recorded of a run, whatever was attacked; :class:`EvaluationContext` is one."""

    @property
    def config(self) -> ExperimentConfig:
        """The settings."""

    @property
    def roles(self) -> DataRoles:
        """The images."""

    @property
    def conditions(self) -> AttackConditions:
        """What attacks were granted."""

    @property
    def scoring(self) -> Scoring:
        """The metrics."""

    @property
    def victims(self) -> VictimSet:
        """The victims, with their floor."""

    @property
    def represented(self) -> ImageSet:
        """The images that the victims should be like."""

    @property
    def class_names(self) -> tuple[str, ...]:
        """The classes that accuracies are about."""

    @property
    def clients_add_noise(self) -> bool:
        """Whether messages are random without a defense that makes them so."""


RECORDED_PACKAGES = ("mocosfl-priv", "torch", "torchvision", "scikit-image", "scikit-learn", "lpips", "numpy", "pandas")


def gather(
    context: Circumstances,
    cells: Sequence[CellResult],
    attacks: Sequence[Loaded[Attack]],
    defenses: Mapping[str, Loaded[Defense]],
    victim_sets: Sequence[VictimSet],
    training: pd.DataFrame | None = None,
) -> tuple[pd.DataFrame, pd.DataFrame, list[Flag]]:
    """Rows with their flags, per-image values, and the flags themselves. `defenses`: by their label in the rows.
    `training`: what happened to trained systems, see :class:`RunRecord`; None where nothing was trained.
    """
    table = pd.DataFrame([cell.row for cell in cells], columns=cell_columns(context.config.evaluation.label_fractions))
    per_image = pd.concat([cell.per_image for cell in cells], ignore_index=True)
    flags = reliability_flags(table, per_image, _facts(context, attacks, defenses, victim_sets), training)
    flags += _without_labels(context)
    table["flags"] = [
        ";".join(dict.fromkeys(flag.name for flag in flags if flag.concerns(row))) for _, row in table.iterrows()
    ]
    return table, per_image, flags


def pictures(cells: Sequence[CellResult], victim_sets: Sequence[VictimSet]) -> dict[str, np.ndarray]:
    """Victims and reconstructions, uint8, by their keys."""
    return {
        **{victims_key(v.name): (v.images * 255).round().byte().numpy() for v in victim_sets},
        **{image_key(cell.row): cell.reconstruction for cell in cells if cell.reconstruction is not None},
    }


def common_info(
    context: Circumstances,
    attacks: Sequence[Loaded[Attack]],
    defenses: Mapping[str, Loaded[Defense]],
    flags: Sequence[Flag],
    seconds: float,
) -> dict[str, Any]:
    """What a reader needs to trust or repeat any run, as JSON."""
    config, judge = context.config, context.scoring.judge
    return {
        "schema_version": SCHEMA_VERSION,
        "name": config.name,
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "seconds": seconds,
        "config": config.model_dump(mode="json"),
        "config_sha256": config.digest,
        "seeds": list(config.seeds),
        "roles": {role.value: vars(record) for role, record in context.roles.records.items()},
        "duplicates_dropped": context.roles.duplicates_dropped,
        "read": list(context.roles.reading),
        "target_training_images": context.roles.training_size,
        "class_names": list(context.class_names),
        "threat_model": {
            "grants": sorted(context.conditions.threat.grants),
            "adaptive": context.conditions.threat.adaptive,
        },
        "floor": {"kind": context.victims.floor.kind, "mse": float(context.victims.floor.mse.mean())},
        "lpips": context.scoring.lpips_note,
        "compute": context.conditions.compute.describe(),
        "plugins": {
            "attacks": [
                {
                    **_plugin_info(a, sorted(a.plugin.needs | a.plugin.optional)),
                    "granted": sorted(context.conditions.visible_to(a)),
                    "blind": a.plugin.blind,
                }
                for a in attacks
            ],
            "defenses": [_plugin_info(d, ["randomised"] if d.plugin.randomised else []) for d in defenses.values()],
        },
        "recognition": {
            # JSON has no NaN
            **{
                name: None if math.isnan(level) else level for name, level in context.scoring.recognition_levels.items()
            },
            "note": judge.note if judge else f"Recognition not measured: {_why_no_judge(context)}",
        },
        "flags": [asdict(flag) for flag in flags],
        "versions": {"python": platform.python_version(), **{name: version(name) for name in RECORDED_PACKAGES}},
        "platform": f"{platform.system()} {platform.machine()}",
        "command": shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]]),
    }


def _why_no_judge(context: Circumstances) -> str:
    return "evaluation.recognition_epochs is 0" if context.roles.labelled else "there are no labels"


def _without_labels(context: Circumstances) -> list[Flag]:
    """The flag of a run in which no accuracy means anything."""
    if context.roles.labelled:
        return []
    return [Flag(NO_LABELS, "No labels: utility not measurable, since all images are of one class.")]


def _facts(
    context: Circumstances,
    attacks: Sequence[Loaded[Attack]],
    defenses: Mapping[str, Loaded[Defense]],
    victim_sets: Sequence[VictimSet],
) -> RunFacts:
    """What the flags need to know beside the results."""
    roles = context.roles
    represented = context.represented
    return RunFacts(
        attacks=[
            AttackFacts(
                label=attack.label,
                kind=attack.origin,
                parameters=_parameters(attack),
                capabilities=frozenset(context.conditions.visible_to(attack)),
                blind=attack.plugin.blind,
                auxiliary_target=roles.count(Role.AUXILIARY_TARGET),
                auxiliary_source=roles.count(Role.AUXILIARY_SOURCE),
                searches_by_gradient=attack.plugin.searches_by_gradient,
            )
            for attack in attacks
        ],
        undefended=frozenset(label for label, defense in defenses.items() if defense.origin == UNDEFENDED),
        randomised=frozenset(
            label for label, defense in defenses.items() if defense.plugin.randomised or context.clients_add_noise
        ),
        messages_per_victim=context.config.threat.messages_per_victim if context.conditions.threat.adaptive else 1,
        adaptive=context.conditions.threat.adaptive,
        victims={
            victims.name: image_statistics((victims.images * 255).round().byte().numpy(), victims.groups.numpy())
            for victims in victim_sets
        },
        target=image_statistics(represented.images.numpy(), represented.groups.numpy()),
        samples=context.config.evaluation.bootstrap_samples,
        confidence=context.config.evaluation.confidence,
    )


def _plugin_info(loaded: Any, traits: list[str]) -> dict[str, Any]:
    return {
        "label": loaded.label,
        "origin": loaded.origin,
        "code_sha256": loaded.code_sha256,
        "parameters": _parameters(loaded),
        "traits": [str(trait) for trait in traits],
    }


def _parameters(loaded: Any) -> dict[str, Any]:
    """The plain public attributes of a plugin, lists of plain values too: its parameters, defaults included."""
    public = {name: value for name, value in vars(loaded.plugin).items() if not name.startswith("_")}
    return {
        name: list(value) if isinstance(value, list | tuple) else str(value) if isinstance(value, Path) else value
        for name, value in public.items()
        if _is_plain(value) or (isinstance(value, list | tuple) and all(_is_plain(item) for item in value))
    }


def _is_plain(value: object) -> bool:
    return value is None or isinstance(value, str | int | float | bool | Path)
