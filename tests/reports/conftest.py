"""A made-up sweep over cut layers and target fractions, with its report: written once."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.report import Grid, synthetic_record
from mocosfl_priv.results import RunRecord
from reports import write_report
from reports.analysis.summary import SummaryRow, summarise

SMALL = Grid(
    defenses=("none", "bottleneck", "taressfl"),
    target_fractions=(0.0, 0.01),
    attacks=("floor", "rmle", "decoder"),
    victims=40,
    probes=200,
    pixels=16,
)


@pytest.fixture(scope="session")
def sweep() -> RunRecord:
    return synthetic_record(SMALL)


@pytest.fixture(scope="session")
def sweep_rows(sweep: RunRecord) -> list[SummaryRow]:
    return summarise(sweep)


@pytest.fixture(scope="session")
def sweep_page(sweep: RunRecord, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_report(sweep, tmp_path_factory.mktemp("sweep"))
