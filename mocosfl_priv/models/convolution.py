"""Weight standardisation and convolution, optimised for training many clients and on CPUs.

Both compute the textbook function; the kernels were chosen by the measurements in `docs/PERFORMANCE.md`.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

STANDARDISATION_EPSILON = 1e-5
# Output height and width, in pixels, up to which on CPUs a bfloat16 convolution is faster as a matrix product, and a
# float32 convolution is faster with contiguous maps than with channels-last ones.
SMALL_SIDE = 4
MATMUL_SMALLEST_CHANNELS = 128  # with fewer channels the matrix product is not faster
CHANNELS_LAST_SMALLEST_WIDTH = 64  # with fewer channels channels-last maps are slower than contiguous ones

CONVOLUTIONS = {torch.conv1d, torch.conv2d, torch.conv3d,
                torch.conv_transpose1d, torch.conv_transpose2d, torch.conv_transpose3d}  # fmt: skip

_longest_patch = ContextVar("longest_patch", default=0.0)


def standardise(weight: Tensor) -> Tensor:
    """Standardise filters (out, in, kh, kw) to mean 0 and standard deviation 1, with Bessel's correction
    (Qiao et al., 2019).
    """
    flat = weight.flatten(1)
    centred = flat - flat.mean(1, keepdim=True)
    # A norm over contiguous rows is an order of magnitude faster than torch.std over three dimensions.
    deviation = torch.linalg.vector_norm(centred, dim=1, keepdim=True) / (flat.shape[1] - 1) ** 0.5
    return (centred / (deviation + STANDARDISATION_EPSILON)).view_as(weight)


def zeroed(convolution: nn.Conv2d) -> nn.Conv2d:
    """Set all weights of `convolution` to zero, in place, and return it.

    A residual branch that ends in it initially outputs zero.
    """
    for parameter in convolution.parameters():
        nn.init.zeros_(parameter)
    return convolution


def in_fast_layout(maps: Tensor, network: nn.Module) -> Tensor:
    """Return `maps` (n, c, h, w) in the memory layout in which the convolutions of `network` are fastest.

    On a CPU, channels-last maps are faster if all convolutions have many output channels, otherwise slower.
    """
    if maps.device.type != "cpu" or maps.dim() != 4 or maps.dtype == torch.float64:
        return maps
    widths = [m.out_channels for m in network.modules() if isinstance(m, nn.Conv2d | nn.ConvTranspose2d)]
    wide = bool(widths) and min(widths) >= CHANNELS_LAST_SMALLEST_WIDTH
    return maps.contiguous(memory_format=torch.channels_last) if wide else maps


@contextmanager
def matrix_products(longest_patch: float) -> Iterator[None]:
    """In this context, compute convolutions whose patches have at most `longest_patch` numbers as matrix products.

    A patch is what a filter is applied to; it has in * kh * kw numbers. This is faster for many clients with their own
    filters: a batched product has no overhead per group, but unfolding takes memory in proportion to the patch.
    """
    token = _longest_patch.set(longest_patch)
    try:
        yield
    finally:
        _longest_patch.reset(token)


class AutocastConvolutions(TorchFunctionMode):
    """Apply autocast to convolutions under `vmap`. Torch itself does not, and convolutions of mixed dtypes fail."""

    def __init__(self, device: torch.device) -> None:
        super().__init__()
        kind = device.type
        self._dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Cast the arguments of convolutions; call all other functions unchanged."""
        kwargs = kwargs or {}
        if self._dtype is not None and func in CONVOLUTIONS:
            args = [self._cast(value) for value in args]
            kwargs = {name: self._cast(value) for name, value in kwargs.items()}
        return func(*args, **kwargs)

    def _cast(self, value: Any) -> Any:
        low = isinstance(value, Tensor) and value.dtype in (torch.float32, torch.bfloat16, torch.float16)
        return value.to(self._dtype) if low else value


