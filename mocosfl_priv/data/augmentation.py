"""MoCo v2 augmentation (Chen et al., 2020) of a whole batch at once, with independent random parameters per image.

Views have the same distribution as those of torchvision's pipeline RandomResizedCrop(size, scale=(.08, 1)),
ColorJitter(.4, .4, .4, .1) with p .8, RandomGrayscale(.2), GaussianBlur(sigma .1 to 2) with p .5, RandomHorizontalFlip.
With given parameters, every operation equals torchvision's function on float images; tests check that. Colours are not
normalised here, since the client's first layer does that.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

CROP_SCALE = (0.08, 1.0)
CROP_RATIO = (3 / 4, 4 / 3)
CROP_ATTEMPTS = 10
JITTER_PROBABILITY = 0.8
BRIGHTNESS = CONTRAST = SATURATION = 0.4
HUE = 0.1
GREY_PROBABILITY = 0.2
BLUR_PROBABILITY = 0.5
BLUR_SIGMA = (0.1, 2.0)
BLUR_RADIUS = 4  # pixels, twice the largest sigma: MoCo blurs with PIL, which does not cut the Gaussian off early
FLIP_PROBABILITY = 0.5
GREY_WEIGHTS = (0.2989, 0.587, 0.114)  # of red, green and blue, as in torchvision


def moco_v2_view(images: Tensor, generator: torch.Generator) -> Tensor:
    """One random view of every image, by the augmentation of MoCo v2.

    Chen et al., "Improved Baselines with Momentum Contrastive Learning", 2020: crop, colour jitter, grey, blur, mirror.

    Args:
        images: uint8 (n, c, h, w), or float in [0, 1]; grey or colour. Grey images keep their hue and saturation.
        generator: on the device of `images`; each image has draws of its own.

    Returns:
        Float32 (n, c, h, w) in [0, 1].

    >>> moco_v2_view(torch.rand(2, 3, 32, 32), torch.Generator().manual_seed(0)).shape
    torch.Size([2, 3, 32, 32])
    """
    if images.dtype == torch.uint8:
        images = images.float() / 255
    n, _, height, width = images.shape
    view = resized_crop(images, sample_crops(n, height, width, generator))
    factors, order = sample_jitter(n, generator)
    view = _where(_chance(n, JITTER_PROBABILITY, generator), color_jitter, view, factors, order)
    view = _where(_chance(n, GREY_PROBABILITY, generator), _grey_image, view)
    sigma = _uniform(n, *BLUR_SIGMA, generator)
    view = _where(_chance(n, BLUR_PROBABILITY, generator), gaussian_blur, view, sigma)
    return _where(_chance(n, FLIP_PROBABILITY, generator), _flip, view)


def _where(chosen: Tensor, operation: Callable[..., Tensor], images: Tensor, *parameters: Tensor) -> Tensor:
    """Apply `operation` to the chosen images only; chosen: bool (n,), parameters: (n, ...) each. May work in place.

    On a CPU only the chosen images are computed. On an accelerator all are computed and the results selected, since
    indexing by a mask would make the host wait for the device.
    """
    if images.device.type != "cpu":
        return torch.where(chosen.view(-1, 1, 1, 1), operation(images, *parameters), images)
    index = chosen.nonzero().squeeze(1)
    if len(index):
        images[index] = operation(images[index], *(parameter[index] for parameter in parameters))
    return images


def _grey_image(images: Tensor) -> Tensor:
    return grey(images).expand(-1, images.shape[1], -1, -1)


def _flip(images: Tensor) -> Tensor:
    return images.flip(3)


def sample_crops(n: int, height: int, width: int, generator: torch.Generator) -> Tensor:
    """Draw the boxes of RandomResizedCrop: int64 (n, 4) as top, left, height, width, in pixels."""
    area = height * width * _uniform((n, CROP_ATTEMPTS), *CROP_SCALE, generator)
    ratio = torch.exp(_uniform((n, CROP_ATTEMPTS), math.log(CROP_RATIO[0]), math.log(CROP_RATIO[1]), generator))
    w = (area * ratio).sqrt().round().long()
    h = (area / ratio).sqrt().round().long()
    fits = (w > 0) & (w <= width) & (h > 0) & (h <= height)
    first = fits.int().argmax(1, keepdim=True)
    # torchvision falls back to a centre crop with the nearest allowed ratio; for square images, that is the whole image
    none = ~fits.any(1)
    fallback_w = min(width, round(height * CROP_RATIO[1]))
    fallback_h = min(height, round(width / CROP_RATIO[0]))
    w = torch.where(none, fallback_w, w.gather(1, first).squeeze(1))
    h = torch.where(none, fallback_h, h.gather(1, first).squeeze(1))
    top = (torch.rand(n, generator=generator, device=generator.device) * (height - h + 1)).long()
    left = (torch.rand(n, generator=generator, device=generator.device) * (width - w + 1)).long()
    top = torch.where(none, (height - h) // 2, top)
    left = torch.where(none, (width - w) // 2, left)
    return torch.stack([top, left, h, w], dim=1)


def resized_crop(images: Tensor, boxes: Tensor) -> Tensor:
    """Crop each image to its box and resize the crop bilinearly to the original size, in one sampling operation.

    images: float (n, c, h, w); boxes: (n, 4) as top, left, height, width, in pixels.
    """
    _, _, height, width = images.shape
    top, left, h, w = (column.to(images.dtype)[:, None] for column in boxes.unbind(1))
    y = _source_positions(height, h, top, images)
    x = _source_positions(width, w, left, images)
    grid_y = (2 * y + 1) / height - 1
    grid_x = (2 * x + 1) / width - 1
    grid = torch.stack([grid_x[:, None, :].expand(-1, height, -1), grid_y[:, :, None].expand(-1, -1, width)], dim=3)
    return F.grid_sample(images, grid, mode="bilinear", padding_mode="border", align_corners=False)


def _source_positions(size: int, length: Tensor, start: Tensor, like: Tensor) -> Tensor:
    """Positions of the output's pixel centres in the image, clamped to the box, as when the crop itself is resized."""
    centres = (torch.arange(size, dtype=like.dtype, device=like.device) + 0.5)[None, :]
    inside = (centres * length / size - 0.5).clamp(min=0)
    return start + torch.minimum(inside, length - 1)


