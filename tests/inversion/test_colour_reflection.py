"""Reflections of colours, and the network that sees them."""

from __future__ import annotations

import pytest
import torch

from mocosfl_priv.inversion.colour_reflection import JUDGE_STEPS, Reflections, signs_of, undo_reflection
from tests.attacks.closed_form import photo_patches

KNOWN, VICTIMS = photo_patches(600), photo_patches(300, "test")


def test_reflections_keep_mean_and_covariance_and_undo_themselves() -> None:
    images = 0.45 + 0.02 * torch.randn(30, 3, 8, 8, dtype=torch.float64).cumsum(1)  # far from where it is clipped
    reflections = Reflections(images)
    for index in range(len(signs_of(3))):
        which = torch.full((len(images),), index)
        once = reflections(images, which)
        torch.testing.assert_close(reflections(once, which), images)
        for statistic in (lambda x: x.mean((0, 2, 3)), lambda x: torch.cov(x.movedim(1, 0).flatten(1))):
            torch.testing.assert_close(statistic(once), statistic(images))
    torch.testing.assert_close(reflections(images, torch.zeros(30, dtype=torch.long)), images)


# Each trains a judge; those in the middle differ from the last in the axes that are turned over only.
@pytest.mark.parametrize(
    "index",
    [pytest.param(index, marks=[pytest.mark.slow] if index in {1, 2} else []) for index in range(len(signs_of(3)))],
)
def test_negatives_are_set_right_and_photographs_left_alone(index: int) -> None:
    torch.manual_seed(0)
    reflections = Reflections(KNOWN)
    given = reflections(VICTIMS, torch.full((len(VICTIMS),), index))
    found = undo_reflection(given, KNOWN, KNOWN, range(JUDGE_STEPS), torch.Generator().manual_seed(0))
    assert float((found - VICTIMS).square().mean()) < 0.003
    if index:
        assert float((given - VICTIMS).square().mean()) > 0.02


def test_without_a_step_nothing_is_changed() -> None:
    assert torch.equal(undo_reflection(VICTIMS, KNOWN, KNOWN, range(0), torch.Generator()), VICTIMS)


def test_a_grey_image_has_its_negative_as_its_only_reflection() -> None:
    images = 0.3 + 0.02 * torch.randn(30, 1, 8, 8, dtype=torch.float64)
    assert signs_of(1) == ((1.0,), (-1.0,))
    negative = Reflections(images)(images, torch.ones(30, dtype=torch.long))
    torch.testing.assert_close(negative, 2 * images.mean() - images)
