"""Many real devices under kills and a bad network: minutes. ``uv run pytest -m slow -n 0 tests/deployment``."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import yaml
from scipy import stats

from mocosfl_priv.api import Experiment
from mocosfl_priv.data.roles import Role
from mocosfl_priv.deployment.certificates import make_certificates
from mocosfl_priv.deployment.deployment import Deployment
from mocosfl_priv.deployment.loopback import free_port, start_client
from mocosfl_priv.deployment.reception import Reception
from mocosfl_priv.deployment.remote_clients import Patience
from mocosfl_priv.deployment.shards import shard_name, write_shards
from mocosfl_priv.device.grpc_transport import Certificates, GrpcServer
from mocosfl_priv.experiment.train import train_system
from mocosfl_priv.runtime.compute import Compute
from tests.deployment.devices import engine, shard_of, training_of
from tests.deployment.proxy import Proxy

CLIENTS = 20
KILLS_PER_EPOCH = 3
RESTART_AFTER = 6  # epochs: late, so that what is lost then cannot be learned again
SPREAD_SEEDS = (1, 2, 3)
CONFIDENCE = 0.95
MANY, PROCESSES, MANY_STEPS = 200, 20, 100
ONE_THREAD = {**os.environ, "OMP_NUM_THREADS": "1"}
CONFIG = {
    "name": "endurance",
    "defenses": [{"name": "bottleneck", "layer": "noReLUC8S1"}],
    "attacks": ["floor"],
    "cut_layers": [2],
    "data": {"train_limit": 700, "test_limit": 300, "victims": 16, "image_size": 32},
    "model": {"backbone": "resnet8", "width": 8, "projector_hidden": 32, "projector_out": 32},
    "training": {
        "clients": CLIENTS,
        "server_batch": 40,
        "epochs": 8,
        "learning_rate": 0.02,
        "temperature": 0.5,
        "ema": 0.99,
        "queue_size": 256,
        "sync_period": 5,
        "monitor_every": 1,
    },
    "evaluation": {
        "knn_neighbours": 20, "recognition_epochs": 0, "label_fractions": [], "linear_probe_penalties": [0.1],
    },
    "compute": {"device": "cpu", "precision": "float32", "threads": 1},
}  # fmt: skip


@dataclass(frozen=True)
class Outcome:
    """Of a served run with real processes. history: its training.csv. devices: what it recorded of them."""

    history: pd.DataFrame
    devices: dict[str, Any]
    killed: int
    lost_connections: int


class Run:
    """A server process, and a process for each client that reaches it through a proxy."""

    def __init__(self, folder: Path, config: Path, server_module: str, disturbed: bool) -> None:
        folder.mkdir()
        make_certificates(folder / "certs", CLIENTS, [])
        plan = Experiment.from_yaml(config).plan()
        private = plan.context.roles[Role.CLIENT_PRIVATE]
        self._shards = [path for path, _ in write_shards(private, plan.config.training, 0, folder / "shards")]
        self._images, self._batch = len(private), plan.config.training.server_batch
        self._folder, self._config, self._module = folder, config, server_module
        self._port = free_port()
        self._patience = ["--deadline", "5", "--least", str(CLIENTS)] if disturbed else ["--deadline", "60"]
        self._heartbeat = "1" if disturbed else "15"
        self.proxy = Proxy(self._port, delay=0.02 if disturbed else 0.0, loss=0.002 if disturbed else 0.0)
        self.server = self.serve()
        self.clients = [self.launch(client) for client in range(CLIENTS)]

    def serve(self) -> subprocess.Popen[bytes]:
        command = [sys.executable, "-m", self._module, "serve", str(self._config), "--out", str(self._folder / "run")]
        address = ["--listen", f"127.0.0.1:{self._port}", "--certs", str(self._folder / "certs")]
        with (self._folder / "server.log").open("ab") as log:
            return subprocess.Popen(
                [*command, *address, "--heartbeat", self._heartbeat, *self._patience], stdout=log, stderr=log
            )

    def launch(self, client: int) -> subprocess.Popen[bytes]:
        address = f"127.0.0.1:{self.proxy.port}"
        return start_client(address, self._folder / "certs", self._shards[client], client, self._folder)

    def epochs_done(self) -> int:
        """By the checkpoints, of which there is one after each."""
        steps = [int(path.name.split("_")[1]) for path in (self._folder / "run.checkpoints").rglob("step_*")]
        return max(steps, default=0) * self._batch // self._images

    def kill(self, client: int) -> None:
        self.clients[client].kill()
        self.clients[client].wait()
        self.clients[client] = self.launch(client)

    def restart_server(self) -> None:
        self.server.kill()
        self.server.wait()
        self.server = self.serve()

    def end(self) -> None:
        for process in (self.server, *self.clients):
            if process.poll() is None:
                os.kill(process.pid, signal.SIGKILL)
                process.wait()
        self.proxy.close()


def run_once(folder: Path, config: Path, *, disturbed: bool, server_module: str = "mocosfl_priv.cli") -> Outcome:
    """disturbed: a proxy that delays and loses connections; clients killed, in every epoch some; the server, once."""
    run = Run(folder, config, server_module, disturbed)
    rng, killed, restarted = random.Random(0), 0, False
    until = time.monotonic() + 900
    try:
        while run.server.poll() is None:
            assert time.monotonic() < until, "the run does not end"
            time.sleep(0.3 + 0.4 * rng.random())
            if not disturbed or run.epochs_done() == 0:
                continue
            if killed < KILLS_PER_EPOCH * run.epochs_done():
                run.kill(rng.randrange(CLIENTS))
                killed += 1
            if run.epochs_done() >= RESTART_AFTER and not restarted:
                run.restart_server()
                restarted = True
        assert run.server.wait() == 0, (folder / "server.log").read_text()[-2000:]
    finally:
        run.end()
    assert restarted == disturbed
    devices = json.loads((folder / "run" / "run.json").read_text())["devices"]
    return Outcome(pd.read_csv(folder / "run" / "training.csv"), devices, killed, run.proxy.lost)


def simulated(config: Path) -> list[pd.DataFrame]:
    """Training histories of the same configuration with other seeds, undisturbed."""
    plan = Experiment.from_yaml(config, {"seeds": list(SPREAD_SEEDS)}).plan()
    return [pd.DataFrame(train_system(plan.context, system).trained.history) for system in plan.systems]


@dataclass(frozen=True)
class Undisturbed:
    """Where undisturbed trainings of several seeds ended.

    history: of the one with processes, whose seed disturbed runs have too.
    """

    history: pd.DataFrame
    losses: list[float]
    accuracies: list[float]

    def bears(self, history: pd.DataFrame) -> bool:
        """Whether this training ended no worse than one more undisturbed one might, in loss and kNN accuracy."""
        loss, accuracy = (history[column].iloc[-1] for column in ("loss", "validation_knn"))
        print(f"loss {loss:.3f}, at most {self.most_loss:.3f}; kNN {accuracy:.3f}, at least {self.least_accuracy:.3f}")
        return bool(loss <= self.most_loss and accuracy >= self.least_accuracy)

    @property
    def most_loss(self) -> float:
        return float(np.mean(self.losses)) + _reach(self.losses)

    @property
    def least_accuracy(self) -> float:
        return float(np.mean(self.accuracies)) - _reach(self.accuracies)


def _reach(values: Sequence[float]) -> float:
    """How far on one side of their mean one more of them may lie: the prediction bound of Student's distribution."""
    n = len(values)
    return float(stats.t.ppf(CONFIDENCE, n - 1)) * float(np.std(values, ddof=1)) * (1 + 1 / n) ** 0.5


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("endurance") / "endurance.yaml"
    path.write_text(yaml.safe_dump(CONFIG))
    return path