def convolve(x: Tensor, weight: Tensor, stride: int, padding: int, groups: int) -> Tensor:
    """Compute a two-dimensional convolution without bias; x (n, in, h, w), weight (out, in / groups, k, k)."""
    if _matmul_is_faster(x, weight, stride, padding, groups):
        with torch.autocast(x.device.type, enabled=False):  # the tensors are cast here, once
            y: Tensor = MatmulConvolution.apply(x.bfloat16(), weight.bfloat16(), stride, padding)
        return y
    if weight.shape[1] * weight.shape[2] * weight.shape[3] <= _longest_patch.get() and groups == 1:
        kernel = weight.shape[-1]
        padded = F.pad(x, (padding, padding, padding, padding))
        windows = padded.unfold(2, kernel, stride).unfold(3, kernel, stride)  # (n, in, h, w, k, k)
        patches = windows.permute(0, 1, 4, 5, 2, 3).flatten(4).flatten(1, 3)
        return (weight.flatten(1) @ patches).unflatten(2, windows.shape[2:4])
    if x.dtype == torch.float32 and _output_side(x, weight, stride, padding) <= SMALL_SIDE and x.device.type == "cpu":
        x = x.contiguous()
    return F.conv2d(x, weight, None, stride, padding, 1, groups)


def _output_side(x: Tensor, weight: Tensor, stride: int, padding: int) -> int:
    return (max(x.shape[-2:]) + 2 * padding - weight.shape[-1]) // stride + 1


def _matmul_is_faster(x: Tensor, weight: Tensor, stride: int, padding: int, groups: int) -> bool:
    return (
        x.device.type == "cpu"
        and groups == 1
        and weight.shape[-1] > 1
        and _output_side(x, weight, stride, padding) <= SMALL_SIDE
        and min(weight.shape[:2]) >= MATMUL_SMALLEST_CHANNELS
        and torch.is_autocast_enabled("cpu")
        and torch.get_autocast_dtype("cpu") == torch.bfloat16
    )


class MatmulConvolution(torch.autograd.Function):
    """Convolution as one matrix product over unfolded patches; faster for maps of few pixels and many channels."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, weight: Tensor, stride: int, padding: int) -> Tensor:
        """See :func:`convolve`."""
        patches, height, width = _patches(x, weight.shape[-1], stride, padding)
        rows = patches @ weight.permute(0, 2, 3, 1).flatten(1).t()
        return rows.view(x.shape[0], height, width, -1).permute(0, 3, 1, 2)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor, int, int], output: Tensor) -> None:  # noqa: ARG004
        """Save the input, not its patches: unfolding them again is cheaper than storing them."""
        x, weight, ctx.stride, ctx.padding = inputs
        ctx.save_for_backward(x, weight)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, None, None]:
        """Compute both gradients as matrix products, and add up the patches' gradients where patches overlap."""
        x, weight = ctx.saved_tensors
        stride, padding = ctx.stride, ctx.padding
        out, channels, kernel, _ = weight.shape
        patches, height, width = _patches(x, kernel, stride, padding)
        rows = gradients[0].permute(0, 2, 3, 1).reshape(-1, out)
        weight_gradient = (rows.t() @ patches).view(out, kernel, kernel, channels).permute(0, 3, 1, 2)
        spread = (rows @ weight.permute(0, 2, 3, 1).flatten(1)).view(-1, height, width, kernel, kernel, channels)
        padded = spread.new_zeros(x.shape[0], x.shape[2] + 2 * padding, x.shape[3] + 2 * padding, channels)
        for i in range(kernel):
            for j in range(kernel):
                padded[:, i : i + stride * height : stride, j : j + stride * width : stride] += spread[:, :, :, i, j]
        inside = padded[:, padding : padding + x.shape[2], padding : padding + x.shape[3]]
        return inside.permute(0, 3, 1, 2), weight_gradient, None, None


def _patches(x: Tensor, kernel: int, stride: int, padding: int) -> tuple[Tensor, int, int]:
    """Unfold x to patches (n * h * w, kernel * kernel * channels); also return the output's height h and width w."""
    padded = F.pad(x.permute(0, 2, 3, 1), (0, 0, padding, padding, padding, padding))
    windows = padded.unfold(1, kernel, stride).unfold(2, kernel, stride).permute(0, 1, 2, 4, 5, 3)
    return windows.flatten(3).flatten(0, 2), windows.shape[1], windows.shape[2]
