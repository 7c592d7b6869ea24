"""Attacks by those who take part: the server with a shadow of the client, a participant with its own copy."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from attacks.colluder import ColluderAttack
from attacks.decoder import DecoderAttack
from attacks.shadow import ShadowAttack
from mocosfl_priv.compute import Compute
from mocosfl_priv.evaluation.floor import blind_guess_floor, leak_ratio
from mocosfl_priv.evaluation.image_metrics import mse
from mocosfl_priv.models.moments import moments
from mocosfl_priv.plugins import Attack
from mocosfl_priv.surrogate import Likeness, MomentFit, fit_best, fit_moments, redrawn
from mocosfl_priv.threat import Budget
from tests.attacks.closed_form import (
    ColourMixClient,
    ConstantClient,
    make_view,
    photo_patches,
    untrained_mix,
    white_images,
    wiener_error,
)

SMALL: dict[str, Any] = {"architecture": "res_normN0C16", "epochs": 12, "learning_rate": 0.01, "ssim_weight": 0.0}
VICTIMS, KNOWN = photo_patches(32, "test"), photo_patches(240)
GAINS = (1.0, 0.7, 0.5)


def mix_of(matrix: Tensor) -> nn.Module:
    """A trainable client that mixes colours by `matrix` (3, 3)."""
    mix = untrained_mix()
    with torch.no_grad():
        mix.weight.copy_(matrix.view(3, 3, 1, 1))
    return mix.requires_grad_(False)


def leak(attack: Attack, view) -> float:  # type: ignore[no-untyped-def]
    torch.manual_seed(0)
    return leak_ratio(mse(attack.reconstruct(view, Budget(), 0), VICTIMS), blind_guess_floor(KNOWN, VICTIMS).mse)


def test_a_colluder_with_the_victims_model_has_the_decoder_attack(compute: Compute) -> None:
    view = make_view(ColourMixClient(GAINS), VICTIMS, KNOWN, compute)
    decoder, colluder = leak(DecoderAttack(**SMALL), view), leak(ColluderAttack(**SMALL), view)
    assert colluder > 0.8 and colluder == pytest.approx(decoder, abs=0.06)


def test_a_copy_that_drifted_apart_is_fitted_and_still_leaks(compute: Compute) -> None:
    matrix = ColourMixClient(GAINS).get_buffer("matrix")
    other = matrix + 0.4 * torch.randn((3, 3), generator=torch.Generator().manual_seed(3))
    apart = make_view(mix_of(matrix), VICTIMS, KNOWN, compute, colluder=mix_of(other))
    equal = make_view(mix_of(matrix), VICTIMS, KNOWN, compute)
    attack = ColluderAttack(**SMALL, iterations=150, fit_rate=0.03)
    assert 0.5 < leak(attack, apart) < leak(attack, equal) + 0.03
    unfitted = ColluderAttack(**SMALL, iterations=1, fit_rate=1e-9)
    assert leak(unfitted, apart) < leak(attack, apart) - 0.03


def colour_gains(gains: tuple[float, float, float], offset: float = 0.0) -> nn.Module:
    """A trainable client that scales every colour by itself; covariances tell which ones it turns over."""
    client = nn.Conv2d(3, 3, 1, groups=3)
    assert client.bias is not None
    with torch.no_grad():
        client.weight.copy_(torch.tensor(gains).view(3, 1, 1, 1))
        client.bias.fill_(offset)
    return client


def test_a_shadow_finds_what_moments_determine_without_a_query(compute: Compute) -> None:
    client = colour_gains((0.2, -1.5, 0.6), 0.5).requires_grad_(False)
    view = make_view(client, VICTIMS, KNOWN, compute, clone=lambda: colour_gains((1.0, 1.0, 1.0)))
    untrained = ShadowAttack(**SMALL, starts=1, iterations=1, fit_rate=1e-9)
    assert leak(ShadowAttack(**SMALL, starts=1, iterations=300, fit_rate=0.1), view) > 0.7 > leak(untrained, view)
    assert view.queries == 0


def test_of_several_shadows_the_one_that_fits_goes_on() -> None:
    clients = [nn.Sequential(nn.Conv2d(3, 3, 1), nn.ReLU()) for _ in range(3)]
    for place, client in enumerate(clients):
        bias = client[0].bias
        assert isinstance(bias, Tensor)
        with torch.no_grad():
            bias.fill_(0.5 if place == 1 else -50.0)  # all but the second are dead, and stay so
    rng = torch.Generator().manual_seed(0)

    def draw(count: int) -> Tensor:
        return KNOWN[torch.randint(len(KNOWN), (count,), generator=rng)]

    fit = MomentFit(80, 32, 0.02)
    likeness = Likeness(moments(VICTIMS), draw, lambda z: z)
    assert fit_best(clients, likeness, fit, iter(range(80))) is clients[1]


def test_redrawn_weights_have_the_same_scale_and_nothing_else_in_common() -> None:
    client = nn.Conv2d(16, 16, 3)
    before, bias = client.weight.detach().clone(), client.bias
    redrawn(client, torch.Generator().manual_seed(0))
    after = client.weight.detach()
    assert float(after.std()) == pytest.approx(float(before.std()), rel=0.1) and client.bias is bias
    assert abs(float(torch.corrcoef(torch.stack([before.flatten(), after.flatten()]))[0, 1])) < 0.1


@pytest.mark.parametrize("cls", [ColluderAttack, ShadowAttack])
def test_nothing_comes_out_of_a_client_that_destroys_everything(cls: type[Attack], compute: Compute) -> None:
    view = make_view(ConstantClient(), VICTIMS, KNOWN, compute)
    assert leak(cls(architecture="res_normN0C8", epochs=2, iterations=40), view) < 0.02  # type: ignore[call-arg]


def test_a_colluder_stays_above_the_wiener_optimum_and_near_it(compute: Compute) -> None:
    client, deviation, noise = ColourMixClient((1.0, 0.5, 0.2)), 0.1, 0.05
    victims = white_images(100, 16, deviation, seed=1)
    view = make_view(client, victims, white_images(300, 16, deviation, seed=2), compute, noise)
    torch.manual_seed(0)
    error = float(mse(ColluderAttack(**SMALL, iterations=1).reconstruct(view, Budget(), 0), victims).mean())
    assert 0.98 * wiener_error(client, deviation, noise) < error < 1.15 * wiener_error(client, deviation, noise)


def test_fitted_messages_have_the_moments_of_those_received(compute: Compute) -> None:
    client = ColourMixClient(GAINS)
    shadow = untrained_mix()
    received = client(VICTIMS)
    rng, fit = torch.Generator(), MomentFit(600, 48, 0.05)

    def draw(count: int) -> Tensor:
        return VICTIMS[torch.randint(len(VICTIMS), (count,), generator=rng)]

    fit_moments(shadow, Likeness(moments(received), draw, lambda z: z), fit, iter(range(600)))
    with torch.no_grad():
        sent = shadow(VICTIMS)
    torch.testing.assert_close(sent.mean((0, 2, 3)), received.mean((0, 2, 3)), atol=0.03, rtol=0)
    covariances = [torch.cov(z.transpose(0, 1).flatten(1)) for z in (sent, received)]
    torch.testing.assert_close(covariances[0], covariances[1], atol=0.005, rtol=0)
