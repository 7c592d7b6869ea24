"""The verdict on a candidate defense: does it leak less than no defense, and less than TAResSFL at equal accuracy?"""

from __future__ import annotations

from dataclasses import dataclass

from mocosfl_priv.evaluation.statistics import Finding, Interval
from mocosfl_priv.results import UNDEFENDED, RunRecord
from reports.analysis.comparison import TARESSFL, Comparison, compare, concerns, sound_attacks, systems_of
from reports.analysis.findings_text import finding, points, tenths
from reports.analysis.per_image import Key
from reports.analysis.summary import SummaryRow, headline_rows, summarise, system_name

COSTS = {
    "smashed_bytes_per_image": "bytes sent per image",
    "client_flops": "client FLOPs per image",
    "training_megabytes": "MB of training traffic",
}


@dataclass(frozen=True)
class Verdict:
    """The verdict on a candidate at one cut layer and target fraction.

    headline, undefended: headline rows of the candidate and of the undefended system; None if no attack succeeded.
    finding: whether any single attack on the candidate does better than a blind guess.
    attacks: those that succeeded on the candidate.
    against_none, against_taressfl: comparisons with these systems; None if there is none at this cut.
    flags: sentences of the flags that concern any of the compared systems.
    """

    system: str
    headline: SummaryRow | None
    undefended: SummaryRow | None
    finding: Finding
    attacks: list[str]
    against_none: Comparison | None
    against_taressfl: Comparison | None
    flags: list[str]

    def sentences(self) -> list[str]:
        """Return the verdict in words, one finding per text."""
        if self.headline is None:
            return [f"{self.system}: no attack succeeded, so there is no verdict.", *self.flags]
        return [
            self._leak(self.headline),
            self._against_none(),
            self._against_taressfl(),
            self._costs(self.headline),
            *self.flags,
        ]

    def _leak(self, row: SummaryRow) -> str:
        under = "under the ensemble" if row.is_ensemble else f"in the worst case over {', '.join(self.attacks)}"
        scale = "1 is a perfect reconstruction, 0 a blind guess"
        silent = {
            "blind": " No attack does better than a blind guess.",
            "undecided": " A leak is neither shown nor excluded.",
        }.get(self.finding, "")
        return (
            f"{self.system}: leak ratio R {_shown(row.leak_ratio)} {under} ({scale}); "
            f"linear probe {tenths(row.linear.value)}.{silent}"
        )

    def _against_none(self) -> str:
        if self.against_none is None:
            return "There is no undefended system at this cut to compare with."
        return f"Against no defense: {_said(self.system, self.against_none)}."

    def _against_taressfl(self) -> str:
        against = self.against_taressfl
        if against is None:
            return "There is no TAResSFL at this cut to compare with."
        if against.matched:
            return (
                f"Against TAResSFL at matched accuracy: {_said(self.system, against)}, an interval that contains zero."
            )
        return (
            f"Against TAResSFL at matched accuracy: no strength of it is matched. {against.unmatched}: "
            f"{_said(self.system, against)}, so {against.without_match}."
        )

    def _costs(self, row: SummaryRow) -> str:
        def shown(name: str) -> str:
            none = f" (none: {self.undefended.cost[name]:,.0f})" if self.undefended else ""
            return f"{row.cost[name]:,.0f}{none} {COSTS[name]}"

        return f"Costs: {', '.join(shown(name) for name in COSTS)}."


def verdicts(record: RunRecord, rows: list[SummaryRow] | None = None) -> list[Verdict]:
    """Return a verdict per system of the configuration's `candidate`, in the order of the results; none without one.

    TAResSFL may have been run with several strengths. The candidate is compared with the strength whose accuracy is
    nearest to its own (paired difference of the linear probe): among the matched ones, or if there is none, among all.
    """
    candidate = record.info["config"].get("candidate")
    if candidate is None:
        return []
    rows = rows or summarise(record)
    headlines = {(row.defense, row.cut_layer, row.target_fraction): row for row in headline_rows(rows)}
    return [_verdict(record, rows, headlines, key) for key in systems_of(record, label=candidate)]


def _verdict(record: RunRecord, rows: list[SummaryRow], headlines: dict[Key, SummaryRow], key: Key) -> Verdict:
    def at_this_cut(origin: str) -> list[Key]:
        return [other for other in systems_of(record, origin=origin) if other[1] == key[1] and other != key]

    undefended = next(iter(at_this_cut(UNDEFENDED)), None)
    strengths = {other: compare(record, key, other) for other in at_this_cut(TARESSFL)}
    nearest = min(strengths, key=lambda o: (not strengths[o].matched, abs(strengths[o].linear.value)), default=None)
    flags = [
        f"{flag['sentence']} [{flag['name']}]"
        for flag in record.info["flags"]
        if any(concerns(flag, other) for other in (key, undefended, nearest) if other is not None)
    ]
    return Verdict(
        system=system_name(*key),
        headline=_informed(headlines.get(key)),
        undefended=_informed(headlines.get(undefended)) if undefended else None,
        finding=finding(rows, system_name(*key)),
        attacks=sound_attacks(record, key),
        against_none=compare(record, key, undefended) if undefended else None,
        against_taressfl=strengths[nearest] if nearest else None,
        flags=flags,
    )


def _informed(row: SummaryRow | None) -> SummaryRow | None:
    """`row`, or None if it is a blind guess, which does not depend on the system."""
    return None if row is None or row.blind else row


def _said(system: str, comparison: Comparison) -> str:
    finding, other = comparison.finding, comparison.other
    accuracy = f"the linear probe differs by {points(comparison.linear)}"
    if comparison.leak is None:
        return f"{system} and {other} are {finding}, since no attack succeeded on both; {accuracy}"
    who = f"{system} {finding} {other}" if finding.startswith("leaks") else f"{finding} between {system} and {other}"
    return f"{who}: R differs by {_shown(comparison.leak, '+')}; {accuracy}"


def _shown(interval: Interval, sign: str = "") -> str:
    return f"{interval.value:{sign}.3f} [{interval.low:{sign}.3f}, {interval.high:{sign}.3f}]"
