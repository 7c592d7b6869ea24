from __future__ import annotations

import csv
from dataclasses import replace
from pathlib import Path

import pandas as pd
import pytest

from benchmarks.report import Grid, synthetic_record
from mocosfl_priv.errors import ConfigurationError, RunFailedError
from mocosfl_priv.results import RunRecord, StoredRun
from reports.analysis.summary import headline_rows, summarise
from reports.output.export import export_tables
from reports.output.markup import Table, as_latex, as_markdown
from reports.output.paper_tables import paper_tables


@pytest.fixture(scope="module")
def cifar() -> RunRecord:
    """A run as the paper's: CIFAR-10, 100 clients, IID."""
    grid = Grid(defenses=("none", "taressfl"), attacks=("floor", "decoder"), victims=20, probes=100, pixels=8)
    record = synthetic_record(grid)
    record.info["config"]["data"]["dataset"] = "cifar10"
    return record


def tables_of(record: RunRecord) -> list[Table]:
    return paper_tables([StoredRun({}, record)])


def test_published_numbers_stand_beside_ours(cifar: RunRecord) -> None:
    accuracies, attacks, communication, client = tables_of(cifar)
    rows = {(row.defense, row.cut_layer, row.target_fraction): row for row in headline_rows(summarise(cifar))}
    assert [line[:4] for line in accuracies.lines] == [[m, "cifar10", "IID", "100"] for m in ("MocoSFL-1", "MocoSFL-3")]
    assert [line[5] for line in accuracies.lines] == ["87.29", "87.29"]
    assert accuracies.lines[0][4].startswith(f"{100 * rows['none', 1, 0.0].linear.value:.2f} [")
    assert len(attacks.lines) == 6 and attacks.lines[1][1:5:3] == ["MocoSFL-1", "80.78 ± 1.34"]
    assert [line[6] for line in attacks.lines[:3]] == ["0.039 ± 0.005", "0.033 ± 0.014", "0.039 ± 0.002"]
    assert [line[2] for line in communication.lines if "taressfl" in line[0]].count("39.1") == 3
    assert communication.lines[0][2] == "5001.4"
    assert client.lines[0][0] == "none (cut 1)" and set(client.lines[0][1:]) == {"not measured"}  # nothing was run


def test_what_was_not_published_has_no_number(cifar: RunRecord) -> None:
    cifar.info["config"]["training"]["clients"] = 7
    assert [line[5] for line in tables_of(cifar)[0].lines] == ["–", "–"]
    cifar.info["config"]["training"]["clients"] = 100


def test_a_bottleneck_of_the_model_is_not_what_was_published(cifar: RunRecord) -> None:
    config = {**cifar.info["config"], "model": {**cifar.info["config"]["model"], "bottleneck": "C4S2"}}
    defenses, communication = (tables_of(replace(cifar, info={**cifar.info, "config": config}))[i] for i in (1, 2))
    assert [line[0] for line in defenses.lines].count("none") == 2
    assert [line[2] for line in communication.lines if "none" in line[0]] == ["–", "–"]


def test_markup_escapes_what_would_break_a_table() -> None:
    table = Table("50 % & more", ["a_b", "c|d"], [["x^2 ± 1", r"\y"]], "note #1")
    latex = as_latex([table])
    assert r"\caption{50 \% \& more. note \#1}" in latex and r"a\_b & c|d \\" in latex
    assert r"x\textasciicircum{}2 $\pm$ 1 & \textbackslash{}y \\" in latex
    assert latex.count(r"\begin") == latex.count(r"\end") == 2
    assert r"| a_b | c\|d |" in as_markdown([table])


def test_files_hold_what_the_run_holds(cifar: RunRecord, tmp_path: Path) -> None:
    files = {form: tmp_path / f"t.{form}" for form in ("csv", "parquet", "latex", "markdown")}
    export_tables([StoredRun({}, cifar)], files)
    with files["csv"].open(newline="") as lines:
        assert len(list(csv.DictReader(lines))) == len(cifar.cells)
    pd.testing.assert_frame_equal(pd.read_parquet(files["parquet"]), cifar.per_image)
    assert "MocoSFL-3" in files["markdown"].read_text() and r"\toprule" in files["latex"].read_text()
    with pytest.raises(ConfigurationError, match="nothing to export"):
        export_tables([StoredRun({}, cifar)], {})
    with pytest.raises(RunFailedError, match="could not be written"):
        export_tables([StoredRun({}, cifar)], {"csv": tmp_path / "missing" / "t.csv"})
