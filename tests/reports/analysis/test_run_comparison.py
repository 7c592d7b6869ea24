from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from mocosfl_priv.results import RunRecord, StoredRun
from reports.analysis.run_comparison import RunComparison, compare_runs
from tests.reports.made_up import made_up

VICTIMS = {"roles": {"victims": {"content_sha256": "v" * 64}}}


def compared(first: RunRecord, second: RunRecord) -> RunComparison:
    return compare_runs([StoredRun({}, first)], [StoredRun({}, second)])


def run(leak: float, seeds: int = 3, **changes: Any) -> RunRecord:
    record = made_up({"none": (0.8, 0.9), "mine": (leak, 0.9)}, seeds=seeds)
    return replace(record, info={**record.info, **VICTIMS, **changes})


def test_runs_on_the_same_victims_and_seeds_are_paired() -> None:
    found = compared(run(0.6), run(0.3))
    lines = {(line.system, line.attack): line for line in found.lines}
    assert list(lines) == [(f"{name} (cut 1)", attack) for name in ("none", "mine") for attack in ("decoder", "rmle")]
    worse = lines["mine (cut 1)", "decoder"]
    assert worse.difference is not None and worse.difference.value == pytest.approx(-0.3, abs=0.01)
    assert worse.finding == "the second leaks less" and worse.adjusted_p < 0.05
    assert lines["none (cut 1)", "rmle"].finding == "no difference shown"
    assert found.unpaired == "" and "Of 4 comparisons 2 show a difference" in found.statement


def test_only_common_seeds_are_paired() -> None:
    found = compared(run(0.6, seeds=3), run(0.3, seeds=2))
    assert all(line.difference is not None and line.difference.seeds == 2 for line in found.lines)


def test_it_says_why_nothing_is_paired() -> None:
    others = run(0.3, roles={"victims": {"content_sha256": "w" * 64}})
    found = compared(run(0.6), others)
    assert "different victims" in found.unpaired and all(line.difference is None for line in found.lines)
    assert {line.finding for line in found.lines} == {"not paired"} and found.statement == "Nothing was compared."
    later = run(0.3)
    for name in ("cells", "per_image", "probe"):
        setattr(later, name, getattr(later, name).assign(seed=lambda frame: frame["seed"] + 10))
    assert "no training seed in common" in compared(run(0.6), later).unpaired


def test_it_says_what_else_differs() -> None:
    record = run(0.3)
    config = {**record.info["config"], "threat": {"steps": 5}}
    plugins = {
        "attacks": [{**plugin, "code_sha256": "x"} for plugin in record.info["plugins"]["attacks"]],
        "defenses": [],
    }
    changed = replace(record, info={**record.info, "config": config, "plugins": plugins})
    changed.per_image["mse_floor"] *= 2
    notes = " ".join(compared(run(0.3), changed).notes)
    assert "threat" in notes and "attacks differs: decoder, rmle" in notes and "floors differ" in notes
    assert compared(run(0.3), run(0.3)).notes == []
