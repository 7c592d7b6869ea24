"""Sweeps of real systems."""

from __future__ import annotations

import random
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import yaml

from mocosfl_priv.api import Experiment, Sweep, SweepResult
from mocosfl_priv.config import read_document
from mocosfl_priv.errors import ConfigurationError, RunFailedError
from mocosfl_priv.results import ATTACK_COSTS, CELL_KEYS, read_record
from mocosfl_priv.sweep.document import load_sweep
from mocosfl_priv.sweep.schedule import SilentSweepProgress, Task, ThisProcess
from mocosfl_priv.sweep.store import Store

TIMINGS = ["attack_seconds", "attack_peak_megabytes", "training_seconds"]


class Interrupted(ThisProcess):
    """Ends the process, as far as the sweep can tell, before its n-th task."""

    def __init__(self, after: int) -> None:
        self._left = after

    def submit(self, task: Task) -> Future[None]:
        if self._left == 0:
            raise KeyboardInterrupt
        self._left -= 1
        return super().submit(task)


class Counter(SilentSweepProgress):
    def __init__(self) -> None:
        self.tasks: list[str] = []
        self.cached = -1
        self.read: Sequence[str] = ()

    def has_read(self, lines: Sequence[str]) -> None:
        self.read = lines

    def planned(self, tasks: Any, cells: int, cached: int) -> None:
        self.tasks, self.cached = [task.segment.title for task in tasks], cached


@pytest.fixture
def document(tiny: dict[str, Any], tmp_path: Path) -> Path:
    tiny["attacks"] = ["floor", {"name": "decoder", "architecture": "conv_normN0C8", "steps": 10}]
    tiny["defenses"] = [{"name": "taressfl", "epochs": 1, "batch_size": 32, "decoder": "conv_normN0C8"}]
    tiny["data"] |= {"train_limit": 300, "auxiliary_source_fraction": 0.95}
    tiny["axes"] = {"partition": {"iid": {}, "shards": {"training.partition": "classes_per_client"}}}
    return write(tiny, tmp_path / "sweep.yaml")


def write(document: dict[str, Any], path: Path) -> Path:
    path.write_text(yaml.safe_dump(document, sort_keys=False))
    return path


def comparable(table: pd.DataFrame) -> pd.DataFrame:
    return table.drop(columns=TIMINGS)


def same(one: SweepResult, other: SweepResult) -> None:
    pd.testing.assert_frame_equal(comparable(one.cells), comparable(other.cells))
    for name in one.runs:
        a, b = (read_record(sweep.folder / "runs" / name) for sweep in (one, other))
        pd.testing.assert_frame_equal(a.per_image, b.per_image)
        pd.testing.assert_frame_equal(a.probe, b.probe)
        pd.testing.assert_frame_equal(a.training, b.training)
        assert a.images.keys() == b.images.keys()
        assert all(np.array_equal(a.images[key], b.images[key]) for key in a.images)


