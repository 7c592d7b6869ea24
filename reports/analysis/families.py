"""Compare every defense with no defense, with p-values adjusted over all these comparisons."""

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
    """One comparison of a family of comparisons that are tested together.

    run: index of the run.
    system: name of the defended system.
    comparison: the system compared with the undefended one, without adjustment.
    adjusted_p: p-value adjusted over the family; NaN if not tested.
    shown: whether a difference may be claimed (see :func:`is_shown`).
    """

    run: int
    system: str
    comparison: Comparison
    adjusted_p: float
    shown: bool

    @property
    def finding(self) -> str:
        """The result in words; a difference is claimed only if `shown`."""
        if self.comparison.leak is None:
            return "not compared: no attack succeeded on both"
        if not self.shown:
            return "no difference shown"
        return "leaks less" if self.comparison.leak.value < 0 else "leaks more"


@dataclass(frozen=True)
class Family:
    """Comparisons that are tested together. statement: their joint result in words."""

    members: list[Member]
    statement: str


def against_undefended(*records: RunRecord) -> Family:
    """Compare each defended system with the undefended one of the same run and cut.

    P-values are adjusted over all comparisons of all runs (Holm).
    """
    pairs = [(run, *pair) for run, record in enumerate(records) for pair in _pairs(record)]
    return _family(records, pairs)


def _pairs(record: RunRecord) -> list[tuple[Key, Key]]:
    controls = {key[1]: key for key in reversed(systems_of(record, origin=UNDEFENDED))}
    return [
        (key, controls[key[1]]) for key in systems_of(record) if key[1] in controls and key not in controls.values()
    ]


def _family(records: Sequence[RunRecord], pairs: list[tuple[int, Key, Key]]) -> Family:
    """Run the comparisons `pairs` (index of the run, system, undefended system) as one family."""
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
    """Return the p-values of `comparisons` adjusted over all of them (Holm); NaN for one that was not tested."""
    adjusted = iter(holm([each.p_value for each in comparisons if each.leak is not None]))
    return [next(adjusted) if each.leak is not None else math.nan for each in comparisons]


def is_shown(comparison: Comparison, adjusted_p: float, confidence: float) -> bool:
    """Whether a comparison may claim a difference of R.

    It may if its adjusted p-value is at most 1 - `confidence` and the difference is at least `SMALLEST_EFFECT`.
    """
    return (
        comparison.leak is not None and adjusted_p <= 1 - confidence and abs(comparison.leak.value) >= SMALLEST_EFFECT
    )
