from __future__ import annotations

import io

import pytest
from rich.console import Console

from mocosfl_priv.display import TerminalProgress, TimeLeft
from mocosfl_priv.progress import Segment


def test_time_left_learns_from_finished_segments() -> None:
    segments = [
        Segment("a", "train", 10),
        Segment("b", "attack", 5),
        Segment("c", "train", 10),
        Segment("d", "attack", 5),
    ]
    time = TimeLeft(segments)
    assert time.left(0, 0) == 30
    assert time.left(10, 0.5) < 30
    time.finish(20)  # twice as slow as guessed: the attack guesses double, too
    assert time.left(0, 0) == pytest.approx(10 + 20 + 10)
    time.finish(1)  # attacks turn out quick
    assert time.left(0, 0) == pytest.approx(20 + 1)
    assert time.left(20, 1.0) == pytest.approx(1)
    time.finish(20)
    time.finish(1)
    assert time.left(0, 0) == 0


def test_without_a_terminal_each_segment_is_a_line() -> None:
    out = io.StringIO()
    with TerminalProgress(Console(file=out, width=80)) as progress:
        progress.plan([Segment("train [x]", "train", 5), Segment("attack", "attack", 5)])
        progress.segment()
        progress.begin("training", 3)
        progress.advance()
        progress.end()
        progress.segment()
    lines = out.getvalue().splitlines()
    assert [line.split(" ")[0] for line in lines] == ["[1/2]", "[2/2]"]
    assert "train [x]" in lines[0] and "left" in lines[0]


def test_on_a_terminal_stage_and_time_left_are_drawn() -> None:
    out = io.StringIO()
    console = Console(file=out, width=120, force_terminal=True, force_interactive=True)
    with TerminalProgress(console) as progress:
        progress.plan([Segment("train it", "train", 5)])
        progress.segment()
        progress.begin("expert", 4)
        progress.advance(2)
        progress._bars.refresh()
        progress.end()
    text = out.getvalue()
    assert "train it" in text and "expert" in text and "2/4" in text and "left" in text
