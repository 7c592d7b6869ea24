"""Attacks by those who take part: the server with a shadow of the client, a participant with its own copy."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from attacks.colluder import ColluderAttack
from attacks.decoder import DecoderAttack
from attacks.shadow import ShadowAttack
from mocosfl_priv.evaluation.floor import blind_guess_floor, leak_ratio
from mocosfl_priv.evaluation.image_metrics import mse
from mocosfl_priv.inversion.feature_moments import moments
from mocosfl_priv.inversion.surrogate import (
    FitTarget,
    KnownImages,
    MessageSample,
    MomentFit,
    fit_best,
    fit_moments,
    redrawn,
)
from mocosfl_priv.plugins import Attack, AuxiliaryData, Budget
from mocosfl_priv.runtime.compute import Compute
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
    likeness = FitTarget(moments(VICTIMS), draw, lambda z: z)
    best = fit_best(clients, likeness, fit, Budget())
    assert isinstance(best, nn.Sequential)
    assert bool((best(VICTIMS) > 0).any())


def test_a_client_of_negatives_is_turned_round() -> None:
    """Images that are lighter above: that alone tells them from their negatives."""
    images = 0.5 * KNOWN + 0.5 * torch.linspace(1, 0, 16).view(16, 1)
    right, negative = (nn.Conv2d(3, 3, 1) for _ in range(2))
    for client, sign, offset in ((right, 1.0, torch.zeros(3)), (negative, -1.0, 2 * images.mean((0, 2, 3)))):
        assert client.bias is not None
        with torch.no_grad():
            client.weight.copy_(sign * torch.eye(3).view(3, 3, 1, 1))
            client.bias.copy_(offset)
    rng = torch.Generator().manual_seed(0)

    def draw(count: int) -> Tensor:
        return images[torch.randint(len(images), (count,), generator=rng)]

    likeness = FitTarget(moments(right(images)).detach(), draw, lambda z: z)
    best = fit_best([negative, copy.deepcopy(negative)], likeness, MomentFit(300, 32, 0.03), Budget())
    with torch.no_grad():
        wrong = float((best(images) - images).square().mean())  # a negative's is four variances
    assert wrong < 0.5 * float(images.var())


def test_a_limited_fit_trains_every_beginning_and_comes_to_its_end() -> None:
    """The further loss, which has the last part to itself, is met too."""
    clients = [nn.Conv2d(3, 3, 1) for _ in range(3)]
    before = [client.weight.detach().clone() for client in clients]
    asked: list[int] = []

    def further(client: nn.Module, images: Tensor) -> Tensor:
        asked.append(len(images))
        return images.mean() * 0

    budget = Budget(steps=60)
    likeness = FitTarget(moments(VICTIMS), lambda count: KNOWN[:count], lambda z: z, further)
    best = fit_best(clients, likeness, MomentFit(3000, 32, 0.02), budget)
    assert budget.steps == 60 and asked
    assert not any(torch.equal(client.weight, weight) for client, weight in zip(clients, before, strict=True))
    assert any(parameter.grad is not None for parameter in best.parameters())


def test_fits_look_at_no_images_of_another_distribution() -> None:
    other = 0.2 * white_images(len(KNOWN), 16, 0.1, seed=3)
    of_target = torch.arange(2 * len(KNOWN)) < len(KNOWN)
    known = KnownImages.of(AuxiliaryData(torch.cat([KNOWN, other]), of_target), torch.Generator().manual_seed(0))
    assert len(known.train) > len(KNOWN) > len(known.nearest)
    drawn = known.draw(torch.Generator().manual_seed(1))(500)
    assert {image.sum().item() for image in drawn} <= {image.sum().item() for image in KNOWN}


def test_who_attended_looks_at_the_victims_messages_or_at_the_last_ones_where_these_are_few(compute: Compute) -> None:
    recent = torch.zeros(40, 3, 16, 16)
    for count, looks_at_victims in ((4, False), (40, True)):
        view = make_view(ColourMixClient(GAINS), VICTIMS[:count], KNOWN, compute)
        seen = MessageSample.of(view, recent, lambda images: 1 - images)
        assert torch.equal(seen.smashed, view.smashed if looks_at_victims else recent)
        plain = {image.sum().item() for image in KNOWN}
        assert all(image.sum().item() in plain for image in seen.draw(10)) == looks_at_victims
    assert torch.equal(
        MessageSample.of(
            make_view(ColourMixClient(GAINS), VICTIMS[:4], KNOWN, compute), recent[:0], lambda images: images
        ).smashed,
        make_view(ColourMixClient(GAINS), VICTIMS[:4], KNOWN, compute).smashed,
    )


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

    fit_moments(shadow, FitTarget(moments(received), draw, lambda z: z), fit, Budget())
    with torch.no_grad():
        sent = shadow(VICTIMS)
    torch.testing.assert_close(sent.mean((0, 2, 3)), received.mean((0, 2, 3)), atol=0.03, rtol=0)
    covariances = [torch.cov(z.transpose(0, 1).flatten(1)) for z in (sent, received)]
    torch.testing.assert_close(covariances[0], covariances[1], atol=0.005, rtol=0)
