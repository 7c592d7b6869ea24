"""SQL queries over the results of many run directories."""

from __future__ import annotations

from pathlib import Path

import duckdb
import pandas as pd

from mocosfl_priv.errors import ConfigurationError
from mocosfl_priv.results.storage import read_table

FILES = {"cells": "results.csv", "per_image": "per_image.parquet"}
OVERVIEW = """
    select run, defense, attack, cut_layer as cut, target_fraction as target, victims, count(*) as seeds,
           avg(leak_ratio) as leak_ratio, avg(mse) as mse, avg(ssim) as ssim, avg(linear_accuracy) as linear,
           count(*) filter (failure <> '') as failed
    from cells group by all order by run, cut, target, defense, attack
"""


def query(folder: Path, sql: str = OVERVIEW) -> pd.DataFrame:
    """Run the query `sql` with DuckDB on all run directories below `folder`, including the variants of sweeps.

    There are two tables: ``cells``, the rows of every results.csv, and ``per_image``, those of every
    per_image.parquet. Both have a column ``run``, the directory relative to `folder`. No files are changed. Raises
    ConfigurationError for a folder without runs, and for SQL that DuckDB cannot execute.
    """
    found = (path.parent for path in folder.rglob("run.json") if (path.parent / FILES["cells"]).is_file())
    # hidden folders hold unfinished results of processes that were killed
    runs = sorted(run for run in found if not any(part.startswith(".") for part in run.relative_to(folder).parts))
    if not runs:
        raise ConfigurationError(f"there is no run directory below {folder}")
    try:
        with duckdb.connect() as database:
            for table, file in FILES.items():
                frames = [_read(run / file).assign(run=_name(run, folder)) for run in runs if (run / file).is_file()]
                database.register(table, pd.concat(frames, ignore_index=True))
            # a pasted query must not read or write other files on this machine
            database.execute("set enable_external_access = false")
            return database.execute(sql).df()
    except duckdb.Error as error:
        raise ConfigurationError(f"--sql: {' '.join(str(error).split())}") from error


def _read(path: Path) -> pd.DataFrame:
    return pd.read_parquet(path) if path.suffix == ".parquet" else read_table(path)


def _name(run: Path, folder: Path) -> str:
    return run.relative_to(folder).as_posix()