def sample_jitter(n: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Draw the parameters of ColorJitter.

    Returns factors float (n, 4), for brightness, contrast, saturation and hue, and an order int64 (n, 4), a permutation
    of these four operations for each image.
    """
    factors = torch.stack(
        [
            _uniform(n, 1 - BRIGHTNESS, 1 + BRIGHTNESS, generator),
            _uniform(n, 1 - CONTRAST, 1 + CONTRAST, generator),
            _uniform(n, 1 - SATURATION, 1 + SATURATION, generator),
            _uniform(n, -HUE, HUE, generator),
        ],
        dim=1,
    )
    order = torch.rand((n, 4), generator=generator, device=generator.device).argsort(1)
    return factors, order


def color_jitter(images: Tensor, factors: Tensor, order: Tensor) -> Tensor:
    """Apply the four colour operations to each image in its own order; parameters as :func:`sample_jitter` returns."""
    operations = (adjust_brightness, adjust_contrast, adjust_saturation, adjust_hue)
    images = images.clone()
    for position in range(len(operations)):
        for index, operation in enumerate(operations):
            images = _where(order[:, position] == index, operation, images, factors[:, index])
    return images


def grey(images: Tensor) -> Tensor:
    """Return the luma of RGB images (n, 3, h, w), as (n, 1, h, w); grey images as they are."""
    if images.shape[1] == 1:
        return images
    weights = images.new_tensor(GREY_WEIGHTS).view(1, 3, 1, 1)
    return (images * weights).sum(1, keepdim=True)


def adjust_brightness(images: Tensor, factor: Tensor) -> Tensor:
    """Blend images (n, 3, h, w) with black; factor (n,) is the weight of the image."""
    return (images * _column(factor)).clamp(0, 1)


def adjust_contrast(images: Tensor, factor: Tensor) -> Tensor:
    """Blend images (n, 3, h, w) with their mean grey value; factor (n,) is the weight of the image."""
    return _blend(images, grey(images).mean((1, 2, 3), keepdim=True), factor)


def adjust_saturation(images: Tensor, factor: Tensor) -> Tensor:
    """Blend images (n, 3, h, w) with their grey versions; factor (n,) is the weight of the image."""
    return _blend(images, grey(images), factor)


def adjust_hue(images: Tensor, factor: Tensor) -> Tensor:
    """Rotate the hue in HSV by `factor` (n,), in fractions of the full circle; grey images have none."""
    if images.shape[1] == 1:
        return images
    red, green, blue = images.unbind(1)
    value, low = images.amax(1), images.amin(1)
    chroma = value - low
    safe = torch.where(chroma > 0, chroma, torch.ones_like(chroma))
    hue = torch.where(
        value == red,
        (green - blue) / safe,
        torch.where(value == green, 2 + (blue - red) / safe, 4 + (red - green) / safe),
    )
    hue = torch.where(chroma > 0, hue, torch.zeros_like(hue)) / 6 + factor.view(-1, 1, 1)
    # HSV to RGB in closed form: channel = value - chroma * clamp(min(k, 4 - k), 0, 1), k = (n + 6 hue) mod 6
    offsets = images.new_tensor([5.0, 3.0, 1.0]).view(1, 3, 1, 1)
    k = (offsets + 6 * hue[:, None]) % 6
    return value[:, None] - chroma[:, None] * torch.minimum(k, 4 - k).clamp(0, 1)


def gaussian_blur(images: Tensor, sigma: Tensor) -> Tensor:
    """Blur each image with its own sigma (n,), in pixels; the kernel ends at `BLUR_RADIUS`, and edges are reflected."""
    n, channels, height, _ = images.shape
    if n == 0:
        return images
    radius = BLUR_RADIUS
    offsets = torch.arange(-radius, radius + 1, device=images.device, dtype=images.dtype)
    kernel = torch.exp(-0.5 * (offsets[None, :] / sigma[:, None]) ** 2)
    kernel = (kernel / kernel.sum(1, keepdim=True)).repeat_interleave(channels, dim=0)
    padded = F.pad(images, (radius,) * 4, mode="reflect").view(1, n * channels, height + 2 * radius, -1)
    rows = F.conv2d(padded, kernel.view(n * channels, 1, 1, -1), groups=n * channels)
    return F.conv2d(rows, kernel.view(n * channels, 1, -1, 1), groups=n * channels).view_as(images)


def _blend(images: Tensor, other: Tensor, factor: Tensor) -> Tensor:
    weight = _column(factor)
    return (weight * images + (1 - weight) * other).clamp(0, 1)


def _column(factor: Tensor) -> Tensor:
    return factor.view(-1, 1, 1, 1)


def _uniform(shape: int | tuple[int, ...], low: float, high: float, generator: torch.Generator) -> Tensor:
    return torch.empty(shape, device=generator.device).uniform_(low, high, generator=generator)


def _chance(n: int, probability: float, generator: torch.Generator) -> Tensor:
    return torch.rand(n, generator=generator, device=generator.device) < probability
