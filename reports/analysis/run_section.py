"""The sections of a report: one run, or the variants of a sweep with their labels on the sweep's axes.

A system is identified by its variant, defense, cut layer and target fraction. Numbers are computed per variant, so that
nothing is paired across data sets or partitions by accident. Tables start with a column per axis.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol, TypeVar

import pandas as pd

from mocosfl_priv.results import RunRecord, StoredRun
from reports.analysis.leaderboard import Entry, leaderboard
from reports.analysis.mosaics import Mosaic, mosaic_scale
from reports.analysis.summary import SummaryRow, headline_rows, summarise


@dataclass(frozen=True)
class Section:
    """One run of a report.

    labels: its label by axis; empty if the report is of a single run.
    record: the stored run.
    rows: its summary; never empty.
    board: its leaderboard.
    scale: what its leak ratios are compared with (see :mod:`reports.analysis.mosaics`).
    """

    labels: Mapping[str, str]
    record: RunRecord
    rows: list[SummaryRow]
    board: list[Entry]
    scale: list[Mosaic]

    @property
    def name(self) -> str:
        """The name of the variant, for readers; empty if the report is of a single run."""
        return variant_title(self.labels)

    @property
    def headlines(self) -> list[SummaryRow]:
        """The headline row of every system."""
        return headline_rows(self.rows)

    @property
    def size(self) -> int:
        """The number of summary rows."""
        return len(self.rows)

    @property
    def trainings(self) -> int:
        """The number of honest trainings."""
        return len(self.record.info["systems"])

    def inside(self, text: str) -> str:
        """Return `text` with the name of the variant in front; unchanged if the report is of a single run."""
        return f"{self.name}: {text}" if self.labels else text


def variant_title(labels: Mapping[str, str]) -> str:
    """Return a variant's labels by axis as text, for readers."""
    return ", ".join(f"{axis} {label}" for axis, label in labels.items())


def sections_of(runs: Sequence[StoredRun]) -> list[Section]:
    """Return a section for every run in which at least one attack succeeded, in order."""
    found = []
    for run in runs:
        rows = summarise(run.record)
        if rows:
            board = leaderboard(run.record, rows)
            found.append(Section(run.labels, run.record, rows, board, mosaic_scale(run.record)))
    return found


def axes_of(sections: Sequence[Section]) -> list[str]:
    """Return the names of the axes of a sweep; none for a single run."""
    return list(sections[0].labels)


def said_of(sections: Sequence[Section], say: Callable[[Section], Iterable[str]]) -> list[str]:
    """Collect the texts that `say` returns for every section.

    A text that holds for all sections comes first and once; any other text gets the name of its section in front.
    """
    texts = [list(dict.fromkeys(say(section))) for section in sections]
    of_all = [text for text in texts[0] if all(text in others for others in texts[1:])]
    return of_all + [
        section.inside(text)
        for section, mine in zip(sections, texts, strict=True)
        for text in mine
        if text not in of_all
    ]


def flags_of(sections: Sequence[Section]) -> list[dict[str, Any]]:
    """Return the reliability flags of all sections, by kind; a sentence that all sections share is listed once."""
    kinds = dict.fromkeys(str(flag["name"]) for section in sections for flag in section.record.info["flags"])
    return [
        {"name": kind, "sentence": sentence}
        for kind in kinds
        for sentence in said_of(sections, partial(_flags_of_kind, kind))
    ]


def _flags_of_kind(kind: str, section: Section) -> list[str]:
    return [flag["sentence"] for flag in section.record.info["flags"] if flag["name"] == kind]


class Labelled(Protocol):
    """Something that has labels on the axes of a sweep."""

    @property
    def labels(self) -> Mapping[str, str]:
        """The label by axis."""


T = TypeVar("T", bound=Labelled)


def stacked(parts: Sequence[T], frame: Callable[[T], pd.DataFrame]) -> pd.DataFrame:
    """Return one table of all parts, with a column per axis in front.

    frame: returns the table of a part, which is changed in place, so it must be a new object.
    """
    tables = []
    for part in parts:
        table = frame(part)
        for place, (axis, label) in enumerate(part.labels.items()):
            table.insert(place, axis, label)
        tables.append(table)
    return pd.concat(tables, ignore_index=True)


def lines_of(sections: Sequence[Section], lines: Callable[[Section], Iterable[Sequence[str]]]) -> list[list[str]]:
    """Return the rows of a table for readers, from all sections, with a cell per axis in front."""
    return [[*section.labels.values(), *line] for section in sections for line in lines(section)]
