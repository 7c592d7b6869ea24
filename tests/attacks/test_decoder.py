from __future__ import annotations

import pytest
import torch

from attacks.decoder import DecoderAttack
from mocosfl_priv.errors import ConfigurationError, RunFailedError
from mocosfl_priv.evaluation.image_metrics import mse
from mocosfl_priv.inversion.decoder_training import Standardise, batch_size_for, flip_and_shift
from mocosfl_priv.plugins import AuxiliaryData, Budget, Capability
from mocosfl_priv.runtime.compute import Compute
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


def test_every_step_meets_fresh_noise_though_encodings_are_reused(compute: Compute) -> None:
    view = make_view(ColourMixClient(), photo_patches(4, "test"), photo_patches(60), compute, noise=0.1)
    sent: list[torch.Tensor] = []
    encoded: list[torch.Tensor] = []
    original = view.protect

    def recording(smashed: torch.Tensor) -> torch.Tensor:
        encoded.append(smashed)
        sent.append(original(smashed))
        return sent[-1]

    view.protect = recording  # type: ignore[method-assign]
    DecoderAttack(architecture="unet_N1C8", epochs=2, batch_size=60, flip=False, shift=0).reconstruct(view, Budget(), 0)
    steps = [i for i, z in enumerate(encoded) if len(z) == 54]
    assert any(torch.equal(encoded[i].sort(0).values, encoded[j].sort(0).values) for i in steps for j in steps if i < j)
    assert not any(torch.equal(a, b) for a in sent for b in sent if a is not b and a.shape == b.shape)
    assert view.queries == 0  # with the weights, everything is computed at home


def test_without_weights_every_message_is_a_query(compute: Compute) -> None:
    visible = frozenset({Capability.QUERY, Capability.AUXILIARY_DATA})
    view = make_view(ColourMixClient(), photo_patches(4, "test"), photo_patches(60), compute, 0.1, visible)
    DecoderAttack(architecture="unet_N1C8", epochs=4, reuse=2).reconstruct(view, Budget(), 0)
    assert view.queries >= 2 * 54


def test_too_few_auxiliary_images_is_said(compute: Compute) -> None:
    view = make_view(ColourMixClient(), photo_patches(4, "test"), photo_patches(60)[:1], compute)
    with pytest.raises(ConfigurationError, match="at least two auxiliary images"):
        DecoderAttack(architecture="res_normN0C8").reconstruct(view, Budget(), 0)


def test_the_paper_preset_is_the_published_attack_and_gives_way_to_what_is_written_out() -> None:
    paper = DecoderAttack(preset="paper")
    assert (paper.architecture, paper.norm, paper.epochs) == ("ressfl_N4C64", "batch", 50)
    assert (paper.target_images, paper.source_images, paper.learning_rate) == (500, 0, 1e-3)
    assert not (paper.one_cycle or paper.standardise)
    assert paper.batch_size == 32
    assert paper.flip and paper.shift == 4 and paper.reuse == paper.validations == paper.epochs  # augmented once
    assert DecoderAttack(preset="paper", shift=2, epochs=3, standardise=True).standardise
    assert DecoderAttack(preset="paper", shift=2, epochs=3).epochs == 3


def test_without_a_step_the_answer_is_the_ridge_regression(compute: Compute) -> None:
    truth = photo_patches(4, "test")
    view = make_view(ColourMixClient(), truth, photo_patches(60), compute)
    budget = Budget(seconds=1e-9)
    found = DecoderAttack().reconstruct(view, budget, 0)
    assert budget.steps == 0
    assert float(mse(found, truth).mean()) < 1e-3 < float(truth.var())


def test_a_beginning_that_training_spoils_is_what_is_used(compute: Compute) -> None:
    truth = photo_patches(4, "test")
    view = make_view(ColourMixClient(), truth, photo_patches(60), compute)
    spoiled = DecoderAttack(learning_rate=0.1, one_cycle=False, steps=10).reconstruct(view, Budget(), 0)
    assert float(mse(spoiled, truth).mean()) < 1e-3


def test_messages_that_are_not_finite_are_a_failure_with_a_cause(compute: Compute) -> None:
    view = make_view(ColourMixClient(), photo_patches(4, "test"), photo_patches(60) * float("nan"), compute)
    with pytest.raises(RunFailedError, match="not finite"):
        DecoderAttack().reconstruct(view, Budget(), 0)


@pytest.mark.parametrize(("images", "batch_size"), [(2, 16), (450, 16), (700, 21), (1024, 32), (50_000, 32)])
def test_few_images_are_learned_in_smaller_batches_where_time_is_short(images: int, batch_size: int) -> None:
    assert batch_size_for(images, Budget(seconds=5)) == batch_size
    assert batch_size_for(images, Budget(steps=5)) == batch_size_for(images, Budget()) == 32


@pytest.mark.parametrize(("given", "limit", "batch_size"), [(None, 0.5, 16), (None, None, 32), (10, 0.5, 10)])
def test_batches_have_the_size_that_goes_with_the_limit(
    given: int | None, limit: float | None, batch_size: int, compute: Compute
) -> None:
    view = make_view(ColourMixClient(), photo_patches(4, "test"), photo_patches(60), compute)
    protect, sent = view.protect, []

    def recording(smashed: torch.Tensor) -> torch.Tensor:
        sent.append(len(smashed))
        return protect(smashed)

    view.protect = recording  # type: ignore[method-assign]
    DecoderAttack(batch_size=given, steps=3).reconstruct(view, Budget(seconds=limit), 0)
    assert batch_size in sent
    assert not {10, 16, 32}.difference({batch_size}) & set(sent)


def test_auxiliary_images_are_limited_by_kind(compute: Compute) -> None:
    images = photo_patches(60)
    auxiliary = AuxiliaryData(images, torch.arange(60) < 40)
    attack = DecoderAttack(target_images=7, source_images=0)
    known = attack.knowledge(auxiliary, torch.Generator().manual_seed(0))
    assert len(known) == 7 and bool(known.of_target.all())
    assert len(DecoderAttack().knowledge(auxiliary, torch.Generator())) == 60
