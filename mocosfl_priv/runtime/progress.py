"""Progress reports of long computations: the core reports progress, and the command line displays it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol


@dataclass(frozen=True)
class Segment:
    """A part of a run, announced before the run starts.

    kind: segments of the same kind take about the same time.
    guess: estimated seconds on a slow machine, used until a segment has been measured; zero for segments too short to
        predict from them how long others take.
    """

    title: str
    kind: str
    guess: float


class Progress(Protocol):
    """Receives the progress of one run, which consists of planned segments; a segment has stages, a stage has steps."""

    def plan(self, segments: list[Segment]) -> None:
        """Announce all segments of the run, in order."""

    def segment(self) -> None:
        """Start the next planned segment."""

    def begin(self, stage: str, steps: int) -> None:
        """Start a stage of about `steps` steps."""

    def advance(self, steps: int = 1) -> None:
        """Report that the current stage has advanced by `steps` steps."""

    def end(self) -> None:
        """End the current stage, whether or not all its steps were needed."""


class Silent:
    """No-op progress, for tests and for use as a library."""

    def plan(self, segments: list[Segment]) -> None:
        """Do nothing."""

    def segment(self) -> None:
        """Do nothing."""

    def begin(self, stage: str, steps: int) -> None:
        """Do nothing."""

    def advance(self, steps: int = 1) -> None:
        """Do nothing."""

    def end(self) -> None:
        """Do nothing."""
