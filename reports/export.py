"""A run's tables as files for spreadsheets, data frames and papers."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from mocosfl_priv.errors import ConfigurationError, RunFailedError
from mocosfl_priv.results import RunRecord
from reports.markup import as_latex, as_markdown
from reports.paper_tables import paper_tables

FORMATS = ("csv", "parquet", "latex", "markdown")


def export_tables(record: RunRecord, files: Mapping[str, Path]) -> None:
    """Write `record` to files by format: csv has a row per cell, parquet a row per victim and cell, latex and markdown
    the tables that papers print.

    ConfigurationError if there is nothing to write, RunFailedError if a file cannot be written.
    """
    if not files:
        raise ConfigurationError(f"nothing to export: name a file with {', '.join('--' + form for form in FORMATS)}")
    if "audit" in record.info and {"latex", "markdown"} & set(files):
        raise ConfigurationError("an audit has no table of the papers; --csv and --parquet export it")
    try:
        for form, path in files.items():
            _write(record, form, path)
    except OSError as error:
        raise RunFailedError(f"{error.filename or 'a file'} could not be written: {error.strerror or error}") from error


def _write(record: RunRecord, form: str, path: Path) -> None:
    if form == "csv":
        record.cells.to_csv(path, index=False)
    elif form == "parquet":
        record.per_image.to_parquet(path, index=False)
    else:
        tables = paper_tables(record)
        path.write_text(as_latex(tables) if form == "latex" else as_markdown(tables), encoding="utf-8")
