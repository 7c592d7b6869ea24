"""Set up a training with devices as clients: export their program, and open the server that they connect to."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from typing import Protocol

from mocosfl_priv.deployment.export import client_settings, export_client
from mocosfl_priv.deployment.reception import Reception, Terms
from mocosfl_priv.deployment.remote_clients import Patience, RemoteClients
from mocosfl_priv.errors import ConfigurationError
from mocosfl_priv.models.split import SplitModel
from mocosfl_priv.plugins import Defense, overrides
from mocosfl_priv.runtime.seeding import derive_seed
from mocosfl_priv.training.message_count import rows_per_image
from mocosfl_priv.training.participants import Simulated
from mocosfl_priv.training.sampling import PoolShape

ON_RETURN = (
    "replace_keys",
    "filter_gradient",
)  # hooks on what the server sends back; a defense that uses them keeps state over all clients
ON_WAY_OUT = ("protect", "client_loss", "joint_loss")  # hooks that become part of a device's program


class Transport(Protocol):
    """Accepts connections of devices and hands them to a :class:`Reception`."""

    def start(self) -> None:
        """Start to accept devices."""

    def stop(self) -> None:
        """Accept no more devices, and let open connections end."""


@dataclass
class Deployment:
    """The configuration of clients on devices. The training engine calls it to get the participants of a training.

    run: name of the run, the same after a restart.
    seed: seed of the training.
    remote: indices of the clients that are devices.
    open_transport: makes the transport that hands devices to a reception.
    patience: how long the server waits for devices.
    heartbeat_seconds: interval of the devices' heartbeats.
    least: devices that must be connected before the first step; all by default.
    trusting: whether to believe the names that devices give without certificates.
    """

    run: str
    seed: int
    remote: Collection[int]
    open_transport: Callable[[Reception], Transport]
    patience: Patience = field(default_factory=Patience)
    heartbeat_seconds: float = 5.0
    least: int | None = None
    trusting: bool = False
    reception: Reception | None = field(default=None, init=False)
    participants: RemoteClients | None = field(default=None, init=False)
    model: SplitModel | None = field(default=None, init=False)
    _transport: Transport | None = field(default=None, init=False)

    def __call__(self, model: SplitModel, simulated: Simulated) -> RemoteClients:
        """Export the client program, start to accept devices, and return the participants."""
        training = simulated.training
        trainable = simulated.clients.trainable
        terms = Terms(
            self.run,
            export_client(model.client, model.image_shape, client_settings(training, trainable), simulated.hooks),
            derive_seed(self.seed, "devices"),
            training.codec,
            training.gradient_codec,
            training.partial_batches == "drop",
            self.heartbeat_seconds,
        )
        shape = PoolShape.of(training)
        rows = rows_per_image(training, not trainable) * max(shape.size_of(client) for client in self.remote)
        names = {device_name(client): client for client in self.remote}
        self.reception = Reception(terms, names, rows, trusting=self.trusting)
        self._transport = self.open_transport(self.reception)
        self._transport.start()
        self.model = model
        least = len(names) if self.least is None else self.least
        self.participants = RemoteClients(simulated, self.reception, self.remote, least, self.patience)
        return self.participants

    def close(self) -> None:
        """End all connections. A device that was not told that the training is over will try to reconnect."""
        if self._transport is not None:
            self._transport.stop()


def device_name(client: int) -> str:
    """Return the name of a client's device, which its certificate holds too, such as client-0003."""
    return f"client-{client:04d}"


def require_runs_on_devices(defense: Defense, label: str) -> None:
    """Raise ConfigurationError with the reason if `defense` cannot become part of a device's program.

    It can if it only draws random numbers and computes for one message. It cannot if it learns from the messages of all
    clients, or adds a loss that is computed from all of them, since a device has only its own. :func:`export_client`
    checks that it treats each image independently.
    """
    for part in [part.plugin for part in defense.parts] or [defense]:
        name = label if part is defense else f"{label} ({type(part).__name__})"
        if found := [hook for hook in ON_RETURN if overrides(part, hook)]:
            raise ConfigurationError(
                f"defense {name!r} does not run on devices: it handles what the server sends back "
                f"({', '.join(found)}), with state that all clients share"
            )
        if overrides(part, "joint_loss") or (
            overrides(part, "state") and any(overrides(part, hook) for hook in ON_WAY_OUT)
        ):
            found = [hook for hook in ON_WAY_OUT if overrides(part, hook)]
            raise ConfigurationError(
                f"defense {name!r} does not run on devices: what it does at a client ({', '.join(found)}) is learned "
                "from the messages of all clients, but a device has only its own"
            )
