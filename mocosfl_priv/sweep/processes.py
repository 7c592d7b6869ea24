"""The local engine: worker processes on this machine that run one task at a time each, on a GPU if there is one."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from concurrent.futures import Future
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from multiprocessing import connection, get_context, parent_process
from typing import TYPE_CHECKING

from pebble import ProcessExpired, ProcessPool

from mocosfl_priv.sweep.schedule import Task

if TYPE_CHECKING:
    from mocosfl_priv.config import ComputeConfig


class LocalEngine:
    """A pool of worker processes. A process that dies is replaced; all of them end when their parent does.

    Args:
        workers: Number of processes.
        gpus: Number of GPUs to distribute among the tasks; 0 for none.

    """

    def __init__(self, workers: int, gpus: int = 0) -> None:
        self.slots = workers
        self._free = [index % gpus for index in range(workers)] if gpus else []
        self._pool = self._new_pool()

    def submit(self, task: Task) -> Future[None]:
        """See :class:`mocosfl_priv.sweep.schedule.Engine`."""
        gpu = self._free.pop() if self._free else None
        outcome: Future[None] = Future()

        def settle(finished: Future[None]) -> None:
            if gpu is not None:
                self._free.append(gpu)  # before the outcome is set, because the caller then submits the next task
            if finished.cancelled():
                outcome.cancel()
            elif (error := finished.exception()) is not None:
                outcome.set_exception(error)
            else:
                outcome.set_result(None)

        if not self._pool.active:  # the pool breaks when an idle process dies
            self.close()
            self._pool = self._new_pool()
        with _interruptions_blocked():  # workers inherit this: Ctrl-C must reach the parent only
            self._pool.schedule(_run, args=(task, gpu)).add_done_callback(settle)
        return outcome

    def died(self, error: BaseException) -> bool:
        """See :class:`mocosfl_priv.sweep.schedule.Engine`."""
        return isinstance(error, ProcessExpired | BrokenProcessPool)

    def close(self) -> None:
        """See :class:`mocosfl_priv.sweep.schedule.Engine`."""
        self._pool.stop()  # type: ignore[no-untyped-call]
        self._pool.join()

    def _new_pool(self) -> ProcessPool:
        return ProcessPool(max_workers=self.slots, initializer=_end_with_parent, context=get_context("spawn"))


@contextmanager
def _interruptions_blocked() -> Iterator[None]:
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def local_engine(config: ComputeConfig, workers: int | None = None) -> LocalEngine:
    """Return an engine of `workers` processes; by default one per GPU, or else as many as the CPU cores allow."""
    from mocosfl_priv.runtime.compute import (  # imports torch, which this module can do without
        Compute,
        usable_cores,
    )

    if Compute.resolve(config).device.type == "cuda":
        import torch

        gpus = torch.cuda.device_count()
        return LocalEngine(workers or gpus, gpus)
    return LocalEngine(workers or max(1, usable_cores() // (config.threads or 1)))


def _run(task: Task, gpu: int | None) -> None:
    if gpu is not None:
        import torch  # takes seconds, so only processes that use a GPU import it here

        torch.cuda.set_device(gpu)
    task.run()


def _end_with_parent() -> None:
    """End this process when its parent does: a parent that is killed cannot end its children."""
    parent = parent_process()
    assert parent is not None
    sentinel = parent.sentinel

    def watch() -> None:
        connection.wait([sentinel])
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
