"""A process to kill: `python -m tests.sweep.toy_sweep FOLDER WORKERS` computes what is missing of twenty toy tasks."""

from __future__ import annotations

import sys
from pathlib import Path

from mocosfl_priv.sweep.directory import SweepDirectory
from mocosfl_priv.sweep.processes import LocalEngine
from mocosfl_priv.sweep.schedule import SilentSweepProgress, Task, run_tasks
from mocosfl_priv.sweep.store import Store
from tests.sweep.toy import KIND, task

TRAININGS = 5


def tasks(store: Store) -> list[Task]:
    """Five trainings of three attacks each."""
    trainings = [task(store.folder, f"t{i}", 0.03) for i in range(TRAININGS)]
    attacks = [task(store.folder, f"t{i}a{j}", 0.01, (f"t{i}",)) for i in range(TRAININGS) for j in range(3)]
    return [one for one in (*trainings, *attacks) if store.get(KIND, one.key) is None]


def main(folder: Path, workers: int) -> None:
    engine = LocalEngine(workers)
    try:
        with SweepDirectory(folder, resume=True) as sweep:
            assert run_tasks(tasks(sweep.store), engine, SilentSweepProgress()) == {}
    finally:
        engine.close()


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
