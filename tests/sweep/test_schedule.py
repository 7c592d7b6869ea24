"""Schedules on the real local engine, with tasks that take milliseconds."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest

from mocosfl_priv.errors import ConfigurationError, StorageError
from mocosfl_priv.sweep.directory import SweepDirectory
from mocosfl_priv.sweep.processes import LocalEngine
from mocosfl_priv.sweep.schedule import SilentSweepProgress, Task, run_tasks
from mocosfl_priv.sweep.store import Store
from tests.sweep.toy import KIND, number, task, write_number
from tests.sweep.toy_sweep import TRAININGS


class Watcher(SilentSweepProgress):
    def __init__(self) -> None:
        self.ended_with: dict[str, str] = {}
        self.order: list[str] = []

    def started(self, task: Task) -> None:
        self.order.append(task.key)

    def ended(self, task: Task, failure: str) -> None:
        assert task.key not in self.ended_with
        self.ended_with[task.key] = failure


@pytest.fixture
def engine() -> Iterator[LocalEngine]:
    engine = LocalEngine(2)
    yield engine
    engine.close()


def test_needs_come_first_and_what_a_training_unlocks_precedes_the_next(tmp_path: Path) -> None:
    store, watcher, engine = Store(tmp_path / "store"), Watcher(), LocalEngine(1)
    trainings = [task(store.folder, name) for name in ("t0", "t1")]
    attacks = [task(store.folder, f"{t}{a}", needs=(t,)) for t in ("t0", "t1") for a in ("a", "b")]
    last = task(store.folder, "last", needs=("t0a", "t1b"))
    try:
        assert run_tasks([*trainings, *attacks, last], engine, watcher) == {}
    finally:
        engine.close()
    assert watcher.order == ["t0", "t0a", "t0b", "t1", "t1a", "t1b", "last"]
    assert number(store, "last") == 5
    assert [entry["event"] for entry in store.journal()] == ["done"] * 7


def test_a_failure_takes_along_only_what_needs_it(tmp_path: Path, engine: LocalEngine) -> None:
    store, watcher = Store(tmp_path / "store"), Watcher()
    tasks = [
        task(store.folder, "bad", how="fail"),
        task(store.folder, "good"),
        task(store.folder, "on both", needs=("bad", "good")),
        task(store.folder, "on that", needs=("on both",)),
        task(store.folder, "on good", needs=("good", "stored before")),
    ]
    store.put(KIND, "stored before", partial(write_number, 7), {}, {})
    failures = run_tasks(tasks, engine, watcher)
    assert failures == dict.fromkeys(("bad", "on both", "on that"), "ValueError: bad was asked to fail")
    assert number(store, "on good") == 9
    assert watcher.ended_with == {"good": "", "on good": "", **failures}


def test_a_process_that_dies_is_replaced_and_its_task_done_again(tmp_path: Path, engine: LocalEngine) -> None:
    store = Store(tmp_path / "store")
    tasks = [task(store.folder, f"n{i}", how="die once" if i % 3 == 0 else "ok") for i in range(7)]
    assert run_tasks(tasks, engine, Watcher()) == {}
    assert all(number(store, one.key) == 1 for one in tasks)


def test_what_always_kills_its_process_fails_alone(tmp_path: Path, engine: LocalEngine) -> None:
    store = Store(tmp_path / "store")
    failures = run_tasks([task(store.folder, "deadly", how="die"), task(store.folder, "good")], engine, Watcher())
    assert failures.keys() == {"deadly"} and "died 3 times" in failures["deadly"]
    assert number(store, "good") == 1


def test_a_full_disk_stops_everything_and_keeps_what_is_complete(tmp_path: Path) -> None:
    store, engine = Store(tmp_path / "store"), LocalEngine(1)
    tasks = [task(store.folder, "good"), task(store.folder, "full", how="disk"), task(store.folder, "never")]
    try:
        with pytest.raises(StorageError, match="no space left"):
            run_tasks(tasks, engine, Watcher())
    finally:
        engine.close()
    assert store.has(KIND, "good") and not store.has(KIND, "never")


@pytest.mark.parametrize("planned", [4, pytest.param(40, marks=pytest.mark.slow)])
def test_kills_at_random_moments_lose_nothing_and_compute_nothing_twice(planned: int, tmp_path: Path) -> None:
    """The whole sweep, or one of its workers, is killed again and again; then it is left alone."""
    rng = random.Random(planned)
    folder = tmp_path / "sweep"
    kills = 0
    while kills < planned:
        process = _start(folder)
        time.sleep(rng.uniform(0.4, 1.6))
        workers = _workers(process.pid)
        victims = [process.pid] if rng.random() < 0.5 or not workers else workers[:1]
        for victim in victims:
            os.kill(victim, signal.SIGKILL)
            kills += 1
        if victims == [process.pid] or rng.random() < 0.5:
            process.kill()
            process.wait(10)
        else:
            assert process.wait(60) == 0
        _wait_until_gone(workers)
        if rng.random() < 0.3 and (folder / "store" / KIND).is_dir():
            _damage_one(folder / "store" / KIND, rng)
    last = _start(folder)
    assert last.wait(60) == 0
    store = Store(folder / "store")
    for i in range(TRAININGS):
        assert number(store, f"t{i}") == 1
        assert all(number(store, f"t{i}a{j}") == 2 for j in range(3))
    events = [(entry["event"], entry["key"]) for entry in store.journal()]
    assert not [event for event in events if event[0] == "twice"]
    for key in {key for _, key in events}:
        done, discarded = events.count(("done", key)), events.count(("discarded", key))
        assert done <= 1 + discarded


def _start(folder: Path) -> subprocess.Popen[bytes]:
    return subprocess.Popen([sys.executable, "-m", "tests.sweep.toy_sweep", str(folder), "2"])


def _workers(pid: int) -> list[int]:
    """The spawned workers of a process; it has other children, too."""
    try:
        threads = Path(f"/proc/{pid}/task").iterdir()
        children = [child for thread in threads for child in (thread / "children").read_text().split()]
    except OSError:
        return []
    return [int(child) for child in children if b"spawn_main" in _command(child)]


def _command(pid: str) -> bytes:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return b""


def _wait_until_gone(workers: list[int]) -> None:
    """Workers of a killed sweep end by themselves."""
    deadline = time.monotonic() + 20
    while any(b"spawn_main" in _command(str(worker)) for worker in workers):
        assert time.monotonic() < deadline, "processes outlived their sweep"
        time.sleep(0.02)


def _damage_one(artefacts: Path, rng: random.Random) -> None:
    """A bit flips on the disk."""
    for place in rng.sample(sorted(artefacts.iterdir()), k=1):
        file = place / "number.txt"
        content = bytearray(file.read_bytes())
        content[0] ^= 1
        file.write_bytes(bytes(content))


def test_two_sweeps_do_not_share_a_folder(tmp_path: Path) -> None:
    with (
        SweepDirectory(tmp_path / "sweep", resume=False),
        pytest.raises(ConfigurationError, match=rf"is in use by another sweep \(process {os.getpid()}\)"),
        SweepDirectory(tmp_path / "sweep", resume=True),
    ):
        pass
    with SweepDirectory(tmp_path / "sweep", resume=True):  # it was let go of
        pass


def test_a_folder_is_refused_unless_it_is_a_sweep_to_be_resumed(tmp_path: Path) -> None:
    with SweepDirectory(tmp_path / "sweep", resume=False):
        pass
    assert not (tmp_path / "sweep").exists()  # nothing was computed
    with SweepDirectory(tmp_path / "sweep", resume=False) as sweep:
        sweep.runs.mkdir()
    with pytest.raises(ConfigurationError, match="add --resume to continue"):
        SweepDirectory(tmp_path / "sweep", resume=False)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "file").touch()
    with pytest.raises(ConfigurationError, match="is not empty and holds no sweep"):
        SweepDirectory(tmp_path / "other", resume=True)
    with pytest.raises(ConfigurationError, match="is a file"):
        SweepDirectory(tmp_path / "other" / "file", resume=True)
