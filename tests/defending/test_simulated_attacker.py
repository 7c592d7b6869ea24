from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from mocosfl_priv.data.datasets import load_split
from mocosfl_priv.defending.simulated_attacker import SimulatedAttacker, score
from mocosfl_priv.evaluation.image_metrics import ssim_zeropad
from mocosfl_priv.evaluation.utility import to_unit_range
from mocosfl_priv.runtime.compute import Compute

MODES = ("train", "eval")


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


def test_the_penalty_is_for_the_strongest(images: Tensor, client: nn.Module, compute: Compute) -> None:
    grammars = ["conv_normN0C8", "edsr_N1C16", "res_normN0C8"]
    attacker = build(compute, grammars, threshold=-0.5)
    for _ in range(10):
        attacker.learn(images, client(images))
    smashed = client(images).detach().requires_grad_()
    scores = [ssim_zeropad(decoder(smashed).float(), images).mean() for decoder in attacker.decoders]
    strongest = max(scores, key=Tensor.item)
    assert strongest.item() > sorted(found.item() for found in scores)[1]
    penalty = attacker.penalty(images, smashed)
    torch.testing.assert_close(penalty, 2.0 * (strongest + 0.5))
    expected = torch.autograd.grad(2.0 * strongest, smashed)[0]
    torch.testing.assert_close(torch.autograd.grad(penalty, smashed)[0], expected)


def test_in_eval_mode_the_penalty_uses_and_keeps_running_statistics(
    images: Tensor, client: nn.Module, compute: Compute
) -> None:
    """Beside copies of the decoders in eval mode; their own step is the same, and in train mode, either way."""
    grammars = ["res_normN0C8", "conv_normN0C8"]
    attackers = {mode: build(compute, grammars, threshold=-1.0, batch_size=32, penalty_mode=mode) for mode in MODES}
    smashed = client(images).detach().requires_grad_()
    for attacker in attackers.values():
        for _ in range(3):
            attacker.learn(images, smashed)
    learned = {mode: attacker.state() for mode, attacker in attackers.items()}
    learned = {mode: {name: value.clone() for name, value in state.items()} for mode, state in learned.items()}
    statistics = [name for name in learned["eval"] if "running_" in name]
    assert {name.split(".")[1] for name in statistics} == {"0", "1"}
    assert all(torch.equal(learned["train"][name], value) for name, value in learned["eval"].items())
    untrained = build(compute, grammars, batch_size=32).state()
    assert all(not torch.equal(learned["eval"][name], untrained[name]) for name in statistics)

    copies = [copy.deepcopy(decoder).eval() for decoder in attackers["eval"].decoders]
    penalties = {mode: attacker.penalty(images, smashed) for mode, attacker in attackers.items()}
    scores = [ssim_zeropad(decoder(smashed).float(), images).mean() for decoder in copies]
    expected = 2.0 * (max(scores, key=Tensor.item) + 1.0)
    torch.testing.assert_close(penalties["eval"], expected)
    assert not torch.allclose(penalties["eval"], penalties["train"])
    gradients = [torch.autograd.grad(penalty, smashed)[0] for penalty in (penalties["eval"], expected)]
    torch.testing.assert_close(*gradients)

    after = {mode: attacker.state() for mode, attacker in attackers.items()}
    assert all(torch.equal(after["eval"][name], value) for name, value in learned["eval"].items())
    assert all(not torch.equal(after["train"][name], learned["train"][name]) for name in statistics)
    assert all(module.training for decoder in attackers["eval"].decoders for module in decoder.modules())


@given(share=st.floats(0, 1), seed=st.integers(0, 100))
def test_the_score_grows_with_what_is_found(share: float, seed: int) -> None:
    images = torch.rand(3, 3, 12, 12, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    colour = images.mean((0, 2, 3), keepdim=True)
    decoded = colour + share * (images - colour)
    expected = (float(ssim_zeropad(decoded, images).mean()) + 1 - (1 - share) ** 2) / 2
    assert float(score(decoded, images, "mse+ssim")) == pytest.approx(expected, abs=1e-9)
    assert float(score(images, images, "mse+ssim")) == pytest.approx(1, abs=1e-9)


def test_uniform_images_and_values_out_of_range_keep_a_gradient() -> None:
    for images in (torch.full((2, 3, 12, 12), 0.5), torch.rand(1, 3, 12, 12)):
        decoded = torch.full_like(images, 1.5).requires_grad_()
        score(decoded, images, "mse+ssim").backward()
        assert decoded.grad is not None and bool(decoded.grad.isfinite().all()) and bool((decoded.grad < 0).all())


def test_one_decoder_at_a_time_begins_afresh_and_regains(images: Tensor, client: nn.Module, compute: Compute) -> None:
    attacker, smashed = build(compute, ["conv_normN0C8", "edsr_N1C16"], refresh=30), client(images).detach()

    def scores() -> list[float]:
        return [attacker.score(decoder, images, smashed).item() for decoder in attacker.decoders]

    def learn(steps: int) -> list[nn.Module]:
        for _ in range(steps):
            attacker.learn(images, smashed)
        return list(attacker.decoders)

    untrained, first = scores(), learn(30)
    trained = scores()
    second = learn(1)
    assert second[0] is not first[0] and second[1] is first[1]
    weakened = scores()
    assert weakened[0] < trained[0] and weakened[1] > untrained[1]
    learn(29)
    assert scores()[0] > weakened[0] + 0.5 * (trained[0] - weakened[0])
    third = learn(1)
    assert third[0] is second[0] and third[1] is not second[1]  # now the other one, which is older


def test_rates_decay_along_a_decoders_own_life(images: Tensor, client: nn.Module, compute: Compute) -> None:
    attacker = build(compute, ["conv_normN0C8"] * 2, steps=10, milestones=(0.2, 0.5), decay=0.1, refresh=6)
    found = []
    for _ in range(8):
        attacker.learn(images, client(images))
        found.append([optimiser.param_groups[0]["lr"] for optimiser in attacker._optimisers])
    alone = [1e-3, 1e-3, 1e-4, 1e-4, 1e-4, 1e-5, 1e-5, 1e-5]
    assert [second for _, second in found] == pytest.approx(alone)
    assert [first for first, _ in found] == pytest.approx([*alone[:6], 1e-3, 1e-3])


@pytest.mark.parametrize("refresh", [0, 3])
def test_it_goes_on_from_its_state(refresh: int, images: Tensor, client: nn.Module, compute: Compute) -> None:
    decoders, smashed = ["res_normN0C8", "unet_N1C8"], client(images).detach()
    whole, first, second = (build(compute, decoders, steps=10, batch_size=32, refresh=refresh) for _ in range(3))
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
