"""Rules that translate PyTorch operations to ONNX, and decompositions of operations without a rule.

A rule gets the graph, the operation's result (for its shape and type) and its arguments, and returns the name or names
of its results in the graph. Shapes are fixed, so every operation that only changes the shape is a Reshape.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from mocosfl_priv.deployment.recording import Graph, NotTranslatableError, Rule

aten = torch.ops.aten


def _unary(operator: str) -> Rule:
    return lambda g, _, x: g.node(operator, g.name(x))


def _arithmetic(operator: str) -> Rule:
    def rule(g: Graph, result: Tensor, a: Tensor, b: Tensor | float, alpha: float = 1) -> str:
        second = g.operand(b, result.dtype)
        if alpha != 1:
            second = g.node("Mul", second, g.operand(alpha, result.dtype))
        return g.node(operator, g.operand(a, result.dtype), second)

    return rule


def _comparison(operator: str, negated: bool = False) -> Rule:
    def rule(g: Graph, _: Tensor, a: Tensor, b: Tensor | float) -> str:
        common = torch.result_type(a, b)
        compared = g.node(operator, g.operand(a, common), g.operand(b, common))
        return g.node("Not", compared) if negated else compared

    return rule


def _reduction(operator: str) -> Rule:
    def rule(
        g: Graph,
        result: Tensor,
        x: Tensor,
        dim: Sequence[int] | None = None,
        keepdim: bool = False,
        *,
        dtype: Any = None,
    ) -> str:
        axes = list(dim) if dim else list(range(x.dim()))
        if not axes:  # reduction of a scalar
            return g.operand(x, result.dtype)
        return g.node(operator, g.operand(x, result.dtype), g.integers(axes), keepdims=int(keepdim))

    return rule


def _reshape(g: Graph, result: Tensor, x: Tensor, *_: Any, **__: Any) -> str:
    return g.node("Reshape", g.name(x), g.integers(result.shape))


def _same(g: Graph, result: Tensor, x: Tensor, *_: Any, **__: Any) -> str:
    return g.operand(x, result.dtype)


def _filled(g: Graph, result: Tensor, *_: Any, **__: Any) -> str:
    """A tensor filled with one number; the values of the argument do not matter."""
    return g.node("Expand", g.operand(result.flatten()[:1].item(), result.dtype), g.integers(result.shape))


def _permute(g: Graph, _: Tensor, x: Tensor, dims: Sequence[int]) -> str:
    return g.node("Transpose", g.name(x), perm=[d % x.dim() for d in dims])


def _transpose(g: Graph, result: Tensor, x: Tensor, first: int = 0, second: int = 1) -> str:
    dims = list(range(x.dim()))
    dims[first], dims[second] = dims[second], dims[first]
    return _permute(g, result, x, dims)


def _expand(g: Graph, result: Tensor, x: Tensor, *_: Any, **__: Any) -> str:
    return g.node("Expand", g.name(x), g.integers(result.shape))


def _slice(
    g: Graph, _: Tensor, x: Tensor, dim: int = 0, start: int | None = None, end: int | None = None, step: int = 1
) -> str:
    last = 2**62 if end is None else end
    return g.node("Slice", g.name(x), *(g.integers([v]) for v in (start or 0, last, dim, step)))


def _select(g: Graph, result: Tensor, x: Tensor, dim: int, index: int) -> str:
    index %= x.shape[dim]
    piece = g.node("Slice", g.name(x), *(g.integers([v]) for v in (index, index + 1, dim, 1)))
    return g.node("Reshape", piece, g.integers(result.shape))


def _concatenate(g: Graph, result: Tensor, tensors: Sequence[Tensor], dim: int = 0) -> str:
    return g.node("Concat", *(g.operand(t, result.dtype) for t in tensors), axis=dim)


def _split(g: Graph, results: Sequence[Tensor], x: Tensor, _: Any, dim: int = 0) -> list[str]:
    return g.nodes("Split", len(results), g.name(x), g.integers([part.shape[dim] for part in results]), axis=dim)


def _pad(g: Graph, _: Tensor, x: Tensor, padding: Sequence[int], value: float = 0) -> str:
    missing = [0] * (x.dim() - len(padding) // 2)  # torch names the last dimension first
    before, after = [*missing, *padding[-2::-2]], [*missing, *padding[-1::-2]]
    return g.node("Pad", g.name(x), g.integers(before + after), g.operand(value, x.dtype))


def _where(g: Graph, result: Tensor, condition: Tensor, a: Tensor, b: Tensor) -> str:
    return g.node("Where", g.name(condition), g.operand(a, result.dtype), g.operand(b, result.dtype))


def _clip(g: Graph, _: Tensor, x: Tensor, low: float | None = None, high: float | None = None) -> str:
    return g.node("Clip", g.name(x), *("" if bound is None else g.operand(bound, x.dtype) for bound in (low, high)))


def _hardtanh(g: Graph, result: Tensor, x: Tensor, low: float = -1, high: float = 1) -> str:
    return _clip(g, result, x, low, high)


def _power(g: Graph, result: Tensor, x: Tensor, exponent: float) -> str:
    base = g.operand(x, result.dtype)
    return g.node("Mul", base, base) if exponent == 2 else g.node("Pow", base, g.operand(exponent, result.dtype))


def _inverse_root(g: Graph, _: Tensor, x: Tensor) -> str:
    return g.node("Reciprocal", g.node("Sqrt", g.name(x)))


def _log_of_one_more(g: Graph, result: Tensor, x: Tensor) -> str:
    """log(1 + x) as x log(u) / (u - 1) with u = 1 + x rounded, which is precise for small x (Kahan)."""
    number, one = g.name(x), g.operand(1.0, result.dtype)
    more = g.node("Add", one, number)
    rest = g.node("Sub", more, one)
    is_lost = g.node("Equal", rest, g.operand(0.0, result.dtype))
    quotient = g.node("Div", g.node("Mul", number, g.node("Log", more)), g.node("Where", is_lost, one, rest))
    return g.node("Where", is_lost, number, quotient)


def _largest(
    g: Graph, _: Sequence[Tensor], x: Tensor, k: int, dim: int = -1, largest: bool = True, sorted: bool = True
) -> list[str]:
    return g.nodes("TopK", 2, g.name(x), g.integers([k]), axis=dim, largest=int(largest), sorted=int(sorted))


def _scatter_number(g: Graph, result: Tensor, x: Tensor, dim: int, index: Tensor, value: float) -> str:
    numbers = g.node("Expand", g.operand(value, result.dtype), g.integers(index.shape))
    return g.node("ScatterElements", g.name(x), g.name(index), numbers, axis=dim)


def _product(g: Graph, _: Tensor, a: Tensor, b: Tensor) -> str:
    return g.node("MatMul", g.name(a), g.name(b))


def _shifted_product(
    g: Graph, result: Tensor, shift: Tensor, a: Tensor, b: Tensor, *, beta: float = 1, alpha: float = 1
) -> str:
    product = g.node("MatMul", g.name(a), g.name(b))
    scaled = product if alpha == 1 else g.node("Mul", product, g.operand(alpha, result.dtype))
    added = g.name(shift) if beta == 1 else g.node("Mul", g.name(shift), g.operand(beta, result.dtype))
    return g.node("Add", scaled, added)


def _softmax(operator: str) -> Rule:
    return lambda g, _, x, dim, half_to_float: g.node(operator, g.name(x), axis=dim)  # noqa: ARG005


def _gather(g: Graph, _: Tensor, x: Tensor, dim: int, index: Tensor) -> str:
    return g.node("GatherElements", g.name(x), g.name(index), axis=dim)


def _scatter_add(g: Graph, _: Tensor, x: Tensor, dim: int, index: Tensor, source: Tensor) -> str:
    return g.node("ScatterElements", g.name(x), g.name(index), g.name(source), axis=dim, reduction="add")


def _convolution(
    g: Graph, result: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, stride: Sequence[int],
    padding: Sequence[int], dilation: Sequence[int], transposed: bool, output_padding: Sequence[int], groups: int,
) -> str:  # fmt: skip
    inputs = [g.name(x), g.name(weight)] + ([] if bias is None else [g.name(bias)])
    attributes = {"strides": stride, "pads": [*padding, *padding], "dilations": dilation, "group": groups}
    if transposed:
        return g.node("ConvTranspose", *inputs, **attributes, output_padding=output_padding)
    return g.node("Conv", *inputs, **attributes)


def _max_pool(
    g: Graph, results: Sequence[Tensor], x: Tensor, kernel: Sequence[int], stride: Sequence[int] = (),
    padding: Sequence[int] = (0, 0), dilation: Sequence[int] = (1, 1), ceil_mode: bool = False,
) -> list[str]:  # fmt: skip
    """Max pooling with indices: PyTorch's are positions within one map, ONNX's within all maps of the batch."""
    maximum, place = g.nodes(
        "MaxPool", 2, g.name(x), kernel_shape=_pair(kernel), strides=_pair(stride or kernel),
        pads=_pair(padding) * 2, dilations=_pair(dilation), ceil_mode=int(ceil_mode),
    )  # fmt: skip
    images, channels, height, width = x.shape
    first = torch.arange(images * channels).mul(height * width).view(images, channels, 1, 1)
    return [maximum, g.node("Sub", place, g.name(first))]


def _pair(values: Sequence[int]) -> list[int]:
    return list(values) * 2 if len(values) == 1 else list(values)


RULES: dict[Any, Rule] = {
    **{getattr(aten, name).default: _unary(operator) for name, operator in {
        "relu": "Relu", "neg": "Neg", "exp": "Exp", "log": "Log", "erf": "Erf", "tanh": "Tanh", "sigmoid": "Sigmoid",
        "sqrt": "Sqrt", "reciprocal": "Reciprocal", "abs": "Abs", "sign": "Sign", "sgn": "Sign", "sin": "Sin",
        "cos": "Cos", "logical_not": "Not", "bitwise_not": "Not", "softplus": "Softplus", "floor": "Floor",
    }.items()},
    **{overload: _arithmetic(operator) for name, operator in {
        "add": "Add", "sub": "Sub", "mul": "Mul", "div": "Div",
    }.items() for overload in (getattr(aten, name).Tensor, getattr(aten, name).Scalar)},
    aten.maximum.default: _arithmetic("Max"),
    aten.minimum.default: _arithmetic("Min"),
    **{overload: _comparison(operator, negated) for name, (operator, negated) in {
        "eq": ("Equal", False), "ne": ("Equal", True), "lt": ("Less", False), "le": ("LessOrEqual", False),
        "gt": ("Greater", False), "ge": ("GreaterOrEqual", False),
    }.items() for overload in (getattr(aten, name).Tensor, getattr(aten, name).Scalar)},
    **{overload: _arithmetic("And") for overload in (aten.logical_and.default, aten.bitwise_and.Tensor)},
    **{overload: _arithmetic("Or") for overload in (aten.logical_or.default, aten.bitwise_or.Tensor)},
    **dict.fromkeys((aten.sum.dim_IntList, aten.sum.default), _reduction("ReduceSum")),
    **dict.fromkeys((aten.mean.dim, aten.mean.default), _reduction("ReduceMean")),
    aten.amax.default: _reduction("ReduceMax"),
    aten.amin.default: _reduction("ReduceMin"),
    **dict.fromkeys(
        (aten.view.default, aten.reshape.default, aten._unsafe_view.default, aten._reshape_alias.default,
         aten.unsqueeze.default, aten.squeeze.default, aten.squeeze.dim, aten.squeeze.dims), _reshape,
    ),
    **dict.fromkeys(
        (aten.alias.default, aten.clone.default, aten.detach.default, aten.lift_fresh.default, aten._to_copy.default),
        _same,
    ),
    **dict.fromkeys(
        (aten.full_like.default, aten.zeros_like.default, aten.ones_like.default, aten.new_zeros.default,
         aten.new_ones.default, aten.new_full.default), _filled,
    ),
    aten.permute.default: _permute,
    aten.transpose.int: _transpose,
    aten.t.default: _transpose,
    aten.expand.default: _expand,
    aten.slice.Tensor: _slice,
    aten.select.int: _select,
    aten.cat.default: _concatenate,
    aten.split.Tensor: _split,
    aten.split_with_sizes.default: _split,
    aten.constant_pad_nd.default: _pad,
    aten.where.self: _where,
    aten.clamp.default: _clip,
    aten.hardtanh.default: _hardtanh,
    aten.pow.Tensor_Scalar: _power,
    aten.rsqrt.default: _inverse_root,
    aten.log1p.default: _log_of_one_more,
    aten.topk.default: _largest,
    aten.mm.default: _product,
    aten.bmm.default: _product,
    aten.addmm.default: _shifted_product,
    aten.baddbmm.default: _shifted_product,
    aten._softmax.default: _softmax("Softmax"),
    aten._log_softmax.default: _softmax("LogSoftmax"),
    aten.gather.default: _gather,
    aten.scatter_add.default: _scatter_add,
    aten.scatter.value: _scatter_number,
    aten.convolution.default: _convolution,
    aten.max_pool2d_with_indices.default: _max_pool,
}  # fmt: skip


def convolution_backward(
    gradient: Tensor, x: Tensor, weight: Tensor, bias_sizes: Sequence[int] | None, stride: Sequence[int],
    padding: Sequence[int], dilation: Sequence[int], transposed: bool, output_padding: Sequence[int], groups: int,
    wanted: Sequence[bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:  # fmt: skip
    """Decompose the gradients of a convolution of one image into a transposed and a plain convolution.

    The input's gradient is the transposed convolution of the output's gradient with the same filters. A filter's
    gradient is the correlation of the input with the output's gradient: a convolution in which input channels act as
    images, the output's gradient acts as filters, and stride and dilation are exchanged.
    """
    spatial = range(len(stride))
    none = [0] * len(stride)
    of_x = of_weight = of_bias = None
    if wanted[0] and transposed:
        of_x = aten.convolution(gradient, weight, None, stride, padding, dilation, False, none, groups)
    elif wanted[0]:
        reached = [
            (gradient.shape[2 + i] - 1) * stride[i] - 2 * padding[i] + dilation[i] * (weight.shape[2 + i] - 1) + 1
            for i in spatial
        ]
        rest = [x.shape[2 + i] - reached[i] for i in spatial]
        of_x = aten.convolution(gradient, weight, None, stride, padding, dilation, True, rest, groups)
    if wanted[1]:
        if len(x) != 1:
            raise NotTranslatableError("graphs are made for one image, but a convolution got several")
        wide, narrow = (gradient, x) if transposed else (x, gradient)
        images = wide.reshape(groups, wide.shape[1] // groups, *wide.shape[2:]).transpose(0, 1)
        filters = narrow.transpose(0, 1)
        of_weight = aten.convolution(images, filters, None, dilation, padding, stride, False, none, groups)
        for i in spatial:  # drop positions beyond the filter, which exist if the stride does not divide the size
            of_weight = of_weight.narrow(2 + i, 0, weight.shape[2 + i])
        of_weight = of_weight.transpose(0, 1)
    if wanted[2]:
        of_bias = gradient.sum([0, *(2 + i for i in spatial)])
    return of_x, of_weight, of_bias


def variance_and_mean(
    x: Tensor, dim: Sequence[int] | None = None, *, correction: float | None = None, keepdim: bool = False
) -> tuple[Tensor, Tensor]:
    """Return variance and mean over the dimensions `dim`, or over all."""
    dims = list(dim) if dim else list(range(x.dim()))
    count = math.prod(x.shape[d] for d in dims)
    centred = x - x.mean(dims, keepdim=True)
    variance = (centred * centred).sum(dims, keepdim=keepdim) / (count - (1 if correction is None else correction))
    return variance, x.mean(dims, keepdim=keepdim)


def variance(
    x: Tensor, dim: Sequence[int] | None = None, *, correction: float | None = None, keepdim: bool = False
) -> Tensor:
    """Return the variance over the dimensions `dim`, or over all."""
    return variance_and_mean(x, dim, correction=correction, keepdim=keepdim)[0]


def group_norm(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, images: int, channels: int, pixels: int, groups: int,
    epsilon: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Group norm: returns normalised maps, mean and inverse deviation (images, groups), as the backward pass needs."""
    normalised, mean, inverse = _normalise(x.reshape(images, groups, -1), [2], epsilon)
    y = _affine(normalised.reshape(x.shape), weight, bias, [1, channels] + [1] * (x.dim() - 2))
    return y, mean.squeeze(2), inverse.squeeze(2)


