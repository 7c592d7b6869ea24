"""The engine for several machines: runs tasks on a Ray cluster, with a store on a file system that all nodes share.

Optional: ``pip install mocosfl-priv[ray]``.
"""

from __future__ import annotations

import os
from concurrent.futures import Future

from mocosfl_priv.errors import ConfigurationError
from mocosfl_priv.sweep.schedule import Task

# Ray reads both when it is imported. The first turns off usage reports. The second makes nodes use the packages that
# are installed on them; otherwise Ray builds a new environment for each process if `uv run` started the driver.
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
os.environ.setdefault("RAY_ENABLE_UV_RUN_RUNTIME_ENV", "0")

try:
    import ray
    from ray.exceptions import (
        LocalRayletDiedError,
        NodeDiedError,
        ObjectLostError,
        OutOfMemoryError,
        RayTaskError,
        WorkerCrashedError,
    )
except ImportError as missing:
    raise ConfigurationError("--engine ray needs Ray: install mocosfl-priv[ray]") from missing

LOST = (WorkerCrashedError, NodeDiedError, LocalRayletDiedError, ObjectLostError, OutOfMemoryError)


class RayEngine:
    """Runs tasks on any node of a Ray cluster that has room.

    Args:
        address: Address of a running cluster; by default RAY_ADDRESS, or else a new cluster of this machine alone.
        cpus: CPUs per task.
        gpus: GPUs per task.

    Raises:
        ConfigurationError: There is no such cluster.

    """

    def __init__(self, address: str | None = None, cpus: float = 1, gpus: float = 0) -> None:
        address = address or os.environ.get("RAY_ADDRESS")
        try:
            if address:
                ray.init(address=address, log_to_driver=False)
            else:
                ray.init(include_dashboard=False, log_to_driver=False, _node_ip_address="127.0.0.1")
        except (ConnectionError, RuntimeError, ValueError) as error:
            raise ConfigurationError(f"no Ray cluster at {address or 'this machine'}: {error}") from error
        self._per_task = {"GPU": gpus} if gpus else {"CPU": cpus}
        self._run = ray.remote(num_cpus=cpus, num_gpus=gpus, max_retries=0)(_run)

    @property
    def slots(self) -> int:
        """The number of tasks that the cluster can run at once now; it changes when nodes join or leave."""
        there = ray.cluster_resources()
        return max(1, min(int(there.get(kind, 0) / amount) for kind, amount in self._per_task.items()))

    def submit(self, task: Task) -> Future[None]:
        """See :class:`mocosfl_priv.sweep.schedule.Engine`."""
        outcome: Future[None] = Future()

        def settle(finished: Future[None]) -> None:
            error = finished.exception()
            if error is None:
                outcome.set_result(None)
            else:  # Ray wraps what a task raised, together with its traceback
                outcome.set_exception(error.cause if isinstance(error, RayTaskError) else error)

        self._run.remote(task).future().add_done_callback(settle)
        return outcome

    def died(self, error: BaseException) -> bool:
        """See :class:`mocosfl_priv.sweep.schedule.Engine`."""
        return isinstance(error, LOST)

    def close(self) -> None:
        """See :class:`mocosfl_priv.sweep.schedule.Engine`."""
        ray.shutdown()


def _run(task: Task) -> None:
    task.run()
