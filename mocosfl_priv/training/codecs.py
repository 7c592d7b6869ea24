"""Codecs for simulated messages: the numbers a server receives, and how many bytes a message takes.

A simulation writes no bytes. It rounds each message to exactly the numbers, bit for bit, that encoding and decoding it
with `mocosfl_priv.device.codecs` would give.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mocosfl_priv.device.codecs import (
    HALF_EXPONENT,
    LEVELS,
    SMALLEST_SCALE,
    SMALLEST_SCALE_EXPONENT,
    Codec,
    sizes,
)

FLOAT_BIAS, FLOAT_MANTISSA_BITS = 127, 23  # exponent bias and mantissa bits of float32


def as_received(message: Tensor, codec: Codec) -> Tensor:
    """Return `message` (n, c, h, w) as its receiver decodes it, in the same dtype.

    The derivative is taken to be 1 (straight-through): a client uses the gradient with respect to the received numbers
    as that with respect to the numbers it computed. fp32 returns `message` itself, in any dtype. Numbers that are not
    finite stay so; a real client would refuse to send them.
    """
    if codec == "fp32":
        return message
    received: Tensor = _StraightThrough.apply(message, codec)
    return received


def message_bytes(message: Tensor, codec: Codec) -> int:
    """Bytes of an encoded `message` (n, c, h, w): its numbers and its scales."""
    return sum(sizes(message.shape, codec))


class _StraightThrough(torch.autograd.Function):
    """Rounding whose derivative is 1."""

    generate_vmap_rule = True  # attacks may run it under vmap, over single images

    @staticmethod
    def forward(message: Tensor, codec: Codec) -> Tensor:
        """Round `message` as encoding and decoding it would."""
        numbers = message.float()
        return (_halves(numbers) if codec == "fp16" else _levels(numbers)).to(message.dtype)

    @staticmethod
    def setup_context(ctx: object, inputs: tuple[Tensor, Codec], output: Tensor) -> None:
        """Save nothing: the backward pass needs no tensors."""

    @staticmethod
    def backward(ctx: object, *gradients: Tensor) -> tuple[Tensor, None]:  # noqa: ARG004 - torch calls it so
        """Return the gradient unchanged."""
        return gradients[0], None


def _halves(numbers: Tensor) -> Tensor:
    """Round to half precision, with one power of two as scale per image (n, 1, 1, 1)."""
    _, exponents = torch.frexp(numbers.abs().amax((1, 2, 3), keepdim=True))
    exponents = (exponents - HALF_EXPONENT).clamp(min=SMALLEST_SCALE_EXPONENT)
    # the float32 is built from its bits, since a computed power of two is not exact on every device
    scales = (exponents + FLOAT_BIAS << FLOAT_MANTISSA_BITS).view(torch.float32)
    return (numbers / scales).half().float() * scales


def _levels(numbers: Tensor) -> Tensor:
    """Round to integers in [-LEVELS, LEVELS] times a scale per image and channel (n, c, 1, 1)."""
    largest = numbers.abs().amax((2, 3), keepdim=True)
    # division by a tensor: torch may replace division by a number with multiplication by its inverse, which rounds
    # differently
    scales = (largest / torch.full_like(largest, LEVELS)).clamp(min=SMALLEST_SCALE)
    levels = (numbers.double() / scales).round().clamp(-LEVELS, LEVELS)
    return (levels + 0.0).float() * scales  # adding 0.0 turns -0.0 into 0.0, since an int8 has no negative zero
