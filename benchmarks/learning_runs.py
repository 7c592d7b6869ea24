"""Trainings of central MoCo and of MocoSFL on the same images: `learning` and `short_cut` compare their curves.

A training is described by a `Job`, runs on one thread, and is kept as a JSON file, so that a list of them can be ended
and gone on with.
"""

from __future__ import annotations

import hashlib
import json
import math
import sys
import tarfile
from collections.abc import Iterable
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

TEST_IMAGES, BATCH = 2_000, 100
POINTS = 8  # of a learning curve
SOURCE_IMAGES, EXPERT_EPOCHS = 5_000, 12  # the expert behind `frozen`
READ_IMAGES = 32  # sent through every client to learn to read clients from them, and as many others to test it
BACKBONES = {"resnet8": "resnet8", "resnet8-half": "benchmarks.half_resolution:resnet8"}
NONIID: dict[str, Any] = {"partition": "classes_per_client"}
SETTINGS: dict[str, dict[str, Any]] = {
    "central": {},
    "iid_5": {"clients": 5},
    "iid_100": {},
    "noniid_5": {"clients": 5, **NONIID},
    "noniid_100": NONIID,
    "frozen": NONIID,
    "paper": NONIID,
    "apart": {**NONIID, "average_momentum_models": False},
    "iid_apart": {"average_momentum_models": False},
}


@dataclass(frozen=True)
class Job:
    """One training. `cut` is 0 for central training; `changes` are training settings besides those of `setting`.

    stop: the step after which it ends; the schedule still has `steps`. read: whether clients are read from what they
    send when it ends.
    """

    setting: str
    cut: int
    seed: int
    steps: int
    images: int
    data: str
    backbone: str = "resnet8"
    changes: tuple[tuple[str, Any], ...] = ()
    stop: int | None = None
    read: bool = False

    @property
    def key(self) -> str:
        """A file name for its result, which does not depend on where the data are."""
        facts = {name: value for name, value in asdict(self).items() if name != "data"}
        digest = hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:8]
        return f"{self.setting}_cut{self.cut}_seed{self.seed}_{digest}"


@dataclass
class Curve:
    """What one training went through: step, mean loss since the last point, kNN accuracy, client signature in nats."""

    points: list[dict[str, float]] = field(default_factory=list)
    read: dict[str, float] = field(default_factory=dict)

    @property
    def knn(self) -> float:
        """At the end."""
        return self.points[-1]["knn"]

    @property
    def signature(self) -> float:
        """The largest, in nats; 0 where there are no clients to compare."""
        return max((point["client_signature"] for point in self.points if "client_signature" in point), default=0.0)


def run_all(jobs: list[Job], workers: int, keep: Path | None) -> dict[Job, Curve]:
    """Every job with its curve, in the order of `jobs`; finished ones are read from `keep`."""
    done: dict[Job, Curve] = {}
    if keep is not None:
        keep.mkdir(parents=True, exist_ok=True)
        done = {
            job: Curve(**json.loads((keep / f"{job.key}.json").read_text(encoding="utf-8")))
            for job in jobs
            if (keep / f"{job.key}.json").is_file()
        }
    with ProcessPoolExecutor(workers) as pool:
        running = {pool.submit(train, job): job for job in jobs if job not in done}
        for future in as_completed(running):
            job = running[future]
            done[job] = future.result()
            print(f"{job.key}: kNN {done[job].knn:.3f}", file=sys.stderr, flush=True)
            if keep is not None:
                finished = keep / f"{job.key}.json"
                unfinished = finished.with_suffix(".part")
                unfinished.write_text(json.dumps(asdict(done[job])), encoding="utf-8")
                unfinished.replace(finished)
    return {job: done[job] for job in jobs}


def train(job: Job) -> Curve:
    """One training in this process, on one thread."""
    import torch

    torch.set_num_threads(1)
    return _train_central(job) if job.setting == "central" else _train_split(job)


def _points(job: Job) -> Iterable[tuple[int, bool]]:
    """Steps from 1 to the last one, and whether the curve has a point there."""
    last = job.stop or job.steps
    for step in range(1, last + 1):
        yield step, step * POINTS % last < POINTS


