"""What a codec leaves of a message, and how many bytes it takes: `mocosfl_priv.device.codecs` for tensors.

Simulated messages are not written as bytes: they become, bit for bit, what a server would read from them.
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

FLOAT_BIAS, FLOAT_MANTISSA_BITS = 127, 23  # of single precision


def as_received(message: Tensor, codec: Codec) -> Tensor:
    """What arrives of `message` (n, c, h, w), in its dtype; the gradient passes as if nothing had happened to it.

    That is how a client learns: it takes the gradient for what was received as that for what it computed. fp32 returns
    `message` itself, in any dtype. Numbers that are not finite stay so, where a real client would refuse to send them.
    """
    if codec == "fp32":
        return message
    received: Tensor = _StraightThrough.apply(message, codec)
    return received


def message_bytes(message: Tensor, codec: Codec) -> int:
    """Bytes of a `message` (n, c, h, w) as it travels: numbers and scales."""
    return sum(sizes(message.shape, codec))


class _StraightThrough(torch.autograd.Function):
    """Rounding whose derivative is 1."""

    generate_vmap_rule = True  # attacks may work image by image

    @staticmethod
    def forward(message: Tensor, codec: Codec) -> Tensor:
        """Encoded and decoded."""
        numbers = message.float()
        return (_halves(numbers) if codec == "fp16" else _levels(numbers)).to(message.dtype)

    @staticmethod
    def setup_context(ctx: object, inputs: tuple[Tensor, Codec], output: Tensor) -> None:
        """Nothing is needed on the way back."""

    @staticmethod
    def backward(ctx: object, *gradients: Tensor) -> tuple[Tensor, None]:  # noqa: ARG004 - torch calls it so
        """The gradient as it comes."""
        return gradients[0], None


def _halves(numbers: Tensor) -> Tensor:
    _, exponents = torch.frexp(numbers.abs().amax((1, 2, 3), keepdim=True))
    exponents = (exponents - HALF_EXPONENT).clamp(min=SMALLEST_SCALE_EXPONENT)
    # from the bits: a power of two that is computed need not be exact on every device
    scales = (exponents + FLOAT_BIAS << FLOAT_MANTISSA_BITS).view(torch.float32)
    return (numbers / scales).half().float() * scales


def _levels(numbers: Tensor) -> Tensor:
    largest = numbers.abs().amax((2, 3), keepdim=True)
    # by a tensor: division by a number may become multiplication by its inverse, which rounds otherwise
    scales = (largest / torch.full_like(largest, LEVELS)).clamp(min=SMALLEST_SCALE)
    levels = (numbers.double() / scales).round().clamp(-LEVELS, LEVELS)
    return (levels + 0.0).float() * scales  # an integer has no negative zero
