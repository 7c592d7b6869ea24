"""The leaderboard of a run: one row per system, lowest leak first, as table cells, CSV and notes."""

from __future__ import annotations

from dataclasses import dataclass, replace

import pandas as pd

from mocosfl_priv.evaluation.statistics import Interval
from mocosfl_priv.results import UNDEFENDED, RunRecord
from reports.analysis.comparison import (
    BOTTLENECK,
    CLOSE,
    accuracy_difference,
    concerns,
    is_matched,
    sound_attacks,
    systems_of,
)
from reports.analysis.findings_text import number, points
from reports.analysis.summary import SummaryRow, headline_rows, system_name

COSTS = ["smashed_bytes_per_image", "client_flops", "training_megabytes"]
HEADINGS = [
    "defense",
    "cut",
    "leak ratio R",
    "under",
    "linear probe",
    "kNN",
    "against none",
    "against control",
    "matched",
    "bytes per image",
    "client model MFLOPs",
    "training MB",
    "seeds",
    "flags",
]


@dataclass(frozen=True)
class Entry:
    """A system in the leaderboard.

    row: its headline row.
    family: the class of its defense, as ``module:Class``.
    control: name of the system whose accuracy it should match; None if there is none at this cut.
    against_none, against_control: its linear-probe accuracy minus that of the undefended system and of the control,
        paired by seed and image; None if there is no such system or it is this one.
    flags: number of reliability flags that concern it.
    missing: attacks that failed on it and succeeded on others at this cut, so that its R is not comparable.
    best_of_family: whether it has the lowest R among several matched systems of one family at one cut.
    """

    row: SummaryRow
    family: str
    control: str | None
    against_none: Interval | None
    against_control: Interval | None
    flags: int
    missing: tuple[str, ...] = ()
    best_of_family: bool = False

    @property
    def matched(self) -> bool:
        """Whether it is the control, or its accuracy matches the control's (see :func:`is_matched`)."""
        if self.against_control is None:
            return self.row.system == self.control
        return is_matched(self.against_control)


def leaderboard(record: RunRecord, rows: list[SummaryRow]) -> list[Entry]:
    """Return one entry per system with a headline in `rows`, sorted by cut layer and then R, lowest first.

    At each cut, systems on which an attack failed that succeeded on others come last. The control is the first
    bottleneck defense at the same cut, which shows the effect of smaller messages alone; without one, the undefended
    system.
    """
    headlines = {(row.defense, row.cut_layer, row.target_fraction): row for row in headline_rows(rows)}
    counting = _counting_attacks(record)
    entries = [
        _entry(record, row, str(plugin["origin"]), counting[row.cut_layer])
        for plugin in record.info["plugins"]["defenses"]
        for key, row in headlines.items()
        if key[0] == plugin["label"]
    ]
    entries.sort(key=lambda entry: (entry.row.cut_layer, bool(entry.missing), entry.row.leak_ratio.value))
    return [replace(entry, best_of_family=_is_best(entry, entries)) for entry in entries]


def _entry(record: RunRecord, row: SummaryRow, family: str, counting: set[str]) -> Entry:
    key = (row.defense, row.cut_layer, row.target_fraction)
    none, bottleneck = (
        next((other for other in systems_of(record, origin=origin) if other[1] == row.cut_layer), None)
        for origin in (UNDEFENDED, BOTTLENECK)
    )
    control = bottleneck or none
    return Entry(
        row=row,
        family=family,
        control=system_name(*control) if control else None,
        against_none=accuracy_difference(record, key, none) if none not in (None, key) else None,
        against_control=accuracy_difference(record, key, control) if control not in (None, key) else None,
        flags=sum(concerns(flag, key) for flag in record.info["flags"]),
        missing=tuple(sorted(counting - set(sound_attacks(record, key)))),
    )


def _counting_attacks(record: RunRecord) -> dict[int, set[str]]:
    """The attacks that every system at a cut layer should have: all that succeeded on any of them."""
    succeeded: dict[int, set[str]] = {}
    for system in systems_of(record):
        succeeded.setdefault(system[1], set()).update(sound_attacks(record, system))
    return succeeded


