"""Export the tables of stored runs as CSV, Parquet, LaTeX and Markdown."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import pandas as pd

from mocosfl_priv.errors import ConfigurationError, RunFailedError
from mocosfl_priv.results import StoredRun
from reports.analysis.client_costs import cost_columns
from reports.analysis.per_image import GROUP
from reports.analysis.run_section import stacked
from reports.output.markup import as_latex, as_markdown
from reports.output.paper_tables import paper_tables

FORMATS = ("csv", "parquet", "latex", "markdown")


def export_tables(runs: Sequence[StoredRun], files: Mapping[str, Path]) -> None:
    """Write the tables of a run, or of all variants of a sweep, to files.

    Args:
        runs: The run, or the variants of a sweep.
        files: Paths by format. ``csv`` has a row per cell with the costs of a client, ``parquet`` a row per victim and
            cell, ``latex`` and ``markdown`` the tables of the papers.

    Raises:
        ConfigurationError: `files` is empty, or asks for the papers' tables of an audit.
        RunFailedError: A file cannot be written.

    """
    if not files:
        raise ConfigurationError(
            f"nothing to export: give a file with one of {', '.join('--' + form for form in FORMATS)}"
        )
    if "audit" in runs[0].record.info and {"latex", "markdown"} & set(files):
        raise ConfigurationError("an audit has no tables of the papers; export it with --csv or --parquet")
    try:
        for form, path in files.items():
            _write(runs, form, path)
    except OSError as error:
        raise RunFailedError(f"{error.filename or 'a file'} could not be written: {error.strerror or error}") from error


def _write(runs: Sequence[StoredRun], form: str, path: Path) -> None:
    if form == "csv":
        stacked(runs, _cells).to_csv(path, index=False)
    elif form == "parquet":
        stacked(runs, lambda run: run.record.per_image.copy()).to_parquet(path, index=False)
    else:
        tables = paper_tables(runs)
        path.write_text(as_latex(tables) if form == "latex" else as_markdown(tables), encoding="utf-8")


def _cells(run: StoredRun) -> pd.DataFrame:
    return pd.concat([run.record.cells, cost_columns(run.record, run.record.cells[GROUP])], axis=1)
