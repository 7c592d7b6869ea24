"""Check whether a network can be trained on micro-batches of one image, and replace norms that prevent it.

Works on any ``nn.Module``. A micro-batch may be a single image, and the clients' parameters are stacked and run through
``torch.func.vmap``. A client's network must therefore neither mix the images of a batch nor keep statistics of
them.
"""

from __future__ import annotations

import copy
from typing import Any

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.instancenorm import _InstanceNorm
from torch.nn.modules.lazy import LazyModuleMixin
from torch.nn.parameter import UninitializedBuffer, is_lazy

from mocosfl_priv.models.layers import CHANNELS_PER_GROUP


def explain(module: nn.Module) -> list[str]:
    """List the submodules of `module` that prevent such training, one line each: dotted name, class and reason.

    Empty if the whole module can be trained.
    """
    lines = []
    owners: dict[int, str] = {}
    seen: set[nn.Module] = set()
    for name, submodule in module.named_modules(remove_duplicate=False):
        reason = _shares(name, submodule, owners) or ("" if submodule in seen else _reason(submodule))
        if reason:
            lines.append(f"{name or 'the module'}: {type(submodule).__name__} {reason}")
        seen.add(submodule)
    return lines


def _reason(module: nn.Module) -> str:
    """Why `module` cannot be trained on single images; empty if it can. Ignores its submodules."""
    if isinstance(module, LazyModuleMixin) and module.has_uninitialized_params():
        return "has no parameters before its first batch, so there are none to stack for the clients"
    if isinstance(module, _BatchNorm):
        statistics = " and keeps running statistics" if module.track_running_stats else ""
        return f"mixes the images of a batch{statistics}"
    if isinstance(module, _InstanceNorm) and module.track_running_stats:
        return "keeps running statistics of the images of a batch"
    return ""


def _shares(name: str, module: nn.Module, owners: dict[int, str]) -> str:
    """Why `module` is refused if it shares a parameter with an earlier module; empty if it does not.

    owners: the name of the first module that has each parameter, by the parameter's id; extended here.
    """
    for parameter_name, parameter in module.named_parameters(recurse=False, remove_duplicate=False):
        owner = owners.setdefault(id(parameter), name)
        if owner != name:
            return (
                f"shares its {parameter_name} with {owner}; parameters cannot be shared between modules, since the "
                "model is cut between units and clients' parameters are stacked by name"
            )
    return ""


def mend(module: nn.Module) -> nn.Module:
    """Return a copy of `module` in which norms with batch or running statistics are replaced by GroupNorms.

    A BatchNorm becomes a GroupNorm with four channels per group, or with the divisor of its number of channels that is
    nearest to four; an InstanceNorm with running statistics becomes one with one channel per group. Affine parameters,
    epsilon, device and dtype are kept, running statistics are dropped. Other problems are left as they are.
    """
    mended: dict[nn.Module, nn.Module] = {}
    # deepcopy fails on uninitialised buffers of lazy modules, so they are replaced by new ones
    lazy_buffers: dict[int, Any] = {id(b): UninitializedBuffer() for b in module.buffers() if is_lazy(b)}
    root = nn.Sequential(copy.deepcopy(module, lazy_buffers))  # a parent, so that `module` itself can be replaced too
    for parent in list(root.modules()):
        for name, child in list(parent._modules.items()):
            if isinstance(child, _BatchNorm | _InstanceNorm) and _mendable(child):
                if child not in mended:
                    mended[child] = _as_group_norm(child)
                setattr(parent, name, mended[child])
    return root[0]


def _mendable(norm: _BatchNorm | _InstanceNorm) -> bool:
    lazy = isinstance(norm, LazyModuleMixin) and norm.has_uninitialized_params()
    return not lazy and bool(_reason(norm))


def _as_group_norm(norm: _BatchNorm | _InstanceNorm) -> nn.GroupNorm:
    channels = norm.num_features
    per_group = 1 if isinstance(norm, _InstanceNorm) else _channels_per_group(channels)
    group_norm = nn.GroupNorm(channels // per_group, channels, eps=norm.eps, affine=norm.affine)
    if norm.affine:
        group_norm.weight, group_norm.bias = norm.weight, norm.bias
    return group_norm.train(norm.training)


def _channels_per_group(channels: int) -> int:
    """The divisor of `channels` nearest to four; of two equally near, the larger.

    A group of one channel is best avoided: where a map has one pixel, its normalised value is a constant.
    """
    divisors = [d for d in range(1, channels + 1) if channels % d == 0]
    return min(divisors, key=lambda d: (abs(d - CHANNELS_PER_GROUP), -d))
