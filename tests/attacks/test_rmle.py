"""The search for images, beyond the contract."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from attacks.rmle import Calibration, RmleAttack, Schedule
from mocosfl_priv.errors import RunFailedError
from mocosfl_priv.evaluation.floor import blind_guess_floor, leak_ratio
from mocosfl_priv.evaluation.image_metrics import mse
from mocosfl_priv.plugins import Budget
from mocosfl_priv.runtime.compute import Compute
from tests.attacks.closed_form import make_view, photo_patches

KNOWN, VICTIMS = photo_patches(200), photo_patches(24, "test")


class Forgetful(nn.Module):
    """An image around its mean, at unit contrast: says nothing of its brightness and contrast."""

    def forward(self, x: Tensor) -> Tensor:
        away = x - x.mean((2, 3), keepdim=True)
        return away / (away.square().mean((1, 2, 3), keepdim=True) + 1e-6).sqrt()


def leak(attack: RmleAttack, client: nn.Module, compute: Compute, budget: Budget | None = None) -> float:
    """R of what it finds of `VICTIMS`."""
    torch.manual_seed(0)
    images = attack.reconstruct(make_view(client, VICTIMS, KNOWN, compute), budget or Budget(), 0)
    return leak_ratio(mse(images, VICTIMS), blind_guess_floor(KNOWN, VICTIMS).mse)


def test_the_weight_falls_by_equal_factors() -> None:
    falling = Schedule(2.0, 0.02)
    assert [falling(spent) for spent in (0, 0.5, 1)] == pytest.approx([2.0, 0.2, 0.02])
    assert Schedule(0.0, 0.0)(0.3) == 0


def test_calibration_restores_what_was_lost_alike_in_all_images() -> None:
    pale = 0.7 + 0.3 * (KNOWN - KNOWN.mean((2, 3), keepdim=True))
    mended = Calibration(pale, KNOWN)(pale)
    by_mean = KNOWN.mean((2, 3), keepdim=True)
    best = KNOWN - by_mean + by_mean.mean()  # the images' own brightness is gone for good
    assert torch.allclose(mended, best.clamp(0, 1), atol=1e-4)


def test_calibration_leaves_right_images_as_they_are() -> None:
    assert torch.allclose(Calibration(KNOWN, KNOWN)(VICTIMS), VICTIMS, atol=1e-6)


def test_calibration_of_flat_images_is_the_mean() -> None:
    flat = torch.full_like(KNOWN, 0.5)
    assert torch.allclose(Calibration(flat, KNOWN)(flat[:2]), KNOWN.mean().expand(2, *KNOWN.shape[1:]), atol=1e-4)


def test_images_of_own_tell_what_a_client_with_a_norm_forgets(compute: Compute) -> None:
    published = leak(RmleAttack(60, tv=1e-2), Forgetful(), compute)
    assert leak(RmleAttack(60), Forgetful(), compute) > published + 0.05


def test_a_limited_search_shows_what_it_can(compute: Compute) -> None:
    """Its own images are searched along, so what it does not get to is not believed to be there."""
    assert leak(RmleAttack(500), Forgetful(), compute, Budget(steps=60)) > -0.05


@pytest.mark.parametrize("tv", [1e-2, None])
def test_a_search_that_diverges_is_a_failure(compute: Compute, tv: float | None) -> None:
    """With a weight that is given, and where it is chosen by trials that all diverge, too."""

    class Singular(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x + (x - x.detach()).abs().sqrt()

    with pytest.raises(RunFailedError, match="diverged"):
        RmleAttack(5, tv=tv).reconstruct(make_view(Singular(), VICTIMS, KNOWN, compute), Budget(), 0)


def test_images_of_own_shorten_the_search(compute: Compute) -> None:
    """Through a client without local structure: every number of the message is a random mixture of the image."""
    mixture = torch.randn(KNOWN[0].numel(), 100, generator=torch.Generator().manual_seed(2)) / 28

    class Mixing(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return (x.flatten(1) @ mixture)[:, :, None, None]

    published = leak(RmleAttack(20, tv=1e-2), Mixing(), compute)
    assert leak(RmleAttack(20), Mixing(), compute) > published + 0.1
