"""Whose photo it is, beside what it looks like: on made-up runs whose shares are given."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from benchmarks.report import Grid, synthetic_record
from mocosfl_priv.evaluation.shares import Rate
from mocosfl_priv.results import LINKAGE_COLUMNS, LINKAGE_RATES, SYSTEM_KEYS, RunRecord
from reports import write_report
from reports.analysis.findings_text import caveats, sentences
from reports.analysis.key_findings import _matched
from reports.analysis.linkage import BEFORE, NOT_MEASURED, WHOSE_HEADINGS, beside_looks, linkage_rates
from reports.analysis.summary import as_frame, summarise
from tests.reports.made_up import VICTIMS, made_up

OPTIONS = {"samples": 200, "confidence": 0.95}


def linked(record: RunRecord, shares: dict[str, float], candidates: int = 2000) -> RunRecord:
    """The record, in which that share of a defense's messages is matched, by whatever is asked."""
    parts = []
    for _, keys in record.cells[SYSTEM_KEYS].drop_duplicates().iterrows():
        hits = (np.arange(VICTIMS) < shares[str(keys["defense"])] * VICTIMS).astype(float)
        system = {str(name): value for name, value in keys.items()}
        places = {"image": np.arange(VICTIMS), "group": np.arange(VICTIMS)}
        matched = {**dict.fromkeys(LINKAGE_RATES, hits), "candidates": candidates, "score": "cosine"}
        parts.append(pd.DataFrame({**system, "victims": "test", **places, **matched}))
    table = pd.concat(parts, ignore_index=True)
    assert table.columns.tolist() == LINKAGE_COLUMNS
    return replace(record, linkage=table, info={**record.info, "linkage": {"notes": [], "systems": []}})


def test_shares_have_the_intervals_of_clopper_and_pearson() -> None:
    record = linked(made_up({"none": (0.1, 0.5)}), {"none": 0.75})
    found = linkage_rates(record.linkage, OPTIONS)
    assert found is not None and list(found.rates) == LINKAGE_RATES and found.chance == 1 / 2000
    exact = Rate.of_runs(round(0.75 * VICTIMS), VICTIMS)
    assert found.same.value == 0.75
    assert found.same.low == pytest.approx(exact.low, abs=0.04)
    assert found.same.high == pytest.approx(exact.high, abs=0.04)
    everything = linkage_rates(linked(record, {"none": 1.0}).linkage, OPTIONS)
    assert everything is not None and everything.same.high == 1.0
    assert everything.same.low == pytest.approx(Rate.of_runs(VICTIMS, VICTIMS).low)


def test_what_was_measured_for_too_few_pairs_is_left_out() -> None:
    lines = linked(made_up({"none": (0.1, 0.5)}), {"none": 0.75}).linkage.assign(linkage_view_tpr=np.nan)
    found = linkage_rates(lines, OPTIONS)
    assert found is not None and list(found.rates) == LINKAGE_RATES[:-1]
    cells = beside_looks(found.same, found.same, found.same, found)
    assert cells[3 + WHOSE_HEADINGS.index("TPR: view")] == NOT_MEASURED and cells[-1] == "2000"


def test_a_finding_names_systems_that_look_safe_and_are_matched() -> None:
    record = linked(
        made_up({"none": (0.9, 0.6), "a": (0.1, 0.6), "b": (0.3, 0.6), "c": (0.2, 0.6)}),
        {"none": 1.0, "a": 1.0, "b": 0.75, "c": 0.4},
    )
    said = _matched(summarise(record))
    assert said.startswith(" a (cut 1): R is 0.10, but 100 % [")
    assert "matched to a copy of the image among 2000 candidates. 1 other system is like that." in said
    assert _matched(summarise(linked(record, dict.fromkeys(("none", "a", "b", "c"), 0.4)))) == ""
    safe = linked(made_up({"none": (0.9, 0.6)}), {"none": 1.0})
    assert _matched(summarise(safe)) == ""  # R says it already


def test_every_system_says_whose_photo_it_is_or_why_that_is_unknown() -> None:
    plain = made_up({"none": (0.9, 0.6)})
    record = linked(plain, {"none": 1.0})
    (said,) = sentences(summarise(record), [])
    assert "Whose photo is it: among 2000 candidates, messages are matched 100 % [94, 100] to the same image" in said
    frame = as_frame(summarise(record))
    assert frame["linkage_same"].tolist()[0] == 1.0 and frame["linkage_candidates"].tolist()[0] == 2000
    assert (frame["linkage_view_low"] < 1).all()
    old = as_frame(summarise(plain))
    assert (
        "linkage_same" in old and old["linkage_same"].isna().all() and "Whose" not in sentences(summarise(plain), [])[0]
    )


def test_pages_have_the_table_and_the_reason(tmp_path: Path) -> None:
    record = synthetic_record(Grid(defenses=("none",), cut_layers=(1,), attacks=("floor", "rmle"), seeds=(0,),
                                   victims=VICTIMS, probes=100, pixels=16))  # fmt: skip
    assert f"{BEFORE}." in caveats(record, summarise(record))
    for name in ("old", "new"):
        (tmp_path / name).mkdir()
    page = write_report(record, tmp_path / "old").read_text(encoding="utf-8")
    assert "Whose photo is it?" in page and BEFORE in page and f"<td>{NOT_MEASURED}</td>" in page
    known = linked(record, {"none": 1.0})
    assert not [text for text in caveats(known, summarise(known)) if "Linkage" in text]
    page = write_report(known, tmp_path / "new").read_text(encoding="utf-8")
    assert "What does it look like?" in page and "<td>100 % [94, 100]</td>" in page and BEFORE not in page
    table = pd.read_csv(tmp_path / "new" / "summary.csv")
    assert (table["linkage_same"] == 1).all() and not any(math.isnan(low) for low in table["linkage_same_low"])
