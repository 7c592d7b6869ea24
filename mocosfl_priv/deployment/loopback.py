"""Server and devices on one machine, each a process of its own, over real connections: ends with the cost table."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from mocosfl_priv.data.roles import Role
from mocosfl_priv.deployment.certificates import make_certificates
from mocosfl_priv.deployment.deployment import device_name
from mocosfl_priv.deployment.server import ServeOptions, require_servable, serve
from mocosfl_priv.deployment.shards import write_shards
from mocosfl_priv.errors import ConfigurationError, RunFailedError
from mocosfl_priv.experiment.plan import Plan
from mocosfl_priv.results import RunRecord
from mocosfl_priv.runtime.progress import Progress
from mocosfl_priv.runtime.seeding import derive_seed

CLIENT_MODULE = "mocosfl_priv.device.client"
LEAVE_SECONDS = 15.0  # for client processes to end by themselves after the server has finished


def run_loopback(
    plan: Plan, options: ServeOptions, clients: int, folder: Path, progress: Progress | None = None
) -> RunRecord:
    """Run `plan` with its first `clients` clients as processes on this machine, and all others simulated.

    folder: gets certificates, shards, checkpoints and logs. This process is the server.
    Raises ConfigurationError where the plan cannot be run so, RunFailedError where a client failed.
    """
    if not 1 <= clients <= plan.config.training.clients:
        raise ConfigurationError(
            f"--clients {clients}: the configuration has {plan.config.training.clients} clients, of which at least one "
            "and at most all can be processes"
        )
    options = replace(
        options,
        listen=f"127.0.0.1:{free_port()}",
        certs=folder / "certs" if options.certs is not None else None,
        devices=range(clients),
    )
    require_servable(plan, options)
    folder.mkdir(parents=True, exist_ok=True)
    if options.certs is not None:
        make_certificates(options.certs, clients, [])
    private, training, seed = plan.laboratory.roles[Role.CLIENT_PRIVATE], plan.config.training, plan.systems[0].seed
    shards = write_shards(private, training, seed, folder / "shards")[:clients]
    noise = ["--noise-seed", str(derive_seed(seed, "noise"))]  # all on one machine: a run is to be repeatable
    processes = [
        start_client(options.listen, options.certs, shard, client, folder, noise)
        for client, (shard, _) in enumerate(shards)
    ]
    try:
        record = serve(plan, options, folder / "checkpoints", progress)
        _wait(processes, folder)
    finally:
        for process in processes:
            if process.poll() is None:
                process.kill()
                process.wait()
    return record


def start_client(
    server: str, certs: Path | None, shard: Path, client: int, logs: Path, arguments: Sequence[str] = ()
) -> subprocess.Popen[bytes]:
    """A client as on a device: a process that knows server, certificate and shard, and nothing else."""
    name = device_name(client)
    identity = ["--plain", "--name", name] if certs is None else ["--certs", str(certs / name)]
    command = [sys.executable, "-m", CLIENT_MODULE, "--server", server, "--data", str(shard), *identity, *arguments]
    with (logs / f"{name}.log").open("ab") as log:
        return subprocess.Popen(  # noqa: S603 - our own interpreter and module
            command, stdout=log, stderr=log, stdin=subprocess.DEVNULL, env={**os.environ, "OMP_NUM_THREADS": "1"}
        )


def _wait(processes: Sequence[subprocess.Popen[bytes]], folder: Path) -> None:
    until = time.monotonic() + LEAVE_SECONDS
    for client, process in enumerate(processes):
        try:
            code = process.wait(max(0.0, until - time.monotonic()))
        except subprocess.TimeoutExpired as error:
            raise RunFailedError(f"{device_name(client)} did not leave after the end; see {folder}") from error
        if code != 0:
            log = folder / f"{device_name(client)}.log"
            raise RunFailedError(f"{device_name(client)} ended with exit code {code}; see {log}")


def free_port() -> int:
    """A TCP port of this machine that nobody listens on just now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port
