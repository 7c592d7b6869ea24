"""Arrays as images: which axis is which, and what their numbers mean, decided safely or refused in one line."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from mocosfl_priv.device.pictures import FULL_16, Reading, Size, fit
from mocosfl_priv.errors import ConfigurationError

CHANNELS = (1, 3)
PER_PASS = 1024  # images converted at once, so that the float64 copy of a large array does not fill the memory
LUMA = np.array([19595, 38470, 7471], np.uint32)  # Pillow's weights of RGB in grey, times 2^16
THREE = 3


def as_array(values: Any, where: str) -> np.ndarray:
    """Return `values`, an array or a tensor on any device, as a numpy array.

    Raises:
        ConfigurationError: it holds objects, or numbers of a kind that images do not have.

    """
    if hasattr(values, "detach"):
        tensor = values.detach().cpu()
        if tensor.is_quantized or tensor.is_sparse:
            raise ConfigurationError(f"{where}: a quantised or sparse tensor holds no images; make it dense")
        values = tensor.float().numpy() if str(tensor.dtype) in ("torch.bfloat16", "torch.float16") else tensor.numpy()
    array = np.asarray(values)
    if array.dtype.kind not in "buif":
        raise ConfigurationError(f"{where}: images are numbers, not {array.dtype}")
    return array


def channels_last(array: np.ndarray, where: str, count: int | None = None) -> np.ndarray:
    """Return `array` as (n, height, width, channels), with 1 or 3 channels.

    Args:
        array: (n, h, w), (n, h, w, c) or (n, c, h, w), where c is 1 or 3.
        where: what messages call it.
        count: the number of images where it is known, for example from labels.

    Raises:
        ConfigurationError: the shape can be read in two ways, or in none.

    """
    shape = array.shape
    if len(shape) == 2:
        raise ConfigurationError(f"{where}: shape {shape} is one table or one image; images have shape (n, h, w)")
    if len(shape) == 3:
        single = shape[2] in (1, 3, 4) or (shape[0] == THREE and count != THREE)
        if single:
            raise ConfigurationError(
                f"{where}: shape {shape} may be one image or several grey ones; give one image as (1, h, w, c) or "
                "(1, c, h, w), and grey ones as (n, 1, h, w)"
            )
        return array[..., None]
    if len(shape) != 4:
        raise ConfigurationError(f"{where}: shape {shape} is none of (n, h, w), (n, h, w, c), (n, c, h, w)")
    first, last = shape[1] in CHANNELS, shape[3] in CHANNELS
    if first and last:
        raise ConfigurationError(
            f"{where}: shape {shape} may have its channels first or last; images that narrow cannot be told apart"
        )
    if not first and not last:
        has = f"{shape[3]} or {shape[1]} channels" if min(shape[1], shape[3]) <= 16 else "no axis of channels"
        raise ConfigurationError(f"{where}: shape {shape} has {has}; images have 1 (grey) or 3 (RGB)")
    return array.transpose(0, 2, 3, 1) if first else array


def eight_bits(array: np.ndarray, where: str, reading: Reading) -> np.ndarray:
    """Return the values of `array` as uint8 of the same shape, and count in `reading` what they were.

    Whoever has read all images calls :meth:`Reading.require_whole_range`, since one dark image proves nothing.

    Args:
        array: bool; uint8; uint16, whose range is all 16 bits; or floats in [0, 1]. Its first axis is images.
        where: what messages call it.
        reading: counts the images by kind.

    Raises:
        ConfigurationError: the numbers are not finite, lie elsewhere, or have a range that is not known.

    """
    n = len(array)
    if not array.size:
        raise ConfigurationError(f"{where}: there are no images in it: shape {array.shape}")
    kind = array.dtype.kind
    if array.dtype == np.uint8:
        if n > 1 and array.max() == 1:
            raise ConfigurationError(f"{where}: all values are 0 or 1 of 255; give them as bool or float, or times 255")
        reading.kinds["8-bit"] += n
        return array
    if kind == "b":
        reading.kinds["1-bit"] += n
        return array.astype(np.uint8) * 255
    if array.dtype == np.uint16:
        reading.deep(Path(where), int(array.max()), FULL_16)
        reading.kinds["16-bit"] += n
        return _scaled(array, FULL_16)
    lowest, highest = array.min(), array.max()
    if kind in "iu":
        raise ConfigurationError(
            f"{where}: {array.dtype} values reach from {lowest} to {highest}, and their full range is unknown: give "
            "them as uint8 (0 to 255), uint16 (0 to 65535), or floats from 0 to 1"
        )
    if not (np.isfinite(lowest) and np.isfinite(highest)):  # NaN spreads to both
        bad = int((~np.isfinite(array)).sum())
        raise ConfigurationError(f"{where}: {bad} of {array.size} values are not finite (NaN or infinite)")
    if lowest < 0 or highest > 1:
        remedy = "divide by 255" if lowest >= 0 and 1 < highest <= 255 else "leave normalisation away, or scale them"
        raise ConfigurationError(
            f"{where}: float values reach from {lowest:g} to {highest:g}, but images lie between 0 and 1: {remedy}"
        )
    reading.kinds[str(array.dtype)] += n
    return _scaled(array, 1)


def _scaled(array: np.ndarray, full: int) -> np.ndarray:
    scaled = np.empty(array.shape, np.uint8)
    for start in range(0, len(array), PER_PASS):
        part = slice(start, start + PER_PASS)
        scaled[part] = np.rint(array[part].astype(np.float64) * (255 / full))
    return scaled


def images_of(values: Any, where: str, size: Size, reading: Reading, count: int | None = None) -> np.ndarray:
    """Return the images in an array or tensor as uint8 (n, h, w, c), fitted to `size` as files are.

    See :func:`channels_last` and :func:`eight_bits` for what is refused.
    """
    array = channels_last(as_array(values, where), where, count)
    images = eight_bits(array, where, reading)
    n, height, width, channels = images.shape
    reading.sizes[width, height] += n
    reading.grey += n if channels == 1 else 0
    wanted = (size, size) if isinstance(size, int) else size
    if wanted is None or (height, width) == wanted:
        return np.ascontiguousarray(images)
    flat = images[..., 0] if channels == 1 else images
    fitted = np.stack([fit(Image.fromarray(np.ascontiguousarray(image)), wanted) for image in flat])
    return fitted[..., None] if channels == 1 else fitted


def image_of(values: Any, where: str, size: Size, reading: Reading) -> np.ndarray:
    """The same of a single image, (h, w), (h, w, c) or (c, h, w); returns uint8 (h, w, c)."""
    return images_of(as_array(values, where)[None], where, size, reading, count=1)[0]


def stacked(images: Sequence[np.ndarray], where: str) -> np.ndarray:
    """Return images uint8 (h, w, c) as one array (n, h, w, c); grey ones become RGB where others have colours.

    Raises:
        ConfigurationError: there are none, or their sizes differ.

    """
    if not images:
        raise ConfigurationError(f"{where}: there are no images in it")
    sizes = sorted({image.shape[:2] for image in images})
    if len(sizes) > 1:
        (least, most) = (f"{size[1]}x{size[0]}" for size in (sizes[0], sizes[-1]))
        raise ConfigurationError(
            f"{where}: images have {len(sizes)} sizes, from {least} to {most} pixels: say the size that they shall have"
        )
    channels = max(image.shape[2] for image in images)
    return np.stack([np.broadcast_to(image, (*image.shape[:2], channels)) for image in images])


def with_channels(images: np.ndarray, channels: int | None, grey: bool = False) -> np.ndarray:
    """Return uint8 (n, h, w, c) with `channels` channels.

    Args:
        images: with 1 or 3 channels.
        channels: 1, 3, or None for 1 where all images are grey, else 3. Colours become grey by Pillow's luma.
        grey: whether all images are grey, also those that have three equal channels.

    """
    wanted = channels or (1 if grey else 3)
    if images.shape[3] == wanted:
        return images
    if wanted == THREE:
        return np.repeat(images, 3, axis=3)
    if grey:
        return images[..., :1]
    luma = np.empty((*images.shape[:3], 1), np.uint8)
    for start in range(0, len(images), PER_PASS):
        part = slice(start, start + PER_PASS)
        luma[part, ..., 0] = (images[part].astype(np.uint32) @ LUMA + 0x8000) >> 16
    return luma