def _train_central(job: Job) -> Curve:
    from mocosfl_priv.config import ComputeConfig
    from mocosfl_priv.runtime.compute import Compute
    from tests.oracle.central_moco import CentralMoco, knn_accuracy

    images, labels, test = _images(job)
    bfloat16 = Compute.resolve(ComputeConfig(device="cpu", threads=1)).bfloat16
    stem_stride = 2 if job.backbone == "resnet8-half" else 1
    moco = CentralMoco(
        images, steps=job.steps, seed=job.seed, batch=BATCH, bfloat16=bfloat16, stem_stride=stem_stride
    )  # fmt: skip
    curve, losses = Curve(), []
    for step, has_point in _points(job):
        losses.append(moco.step())
        if has_point:
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
            "clients": 100,
            "server_batch": BATCH,
            "epochs": max(1, math.ceil(job.steps * BATCH / len(images))),
            **SETTINGS[job.setting],
            **dict(job.changes),
        },
    }).training  # fmt: skip
    unit = images.float() / 255
    mean, deviation = unit.mean((0, 2, 3)), unit.std((0, 2, 3))

    def build(model: ModelConfig) -> Any:
        torch.manual_seed(job.seed)
        return build_split_model(model, job.cut, images.shape[-1], mean.tolist(), deviation.tolist())

    frozen = job.setting == "frozen"
    model = _expert(job, build, training, compute) if frozen else build(_model(job))
    partition = seeded_partition(labels, training, job.seed)
    batches = PooledClients(
        images, partition, PoolShape.of(training), generator(job.seed, "batches"), training.partial_batches == "drop"
    )
    run = MocoSFL(
        model, batches, training, steps=job.steps, compute=compute, seed=job.seed, frozen_client=frozen
    )  # fmt: skip
    curve, losses = Curve(), []
    for step, has_point in _points(job):
        if job.read and step == job.stop:  # before this step's synchronisation, where clients differ most
            curve.read = _read_clients(run, test[0], [labels[own].unique().tolist() for own in partition])
        losses.append(float(run.step()))
        if has_point:
            rng = generator(job.seed, "monitor")
            trained = run.assemble()
            bank, queries = (features(trained, part, NoHooks(), compute, rng) for part in (images, test[0]))
            predicted = weighted_knn(bank, labels, queries, classes=int(labels.max()) + 1)
            point = {"step": step, "loss": float(np.mean(losses)), "knn": float((predicted == test[1]).float().mean())}
            signature = run.client_signature()
            curve.points.append(point if signature is None else {**point, "client_signature": signature})
            losses = []
    return curve


def _model(job: Job) -> Any:
    from mocosfl_priv.config import ModelConfig

    return ModelConfig(backbone=BACKBONES[job.backbone])


