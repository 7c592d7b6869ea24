"""Live progress of a run or sweep in the terminal: current stage, share done, estimated time left."""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TaskProgressColumn, TextColumn
from rich.progress import Progress as Bars

from mocosfl_priv.runtime.progress import Segment
from mocosfl_priv.sweep.schedule import Task

MINIMUM_SECONDS = 0.05


class Expectations:
    """Estimates how long a segment takes, from the times of finished segments.

    Every segment has a guess in arbitrary units. If segments of the same kind have finished, the estimate is their
    mean time; otherwise it is the guess, scaled by the ratio of measured to guessed time of all finished segments.
    """

    def __init__(self, segments: Iterable[Segment]) -> None:
        self._measured: dict[str, list[float]] = {}
        self._guesses: dict[str, float] = {segment.kind: segment.guess for segment in segments}

    def finish(self, segment: Segment, seconds: float) -> None:
        """Record that `segment` took `seconds`."""
        self._measured.setdefault(segment.kind, []).append(max(seconds, MINIMUM_SECONDS))

    def of(self, segment: Segment) -> float:
        """Return the expected duration of `segment` in seconds."""
        seen = self._measured.get(segment.kind)
        if seen:
            return sum(seen) / len(seen)
        guessed = sum(self._guesses[kind] * len(times) for kind, times in self._measured.items())
        actual = sum(sum(times) for times in self._measured.values())
        return segment.guess * (actual / guessed if guessed else 1.0)


class TimeLeft:
    """Estimates the time left of segments that run one after the other."""

    def __init__(self, segments: list[Segment]) -> None:
        self._segments = segments
        self._expected = Expectations(segments)
        self._done = 0

    def finish(self, seconds: float) -> None:
        """Record that the current segment is over and took `seconds`."""
        self._expected.finish(self._segments[self._done], seconds)
        self._done += 1

    def left(self, elapsed: float, share: float) -> float:
        """Return the seconds left, given seconds `elapsed` in the current segment and its finished `share` (0 to 1)."""
        if self._done >= len(self._segments):
            return 0.0
        expected = self._expected.of(self._segments[self._done])
        if share > 0.05:  # weigh the pace of this segment more as it progresses
            expected = (1 - share) * expected + share * elapsed / share
        remaining = max(expected - elapsed, 0.0) if share < 1 else 0.0
        return remaining + sum(self._expected.of(segment) for segment in self._segments[self._done + 1 :])


class TerminalProgress:
    """Progress of a run: two bars on a terminal; otherwise a line per segment. Use as a context manager."""

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
        """See :class:`mocosfl_priv.runtime.progress.Progress`."""
        self._time = TimeLeft(segments)
        self._titles = [segment.title for segment in segments]
        self._bars.update(self._run, total=len(segments), completed=0)

    def segment(self) -> None:
        """See :class:`mocosfl_priv.runtime.progress.Progress`."""
        now = time.monotonic()
        if self._index:
            self._time.finish(now - self._segment_started)
        self._segment_started = now
        self._stage_steps, self._stage_done = 1, 0
        title = self._titles[self._index] if self._index < len(self._titles) else "report"
        self._bars.update(self._run, completed=self._index, description=f"[bold]{title}")
        self._index += 1
        if not self._console.is_terminal:
            line = f"[{self._index}/{len(self._titles)}] {clock(now - self._run_started)} {title} · {self._left()}"
            self._console.print(line, highlight=False, markup=False, soft_wrap=True)

    def begin(self, stage: str, steps: int) -> None:
        """See :class:`mocosfl_priv.runtime.progress.Progress`."""
        self._stage_steps, self._stage_done = max(1, steps), 0
        self._bars.reset(self._stage, total=self._stage_steps, description=f"  {stage}", visible=True)

    def advance(self, steps: int = 1) -> None:
        """See :class:`mocosfl_priv.runtime.progress.Progress`."""
        self._stage_done += steps
        self._bars.update(self._stage, completed=self._stage_done)
        self._bars.update(self._run, left=self._left())

    def end(self) -> None:
        """See :class:`mocosfl_priv.runtime.progress.Progress`."""
        self._bars.update(self._stage, visible=False)

    def _left(self) -> str:
        share = min(1.0, self._stage_done / self._stage_steps)
        return f"about {clock(self._time.left(time.monotonic() - self._segment_started, share))} left"


