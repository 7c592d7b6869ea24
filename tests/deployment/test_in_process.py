"""Devices in this process, over the whole protocol, against the simulation."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
import torch
from torch import Tensor

from mocosfl_priv.config import TrainingConfig
from mocosfl_priv.deployment.deployment import Deployment
from mocosfl_priv.device.codecs import Codec
from mocosfl_priv.device.messages import Welcome
from mocosfl_priv.device.participant import Views
from mocosfl_priv.device.program import ClientProgram
from mocosfl_priv.runtime.compute import Compute
from mocosfl_priv.training import participants
from mocosfl_priv.training.clients import ClientBank, EqualClients
from mocosfl_priv.training.mocosfl import MocoSFL
from tests.deployment.devices import SIZE, deployment, engine, smooth_model, training_of

SETTINGS: list[dict[str, Any]] = [
    {},
    {"paper_gradient": "one_sided", "ema_update": "before_encoding", "client_schedule": "oscillating"},
    {"symmetric": False, "average_momentum_models": True, "sync_period": 1},
    {"heterogeneity": {"clients": 0.34, "data": 0.5, "micro_batch": 4}, "divergence_aware": 0.5},
]


def view(client: int, number: int, turn: int) -> np.ndarray:
    """A view of the image that `client` draws as its `number`th."""
    rng = np.random.default_rng((client, number, turn))
    return rng.random((3, SIZE, SIZE), dtype=np.float32)


class GivenViews:
    """What a device draws."""

    def __init__(self, client: int) -> None:
        self.images = 12
        self._client = client

    def views(self, offset: int, count: int) -> tuple[np.ndarray, np.ndarray]:
        first, second = (np.stack([view(self._client, offset + i, turn) for i in range(count)]) for turn in range(2))
        return first, second


class SameViews:
    """The same for simulated clients, in place of their augmentation: called for first and second views in turn."""

    def __init__(self, pool_sizes: Sequence[int], first: int = 0) -> None:
        self._sizes = dict(enumerate(pool_sizes, first))
        self._calls = 0

    def __call__(self, images: Tensor, _: torch.Generator) -> Tensor:
        step, turn = divmod(self._calls, 2)
        self._calls += 1
        made = [view(c, step * size + i, turn) for c, size in self._sizes.items() for i in range(size)]
        assert len(made) == len(images)
        return torch.from_numpy(np.stack(made))


def given(client: int, program: ClientProgram, welcome: Welcome) -> Views:
    assert welcome.client == client
    return GivenViews(client)


@pytest.mark.parametrize("settings", SETTINGS, ids=lambda s: ",".join(s) or "default")
def test_devices_train_as_simulated_clients_do_on_the_same_views(settings: dict[str, Any], compute: Compute) -> None:
    training = training_of(**settings)
    remote = deployment(range(3), given)
    run = engine(training, compute, remote, smooth_model())
    losses = [float(run.step()) for _ in range(5)]
    ours = run.participants.state()
    run.assemble()
    run.participants.finish()
    remote.close()

    simulated = engine(training, compute, None, smooth_model())
    sizes = [4, 2, 2] if "heterogeneity" in settings else [2, 2, 2]
    with patch.object(participants, "moco_v2_view", SameViews(sizes)):
        expected = [float(simulated.step()) for _ in range(5)]
    simulated.assemble()
    np.testing.assert_allclose(losses, expected, rtol=2e-5)
    bank = simulated.clients
    assert isinstance(bank, ClientBank)
    for kind, stack in (("online", bank.online), ("key", bank.key), ("velocity", bank.velocity)):
        for name, value in stack.items():
            found = ours[f"clients.{kind}.{name}"]
            if isinstance(bank, EqualClients):  # computed as one, whose optimiser has the mean gradient
                found = found.mean(0, keepdim=True)
            torch.testing.assert_close(found, value, rtol=1e-3, atol=2e-5)


def test_frozen_devices_send_what_frozen_simulated_clients_send(compute: Compute) -> None:
    """As with TAResSFL: forward only, one message per view, nothing comes back."""
    training = training_of()
    remote = deployment(range(3), given)
    run = engine(training, compute, remote, smooth_model(), frozen_client=True)
    losses = [float(run.step()) for _ in range(4)]
    run.participants.finish()
    remote.close()
    simulated = engine(training, compute, None, smooth_model(), frozen_client=True)
    with patch.object(participants, "moco_v2_view", SameViews([2, 2, 2])):
        np.testing.assert_allclose(losses, [float(simulated.step()) for _ in range(4)], rtol=2e-5)
    assert remote.reception is not None and remote.participants is not None
    program = remote.reception.terms.program
    assert program.vjp is None
    for account in remote.reception.accounts.values():
        assert account.traffic.payload_sent == len(program.to_bytes())
        assert account.traffic.payload_received == simulated.traffic.smashed_up / 3


@pytest.mark.parametrize(("codec", "most_bytes"), [("fp16", 0.51), ("int8", 0.27)])
def test_codecs_save_bytes_and_hardly_change_the_losses(codec: Codec, most_bytes: float, compute: Compute) -> None:
    losses, payloads = [], []
    for chosen in ("fp32", codec):
        remote = deployment(range(2), given)
        training = training_of(clients=2, sync_period=100, codec=chosen, gradient_codec=chosen)
        run = engine(training, compute, remote)
        losses.append([float(run.step()) for _ in range(3)])
        assert remote.reception is not None
        payloads.append(remote.reception.idle()[0].dialogue.traffic.payload_received)
        run.participants.finish()
        remote.close()
        received = [account.traffic.payload_received for account in remote.reception.accounts.values()]
        assert run.traffic.smashed_up == sum(received)
    assert payloads[1] <= most_bytes * payloads[0]
    np.testing.assert_allclose(losses[1], losses[0], rtol=0.05)
    assert losses[1] != losses[0]


@pytest.mark.slow  # with fewer clients it is what the next test does
def test_one_device_among_ninety_nine_simulated_clients_changes_nothing(compute: Compute) -> None:
    """The device has a number in the middle; what is compared is what everybody sees of everybody: loss and average."""
    training, device = training_of(clients=100, server_batch=100, queue_size=128), 41
    losses, models = [], []
    for remote in (deployment([device], given), None):
        run = engine(training, compute, remote, smooth_model())
        sizes = [0 if remote is not None and client == device else 1 for client in range(100)]
        with patch.object(participants, "moco_v2_view", SameViews(sizes)):
            losses.append([float(run.step()) for _ in range(2)])
        models.append(run.participants.individual(0))
        run.participants.finish()
        if remote is not None:
            remote.close()
            assert remote.participants is not None and sum(remote.participants.drawn) == 2
    np.testing.assert_allclose(losses[0], losses[1], rtol=2e-5)
    for name, value in models[1].items():
        torch.testing.assert_close(models[0][name], value, rtol=1e-3, atol=2e-5)


def test_simulated_clients_round_as_devices_do(compute: Compute) -> None:
    """All of them, or some beside a device."""
    training = training_of(codec="int8", gradient_codec="fp16")

    def trained(remote: Deployment | None, simulated: SameViews, training: TrainingConfig = training) -> MocoSFL:
        run = engine(training, compute, remote, smooth_model())
        with patch.object(participants, "moco_v2_view", simulated):
            losses.append([float(run.step()) for _ in range(4)])
        run.participants.finish()
        if remote is not None:
            remote.close()
        return run

    losses: list[list[float]] = []
    alone = trained(None, SameViews([2, 2, 2]))
    beside = trained(deployment(range(1), given), SameViews([2, 2], first=1))
    devices = trained(deployment(range(3), given), SameViews([]))
    trained(None, SameViews([2, 2, 2]), training_of())
    simulated, *others, exact = losses
    for found in others:
        np.testing.assert_allclose(found, simulated, rtol=2e-5)
    assert not np.allclose(exact, simulated, rtol=2e-4)
    assert alone.traffic == beside.traffic == devices.traffic
