"""The state of a training as named tensors, which checkpoints keep."""

from __future__ import annotations

from torch import Tensor

State = dict[str, Tensor]


def within(state: State, prefix: str) -> State:
    """The entries below `prefix`, without it."""
    return {name[len(prefix) + 1 :]: value for name, value in state.items() if name.startswith(f"{prefix}.")}