def test_an_interrupted_sweep_ends_as_an_undisturbed_one(document: Path, tmp_path: Path) -> None:
    sweep = Sweep.from_yaml(document)
    undisturbed = sweep.run(tmp_path / "undisturbed", ThisProcess())
    assert undisturbed.cells["partition"].tolist() == ["iid"] * 2 + ["shards"] * 2
    assert (undisturbed.cells["failure"] == "").all()
    iid, shards = (undisturbed.runs[f"partition={label}"].record.training for label in ("iid", "shards"))
    assert iid["loss"][0] != shards["loss"][0]

    folder = tmp_path / "disturbed"
    for after in (2, 3):
        with pytest.raises(KeyboardInterrupt):
            sweep.run(folder, Interrupted(after), resume=True)
    store = Store(folder / "store")
    damaged = next((store.folder / "system").iterdir())
    tensors = damaged / "tensors.safetensors"
    tensors.write_bytes(tensors.read_bytes()[:-1] + b"\xff")
    counter = Counter()
    resumed = sweep.run(folder, ThisProcess(), counter, resume=True)
    same(undisturbed, resumed)
    assert counter.cached > 0
    assert [line.split(":")[0] for line in counter.read] == ["photos/train", "photos/test", "photos-source/train"]
    events = [(entry["event"], entry["key"]) for entry in store.journal()]
    assert all(events.count(("done", key)) <= 1 + events.count(("discarded", key)) for _, key in events)
    made = [entry["kind"] for entry in store.journal() if entry["event"] == "done"]
    assert made.count("expert") == 1  # of both variants

    again, pages = Counter(), sorted(folder.rglob("report.html"))
    pages[0].write_text("scribbled over")
    old = [page.stat().st_mtime_ns for page in pages]
    same(undisturbed, sweep.run(folder, ThisProcess(), again, resume=True))
    assert again.tasks == [] and again.cached == 4
    new = [page.stat().st_mtime_ns for page in pages]
    assert new[0] > old[0] and new[1] == old[1] and "<html" in pages[0].read_text()
    options = Sweep.from_yaml(document, {"evaluation.confidence": 0.9, "evaluation.bootstrap_samples": 100})
    options.run(folder, ThisProcess(), again, resume=True)
    assert again.tasks == []  # what concerns the report only runs nothing again
    more = Counter()
    with pytest.raises(KeyboardInterrupt):
        Sweep.from_yaml(document, attacks=["rmle"]).run(folder, Interrupted(0), more, resume=True)
    assert [title.partition(": ")[2].split()[0] for title in more.tasks] == ["attack"] * 2 + ["score"] * 2
    assert all(title.endswith(": rmle") for title in more.tasks)  # systems and judge are there
    judged = Counter()
    with pytest.raises(KeyboardInterrupt):
        Sweep.from_yaml(document, {"evaluation.recognition_epochs": 2}).run(folder, Interrupted(0), judged, resume=True)
    assert [title.partition(": ")[2].split()[0] for title in judged.tasks] == ["train"] + ["score"] * 4
    assert judged.tasks[0].endswith("the recognition judge") and judged.cached == 0  # no attack is run again


@pytest.mark.slow
def test_a_sweep_gives_what_a_run_gives(tiny: dict[str, Any], tmp_path: Path) -> None:
    tiny["compute"]["threads"] = 1
    run = Experiment.from_dict(tiny).run()
    sweep = Sweep.from_yaml(write(tiny, tmp_path / "run.yaml")).run(tmp_path / "sweep", ThisProcess())
    pd.testing.assert_frame_equal(comparable(sweep.cells), comparable(run.table()), rtol=1e-4)


def test_a_training_that_fails_fails_alone(tiny: dict[str, Any], tmp_path: Path) -> None:
    tiny["attacks"] = ["floor", "tests.sweep.test_sweep:Clumsy"]
    tiny["defenses"] = ["none", "tests.sweep.test_sweep:Unlucky"]
    tiny["evaluation"] |= {"recognition_epochs": 0, "label_fractions": []}
    tiny["data"]["train_limit"] = 300
    sweep = Sweep.from_yaml(write(tiny, tmp_path / "sweep.yaml"))
    result = sweep.run(tmp_path / "out", ThisProcess())
    good, clumsy, bad = (result.cells.iloc[row] for row in (0, 1, 2))
    assert good["failure"] == "" and np.isfinite(good["leak_ratio"])
    assert clumsy["failure"].endswith("dropped it") and np.isnan(clumsy["leak_ratio"])
    assert np.isfinite(
        [clumsy["attack_seconds"], clumsy["linear_accuracy"]]
    ).all()  # it took time, and the system is fine
    assert bad["defense"] == "Unlucky" and "out of luck" in bad["failure"]
    assert np.isnan(bad[["leak_ratio", "linear_accuracy", "attack_seconds"]].astype(float)).all()
    assert (result.folder / "runs" / "tiny" / "report.html").is_file()
    with pytest.raises(RunFailedError, match="3 of 4 attacks failed; the first: 'Clumsy' on none"):
        result.require_success()
    again = Counter()
    with pytest.raises(KeyboardInterrupt):
        sweep.run(tmp_path / "out", Interrupted(0), again, resume=True)
    assert [title.split()[0] for title in again.tasks] == ["train"] + ["attack"] * 3 + ["score"] * 3
    assert again.cached == 1


from mocosfl_priv.plugins import Attack, Defense  # noqa: E402


class Clumsy(Attack):
    """Fails whatever it attacks."""

    def reconstruct(self, view: Any, budget: Any, seed: int) -> Any:
        raise IndexError("dropped it")


class Unlucky(Defense):
    """Fails in training."""

    def protect(self, smashed: Any, rng: Any, kind: Any = None) -> Any:
        raise IndexError("out of luck")