@pytest.fixture(scope="module")
def undisturbed(config: Path) -> Undisturbed:
    """A run with processes that nobody disturbs, and simulated ones."""
    quiet = run_once(config.parent / "quiet", config, disturbed=False).history
    histories = [quiet, *simulated(config)]
    losses, accuracies = ([float(h[column].iloc[-1]) for h in histories] for column in ("loss", "validation_knn"))
    print("undisturbed:", losses, accuracies)
    found = Undisturbed(quiet, losses, accuracies)
    assert found.most_loss < quiet["loss"].max(), "without learning quality says nothing"
    return found


@pytest.mark.slow
def test_twenty_processes_under_kills_and_losses_train_as_well_as_undisturbed(
    config: Path, undisturbed: Undisturbed
) -> None:
    rough = run_once(config.parent / "rough", config, disturbed=True)
    clients = rough.devices["clients"]
    print(f"disturbed: {rough.killed} kills, {rough.lost_connections} connections lost; steps missed:")
    print([client["steps_missed"] for client in clients])
    assert rough.killed >= CLIENTS and rough.lost_connections > 0
    assert list(rough.history["step"]) == list(undisturbed.history["step"])  # every step was done, once
    assert sum(client["conversations"] for client in clients) > CLIENTS
    assert undisturbed.bears(rough.history)


