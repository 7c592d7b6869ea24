"""From trained systems and attacked cells to the record of a run."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import numpy as np
import pandas as pd

from mocosfl_priv.experiment import CellResult, TrainedSystem
from mocosfl_priv.results import ANALYTIC_COSTS, DETECTION_COLUMNS, LEAKAGE_COLUMNS, SYSTEM_KEYS, RunRecord, semi_column
from mocosfl_priv.sweep.grid import Plan
from mocosfl_priv.sweep.record import common_info, gather, pictures


def assemble(plan: Plan, systems: Sequence[TrainedSystem], cells: Sequence[CellResult], seconds: float) -> RunRecord:
    """The record of a run of `plan`: `systems` and `cells` in its order, of which some may be missing or have failed.

    seconds: what it took.
    """
    lab = plan.laboratory
    honest = [trained for trained in systems if not trained.training.hijacker]
    hijacked = [trained for trained in systems if trained.training.hijacker]
    defenses = {system.defense.label: system.defense for system in plan.systems}
    table, per_image, flags = gather(lab, cells, plan.attacks, defenses, [lab.victims])
    attacks = list({attack.label: attack for attack in (*lab.curve_attacks, *plan.attacks)}.values())
    return RunRecord(
        cells=table,
        per_image=per_image,
        probe=_probe_table(plan, honest),
        training=pd.DataFrame(
            [{**trained.system.keys, **entry} for trained in honest for entry in trained.trained.history]
        ),
        leakage=pd.DataFrame(
            [{**trained.system.keys, **row} for trained in honest for row in trained.trained.observations],
            columns=LEAKAGE_COLUMNS,
        ),
        detections=pd.DataFrame(
            [row for trained in (*honest, *hijacked) for row in _detections(trained)], columns=DETECTION_COLUMNS
        ),
        images=pictures(cells, [lab.victims]),
        info={
            **common_info(lab, attacks, defenses, flags, seconds),
            "systems": [_system_info(trained) for trained in honest],
            "hijacked": [_hijacked_info(trained) for trained in hijacked],
        },
        config_yaml=plan.config.to_yaml(),
        checkpoints={f"{trained.file_stem}.safetensors": trained.checkpoint() for trained in systems},
    )


def _probe_table(plan: Plan, honest: Sequence[TrainedSystem]) -> pd.DataFrame:
    if not honest:
        return pd.DataFrame(columns=[*SYSTEM_KEYS, "image", "group"])
    return pd.concat([_probe_frame(plan, trained) for trained in honest], ignore_index=True)


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
        "analytic_cost": {name: trained.cost[name] for name in ANALYTIC_COSTS},
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
