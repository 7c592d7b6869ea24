"""Run a plan in this process, one system after the other."""

from __future__ import annotations

import math
import platform
import sys
import time
from dataclasses import asdict
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from mocosfl_priv.data.roles import Role
from mocosfl_priv.errors import ConfigurationError, RunFailedError
from mocosfl_priv.evaluation.distribution_shift import image_statistics
from mocosfl_priv.evaluation.reliability import AttackFacts, RunFacts, reliability_flags
from mocosfl_priv.experiment import DEFENDER, CellResult, TrainedSystem, attack_system, checkpoints_of, train_system
from mocosfl_priv.plugins import Attack, Loaded
from mocosfl_priv.progress import Progress, Segment, Silent
from mocosfl_priv.results import (
    LEAKAGE_COLUMNS,
    SCHEMA_VERSION,
    RunRecord,
    cell_columns,
    image_key,
    semi_column,
    victims_key,
)
from mocosfl_priv.sweep.grid import Plan
from mocosfl_priv.threat import with_implied

RECORDED_PACKAGES = ("mocosfl-priv", "torch", "torchvision", "scikit-image", "scikit-learn", "lpips", "numpy", "pandas")

UNDEFENDED = "defenses.none:NoDefense"  # the class behind the control


def run_plan(plan: Plan, progress: Progress | None = None, checkpoints: Path | None = None) -> RunRecord:
    """Train every system, attack it with every attack, and gather the record.

    checkpoints: folder in which trainings keep their state and from which they go on; nothing else is written.
    Errors propagate.
    """
    progress = progress or Silent()
    lab = plan.laboratory
    started = time.monotonic()
    trained_systems: list[TrainedSystem] = []
    hijacked: list[TrainedSystem] = []
    cells: list[CellResult] = []
    for system in plan.systems:  # somebody else's checkpoints are refused before anything is trained
        for training in plan.trainings:
            if (kept := checkpoints_of(lab, system, checkpoints, training)) is not None:
                kept.verify()
                kept.below(DEFENDER).verify()
    progress.plan(_segments(plan))
    judge = lab.recognition  # trained here, lest the time of a system's training includes it
    try:
        for system in plan.systems:
            for training in plan.trainings:
                progress.segment()
                trained = train_system(lab, system, progress, checkpoints, training)
                (hijacked if training.hijacker else trained_systems).append(trained)
                for attack in training.attacks:
                    progress.segment()
                    cells.append(attack_system(lab, trained, attack, progress))
    except ConfigurationError as error:  # found too late to be called a request that was refused
        raise RunFailedError(str(error)) from error
    table = pd.DataFrame([cell.row for cell in cells], columns=cell_columns(plan.config.evaluation.label_fractions))
    per_image = pd.concat([cell.per_image for cell in cells], ignore_index=True)
    flags = reliability_flags(table, per_image, run_facts(plan))
    table["flags"] = [
        ";".join(dict.fromkeys(flag.name for flag in flags if flag.concerns(row))) for _, row in table.iterrows()
    ]
    return RunRecord(
        cells=table,
        per_image=per_image,
        probe=pd.concat([_probe_frame(plan, trained) for trained in trained_systems], ignore_index=True),
        training=pd.DataFrame(
            [{**trained.system.keys, **entry} for trained in trained_systems for entry in trained.trained.history]
        ),
        leakage=pd.DataFrame(
            [{**trained.system.keys, **row} for trained in trained_systems for row in trained.trained.observations],
            columns=LEAKAGE_COLUMNS,
        ),
        images={
            victims_key(lab.victims.name): lab.roles[Role.VICTIMS].images.numpy(),
            **{image_key(cell.row): cell.reconstruction for cell in cells if cell.reconstruction is not None},
        },
        info={
            **_info(plan, trained_systems, hijacked, time.monotonic() - started),
            "recognition": {
                # JSON has no NaN
                **{name: None if math.isnan(level) else level for name, level in lab.recognition_levels.items()},
                "note": judge.note if judge else "Recognition not measured: evaluation.recognition_epochs is 0",
            },
            "flags": [asdict(flag) for flag in flags],
        },
        config_yaml=plan.config.to_yaml(),
        checkpoints={f"{t.file_stem}.safetensors": t.checkpoint() for t in (*trained_systems, *hijacked)},
    )


def run_facts(plan: Plan) -> RunFacts:
    """What the flags need to know of `plan` beside its results."""
    lab, roles = plan.laboratory, plan.laboratory.roles
    victims, private = roles[Role.VICTIMS], roles[Role.CLIENT_PRIVATE]
    defenses = {system.defense.label: system.defense for system in plan.systems}
    return RunFacts(
        attacks=[
            AttackFacts(
                label=attack.label,
                kind=attack.origin,
                parameters=_parameters(attack),
                capabilities=frozenset(_granted(plan, attack)),
                blind=attack.plugin.blind,
                auxiliary_target=len(roles[Role.AUXILIARY_TARGET]),
                auxiliary_source=len(roles[Role.AUXILIARY_SOURCE]),
            )
            for attack in plan.attacks
        ],
        undefended=frozenset(label for label, defense in defenses.items() if defense.origin == UNDEFENDED),
        randomised=frozenset(label for label, defense in defenses.items() if defense.plugin.randomised),
        messages_per_victim=lab.config.threat.observations if lab.threat.adaptive else 1,
        adaptive=lab.threat.adaptive,
        victims={"test": image_statistics(victims.images.numpy(), victims.groups.numpy())},
        target=image_statistics(private.images.numpy(), private.groups.numpy()),
        samples=plan.config.evaluation.bootstrap_samples,
        confidence=plan.config.evaluation.confidence,
    )


