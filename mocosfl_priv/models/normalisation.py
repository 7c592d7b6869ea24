"""GroupNorm that is fast on channels-last maps, and GroupNorm for many clients at once.

On CPUs, convolutions of channels-last maps are up to three times faster than of contiguous maps, but torch's own
GroupNorm is many times slower on them. Sums over pixels are computed here as products with a vector of ones, since
matrix products are fast.
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
PARTIAL_SUM = 32  # so many pixels at a time are summed in the input's precision; their sums are added in float32


class GroupNorm(nn.GroupNorm):
    """GroupNorm (Wu and He, 2018) of maps (n, c, h, w), fast in both memory layouts and under `vmap`."""

    def forward(self, x: Tensor) -> Tensor:
        if _stacked.get():
            z: Tensor = StackedGroupNorm.apply(x, self.weight, self.bias, self.num_groups, self.eps)
            return z
        transformed = torch._C._functorch.is_functorch_wrapped_tensor(x)  # by torch.func; there is no public question
        if not transformed and x.dim() == 4 and x.stride(1) == 1 and x.shape[1] > 1 and x.shape[2] * x.shape[3] > 1:
            y: Tensor = ChannelsLastGroupNorm.apply(x, self.weight, self.bias, self.num_groups, self.eps)
            return y
        return F.group_norm(x, self.num_groups, self.weight.to(x.dtype), self.bias.to(x.dtype), self.eps)


@contextmanager
def stacked_parameters() -> Iterator[None]:
    """Enter this context to run networks under `vmap` with stacked parameters; `GroupNorm` then uses a fused kernel."""
    token = _stacked.set(True)
    try:
        yield
    finally:
        _stacked.reset(token)


class StackedGroupNorm(torch.autograd.Function):
    """GroupNorm under `vmap`, for P clients with b images each and their own parameters, as one fused kernel.

    All images are treated as a single image with P * b * c channels. Without this, `vmap` would normalise, multiply and
    add in separate passes. The backward pass is that of the fused kernel.
    """

    @staticmethod
    def forward(x: Tensor, weight: Tensor, bias: Tensor, groups: int, epsilon: float) -> Tensor:
        """Apply GroupNorm without `vmap`; x (b, c, h, w), weight and bias (c,)."""
        return F.group_norm(x, groups, weight, bias, epsilon)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        """Save nothing: autograd differentiates the fused kernel itself."""

    @staticmethod
    def vmap(
        info: Any, in_dims: tuple[int | None, ...], x: Tensor, weight: Tensor, bias: Tensor, groups: int,
        epsilon: float,
    ) -> tuple[Tensor, int]:  # fmt: skip
        """Apply GroupNorm to a stack of clients: x (P, b, c, h, w), weight and bias (P, c), up to the stacked axis."""
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
    """GroupNorm of channels-last maps, with statistics in float32 and a backward pass that keeps the layout.

    Second derivatives are those of torch's own GroupNorm; in bfloat16 they are refused.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, groups: int, epsilon: float) -> Tensor:
        """Apply GroupNorm to x (n, c, h, w), channels last in memory; weight and bias (c,)."""
        n, channels, height, width = x.shape
        rows = _rows(x)
        count = height * width * channels // groups
        if x.dtype != torch.bfloat16:  # torch's forward pass is fast here; its backward pass loses the layout
            y, mean, spread = torch.native_group_norm(x, weight, bias, n, channels, height * width, groups, epsilon)
            ctx.save_for_backward(x, weight, _per_channel(mean, channels), _per_channel(spread, channels))
            ctx.groups, ctx.epsilon = groups, epsilon
            return y
        # In bfloat16, computing the variance as mean of squares minus square of mean would lose its digits. So the
        # values are centred first, with a mean that is rounded to bfloat16. `rest` is the mean of the centred values,
        # that is, the rounding error; the variance is corrected by it.
        rest = _per_channel(_per_group(_pixel_sum(rows), groups).div_(count), channels)
        centred = rows - rest.to(x.dtype).unsqueeze(1)
        rest = _per_channel(_per_group(_pixel_sum(centred), groups).div_(count), channels)
        square = _per_channel(_per_group(_pixel_sum(centred * centred), groups).div_(count), channels)
        deviation_inverse = (square - rest * rest).clamp_(min=0).add_(epsilon).rsqrt_()
        scale = deviation_inverse * weight
        shift = bias - rest * scale
        # written into a new tensor, not returned as a view, so that a following ReLU can work in place
        y = torch.empty((n, channels, height, width), dtype=x.dtype, memory_format=torch.channels_last, device=x.device)
        torch.addcmul(shift.to(x.dtype).unsqueeze(1), centred, scale.to(x.dtype).unsqueeze(1), out=_rows(y))
        ctx.save_for_backward(centred, weight, rest, deviation_inverse)
        ctx.groups, ctx.epsilon = groups, epsilon
        return y

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, Tensor, None, None]:
        """Compute the standard gradient of GroupNorm, as an affine function of gradient and input per channel."""
        centred, weight, centre, spread = ctx.saved_tensors
        groups = ctx.groups
        if torch.is_grad_enabled():  # the gradient will be differentiated again; centre and spread depend on the input
            return _differentiable_gradient(centred, weight, groups, ctx.epsilon, gradients[0])
        if centred.dim() == 4:
            centred = _rows(centred)
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


def _differentiable_gradient(
    x: Tensor, weight: Tensor, groups: int, epsilon: float, gradient: Tensor
) -> tuple[Tensor, Tensor, Tensor, None, None]:
    """Gradients by x (n, c, h, w), weight and bias (c,) of GroupNorm, which can be differentiated again.

    Raises RuntimeError in bfloat16, where only centred values were kept.
    """
    if x.dim() != 4:
        raise RuntimeError(
            "second derivatives of GroupNorm need float32: in bfloat16 its input is not kept; set compute.precision"
        )
    with torch.enable_grad():
        bias = torch.zeros_like(weight, requires_grad=True)  # the gradient does not depend on its value
        inputs = [value if value.requires_grad else value.detach().requires_grad_() for value in (x, weight)]
        y = F.group_norm(inputs[0], groups, inputs[1], bias, epsilon)
        of_input, of_weight, of_bias = torch.autograd.grad(y, (*inputs, bias), gradient, create_graph=True)
    return of_input, of_weight, of_bias, None, None


def _rows(x: Tensor) -> Tensor:
    """Reshape (n, c, h, w) to (n, pixels, c); a view if x is channels-last in memory."""
    return x.permute(0, 2, 3, 1).flatten(1, 2)


def _pixel_sum(rows: Tensor) -> Tensor:
    """Sum (n, pixels, c) over pixels to (n, c), in float32 or float64."""
    n, pixels, channels = rows.shape
    part = PARTIAL_SUM if pixels % PARTIAL_SUM == 0 else pixels
    blocks = rows.reshape(n * pixels // part, part, channels)
    sums = blocks.new_ones(1, 1, part).expand(len(blocks), 1, part) @ blocks
    wide = torch.promote_types(rows.dtype, torch.float32)
    return sums.view(n, pixels // part, channels).sum(1, dtype=wide)


def _per_group(per_channel: Tensor, groups: int) -> Tensor:
    """Sum (n, c) over the channels of each group to (n, groups)."""
    return per_channel.unflatten(1, (groups, -1)).sum(2)


def _per_channel(per_group: Tensor, channels: int) -> Tensor:
    """Repeat each group's value (n, groups) for all its channels: (n, channels)."""
    return per_group.repeat_interleave(channels // per_group.shape[1], dim=1)
