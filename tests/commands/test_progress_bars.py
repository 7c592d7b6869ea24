from __future__ import annotations

import io

import pytest
from rich.console import Console

from mocosfl_priv.commands.progress_bars import TerminalProgress, TerminalSweep, TimeLeft
from mocosfl_priv.runtime.progress import Segment
from mocosfl_priv.sweep.schedule import Task


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


def test_the_blind_guess_says_nothing_of_how_long_attacks_take() -> None:
    segments = [Segment("a", "floor", 0), Segment("b", "ensemble", 590), Segment("c", "floor", 0)]
    time = TimeLeft(segments)
    time.finish(1)
    assert time.left(0, 0) == pytest.approx(591)


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


def test_a_sweep_says_what_there_is_to_do_and_learns_how_long_it_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr("mocosfl_priv.commands.progress_bars.time.monotonic", lambda: now[0])
    trainings = [Task(f"t{i}", Segment(f"train {i}", "train", 60), print, ()) for i in range(3)]
    score = Task("s", Segment("score", "score", 1), print, (), ("t0",))
    out = io.StringIO()
    with TerminalSweep(Console(file=out, width=200), slots=2) as sweep:
        sweep.has_read(["photos/train: 600 images"])
        sweep.planned([*trainings, score], cells=5, cached=2)
        sweep.started(trainings[0])
        sweep.started(trainings[1])
        now[0] = 120.0  # twice as slow as guessed
        sweep.ended(trainings[0], "")
        sweep.ended(trainings[1], "out of luck")
        sweep.started(trainings[2])
        now[0] = 180.0  # half of it
        sweep.ended(score, "")
        sweep.reporting("one", 1, 2)
    assert out.getvalue().splitlines() == [
        "photos/train: 600 images",
        "5 cells, 2 of them stored; 4 tasks, 2 at once · about 1:30 left",
        "[1/4] 2:00 train 0: 2:00 · about 1:01 left",  # nothing of 1, all of 2, and the score
        "[2/4] 2:00 train 1: FAILED: out of luck · about 1:01 left",
        "[3/4] 3:00 score: 0:00 · about 1:00 left",
        "run directory 1 of 2: one",
    ]
