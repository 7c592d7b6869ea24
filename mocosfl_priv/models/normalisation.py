"""GroupNorm for channels-last maps, where torch's own kernel is many times slower than on contiguous ones.

oneDNN convolves channels-last maps up to three times faster than contiguous ones; a normalisation that keeps the
layout is what makes that usable. Sums over pixels are products with a row of ones, which run at matrix speed.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

_stacked = ContextVar("stacked", default=False)
PARTIAL_SUM = 32  # pixels summed in the input's own precision before float32 takes over


class GroupNorm(nn.GroupNorm):
    """GroupNorm (Wu and He, 2018) that is fast in either memory layout; x (n, c, h, w)."""

    def forward(self, x: Tensor) -> Tensor:
        if _stacked.get():
            z: Tensor = StackedGroupNorm.apply(x, self.weight, self.bias, self.num_groups, self.eps)
            return z
        if x.dim() == 4 and x.stride(1) == 1 and x.shape[1] > 1 and x.shape[2] * x.shape[3] > 1:
            y: Tensor = ChannelsLastGroupNorm.apply(x, self.weight, self.bias, self.num_groups, self.eps)
            return y
        return F.group_norm(x, self.num_groups, self.weight.to(x.dtype), self.bias.to(x.dtype), self.eps)


@contextmanager
def stacked_parameters() -> Iterator[None]:
    """Within this context networks run under `vmap`, every entry with its own parameters."""
    token = _stacked.set(True)
    try:
        yield
    finally:
        _stacked.reset(token)


class StackedGroupNorm(torch.autograd.Function):
    """GroupNorm under `vmap`: P x b images with P sets of parameters as one image with P * b * c channels.

    That is one fused kernel, where `vmap` alone would normalise, multiply and add in separate passes. Autograd
    records the kernel itself, below `vmap`.
    """

    @staticmethod
    def forward(x: Tensor, weight: Tensor, bias: Tensor, groups: int, epsilon: float) -> Tensor:
        """The plain function; x (b, c, h, w), weight, bias (c,)."""
        return F.group_norm(x, groups, weight, bias, epsilon)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        """Nothing to keep."""

    @staticmethod
    def vmap(
        info: Any, in_dims: tuple[int | None, ...], x: Tensor, weight: Tensor, bias: Tensor, groups: int,
        epsilon: float,
    ) -> tuple[Tensor, int]:  # fmt: skip
        """The same for a stack of clients."""
        stack = info.batch_size
        x, weight, bias = (
            value.expand(stack, *value.shape) if place is None else value.movedim(place, 0)
            for value, place in zip((x, weight, bias), in_dims, strict=False)
        )
        images, channels = x.shape[1:3]
        scale, shift = (
            value.to(x.dtype).unsqueeze(1).expand(stack, images, channels).flatten() for value in (weight, bias)
        )
        flat = x.reshape(1, stack * images * channels, *x.shape[3:])
        return F.group_norm(flat, stack * images * groups, scale, shift, epsilon).view(x.shape), 0


class ChannelsLastGroupNorm(torch.autograd.Function):
    """The same function with statistics in float32 and a backward pass of its own."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, groups: int, epsilon: float) -> Tensor:
        """The input x (n, c, h, w) has channels last in memory; weight, bias (c,)."""
        n, channels, height, width = x.shape
        rows = _rows(x)
        count = height * width * channels // groups
        if x.dtype != torch.bfloat16:  # torch's forward pass is fast here; its backward pass loses the layout
            y, mean, spread = torch.native_group_norm(x, weight, bias, n, channels, height * width, groups, epsilon)
            ctx.save_for_backward(rows, weight, _per_channel(mean, channels), _per_channel(spread, channels))
            ctx.groups = groups
            return y
        # The difference of two large squares would lose the variance, so centred values are squared. The mean may be
        # rough and is rounded for it; `rest` is what it left, measured on the centred values.
        rest = _per_channel(_per_group(_pixel_sum(rows), groups).div_(count), channels)
        centred = rows - rest.to(x.dtype).unsqueeze(1)
        rest = _per_channel(_per_group(_pixel_sum(centred), groups).div_(count), channels)
        square = _per_channel(_per_group(_pixel_sum(centred * centred), groups).div_(count), channels)
        deviation_inverse = (square - rest * rest).clamp_(min=0).add_(epsilon).rsqrt_()
        scale = deviation_inverse * weight
        shift = bias - rest * scale
        # written into a tensor of its own, not returned as a view, so that a following ReLU may work in place
        y = torch.empty((n, channels, height, width), dtype=x.dtype, memory_format=torch.channels_last, device=x.device)
        torch.addcmul(shift.to(x.dtype).unsqueeze(1), centred, scale.to(x.dtype).unsqueeze(1), out=_rows(y))
        ctx.save_for_backward(centred, weight, rest, deviation_inverse)
        ctx.groups = groups
        return y

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, Tensor, None, None]:
        """The textbook derivative, as one affine map of gradient and input per channel."""
        centred, weight, centre, spread = ctx.saved_tensors
        groups = ctx.groups
        n, channels, height, width = gradients[0].shape
        gradient = _rows(gradients[0])
        count = height * width * channels // groups
        gradient_sum = _pixel_sum(gradient)
        product_sum = _pixel_sum(gradient * centred)
        normalised_sum = (product_sum - centre * gradient_sum) * spread  # sum of gradient times normalised input
        slope = _per_channel(_per_group(normalised_sum * weight, groups), channels) / count
        level = _per_channel(_per_group(gradient_sum * weight, groups), channels) / count
        of_input = -spread * spread * slope
        constant = -of_input * centre - spread * level
        kind = centred.dtype
        result = torch.addcmul(constant.to(kind).unsqueeze(1), centred, of_input.to(kind).unsqueeze(1))
        result.addcmul_(gradient, (spread * weight).to(kind).unsqueeze(1))
        return (
            result.view(n, height, width, channels).permute(0, 3, 1, 2),
            normalised_sum.sum(0).to(weight.dtype),
            gradient_sum.sum(0).to(weight.dtype),
            None,
            None,
        )


def _rows(x: Tensor) -> Tensor:
    """(n, c, h, w) as (n, pixels, c); a view where channels are last."""
    return x.permute(0, 2, 3, 1).flatten(1, 2)


def _pixel_sum(rows: Tensor) -> Tensor:
    """(n, pixels, c) to (n, c), at least float32."""
    n, pixels, channels = rows.shape
    part = PARTIAL_SUM if pixels % PARTIAL_SUM == 0 else pixels
    blocks = rows.reshape(n * pixels // part, part, channels)
    sums = blocks.new_ones(1, 1, part).expand(len(blocks), 1, part) @ blocks
    wide = torch.promote_types(rows.dtype, torch.float32)
    return sums.view(n, pixels // part, channels).sum(1, dtype=wide)


def _per_group(per_channel: Tensor, groups: int) -> Tensor:
    return per_channel.unflatten(1, (groups, -1)).sum(2)


def _per_channel(per_group: Tensor, channels: int) -> Tensor:
    return per_group.repeat_interleave(channels // per_group.shape[1], dim=1)
