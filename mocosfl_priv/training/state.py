"""The state of a training as named tensors, which checkpoints keep."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

State = dict[str, Tensor]


def under(prefix: str, state: Mapping[str, Tensor]) -> State:
    """The same entries below `prefix`; :func:`within` takes them out again."""
    return {f"{prefix}.{name}": value for name, value in state.items()}


def within(state: State, prefix: str) -> State:
    """The entries below `prefix`, without it."""
    return {name[len(prefix) + 1 :]: value for name, value in state.items() if name.startswith(f"{prefix}.")}


def optimiser_state(optimiser: torch.optim.Optimizer) -> State:
    """What `optimiser` has gathered (Adam's moments, SGD's momentum), as ``<index of the parameter>.<name>``.

    Rates and other settings are not state: whoever made the optimiser knows them.
    """
    return {
        f"{index}.{name}": value
        for index, parameter in enumerate(_parameters(optimiser))
        for name, value in optimiser.state.get(parameter, {}).items()
        if isinstance(value, Tensor)  # SGD without momentum notes a None
    }


def load_optimiser_state(optimiser: torch.optim.Optimizer, state: State) -> None:
    """Go on where :func:`optimiser_state` was taken, also from before the first step."""
    parameters = _parameters(optimiser)
    optimiser.state.clear()
    for key, value in state.items():
        index, name = key.split(".")
        parameter = parameters[int(index)]
        # torch counts Adam's steps on the CPU
        place = torch.device("cpu") if name == "step" else parameter.device
        optimiser.state[parameter][name] = value.detach().clone().to(place)


def _parameters(optimiser: torch.optim.Optimizer) -> list[Tensor]:
    return [parameter for group in optimiser.param_groups for parameter in group["params"]]
