"""The state of a training as named tensors, for checkpoints."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

State = dict[str, Tensor]


def under(prefix: str, state: Mapping[str, Tensor]) -> State:
    """The same entries below `prefix`; :func:`within` takes them out again.

    Args:
        prefix: what is put before each name, with a dot.
        state: tensors by name.

    Returns:
        A new dictionary with the same tensors.

    >>> sorted(under("decoder", {"weight": torch.zeros(1)}))
    ['decoder.weight']
    """
    return {f"{prefix}.{name}": value for name, value in state.items()}


def within(state: State, prefix: str) -> State:
    """The entries below `prefix`, without it: the inverse of :func:`under`.

    Args:
        state: tensors by name.
        prefix: what stands before the names that are looked for, without the dot.

    Returns:
        A new dictionary with the same tensors; empty if there are none.

    >>> sorted(within({"decoder.weight": torch.zeros(1), "step": torch.zeros(1)}, "decoder"))
    ['weight']
    """
    return {name[len(prefix) + 1 :]: value for name, value in state.items() if name.startswith(f"{prefix}.")}


def optimiser_state(optimiser: torch.optim.Optimizer) -> State:
    """Return the optimiser's buffers (Adam's moments, SGD's momentum), as ``<index of the parameter>.<name>``.

    Rates and other settings are not state: the code that makes the optimiser sets them.

    Args:
        optimiser: any optimiser of torch.

    Returns:
        Tensors by name; empty before the first step.

    >>> weight = torch.ones(2, requires_grad=True)
    >>> optimiser = torch.optim.Adam([weight])
    >>> weight.sum().backward()
    >>> optimiser.step()
    >>> sorted(optimiser_state(optimiser))
    ['0.exp_avg', '0.exp_avg_sq', '0.step']
    """
    return {
        f"{index}.{name}": value
        for index, parameter in enumerate(_parameters(optimiser))
        for name, value in optimiser.state.get(parameter, {}).items()
        if isinstance(value, Tensor)  # SGD without momentum stores None
    }


def load_optimiser_state(optimiser: torch.optim.Optimizer, state: State) -> None:
    """Restore what :func:`optimiser_state` returned, also when it was taken before the first step.

    Args:
        optimiser: one for parameters of the same shapes in the same order. Its own state is dropped.
        state: tensors by name.

    >>> weight = torch.ones(2, requires_grad=True)
    >>> optimiser = torch.optim.SGD([weight], lr=0.1, momentum=0.9)
    >>> load_optimiser_state(optimiser, {"0.momentum_buffer": torch.tensor([1.0, 2.0])})
    >>> optimiser_state(optimiser)["0.momentum_buffer"]
    tensor([1., 2.])
    """
    parameters = _parameters(optimiser)
    optimiser.state.clear()
    for key, value in state.items():
        index, name = key.split(".")
        parameter = parameters[int(index)]
        # torch keeps Adam's step counter on the CPU
        place = torch.device("cpu") if name == "step" else parameter.device
        optimiser.state[parameter][name] = value.detach().clone().to(place)


class Learner:
    """A network and the optimiser of its parameters, as one thing to train and to keep.

    Attacks that attend a training use it for the networks of their listener.

    Args:
        network: what learns.
        optimiser: of the parameters of `network`.

    >>> learner = Learner.with_adam(nn.Linear(2, 1), learning_rate=0.1)
    >>> before = learner.network.weight.detach().clone()
    >>> learner.learn(learner.network(torch.ones(4, 2)).square().mean())
    >>> torch.equal(learner.network.weight, before)
    False
    >>> learner.load_state(learner.state())
    """

    def __init__(self, network: nn.Module, optimiser: torch.optim.Optimizer) -> None:
        self.network = network
        self._optimiser = optimiser

    @classmethod
    def with_adam(cls, network: nn.Module, learning_rate: float, momentum: float = 0.9) -> Learner:
        """A learner with Adam, with the momenta that networks which are trained against each other commonly have.

        Args:
            network: what learns.
            learning_rate: Adam's, constant.
            momentum: Adam's first one; the second one is 0.99.

        Returns:
            The learner.
        """
        return cls(network, torch.optim.Adam(network.parameters(), lr=learning_rate, betas=(momentum, 0.99)))

    def learn(self, loss: Tensor) -> None:
        """One step down `loss`; what else it was computed with gets no gradient, and its graph is kept.

        Args:
            loss: a scalar that depends on the network's parameters.
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