def _is_best(entry: Entry, entries: list[Entry]) -> bool:
    """Whether `entry` is the first matched one of several of its family; `entries` are sorted by R."""
    family = [e for e in entries if (e.family, e.row.cut_layer) == (entry.family, entry.row.cut_layer)]
    return len(family) > 1 and entry is next((e for e in family if e.matched and not e.missing), None)


def leaderboard_frame(entries: list[Entry]) -> pd.DataFrame:
    """Return the leaderboard as a table; an interval has the columns ``name``, ``name_low`` and ``name_high``."""
    flat = []
    for entry in entries:
        row = entry.row
        line: dict[str, object] = {
            "defense": row.defense,
            "family": entry.family,
            "cut_layer": row.cut_layer,
            "target_fraction": row.target_fraction,
            "attack": row.attack,
            "worst_case_of": ";".join(f"{name}:{share:.4f}" for name, share in row.chosen.items()),
            "missing_attacks": ";".join(entry.missing),
        }
        intervals = {
            "leak_ratio": row.leak_ratio,
            "linear_accuracy": row.linear,
            "knn_accuracy": row.knn,
            "linear_against_none": entry.against_none,
            "linear_against_control": entry.against_control,
        }
        for name, interval in intervals.items():
            values = (interval.value, interval.low, interval.high) if interval else (None, None, None)
            line |= dict(zip((name, f"{name}_low", f"{name}_high"), values, strict=True))
        line |= {"control": entry.control, "matched": entry.matched, "best_of_family": entry.best_of_family}
        line |= {name: row.cost[name] for name in COSTS} | {"seeds": row.seeds, "flags": entry.flags}
        flat.append(line)
    return pd.DataFrame(flat)


def leaderboard_cells(entry: Entry) -> list[str]:
    """Return the cells of an entry under `HEADINGS`, for readers."""
    row = entry.row
    matched = "best of its kind" if entry.best_of_family else "yes" if entry.matched else "no"
    return [
        f"{row.defense}, {100 * row.target_fraction:.3g} % target data" if row.target_fraction else row.defense,
        str(row.cut_layer),
        f"{row.leak_ratio.value:.3f} [{row.leak_ratio.low:.3f}, {row.leak_ratio.high:.3f}]",
        f"{row.attack_text}, without {', '.join(entry.missing)}" if entry.missing else row.attack_text,
        _accuracy(row.linear),
        _accuracy(row.knn),
        points(entry.against_none) if entry.against_none else "–",
        points(entry.against_control) if entry.against_control else "–",
        matched if entry.control else "–",
        f"{row.cost['smashed_bytes_per_image']:,.0f}",
        f"{row.cost['client_flops'] / 1e6:,.2f}",
        number(row.cost["training_megabytes"], ",.1f"),
        str(row.seeds),
        str(entry.flags),
    ]


def leaderboard_notes(record: RunRecord, entries: list[Entry]) -> list[str]:
    """Return the notes on how to read the leaderboard."""
    controls = list(dict.fromkeys(entry.control for entry in entries if entry.control))
    confidence = f"{100 * record.info['config']['evaluation']['confidence']:.0f} %"
    notes = [
        "Leak ratio R = 1 - MSE / MSE of a blind guess: 1 is a perfect reconstruction, 0 a guess. It is the higher "
        "one of the ensemble's and the worst case's, which takes for every victim the attack that came closest. "
        "Brackets have the share of victims for each of these attacks. Lowest R first; systems on which an attack "
        "failed that succeeded on others come last.",
        f"Brackets are {confidence} intervals over seeds and images. Differences are in points of linear-probe "
        "accuracy, paired by seed and image.",
    ]
    notes.append(
        "Costs are for one image forward through the client's model, and for dense messages: the defense's own "
        "computation, backward passes and possible savings by sparse encoding are not counted."
    )
    if controls:
        notes.append(
            f"Matched: the difference to the control ({', '.join(controls)}) is at most {100 * CLOSE:g} points, and "
            "its interval contains zero. Best of its kind: of several strengths of a defense, the matched one that "
            "leaks least. It is selected on these results, so do not take it for an independent measurement."
        )
    return notes


def _accuracy(interval: Interval) -> str:
    if interval.value != interval.value:
        return "not measurable"
    return f"{100 * interval.value:.1f} % [{100 * interval.low:.1f}, {100 * interval.high:.1f}]"
