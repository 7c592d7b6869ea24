"""From trained systems and attacked cells to the record of a run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd

from mocosfl_priv.experiment.linkage import Linked, linkage_info, linkage_table
from mocosfl_priv.experiment.plan import Plan
from mocosfl_priv.experiment.provenance import common_info, gather, pictures
from mocosfl_priv.experiment.rows import CellResult, SystemResult
from mocosfl_priv.results import DETECTION_COLUMNS, LEAKAGE_COLUMNS, SYSTEM_KEYS, RunRecord, semi_column


def assemble(
    plan: Plan,
    systems: Sequence[SystemResult],
    models: Mapping[str, dict[str, np.ndarray]],
    cells: Sequence[CellResult],
    linked: Sequence[Linked],
    seconds: float,
) -> RunRecord:
    """The record of a run of `plan`: `systems` and `cells` in its order, of which some may be missing or have failed.

    models: the systems' selected checkpoints, as named arrays, by their file names. linked: linkage of the honest
    systems. seconds: what it took.
    """
    context, victims = plan.context, plan.context.victims
    honest = [system for system in systems if not system.hijacker]
    hijacked = [system for system in systems if system.hijacker]
    defenses = {system.defense.label: system.defense for system in plan.systems}
    training = pd.DataFrame([{**system.keys, **entry} for system in honest for entry in system.history])
    table, per_image, flags = gather(context, cells, plan.attacks, defenses, [victims], training)
    attacks = list({attack.label: attack for attack in (*context.curve_attacks, *plan.attacks)}.values())
    return RunRecord(
        cells=table,
        per_image=per_image,
        probe=_probe_table(plan, honest),
        training=training,
        leakage=pd.DataFrame(
            [{**system.keys, **row} for system in honest for row in system.leakage_points], columns=LEAKAGE_COLUMNS
        ),
        detections=pd.DataFrame(
            [{**system.keys, **system.detection} for system in (*honest, *hijacked) if system.detection],
            columns=DETECTION_COLUMNS,
        ),
        linkage=linkage_table(linked),
        images=pictures(cells, [victims]),
        info={
            **common_info(context, attacks, defenses, flags, seconds),
            "linkage": linkage_info(linked),
            "systems": [{**system.keys, **system.info} for system in honest],
            "hijacked": [_hijacked_info(system, context.roles.labelled) for system in hijacked],
        },
        config_yaml=plan.config.to_yaml(),
        models=models,
    )


def _probe_table(plan: Plan, honest: Sequence[SystemResult]) -> pd.DataFrame:
    if not honest:
        return pd.DataFrame(columns=[*SYSTEM_KEYS, "image", "group"])
    return pd.concat([_probe_frame(plan, system) for system in honest], ignore_index=True)


def _probe_frame(plan: Plan, system: SystemResult) -> pd.DataFrame:
    count = len(system.utility.knn)
    frame = pd.DataFrame(
        {
            **{key: [value] * count for key, value in system.keys.items()},
            "image": np.arange(count),
            "group": plan.context.probes.data.test.groups.numpy(),
            "knn": system.utility.knn,
            "linear": system.utility.linear,
            **{semi_column(fraction): result.correct for fraction, result in system.utility.semi_supervised.items()},
            "knn_raw_pixels": plan.context.probes.raw_pixels,
            "linear_untrained": system.untrained,
        }
    )
    if not plan.context.roles.labelled:  # whatever a classifier says of one class is right, and says nothing
        measured = frame.columns.difference([*SYSTEM_KEYS, "image", "group"])
        frame[measured] = np.nan
    return frame


def _hijacked_info(system: SystemResult, labelled: bool) -> dict[str, Any]:
    return {
        **system.keys,
        "attack": system.hijacker,
        "selected_step": system.info["selected_step"],
        "knn_accuracy": float(system.utility.knn.mean()) if labelled else None,  # JSON has no NaN
        "history": [
            {name: None if np.isnan(value) else value for name, value in entry.items()} for entry in system.history
        ],
    }
