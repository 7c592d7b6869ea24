"""The devices of one training: their program, where they are received, and the transport that leads there."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from typing import Protocol

from mocosfl_priv.deployment.export import client_settings, export_client
from mocosfl_priv.deployment.reception import Reception, Terms
from mocosfl_priv.deployment.remote_clients import Patience, RemoteClients
from mocosfl_priv.errors import ConfigurationError
from mocosfl_priv.models.split import SplitModel
from mocosfl_priv.plugins import Defense
from mocosfl_priv.runtime.seeding import derive_seed
from mocosfl_priv.training.message_count import rows_per_image
from mocosfl_priv.training.participants import Simulated
from mocosfl_priv.training.sampling import PoolShape

ON_RETURN = (
    "replace_keys",
    "filter_gradient",
)  # hooks that watch what the server makes of other clients' messages, too
ON_WAY_OUT = ("protect", "client_loss")  # hooks that become part of a device's program


class Transport(Protocol):
    """What leads devices to a reception."""

    def start(self) -> None:
        """From here on devices are received."""

    def stop(self) -> None:
        """Let conversations end, and no new ones begin."""


@dataclass
class Deployment:
    """Clients of a training that are devices; called by the engine, it makes participants of them.

    run: name of the run, the same after a restart. seed: of the training. remote: the clients that are devices.
    open_transport: makes what leads devices to a reception.
    least: devices that must be there before the first step; all by default.
    trusting: devices are who they say they are, without certificates.
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
        """Export the program, and receive devices."""
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
        """End all conversations; devices that were not told that the training is over will try to come back."""
        if self._transport is not None:
            self._transport.stop()


def device_name(client: int) -> str:
    """What the device of a client is called, in its certificate too."""
    return f"client-{client:04d}"


def require_runs_on_devices(defense: Defense, label: str) -> None:
    """Raise ConfigurationError where `defense` cannot become part of a device's program, with the reason.

    What it draws and computes for a message can be; what it learns from the messages of all clients cannot: a device
    meets its own only. Whether it works on each image for itself is found by :func:`export_client`.
    """
    for part in [part.plugin for part in defense.parts] or [defense]:
        name = label if part is defense else f"{label} ({type(part).__name__})"
        if found := [hook for hook in ON_RETURN if _overrides(part, hook)]:
            raise ConfigurationError(
                f"defense {name!r} does not run on devices: it works on what comes back ({', '.join(found)}), "
                "with a memory that all clients share"
            )
        if _overrides(part, "state") and (found := [hook for hook in ON_WAY_OUT if _overrides(part, hook)]):
            raise ConfigurationError(
                f"defense {name!r} does not run on devices: what it does at a client ({', '.join(found)}) is learned "
                "from the messages of all clients, of which a device has its own only"
            )


def _overrides(defense: Defense, hook: str) -> bool:
    return getattr(type(defense), hook, None) is not getattr(Defense, hook, None)
