from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mocosfl_priv.compute import Compute
from mocosfl_priv.data.datasets import load_split
from mocosfl_priv.evaluation.utility import to_unit_range
from mocosfl_priv.simulated_attacker import SimulatedAttacker


@pytest.fixture(scope="module")
def images() -> Tensor:
    return to_unit_range(load_split("photos-source", "train").images[::300, :, ::2, ::2][:8])


@pytest.fixture
def client() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.PixelUnshuffle(2), nn.Conv2d(12, 12, 1))  # nothing is lost


def build(compute: Compute, decoders: list[str] | None = None, **changes: Any) -> SimulatedAttacker:
    settings: dict[str, Any] = {
        "alpha": 2.0,
        "threshold": 0.5,
        "steps": 1000,
        "batch_size": 8,
        "compute": compute,
        "seed": 0,
    }
    return SimulatedAttacker(decoders or ["res_normN0C8"], (12, 8, 8), (3, 16, 16), **(settings | changes))


def test_it_learns_and_penalises_only_above_the_threshold(images: Tensor, client: nn.Module, compute: Compute) -> None:
    attacker, smashed = build(compute, threshold=0.3), client(images).detach()
    before = [p.detach().clone() for p in attacker.decoders[0].parameters()]
    penalties = [float(attacker.client_loss(images, smashed)) for _ in range(60)]
    assert any(not torch.equal(a, b) for a, b in zip(before, attacker.decoders[0].parameters(), strict=True))
    assert penalties[0] == 0.0  # an untrained decoder reconstructs nothing
    assert penalties[-1] > 0.05  # a trained one does, and the client is made to pay for it


def test_the_penalty_reaches_the_client_but_no_decoder(images: Tensor, client: nn.Module, compute: Compute) -> None:
    attacker = build(compute, ["res_normN0C8", "conv_normN0C8"], threshold=-1.0)
    penalty = attacker.client_loss(images, client(images))
    parameters = [p for decoder in attacker.decoders for p in decoder.parameters()]
    for parameter in parameters:
        parameter.grad = None
    penalty.backward()
    assert all(p.grad is not None and float(p.grad.abs().sum()) > 0 for p in client.parameters())
    assert all(p.grad is None for p in parameters)


def test_it_learns_without_touching_the_client(images: Tensor, client: nn.Module, compute: Compute) -> None:
    build(compute).learn(images, client(images))
    assert all(p.grad is None for p in client.parameters())


def test_it_goes_on_from_its_state(images: Tensor, client: nn.Module, compute: Compute) -> None:
    decoders, smashed = ["res_normN0C8", "unet_N1C8"], client(images).detach()
    whole, first, second = (build(compute, decoders, steps=10, batch_size=32) for _ in range(3))
    for _ in range(8):
        whole.learn(images, smashed)
    for _ in range(4):
        first.learn(images, smashed)
    second.load_state(first.state())
    for _ in range(4):
        second.learn(images, smashed)
    expected, found = whole.state(), second.state()
    assert expected.keys() == found.keys()
    assert all(torch.equal(expected[name], found[name]) for name in expected)
