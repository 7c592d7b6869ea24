"""Analytic cost of a client: floating-point operations and memory, computed from its network."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from mocosfl_priv.models.split import count_parameters

COPIES = 4  # of the parameters: online model, momentum model, optimiser's momentum, gradient


def training_flops(module: nn.Module, input_shape: Sequence[int]) -> int:
    """Return the floating-point operations of a forward and a backward pass of one image, by torch's counter.

    input_shape: without the batch axis.
    """
    device = next((p.device for p in module.parameters()), torch.device("cpu"))
    with FlopCounterMode(display=False) as counter:
        parameters = list(module.parameters())
        torch.autograd.grad(module(torch.zeros(1, *input_shape, device=device)).sum(), parameters, allow_unused=True)
    return int(counter.get_total_flops())


def tensor_bytes(module: nn.Module, input_shape: Sequence[int], frozen: bool) -> int:
    """Return the bytes of all tensors that a client needs to process one image; input_shape is without the batch axis.

    Trained: the parameters and their copies, the activations that autograd keeps, and the smashed data.
    Frozen: the parameters, and the two largest activations, since at most two need to exist at a time.
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
    """Return the floating-point operations of a client that sends `rows` queries and `rows` keys.

    A trained client also makes a backward pass for its queries. Before that it repeats their forward pass, since a
    device does not keep activations between sending the queries and receiving the gradient.

    forward: operations of a forward pass of one image. training: of a forward and a backward pass.
    """
    if frozen:
        return 2 * rows * forward
    return rows * (forward + training) + rows * forward
