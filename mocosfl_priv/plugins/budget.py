"""How much an attack may spend."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import TypeVar

from mocosfl_priv.runtime.progress import Progress, Silent

NumberT = TypeVar("NumberT", int, float)


class Budget:
    """How much an attack may spend, and what it spent.

    Args:
        seconds: wall-clock limit; None for no limit, which keeps runs repeatable.
        progress: shows the steps.
        stage: what progress calls them.
        steps: limit of the steps that are drawn from :meth:`iterate`; None for no limit.
        parent: the budget that this one is a part of.
        spent_seconds: what was used of it before, while observing the training.
        spent_steps: the same in steps.

    >>> budget = Budget(steps=2)
    >>> list(budget.iterate(planned=5)), budget.exhausted
    ([0, 1], True)
    """

    def __init__(
        self,
        seconds: float | None = None,
        progress: Progress | None = None,
        stage: str = "attack",
        *,
        steps: int | None = None,
        parent: Budget | None = None,
        spent_seconds: float = 0.0,
        spent_steps: int = 0,
    ) -> None:
        self.seconds = seconds
        self.step_limit = steps
        self.steps = spent_steps
        self._spent_seconds = spent_seconds
        self._progress = progress or Silent()
        self._stage = stage
        self._parent = parent
        self._started = time.monotonic()

    @property
    def elapsed(self) -> float:
        """Seconds since the budget was opened, and what was spent before."""
        return self._spent_seconds + time.monotonic() - self._started

    @property
    def exhausted(self) -> bool:
        """Whether the time is up or the steps are used."""
        return (
            (self.seconds is not None and self.elapsed >= self.seconds)
            or (self.step_limit is not None and self.steps >= self.step_limit)
            or (self._parent is not None and self._parent.exhausted)
        )

    def spent(self, step: int, planned: int) -> float:
        """How far a computation of `planned` steps is at its own `step`, in [0, 1], whatever ends it first.

        A schedule that follows it comes to its end in a limited time, too. Without a time limit it depends on steps
        only, so that runs are repeatable.
        """
        share = step / max(1, planned)
        if self.seconds is not None:
            share = max(share, self.elapsed / self.seconds)
        if self.step_limit is not None:
            share = max(share, step / max(1, self.step_limit))
        return min(1.0, share)

    def past(self, share: float) -> bool:
        """Whether `share` of a limit is gone, for attacks of several stages: a later one needs what is left."""
        return (self.seconds is not None and self.elapsed >= share * self.seconds) or (
            self.step_limit is not None and self.steps >= share * self.step_limit
        )

    def until(self, steps: Iterator[int], share: float) -> Iterator[int]:
        """`steps`, as drawn from :meth:`iterate`, but no more once `share` of a limit is gone."""
        for step in steps:
            yield step
            if self.past(share):
                return

    def part(self, *, seconds: float | None = None, steps: int | None = None, stage: str | None = None) -> Budget:
        """A budget within this one: at most what is left, and at most `seconds` and `steps`. Its steps count here."""
        left = None if self.seconds is None else max(0.0, self.seconds - self.elapsed)
        steps_left = None if self.step_limit is None else max(0, self.step_limit - self.steps)
        return Budget(
            _smaller(left, seconds),
            self._progress,
            stage or self._stage,
            steps=_smaller(steps_left, steps),
            parent=self,
        )

    def share(self, share: float) -> Budget:
        """A budget within this one: `share` of what is left of its limits."""
        seconds = None if self.seconds is None else share * max(0.0, self.seconds - self.elapsed)
        steps = None if self.step_limit is None else max(1, round(share * (self.step_limit - self.steps)))
        return self.part(seconds=seconds, steps=steps)

    def iterate(self, planned: int) -> Iterator[int]:
        """0, 1, ... for `planned` steps, or until the budget is exhausted."""
        self._progress.begin(self._stage, planned)
        try:
            for step in range(planned):
                if self.exhausted:
                    return
                self._count()
                yield step
                self._progress.advance()
        finally:
            self._progress.end()

    def _count(self) -> None:
        self.steps += 1
        if self._parent is not None:
            self._parent._count()


def _smaller(first: NumberT | None, second: NumberT | None) -> NumberT | None:
    """The smaller of two limits, where None is no limit."""
    if first is None or second is None:
        return second if first is None else first
    return min(first, second)
