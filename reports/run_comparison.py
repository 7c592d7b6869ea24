"""Two runs side by side: paired where they attacked the same victims with the same seeds, else saying why not."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import pandas as pd

from mocosfl_priv.evaluation.multiple_comparisons import family_wise_statement, holm
from mocosfl_priv.evaluation.statistics import SMALLEST_EFFECT, Interval, Spread, leak_difference_spread
from mocosfl_priv.results import RunRecord
from reports.per_image import GROUP, Key, bootstrap_options, groups, of_system, paired, per_seed
from reports.summary import SummaryRow, summarise, system_name

DIFFERENCES_SHOWN = 12
NOT_SHOWN = "no difference shown"


@dataclass(frozen=True)
class Line:
    """One system under one attack in both runs. difference: R of the second minus R of the first, None where they are
    not paired, and `adjusted_p` then NaN.
    """

    system: str
    attack: str
    first: Interval
    second: Interval
    difference: Interval | None
    adjusted_p: float
    finding: str

    def cells(self) -> list[str]:
        """Under the headings of :class:`RunComparison`, for people."""
        shown = [f"{each.value:.3f} [{each.low:.3f}, {each.high:.3f}]" for each in (self.first, self.second)]
        difference = self.difference
        change = f"{difference.value:+.3f} [{difference.low:+.3f}, {difference.high:+.3f}]" if difference else "–"
        p_value = "–" if math.isnan(self.adjusted_p) else f"{self.adjusted_p:.4f}"
        return [self.system, self.attack, *shown, change, p_value, self.finding]


@dataclass(frozen=True)
class RunComparison:
    """unpaired: why nothing is paired, empty if it is. notes: what else differs between the runs, in words."""

    headings: ClassVar = [
        "system", "attack", "R of the first", "R of the second", "second minus first", "p of all (Holm)", "finding",
    ]  # fmt: skip

    lines: list[Line]
    unpaired: str
    statement: str
    notes: list[str]


def compare_runs(first: RunRecord, second: RunRecord) -> RunComparison:
    """Every system and attack that both have. The order of `first`."""
    unpaired = _why_unpaired(first, second)
    options = bootstrap_options(first)
    ours, theirs = _by_cell(summarise(first)), _by_cell(summarise(second))
    common = [key for key in ours if key in theirs]
    spreads = {key: None if unpaired else _difference(first, second, key, options) for key in common}
    adjusted = iter(holm([spread.p_value for spread in spreads.values() if spread is not None]))
    lines = []
    for key, spread in spreads.items():
        adjusted_p = next(adjusted) if spread is not None else math.nan
        lines.append(
            Line(
                system=system_name(*key[0]),
                attack=key[1],
                first=ours[key].leak_ratio,
                second=theirs[key].leak_ratio,
                difference=spread.interval(options["confidence"]) if spread is not None else None,
                adjusted_p=adjusted_p,
                finding=_finding(spread, adjusted_p, options["confidence"]),
            )
        )
    tested = [line for line in lines if line.difference is not None]
    found = sum(line.finding != NOT_SHOWN for line in tested)
    statement = family_wise_statement(found, len(tested), options["confidence"])
    return RunComparison(lines, unpaired, statement, list(_notes(first, second)))


def _finding(spread: Spread | None, adjusted_p: float, confidence: float) -> str:
    if spread is None:
        return "not paired"
    if adjusted_p > 1 - confidence or abs(spread.value) < SMALLEST_EFFECT:
        return NOT_SHOWN
    return "the second leaks more" if spread.value > 0 else "the second leaks less"


def _by_cell(rows: list[SummaryRow]) -> dict[tuple[Key, str], SummaryRow]:
    """Single attacks only: a worst case over other attacks would be another measure."""
    return {
        (tuple(getattr(row, name) for name in GROUP), row.attack): row
        for row in rows
        if not row.blind and not row.is_worst_case
    }


def _why_unpaired(first: RunRecord, second: RunRecord) -> str:
    """Empty where images and seeds are the same, or some of the seeds."""
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
    """Floors, settings and code that differ; what only one of the runs has."""
    floors = [record.per_image["mse_floor"].mean() for record in (first, second)]
    if not math.isclose(*floors, rel_tol=1e-6):
        yield f"The floors differ ({floors[0]:.4f} and {floors[1]:.4f}): R is relative to another blind guess."
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
