from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from scipy import optimize
from torch import Tensor

from defenses.adversarial_noise import AdversarialNoise
from mocosfl_priv import MessageKind
from mocosfl_priv.errors import ConfigurationError
from mocosfl_priv.plugins.defense_checks import small_context
from mocosfl_priv.runtime.compute import Compute


def trained_surrogate(compute: Compute, strength: float, steps: int = 60) -> tuple[AdversarialNoise, Tensor, Tensor]:
    """After some steps on smooth images behind an untrained client; the images, and their smashed data."""
    defense = AdversarialNoise(strength=strength, decoder="res_normN0C8")
    ctx = replace(small_context(defense, compute), training_steps=1000)
    defense.prepare(ctx)
    coarse = torch.rand(16, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    images = torch.nn.functional.interpolate(coarse, size=32, mode="bilinear")
    client = ctx.build_model().client
    rng = torch.Generator().manual_seed(1)
    smashed: Tensor = client(images).detach()
    for _ in range(steps):
        defense.protect(smashed, rng, MessageKind.QUERY)
        assert defense.joint_loss(images, smashed) is None
    return defense, images, smashed


def test_it_lowers_the_surrogate_s_score_and_more_than_noise_of_that_size(compute: Compute) -> None:
    defense, images, smashed = trained_surrogate(compute, strength=0.3)
    rng = torch.Generator().manual_seed(2)
    moved = defense.protect(smashed, rng)
    lengths = (moved - smashed).flatten(1).norm(dim=1) / smashed.flatten(1).norm(dim=1)
    torch.testing.assert_close(lengths, torch.full_like(lengths, 0.3), rtol=1e-4, atol=0)
    noise = torch.randn(smashed.shape, generator=rng)
    noise = noise * (moved - smashed).norm() / noise.norm()
    (decoder,) = defense._surrogate.decoders

    @torch.no_grad()
    def error(messages: Tensor) -> float:
        return float((decoder(messages) - images).square().mean())

    assert error(moved) > 1.05 * error(smashed)
    assert error(moved) - error(smashed) > 3 * (error(smashed + noise) - error(smashed))


def test_it_finds_the_most_sensitive_direction_of_a_linear_decoder(compute: Compute) -> None:
    """Where the surrogate is linear the direction is its first right singular vector."""
    defense, _, smashed = trained_surrogate(compute, strength=1.0, steps=2)  # its decoder is replaced
    matrix = torch.randn(12, smashed[0].numel(), generator=torch.Generator().manual_seed(3))
    matrix *= 0.7 ** torch.arange(12).view(-1, 1)  # singular values far apart
    defense._surrogate.decoders[0] = torch.nn.Sequential(torch.nn.Flatten(), linear(matrix))
    defense.steps = 60
    moved = defense.protect(smashed[:2], torch.Generator().manual_seed(4)) - smashed[:2]
    first = torch.linalg.svd(matrix, full_matrices=False).Vh[0]
    cosine = (moved.flatten(1) @ first) / moved.flatten(1).norm(dim=1)
    torch.testing.assert_close(cosine.abs(), torch.ones(2), rtol=1e-2, atol=0)


def linear(matrix: Tensor) -> torch.nn.Linear:
    layer = torch.nn.Linear(matrix.shape[1], matrix.shape[0], bias=False)
    layer.weight.data.copy_(matrix)
    return layer


def test_strength_zero_changes_nothing(compute: Compute) -> None:
    defense, _, smashed = trained_surrogate(compute, strength=0.0, steps=10)
    torch.testing.assert_close(defense.protect(smashed, torch.Generator()), smashed)


def test_averaging_several_messages_of_an_image_does_not_undo_it(compute: Compute) -> None:
    """With a random sign, the mean of 16 messages would be four times as near to the clean one."""
    defense, _, smashed = trained_surrogate(compute, strength=0.5)
    rng = torch.Generator().manual_seed(6)
    single = defense.protect(smashed, rng)
    mean = torch.stack([defense.protect(smashed, rng) for _ in range(16)]).mean(0)
    torch.testing.assert_close(mean, single)
    assert float((mean - smashed).norm()) == pytest.approx(0.5 * float(smashed.norm()), rel=1e-4)


def test_the_move_goes_against_the_message_so_two_messages_can_be_sent_as_one(compute: Compute) -> None:
    """For a linear surrogate of one direction, whose sign decides nothing: the part along it is what says the way."""
    defense, _, smashed = trained_surrogate(compute, strength=0.5, steps=2)
    random = torch.Generator().manual_seed(7)
    across, along = torch.linalg.qr(torch.randn(smashed[0].numel(), 2, generator=random, dtype=torch.float64)).Q.T
    defense._surrogate.decoders[0] = torch.nn.Sequential(torch.nn.Flatten(), linear(along[None]).double())

    def sent(part: float) -> Tensor:
        message = (across + part * along).view(1, *smashed.shape[1:])
        return defense.protect(message, torch.Generator()).flatten()

    for part in (0.2, -0.7, 3.0):
        moved = part - math.copysign(0.5 * math.hypot(1, part), part)
        torch.testing.assert_close(sent(part), across + moved * along)
    other = optimize.brentq(lambda part: part - 0.5 * math.hypot(1, part) + 1 - 0.5 * math.hypot(1, 1), 0, 1)
    torch.testing.assert_close(sent(other), sent(-1.0))


@pytest.mark.parametrize("decoder", ["transformer", "res_normN0"])
def test_an_unknown_surrogate_is_refused(decoder: str) -> None:
    with pytest.raises(ConfigurationError, match="decoder"):
        AdversarialNoise(decoder=decoder)
