"""New weights for a network that is there."""

from __future__ import annotations

import copy
from collections.abc import Collection

import torch
from torch import nn

from mocosfl_priv.errors import ConfigurationError
from mocosfl_priv.runtime.imports import one_line
from mocosfl_priv.runtime.seeding import global_seed


def reinitialised(client: nn.Module, seed: int, needed: Collection[str] | None = None) -> nn.Module:
    """Return a copy of `client` with newly initialised weights.

    Every module's ``reset_parameters`` is called, or torch's ``_reset_parameters``. The function that built `client` is
    not called again, since it may load trained weights. Buffers that no module resets are kept: they are constants,
    such as the colour mean of a normalisation.

    Args:
        client: Any module; it is not changed.
        seed: Seed of the new weights.
        needed: Names of the parameters that must be new; None for all.

    Returns:
        The copy. Parameters that are neither reset nor needed are NaN.

    Raises:
        ConfigurationError: A parameter would keep its trained values, since no module resets it.
    """
    fresh = copy.deepcopy(client)
    with torch.no_grad():
        for parameter in fresh.parameters():
            if parameter.is_floating_point():
                parameter.fill_(torch.nan)  # what is NaN in the end was not reset
    with global_seed(seed, "initialisation"):
        for name, module in fresh.named_modules():
            reset = getattr(module, "reset_parameters", None) or getattr(module, "_reset_parameters", None)
            if not callable(reset):
                continue
            try:
                reset()
            except Exception as error:  # a user's method can fail in any way
                raise ConfigurationError(
                    f"no untrained copy: {reset.__name__} of {name or 'the module'} failed: {one_line(error)}"
                ) from error
    for name, parameter in fresh.named_parameters(remove_duplicate=False):
        kept = not parameter.is_floating_point() or bool(parameter.isnan().any())
        if kept and (needed is None or name in needed):
            owner = fresh.get_submodule(name.rpartition(".")[0])
            raise ConfigurationError(
                f"no untrained copy: nothing initialises {name} anew; give {type(owner).__name__} a method "
                "reset_parameters() that does"
            )
    return fresh
