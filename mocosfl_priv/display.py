"""Live progress of a run in the terminal: stage, share done, time left."""

from __future__ import annotations

import time
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TaskProgressColumn, TextColumn
from rich.progress import Progress as Bars

from mocosfl_priv.progress import Segment

MINIMUM_SECONDS = 0.05


class TimeLeft:
    """Estimates what is left from what each kind of segment took so far.

    A segment starts with a guess in arbitrary units. Kinds that were seen count with their measured mean; the
    guesses of the others are scaled by how the measured ones turned out.
    """

    def __init__(self, segments: list[Segment]) -> None:
        self._segments = segments
        self._measured: dict[str, list[float]] = {}
        self._guesses: dict[str, float] = {segment.kind: segment.guess for segment in segments}
        self._done = 0

    def finish(self, seconds: float) -> None:
        """The current segment is over."""
        self._measured.setdefault(self._segments[self._done].kind, []).append(max(seconds, MINIMUM_SECONDS))
        self._done += 1

    def left(self, elapsed: float, share: float) -> float:
        """Seconds left, when the current segment has run for `elapsed` and is done to `share` (0 to 1)."""
        if self._done >= len(self._segments):
            return 0.0
        current = self._segments[self._done]
        expected = self._expected(current)
        if share > 0.05:  # what is seen of this segment counts more and more
            expected = (1 - share) * expected + share * elapsed / share
        remaining = max(expected - elapsed, 0.0) if share < 1 else 0.0
        return remaining + sum(self._expected(segment) for segment in self._segments[self._done + 1 :])

    def _expected(self, segment: Segment) -> float:
        seen = self._measured.get(segment.kind)
        if seen:
            return sum(seen) / len(seen)
        guessed = sum(self._guesses[kind] * len(times) for kind, times in self._measured.items())
        actual = sum(sum(times) for times in self._measured.values())
        return segment.guess * (actual / guessed if guessed else 1.0)


class TerminalProgress:
    """Draws two bars on a terminal; prints a line per segment where there is none. Use as a context manager."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._bars = Bars(
            TextColumn("{task.description}"),
            BarColumn(bar_width=28),
            TaskProgressColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[left]}"),
            console=console,
            transient=True,
        )
        self._time = TimeLeft([])
        self._count = 0
        self._index = 0
        self._run_started = time.monotonic()
        self._segment_started = self._run_started
        self._stage_steps = 1
        self._stage_done = 0
        self._titles: list[str] = []
        self._run = self._bars.add_task("run", total=None, left="")
        self._stage = self._bars.add_task("", total=None, left="", visible=False)

    def __enter__(self) -> TerminalProgress:
        if self._console.is_terminal:
            self._bars.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._console.is_terminal:
            self._bars.stop()

    def plan(self, segments: list[Segment]) -> None:
        """See :class:`mocosfl_priv.progress.Progress`."""
        self._time = TimeLeft(segments)
        self._titles = [segment.title for segment in segments]
        self._bars.update(self._run, total=len(segments), completed=0)

    def segment(self) -> None:
        """See :class:`mocosfl_priv.progress.Progress`."""
        now = time.monotonic()
        if self._index:
            self._time.finish(now - self._segment_started)
        self._segment_started = now
        self._stage_steps, self._stage_done = 1, 0
        title = self._titles[self._index] if self._index < len(self._titles) else "report"
        self._bars.update(self._run, completed=self._index, description=f"[bold]{title}")
        self._index += 1
        if not self._console.is_terminal:
            elapsed = round(now - self._run_started)
            line = f"[{self._index}/{len(self._titles)}] {elapsed // 60}:{elapsed % 60:02d} {title} · {self._left()}"
            self._console.print(line, highlight=False, markup=False, soft_wrap=True)

    def begin(self, stage: str, steps: int) -> None:
        """See :class:`mocosfl_priv.progress.Progress`."""
        self._stage_steps, self._stage_done = max(1, steps), 0
        self._bars.reset(self._stage, total=self._stage_steps, description=f"  {stage}", visible=True)

    def advance(self, steps: int = 1) -> None:
        """See :class:`mocosfl_priv.progress.Progress`."""
        self._stage_done += steps
        self._bars.update(self._stage, completed=self._stage_done)
        self._bars.update(self._run, left=self._left())

    def end(self) -> None:
        """See :class:`mocosfl_priv.progress.Progress`."""
        self._bars.update(self._stage, visible=False)

    def _left(self) -> str:
        share = min(1.0, self._stage_done / self._stage_steps)
        seconds = round(self._time.left(time.monotonic() - self._segment_started, share))
        return f"about {seconds // 60}:{seconds % 60:02d} left"
