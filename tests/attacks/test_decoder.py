from __future__ import annotations

import pytest
import torch

from attacks.decoder import DecoderAttack, Standardise, flip_and_shift
from mocosfl_priv.compute import Compute
from mocosfl_priv.errors import ConfigurationError
from mocosfl_priv.threat import Budget
from tests.attacks.closed_form import ColourMixClient, make_view, photo_patches


def test_standardise_by_channel_and_dead_channels_stay_finite() -> None:
    smashed = torch.randn(50, 3, 4, 4) * torch.tensor([1.0, 20.0, 0.0]).view(1, 3, 1, 1) + 5
    out = Standardise(smashed)(smashed)
    torch.testing.assert_close(out.mean((0, 2, 3)), torch.zeros(3), atol=1e-4, rtol=0)
    torch.testing.assert_close(out.std((0, 2, 3)), torch.tensor([1.0, 1.0, 0.0]), atol=1e-3, rtol=0)


def test_flips_and_shifts_move_whole_images(rng: torch.Generator) -> None:
    image = torch.rand(1, 3, 12, 12)
    moved = flip_and_shift(image.expand(64, -1, -1, -1), 2, rng)
    padded = torch.nn.functional.pad(image, (2,) * 4, mode="reflect")[0]
    mirrored = torch.nn.functional.pad(image.flip(3), (2,) * 4, mode="reflect")[0]
    candidates = [p[:, y : y + 12, x : x + 12] for p in (padded, mirrored) for y in range(5) for x in range(5)]
    found = {next(i for i, c in enumerate(candidates) if torch.equal(c, one)) for one in moved}
    assert len(found) > 20
    assert torch.equal(flip_and_shift(image, 0, torch.Generator().manual_seed(1)).sum(), image.sum())


def test_every_step_meets_fresh_noise(compute: Compute) -> None:
    view = make_view(ColourMixClient(), photo_patches(4, "test"), photo_patches(60), compute, noise=0.1)
    answers: list[torch.Tensor] = []
    original = view.query

    def recording(images: torch.Tensor) -> torch.Tensor:
        answers.append(original(images))
        return answers[-1]

    view.query = recording  # type: ignore[method-assign]
    DecoderAttack("res_normN0C8", epochs=2, batch_size=60, shift=0).reconstruct(view, Budget(), 0)
    assert view.queries >= 2 * 54
    assert len(answers) >= 4
    assert not any(torch.equal(a, b) for a in answers for b in answers if a is not b and a.shape == b.shape)


def test_too_few_auxiliary_images_is_said(compute: Compute) -> None:
    view = make_view(ColourMixClient(), photo_patches(4, "test"), photo_patches(60)[:1], compute)
    with pytest.raises(ConfigurationError, match="at least two auxiliary images"):
        DecoderAttack("res_normN0C8").reconstruct(view, Budget(), 0)
