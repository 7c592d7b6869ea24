"""A small training whose clients are devices: in threads of this process, over any transport."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable
from contextlib import suppress
from typing import Any

import numpy as np
import torch

from mocosfl_priv.config import ModelConfig, TrainingConfig
from mocosfl_priv.data.partitions import iid
from mocosfl_priv.deployment.deployment import Deployment, device_name
from mocosfl_priv.deployment.reception import Reception
from mocosfl_priv.device.errors import DeviceError
from mocosfl_priv.device.messages import Welcome
from mocosfl_priv.device.participant import Device, ShardViews, Views, stay
from mocosfl_priv.device.program import ClientProgram
from mocosfl_priv.device.shard import Shard
from mocosfl_priv.device.transport import Conversation, in_process
from mocosfl_priv.models.split import SplitModel, build_split_model
from mocosfl_priv.runtime.compute import Compute
from mocosfl_priv.runtime.seeding import generator
from mocosfl_priv.training.mocosfl import MocoSFL
from mocosfl_priv.training.sampling import PooledClients, PoolShape

SIZE, IMAGES_PER_CLIENT, STEPS = 16, 12, 40
MakeViews = Callable[[int, ClientProgram, Welcome], Views]


def split_model() -> SplitModel:
    torch.manual_seed(0)
    config = ModelConfig(backbone="resnet8", width=8, projector_hidden=16, projector_out=16, bottleneck="C4S2")
    return build_split_model(config, 1, SIZE, [0.5] * 3, [0.25] * 3)


def smooth_model() -> SplitModel:
    """Without a kink in its path: rounding in the one of two trainings cannot turn into a difference of gradients."""
    torch.manual_seed(0)
    config = ModelConfig(backbone="vit_tiny", width=16, head="v1", projector_out=16, bottleneck="noReLUC4S2")
    return build_split_model(config, 2, SIZE, [0.5] * 3, [0.25] * 3)


def training_of(**settings: Any) -> TrainingConfig:
    return TrainingConfig(
        **({"clients": 3, "server_batch": 6, "queue_size": 32, "sync_period": 2, "epochs": 4} | settings)
    )


def images_of(clients: int) -> torch.Tensor:
    count = clients * IMAGES_PER_CLIENT
    return torch.randint(0, 256, (count, 3, SIZE, SIZE), dtype=torch.uint8, generator=torch.Generator().manual_seed(7))


def shard_of(client: int, clients: int) -> Shard:
    """The images that `batches_of` gives the same client."""
    part = iid(clients * IMAGES_PER_CLIENT, clients, generator(0, "partition"))[client]
    return Shard(images_of(clients)[part].numpy(), part.numpy().astype(np.int64), device_name(client))


def batches_of(training: TrainingConfig) -> PooledClients:
    count = training.clients * IMAGES_PER_CLIENT
    partition = iid(count, training.clients, generator(0, "partition"))
    return PooledClients(images_of(training.clients), partition, PoolShape.of(training), generator(0, "batches"))


def shard_views(clients: int) -> MakeViews:
    def make(client: int, program: ClientProgram, welcome: Welcome) -> Views:
        shard = shard_of(client, clients)
        return ShardViews(shard, program.settings, welcome.seed, welcome.client, welcome.drop_partial)

    return make


class Threads:
    """Devices in threads of this process. spoil: stands between a device and its conversation."""

    def __init__(
        self,
        reception: Reception,
        clients: Iterable[int],
        views: MakeViews,
        spoil: Callable[[int, Conversation], Conversation] = lambda _, conversation: conversation,
        noise_seed: int | None = None,
    ) -> None:
        self._reception = reception
        self._clients = list(clients)
        self._views = views
        self._spoil = spoil
        self._noise_seed = noise_seed
        self._threads: list[threading.Thread] = []
        self.devices: dict[int, Device] = {}

    def start(self) -> None:
        for client in self._clients:
            make = lambda program, welcome, client=client: self._views(client, program, welcome)  # noqa: E731
            self.devices[client] = Device(device_name(client), IMAGES_PER_CLIENT, make, noise_seed=self._noise_seed)
            thread = threading.Thread(target=self._stay, args=(client,))
            self._threads.append(thread)
            thread.start()

    def _stay(self, client: int) -> None:
        with suppress(DeviceError):  # refused for good: the account says why
            stay(self.devices[client], lambda: self.connect(client))

    def connect(self, client: int) -> Conversation:
        ours, theirs = in_process(device_name(client))
        threading.Thread(target=self._reception.attend, args=(theirs,), daemon=True).start()
        return self._spoil(client, ours)

    def moved_to(self, reception: Reception) -> Threads:
        """The same devices, which from their next attempt on find another server."""
        self._reception = reception
        self.start = lambda: None  # type: ignore[method-assign] # they run already
        return self

    def stop(self) -> None:
        for thread in self._threads:
            thread.join(20)
            assert not thread.is_alive()


def deployment(remote: Iterable[int], views: MakeViews, **options: Any) -> Deployment:
    remote = list(remote)
    transport = options.pop("transport", Threads)
    spoil = options.pop("spoil", lambda _, conversation: conversation)
    noise_seed = options.pop("noise_seed", None)
    return Deployment(
        "test", 0, remote, lambda reception: transport(reception, remote, views, spoil, noise_seed), **options
    )


def engine(
    training: TrainingConfig,
    compute: Compute,
    remote: Deployment | None,
    model: SplitModel | None = None,
    **options: Any,
) -> MocoSFL:
    return MocoSFL(
        model or split_model(), batches_of(training), training, steps=STEPS, compute=compute, seed=0, remote=remote,
        **options,
    )  # fmt: skip
