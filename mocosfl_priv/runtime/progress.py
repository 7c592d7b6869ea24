"""How a long computation tells how far it is. The core reports; the command line draws."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol


@dataclass(frozen=True)
class Segment:
    """A part of a run that is planned before it starts.

    kind: segments of one kind take about the same time. guess: how long, before anything was measured (seconds on
    a slow machine); zero for what is so short that it tells nothing of how long others take.
    """

    title: str
    kind: str
    guess: float


class Progress(Protocol):
    """Receives the course of one run: planned segments, each with stages, each stage with a number of steps."""

    def plan(self, segments: list[Segment]) -> None:
        """All segments that will follow."""

    def segment(self) -> None:
        """The next planned segment starts."""

    def begin(self, stage: str, steps: int) -> None:
        """A stage starts; it will take about `steps` steps."""

    def advance(self, steps: int = 1) -> None:
        """The current stage went on by `steps`."""

    def end(self) -> None:
        """The current stage is over, whether or not all its steps were needed."""


class Silent:
    """No display: tests and library use."""

    def plan(self, segments: list[Segment]) -> None:
        """Nothing to draw."""

    def segment(self) -> None:
        """Nothing to draw."""

    def begin(self, stage: str, steps: int) -> None:
        """Nothing to draw."""

    def advance(self, steps: int = 1) -> None:
        """Nothing to draw."""

    def end(self) -> None:
        """Nothing to draw."""
