"""MoCo v2 augmentation (Chen et al., 2020) on a device, image by image, with NumPy only.

It has the same operations and distributions as `data.augmentation` of simulated clients. Images are float32 (3, h, w)
in [0, 1] unless stated otherwise.
"""

from __future__ import annotations

import math

import numpy as np

CROP_SCALE = (0.08, 1.0)
CROP_RATIO = (3 / 4, 4 / 3)
CROP_ATTEMPTS = 10
JITTER_PROBABILITY = 0.8
BRIGHTNESS = CONTRAST = SATURATION = 0.4
HUE = 0.1
GREY_PROBABILITY = 0.2
BLUR_PROBABILITY = 0.5
BLUR_SIGMA = (0.1, 2.0)
BLUR_RADIUS = 4
FLIP_PROBABILITY = 0.5
GREY_WEIGHTS = np.array([0.2989, 0.587, 0.114], np.float32)


def two_views(images: np.ndarray, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Return two random views of every image, float32 (n, 3, h, w) in [0, 1] each; images: uint8 (n, 3, h, w)."""
    return moco_v2_views(images, rng), moco_v2_views(images, rng)


def moco_v2_views(images: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Return a random view of every image, float32 (n, 3, h, w) in [0, 1]; images: uint8 (n, 3, h, w)."""
    views = np.empty(images.shape, np.float32)
    for view, image in zip(views, images, strict=True):
        view[:] = _view(image.astype(np.float32) / 255, rng)
    return views


def _view(image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    _, height, width = image.shape
    image = resized_crop(image, sample_crop(height, width, rng))
    if rng.random() < JITTER_PROBABILITY:
        image = color_jitter(image, *sample_jitter(rng))
    if rng.random() < GREY_PROBABILITY:
        image = np.broadcast_to(grey(image), image.shape)
    if rng.random() < BLUR_PROBABILITY:
        image = gaussian_blur(image, rng.uniform(*BLUR_SIGMA))
    return image[:, :, ::-1] if rng.random() < FLIP_PROBABILITY else image


def sample_crop(height: int, width: int, rng: np.random.Generator) -> tuple[int, int, int, int]:
    """Draw a box (top, left, height, width) as torchvision's RandomResizedCrop does."""
    for _ in range(CROP_ATTEMPTS):
        area = height * width * rng.uniform(*CROP_SCALE)
        ratio = math.exp(rng.uniform(math.log(CROP_RATIO[0]), math.log(CROP_RATIO[1])))
        w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < w <= width and 0 < h <= height:
            return int(rng.integers(height - h + 1)), int(rng.integers(width - w + 1)), h, w
    w, h = min(width, round(height * CROP_RATIO[1])), min(height, round(width / CROP_RATIO[0]))
    return (height - h) // 2, (width - w) // 2, h, w


def resized_crop(image: np.ndarray, box: tuple[int, int, int, int]) -> np.ndarray:
    """Crop to the box (top, left, height, width) and resize bilinearly to the size of the image."""
    top, left, h, w = box
    cut = image[:, top : top + h, left : left + w]
    above, below, weight = _neighbours(image.shape[1], h)
    rows = cut[:, above] * (1 - weight)[:, None] + cut[:, below] * weight[:, None]
    before, behind, weight = _neighbours(image.shape[2], w)
    return rows[:, :, before] * (1 - weight) + rows[:, :, behind] * weight


def _neighbours(size: int, length: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """For linear interpolation: the two input indices between which each output pixel lies, and the second's weight."""
    place = ((np.arange(size, dtype=np.float32) + np.float32(0.5)) * np.float32(length / size) - np.float32(0.5)).clip(
        0, length - 1
    )
    first = place.astype(np.int64)
    return first, np.minimum(first + 1, length - 1), place - first.astype(np.float32)


def sample_jitter(rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Draw the factors (4,) for brightness, contrast, saturation and hue, and the order (4,) of these operations."""
    low = np.array([1 - BRIGHTNESS, 1 - CONTRAST, 1 - SATURATION, -HUE])
    high = np.array([1 + BRIGHTNESS, 1 + CONTRAST, 1 + SATURATION, HUE])
    return rng.uniform(low, high).astype(np.float32), rng.permutation(4)


def color_jitter(image: np.ndarray, factors: np.ndarray, order: np.ndarray) -> np.ndarray:
    """Change brightness, contrast, saturation and hue by `factors` (4,), in the given order (4,)."""
    operations = (adjust_brightness, adjust_contrast, adjust_saturation, adjust_hue)
    for index in order:
        image = operations[int(index)](image, factors[index])
    return image


def grey(image: np.ndarray) -> np.ndarray:
    """Return the luma of an image, (1, h, w)."""
    return np.tensordot(GREY_WEIGHTS, image, 1)[None]


def adjust_brightness(image: np.ndarray, factor: np.floating) -> np.ndarray:
    """Blend with black."""
    return (factor * image).clip(0, 1)


def adjust_contrast(image: np.ndarray, factor: np.floating) -> np.ndarray:
    """Blend with the image's mean grey."""
    return (factor * image + (1 - factor) * grey(image).mean(dtype=np.float32)).clip(0, 1)


def adjust_saturation(image: np.ndarray, factor: np.floating) -> np.ndarray:
    """Blend with the grey image."""
    return (factor * image + (1 - factor) * grey(image)).clip(0, 1)


def adjust_hue(image: np.ndarray, factor: np.floating) -> np.ndarray:
    """Rotate the hue by `factor` of a full circle, in HSV."""
    red, green, blue = image
    value = image.max(0)
    chroma = value - image.min(0)
    coloured = chroma > 0
    safe = np.where(coloured, chroma, np.float32(1))
    sector = np.where(
        value == red,
        (green - blue) / safe,
        np.where(value == green, 2 + (blue - red) / safe, 4 + (red - green) / safe),
    )
    hue = np.where(coloured, sector, np.float32(0)) / 6 + factor
    # HSV to RGB in closed form: channel = value - chroma * clip(min(k, 4 - k), 0, 1), k = (n + 6 hue) mod 6
    k = (np.array([5, 3, 1], np.float32)[:, None, None] + 6 * hue) % 6
    return value - chroma * np.minimum(k, 4 - k).clip(0, 1)


def gaussian_blur(image: np.ndarray, sigma: float) -> np.ndarray:
    """Blur with a Gaussian of `sigma` pixels, truncated at `BLUR_RADIUS`; edges are padded by reflection."""
    offsets = np.arange(-BLUR_RADIUS, BLUR_RADIUS + 1)
    kernel = np.exp(-0.5 * (offsets / sigma) ** 2)
    kernel = (kernel / kernel.sum()).astype(np.float32)
    for axis in (1, 2):
        margin = [(0, 0)] * 3
        margin[axis] = (BLUR_RADIUS, BLUR_RADIUS)
        windows = np.lib.stride_tricks.sliding_window_view(np.pad(image, margin, "reflect"), len(kernel), axis)
        image = windows @ kernel
    return image
