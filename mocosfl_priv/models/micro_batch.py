"""What keeps a network from being trained image by image and client by client, and a cure for its norms.

Works on any ``nn.Module``. A micro-batch may be a single image, and the clients' parameters are stacked and run through
``torch.func.vmap``, so a client may neither mix the images of a batch nor keep statistics of them.
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
    """One line per submodule of `module` that stands in the way: its dotted name and why; empty if none does."""
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
    if isinstance(module, LazyModuleMixin) and module.has_uninitialized_params():
        return "has no parameters before its first batch, so there is nothing to stack for the clients"
    if isinstance(module, _BatchNorm):
        statistics = " and keeps running statistics" if module.track_running_stats else ""
        return f"mixes the images of a batch{statistics}"
    if isinstance(module, _InstanceNorm) and module.track_running_stats:
        return "keeps running statistics of the images of a batch"
    return ""


def _shares(name: str, module: nn.Module, owners: dict[int, str]) -> str:
    """Why `module` is refused if one of its own parameters belongs to an earlier module; notes the owners."""
    for parameter_name, parameter in module.named_parameters(recurse=False, remove_duplicate=False):
        owner = owners.setdefault(id(parameter), name)
        if owner != name:
            return f"shares its {parameter_name} with {owner}, which a cut or the stacking of clients would separate"
    return ""


def mend(module: nn.Module) -> nn.Module:
    """A copy of `module` in which norms with batch statistics are GroupNorms over the same channels.

    Each BatchNorm gets four channels a group, or the divisor of its channels nearest to four; an InstanceNorm with
    running statistics gets one. Affine parameters, epsilon, device and dtype are kept, running statistics are lost.
    """
    mended: dict[nn.Module, nn.Module] = {}
    # torch copies parameters of lazy modules, but not their buffers
    lazy_buffers: dict[int, Any] = {id(b): UninitializedBuffer() for b in module.buffers() if is_lazy(b)}
    root = nn.Sequential(copy.deepcopy(module, lazy_buffers))  # so that the module itself can be replaced, too
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
    """The divisor nearest to four; of two, the larger: a group of one is a constant wherever the map has one pixel."""
    divisors = [d for d in range(1, channels + 1) if channels % d == 0]
    return min(divisors, key=lambda d: (abs(d - CHANNELS_PER_GROUP), -d))
