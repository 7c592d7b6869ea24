"""Tasks that take milliseconds and import no torch, for what is about the machinery of sweeps and not about results."""

from __future__ import annotations

import os
import signal
import time
from functools import partial
from pathlib import Path

from mocosfl_priv.errors import StorageError
from mocosfl_priv.runtime.progress import Segment
from mocosfl_priv.sweep.schedule import Task
from mocosfl_priv.sweep.store import Store

KIND = "number"


def task(store: Path, name: str, seconds: float = 0.0, needs: tuple[str, ...] = (), how: str = "ok") -> Task:
    """A task that stores the sum of what it needs and one."""
    return Task(name, Segment(name, "toy", 1.0), compute, (store, name, seconds, needs, how), needs)


def compute(folder: Path, name: str, seconds: float, needs: tuple[str, ...], how: str) -> None:
    """Sleep, fail as asked, or store a number in a file of some size, so that a kill may find it half-written."""
    store = Store(folder)
    if store.get(KIND, name) is not None:  # as real stages do: one whose process died may be there already
        return
    time.sleep(seconds)
    if how == "fail":
        raise ValueError(f"{name} was asked to fail")
    if how == "disk":
        raise StorageError("no space left")
    if how == "die" or (how == "die once" and _first_time(folder, name)):
        os.kill(os.getpid(), signal.SIGKILL)
    value = 1 + sum(number(store, need) for need in needs)
    store.put(KIND, name, partial(write_number, value), {"value": value}, {"name": name})


def number(store: Store, name: str) -> int:
    """What the task `name` stored."""
    artefact = store.get(KIND, name)
    assert artefact is not None, f"{name} is needed and not there"
    text = (artefact.folder / "number.txt").read_text()
    assert len(set(text.split())) == 1
    return int(text.split()[0])


def write_number(value: int, folder: Path) -> None:
    """The file of `value`, in many small writes."""
    with (folder / "number.txt").open("w") as file:
        for _ in range(200):
            file.write(f"{value}\n" * 20)
            file.flush()


def _first_time(folder: Path, name: str) -> bool:
    try:
        (folder.parent / f"{name}.died").touch(exist_ok=False)
    except FileExistsError:
        return False
    return True