def layer_norm(
    x: Tensor, shape: Sequence[int], weight: Tensor | None, bias: Tensor | None, epsilon: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Layer norm over the last dimensions, which have `shape`: returns the result, mean and inverse deviation."""
    dims = list(range(x.dim() - len(shape), x.dim()))
    normalised, mean, inverse = _normalise(x, dims, epsilon)
    return _affine(normalised, weight, bias, list(shape)), mean, inverse


def _normalise(x: Tensor, dims: list[int], epsilon: float) -> tuple[Tensor, Tensor, Tensor]:
    spread, mean = variance_and_mean(x, dims, correction=0, keepdim=True)
    inverse = (spread + epsilon).rsqrt()
    return (x - mean) * inverse, mean, inverse


def _affine(x: Tensor, weight: Tensor | None, bias: Tensor | None, shape: list[int]) -> Tensor:
    scaled = x if weight is None else x * weight.reshape(shape)
    return scaled if bias is None else scaled + bias.reshape(shape)


def slice_backward(
    gradient: Tensor, sizes: Sequence[int], dim: int, start: int | None, end: int | None, step: int
) -> Tensor:
    """Return zeros of `sizes` with the gradient in the place of the slice."""
    dim %= len(sizes)
    first = slice(start, end, step).indices(sizes[dim])[0]
    if step > 1:
        gradient = _padded(gradient.unsqueeze(dim + 1), dim + 1, 0, step - 1).flatten(dim, dim + 1)
        gradient = gradient.narrow(dim, 0, min(gradient.shape[dim], sizes[dim] - first))
    return _padded(gradient, dim, first, sizes[dim] - first - gradient.shape[dim])


def select_backward(gradient: Tensor, sizes: Sequence[int], dim: int, index: int) -> Tensor:
    """Return zeros of `sizes` with the gradient at `index` of dimension `dim`."""
    place = index % sizes[dim]
    return slice_backward(gradient.unsqueeze(dim), sizes, dim, place, place + 1, 1)


def _padded(x: Tensor, dim: int, before: int, after: int) -> Tensor:
    """Pad `x` with zeros before and after it along `dim`."""
    return aten.constant_pad_nd(x, [0, 0] * (x.dim() - 1 - dim) + [before, after])


def max_pool_backward(
    gradient: Tensor, x: Tensor, kernel: Sequence[int], stride: Sequence[int], padding: Sequence[int],
    dilation: Sequence[int], ceil_mode: bool, places: Tensor,
) -> Tensor:  # fmt: skip
    """Return the gradient of max pooling: each value is added at the position of its maximum, `places`."""
    empty = torch.zeros_like(x).flatten(2)
    return empty.scatter_add(2, places.flatten(2), gradient.flatten(2)).view(x.shape)


def average_pool(
    x: Tensor, kernel: Sequence[int], stride: Sequence[int] = (), padding: Sequence[int] = (0, 0),
    ceil_mode: bool = False, count_include_pad: bool = True, divisor_override: int | None = None,
) -> Tensor:  # fmt: skip
    """Average pooling as a depthwise convolution with constant weights."""
    weight = _averaging(x, kernel, padding, ceil_mode, count_include_pad, divisor_override)
    return aten.convolution(x, weight, None, _pair(stride or kernel), _pair(padding), [1, 1], False, [0, 0], x.shape[1])


def average_pool_backward(
    gradient: Tensor, x: Tensor, kernel: Sequence[int], stride: Sequence[int], padding: Sequence[int],
    ceil_mode: bool, count_include_pad: bool, divisor_override: int | None,
) -> Tensor:  # fmt: skip
    """Return the gradient of :func:`average_pool` with respect to its input."""
    weight = _averaging(x, kernel, padding, ceil_mode, count_include_pad, divisor_override)
    of_x, _, _ = convolution_backward(
        gradient, x, weight, None, _pair(stride or kernel), _pair(padding), [1, 1], False, [0, 0], x.shape[1],
        (True, False, False),
    )  # fmt: skip
    assert of_x is not None
    return of_x


def _averaging(
    x: Tensor, kernel: Sequence[int], padding: Sequence[int], ceil_mode: bool, count_pad: bool, divisor: int | None
) -> Tensor:
    if ceil_mode or (any(padding) and not count_pad):
        raise NotTranslatableError("there is no rule for average pooling with ceil_mode or count_include_pad=False")
    height, width = _pair(kernel)
    return torch.full((x.shape[1], 1, height, width), 1 / (divisor or height * width))


DECOMPOSITIONS = {
    aten.convolution_backward.default: convolution_backward,
    aten.max_pool2d_with_indices_backward.default: max_pool_backward,
    aten.var_mean.correction: variance_and_mean,
    aten.var.correction: variance,
    aten.native_group_norm.default: group_norm,
    aten.native_layer_norm.default: layer_norm,
    aten.slice_backward.default: slice_backward,
    aten.select_backward.default: select_backward,
    aten.avg_pool2d.default: average_pool,
    aten.avg_pool2d_backward.default: average_pool_backward,
}
