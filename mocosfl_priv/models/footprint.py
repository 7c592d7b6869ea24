"""What a client computes and keeps, counted on its network: the analytic part of its cost."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from mocosfl_priv.models.split import count_parameters

COPIES = 4  # of the parameters: online and momentum model, optimiser, gradient


def training_flops(module: nn.Module, input_shape: Sequence[int]) -> int:
    """Floating-point operations of a forward and a backward pass of one image, by torch's counter."""
    device = next((p.device for p in module.parameters()), torch.device("cpu"))
    with FlopCounterMode(display=False) as counter:
        parameters = list(module.parameters())
        torch.autograd.grad(module(torch.zeros(1, *input_shape, device=device)).sum(), parameters, allow_unused=True)
    return int(counter.get_total_flops())


def tensor_bytes(module: nn.Module, input_shape: Sequence[int], frozen: bool) -> int:
    """Bytes of tensors that one image needs, by what autograd keeps: parameters, their copies, and activations.

    Frozen: one copy of the parameters and the two largest neighbouring maps, of which nothing is kept.
    """
    parameters = 4 * count_parameters(module)
    image = torch.zeros(1, *input_shape, device=next((p.device for p in module.parameters()), None))
    kept: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    own = {parameter.untyped_storage().data_ptr() for parameter in module.parameters()}
    with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        smashed = module(image)
    if frozen:
        largest = sorted((size for place, size in kept.items() if place not in own), reverse=True)
        return parameters + sum(largest[:2])
    activations = sum(size for place, size in kept.items() if place not in own)
    return COPIES * parameters + activations + smashed.numel() * smashed.element_size()


def participation_flops(forward: int, training: int, *, rows: int, frozen: bool) -> int:
    """Of a client that sends so many queries, and as many keys: all forward, queries backward unless it is frozen.

    forward, training: of one image, forward; forward and backward. A device computes the forward pass of its queries a
    second time with their gradient, since it keeps none of it.
    """
    if frozen:
        return 2 * rows * forward
    return rows * (forward + training) + rows * forward
