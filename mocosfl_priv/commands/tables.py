"""What commands print about a run: data read, warnings, and the table of results."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table

if TYPE_CHECKING:
    from mocosfl_priv.api import RunResult
    from mocosfl_priv.data.roles import DataRoles

TEXTS = ("defense", "attack", "victims")


def show_reading(console: Console, roles: DataRoles) -> None:
    """Print what was read of the data, one line per item, before anything is computed with it."""
    for line in roles.reading:
        console.print(line, style="dim", markup=False, highlight=False, soft_wrap=True)


def show_warnings(console: Console, warnings: Sequence[str]) -> None:
    """Print the warnings about limits on what the results can show, one line each."""
    for warning in warnings:
        console.print(f"warning: {warning}", style="yellow", markup=False, highlight=False, soft_wrap=True)


def print_places(page: Path) -> None:
    """Print where the report `page` and the table beside it are."""
    print(f"\nreport: {page}\ntable:  {page.parent / 'results.csv'}")


def print_table(result: RunResult) -> None:
    """Print the results to stdout, a row per cell (system, attack and seed)."""
    audit = "audit" in result.record.info  # audited clients come without a server, so their utility is not measured
    utility = [
        ("linear_accuracy", "linear", "{:.3f}"),
        ("linear_untrained", "untrained", "{:.3f}"),
        ("knn_accuracy", "kNN", "{:.3f}"),
        ("knn_raw_pixels", "pixels", "{:.3f}"),
    ]
    columns = [
        ("defense", "checkpoint" if audit else "defense", "{}"),
        ("attack", "attack", "{}"),
        *([("victims", "victims", "{}")] if audit else []),
        ("cut_layer", "cut", "{}"),
        ("target_fraction", "target", "{:g}"),
        ("seed", "seed", "{}"),
        ("leak_ratio", "leak R", "{:.3f}"),
        ("mse", "MSE", "{:.4f}"),
        ("mse_floor", "floor", "{:.4f}"),
        *([("mse_bound", "bound", "{:.4f}")] if result.table()["mse_bound"].notna().any() else []),
        ("ssim", "SSIM", "{:.3f}"),
        *([] if audit else utility),
        ("attack_seconds", "attack s", "{:.1f}"),
    ]
    table = Table(
        title="leak R: 1 is a perfect reconstruction, 0 or less is no better than a blind guess", title_justify="left"
    )
    for name, heading, _ in columns:
        table.add_column(heading, justify="left" if name in TEXTS else "right", no_wrap=name != "defense")
    for _, row in result.table().iterrows():
        # an audit has no utility, and a failed attack no number
        table.add_row(*("-" if row[name] != row[name] else form.format(row[name]) for name, _, form in columns))
    width = None if sys.stdout.isatty() else 150
    Console(width=width).print(table)
    print_linkage(result)


def print_linkage(result: RunResult) -> None:
    """Print whose photos messages are of, a line per system and set of victims; or why that was not measured."""
    from mocosfl_priv.results import SYSTEM_KEYS  # with pandas, which commands that print no results do without

    for note in result.record.info["linkage"]["notes"]:
        if "not measured" in note:
            print(f"Whose photo is it? {note}")
    rows = result.table().drop_duplicates([*SYSTEM_KEYS, "victims"])
    for _, row in rows[rows["linkage_candidates"].notna()].iterrows():
        system = f"{row['defense']}, cut {row['cut_layer']}, seed {row['seed']}, {row['victims']} images"
        matched = "; ".join(
            f"{100 * row[f'linkage_{name}']:.1f} % to {what}{_verified(row[f'linkage_{name}_tpr'])}"
            for what, name in (("the same image", "same"), ("its JPEG copy", "jpeg"), ("an augmented view", "view"))
        )
        among = f"{row['linkage_candidates']:.0f} candidates, chance {100 * row['linkage_chance']:.2g} %"
        print(f"Whose photo is it? {system}: messages are matched {matched}; {among}")


def _verified(share: float) -> str:
    return "" if share != share else f" (TPR at 0.1 % FPR {100 * share:.1f} %)"  # noqa: PLR0124 - NaN: too few pairs
