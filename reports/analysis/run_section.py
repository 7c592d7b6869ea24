"""What a report is made of: one run, or the variants of a sweep, each with where it stands on the sweep's axes.

A system is identified by its variant, defense, cut layer and target fraction. Numbers are found variant by variant, so
that nothing is paired across data sets or partitions by accident; tables put a column per axis in front.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol, TypeVar

import pandas as pd

from mocosfl_priv.results import RunRecord, StoredRun
from reports.analysis.leaderboard import Entry, leaderboard
from reports.analysis.summary import SummaryRow, headline_rows, summarise


@dataclass(frozen=True)
class Section:
    """One run of a report. labels: by axis, empty where it stands alone. rows: of its summary, never empty."""

    labels: Mapping[str, str]
    record: RunRecord
    rows: list[SummaryRow]
    board: list[Entry]

    @property
    def name(self) -> str:
        """The variant, for people; empty where it stands alone."""
        return variant_title(self.labels)

    @property
    def headlines(self) -> list[SummaryRow]:
        """A row per system."""
        return headline_rows(self.rows)

    @property
    def size(self) -> int:
        """How many rows it has."""
        return len(self.rows)

    @property
    def trainings(self) -> int:
        """How many trainings, honest ones."""
        return len(self.record.info["systems"])

    def inside(self, text: str) -> str:
        """`text` about this run, as it reads among others."""
        return f"{self.name}: {text}" if self.labels else text


def variant_title(labels: Mapping[str, str]) -> str:
    """Where a variant stands, for people."""
    return ", ".join(f"{axis} {label}" for axis, label in labels.items())


def sections_of(runs: Sequence[StoredRun]) -> list[Section]:
    """Those of the runs in which an attack succeeded, in their order."""
    found = []
    for run in runs:
        rows = summarise(run.record)
        if rows:
            found.append(Section(run.labels, run.record, rows, leaderboard(run.record, rows)))
    return found


def axes_of(sections: Sequence[Section]) -> list[str]:
    """The axes of a sweep; none for a run."""
    return list(sections[0].labels)


def said_of(sections: Sequence[Section], say: Callable[[Section], Iterable[str]]) -> list[str]:
    """What is said of every section: once what is said of all, the rest with the name of its own."""
    texts = [list(dict.fromkeys(say(section))) for section in sections]
    of_all = [text for text in texts[0] if all(text in others for others in texts[1:])]
    return of_all + [
        section.inside(text)
        for section, mine in zip(sections, texts, strict=True)
        for text in mine
        if text not in of_all
    ]


def flags_of(sections: Sequence[Section]) -> list[dict[str, Any]]:
    """The reliability flags of all sections; a sentence that all share stands once."""
    kinds = dict.fromkeys(str(flag["name"]) for section in sections for flag in section.record.info["flags"])
    return [
        {"name": kind, "sentence": sentence}
        for kind in kinds
        for sentence in said_of(sections, partial(_flags_of_kind, kind))
    ]


def _flags_of_kind(kind: str, section: Section) -> list[str]:
    return [flag["sentence"] for flag in section.record.info["flags"] if flag["name"] == kind]


class Labelled(Protocol):
    """Something that stands somewhere on the axes of a sweep."""

    @property
    def labels(self) -> Mapping[str, str]:
        """By axis."""


T = TypeVar("T", bound=Labelled)


def stacked(parts: Sequence[T], frame: Callable[[T], pd.DataFrame]) -> pd.DataFrame:
    """One table of all parts, a column per axis in front. frame: makes a new table."""
    tables = []
    for part in parts:
        table = frame(part)
        for place, (axis, label) in enumerate(part.labels.items()):
            table.insert(place, axis, label)
        tables.append(table)
    return pd.concat(tables, ignore_index=True)


def lines_of(sections: Sequence[Section], lines: Callable[[Section], Iterable[Sequence[str]]]) -> list[list[str]]:
    """The lines of a table for people, of all sections, a cell per axis in front."""
    return [[*section.labels.values(), *line] for section in sections for line in lines(section)]