@pytest.mark.parametrize(
    ("axes", "message"),
    [
        ([], "expected a mapping of axes"),
        ({"seed": {"a": {}}}, "differs from all columns"),
        ({"a/b": {"a": {}}}, "differs from all columns"),
        ({"kind": {}}, "a mapping of labels to settings"),
        ({"kind": {1: {}}}, "invalid label 1"),
        ({"kind": {"a": 3}}, "expected a mapping of keys to values"),
        ({"kind": {"a": {"training.epoch": 3}}}, "did you mean 'epochs'"),
        ({"kind": {"a": {"attacks.x": 3}}}, "axes.kind.a attacks.x: 'x' is not a position"),
        ({"kind": {"a": {}, "b": {"compute.threads": 2}}}, "compute.threads is 1 for kind=a and 2 for kind=b"),
        ({"kind": {"a": {}, "b": {"compute.device": "auto"}}}, "compute.device is cpu for kind=a and auto for kind=b"),
    ],
)
def test_axes_that_make_no_sense_are_refused(axes: Any, message: str, tiny: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match=message):
        Sweep.from_yaml(write({**tiny, "axes": axes}, tmp_path / "sweep.yaml"))


SHIPPED = sorted((Path(__file__).parents[2] / "configs" / "sweep").glob("*.yaml"))


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_shipped_sweeps_are_valid_and_described(path: Path) -> None:
    assert len(load_sweep(path).variants) > 1 and read_document(path)["description"]


def test_axes_multiply(tiny: dict[str, Any], tmp_path: Path) -> None:
    axes = {"size": {"s": {"training.clients": 2}, "l": {"training.clients": 4}}, "kind": {"a": {}, "b": {"name": "B"}}}
    sweep = Sweep.from_yaml(write({**tiny, "axes": axes}, tmp_path / "sweep.yaml"), {"training.epochs": 2})
    variants = {v.name: (v.config.training.clients, v.config.name) for v in sweep.document.variants}
    assert variants == {
        "size=s_kind=a": (2, "tiny"), "size=s_kind=b": (2, "B"), "size=l_kind=a": (4, "tiny"), "size=l_kind=b": (4, "B")
    }  # fmt: skip
    assert {v.config.training.epochs for v in sweep.document.variants} == {2}
    assert {v.config.compute.threads for v in sweep.document.variants} == {1}
    assert not set(axes) & set(CELL_KEYS) and ATTACK_COSTS


@pytest.mark.slow
def test_real_sweeps_killed_at_random_moments_end_as_undisturbed_ones(document: Path, tmp_path: Path) -> None:
    """The command itself, with two workers, killed ten times while it makes one artefact after the other."""

    def command(out: str) -> list[str]:
        return [
            sys.executable, "-m", "mocosfl_priv.cli", "sweep", str(document), "--out", str(tmp_path / out), "--resume",
            "--workers", "2", "--set", "seeds=[0,1]",
        ]  # fmt: skip

    subprocess.run(command("undisturbed"), check=True, capture_output=True)
    rng = random.Random(0)
    journal = tmp_path / "disturbed" / "store" / "journal.jsonl"
    for _ in range(10):
        goal = lines(journal) + rng.randrange(3)
        process = subprocess.Popen(command("disturbed"), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        while lines(journal) < goal and process.poll() is None:
            time.sleep(0.05)
        time.sleep(rng.uniform(0, 8))
        process.kill()
        process.wait(30)
    subprocess.run(command("disturbed"), check=True, capture_output=True)
    one, other = (pd.read_csv(tmp_path / out / "results.csv") for out in ("undisturbed", "disturbed"))
    pd.testing.assert_frame_equal(comparable(one), comparable(other))
    events = [(e["event"], e["key"]) for e in Store(tmp_path / "disturbed" / "store").journal()]
    assert all(events.count(("done", key)) == 1 for _, key in events)
    kinds = [e["kind"] for e in Store(tmp_path / "undisturbed" / "store").journal()]
    expected = {"judge": 1, "expert": 2, "system": 4, "attack": 8, "score": 8, "run": 2}
    assert {kind: kinds.count(kind) for kind in kinds} == expected


def lines(journal: Path) -> int:
    return len(journal.read_bytes().splitlines()) if journal.is_file() else 0
