from __future__ import annotations

import pandas as pd
import pytest

from reports.analysis.findings_text import sentences
from reports.analysis.leaderboard import HEADINGS, leaderboard, leaderboard_frame
from reports.analysis.summary import headline_rows, summarise
from reports.output.markup import leaderboard_markdown
from tests.reports.made_up import made_up

SYSTEMS = {
    "none": (0.9, 0.60),
    "bottleneck": (0.6, 0.50),
    "noise-weak": (0.5, 0.51),
    "noise-medium": (0.4, 0.495),
    "noise-strong": (0.1, 0.30),
    "lonely": (0.3, 0.50),
}


def board(systems: dict[str, tuple[float, float]] = SYSTEMS, **options: object) -> pd.DataFrame:
    record = made_up(systems, **options)  # type: ignore[arg-type]
    return leaderboard_frame(leaderboard(record, summarise(record))).set_index("defense")


def test_the_least_leaking_stands_first_with_its_headline() -> None:
    table = board()
    assert list(table.index) == ["noise-strong", "lonely", "noise-medium", "noise-weak", "bottleneck", "none"]
    record = made_up(SYSTEMS)
    for row in headline_rows(summarise(record)):
        mine = table.loc[row.defense].to_dict()
        assert mine["attack"] == row.attack
        interval = [mine[name] for name in ("leak_ratio", "leak_ratio_low", "leak_ratio_high")]
        assert interval == [row.leak_ratio.value, row.leak_ratio.low, row.leak_ratio.high]
        assert mine["linear_accuracy"] == pytest.approx(SYSTEMS[row.defense][1], abs=0.03)
        assert mine["client_flops"] == row.cost["client_flops"]


def test_accuracies_are_compared_with_none_and_the_control() -> None:
    table = board()
    assert table["linear_against_none"].drop("none").to_numpy() == pytest.approx(
        (table["linear_accuracy"] - table["linear_accuracy"]["none"]).drop("none").to_numpy()
    )
    assert table["linear_against_control"].drop("bottleneck").to_numpy() == pytest.approx(
        (table["linear_accuracy"] - table["linear_accuracy"]["bottleneck"]).drop("bottleneck").to_numpy()
    )
    assert table["linear_against_none"].isna()["none"] and table["linear_against_control"].isna()["bottleneck"]
    assert (table["control"] == "bottleneck (cut 1)").all()


def test_of_several_strengths_the_best_matched_one_is_marked() -> None:
    table = board()
    assert table.index[table["matched"]].tolist() == ["lonely", "noise-medium", "noise-weak", "bottleneck"]
    assert table.index[table["best_of_family"]].tolist() == ["noise-medium"]


def test_without_a_bottleneck_none_is_the_control_and_without_both_there_is_none() -> None:
    table = board({name: value for name, value in SYSTEMS.items() if name != "bottleneck"})
    assert (table["control"] == "none (cut 1)").all()
    assert table.index[table["matched"]].tolist() == ["none"] and not table["best_of_family"].any()
    alone = board({"lonely": SYSTEMS["lonely"]})
    assert alone["control"].isna().all() and not alone["matched"].any()


def test_a_row_has_its_seeds_and_the_flags_that_are_about_it() -> None:
    flags = [{"name": "few-seeds", "sentence": "."}, {"name": "not-adaptive", "sentence": ".", "defense": "lonely"}]
    table = board(seeds=2, flags=flags)
    assert (table["seeds"] == 2).all()
    assert table["flags"].to_dict() == {name: 2 if name == "lonely" else 1 for name in SYSTEMS}


def test_cut_layers_have_places_and_controls_of_their_own() -> None:
    record, deeper = made_up(SYSTEMS), made_up({"lonely": (0.05, 0.5), "none": (0.2, 0.5)})
    for name in ("cells", "per_image", "probe"):
        frames = [getattr(record, name), getattr(deeper, name).assign(cut_layer=2)]
        setattr(record, name, pd.concat(frames, ignore_index=True))
    entries = leaderboard(record, summarise(record))
    assert [e.row.cut_layer for e in entries] == [1] * 6 + [2] * 2
    assert {e.control for e in entries[6:]} == {"none (cut 2)"}


def test_the_markdown_can_stand_in_the_docs() -> None:
    record = made_up(SYSTEMS | {"odd|name": (0.2, 0.5)})
    lines = leaderboard_markdown(record, leaderboard(record, summarise(record))).splitlines()
    rows = [line for line in lines if line.startswith("|")]
    assert len(rows) == 2 + 7
    assert all(line.replace("\\|", "").count("|") == len(HEADINGS) + 1 for line in rows)
    text = "\n".join(lines)
    assert "Run of 2025-01-02, 12 s on cpu" in text and "torch 2.6" in text
    assert "```\nmocosfl-priv run a|b\n```" in text
    assert "best of its kind" in text and "the control (bottleneck (cut 1))" in text


def test_a_defense_on_which_attacks_failed_is_not_ranked_with_the_others() -> None:
    systems = {"none": (0.9, 0.7), "noise-weak": (0.7, 0.7), "noise-strong": (0.5, 0.7), "crashing": (0.1, 0.7)}
    attacks = ("floor", "decoder", "rmle")
    failed = [("crashing", "decoder"), ("crashing", "rmle"), ("noise-strong", "decoder")]
    record = made_up(systems, attacks=attacks, failed=failed)
    entries = leaderboard(record, summarise(record))
    assert [entry.row.defense for entry in entries][:2] == ["noise-weak", "none"]
    missing = {entry.row.defense: entry.missing for entry in entries}
    assert missing == {"none": (), "noise-weak": (), "noise-strong": ("decoder",), "crashing": ("decoder", "rmle")}
    assert [entry.row.defense for entry in entries if entry.best_of_family] == ["noise-weak"]
    said = " ".join(sentences(summarise(record), []))
    assert "crashing (cut 1): no attack that uses the smashed data succeeded" in said
