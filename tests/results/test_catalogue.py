from __future__ import annotations

from pathlib import Path

import pandas as pd
import pytest

from mocosfl_priv.api import RunResult
from mocosfl_priv.errors import ConfigurationError
from mocosfl_priv.results.catalogue import query


@pytest.fixture(scope="module")
def runs(tiny_run: RunResult, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs")
    for name in ("one", "deep/two"):
        tiny_run.report(folder / name)
    return folder


def test_all_runs_below_a_folder_are_one_table(runs: Path, tiny_run: RunResult) -> None:
    table = tiny_run.table()
    found = query(runs)
    assert found["run"].tolist() == ["deep/two"] * 3 + ["one"] * 3
    mine = found[found["run"] == "one"].set_index("attack")["leak_ratio"]
    pd.testing.assert_series_equal(mine, table.set_index("attack")["leak_ratio"].sort_index(), check_names=False)
    means = query(runs, "select attack, avg(mse) as mse from per_image group by attack order by attack")
    expected = tiny_run.record.per_image.groupby("attack")["mse"].mean()
    assert means["mse"].tolist() == pytest.approx(expected.tolist())


@pytest.mark.parametrize("sql", ["select nothing from nowhere", "select * from '/etc/passwd'", "copy cells to 'x.csv'"])
def test_sql_that_cannot_be_answered_is_refused(sql: str, runs: Path) -> None:
    with pytest.raises(ConfigurationError, match="--sql: "):
        query(runs, sql)


def test_a_folder_without_runs_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="no run directory"):
        query(tmp_path)
