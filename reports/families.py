"""Every defense against no defense, all comparisons taken together."""

from __future__ import annotations

import math
from dataclasses import dataclass

from mocosfl_priv.evaluation.multiple_comparisons import family_wise_statement, holm
from mocosfl_priv.evaluation.statistics import SMALLEST_EFFECT
from mocosfl_priv.results import UNDEFENDED, RunRecord
from reports.comparison import Comparison, compare, systems_of
from reports.per_image import Key, bootstrap_options
from reports.summary import system_name


@dataclass(frozen=True)
class Member:
    """One comparison of a family: what it shows by itself, and the p-value that answers for the whole family."""

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


def against_undefended(record: RunRecord) -> Family:
    """Each defended system against the undefended one at its cut, with p-values adjusted over all of them (Holm)."""
    controls = {key[1]: key for key in reversed(systems_of(record, origin=UNDEFENDED))}
    pairs = [
        (key, controls[key[1]]) for key in systems_of(record) if key[1] in controls and key not in controls.values()
    ]
    return _family(record, pairs)


def _family(record: RunRecord, pairs: list[tuple[Key, Key]]) -> Family:
    """A difference is shown where its adjusted p-value allows it and it is no smaller than SMALLEST_EFFECT."""
    confidence = bootstrap_options(record)["confidence"]
    comparisons = [compare(record, ours, theirs) for ours, theirs in pairs]
    adjusted = iter(holm([each.p_value for each in comparisons if each.leak is not None]))
    members = [
        _member(system_name(*ours), comparison, next(adjusted) if comparison.leak is not None else math.nan, confidence)
        for (ours, _), comparison in zip(pairs, comparisons, strict=True)
    ]
    tested = [member for member in members if member.comparison.leak is not None]
    return Family(members, family_wise_statement(sum(member.shown for member in tested), len(tested), confidence))


def _member(system: str, comparison: Comparison, adjusted_p: float, confidence: float) -> Member:
    shown = (
        comparison.leak is not None and adjusted_p <= 1 - confidence and abs(comparison.leak.value) >= SMALLEST_EFFECT
    )
    return Member(system, comparison, adjusted_p, shown)