class TerminalSweep:
    """Progress of a sweep: a line per finished task, and on a terminal a bar below. Use as a context manager.

    Args:
        console: Where to print.
        slots: Number of tasks that run at once.

    """

    def __init__(self, console: Console, slots: int) -> None:
        self._console = console
        self._slots = slots
        self._bar = Bars(
            TextColumn("{task.description}"),
            BarColumn(bar_width=28),
            MofNCompleteColumn(),
            TextColumn("{task.fields[left]}"),
            console=console,
            transient=True,
        )
        self._line = self._bar.add_task("sweep", total=None, left="")
        self._expected = Expectations(())
        self._open: dict[str, Segment] = {}
        self._running: dict[str, float] = {}
        self._total = 0
        self._begun = time.monotonic()

    def __enter__(self) -> TerminalSweep:
        if self._console.is_terminal:
            self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._console.is_terminal:
            self._bar.stop()

    def has_read(self, lines: Sequence[str]) -> None:
        """See :class:`mocosfl_priv.sweep.schedule.SweepProgress`."""
        for line in lines:
            self._print(line)

    def planned(self, tasks: Sequence[Task], cells: int, cached: int) -> None:
        """See :class:`mocosfl_priv.sweep.schedule.SweepProgress`."""
        self._open = {task.key: task.segment for task in tasks}
        self._expected = Expectations(self._open.values())
        self._total = len(tasks)
        self._bar.update(self._line, total=self._total)
        self._print(
            f"{cells} cells, {cached} of them stored; {len(tasks)} tasks, {self._slots} at once · {self._left()}"
        )

    def started(self, task: Task) -> None:
        """See :class:`mocosfl_priv.sweep.schedule.SweepProgress`."""
        self._running[task.key] = time.monotonic()
        self._bar.update(self._line, description=f"[bold]{task.segment.title}")

    def ended(self, task: Task, failure: str) -> None:
        """See :class:`mocosfl_priv.sweep.schedule.SweepProgress`."""
        seconds = time.monotonic() - self._running.pop(task.key, time.monotonic())
        segment = self._open.pop(task.key)
        if not failure:
            self._expected.finish(segment, seconds)
        done = self._total - len(self._open)
        self._bar.update(self._line, completed=done, left=self._left())
        outcome = f"FAILED: {failure}" if failure else clock(seconds)
        elapsed = clock(time.monotonic() - self._begun)
        self._print(f"[{done}/{self._total}] {elapsed} {segment.title}: {outcome} · {self._left()}")

    def reporting(self, name: str, place: int, count: int) -> None:
        """See :class:`mocosfl_priv.sweep.schedule.SweepProgress`."""
        self._bar.update(self._line, description=f"[bold]report of {name}", left="")
        self._print(f"run directory {place} of {count}: {name}")

    def _left(self) -> str:
        """Time left: what remains of all open tasks, divided by the slots that they can fill."""
        now = time.monotonic()
        left = [
            max(0.0, self._expected.of(segment) - (now - self._running.get(key, now)))
            for key, segment in self._open.items()
        ]
        return f"about {clock(sum(left) / max(1, min(self._slots, len(left))))} left"

    def _print(self, line: str) -> None:
        self._console.print(line, highlight=False, markup=False, soft_wrap=True)


def clock(seconds: float) -> str:
    """Format `seconds` as minutes and seconds, such as 3:07."""
    whole = round(seconds)
    return f"{whole // 60}:{whole % 60:02d}"