def _read_clients(run: Any, images: Any, classes: list[list[int]]) -> dict[str, float]:
    """How well a linear classifier reads clients from what they send of the same images.

    images: uint8 (n, 3, h, w). classes: those that each client has images of.

    `client_from_*`: accuracy for the client itself, learned from some images and tested on others; chance is one in as
    many as there are clients. `classes_from_*`: how often the class that scores highest is one of the client's own,
    learned from half of the clients and tested on the others, and on other images. *: smashed data as sent for queries
    (at most 4,096 numbers of each, evenly spaced), features of the online trunk, queries, and keys.
    """
    import torch
    from sklearn.linear_model import RidgeClassifier

    count = len(classes)
    online, key = run.clients.copies(torch.arange(count))
    learn, test = images[:READ_IMAGES], images[READ_IMAGES : 2 * READ_IMAGES]
    kinds = [
        dict(zip(("smashed", "features", "queries", "keys"), _sent(run, online, key, part), strict=True))
        for part in (learn, test)
    ]
    owners = np.repeat(np.arange(count), READ_IMAGES)
    first = owners < count // 2
    has = np.zeros((count, 1 + max(max(own) for own in classes)))
    for client, own in enumerate(classes):
        has[client, own] = 1
    found: dict[str, float] = {"classes_by_chance": float(has[count // 2 :].mean(1).mean())}
    for kind in kinds[0]:
        learned, tested = kinds[0][kind], kinds[1][kind]
        centre, scale = learned.mean(0), learned.std(0) + 1e-8
        learned, tested = (learned - centre) / scale, (tested - centre) / scale
        reader = RidgeClassifier(alpha=100.0).fit(learned, owners)
        found[f"client_from_{kind}"] = float((reader.predict(tested) == owners).mean())
        of_class = _ridge(learned[first], has[owners[first]])
        best = of_class(tested[~first]).argmax(1)
        found[f"classes_from_{kind}"] = float(has[owners[~first], best].mean())
    return {name: round(value, 4) for name, value in found.items()}


def _ridge(inputs: Any, outputs: Any) -> Any:
    from sklearn.linear_model import Ridge

    return Ridge(alpha=100.0).fit(inputs, outputs).predict


def _sent(run: Any, online: Any, key: Any, images: Any) -> list[Any]:
    """Smashed data, features, queries and keys float (clients * images, d) of the same images, client by client."""
    import torch
    import torch.nn.functional as F
    from torch.func import functional_call

    client, server = run.model.client, run.server
    trunk, projector = server.online[0], server.online[1]
    parts: list[list[Any]] = [[], [], [], []]
    x = images.float() / 255
    with torch.no_grad():
        for index in range(len(next(iter(online.values())))):
            smashed = functional_call(client, {name: value[index] for name, value in online.items()}, (x,))
            features = trunk(smashed)
            momentum = functional_call(client, {name: value[index] for name, value in key.items()}, (x,))
            flat = smashed.flatten(1)
            parts[0].append(flat[:, :: max(1, flat.shape[1] // 4096)])
            parts[1].append(features.flatten(1))
            parts[2].append(F.normalize(projector(features), dim=1))
            parts[3].append(F.normalize(server.key(momentum), dim=1))
    return [torch.cat(part).double().numpy() for part in parts]


def _expert(job: Job, build: Any, training: Any, compute: Any) -> Any:
    """A TAResSFL expert that saw 1 % of the clients' images and others of their kind: its client is handed out."""
    from mocosfl_priv.config import PluginSpec
    from mocosfl_priv.data.image_set import balanced_subset
    from mocosfl_priv.plugins import DEFENSES, DefenderContext
    from mocosfl_priv.runtime.seeding import generator

    defense = DEFENSES.create(
        PluginSpec.model_validate({"name": "taressfl", "decoder": "res_normN1C16", "epochs": EXPERT_EPOCHS})
    ).plugin
    images, labels, _ = _images(job)
    everything, _, _ = load(job.data)
    others = np.setdiff1d(np.arange(len(everything)), _chosen(job).numpy())
    rng = np.random.default_rng(job.seed)
    target = balanced_subset(labels, len(images) // 100, generator(job.seed, "target"))
    source = everything[np.sort(rng.permutation(others)[:SOURCE_IMAGES])]
    architecture = defense.architecture(_model(job))
    prepared = defense.prepare(
        DefenderContext(images[target], source, lambda: build(architecture), training, compute, job.seed)
    )
    assert prepared is not None
    return prepared.model


def _chosen(job: Job) -> Any:
    from mocosfl_priv.data.image_set import balanced_subset
    from mocosfl_priv.runtime.seeding import generator

    return balanced_subset(load(job.data)[1], job.images, generator(job.seed, "subset"))


def _images(job: Job) -> tuple[Any, Any, tuple[Any, Any]]:
    """Training images and labels of a job, and the test images that are the same for all."""
    from mocosfl_priv.data.image_set import balanced_subset
    from mocosfl_priv.runtime.seeding import generator

    images, labels, (test_images, test_labels) = load(job.data)
    chosen = _chosen(job)
    tested = balanced_subset(test_labels, TEST_IMAGES, generator(0, "test"))
    return images[chosen], labels[chosen], (test_images[tested], test_labels[tested])


@cache
def load(data: str) -> tuple[Any, Any, tuple[Any, Any]]:
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
