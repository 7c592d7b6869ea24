"""What the tests of defenses with learned noise share."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch
from torch import Tensor

from mocosfl_priv import Defense, MessageKind
from mocosfl_priv.plugins.defense_checks import small_context
from mocosfl_priv.runtime.compute import Compute

D = TypeVar("D", bound=Defense)


def prepared(defense: D, compute: Compute) -> tuple[D, tuple[int, ...]]:
    """`defense` after its `prepare`, and the shape of a message."""
    context = small_context(defense, compute)
    defense.prepare(context)
    return defense, tuple(context.build_model().smashed_shape)


def require_resumes_exactly(
    make: Callable[[], Defense], messages: float, gradient: Callable[[Tensor], Tensor], compute: Compute
) -> None:
    """Assert that a defense that resumes from another one's state learns the same noise from then on.

    messages: every number of a message before protection. gradient: what returns for the messages that were sent.
    """
    (first, shape), (second, _) = prepared(make(), compute), prepared(make(), compute)

    def learn(defense: Defense, seed: int) -> None:
        rng = torch.Generator().manual_seed(seed)
        sent = defense.protect(torch.full((8, *shape), messages), rng, MessageKind.QUERY)
        defense.filter_gradient(gradient(sent), rng)

    learn(first, 0)
    second.load_state({name: value.clone() for name, value in first.state().items()})
    learn(first, 1)
    learn(second, 1)
    assert all(torch.equal(value, second.state()[name]) for name, value in first.state().items())
