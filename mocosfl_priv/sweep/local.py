"""Run a plan in this process, one system after the other."""

from __future__ import annotations

import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from mocosfl_priv.errors import ConfigurationError, RunFailedError
from mocosfl_priv.experiment import DEFENDER, CellResult, TrainedSystem, attack_system, checkpoints_of, train_system
from mocosfl_priv.progress import Progress, Segment, Silent
from mocosfl_priv.results import DETECTION_COLUMNS, LEAKAGE_COLUMNS, RunRecord, semi_column
from mocosfl_priv.sweep.grid import Plan
from mocosfl_priv.sweep.record import common_info, gather, pictures
from mocosfl_priv.training.participants import RemoteParticipants


def run_plan(
    plan: Plan,
    progress: Progress | None = None,
    checkpoints: Path | None = None,
    remote: RemoteParticipants | None = None,
) -> RunRecord:
    """Train every system, attack it with every attack, and gather the record.

    checkpoints: folder in which trainings keep their state and from which they go on; nothing else is written.
    remote: see :func:`mocosfl_priv.training.mocosfl.train_mocosfl`.
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
    lab.recognition  # noqa: B018 - trained here, lest the time of a system's training includes it
    try:
        for system in plan.systems:
            for training in plan.trainings:
                progress.segment()
                trained = train_system(lab, system, progress, checkpoints, training, remote)
                (hijacked if training.hijacker else trained_systems).append(trained)
                for attack in training.attacks:
                    progress.segment()
                    cells.append(attack_system(lab, trained, attack, progress))
    except ConfigurationError as error:  # found too late to be called a request that was refused
        raise RunFailedError(str(error)) from error
    defenses = {system.defense.label: system.defense for system in plan.systems}
    table, per_image, flags = gather(lab, cells, plan.attacks, defenses, [lab.victims])
    attacks = list({attack.label: attack for attack in (*lab.curve_attacks, *plan.attacks)}.values())
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
        detections=pd.DataFrame(
            [row for trained in (*trained_systems, *hijacked) for row in _detections(trained)],
            columns=DETECTION_COLUMNS,
        ),
        images=pictures(cells, [lab.victims]),
        info={
            **common_info(lab, attacks, defenses, flags, time.monotonic() - started),
            "systems": [_system_info(trained) for trained in trained_systems],
            "hijacked": [_hijacked_info(trained) for trained in hijacked],
        },
        config_yaml=plan.config.to_yaml(),
        checkpoints={f"{t.file_stem}.safetensors": t.checkpoint() for t in (*trained_systems, *hijacked)},
    )


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


def _system_info(trained: TrainedSystem) -> dict[str, Any]:
    return {
        **trained.system.keys,
        "steps": trained.trained.steps,
        "selected_step": trained.trained.selected_step,
        "frozen_client": trained.frozen,
        "guarantee": trained.guarantee.as_json() if trained.guarantee else None,
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


def _detections(trained: TrainedSystem) -> list[dict[str, Any]]:
    """The row of a system whose defense detects; none without."""
    detection, hijacker = trained.system.defense.plugin.detection(), trained.training.hijacker
    if detection is None:
        return []
    attendee = trained.audience.of(hijacker.label) if hijacker else None
    return [
        {
            **trained.system.keys,
            "hijacked_by": hijacker.label if hijacker else "",
            "alarm": detection.alarm,
            **asdict(detection),
            "failure": attendee.failure if attendee else "",
        }
    ]


def _hijacked_info(trained: TrainedSystem) -> dict[str, Any]:
    return {
        **trained.system.keys,
        "attack": trained.training.attacks[0].label,
        "selected_step": trained.trained.selected_step,
        "knn_accuracy": float(trained.utility.knn.mean()),
        "history": trained.trained.history,
    }
