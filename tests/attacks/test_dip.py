from __future__ import annotations

import pytest
import torch

from attacks.dip import DipAttack
from mocosfl_priv.evaluation.image_metrics import mse
from mocosfl_priv.inversion.skip_network import SkipNetwork, StackedSkipNetworks
from mocosfl_priv.plugins import Budget
from mocosfl_priv.runtime.compute import Compute
from tests.attacks.closed_form import ColourMixClient, make_view, photo_patches


@pytest.mark.parametrize("scales", [0, 2])
def test_an_untouched_network_shows_mid_grey(scales: int) -> None:
    image = SkipNetwork(8, scales)(torch.randn(1, 8, 16, 16))
    assert torch.equal(image, torch.full((1, 3, 16, 16), 0.5))


def test_stacked_networks_are_independent() -> None:
    networks = StackedSkipNetworks(3, 8, 1, torch.device("cpu"))
    noise = torch.randn(3, 8, 8, 8)
    with torch.no_grad():
        for parameter in networks.parameters:
            parameter.add_(0.1 * torch.randn(parameter.shape))
    images = networks(noise)
    images[1].square().sum().backward()
    for parameter in networks.parameters:
        assert parameter.grad is not None
        assert bool((parameter.grad[[0, 2]] == 0).all()) and bool((parameter.grad[1] != 0).any())


def test_victims_come_back_in_their_order_whatever_the_chunks(compute: Compute) -> None:
    victims = photo_patches(3, "test")
    view = make_view(ColourMixClient(), victims, photo_patches(2), compute)
    images = DipAttack(iterations=70, channels=8, networks_at_once=2).reconstruct(view, Budget(), 0)
    errors = torch.stack([mse(images, victim.expand_as(images)) for victim in victims])
    assert errors.argmin(0).tolist() == [0, 1, 2]


def test_fitting_the_defense_s_randomness_is_not_rewarded(compute: Compute) -> None:
    """With strong noise a long fit ends up in the noise; what is returned must not."""
    victims = photo_patches(2, "test")
    view = make_view(ColourMixClient(), victims, photo_patches(2), compute, noise=0.4)
    images = DipAttack(iterations=200, channels=16).reconstruct(view, Budget(), 0)
    assert float(mse(images, victims).mean()) < 0.3 * 0.4**2
