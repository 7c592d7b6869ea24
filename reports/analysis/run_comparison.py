"""Compare two runs, or two sweeps: paired if they attacked the same victims with the same seeds.

Where runs cannot be paired, both numbers are shown, with the reason.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pandas as pd

from mocosfl_priv.errors import ConfigurationError
from mocosfl_priv.evaluation.multiple_comparisons import family_wise_statement, holm
from mocosfl_priv.evaluation.statistics import SMALLEST_EFFECT, Interval, Spread, leak_difference_spread
from mocosfl_priv.results import RunRecord, StoredRun
from reports.analysis.findings_text import number
from reports.analysis.per_image import Key, bootstrap_options, groups, of_system, paired, per_seed
from reports.analysis.run_section import variant_title
from reports.analysis.summary import SummaryRow, key_of, summarise, system_name

DIFFERENCES_SHOWN = 12
NOT_SHOWN = "no difference shown"


@dataclass(frozen=True)
class Line:
    """One system under one attack in both runs.

    labels: the variant's label by axis; empty if the runs are not sweeps.
    first, second: R in either run.
    difference: R of the second minus R of the first, paired; None if not paired.
    adjusted_p: p-value of the difference, adjusted over all lines; NaN if not paired.
    """

    labels: Mapping[str, str]
    system: str
    attack: str
    first: Interval
    second: Interval
    difference: Interval | None
    adjusted_p: float
    finding: str

    def cells(self) -> list[str]:
        """Return the cells under the headings of :class:`RunComparison`, for readers."""
        shown = [f"{each.value:.3f} [{each.low:.3f}, {each.high:.3f}]" for each in (self.first, self.second)]
        difference = self.difference
        change = f"{difference.value:+.3f} [{difference.low:+.3f}, {difference.high:+.3f}]" if difference else "–"
        p_value = number(self.adjusted_p, ".4f")
        return [*self.labels.values(), self.system, self.attack, *shown, change, p_value, self.finding]


@dataclass(frozen=True)
class RunComparison:
    """The comparison of two runs or sweeps.

    axes: names of the sweeps' axes.
    unpaired: why no line is paired; empty if any is.
    statement: the joint result of the paired lines in words.
    notes: other differences between the runs, in words.
    """

    axes: list[str]
    lines: list[Line]
    unpaired: str
    statement: str
    notes: list[str]

    @property
    def headings(self) -> list[str]:
        """The headings of the lines' cells."""
        return [*self.axes, "system", "attack", "R of the first", "R of the second", "second minus first",
                "p of all (Holm)", "finding"]  # fmt: skip


@dataclass(frozen=True)
class _Found:
    """A system and attack that both runs have, before p-values are adjusted over all of them."""

    labels: Mapping[str, str]
    key: tuple[Key, str]
    first: SummaryRow
    second: SummaryRow
    spread: Spread | None


def compare_runs(first: Sequence[StoredRun], second: Sequence[StoredRun]) -> RunComparison:
    """Compare every system and attack that both have, in the order of `first`; sweeps are compared per variant.

    Raises ConfigurationError if the sweeps have different axes.
    """
    axes, others = (list(runs[0].labels) for runs in (first, second))
    if axes != others:
        said = [f"axes {', '.join(names)}" if names else "no axes" for names in (axes, others)]
        raise ConfigurationError(
            f"the first has {said[0]} and the second has {said[1]}, so their variants cannot be matched"
        )
    pairs = [(one, other) for one in first for other in second if one.labels == other.labels]
    reasons = [_why_unpaired(one.record, other.record) for one, other in pairs]
    found = [
        each for pair, reason in zip(pairs, reasons, strict=True) for each in _common(*pair, unpaired=bool(reason))
    ]
    confidence = bootstrap_options(first[0].record)["confidence"]
    adjusted = iter(holm([each.spread.p_value for each in found if each.spread is not None]))
    lines = [_line(each, next(adjusted) if each.spread is not None else math.nan, confidence) for each in found]
    tested = [line for line in lines if line.difference is not None]
    shown = sum(line.finding != NOT_SHOWN for line in tested)
    notes = [
        f"{variant_title(one.labels)}: {note}" if axes else note
        for (one, other), reason in zip(pairs, reasons, strict=True)
        for note in (*([f"Not paired: {reason}."] if reason and axes else []), *_notes(one.record, other.record))
    ]
    return RunComparison(
        axes,
        lines,
        "; ".join(dict.fromkeys(reasons)) if reasons and all(reasons) else "",
        family_wise_statement(shown, len(tested), confidence),
        [*notes, *_only_one(first, second, "first"), *_only_one(second, first, "second")],
    )


