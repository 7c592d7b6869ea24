"""Whether split training learns what central training learns from the same images in the same number of steps.

    uv run python -m benchmarks.learning --data cifar10-full.tar.xz --keep runs/learning --json
    uv run python -m benchmarks.learning --data cifar10-full.tar.xz --quick --json

Central training is `tests/oracle/central_moco.py`: MoCo v2 in one place, which shares no code with the package. Beside
it stand MocoSFL with the defaults, IID and with two classes per client, 5 and 100 clients, several cut layers; frozen
TAResSFL clients; the choices of the research code (`protocol: paper`); and the same defaults without averaged momentum
models, as the positive control: it must be seen to fall into the short cut (docs/LEARNING.md).

The score is the weighted kNN monitor on test images. Nothing is selected by it. `--quick` trains central MoCo and the
hardest setting only, and exits with 1 where the second is more than `QUICK_MARGIN` behind.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import sys
import tarfile
import time
from collections.abc import Iterable
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from benchmarks.machine import processor, version

IMAGES, TEST_IMAGES, BATCH = 20_000, 2_000, 100
STEPS, QUICK_STEPS = 1_600, 800
CUTS = (1, 2, 3)
SETTINGS = ("central", "iid_5", "iid_100", "noniid_5", "noniid_100", "frozen", "paper", "apart")
JUDGED_CUTS = (1, 2)
MARGIN = 0.02  # of kNN accuracy, between the means over seeds
QUICK_MARGIN = 0.03  # one seed each
POINTS = 8  # of a learning curve
SOURCE_IMAGES, EXPERT_EPOCHS = 5_000, 12  # the expert behind `frozen`


@dataclass(frozen=True)
class Job:
    """One training. `cut` is 0 for central training."""

    setting: str
    cut: int
    seed: int
    steps: int
    images: int
    data: str

    @property
    def key(self) -> str:
        """A file name for its result."""
        digest = hashlib.sha256(json.dumps(asdict(self)).encode()).hexdigest()[:8]
        return f"{self.setting}_cut{self.cut}_seed{self.seed}_{digest}"


@dataclass
class Curve:
    """What one training went through: step, mean loss since the last point, kNN accuracy, client signature in nats."""

    points: list[dict[str, float]] = field(default_factory=list)

    @property
    def knn(self) -> float:
        """At the end."""
        return self.points[-1]["knn"]


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
    parser.add_argument("--settings", nargs="+", choices=SETTINGS, default=list(SETTINGS))
    parser.add_argument("--workers", type=int, default=2, help="trainings at once, a thread each")
    parser.add_argument("--keep", type=Path, help="folder of finished trainings, which are not done again")
    options = parser.parse_args()
    result = measure(options)
    print(json.dumps(result, indent=None if options.json else 2))
    sys.exit(0 if result["passed"] else 1)


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """All curves, and the comparison with central training."""
    started = time.monotonic()
    steps = options.steps or (QUICK_STEPS if options.quick else STEPS)
    cuts, settings, seeds = options.cuts, options.settings, options.seeds
    if options.quick:
        cuts, settings, seeds = [1], ["central", "noniid_100"], 1
    jobs = [
        Job(setting, cut, seed, steps, options.images, str(options.data))
        for seed in range(seeds)
        for setting in settings
        for cut in ([0] if setting == "central" else [1] if setting in ("paper", "apart") else cuts)
    ]
    curves = dict(_run_all(jobs, options.workers, options.keep))
    margin = QUICK_MARGIN if options.quick else MARGIN
    return {**compare(curves, margin), "minutes": round((time.monotonic() - started) / 60, 1), "setting": {
        "model": "resnet8 (width 16), projector 1024, 32 px, bfloat16 where the processor has it, one thread",
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
            "curves": [curve.points for curve in mine.values()],
        })  # fmt: skip
    judged = [
        cell for cell in cells if cell["cut"] in JUDGED_CUTS and str(cell["setting"]).startswith(("iid", "noniid"))
    ]
    known = {(cell["setting"], cell["cut"]): cell["knn"] for cell in cells}
    return {
        "central_knn": known.get(("central", 0)),
        "iid_knn": known.get(("iid_100", 1)),
        "noniid_knn": known.get(("noniid_100", 1)),
        "paper_knn": known.get(("paper", 1)),
        "frozen_knn": known.get(("frozen", 1)),
        "apart_knn": known.get(("apart", 1)),
        "margin": margin,
        "passed": all(cell["minus_central"] is None or cell["minus_central"] >= -margin for cell in judged),
        "cells": cells,
    }


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


def _run_all(jobs: list[Job], workers: int, keep: Path | None) -> Iterable[tuple[Job, Curve]]:
    """Every job with its curve, in the order of `jobs`; finished ones are read from `keep`."""
    done: dict[Job, Curve] = {}
    if keep is not None:
        keep.mkdir(parents=True, exist_ok=True)
        done = {
            job: Curve(json.loads((keep / f"{job.key}.json").read_text(encoding="utf-8")))
            for job in jobs
            if (keep / f"{job.key}.json").is_file()
        }
    with ProcessPoolExecutor(workers) as pool:
        running = {pool.submit(_train, job): job for job in jobs if job not in done}
        for future in as_completed(running):
            job = running[future]
            done[job] = future.result()
            print(f"{job.key}: kNN {done[job].knn:.3f}", file=sys.stderr, flush=True)
            if keep is not None:
                (keep / f"{job.key}.json").write_text(json.dumps(done[job].points), encoding="utf-8")
    return [(job, done[job]) for job in jobs]


def _train(job: Job) -> Curve:
    """One training in this process, on one thread."""
    import torch

    torch.set_num_threads(1)
    return _train_central(job) if job.setting == "central" else _train_split(job)


def _train_central(job: Job) -> Curve:
    from mocosfl_priv.config import ComputeConfig
    from mocosfl_priv.runtime.compute import Compute
    from tests.oracle.central_moco import CentralMoco, knn_accuracy

    images, labels, test = _images(job)
    bfloat16 = Compute.resolve(ComputeConfig(device="cpu", threads=1)).bfloat16
    moco = CentralMoco(images, steps=job.steps, seed=job.seed, batch=BATCH, bfloat16=bfloat16)
    curve, losses = Curve(), []
    for step in range(1, job.steps + 1):
        losses.append(moco.step())
        if step * POINTS % job.steps < POINTS:
            knn = knn_accuracy(moco.features, (images, labels), test)
            curve.points.append({"step": step, "loss": float(np.mean(losses)), "knn": knn})
            losses = []
    return curve


def _train_split(job: Job) -> Curve:
    import torch

    from mocosfl_priv.config import ComputeConfig, ModelConfig, parse_config
    from mocosfl_priv.evaluation.knn import weighted_knn
    from mocosfl_priv.evaluation.utility import features
    from mocosfl_priv.models.split import build_split_model
    from mocosfl_priv.runtime.compute import Compute
    from mocosfl_priv.runtime.seeding import generator
    from mocosfl_priv.training.hooks import NoHooks
    from mocosfl_priv.training.mocosfl import MocoSFL
    from mocosfl_priv.training.sampling import PooledClients, PoolShape, seeded_partition

    images, labels, test = _images(job)
    compute = Compute.resolve(ComputeConfig(device="cpu", threads=1))
    training = parse_config({
        "protocol": "paper" if job.setting == "paper" else "strict",
        "training": {
            "clients": 5 if job.setting.endswith("_5") else 100,
            "partition": "iid" if job.setting.startswith("iid") else "classes_per_client",
            "server_batch": BATCH,
            "epochs": max(1, math.ceil(job.steps * BATCH / len(images))),
            **({"average_momentum_models": False} if job.setting == "apart" else {}),
        },
    }).training  # fmt: skip
    unit = images.float() / 255
    mean, deviation = unit.mean((0, 2, 3)), unit.std((0, 2, 3))

    def build(model: ModelConfig) -> Any:
        torch.manual_seed(job.seed)
        return build_split_model(model, job.cut, images.shape[-1], mean.tolist(), deviation.tolist())

    frozen = job.setting == "frozen"
    model = _expert(job, build, training, compute) if frozen else build(ModelConfig(backbone="resnet8"))
    batches = PooledClients(
        images, seeded_partition(labels, training, job.seed), PoolShape.of(training), generator(job.seed, "batches"),
        training.partial_batches == "drop",
    )  # fmt: skip
    run = MocoSFL(
        model, batches, training, steps=job.steps, compute=compute, seed=job.seed, frozen_client=frozen
    )  # fmt: skip
    curve, losses = Curve(), []
    for step in range(1, job.steps + 1):
        losses.append(float(run.step()))
        if step * POINTS % job.steps < POINTS:
            rng = generator(job.seed, "monitor")
            trained = run.assemble()
            bank, queries = (features(trained, part, NoHooks(), compute, rng) for part in (images, test[0]))
            predicted = weighted_knn(bank, labels, queries, classes=int(labels.max()) + 1)
            point = {"step": step, "loss": float(np.mean(losses)), "knn": float((predicted == test[1]).float().mean())}
            signature = run.client_signature()
            curve.points.append(point if signature is None else {**point, "client_signature": signature})
            losses = []
    return curve


def _expert(job: Job, build: Any, training: Any, compute: Any) -> Any:
    """A TAResSFL expert that saw 1 % of the clients' images and others of their kind: its client is handed out."""
    from mocosfl_priv.config import ModelConfig, PluginSpec
    from mocosfl_priv.data.image_set import balanced_subset
    from mocosfl_priv.plugins import DEFENSES, DefenderContext
    from mocosfl_priv.runtime.seeding import generator

    defense = DEFENSES.create(
        PluginSpec.model_validate({"name": "taressfl", "decoder": "res_normN1C16", "epochs": EXPERT_EPOCHS})
    ).plugin
    images, labels, _ = _images(job)
    everything, _, _ = _load(job.data)
    others = np.setdiff1d(np.arange(len(everything)), _chosen(job).numpy())
    rng = np.random.default_rng(job.seed)
    target = balanced_subset(labels, len(images) // 100, generator(job.seed, "target"))
    source = everything[np.sort(rng.permutation(others)[:SOURCE_IMAGES])]
    architecture = defense.architecture(ModelConfig(backbone="resnet8"))
    prepared = defense.prepare(
        DefenderContext(images[target], source, lambda: build(architecture), training, compute, job.seed)
    )
    assert prepared is not None
    return prepared.model


def _chosen(job: Job) -> Any:
    from mocosfl_priv.data.image_set import balanced_subset
    from mocosfl_priv.runtime.seeding import generator

    return balanced_subset(_load(job.data)[1], job.images, generator(job.seed, "subset"))


def _images(job: Job) -> tuple[Any, Any, tuple[Any, Any]]:
    """Training images and labels of a job, and the test images that are the same for all."""
    from mocosfl_priv.data.image_set import balanced_subset
    from mocosfl_priv.runtime.seeding import generator

    images, labels, (test_images, test_labels) = _load(job.data)
    chosen = _chosen(job)
    tested = balanced_subset(test_labels, TEST_IMAGES, generator(0, "test"))
    return images[chosen], labels[chosen], (test_images[tested], test_labels[tested])


@cache
def _load(data: str) -> tuple[Any, Any, tuple[Any, Any]]:
    """All images of a class-folder tree, or of a tar file of one, without unpacking it."""
    import torch

    train: list[tuple[str, str, np.ndarray]] = []
    test: list[tuple[str, str, np.ndarray]] = []
    place = Path(data).expanduser()

    def add(path: Path, image: Any) -> None:
        split = {"train": train, "test": test}.get(path.parts[-3] if len(path.parts) > 2 else "")
        if split is not None and path.suffix.lower() in (".png", ".jpg", ".jpeg"):
            split.append((path.parts[-2], path.name, np.asarray(Image.open(image).convert("RGB"))))

    if place.is_dir():
        for file in sorted(place.rglob("*.*")):
            add(file, file)
    else:
        with tarfile.open(place) as archive:
            for member in archive:
                if member.isfile():
                    add(Path(member.name), archive.extractfile(member))
    if not train or not test:
        sys.exit(f"{place}: no images below train/<class>/ and test/<class>/")

    def tensors(rows: list[tuple[str, str, np.ndarray]]) -> tuple[Any, Any]:
        rows.sort(key=lambda row: row[:2])
        names = sorted({row[0] for row in rows})
        images = torch.from_numpy(np.stack([row[2] for row in rows])).permute(0, 3, 1, 2).contiguous()
        return images, torch.tensor([names.index(row[0]) for row in rows])

    images, labels = tensors(train)
    return images, labels, tensors(test)


if __name__ == "__main__":
    main()
