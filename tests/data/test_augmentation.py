"""Every operation against torchvision's, draw by draw; the sampling of draws against torchvision's in distribution."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from scipy.stats import ks_2samp
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as tv

from mocosfl_priv.data import augmentation as ours


@pytest.fixture
def images(rng: torch.Generator) -> torch.Tensor:
    return torch.rand((24, 3, 32, 32), generator=rng)


@pytest.mark.parametrize(
    ("operation", "reference", "column"),
    [
        (ours.adjust_brightness, tv.adjust_brightness, 0),
        (ours.adjust_contrast, tv.adjust_contrast, 1),
        (ours.adjust_saturation, tv.adjust_saturation, 2),
        (ours.adjust_hue, tv.adjust_hue, 3),
    ],
)
def test_colour_operations_equal_torchvision(operation, reference, column, images, rng) -> None:  # type: ignore[no-untyped-def]
    factors, _ = ours.sample_jitter(len(images), rng)
    expected = torch.cat([reference(x[None], float(f)) for x, f in zip(images, factors[:, column], strict=True)])
    torch.testing.assert_close(operation(images, factors[:, column]), expected, atol=1e-5, rtol=0)


def test_jitter_applies_each_image_its_own_order(images: torch.Tensor, rng: torch.Generator) -> None:
    factors, order = ours.sample_jitter(len(images), rng)
    references = (tv.adjust_brightness, tv.adjust_contrast, tv.adjust_saturation, tv.adjust_hue)
    expected = []
    for image, its_factors, its_order in zip(images, factors, order, strict=True):
        jittered = image[None]
        for index in its_order.tolist():
            jittered = references[index](jittered, float(its_factors[index]))
        expected.append(jittered[0])
    torch.testing.assert_close(ours.color_jitter(images, factors, order), torch.stack(expected), atol=1e-5, rtol=0)


def test_crop_equals_cut_and_interpolate(images: torch.Tensor, rng: torch.Generator) -> None:
    boxes = ours.sample_crops(len(images), 32, 32, rng)
    expected = torch.cat(
        [tv.resized_crop(x[None], *box, size=[32, 32]) for x, box in zip(images, boxes.tolist(), strict=True)]
    )
    torch.testing.assert_close(ours.resized_crop(images, boxes), expected, atol=1e-5, rtol=0)


def test_blur_equals_torchvision(images: torch.Tensor, rng: torch.Generator) -> None:
    sigma = torch.empty(len(images)).uniform_(0.1, 2, generator=rng)
    size = 2 * ours.BLUR_RADIUS + 1
    expected = torch.cat(
        [tv.gaussian_blur(x[None], [size, size], [float(s)]) for x, s in zip(images, sigma, strict=True)]
    )
    torch.testing.assert_close(ours.gaussian_blur(images, sigma), expected, atol=1e-5, rtol=0)


def test_crop_boxes_are_distributed_as_torchvisions(rng: torch.Generator) -> None:
    torch.manual_seed(0)
    n = 2000
    image = torch.zeros(3, 32, 32)
    crop = v2.RandomResizedCrop(32, scale=(0.08, 1))
    draws = [crop.make_params([image]) for _ in range(n)]
    reference = np.array([[draw[key] for key in ("top", "left", "height", "width")] for draw in draws])
    boxes = ours.sample_crops(n, 32, 32, rng).numpy()
    for column in range(4):
        assert ks_2samp(boxes[:, column], reference[:, column]).pvalue > 0.001


def test_views_are_distributed_as_torchvisions_pipeline(rng: torch.Generator) -> None:
    torch.manual_seed(0)
    image = torch.rand(3, 32, 32)
    n = 1500
    size = 2 * ours.BLUR_RADIUS + 1
    pipeline = v2.Compose(
        [
            v2.RandomResizedCrop(32, scale=(0.08, 1)),
            v2.RandomApply([v2.ColorJitter(0.4, 0.4, 0.4, 0.1)], p=0.8),
            v2.RandomGrayscale(0.2),
            v2.RandomApply([v2.GaussianBlur(size, (0.1, 2.0))], p=0.5),
            v2.RandomHorizontalFlip(),
        ]
    )
    reference = torch.stack([pipeline(image) for _ in range(n)])
    views = ours.moco_v2_view(image.expand(n, -1, -1, -1).clone(), rng)
    spread = [(views.amax(1) - views.amin(1)).mean((1, 2)), (reference.amax(1) - reference.amin(1)).mean((1, 2))]
    sharpness = [x.diff(dim=3).abs().mean((1, 2, 3)) for x in (views, reference)]
    asymmetry = [(x[..., :16].mean((1, 2, 3)) - x[..., 16:].mean((1, 2, 3))) for x in (views, reference)]
    brightness = [x.mean((1, 2, 3)) for x in (views, reference)]
    for a, b in (spread, sharpness, asymmetry, brightness):
        assert ks_2samp(a.numpy(), b.numpy()).pvalue > 0.001


def test_uint8_and_float_images_give_the_same_views(rng: torch.Generator) -> None:
    images = torch.randint(0, 256, (8, 3, 32, 32), dtype=torch.uint8)
    a = ours.moco_v2_view(images, torch.Generator().manual_seed(1))
    b = ours.moco_v2_view(images.float() / 255, torch.Generator().manual_seed(1))
    assert torch.equal(a, b)
    assert a.min() >= 0 and a.max() <= 1


def test_picking_afterwards_equals_computing_only_what_is_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    """The form for accelerators, which computes everything, draws and yields the same."""
    images = torch.randint(0, 256, (40, 3, 16, 16), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    masked = ours.moco_v2_view(images, torch.Generator().manual_seed(5))

    def dense(chosen: torch.Tensor, operation: Any, view: torch.Tensor, *parameters: torch.Tensor) -> torch.Tensor:
        return torch.where(chosen.view(-1, 1, 1, 1), operation(view, *parameters), view)

    monkeypatch.setattr(ours, "_where", dense)
    torch.testing.assert_close(ours.moco_v2_view(images, torch.Generator().manual_seed(5)), masked)
