"""Codecs of smashed data and gradients: exact, half precision, or 8-bit integers.

Each image, or each channel of an image, has its own scale, so that the decoded values of an image do not depend on the
other images in a message.

| codec | payload | scales | error of a number x |
|---|---|---|---|
| fp32 | 4 bytes a number | none | 0 |
| fp16 | 2 bytes | a power of two per image | 2^-11 of x, or 2^-39 of the image's largest number |
| int8 | 1 byte | a number per image and channel | 1/253 of the channel's largest number |
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal, NamedTuple, get_args

import numpy as np

from .errors import DeviceError

Codec = Literal["fp32", "fp16", "int8"]
CODECS: tuple[Codec, ...] = get_args(Codec)
NUMBER_BYTES: dict[Codec, int] = {"fp32": 4, "fp16": 2, "int8": 1}
SCALE_BYTES = 4
# Half precision ends at 65504, so an image is scaled such that its largest number lies in [2^14, 2^15).
HALF_EXPONENT = 15
LEVELS = 127
SMALLEST_SCALE = float(np.finfo(np.float32).tiny)
SMALLEST_SCALE_EXPONENT = -126


class Encoded(NamedTuple):
    """An array as bytes: `payload` numbers and float32 `scales`, both little endian and in C order."""

    payload: bytes
    scales: bytes

    @property
    def nbytes(self) -> int:
        """Bytes of payload and scales together."""
        return len(self.payload) + len(self.scales)


def encode(array: np.ndarray, codec: Codec) -> Encoded:
    """Encode a float32 array (n, c, h, w); raises DeviceError for other types and shapes, and for NaN or infinity."""
    if array.dtype != np.float32 or array.ndim != 4:
        raise DeviceError(f"{codec}: expected a float32 array (n, c, h, w), not {array.dtype} {array.shape}")
    if not np.isfinite(array).all():
        raise DeviceError(f"{codec}: NaN or infinity cannot be sent")
    _require_codec(codec)
    if codec == "fp32":
        return Encoded(array.astype("<f4", copy=False).tobytes(), b"")
    if codec == "fp16":
        _, exponents = np.frexp(_largest(array, (1, 2, 3)))
        scales = np.ldexp(np.float32(1), np.maximum(exponents - HALF_EXPONENT, SMALLEST_SCALE_EXPONENT))
        halves = (array.astype(np.float64) / scales).astype("<f2")
        return Encoded(halves.tobytes(), scales.astype("<f4").tobytes())
    scales = np.maximum(_largest(array, (2, 3)) / np.float32(LEVELS), np.float32(SMALLEST_SCALE))
    levels = np.rint(array.astype(np.float64) / scales).clip(-LEVELS, LEVELS).astype(np.int8)
    return Encoded(levels.tobytes(), scales.astype("<f4").tobytes())


def decode(payload: bytes, scales: bytes, shape: Sequence[int], codec: Codec) -> np.ndarray:
    """Decode what :func:`encode` returned for an array of `shape` (n, c, h, w), as float32.

    Raises DeviceError if a length is wrong, or a scale or decoded number is invalid.
    """
    _require_codec(codec)
    expected = sizes(shape, codec)
    if (len(payload), len(scales)) != expected:
        raise DeviceError(
            f"{codec}: {tuple(shape)} takes {expected[0]} bytes and {expected[1]} of scales, "
            f"not {len(payload)} and {len(scales)}"
        )
    kind = {"fp32": "<f4", "fp16": "<f2", "int8": "i1"}[codec]
    numbers = np.frombuffer(payload, kind).reshape(shape)
    if codec == "int8" and numbers.size and int(numbers.min()) < -LEVELS:
        raise DeviceError(f"int8: levels must lie between {-LEVELS} and {LEVELS}")
    if codec != "fp32":
        factors = np.frombuffer(scales, "<f4").reshape(_scale_shape(shape, codec))
        if not (np.isfinite(factors) & (factors > 0)).all():
            raise DeviceError(f"{codec}: scales must be finite and above 0")
        with np.errstate(over="ignore", invalid="ignore"):
            numbers = numbers.astype(np.float32) * factors
    if not np.isfinite(numbers).all():
        raise DeviceError(f"{codec}: NaN or infinity was received")
    return numbers.astype(np.float32)


def sizes(shape: Sequence[int], codec: Codec) -> tuple[int, int]:
    """Return the bytes of payload and scales of an encoded array of `shape` (n, c, h, w)."""
    if len(shape) != 4 or any(side < 0 for side in shape):
        raise DeviceError(f"{codec}: {tuple(shape)} is not a shape (n, c, h, w)")
    scales = 0 if codec == "fp32" else math.prod(_scale_shape(shape, codec))
    return math.prod(shape) * NUMBER_BYTES[codec], scales * SCALE_BYTES


def _scale_shape(shape: Sequence[int], codec: Codec) -> tuple[int, int, int, int]:
    return (shape[0], shape[1] if codec == "int8" else 1, 1, 1)


def _largest(array: np.ndarray, axes: tuple[int, ...]) -> np.ndarray:
    """The largest absolute value over `axes`, which are kept with size 1; 0 for empty arrays."""
    largest: np.ndarray = np.abs(array).max(axis=axes, keepdims=True, initial=0)
    return largest


def _require_codec(codec: str) -> None:
    if codec not in CODECS:
        raise DeviceError(f"unknown codec {codec!r}; known: {', '.join(CODECS)}")
