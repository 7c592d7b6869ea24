"""Tables as Markdown and LaTeX."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Table:
    """A table for people: what it shows, headings, lines, and how to read it."""

    title: str
    headings: Sequence[str]
    lines: Sequence[Sequence[str]]
    note: str


def as_markdown(tables: Sequence[Table]) -> str:
    """Pipe tables under headings."""
    return (
        "\n\n".join(
            "\n\n".join([f"### {table.title}", markdown_lines(table.headings, table.lines), table.note])
            for table in tables
        )
        + "\n"
    )


def markdown_lines(headings: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    """A pipe table; bars in cells are escaped."""
    every = [headings, ["---"] * len(headings), *lines]
    return "\n".join(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in line)} |" for line in every)


_LATEX = {"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "±": r"$\pm$", "–": "--",
          **{sign: f"\\{sign}" for sign in "&%$#_{}"}}  # fmt: skip


def as_latex(tables: Sequence[Table]) -> str:
    """Table environments with rules of the package booktabs."""
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
