"""Sweeps on a Ray cluster of two nodes on this machine, one of which is lost.

Ray's nodes talk over the machine's own address. To keep them to the loopback interface, give them a network namespace:
``unshare -rn sh -c 'ip link set lo up; uv run --extra ray pytest -n 0 -m slow tests/sweep/test_ray.py'``.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from threading import Timer
from typing import Any

import pytest

from mocosfl_priv.sweep.schedule import SilentSweepProgress, run_tasks
from mocosfl_priv.sweep.store import Store
from tests.sweep.toy import KIND, number, task

pytestmark = pytest.mark.slow

HERE = str(Path(__file__).parents[2])


@pytest.fixture
def cluster() -> Iterator[Any]:
    pytest.importorskip("ray", reason="the extra mocosfl-priv[ray] is not installed")
    import mocosfl_priv.sweep.ray_cluster  # noqa: F401 - it says how ray is to be imported

    os.environ["PYTHONPATH"] = HERE  # what all nodes of a cluster have installed; here, the tests
    from ray.cluster_utils import Cluster

    head = {"num_cpus": 1, "include_dashboard": False}
    cluster = Cluster(initialize_head=True, head_node_args=head)
    yield cluster
    cluster.shutdown()


def test_a_sweep_survives_the_loss_of_a_node(cluster: Any, tmp_path: Path) -> None:
    from mocosfl_priv.sweep.ray_cluster import RayEngine

    lost = cluster.add_node(num_cpus=2)
    cluster.wait_for_nodes()
    store = Store(tmp_path / "store")
    trainings = [task(store.folder, f"t{i}", 0.8) for i in range(6)]
    attacks = [task(store.folder, f"t{i}a{j}", 0.3, (f"t{i}",)) for i in range(6) for j in range(3)]
    engine = RayEngine(cluster.address)
    gone_at: list[int] = []  # how many tasks were done when the node was lost

    def lose() -> None:
        gone_at.append(sum(entry["event"] == "done" for entry in store.journal()))
        cluster.remove_node(lost, allow_graceful=False)

    try:
        assert engine.slots == 3
        killer = Timer(2.0, lose)
        killer.start()
        failures = run_tasks([*trainings, *attacks], engine, SilentSweepProgress())
        killer.join()
        assert gone_at[0] < len(trainings) + len(attacks) and engine.slots == 1
    finally:
        engine.close()
    assert failures == {}
    assert all(number(store, f"t{i}a{j}") == 2 for i in range(6) for j in range(3))
    done = [entry["key"] for entry in store.journal() if entry["event"] == "done"]
    assert sorted(done) == sorted(one.key for one in (*trainings, *attacks))


def test_what_a_task_raises_comes_back_without_ray_around_it(cluster: Any, tmp_path: Path) -> None:
    from mocosfl_priv.sweep.ray_cluster import RayEngine

    store = Store(tmp_path / "store")
    engine = RayEngine(cluster.address)
    try:
        tasks = [task(store.folder, "bad", how="fail"), task(store.folder, "good")]
        assert run_tasks(tasks, engine, SilentSweepProgress()) == {"bad": "ValueError: bad was asked to fail"}
    finally:
        engine.close()
    assert store.has(KIND, "good")
