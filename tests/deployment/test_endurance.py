"""Many real devices under kills and a bad network: minutes. ``uv run pytest -m slow -n 0 tests/deployment``."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import yaml

from mocosfl_priv.api import Experiment
from mocosfl_priv.compute import Compute
from mocosfl_priv.data.roles import Role
from mocosfl_priv.deployment.certificates import make_certificates
from mocosfl_priv.deployment.deployment import device_name
from mocosfl_priv.deployment.loopback import free_port, start_client
from mocosfl_priv.deployment.reception import Reception
from mocosfl_priv.deployment.remote_clients import Patience
from mocosfl_priv.deployment.shards import write_shards
from mocosfl_priv.device.grpc_transport import Certificates, GrpcServer, connect
from mocosfl_priv.device.transport import Conversation
from tests.deployment.devices import Threads, deployment, engine, shard_views, training_of
from tests.deployment.proxy import Proxy

CLIENTS = 20
CONFIG = {
    "name": "endurance",
    "defenses": [{"name": "bottleneck", "layer": "C4S2"}],
    "attacks": ["floor"],
    "data": {"train_limit": 700, "test_limit": 200, "victims": 16, "image_size": 32},
    "model": {"backbone": "resnet8", "width": 8, "projector_hidden": 32, "projector_out": 32},
    "training": {
        "clients": CLIENTS,
        "server_batch": 40,
        "epochs": 8,
        "learning_rate": 0.02,
        "queue_size": 256,
        "sync_period": 5,
        "monitor_every": 1,
    },
    "evaluation": {"recognition_epochs": 0, "label_fractions": [], "linear_probe_penalties": [0.1]},
    "compute": {"device": "cpu", "precision": "float32"},
}


def run_once(folder: Path, config: Path, disturbed: bool) -> tuple[pd.DataFrame, dict]:  # type: ignore[type-arg]
    """A served run with real processes; its training history, and what it recorded of its devices."""
    folder.mkdir()
    make_certificates(folder / "certs", CLIENTS, [])
    plan = Experiment.from_yaml(config).plan()
    private = plan.laboratory.roles[Role.CLIENT_PRIVATE]
    shards = [path for path, _ in write_shards(private, plan.config.training, 0, folder / "shards")]
    port = free_port()
    proxy = Proxy(port, delay=0.02 if disturbed else 0.0, loss=0.0005 if disturbed else 0.0)

    def launch(client: int) -> subprocess.Popen[bytes]:
        return start_client(f"127.0.0.1:{proxy.port}", folder / "certs", shards[client], client, folder)

    def serve() -> subprocess.Popen[bytes]:
        command = [sys.executable, "-m", "mocosfl_priv.cli", "serve", str(config), "--out", str(folder / "run")]
        options = ["--listen", f"127.0.0.1:{port}", "--certs", str(folder / "certs"), "--heartbeat", "1"]
        patience = ["--deadline", "2" if disturbed else "60", "--least", str(CLIENTS // 2 if disturbed else CLIENTS)]
        with (folder / "server.log").open("ab") as log:
            return subprocess.Popen([*command, *options, *patience], stdout=log, stderr=log)

    server, clients = serve(), [launch(client) for client in range(CLIENTS)]
    rng, restarted = random.Random(0), 0
    state = folder / "run.checkpoints"
    deadline = time.monotonic() + 560
    try:
        while server.poll() is None:
            assert time.monotonic() < deadline, "the run does not end"
            time.sleep(0.5)
            steps = sorted(state.rglob("step_*"))
            if disturbed and steps and rng.random() < 0.1:
                victim = rng.randrange(CLIENTS)
                clients[victim].kill()
                clients[victim].wait()
                clients[victim] = launch(victim)
            if disturbed and len(steps) == 2 and not restarted:
                server.kill()
                server.wait()
                restarted += 1
                server = serve()
        assert server.wait() == 0, (folder / "server.log").read_text()[-2000:]
        time.sleep(5)  # those that were there have left by now; one that was launched since finds nobody
    finally:
        for process in (server, *clients):
            if process.poll() is None:
                os.kill(process.pid, signal.SIGKILL)
                process.wait()
        proxy.close()
    if disturbed:
        assert restarted == 1
    devices = json.loads((folder / "run" / "run.json").read_text())["devices"]
    devices["proxy"] = {"connections": proxy.connections, "lost": proxy.lost}
    return pd.read_csv(folder / "run" / "training.csv"), devices


@pytest.mark.slow
def test_twenty_processes_under_kills_and_losses_train_as_well_as_undisturbed(tmp_path: Path) -> None:
    config = tmp_path / "endurance.yaml"
    config.write_text(yaml.safe_dump(CONFIG))
    quiet, _ = run_once(tmp_path / "quiet", config, disturbed=False)
    rough, devices = run_once(tmp_path / "rough", config, disturbed=True)
    print(quiet, rough, devices["proxy"], [client["steps_missed"] for client in devices["clients"]])
    assert list(rough["step"]) == list(quiet["step"])  # every step was done, once
    assert sum(client["conversations"] for client in devices["clients"]) > CLIENTS
    assert np.isfinite(rough["loss"]).all()
    assert rough["loss"].iloc[-1] == pytest.approx(quiet["loss"].iloc[-1], rel=0.05)
    assert rough["validation_knn"].iloc[-1] > quiet["validation_knn"].iloc[-1] - 0.1


class Many(Threads):
    """Devices in threads of this process, each with a connection and certificate of its own."""

    folder: Path

    def start(self) -> None:
        own = Certificates.read(self.folder, "server")
        self.server = GrpcServer(
            "127.0.0.1:0", own, self._reception.attend, most=200, largest_frame=self._reception.largest_frame
        )
        self.server.start()
        super().start()

    def connect(self, client: int) -> Conversation:
        own = Certificates.read(self.folder / device_name(client), "device")
        return connect(f"127.0.0.1:{self.server.port}", own)

    def stop(self) -> None:
        super().stop()
        self.server.stop()


@pytest.mark.slow
def test_two_hundred_devices_for_a_hundred_steps(tmp_path: Path, compute: Compute) -> None:
    make_certificates(tmp_path, 200, [])
    transport = type("ManyHere", (Many,), {"folder": tmp_path})
    remote = deployment(
        range(200), shard_views(200), transport=transport, patience=Patience(60, 300), heartbeat_seconds=30.0
    )
    training = training_of(clients=200, pool=200, micro_batch=1, server_batch=200, sync_period=20)
    run = engine(training, compute, remote)
    run.steps = 100
    began = time.monotonic()
    for _ in range(100):
        assert np.isfinite(float(run.step()))
        assert len(run._pool) == 200
    print(f"{(time.monotonic() - began) / 100:.3f} s per step, {threading.active_count()} threads")
    run.participants.finish()
    remote.close()
    reception: Reception | None = remote.reception
    assert reception is not None
    assert [account.steps_missed for account in reception.accounts.values()] == [0] * 200
    assert [account.conversations for account in reception.accounts.values()] == [1] * 200
    assert all(not account.refusals for account in reception.accounts.values())
