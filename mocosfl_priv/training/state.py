"""The state of a training as named tensors, which checkpoints keep."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

State = dict[str, Tensor]


def under(prefix: str, state: Mapping[str, Tensor]) -> State:
    """The same entries below `prefix`; :func:`within` takes them out again."""
    return {f"{prefix}.{name}": value for name, value in state.items()}


def within(state: State, prefix: str) -> State:
    """The entries below `prefix`, without it."""
    return {name[len(prefix) + 1 :]: value for name, value in state.items() if name.startswith(f"{prefix}.")}
