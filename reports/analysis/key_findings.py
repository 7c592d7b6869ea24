"""The summary of a report in four answers: what leaks, to whom, how certain that is, and what defending costs."""

from __future__ import annotations

from math import isnan

from mocosfl_priv.results import TEST_VICTIMS, UNDEFENDED, RunRecord, victims_key
from reports.analysis.families import Family
from reports.analysis.findings_text import finding, percent, points, undecided
from reports.analysis.leaderboard import Entry
from reports.analysis.mosaics import Mosaic, comparison
from reports.analysis.summary import TAIL, VISIBLE_SSIM, SummaryRow, headline_rows

QUESTIONS = ("What leaks", "To whom", "How sure", "At what price")
LITTLE, MATCHED = 0.5, 0.5  # R below which reconstructions show little; share of matches that contradicts them
PRICES = {
    "smashed_bytes_per_image": "bytes sent per image",
    "client_flops": "client FLOPs per image",
    "training_megabytes": "MB of training traffic",
}


def key_findings(
    record: RunRecord, rows: list[SummaryRow], board: list[Entry], family: Family, scale: list[Mosaic]
) -> dict[str, str]:
    """Return the answers by question, in the order of `QUESTIONS`, one or two sentences each."""
    undefended = [entry for entry in board if entry.family == UNDEFENDED]
    defended = [entry for entry in board if entry.family != UNDEFENDED and not entry.row.blind]
    best = next((entry for entry in sorted(defended, key=_leak) if entry.matched and not entry.missing), None)
    answers = (
        _what(rows, undefended, best, bool(defended), scale),
        _whom(record),
        _sure(record, rows, family),
        _price(undefended, best, bool(defended)),
    )
    return dict(zip(QUESTIONS, answers, strict=True))


def _leak(entry: Entry) -> float:
    return entry.row.leak_ratio.value


def _what(
    rows: list[SummaryRow], undefended: list[Entry], best: Entry | None, defended: bool, scale: list[Mosaic]
) -> str:
    worst = max((entry.row for entry in undefended), key=lambda row: row.leak_ratio.value, default=None)
    if worst is None:
        worst = max(headline_rows(rows), key=lambda row: row.leak_ratio.value)
    said = f"{worst.system}: {_amount(rows, worst, scale)}."
    if best is not None:
        said += f" Of the defenses about as accurate as {best.control}, {best.row.system} leaks least: "
        said += f"{_amount(rows, best.row, scale)}."
    elif defended:
        said += " No defense is about as accurate as the control, so none is named here."
    return said + _matched(rows)


def _matched(rows: list[SummaryRow]) -> str:
    """A sentence on systems whose images are badly reconstructed, and whose messages are matched all the same."""
    found = [
        (row, row.linkage.same, row.linkage.candidates)
        for row in headline_rows(rows)
        if row.linkage is not None
        and not row.blind
        and row.linkage.same.value > MATCHED
        and row.linkage.same.low > row.linkage.chance
        and row.leak_ratio.value < LITTLE
    ]
    if not found:
        return ""
    row, same, candidates = min(found, key=lambda one: one[0].leak_ratio.value)
    others = len(found) - 1
    rest = f" {others} other system{'s are' if others > 1 else ' is'} like that." if others else ""
    return (
        f" {row.system}: R is {row.leak_ratio.value:.2f}, but {percent(same)} of messages can be matched to a copy of "
        f"the image among {candidates} candidates.{rest}"
    )


def _amount(rows: list[SummaryRow], row: SummaryRow, scale: list[Mosaic]) -> str:
    if row.blind:
        return "no attack that uses the smashed data succeeded, so its leakage is unknown"
    single = [one.leak_ratio for one in rows if one.system == row.system and not one.blind and not one.is_worst_case]
    found = finding(rows, row.system)
    if found == "undecided":
        return undecided(single)
    if found == "blind":
        return "no attack does better than a blind guess"
    return (
        f"attacks remove {percent(row.leak_ratio)} of a blind guess's error{comparison(row.leak_ratio.value, scale)} "
        f"and reconstruct {percent(row.visible)} of the victims with an SSIM above {VISIBLE_SSIM:g}; for the "
        f"{100 * (1 - TAIL):.0f} % of victims that leak most, they remove {percent(row.leak_tail)} or more"
    )


def _whom(record: RunRecord) -> str:
    model = record.info["threat_model"]
    grants = ", ".join(str(grant).replace("_", " ") for grant in model["grants"]) or "nothing else"
    knows = "knows the defense and trains through it" if model["adaptive"] else "does not know the defense"
    return f"To an attacker who sees the smashed data, as the server does, and has: {grants}. This attacker {knows}."


def _sure(record: RunRecord, rows: list[SummaryRow], family: Family) -> str:
    seeds, victims = len(record.info["seeds"]), len(record.images[victims_key(TEST_VICTIMS)])
    level = f"{100 * record.info['config']['evaluation']['confidence']:.0f} %"
    what = "attack" if record.info.get("own_model") else "training"
    others = "attacks with other seeds" if what == "attack" else "other trainings"
    training = f"{seeds} {what} seeds" if seeds > 1 else f"one {what} seed, so {others} may differ"
    flags = len(record.info["flags"])
    flagged = (
        f"{flags} reliability flag{'s' if flags != 1 else ''}, explained below" if flags else "no reliability flag"
    )
    compared = f" Against no defense: {family.statement}" if family.members else ""
    attacks = len({row.attack for row in rows if not row.blind and not row.is_worst_case})
    return (
        f"{attacks} attack{'s' if attacks != 1 else ''} on {victims} victims, {training}; brackets are {level} "
        f"intervals; {flagged}.{compared}"
    )


def _price(undefended: list[Entry], best: Entry | None, defended: bool) -> str:
    if best is None:
        return "Unknown: no defense is about as accurate as the control." if defended else "No defense was run."
    none = next((entry.row for entry in undefended if entry.row.cut_layer == best.row.cut_layer), None)
    accuracy = (
        f"the linear probe changes by {points(best.against_none)} against no defense" if best.against_none else ""
    )
    known = {name: what for name, what in PRICES.items() if not isnan(best.row.cost[name])}  # an audit trains nothing
    costs = [_cost(best.row, none, name, what) for name, what in known.items()]
    return f"{best.row.system}: {'; '.join(part for part in (accuracy, ', '.join(costs)) if part)}."


def _cost(row: SummaryRow, none: SummaryRow | None, name: str, what: str) -> str:
    beside = f" (none: {none.cost[name]:,.0f})" if none is not None else ""
    return f"{row.cost[name]:,.0f}{beside} {what}"
