"""Ctrl-C at a known moment."""

from __future__ import annotations

from mocosfl_priv.runtime.progress import Silent


class Interruption(Silent):
    """Ctrl-C after so many steps."""

    def __init__(self, steps: int) -> None:
        self.steps = steps

    def advance(self, steps: int = 1) -> None:
        self.steps -= steps
        if self.steps < 0:
            raise KeyboardInterrupt
