"""Whether split training learns what central training learns from the same images in the same number of steps.

    uv run python -m benchmarks.learning --data cifar10-full.tar.xz --keep runs/learning --json
    uv run python -m benchmarks.learning --data cifar10-full.tar.xz --quick --json

Central training is `tests/oracle/central_moco.py`: MoCo v2 in one place, which shares no code with the package. Beside
it stand MocoSFL with the defaults, IID and with two classes per client, 5 and 100 clients, several cut layers; frozen
TAResSFL clients; the choices of the research code (`protocol: paper`); and the same defaults without averaged momentum
models, as the positive control: its signature has to rise above the flag's, or the exit status is 1 (docs/LEARNING.md).

The score is the weighted kNN monitor on test images. Nothing is selected by it. A setting passes whose mean is at most
`MARGIN` behind central training's and whose clients could never be told apart: a signature shows the short cut before
kNN does. `--quick` trains central MoCo and the hardest setting only, for half as long and with a stem that halves the
resolution. The exit status is 1 where a setting does not pass.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.learning_runs import BACKBONES, BATCH, SETTINGS, TEST_IMAGES, Curve, Job, run_all
from benchmarks.machine import processor, version

IMAGES = 20_000
STEPS, QUICK_STEPS = 1_600, 800
CUTS = (1, 2, 3)
JUDGED = ("iid_5", "iid_100", "noniid_5", "noniid_100")
JUDGED_CUTS = (1, 2)
MARGIN = 0.02  # of kNN accuracy, between the means over seeds
CONTROLS = ("paper", "apart", "iid_apart")  # not judged, at cut 1 only
QUICK_MARGIN = 0.03  # one seed each
QUICK_BACKBONE = "resnet8-half"


def main() -> None:
    """Train, compare, print; exit with 1 where a margin is missed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="a class-folder tree with train/ and test/, or a tar file of one")
    parser.add_argument("--json", action="store_true", help="print one JSON object and nothing else")
    parser.add_argument("--quick", action="store_true", help="the hardest setting against central training, one seed")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int)
    parser.add_argument("--images", type=int, default=IMAGES)
    parser.add_argument("--cuts", type=int, nargs="+", default=list(CUTS))
    parser.add_argument("--settings", nargs="+", choices=list(SETTINGS), default=list(SETTINGS))
    parser.add_argument("--backbone", choices=list(BACKBONES), default="resnet8", help="half: a third of the work")
    parser.add_argument("--workers", type=int, default=2, help="trainings at once, a thread each")
    parser.add_argument("--keep", type=Path, help="folder of finished trainings, which are not done again")
    options = parser.parse_args()
    result = measure(options)
    print(json.dumps(result, indent=None if options.json else 2))
    sys.exit(1 if result["passed"] is False else 0)


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """All curves, and the comparison with central training."""
    started = time.monotonic()
    steps = options.steps or (QUICK_STEPS if options.quick else STEPS)
    cuts, settings, seeds = options.cuts, options.settings, options.seeds
    if options.quick:
        cuts, settings, seeds = [1], ["central", "noniid_100"], 1
        options.backbone = QUICK_BACKBONE
    jobs = [
        Job(setting, cut, seed, steps, options.images, str(options.data), options.backbone)
        for seed in range(seeds)
        for setting in settings
        for cut in ([0] if setting == "central" else [1] if setting in CONTROLS else cuts)
    ]
    curves = run_all(jobs, options.workers, options.keep)
    margin = QUICK_MARGIN if options.quick else MARGIN
    return {**compare(curves, margin), "minutes": round((time.monotonic() - started) / 60, 1), "setting": {
        "model": f"{options.backbone} (width 16), projector 1024, 32 px, bfloat16 where it is fast, one thread",
        "steps": steps, "images": options.images, "test_images": TEST_IMAGES, "batch": BATCH, "seeds": seeds,
        "cpu": processor(), "torch": version("torch"),
    }}  # fmt: skip


def compare(curves: dict[Job, Curve], margin: float) -> dict[str, Any]:
    """Means, paired differences to central training with 95 % intervals over seeds, and whether all are within."""
    central = {job.seed: curve.knn for job, curve in curves.items() if job.setting == "central"}
    cells: list[dict[str, Any]] = []
    for setting, cut in dict.fromkeys((job.setting, job.cut) for job in curves):
        mine = {job: curve for job, curve in curves.items() if (job.setting, job.cut) == (setting, cut)}
        scores = {job.seed: curve.knn for job, curve in mine.items()}
        differences = [score - central[seed] for seed, score in scores.items() if seed in central]
        cells.append({
            "setting": setting, "cut": cut, "knn": _mean(scores.values()), "knn_by_seed": list(scores.values()),
            "minus_central": _mean(differences), "interval": _interval(differences),
            "largest_signature": max((curve.signature for curve in mine.values()), default=0.0),
            "curves": [curve.points for curve in mine.values()],
        })  # fmt: skip
    judged = [cell for cell in cells if cell["cut"] in JUDGED_CUTS and cell["setting"] in JUDGED]
    known = {(cell["setting"], cell["cut"]): cell["knn"] for cell in cells}
    return {
        "central_knn": known.get(("central", 0)),
        "iid_knn": known.get(("iid_100", 1)),
        "noniid_knn": known.get(("noniid_100", 1)),
        "paper_knn": known.get(("paper", 1)),
        "frozen_knn": known.get(("frozen", 1)),
        "apart_knn": known.get(("apart", 1)),
        "margin": margin,
        "passed": _passed(judged, [cell for cell in cells if cell["setting"] == "apart"], margin),
        "cells": cells,
    }


def _passed(cells: list[dict[str, Any]], control: list[dict[str, Any]], margin: float) -> bool | None:
    """Whether all `cells` have learned, and images, and clients of the `control` could be told apart, where it was run.

    None where nothing could be compared with central training.
    """
    from mocosfl_priv.evaluation.reliability import LARGEST_SIGNATURE

    compared = [cell for cell in cells if cell["minus_central"] is not None]
    if not compared:
        return None
    told_apart = [cell["largest_signature"] > LARGEST_SIGNATURE for cell in control]
    return all(told_apart) and all(
        cell["minus_central"] >= -margin and cell["largest_signature"] <= LARGEST_SIGNATURE for cell in compared
    )


def _mean(values: Iterable[float]) -> float | None:
    numbers = list(values)
    return round(float(np.mean(numbers)), 4) if numbers else None


def _interval(differences: list[float]) -> list[float] | None:
    """Student's t over seeds; None for fewer than two."""
    from scipy import stats

    if len(differences) < 2:
        return None
    half = stats.t.ppf(0.975, len(differences) - 1) * np.std(differences, ddof=1) / math.sqrt(len(differences))
    return [round(float(np.mean(differences) - half), 4), round(float(np.mean(differences) + half), 4)]


if __name__ == "__main__":
    main()
