"""Every operation against the server side's, draw by draw; draws and whole views against it in distribution."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from scipy.stats import ks_2samp

from mocosfl_priv.data import augmentation as theirs
from mocosfl_priv.device import augmentation as ours

SIGNIFICANCE = 0.001  # of each test; seeds are fixed, so none fails by chance from run to run


@pytest.fixture
def image() -> np.ndarray:
    return np.random.default_rng(5).random((3, 32, 32), dtype=np.float32)


@pytest.mark.parametrize("name", ["adjust_brightness", "adjust_contrast", "adjust_saturation", "adjust_hue"])
def test_colour_operations_are_the_servers(name: str, image: np.ndarray) -> None:
    image[:, :4] = image[:1, :4]  # grey pixels have no hue
    for factor in (np.float32(-0.1), np.float32(0.07), np.float32(0.6), np.float32(1.4)):
        expected = getattr(theirs, name)(torch.from_numpy(image)[None], torch.tensor([factor]))[0].numpy()
        np.testing.assert_allclose(getattr(ours, name)(image, factor), expected, atol=1e-5)


def test_jitter_keeps_the_drawn_order(image: np.ndarray) -> None:
    rng = np.random.default_rng(1)
    for _ in range(20):
        factors, order = ours.sample_jitter(rng)
        expected = theirs.color_jitter(
            torch.from_numpy(image)[None], torch.from_numpy(factors)[None], torch.from_numpy(order)[None]
        )
        np.testing.assert_allclose(ours.color_jitter(image, factors, order), expected[0].numpy(), atol=1e-5)


@pytest.mark.parametrize("side", [32, 17])
def test_crop_and_blur_are_the_servers(side: int, image: np.ndarray) -> None:
    image = image[:, :side]
    rng = np.random.default_rng(2)
    boxes = [ours.sample_crop(side, 32, rng) for _ in range(30)] + [(0, 0, 1, 1), (3, 5, 1, 9)]
    for box in boxes:
        expected = theirs.resized_crop(torch.from_numpy(image)[None], torch.tensor([box]))[0].numpy()
        np.testing.assert_allclose(ours.resized_crop(image, box), expected, atol=1e-5)
    for sigma in (0.1, 0.5, 2.0):
        expected = theirs.gaussian_blur(torch.from_numpy(image)[None].contiguous(), torch.tensor([sigma]))[0].numpy()
        np.testing.assert_allclose(ours.gaussian_blur(image, sigma), expected, atol=1e-5)


def test_draws_are_distributed_as_the_servers(rng: torch.Generator) -> None:
    n = 3000
    numbers = np.random.default_rng(3)
    boxes = np.array([ours.sample_crop(32, 32, numbers) for _ in range(n)])
    expected = theirs.sample_crops(n, 32, 32, rng).numpy()
    jitter = [ours.sample_jitter(numbers) for _ in range(n)]
    factors, order = theirs.sample_jitter(n, rng)
    for found, wanted in (
        (boxes, expected),
        (np.array([f for f, _ in jitter]), factors.numpy()),
        (np.array([o for _, o in jitter]), order.numpy()),
    ):
        for column in range(4):
            assert ks_2samp(found[:, column], wanted[:, column]).pvalue > SIGNIFICANCE


def test_views_are_distributed_as_the_servers(rng: torch.Generator) -> None:
    pixels = np.random.default_rng(4).integers(0, 256, (3, 32, 32), dtype=np.uint8)
    images = np.repeat(pixels[None], 1500, axis=0)
    found = ours.moco_v2_views(images, np.random.default_rng(0))
    wanted = theirs.moco_v2_view(torch.from_numpy(images), rng).numpy()
    assert found.dtype == np.float32 and found.min() >= 0 and found.max() <= 1
    statistics: list[Callable[[np.ndarray], np.ndarray]] = [
        lambda x: x.mean((1, 2, 3)),
        lambda x: x.std((1, 2, 3)),
        lambda x: (x.max(1) - x.min(1)).mean((1, 2)),  # colourfulness
        lambda x: np.abs(np.diff(x, axis=3)).mean((1, 2, 3)),  # sharpness
        lambda x: x[..., :16].mean((1, 2, 3)) - x[..., 16:].mean((1, 2, 3)),
        lambda x: x[:, 0].mean((1, 2)) - x[:, 2].mean((1, 2)),
        lambda x: x[:, 1, 3, 28],
    ]
    for statistic in statistics:
        assert ks_2samp(statistic(found), statistic(wanted)).pvalue > SIGNIFICANCE


def test_two_views_differ_and_follow_the_seed() -> None:
    images = np.random.default_rng(6).integers(0, 256, (5, 3, 16, 16), dtype=np.uint8)
    first, second = ours.two_views(images, np.random.default_rng(1))
    again, _ = ours.two_views(images, np.random.default_rng(1))
    assert np.array_equal(first, again)
    assert (np.abs(first - second).max((1, 2, 3)) > 0.01).all()
