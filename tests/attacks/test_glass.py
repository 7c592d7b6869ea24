from __future__ import annotations

from pathlib import Path

import pytest
import torch

from attacks.glass import GlassAttack
from mocosfl_priv.errors import ConfigurationError
from mocosfl_priv.evaluation.image_metrics import mse
from mocosfl_priv.inversion.generator import VariationalAutoencoder
from mocosfl_priv.plugins import Budget
from mocosfl_priv.runtime.compute import Compute
from tests.attacks.closed_form import ColourMixClient, make_view, photo_patches

OWN_GENERATOR = """
import torch
from torch import nn


class Ramps(nn.Module):
    latent_dim = 4

    def forward(self, latent):
        y, x = torch.meshgrid(torch.linspace(-1, 1, 16), torch.linspace(-1, 1, 16), indexing="ij")
        basis = torch.stack([torch.ones_like(x), x, y, x * y])
        return torch.sigmoid(torch.einsum("nk,khw->nhw", latent, basis))[:, None].expand(-1, 3, -1, -1)


def ramps(image_shape):
    return Ramps()


def outside(image_shape):
    generator = nn.Sequential(nn.Linear(4, 768), nn.Unflatten(1, image_shape), nn.Threshold(9.0, 2.0))
    generator.latent_dim = 4
    return generator


def nameless(image_shape):
    return nn.Linear(4, 768)


def small(image_shape):
    generator = nn.Sequential(nn.Linear(4, 48), nn.Sigmoid(), nn.Unflatten(1, (3, 4, 4)))
    generator.latent_dim = 4
    return generator
"""


@pytest.fixture
def own(tmp_path: Path) -> str:
    path = tmp_path / "own_generator.py"
    path.write_text(OWN_GENERATOR)
    return str(path)


def test_the_latent_behind_a_victim_is_found_with_a_generator_of_ones_own(own: str, compute: Compute) -> None:
    y, x = torch.meshgrid(torch.linspace(-1, 1, 16), torch.linspace(-1, 1, 16), indexing="ij")
    victims = torch.stack([torch.sigmoid(x), torch.sigmoid(y - 0.5), torch.sigmoid(x * y)])[:, None].repeat(1, 3, 1, 1)
    # noise far above what pixels could be told from: only the generator's four numbers can be estimated well
    view = make_view(ColourMixClient(), victims, photo_patches(40), compute, noise=0.3)
    images = GlassAttack(f"{own}:ramps", iterations=60).reconstruct(view, Budget(), 0)
    assert float(mse(images, victims).mean()) < 0.1 * 0.3**2


@pytest.mark.parametrize(
    ("function", "message"),
    [
        ("outside", "values outside the range"),
        ("nameless", "latent_dim"),
        ("small", "not images of"),
        ("smal", "did you mean"),
    ],
)
def test_unfit_generators_are_refused(own: str, function: str, message: str, compute: Compute) -> None:
    view = make_view(ColourMixClient(), photo_patches(2, "test"), photo_patches(20), compute)
    with pytest.raises(ConfigurationError, match=message):
        GlassAttack(f"{own}:{function}", iterations=1).reconstruct(view, Budget(), 0)


def test_too_few_auxiliary_images_is_said(compute: Compute) -> None:
    view = make_view(ColourMixClient(), photo_patches(2, "test"), photo_patches(20)[:1], compute)
    with pytest.raises(ConfigurationError, match="at least two auxiliary images"):
        GlassAttack().reconstruct(view, Budget(), 0)


def test_the_autoencoder_learns_images(rng: torch.Generator) -> None:
    images = photo_patches(64)
    torch.manual_seed(0)
    autoencoder = VariationalAutoencoder(8, 8, (3, 16, 16))
    optimiser = torch.optim.Adam(autoencoder.parameters(), lr=5e-3)
    for _ in range(60):
        optimiser.zero_grad()
        autoencoder.loss(images, rng).backward()
        optimiser.step()
    with torch.no_grad():
        drawn = autoencoder.generator(autoencoder.encode(images)[0])
    blind = mse(images.mean(0).expand_as(images), images).mean()
    assert float(mse(drawn, images).mean()) < 0.5 * float(blind)
