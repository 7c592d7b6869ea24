"""A client on a device against the same client in the engine's bank: the same views in, the same client out."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")

from mocosfl_priv.config import ModelConfig, TrainingConfig
from mocosfl_priv.deployment.export import client_settings, export_client
from mocosfl_priv.device.errors import DeviceError
from mocosfl_priv.device.program import ClientProgram
from mocosfl_priv.device.runtime import DeviceClient
from mocosfl_priv.models.split import build_split_model
from mocosfl_priv.training.clients import ClientBank

RATE = 0.06
TOLERANCE = 1e-4  # relative to the largest number of a tensor


def training(**options: Any) -> TrainingConfig:
    return TrainingConfig.model_validate({"momentum": 0.8, "weight_decay": 0.01, "ema": 0.7, **options})


def client(cut: int = 2) -> torch.nn.Module:
    torch.manual_seed(0)
    model = ModelConfig(backbone="resnet8", width=8, bottleneck="C4S2")
    return build_split_model(model, cut, 16, [0.5] * 3, [0.25] * 3).client


def program(settings: TrainingConfig, trainable: bool = True) -> ClientProgram:
    return export_client(client(), (3, 16, 16), client_settings(settings, trainable))


@pytest.fixture(scope="module")
def shared_program() -> ClientProgram:
    return program(training())


@pytest.fixture
def device(shared_program: ClientProgram) -> DeviceClient:
    return DeviceClient(shared_program)


def images(rows: int, seed: int) -> torch.Tensor:
    return torch.rand(rows, 3, 16, 16, generator=torch.Generator().manual_seed(seed))


def assert_close(found: np.ndarray, expected: torch.Tensor) -> None:
    scale = float(expected.detach().abs().max())
    np.testing.assert_allclose(found, expected.detach().numpy(), rtol=0, atol=TOLERANCE * max(scale, 1e-6))


@pytest.mark.parametrize("ema_update", ["after_step", "before_encoding"])
def test_five_steps_are_the_engines(ema_update: str) -> None:
    settings = training(ema_update=ema_update, average_momentum_models=True)
    bank = ClientBank(client(), 3, settings)
    pool = torch.tensor([2])
    device = DeviceClient(program(settings))
    for step in range(5):
        rows = 1 + step % 3
        queries, keys = images(rows, step), images(rows, 100 + step)
        smashed = bank.encode_queries(pool, [rows], queries)
        assert_close(device.encode_queries(queries.numpy()), smashed)
        assert_close(device.encode_keys(keys.numpy()), bank.encode_keys(pool, [rows], keys))
        gradient = torch.randn(smashed.shape, generator=torch.Generator().manual_seed(step))
        smashed.backward(gradient)
        bank.learn(pool, torch.tensor([RATE / (step + 1)]))
        device.learn(gradient.numpy(), RATE / (step + 1))
        if step == 2:  # all others are as they began
            bank.average(torch.arange(3))
            device.set_parameters({name: value[2].numpy() for name, value in bank.online.items()})
            device.set_momentum_parameters({name: value[2].numpy() for name, value in bank.key.items()})
    state = device.state()
    assert state["steps_taken"] == bank.steps_taken[2] == 5
    for kind in ("online", "key", "velocity"):
        for name, value in getattr(bank, kind).items():
            assert_close(state[f"{kind}.{name}"], value[2])
            moved = (value[2] - bank.individual(0)[name]).abs().max()
            assert kind != "online" or moved > 10 * TOLERANCE * value[2].abs().max()  # else equality says nothing


def test_a_later_encoding_takes_the_place_of_an_earlier_one_as_in_the_engine(device: DeviceClient) -> None:
    bank = ClientBank(client(), 1, training())
    pool = torch.tensor([0])
    for seed in (1, 2):
        smashed = bank.encode_queries(pool, [2], images(2, seed))
        device.encode_queries(images(2, seed).numpy())
    smashed.backward(torch.ones_like(smashed))
    bank.learn(pool, torch.tensor([RATE]))
    device.learn(np.ones(smashed.shape, np.float32), RATE)
    for name, value in bank.individual(0).items():
        assert_close(device.parameters()[name], value)


def test_state_goes_on_exactly(device: DeviceClient, shared_program: ClientProgram) -> None:
    def step(one: DeviceClient, seed: int) -> None:
        smashed = one.encode_queries(images(2, seed).numpy())
        one.learn(np.cos(smashed), RATE)

    step(device, 1)
    kept = device.state()
    step(device, 2)
    other = DeviceClient(shared_program)
    other.load_state(kept)
    step(other, 2)
    for name, value in device.state().items():
        assert np.array_equal(value, other.state()[name])
    assert not np.array_equal(kept["online.cut.weight"], device.parameters()["cut.weight"])  # a copy


def test_frozen_clients_only_encode() -> None:
    device = DeviceClient(program(training(), trainable=False))
    expected = client()(images(3, 1))
    assert_close(device.encode_queries(images(3, 1).numpy()), expected)
    assert_close(device.encode_keys(images(3, 1).numpy()), expected)
    with pytest.raises(DeviceError, match="does not learn"):
        device.learn(np.zeros(expected.shape, np.float32), RATE)
    with pytest.raises(DeviceError, match="no momentum encoder"):
        device.set_momentum_parameters(device.parameters())
    assert set(device.state()) == {"steps_taken", *(f"online.{name}" for name in device.parameters())}


def test_what_does_not_belong_is_refused_and_changes_nothing(device: DeviceClient) -> None:
    smashed = device.encode_queries(images(2, 1).numpy())
    before = device.state()
    good = np.ones_like(smashed)
    bad = {
        "float32": good.astype(np.float64),
        "must be": good[:1],
        "NaN": np.where(np.arange(2)[:, None, None, None] == 1, np.float32(np.nan), good),
        "overflow float32": np.full_like(good, 3e38),
    }
    for message, gradient in bad.items():
        with pytest.raises(DeviceError, match=message):
            device.learn(gradient, RATE)
    for rate in (float("nan"), -1.0):
        with pytest.raises(DeviceError, match="learning rate"):
            device.learn(good, rate)
    for wrong in ({}, {**device.parameters(), "cut.bias": np.zeros(3, np.float32)}):
        with pytest.raises(DeviceError):
            device.set_parameters(wrong)
    for state in ({}, {**before, "steps_taken": np.array(-1)}, {**before, "more": np.zeros(1, np.float32)}):
        with pytest.raises(DeviceError):
            device.load_state(state)
    with pytest.raises(DeviceError, match="images must be"):
        device.encode_keys(np.zeros((1, 3, 8, 8), np.float32))
    assert all(np.array_equal(value, device.state()[name]) for name, value in before.items())
    device.learn(good, RATE)  # none of it used up the queries
    with pytest.raises(DeviceError, match="no queries that this gradient"):
        device.learn(good, RATE)


def test_graphs_that_are_not_the_manifests_are_refused(shared_program: ClientProgram) -> None:
    import dataclasses

    for changes, message in (
        ({"forward": b"no graph"}, "cannot be run"),
        ({"forward": shared_program.vjp}, "do not match the manifest"),
        ({"smashed_shape": (4, 4, 4)}, "do not match the manifest"),
        ({"parameters": dict(list(shared_program.parameters.items())[1:])}, "do not match the manifest"),
    ):
        with pytest.raises(DeviceError, match=message):
            DeviceClient(dataclasses.replace(shared_program, **changes))
