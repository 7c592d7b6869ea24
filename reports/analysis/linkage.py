"""Linkage in reports: whose photo a message is of, beside what its reconstruction looks like."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import pandas as pd

from mocosfl_priv.evaluation.shares import share_interval
from mocosfl_priv.evaluation.statistics import Interval
from mocosfl_priv.results import LINKAGE_RATES, RunRecord
from reports.analysis.per_image import groups, per_seed

LOOK, WHOSE = "What does it look like?", "Whose photo is it?"
LOOK_HEADINGS = ["R", "SSIM", "MSE"]
COPIES = ["same image", "JPEG copy", "augmented view"]
WHOSE_HEADINGS = [
    *COPIES,
    "TPR: same",
    "TPR: JPEG",
    "TPR: view",
    "chance",
    "of",
]
NOT_MEASURED = "not measured"
BEFORE = "Linkage not measured: this run was made by a version that did not measure it"


@dataclass(frozen=True)
class LinkageRates:
    """Shares of a system's messages that were matched with their own image, over all seeds.

    rates: by the names in `LINKAGE_RATES`; those that were measured. candidates: images to choose from.
    """

    rates: dict[str, Interval]
    candidates: int

    @property
    def same(self) -> Interval:
        """Rank-1 matches where the attacker has the very image."""
        return self.rates["linkage_same"]

    @property
    def chance(self) -> float:
        """The share of rank-1 matches that guessing reaches."""
        return 1 / self.candidates

    @property
    def sentence(self) -> str:
        """What it says in words, without a full stop."""
        copies = zip(("the same image", "its JPEG copy", "an augmented view of it"), LINKAGE_RATES, strict=False)
        matched = ", ".join(f"{_percent(self.rates[name])} to {copy}" for copy, name in copies)
        return (
            f"Whose photo is it: among {self.candidates} candidates, messages are matched {matched} (chance "
            f"{100 * self.chance:.2g} %)"
        )


def linkage_rates(lines: pd.DataFrame, options: dict[str, Any]) -> LinkageRates | None:
    """The rates of one system and set of victims; None where linkage was not measured.

    lines: of the table `linkage` of a record. options: of :func:`share_interval`.
    """
    if lines.empty:
        return None
    places = groups(lines)
    rates = {
        name: share_interval([hits > 0 for hits in per_seed(lines, name)], groups=places, **options)
        for name in LINKAGE_RATES
        if not bool(lines[name].isna().any())
    }
    return LinkageRates(rates, int(lines["candidates"].min()))


def linkage_columns(linkage: LinkageRates | None) -> dict[str, float]:
    """The columns of a summary: every rate with its interval, chance and candidates; NaN where not measured."""
    found: dict[str, float] = {}
    for name in LINKAGE_RATES:
        interval = linkage.rates.get(name) if linkage is not None else None
        ends = (interval.value, interval.low, interval.high) if interval is not None else (float("nan"),) * 3
        found |= dict(zip((name, f"{name}_low", f"{name}_high"), ends, strict=True))
    found["linkage_chance"] = linkage.chance if linkage is not None else float("nan")
    found["linkage_candidates"] = linkage.candidates if linkage is not None else float("nan")
    return found


def beside_looks(
    leak_ratio: Interval, similarity: Interval, mse: Interval, linkage: LinkageRates | None
) -> list[str]:  # fmt: skip
    """The cells under `LOOK_HEADINGS` and `WHOSE_HEADINGS`."""
    look = [f"{leak_ratio.value:.3f}", f"{similarity.value:.3f}", f"{mse.value:.4f}"]
    if linkage is None:
        return [*look, *[NOT_MEASURED] * len(WHOSE_HEADINGS)]
    rates = (linkage.rates.get(name) for name in LINKAGE_RATES)
    cells = [_percent(interval) if interval is not None else NOT_MEASURED for interval in rates]
    return [*look, *cells, f"{100 * linkage.chance:.2g} %", f"{linkage.candidates}"]


def linkage_notes(record: RunRecord) -> Iterable[str]:
    """Why linkage was not measured, a sentence each; nothing where it was."""
    notes = record.info.get("linkage", {"notes": [BEFORE]})["notes"]
    return [f"{note}." for note in notes if NOT_MEASURED in note]


def _percent(interval: Interval) -> str:
    return f"{_hundredths(interval.value)} % [{_hundredths(interval.low)}, {_hundredths(interval.high)}]"


def _hundredths(share: float) -> str:
    """With a decimal where a whole number would say too little: below 10 % and between 99 and 100 %."""
    percent = 100 * share
    return f"{percent:.0f}" if 10 <= percent <= 99 or percent in (0, 100) else f"{percent:.1f}"
