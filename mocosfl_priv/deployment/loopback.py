"""Run a server and devices as separate processes on one machine, over real network connections."""

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
LEAVE_SECONDS = 15.0  # time for client processes to end by themselves after the server has finished


def run_loopback(
    plan: Plan, options: ServeOptions, clients: int, folder: Path, progress: Progress | None = None
) -> RunRecord:
    """Run `plan` with its first `clients` clients as processes on this machine, and all others simulated.

    This process is the server.

    Args:
        plan: The experiment.
        options: The server's options; its address, certificates and devices are replaced.
        clients: Number of clients that run as processes.
        folder: Where certificates, shards, checkpoints and logs are written.
        progress: Display of progress.

    Raises:
        ConfigurationError: The plan cannot be run with devices.
        RunFailedError: A client process failed.

    """
    if not 1 <= clients <= plan.config.training.clients:
        raise ConfigurationError(
            f"--clients {clients}: the configuration has {plan.config.training.clients} clients; choose a number from "
            f"1 to {plan.config.training.clients}"
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
    private, training, seed = plan.context.roles[Role.CLIENT_PRIVATE], plan.config.training, plan.systems[0].seed
    shards = write_shards(private, training, seed, folder / "shards")[:clients]
    noise = ["--noise-seed", str(derive_seed(seed, "noise"))]  # makes the run repeatable
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
    """Start a client process as on a device: it is given the server's address, a certificate and a shard only.

    The output goes to a log file in `logs`, named after the client. `certs` is None for plain text.
    """
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
            raise RunFailedError(
                f"{device_name(client)} did not exit after the end of the run; see {folder}"
            ) from error
        if code != 0:
            log = folder / f"{device_name(client)}.log"
            raise RunFailedError(f"{device_name(client)} ended with exit code {code}; see {log}")


def free_port() -> int:
    """Return a TCP port on loopback that is free at the moment."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port
