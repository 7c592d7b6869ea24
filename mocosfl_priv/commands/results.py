"""Commands that read stored results: report, compare, export, mirror."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from mocosfl_priv.commands.options import DebugOption
from mocosfl_priv.errors import ConfigurationError

app = typer.Typer()


@app.command()
def report(
    folder: Annotated[Path, typer.Argument(help="A run directory, or the folder of a sweep.")],
    debug: DebugOption = False,
) -> None:
    """Rewrite the report of a stored run, or write one report of all variants of a sweep."""
    from mocosfl_priv.api import report_stored

    print(report_stored(folder))


@app.command()
def compare(
    first: Annotated[Path, typer.Argument(metavar="RUN_A", help="A run directory, or a sweep's folder.")],
    second: Annotated[Path, typer.Argument(metavar="RUN_B", help="The run directory or sweep to compare with.")],
    debug: DebugOption = False,
) -> None:
    """Compare two runs, or two sweeps variant by variant, paired by victim and seed where they have the same."""
    from mocosfl_priv.results import read_runs
    from mocosfl_priv.runtime.imports import own_package

    own_package("reports")
    from reports import compare_runs

    found = compare_runs(read_runs(first), read_runs(second))
    if not found.lines:
        print("no system was attacked by the same attack in both runs, so there is nothing to compare")
    else:
        table = Table()
        for heading in found.headings:
            table.add_column(heading)
        for line in found.lines:
            table.add_row(*line.cells())
        Console(width=None if sys.stdout.isatty() else 200).print(table)
        print(f"Not paired: {found.unpaired}." if found.unpaired else found.statement)
    for note in found.notes:
        print(note)


@app.command()
def export(
    folder: Annotated[Path, typer.Argument(metavar="RUN", help="A run directory, or a sweep's folder.")],
    csv: Annotated[
        Path | None, typer.Option(metavar="FILE", help="A row per cell (system, attack and seed), as CSV.")
    ] = None,
    parquet: Annotated[
        Path | None, typer.Option(metavar="FILE", help="A row per victim image and cell, as Parquet.")
    ] = None,
    latex: Annotated[Path | None, typer.Option(metavar="FILE", help="The tables of the papers, as LaTeX.")] = None,
    markdown: Annotated[
        Path | None, typer.Option(metavar="FILE", help="The tables of the papers, as Markdown.")
    ] = None,
    debug: DebugOption = False,
) -> None:
    """Write the tables of a stored run to files; LaTeX and Markdown put the published numbers beside them."""
    from mocosfl_priv.results import read_runs
    from mocosfl_priv.runtime.imports import own_package

    own_package("reports")
    from reports import export_tables

    asked = {"csv": csv, "parquet": parquet, "latex": latex, "markdown": markdown}
    files = {form: path for form, path in asked.items() if path is not None}
    export_tables(read_runs(folder), files)
    for path in files.values():
        print(path)


@app.command()
def mirror(
    folder: Annotated[Path, typer.Argument(metavar="RUN", help="A run directory.")],
    tensorboard: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="Write TensorBoard event files into a subfolder named after the run."),
    ] = None,
    mlflow: Annotated[str | None, typer.Option(metavar="URI", help="Log to this MLflow tracking server.")] = None,
    debug: DebugOption = False,
) -> None:
    """Copy a stored run to TensorBoard or MLflow, to view it beside other runs."""
    from mocosfl_priv.results import read_record
    from mocosfl_priv.results.mirrors import Mirror, MLflow, TensorBoard

    if tensorboard is None and mlflow is None:
        raise ConfigurationError("no destination: give a folder with --tensorboard, or a server with --mlflow")
    record = read_record(folder)
    mirrors: dict[str, Mirror] = {}
    if tensorboard is not None:
        mirrors[str(tensorboard)] = TensorBoard(tensorboard)
    if mlflow is not None:
        mirrors[mlflow] = MLflow(mlflow)
    for place, chosen in mirrors.items():
        chosen.show(record, folder)
        print(f"{folder} copied to {place}")