@pytest.mark.slow
def test_a_recovery_that_forgets_what_was_learned_is_noticed(config: Path, undisturbed: Undisturbed) -> None:
    """Else the test above could not fail."""
    module = "tests.deployment.careless_server"
    careless = run_once(config.parent / "careless", config, disturbed=True, server_module=module)
    assert not undisturbed.bears(careless.history)


class ManyProcesses:
    """Devices in processes of which each has several; every device has a connection and certificate of its own."""

    def __init__(self, reception: Reception, folder: Path, devices: int, processes: int) -> None:
        self._reception, self._folder = reception, folder
        self._devices, self._share = devices, devices // processes
        self.processes: list[subprocess.Popen[bytes]] = []

    def start(self) -> None:
        own = Certificates.read(self._folder, "server")
        self.server = GrpcServer(
            "127.0.0.1:0", own, self._reception.attend, most=self._devices, largest_frame=self._reception.largest_frame
        )
        self.server.start()
        command = [sys.executable, "-m", "tests.deployment.several_devices", f"127.0.0.1:{self.server.port}"]
        for client in range(self._devices):
            shard_of(client, self._devices).write(self._folder / shard_name(client))
        for first in range(0, self._devices, self._share):
            numbers = [str(first), str(self._share)]
            with (self._folder / f"{first}.log").open("wb") as log:
                self.processes.append(
                    subprocess.Popen([*command, str(self._folder), *numbers], stdout=log, stderr=log, env=ONE_THREAD)
                )

    def stop(self) -> None:
        try:
            assert [process.wait(60) for process in self.processes] == [0] * len(self.processes)
        finally:
            self.server.stop()
            for process in self.processes:
                process.kill()
                process.wait()


@pytest.mark.slow
def test_two_hundred_devices_for_a_hundred_steps(tmp_path: Path, compute: Compute) -> None:
    """Ten in each of twenty processes."""
    make_certificates(tmp_path, MANY, [])
    remote = Deployment(
        "test", 0, range(MANY), lambda reception: ManyProcesses(reception, tmp_path, MANY, PROCESSES),
        patience=Patience(60, 300), heartbeat_seconds=30.0,
    )  # fmt: skip
    training = training_of(clients=MANY, pool=MANY, micro_batch=1, server_batch=MANY, sync_period=20)
    run = engine(training, compute, remote)
    run.steps = MANY_STEPS
    began = time.monotonic()
    try:
        for _ in range(MANY_STEPS):
            assert np.isfinite(float(run.step()))
            assert len(run._pool) == MANY
        seconds = (time.monotonic() - began) / MANY_STEPS
        assert isinstance(remote._transport, ManyProcesses)
        resident = sum(own_memory(process.pid) for process in remote._transport.processes)
        print(f"{seconds:.3f} s per step; memory of all client processes: {resident / 2**20:.0f} MiB")
    finally:
        run.participants.finish()
        remote.close()
    reception: Reception | None = remote.reception
    assert reception is not None
    assert [account.steps_missed for account in reception.accounts.values()] == [0] * MANY
    assert [account.conversations for account in reception.accounts.values()] == [1] * MANY
    assert all(not account.refusals for account in reception.accounts.values())


def own_memory(pid: int) -> int:
    """Bytes: what a process shares with others is shared out among them."""
    rollup = Path(f"/proc/{pid}/smaps_rollup").read_text()
    return 1024 * int(next(line.split()[1] for line in rollup.splitlines() if line.startswith("Pss:")))
