"""The state of a training as named tensors, for checkpoints."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

State = dict[str, Tensor]


def under(prefix: str, state: Mapping[str, Tensor]) -> State:
    """Return `state` with every name prefixed by ``<prefix>.``; :func:`within` reverses this."""
    return {f"{prefix}.{name}": value for name, value in state.items()}


def within(state: State, prefix: str) -> State:
    """Return the entries whose name starts with ``<prefix>.``, without that prefix."""
    return {name[len(prefix) + 1 :]: value for name, value in state.items() if name.startswith(f"{prefix}.")}


def optimiser_state(optimiser: torch.optim.Optimizer) -> State:
    """Return the optimiser's buffers (Adam's moments, SGD's momentum), as ``<index of the parameter>.<name>``.

    Learning rates and other settings are not included: the code that builds the optimiser sets them.
    """
    return {
        f"{index}.{name}": value
        for index, parameter in enumerate(_parameters(optimiser))
        for name, value in optimiser.state.get(parameter, {}).items()
        if isinstance(value, Tensor)  # SGD without momentum stores None
    }


def load_optimiser_state(optimiser: torch.optim.Optimizer, state: State) -> None:
    """Restore what :func:`optimiser_state` returned; it may have been called before the first step."""
    parameters = _parameters(optimiser)
    optimiser.state.clear()
    for key, value in state.items():
        index, name = key.split(".")
        parameter = parameters[int(index)]
        # torch keeps Adam's step counter on the CPU
        place = torch.device("cpu") if name == "step" else parameter.device
        optimiser.state[parameter][name] = value.detach().clone().to(place)


class Learner:
    """A network together with the optimiser of its parameters."""

    def __init__(self, network: nn.Module, optimiser: torch.optim.Optimizer) -> None:
        self.network = network
        self._optimiser = optimiser

    @classmethod
    def with_adam(cls, network: nn.Module, learning_rate: float, momentum: float = 0.9) -> Learner:
        """Use Adam with betas (`momentum`, 0.99), as is common for networks trained against each other."""
        return cls(network, torch.optim.Adam(network.parameters(), lr=learning_rate, betas=(momentum, 0.99)))

    def learn(self, loss: Tensor) -> None:
        """Take one optimiser step that lowers `loss`, a scalar.

        Parameters outside the network get no gradient. The autograd graph is kept, so `loss` can be used again.
        """
        parameters = _parameters(self._optimiser)
        gradients = torch.autograd.grad(loss, parameters, retain_graph=True, allow_unused=True)
        for parameter, gradient in zip(parameters, gradients, strict=True):
            parameter.grad = gradient
        self._optimiser.step()
        self._optimiser.zero_grad(set_to_none=True)

    def state(self) -> State:
        """Return the weights and the optimiser's buffers."""
        return {
            **under("network", self.network.state_dict()),
            **under("optimiser", optimiser_state(self._optimiser)),
        }

    def load_state(self, state: State) -> None:
        """Restore what :meth:`state` returned."""
        self.network.load_state_dict(within(state, "network"))
        load_optimiser_state(self._optimiser, within(state, "optimiser"))


def _parameters(optimiser: torch.optim.Optimizer) -> list[Tensor]:
    return [parameter for group in optimiser.param_groups for parameter in group["params"]]


def numbered(prefix: str, states: Sequence[State]) -> State:
    """Join several states into one, with names ``<prefix>.<index>.<name>``; :func:`counted` separates them again."""
    return {
        name: value for index, state in enumerate(states) for name, value in under(f"{prefix}.{index}", state).items()
    }


def counted(state: State, prefix: str, device: torch.device) -> tuple[State, ...]:
    """Return the states that :func:`numbered` joined under `prefix`, on `device`."""
    indices = sorted({int(name.split(".", 1)[0]) for name in within(state, prefix)})
    return tuple(
        {name: value.to(device) for name, value in within(state, f"{prefix}.{index}").items()} for index in indices
    )