def _common(one: StoredRun, other: StoredRun, unpaired: bool) -> Iterator[_Found]:
    """Yield the systems and attacks that both runs have."""
    ours, theirs = _by_cell(summarise(one.record)), _by_cell(summarise(other.record))
    options = bootstrap_options(one.record)
    for key, row in ours.items():
        if key in theirs:
            spread = None if unpaired else _difference(one.record, other.record, key, options)
            yield _Found(one.labels, key, row, theirs[key], spread)


def _line(found: _Found, adjusted_p: float, confidence: float) -> Line:
    return Line(
        labels=found.labels,
        system=system_name(*found.key[0]),
        attack=found.key[1],
        first=found.first.leak_ratio,
        second=found.second.leak_ratio,
        difference=found.spread.interval(confidence) if found.spread is not None else None,
        adjusted_p=adjusted_p,
        finding=_finding(found.spread, adjusted_p, confidence),
    )


def _only_one(runs: Sequence[StoredRun], others: Sequence[StoredRun], which: str) -> list[str]:
    known = [run.labels for run in others]
    missing = [variant_title(run.labels) for run in runs if run.labels not in known]
    return [f"Only the {which} has: {'; '.join(missing)}."] if missing else []


def _finding(spread: Spread | None, adjusted_p: float, confidence: float) -> str:
    if spread is None:
        return "not paired"
    if adjusted_p > 1 - confidence or abs(spread.value) < SMALLEST_EFFECT:
        return NOT_SHOWN
    return "the second leaks more" if spread.value > 0 else "the second leaks less"


def _by_cell(rows: list[SummaryRow]) -> dict[tuple[Key, str], SummaryRow]:
    """Rows by system and attack, without worst cases: those over different attacks are not comparable."""
    return {(key_of(row), row.attack): row for row in rows if not row.blind and not row.is_worst_case}


def _why_unpaired(first: RunRecord, second: RunRecord) -> str:
    """Why the runs cannot be paired; empty if they have the same victims and at least one common seed."""
    hashes = [record.info.get("roles", {}).get("victims", {}).get("content_sha256") for record in (first, second)]
    if None in hashes or hashes[0] != hashes[1]:
        return "the runs attacked different victims, so their differences cannot be paired by image"
    if not set(first.cells["seed"]) & set(second.cells["seed"]):
        return "the runs have no training seed in common, so their differences cannot be paired by seed"
    return ""


def _difference(first: RunRecord, second: RunRecord, key: tuple[Key, str], options: Mapping[str, Any]) -> Spread | None:
    """R in the second run minus R in the first; None where the two have no seed in common."""
    system, attack = key
    ours, theirs = paired(*(_of_attack(of_system(record.per_image, system), attack) for record in (first, second)))
    if ours.empty:
        return None
    return leak_difference_spread(
        per_seed(theirs, "mse"), per_seed(ours, "mse"), per_seed(ours, "mse_floor"), groups=groups(ours), **options
    )


def _of_attack(frame: pd.DataFrame, attack: str) -> pd.DataFrame:
    return frame[frame["attack"] == attack]


def _notes(first: RunRecord, second: RunRecord) -> Iterator[str]:
    """Yield sentences on floors, settings and plugin code that differ."""
    floors = [record.per_image["mse_floor"].mean() for record in (first, second)]
    if not any(map(math.isnan, floors)) and not math.isclose(*floors, rel_tol=1e-6):
        yield f"The floors differ ({floors[0]:.4f} and {floors[1]:.4f}): R is relative to different blind guesses."
    changed = sorted(_changed(first.info["config"], second.info["config"]))
    if changed:
        more = f" and {len(changed) - DIFFERENCES_SHOWN} more" if len(changed) > DIFFERENCES_SHOWN else ""
        yield f"Settings that differ: {', '.join(changed[:DIFFERENCES_SHOWN])}{more}."
    for kind in ("attacks", "defenses"):
        hashes = [{p["label"]: p.get("code_sha256") for p in r.info["plugins"][kind]} for r in (first, second)]
        other = [label for label in hashes[0] if label in hashes[1] and hashes[0][label] != hashes[1][label]]
        if other:
            yield f"The code of these {kind} differs: {', '.join(other)}."


def _changed(first: Any, second: Any, path: str = "") -> Iterator[str]:
    """Dotted paths of the keys whose values differ; lists are compared as a whole."""
    if not (isinstance(first, Mapping) and isinstance(second, Mapping)):
        if first != second:
            yield path
        return
    for name in {**first, **second}:
        yield from _changed(first.get(name), second.get(name), f"{path}.{name}" if path else str(name))
