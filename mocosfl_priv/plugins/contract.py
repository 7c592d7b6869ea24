"""What the contracts of attacks and defenses share: how a broken promise becomes one line."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TypeVar

import torch
from torch import Tensor

from mocosfl_priv.errors import ConfigurationError
from mocosfl_priv.runtime.imports import one_line

MakeT = TypeVar("MakeT")


def require(
    checks: Sequence[Callable[[MakeT], None]],
    make: MakeT,
    who: str,
    kind: str,
    tried_on: str,
    broken: tuple[type[Exception], ...] = (AssertionError,),
) -> None:
    """Raise ConfigurationError, in one line, unless all `checks` of `make` pass.

    who: the plugin's name in the message. kind: "an attack" or "a defense". tried_on: what the checks give to it.
    broken: what a check raises for a broken promise; anything else is a failure of the plugin's code.
    """
    for check in checks:
        try:
            check(make)
        except broken as promise:
            raise ConfigurationError(f"{who} breaks the contract of {kind}: {promise}") from promise
        except ConfigurationError:
            raise
        except Exception as error:  # a user's code can fail in any way
            raise ConfigurationError(f"{who} fails on {tried_on}: {one_line(error)}") from error


def copied(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A copy of a state, without gradients."""
    return {name: value.detach().clone() for name, value in state.items()}


def same(first: Mapping[str, Tensor], second: Mapping[str, Tensor]) -> bool:
    """Whether two states have the same names and equal values."""
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)
