"""Every defense against no defense, all comparisons taken together."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from mocosfl_priv.evaluation.multiple_comparisons import family_wise_statement, holm
from mocosfl_priv.evaluation.statistics import SMALLEST_EFFECT
from mocosfl_priv.results import UNDEFENDED, RunRecord
from reports.analysis.comparison import Comparison, compare, systems_of
from reports.analysis.per_image import Key, bootstrap_options
from reports.analysis.summary import system_name


@dataclass(frozen=True)
class Member:
    """One comparison of a family: what it shows by itself, and the p-value that answers for the whole family.

    run: which of the runs it is of.
    """

    run: int
    system: str
    comparison: Comparison
    adjusted_p: float
    shown: bool

    @property
    def finding(self) -> str:
        """In words; a difference is claimed only where the whole family allows it."""
        if self.comparison.leak is None:
            return "not compared: no attack succeeded on both"
        if not self.shown:
            return "no difference shown"
        return "leaks less" if self.comparison.leak.value < 0 else "leaks more"


@dataclass(frozen=True)
class Family:
    """Comparisons that are read together. statement: what they say together, in words."""

    members: list[Member]
    statement: str


def against_undefended(*records: RunRecord) -> Family:
    """Each defended system of each run against that run's undefended one at its cut, with p-values adjusted over all of
    them (Holm).
    """
    pairs = [(run, *pair) for run, record in enumerate(records) for pair in _pairs(record)]
    return _family(records, pairs)


def _pairs(record: RunRecord) -> list[tuple[Key, Key]]:
    controls = {key[1]: key for key in reversed(systems_of(record, origin=UNDEFENDED))}
    return [
        (key, controls[key[1]]) for key in systems_of(record) if key[1] in controls and key not in controls.values()
    ]


def _family(records: Sequence[RunRecord], pairs: list[tuple[int, Key, Key]]) -> Family:
    """A difference is shown where its adjusted p-value allows it and it is no smaller than SMALLEST_EFFECT."""
    confidence = bootstrap_options(records[0])["confidence"]
    comparisons = [compare(records[run], ours, theirs) for run, ours, theirs in pairs]
    adjusted = adjusted_p_values(comparisons)
    members = [
        Member(run, system_name(*ours), comparison, p_value, is_shown(comparison, p_value, confidence))
        for (run, ours, _), comparison, p_value in zip(pairs, comparisons, adjusted, strict=True)
    ]
    tested = [member for member in members if member.comparison.leak is not None]
    return Family(members, family_wise_statement(sum(member.shown for member in tested), len(tested), confidence))


def adjusted_p_values(comparisons: Sequence[Comparison]) -> list[float]:
    """Of all comparisons together (Holm); NaN where nothing was tested."""
    adjusted = iter(holm([each.p_value for each in comparisons if each.leak is not None]))
    return [next(adjusted) if each.leak is not None else math.nan for each in comparisons]


def is_shown(comparison: Comparison, adjusted_p: float, confidence: float) -> bool:
    """Whether a family allows one of its comparisons to claim a difference that matters."""
    return (
        comparison.leak is not None and adjusted_p <= 1 - confidence and abs(comparison.leak.value) >= SMALLEST_EFFECT
    )
