"""How a long computation tells how far it is. The core reports; the command line draws."""

from __future__ import annotations

from typing import Protocol


class Progress(Protocol):
    """Receives the course of one run: stages one after the other, each with a number of steps."""

    def begin(self, stage: str, steps: int) -> None:
        """A stage starts; it will take about `steps` steps."""

    def advance(self, steps: int = 1) -> None:
        """The current stage went on by `steps`."""

    def end(self) -> None:
        """The current stage is over, whether or not all its steps were needed."""


class Silent:
    """No display: tests and library use."""

    def begin(self, stage: str, steps: int) -> None:
        """Nothing to draw."""

    def advance(self, steps: int = 1) -> None:
        """Nothing to draw."""

    def end(self) -> None:
        """Nothing to draw."""
