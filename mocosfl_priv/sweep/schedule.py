"""The scheduler of a sweep: tasks with dependencies, the engine that runs them, and the handling of failures."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait
from dataclasses import dataclass
from typing import Any, Protocol

from mocosfl_priv.errors import RunFailedError, StorageError
from mocosfl_priv.runtime.imports import cause
from mocosfl_priv.runtime.progress import Segment

# How often a task is tried when its process dies. One death may have an outside cause; after three, the task is blamed.
ATTEMPTS = 3


@dataclass(frozen=True)
class Task:
    """The computation of one artefact.

    key: the artefact's address.
    segment: its title and expected duration.
    function, arguments: compute and store the artefact; both are pickled, since another process calls them.
    needs: keys of the tasks that must be done before.
    """

    key: str
    segment: Segment
    function: Callable[..., None]
    arguments: tuple[Any, ...]
    needs: tuple[str, ...] = ()

    def run(self) -> None:
        """Compute and store the artefact.

        Raises StorageError, or RunFailedError with the cause of any other error: both can be pickled back.
        """
        try:
            self.function(*self.arguments)
        except StorageError:
            raise
        except Exception as error:
            raise RunFailedError(cause(error)) from error


class Engine(Protocol):
    """Runs tasks, such as in processes on this machine or on a cluster."""

    @property
    def slots(self) -> int:
        """The number of tasks that can run at once; it may change."""

    def submit(self, task: Task) -> Future[None]:
        """Start a task; the future raises the task's error."""

    def died(self, error: BaseException) -> bool:
        """Whether `error` means that the process ended before its task did."""

    def close(self) -> None:
        """Abandon running tasks and end all processes."""


class SweepProgress(Protocol):
    """Receives the progress of a sweep, such as to display it."""

    def has_read(self, lines: Sequence[str]) -> None:
        """Called before anything is computed, with what was read of all data and with warnings, one line each."""

    def planned(self, tasks: Sequence[Task], cells: int, cached: int) -> None:
        """Called with the `tasks` that follow, for `cells` different cells, of which `cached` are in the store."""

    def started(self, task: Task) -> None:
        """Called when a task starts."""

    def ended(self, task: Task, failure: str) -> None:
        """Called when a task is over; `failure` is the cause of its failure, or empty."""

    def reporting(self, name: str, place: int, count: int) -> None:
        """Called after all tasks, before run directory `name` is written: number `place` of `count`, from 1."""


class SilentSweepProgress:
    """Shows nothing."""

    def has_read(self, lines: Sequence[str]) -> None:
        """Nothing to show."""

    def planned(self, tasks: Sequence[Task], cells: int, cached: int) -> None:
        """Nothing to show."""

    def started(self, task: Task) -> None:
        """Nothing to show."""

    def ended(self, task: Task, failure: str) -> None:
        """Nothing to show."""

    def reporting(self, name: str, place: int, count: int) -> None:
        """Nothing to show."""


class ThisProcess:
    """An engine that runs tasks in the calling process: for debuggers, and where worker processes are not worth it."""

    slots = 1

    def submit(self, task: Task) -> Future[None]:
        """Run `task` and return its completed future."""
        future: Future[None] = Future()
        try:
            task.run()
        except Exception as error:  # the future raises it
            future.set_exception(error)
        else:
            future.set_result(None)
        return future

    def died(self, error: BaseException) -> bool:  # noqa: ARG002
        """Return False: a task's process is this one."""
        return False

    def close(self) -> None:
        """Do nothing, since there are no other processes."""


class _Agenda:
    """The tasks that can be started now, in `ready` with the next one last, and those blocked by other tasks."""

    def __init__(self, tasks: Sequence[Task]) -> None:
        keys = {task.key for task in tasks}
        self._needs = {task.key: set(task.needs) & keys for task in tasks}
        self._blocked = {task.key: task for task in tasks if self._needs[task.key]}
        self.ready = [task for task in reversed(tasks) if task.key not in self._blocked]

    def settle(self, key: str, failed: bool) -> list[Task]:
        """Record that task `key` is done or has failed; returns the tasks that fail with it because they need it."""
        freed: list[Task] = []
        lost: list[Task] = []
        for task in [task for task in self._blocked.values() if key in self._needs[task.key]]:
            self._needs[task.key].discard(key)
            if task.key not in self._blocked or (not failed and self._needs[task.key]):
                continue
            del self._blocked[task.key]
            if failed:
                lost += [task, *self.settle(task.key, failed=True)]
            else:
                freed.append(task)
        self.ready += reversed(freed)
        return lost


def run_tasks(tasks: Sequence[Task], engine: Engine, progress: SweepProgress) -> dict[str, str]:
    """Compute all `tasks`, and return the causes of failures by task key.

    A needed key that is not among `tasks` counts as done. Tasks that need a failed task fail too; all others continue.
    Tasks that were unblocked last run first, so that the attacks on a system run before the next training. Raises
    StorageError; interruptions (KeyboardInterrupt) pass through.
    """
    agenda = _Agenda(tasks)
    attempts = dict.fromkeys((task.key for task in tasks), 0)
    running: dict[Future[None], Task] = {}
    failures: dict[str, str] = {}
    while agenda.ready or running:
        while agenda.ready and len(running) < engine.slots:
            task = agenda.ready.pop()
            attempts[task.key] += 1
            progress.started(task)
            running[engine.submit(task)] = task
        for future in wait(running, return_when=FIRST_COMPLETED).done:
            task, error = running.pop(future), future.exception()
            if isinstance(error, StorageError):
                raise error
            died = error is not None and engine.died(error)
            if died and attempts[task.key] < ATTEMPTS:
                agenda.ready.append(task)
                continue
            failure = cause(error) if error else ""
            if died:
                failure = f"the process that computed it died {ATTEMPTS} times ({failure})"
            for settled in (task, *agenda.settle(task.key, bool(failure))):
                progress.ended(settled, failure)
                if failure:
                    failures[settled.key] = failure
    return failures
