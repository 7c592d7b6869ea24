"""Attacks against clients whose optimum is known (no attack may beat it, and a good one comes near)."""

from __future__ import annotations

import pytest
import torch

from attacks.decoder import DecoderAttack
from attacks.dip import DipAttack
from attacks.floor import Floor
from attacks.fsha import FshaAttack
from attacks.glass import GlassAttack
from attacks.rmle import RmleAttack
from attacks.sdar import SdarAttack
from attacks.unsplit import UnsplitAttack
from mocosfl_priv.evaluation.floor import blind_guess_floor, leak_ratio
from mocosfl_priv.evaluation.image_metrics import mse, psnr
from mocosfl_priv.plugins import Attack, Budget
from mocosfl_priv.runtime.compute import Compute
from tests.attacks.closed_form import (
    ColourMixClient,
    ConstantClient,
    attend,
    make_view,
    photo_patches,
    white_images,
    wiener_error,
)

DEVIATION, NOISE = 0.1, 0.05
CHANNEL = ColourMixClient((1.0, 0.5, 0.2))


def run(attack: Attack, view) -> torch.Tensor:  # type: ignore[no-untyped-def]
    torch.manual_seed(0)
    return attack.reconstruct(view, Budget(), seed=0)


@pytest.mark.parametrize(
    "attack",
    [
        RmleAttack(iterations=400, tv=0.0),
        DecoderAttack(architecture="unet_N1C16", epochs=40, shift=0),
    ],
    ids=["rmle", "decoder"],
)
def test_invertible_client_is_inverted_beyond_40_db(attack: Attack, compute: Compute) -> None:
    victims = photo_patches(32, "test")
    view = make_view(ColourMixClient(), victims, photo_patches(600), compute)
    assert float(psnr(run(attack, view), victims).mean()) > 40


@pytest.mark.parametrize(
    ("attack", "decibels"),
    [
        (GlassAttack(width=8, latent_dim=16, epochs=2, iterations=60, neighbours=0), 35),
        (DipAttack(iterations=100, channels=8), 26),
    ],
    ids=["glass", "dip"],
)
def test_priors_give_way_to_an_invertible_client(attack: Attack, decibels: float, compute: Compute) -> None:
    victims = photo_patches(8, "test")
    view = make_view(ColourMixClient(), victims, photo_patches(100), compute)
    assert float(psnr(run(attack, view), victims).mean()) > decibels


@pytest.mark.parametrize(
    "attack",
    [
        RmleAttack(iterations=60),
        RmleAttack(iterations=60, tv=0.1, starts=2),
        DecoderAttack(architecture="unet_N1C16", epochs=6),
        Floor(),
        DipAttack(iterations=10, channels=8),
        GlassAttack(width=8, latent_dim=8, epochs=2, iterations=10, neighbours=0),
        UnsplitAttack(iterations=10),
    ],
    ids=["rmle", "rmle-starts", "decoder", "floor", "dip", "glass", "unsplit"],
)
def test_nothing_comes_out_of_a_client_that_destroys_everything(attack: Attack, compute: Compute) -> None:
    """Would catch any leak from victims to the attacker that does not pass through the smashed data."""
    victims, known = photo_patches(64, "test"), photo_patches(300)
    view = make_view(ConstantClient(), victims, known, compute)
    error = mse(run(attack, view), victims)
    assert leak_ratio(error, blind_guess_floor(known, victims).mse) < 0.02


@pytest.mark.parametrize(
    "attack",
    [
        FshaAttack("res_normN0C8", epochs=4, starts=1, iterations=60),
        SdarAttack("res_normN0C8", epochs=4, starts=1, iterations=60),
    ],
    ids=["fsha", "sdar"],
)
def test_nothing_comes_out_of_observing_such_a_client_but_the_blind_guess(attack: Attack, compute: Compute) -> None:
    victims, known = photo_patches(64, "test"), photo_patches(300)
    listener = attend(attack, ConstantClient(), photo_patches(48), known, compute)
    error = mse(run(attack, make_view(ConstantClient(), victims, known, compute, listener=listener)), victims)
    assert -0.25 < leak_ratio(error, blind_guess_floor(known, victims).mse) < 0.02


@pytest.mark.parametrize("name", ["rmle", "decoder"])
def test_gaussian_channel_is_inverted_near_the_wiener_optimum_and_never_below(name: str, compute: Compute) -> None:
    optimum = wiener_error(CHANNEL, DEVIATION, NOISE)
    victims = white_images(150, 16, DEVIATION, seed=1)
    view = make_view(CHANNEL, victims, white_images(600, 16, DEVIATION, seed=2), compute, NOISE)
    if name == "rmle":  # the quadratic prior that makes its optimum the posterior mean
        scale = float(view.smashed.square().mean())
        attack: Attack = RmleAttack(iterations=300, learning_rate=0.05, tv=0.0, l2=NOISE**2 / DEVIATION**2 / scale)
    else:
        attack = DecoderAttack(architecture="unet_N1C16", epochs=40)
    error = float(mse(run(attack, view), victims).mean())
    # 150 x 768 elements: the sample error of the optimum itself varies by well under 2 percent
    assert 0.98 * optimum < error < 1.10 * optimum


@pytest.mark.parametrize(
    "attack",
    [
        DipAttack(iterations=60, channels=8),
        GlassAttack(width=8, latent_dim=8, epochs=1, iterations=40, neighbours=0),
    ],
    ids=["dip", "glass"],
)
def test_priors_of_images_do_not_beat_the_wiener_optimum_of_white_noise(attack: Attack, compute: Compute) -> None:
    """White images have no structure that such a prior could use; still it must give more than a blind guess."""
    victims = white_images(20, 16, DEVIATION, seed=1)
    view = make_view(CHANNEL, victims, white_images(100, 16, DEVIATION, seed=2), compute, NOISE)
    error = float(mse(run(attack, view), victims).mean())
    assert 0.97 * wiener_error(CHANNEL, DEVIATION, NOISE) < error < DEVIATION**2


def test_total_variation_weight_is_chosen_on_the_attackers_own_images(compute: Compute) -> None:
    noisy = make_view(ColourMixClient(), photo_patches(24, "test"), photo_patches(200), compute, noise=0.4)
    victims = photo_patches(24, "test")
    errors = {
        tv: float(mse(run(RmleAttack(iterations=80, tv=tv), noisy), victims).mean()) for tv in (None, 0.001, 0.01, 0.1)
    }
    assert errors[None] <= 1.05 * min(errors[tv] for tv in (0.001, 0.01, 0.1))
