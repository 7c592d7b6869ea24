"""Run an experiment with devices as clients; plan, engine, attacks and report are those of any run."""

from __future__ import annotations

import hashlib
import logging
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from mocosfl_priv.data.roles import Role
from mocosfl_priv.deployment.certificates import require_usable
from mocosfl_priv.deployment.cost import ClientFigures, cost_lines, device_record
from mocosfl_priv.deployment.deployment import Deployment, require_runs_on_devices
from mocosfl_priv.deployment.reception import Reception
from mocosfl_priv.deployment.remote_clients import Patience
from mocosfl_priv.device.address import HeldPort, parse
from mocosfl_priv.device.errors import DeviceError
from mocosfl_priv.device.grpc_transport import Certificates, GrpcServer, require_loopback
from mocosfl_priv.errors import ConfigurationError
from mocosfl_priv.experiment.plan import Plan
from mocosfl_priv.experiment.run import run_plan
from mocosfl_priv.results import RunRecord
from mocosfl_priv.runtime.progress import Progress

LOG = logging.getLogger("mocosfl-priv-server")


@dataclass(frozen=True)
class ServeOptions:
    """How the server communicates with its devices.

    listen: HOST:PORT.
    certs: folder with ca.pem, server.pem and server.key; None for plain text on a loopback address.
    devices: indices of the clients that are devices, all others are simulated; None for all.
    patience: how long the server waits for devices.
    heartbeat_seconds: interval of the devices' heartbeats.
    least: devices that must be connected before the first step; all by default.
    """

    listen: str
    certs: Path | None
    devices: Sequence[int] | None = None
    patience: Patience = field(default_factory=Patience)
    heartbeat_seconds: float = 5.0
    least: int | None = None


def serve(plan: Plan, options: ServeOptions, resume_dir: Path, progress: Progress | None = None) -> RunRecord:
    """Run the one system of `plan` with devices as clients; the record's `info` has ``devices`` and ``device_costs``.

    resume_dir: folder for the checkpoints of the training; a server that is started again resumes from it.
    Raises ConfigurationError if the plan cannot be run with devices.
    """
    require_servable(plan, options)
    (system,) = plan.systems
    training = plan.config.training
    remote = tuple(range(training.clients) if options.devices is None else options.devices)
    try:
        address = parse(options.listen, "--listen", listening=True)
        certificates = None if options.certs is None else Certificates.read(options.certs, "server")
        if options.certs is None:
            require_loopback(options.listen)
        else:
            require_usable(options.certs)
        held = HeldPort(address, "--listen")  # training before devices connect (an expert) may take hours
    except DeviceError as error:
        raise ConfigurationError(str(error)) from error

    def open_transport(reception: Reception) -> GrpcServer:
        held.release()
        server = GrpcServer(
            options.listen, certificates, reception.attend, most=len(remote), largest_frame=reception.largest_frame
        )
        LOG.info("listening on %s, %s", options.listen, "mutual TLS" if certificates else "plain text")
        return server

    deployment = Deployment(
        run=hashlib.sha256(f"{plan.config.digest}/{system.title}".encode()).hexdigest()[:16],
        seed=system.seed,
        remote=remote,
        open_transport=open_transport,
        patience=options.patience,
        heartbeat_seconds=options.heartbeat_seconds,
        least=options.least,
        trusting=certificates is None,
    )
    try:
        record = run_plan(plan, progress, resume_dir, deployment)
    except DeviceError as error:
        raise ConfigurationError(str(error)) from error
    finally:
        held.release()
        deployment.close()
    assert deployment.reception is not None and deployment.participants is not None and deployment.model is not None
    frozen = not deployment.participants.trainable
    figures = ClientFigures.of(
        deployment.model,
        rows_per_image=deployment.participants.rows_per_image,
        frozen=frozen,
        images=round(len(plan.context.roles[Role.CLIENT_PRIVATE]) / training.clients),
        epochs=training.epochs,
    )
    terms = {
        "run": deployment.run,
        "activations": training.codec,
        "gradients": training.gradient_codec,
        "deadline_seconds": options.patience.answers,
        "tls": certificates is not None,
        "devices": len(remote),
        "simulated": training.clients - len(remote),
    }
    record.info["devices"] = device_record(deployment.reception.accounts, deployment.participants.drawn, figures, terms)
    record.info["device_costs"] = cost_lines(record.info["devices"])
    return record


def require_servable(plan: Plan, options: ServeOptions) -> None:
    """Raise ConfigurationError unless `plan` is one honest training of a system that devices can take part in."""
    if len(plan.systems) != 1:
        raise ConfigurationError(
            f"serve: devices train one system, and this configuration has {len(plan.systems)}: reduce it to one seed, "
            "one cut layer, one defense and one target fraction"
        )
    if len(plan.trainings) != 1:
        raise ConfigurationError(
            "serve: an attack that changes the gradients needs a separate training, which serve does not run; remove it"
        )
    (system,) = plan.systems
    require_runs_on_devices(system.defense.plugin, system.defense.label)
    clients = plan.config.training.clients
    if options.devices is not None and not options.devices:
        raise ConfigurationError("serve: no client is a device; use `mocosfl-priv run` to simulate all of them")
    for client in options.devices or ():
        if not 0 <= client < clients:
            raise ConfigurationError(f"serve: there is no client {client}; the {clients} clients are counted from 0")
    if options.least is not None and options.least < 1:
        raise ConfigurationError("serve: at least one device must be waited for")
    devices = clients if options.devices is None else len(set(options.devices))
    if options.least is not None and options.least > devices:
        raise ConfigurationError(f"serve: --least {options.least} waits for more devices than there are: {devices}")
    if plan.config.training.replay is not None:
        raise ConfigurationError("serve: training.replay works with simulated clients only")


def checkpoints_beside(out: Path) -> Path:
    """Return the default folder for the state of a served run, beside its results in `out`."""
    return out.with_name(out.name + os.extsep + "checkpoints")