def _granted(plan: Plan, attack: Loaded[Attack]) -> list[str]:
    """The capabilities that `attack` asks for and has in this experiment."""
    plugin = attack.plugin
    return sorted(with_implied(plugin.needs | plugin.optional) & plan.laboratory.threat.grants)


SECONDS_PER_STEP, SECONDS_PER_EXPERT_STEP, SECONDS_PER_ATTACK = 0.2, 0.2, 6.0  # first guesses, soon replaced


def _segments(plan: Plan) -> list[Segment]:
    """Training and attacks in the order in which they run."""
    segments = []
    for system in plan.systems:
        expert = plan.expert_steps(system)
        guess = SECONDS_PER_STEP * plan.training_steps + SECONDS_PER_EXPERT_STEP * expert
        for training in plan.trainings:
            attending = "".join(f", {attack.label} attends" for attack in training.attending)
            kind = f"train with {expert} expert steps{attending}"
            segments.append(
                Segment(f"train {system.trained_title(training)}", kind, guess * (1 + len(training.attending)))
            )
            for attack in training.attacks:
                seconds = SECONDS_PER_ATTACK if attack.plugin.needs else 0.1
                segments.append(Segment(f"attack {system.title}: {attack.label}", attack.label, seconds))
    return segments


def _probe_frame(plan: Plan, trained: TrainedSystem) -> pd.DataFrame:
    count = len(trained.utility.knn)
    return pd.DataFrame(
        {
            **{key: [value] * count for key, value in trained.system.keys.items()},
            "image": np.arange(count),
            "group": plan.laboratory.probe_data.test.groups.numpy(),
            "knn": trained.utility.knn,
            "linear": trained.utility.linear,
            **{semi_column(fraction): result.correct for fraction, result in trained.utility.semi_supervised.items()},
            "knn_raw_pixels": plan.laboratory.raw_pixels,
            "linear_untrained": trained.untrained,
        }
    )


def _info(
    plan: Plan, trained_systems: list[TrainedSystem], hijacked: list[TrainedSystem], seconds: float
) -> dict[str, Any]:
    """Everything a reader needs to trust or repeat the run, as JSON."""
    lab, config = plan.laboratory, plan.config
    return {
        "schema_version": SCHEMA_VERSION,
        "name": config.name,
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "seconds": seconds,
        "config": config.model_dump(mode="json"),
        "config_sha256": config.digest,
        "seeds": list(config.seeds),
        "roles": {role.value: vars(record) for role, record in lab.roles.records.items()},
        "duplicates_dropped": lab.roles.duplicates_dropped,
        "target_training_images": lab.roles.training_size,
        "class_names": list(lab.probe_data.train.class_names),
        "threat_model": {"grants": sorted(lab.threat.grants), "adaptive": lab.threat.adaptive},
        "floor": {"kind": lab.victims.floor.kind, "mse": float(lab.victims.floor.mse.mean())},
        "lpips": lab.lpips_note,
        "compute": lab.compute.describe(),
        "plugins": {
            "attacks": [
                {
                    **_plugin_info(a, sorted(a.plugin.needs | a.plugin.optional)),
                    "granted": _granted(plan, a),
                    "blind": a.plugin.blind,
                }
                for a in {a.label: a for a in (*lab.curve_attacks, *plan.attacks)}.values()
            ],
            "defenses": [
                _plugin_info(d, ["randomised"] if d.plugin.randomised else [])
                for d in {s.defense.label: s.defense for s in plan.systems}.values()
            ],
        },
        "systems": [
            {
                **trained.system.keys,
                "steps": trained.trained.steps,
                "selected_step": trained.trained.selected_step,
                "frozen_client": trained.frozen,
                "smashed_shape": list(trained.model.smashed_shape),
                "linear_probe_penalty": trained.utility.linear_penalty,
                "semi_supervised": {
                    semi_column(fraction): {"labels": result.labels, "epoch": result.epoch}
                    for fraction, result in trained.utility.semi_supervised.items()
                },
                "traffic_bytes": vars(trained.trained.traffic),
                "client_kernel": trained.trained.kernel,
                "replay_epochs": trained.trained.replay_epochs,
            }
            for trained in trained_systems
        ],
        "hijacked": [
            {
                **trained.system.keys,
                "attack": trained.training.attacks[0].label,
                "selected_step": trained.trained.selected_step,
                "knn_accuracy": float(trained.utility.knn.mean()),
                "history": trained.trained.history,
            }
            for trained in hijacked
        ],
        "versions": {"python": platform.python_version(), **{name: version(name) for name in RECORDED_PACKAGES}},
        "platform": f"{platform.system()} {platform.machine()}",
        "command": " ".join(sys.argv),
    }


def _plugin_info(loaded: Any, traits: list[str]) -> dict[str, Any]:
    return {
        "label": loaded.label,
        "origin": loaded.origin,
        "code_sha256": loaded.code_sha256,
        "parameters": _parameters(loaded),
        "traits": [str(trait) for trait in traits],
    }


def _parameters(loaded: Any) -> dict[str, Any]:
    """The plain attributes of a plugin: its parameters, defaults included."""
    return {k: v for k, v in vars(loaded.plugin).items() if v is None or isinstance(v, str | int | float | bool)}
