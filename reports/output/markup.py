"""Format tables as Markdown and LaTeX."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from mocosfl_priv.results import RunRecord
from reports.analysis.leaderboard import HEADINGS, Entry, leaderboard_cells, leaderboard_notes


@dataclass(frozen=True)
class Table:
    """A table for readers: title, headings, rows of cells, and a note on how to read it."""

    title: str
    headings: Sequence[str]
    lines: Sequence[Sequence[str]]
    note: str


def as_markdown(tables: Sequence[Table]) -> str:
    """Format tables as Markdown pipe tables, each with a heading and its note."""
    return (
        "\n\n".join(
            "\n\n".join([f"### {table.title}", markdown_lines(table.headings, table.lines), table.note])
            for table in tables
        )
        + "\n"
    )


def markdown_lines(headings: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    """Format headings and rows as a Markdown pipe table; bars in cells are escaped."""
    every = [headings, ["---"] * len(headings), *lines]
    return "\n".join(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in line)} |" for line in every)


def leaderboard_markdown(record: RunRecord, entries: list[Entry]) -> str:
    """Format the leaderboard as Markdown, with its notes and what is needed to repeat the run (for the docs)."""
    info = record.info
    table = markdown_lines(HEADINGS, [leaderboard_cells(entry) for entry in entries])
    versions = ", ".join(f"{name} {number}" for name, number in info["versions"].items())
    made = [
        f"Run of {info['created'][:10]}, {info['seconds']:.0f} s on {info['compute']['device']}, configuration "
        f"{info['config_sha256'][:12]}; {versions}; {info['platform']}.",
        f"```\n{info['command']}\n```",
    ]
    return "\n\n".join([table, *leaderboard_notes(record, entries), *made]) + "\n"


_LATEX = {"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "±": r"$\pm$", "–": "--",
          **{sign: f"\\{sign}" for sign in "&%$#_{}"}}  # fmt: skip


def as_latex(tables: Sequence[Table]) -> str:
    """Format tables as LaTeX table environments, which need the package booktabs."""
    return "\n\n".join(_latex_table(table) for table in tables) + "\n"


def _latex_table(table: Table) -> str:
    lines = [" & ".join(map(_latex_text, line)) + r" \\" for line in table.lines]
    return "\n".join(
        [
            r"\begin{table}",
            r"\centering",
            rf"\caption{{{_latex_text(table.title)}. {_latex_text(table.note)}}}",
            rf"\begin{{tabular}}{{{'l' * len(table.headings)}}}",
            r"\toprule",
            " & ".join(map(_latex_text, table.headings)) + r" \\",
            r"\midrule",
            *lines,
            r"\bottomrule",
            r"\end{tabular}",
            r"\end{table}",
        ]
    )


def _latex_text(text: str) -> str:
    return "".join(_LATEX.get(sign, sign) for sign in text)
