"""Records of runs that never ran: errors and answers per defense are given, everything else follows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd

from mocosfl_priv.results import COLUMNS, COSTS, LEAKAGE_COLUMNS, RECOGNITION_LEVELS, UNDEFENDED, RunRecord
from reports.analysis.comparison import BOTTLENECK, TARESSFL
from reports.analysis.summary import ENSEMBLE

VICTIMS, PROBES = 60, 400
FLOOR = 0.05
ORIGINS = {"none": UNDEFENDED, "bottleneck": BOTTLENECK, "taressfl": TARESSFL}


def attack_origin(label: str) -> str:
    """Where the attack `label` comes from: the ensemble where its label says that, else a file of the tests' own."""
    return ENSEMBLE if label.startswith("ensemble") else f"{label}:Mine"


def made_up(
    systems: Mapping[str, tuple[float, float]],
    *,
    seeds: int = 1,
    candidate: str | None = None,
    attacks: Sequence[str] = ("decoder", "rmle"),
    failed: Sequence[tuple[str, str]] = (),
    flags: Sequence[Mapping[str, Any]] = (),
) -> RunRecord:
    """A run of `systems`: leak ratio R of the worst case and linear-probe accuracy by label, at cut 1.

    A label's part before its first hyphen is its class. Attacks take turns in coming closest; the others are worse by a
    tenth of the floor. Victims vary alike before all systems, and so do probe images, as they do in real runs. failed:
    (defense, attack).
    """
    cells, images, probes = [], [], []
    for place, (label, (leak, accuracy)) in enumerate(systems.items()):
        for seed in range(seeds):
            rng = np.random.default_rng([seed, place])
            keys = {"defense": label, "cut_layer": 1, "target_fraction": 0.0, "seed": seed}
            floors = FLOOR * np.linspace(0.5, 1.5, VICTIMS)
            answers = np.linspace(0, 1, PROBES) < accuracy
            answers[rng.choice(PROBES, 8, replace=False)] ^= True  # systems do not err on exactly the same images
            probes.append(
                pd.DataFrame(
                    {**keys, "image": np.arange(PROBES), "group": np.arange(PROBES), "knn": answers, "linear": answers,
                     "knn_raw_pixels": False, "linear_untrained": False}
                )
            )  # fmt: skip
            for turn, attack in enumerate(attacks):
                cause = "no memory" if (label, attack) in failed else ""
                numbers = dict.fromkeys(COSTS, 1000.0 * (place + 1)) | dict.fromkeys(RECOGNITION_LEVELS, np.nan)
                cell = {
                    **keys,
                    "attack": attack,
                    "victims": "test",
                    "failure": cause,
                    "flags": "",
                    "guarantee": "",
                    **numbers,
                }
                cells.append({**cell, "attack_seconds": 1.0, "attack_steps": 1, "attack_queries": 0})
                if cause:
                    continue
                theirs = np.arange(VICTIMS) % len(attacks) == turn
                errors = (1 - leak) * floors + np.where(theirs, 0, 0.1 * FLOOR) + rng.normal(0, 2e-4, VICTIMS)
                measured = dict.fromkeys(("psnr", "ssim", "ssim_zeropad", "lpips"), 0.5) | {"mse_bound": np.nan}
                images.append(
                    pd.DataFrame(
                        {**keys, "attack": attack, "victims": "test", "image": np.arange(VICTIMS),
                         "group": np.arange(VICTIMS), "mse": errors, "mse_floor": floors, **measured,
                         "recognised": np.nan, "reidentified": np.nan}
                    )
                )  # fmt: skip
    return RunRecord(
        cells=pd.DataFrame(cells, columns=COLUMNS),
        per_image=pd.concat(images, ignore_index=True),
        probe=pd.concat(probes, ignore_index=True),
        training=pd.DataFrame(),
        leakage=pd.DataFrame(columns=LEAKAGE_COLUMNS),
        images={},
        info={
            "created": "2025-01-02T03:04:05+00:00",
            "seconds": 12.0,
            "compute": {"device": "cpu"},
            "config": {
                "candidate": candidate,
                "evaluation": {"bootstrap_samples": 200, "confidence": 0.95, "label_fractions": []},
            },
            "config_sha256": "c" * 64,
            "plugins": {
                "attacks": [
                    {"label": attack, "origin": attack_origin(attack), "blind": attack == "floor"} for attack in attacks
                ],
                "defenses": [
                    {"label": label, "origin": ORIGINS.get(label.split("-")[0], f"{label.split('-')[0]}:Mine")}
                    for label in systems
                ],
            },
            "flags": list(flags),
            "versions": {"torch": "2.6"},
            "platform": "Linux x86_64",
            "command": "mocosfl-priv run a|b",
        },
        config_yaml="",
    )
