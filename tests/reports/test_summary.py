from __future__ import annotations

import numpy as np
import pytest

from mocosfl_priv.api import RunResult
from reports.summary import WORST_CASE, as_frame, caveats, headline_rows, sentences, summarise


def test_worst_case_is_the_best_attack_for_every_victim(tiny_run: RunResult) -> None:
    rows = {row.attack: row for row in summarise(tiny_run.record)}
    per_image = tiny_run.record.per_image
    best = per_image.pivot(index="image", columns="attack", values="mse").min(axis=1)
    assert rows[WORST_CASE].metrics["mse"].value == pytest.approx(best.mean())
    floor = per_image.groupby("image")["mse_floor"].first()
    assert rows[WORST_CASE].leak_ratio.value == pytest.approx(1 - best.mean() / floor.mean())
    assert rows[WORST_CASE].leak_ratio.value >= max(rows["floor"].leak_ratio.value, rows["rmle"].leak_ratio.value)
    assert [row.attack for row in headline_rows(list(rows.values()))] == [WORST_CASE]


def test_intervals_contain_their_estimate(tiny_run: RunResult) -> None:
    for row in summarise(tiny_run.record):
        for interval in (row.leak_ratio, row.knn, row.linear, *row.metrics.values()):
            assert interval.low <= interval.value <= interval.high
            assert interval.seeds == 1


def test_means_agree_with_the_results_table(tiny_run: RunResult) -> None:
    cells = tiny_run.table().set_index("attack")
    for row in summarise(tiny_run.record):
        if row.attack in cells.index:
            assert row.leak_ratio.value == pytest.approx(cells.loc[row.attack, "leak_ratio"], abs=1e-5)
            assert row.linear.value == pytest.approx(cells.loc[row.attack, "linear_accuracy"])
    frame = as_frame(summarise(tiny_run.record))
    assert len(frame) == 3 and np.isfinite(frame["leak_ratio_low"]).all()


def test_words_warn_of_what_is_missing(tiny_run: RunResult) -> None:
    rows = summarise(tiny_run.record)
    assert any("1 training seed" in text for text in caveats(tiny_run.record, rows))
    assert any("Fewer than two attacks" in text for text in caveats(tiny_run.record, rows))
    said = sentences(rows)
    assert len(said) == 1 and "none (cut 1)" in said[0]
