"""Who computes what when: tasks that need each other, an engine that runs them, and what becomes of failures."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait
from dataclasses import dataclass
from typing import Any, Protocol

from mocosfl_priv.errors import RunFailedError, StorageError
from mocosfl_priv.runtime.imports import cause
from mocosfl_priv.runtime.progress import Segment

ATTEMPTS = 3  # a worker that dies may have been killed from outside; one that dies three times of a task dies of it


@dataclass(frozen=True)
class Task:
    """One artefact to compute.

    key: its address. needs: keys of tasks that must be done before. segment: what it is called, and how long it may
    take. function, arguments: what computes and stores it; they go to another process.
    """

    key: str
    segment: Segment
    function: Callable[..., None]
    arguments: tuple[Any, ...]
    needs: tuple[str, ...] = ()

    def run(self) -> None:
        """Compute and store it. Raises StorageError, or RunFailedError with the cause: both survive another process."""
        try:
            self.function(*self.arguments)
        except StorageError:
            raise
        except Exception as error:
            raise RunFailedError(cause(error)) from error


class Engine(Protocol):
    """Runs tasks somewhere."""

    @property
    def slots(self) -> int:
        """How many at once; it may change."""

    def submit(self, task: Task) -> Future[None]:
        """Begin a task."""

    def died(self, error: BaseException) -> bool:
        """Whether `error` tells of a process that ended before its task did."""

    def close(self) -> None:
        """Abandon what still runs, and leave no process behind."""


class Observer(Protocol):
    """Is told what a sweep has read and plans, and how it goes on."""

    def has_read(self, lines: Sequence[str]) -> None:
        """What was read of the data of all variants, and warnings, a line each; before anything is computed."""

    def planned(self, tasks: Sequence[Task], cells: int, cached: int) -> None:
        """What follows: `tasks`, for `cells` different cells, of which the store has `cached`."""

    def started(self, task: Task) -> None:
        """A task begins."""

    def ended(self, task: Task, failure: str) -> None:
        """A task is over; `failure` is empty if it was computed."""

    def reporting(self, name: str, place: int, count: int) -> None:
        """Nothing is computed any more; the run directory `name` is made, `place` of `count`, counted from 1."""


class Unobserved:
    """Nobody looks on."""

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
    """An engine without processes of its own: for debuggers, and where a second process costs more than it gains."""

    slots = 1

    def submit(self, task: Task) -> Future[None]:
        """Run `task` now."""
        future: Future[None] = Future()
        try:
            task.run()
        except Exception as error:  # whoever waits for the task gets it
            future.set_exception(error)
        else:
            future.set_result(None)
        return future

    def died(self, error: BaseException) -> bool:  # noqa: ARG002
        """Who died cannot tell."""
        return False

    def close(self) -> None:
        """Nothing is left running."""


class _Agenda:
    """What can be computed now, the next one last, and what still waits for something."""

    def __init__(self, tasks: Sequence[Task]) -> None:
        keys = {task.key for task in tasks}
        self._needs = {task.key: set(task.needs) & keys for task in tasks}
        self._blocked = {task.key: task for task in tasks if self._needs[task.key]}
        self.ready = [task for task in reversed(tasks) if task.key not in self._blocked]

    def settle(self, key: str, failed: bool) -> list[Task]:
        """`key` is done, or will never be; returns what can therefore never be done either."""
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


def run_tasks(tasks: Sequence[Task], engine: Engine, observer: Observer) -> dict[str, str]:
    """Compute all `tasks`; returns the causes of failures by key. A need that is none of the tasks is there already.

    What a failed task was needed for fails with it; everything else goes on. Tasks that became possible last go first,
    so that what a training makes possible is done before the next training. Raises StorageError, and what interrupts.
    """
    agenda = _Agenda(tasks)
    attempts = dict.fromkeys((task.key for task in tasks), 0)
    running: dict[Future[None], Task] = {}
    failures: dict[str, str] = {}
    while agenda.ready or running:
        while agenda.ready and len(running) < engine.slots:
            task = agenda.ready.pop()
            attempts[task.key] += 1
            observer.started(task)
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
                observer.ended(settled, failure)
                if failure:
                    failures[settled.key] = failure
    return failures
