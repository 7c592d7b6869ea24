"""A user's own backbone: a function (width, image_size) that returns a list of torch modules, the units.

The model can be cut after any unit.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.func import functional_call, vmap

from mocosfl_priv.errors import ConfigurationError
from mocosfl_priv.runtime.imports import code_sha256, load_function, one_line


def is_own(reference: str) -> bool:
    """Whether `reference` refers to a user's code, as ``package.module:function`` or ``file.py:function``."""
    return ":" in reference


def backbone_code(backbone: str) -> str:
    """SHA-256 of a user's own backbone, with what its file imports from beside it; empty for ours, which the version
    identifies.
    """
    if not is_own(backbone):
        return ""
    return code_sha256(Path(inspect.getfile(inspect.unwrap(load_function(backbone)))))


def build_own_units(reference: str, width: int | None, image_size: int) -> list[nn.Module]:
    """Call the user's function; raises ConfigurationError if it fails or does not return a list of torch modules."""
    function = load_function(reference)
    try:
        units = function(width, image_size)
    except Exception as error:  # a user's function can fail in any way
        raise ConfigurationError(
            f"model.backbone: {reference}(width={width}, image_size={image_size}) failed: {one_line(error)}"
        ) from error
    if not isinstance(units, list | tuple | nn.Sequential) or len(units) == 0:
        raise ConfigurationError(
            f"model.backbone: {reference} must return a list of torch modules, not {_described(units)}"
        )
    for number, unit in enumerate(units, start=1):
        if not isinstance(unit, nn.Module):
            raise ConfigurationError(
                f"model.backbone: unit {number} of {reference} is a {type(unit).__name__}, not a torch module"
            )
    return list(units)


def _described(units: object) -> str:
    return f"an empty {type(units).__name__}" if isinstance(units, list | tuple) else f"a {type(units).__name__}"


def check_stackable(units: Sequence[nn.Module], image_size: int, reference: str) -> None:
    """Check that the client's units can be trained for several clients at once.

    Run them as training does: stack the parameters of two clients, and make one vectorised forward and backward pass.
    Raises ConfigurationError, which names the unit, if that fails or a parameter gets no gradient.
    """
    x = torch.zeros(2, 1, 3, image_size, image_size)
    for number, unit in enumerate(units, start=1):
        who = f"model.backbone: unit {number} ({type(unit).__name__}) of {reference}"
        stacked = {
            name: torch.stack([parameter.detach()] * 2).requires_grad_() for name, parameter in unit.named_parameters()
        }
        try:
            x = _stacked_forward(unit, stacked, x.detach())
            if x.requires_grad:
                x.sum().backward()
        except Exception as error:  # a user's unit can fail in any way
            raise ConfigurationError(f"{who} cannot be run for several clients at once: {one_line(error)}") from error
        unused = [name for name, parameter in stacked.items() if parameter.grad is None]
        if unused:
            raise ConfigurationError(f"{who} does not use its parameter {unused[0]}, which therefore cannot be trained")


def _stacked_forward(unit: nn.Module, stacked: dict[str, Tensor], images: Tensor) -> Tensor:
    def one_client(parameters: dict[str, Tensor], its_images: Tensor) -> Tensor:
        return functional_call(unit, parameters, (its_images,))

    encoded: Tensor = vmap(one_client, randomness="different")(stacked, images)
    return encoded
