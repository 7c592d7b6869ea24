"""Compare two systems, paired by image and seed: the basis of verdicts and leaderboards."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import pandas as pd

from mocosfl_priv.evaluation.statistics import SMALLEST_EFFECT, Interval, leak_difference_spread, mean_interval
from mocosfl_priv.results import RunRecord
from reports.analysis.per_image import (
    GROUP,
    Key,
    bootstrap_options,
    closest_attacks,
    differences,
    groups,
    of_system,
    paired,
    per_seed,
)
from reports.analysis.summary import system_name

BOTTLENECK = "defenses.bottleneck:BottleneckDefense"
TARESSFL = "defenses.taressfl:TAResSFL"
CLOSE = 0.03  # largest difference of linear-probe accuracies that counts as matched, however uncertain it is


@dataclass(frozen=True)
class Comparison:
    """One system compared with an `other`.

    other: name of the other system.
    attacks: those under which `leak` was measured, the same for both systems; empty if none succeeded on both.
    leak: difference of leak ratios R, system minus other; None without attacks.
    p_value: of the hypothesis that both leak equally, not adjusted for other comparisons; NaN without attacks.
    linear: difference of linear-probe accuracies, system minus other.
    """

    other: str
    attacks: list[str]
    leak: Interval | None
    p_value: float
    linear: Interval

    @property
    def matched(self) -> bool:
        """Whether the accuracies match (see :func:`is_matched`)."""
        return is_matched(self.linear)

    @property
    def unmatched(self) -> str:
        """How the accuracies compare, for systems that are not matched."""
        if self.linear.low > 0:
            return "The nearest is less accurate"
        return (
            "The nearest is more accurate" if self.linear.high < 0 else "The accuracy of the nearest is too uncertain"
        )

    @property
    def without_match(self) -> str:
        """What the comparison shows although the accuracies are not matched."""
        if self.linear.low > 0 and self.finding == "leaks less than":
            return "this is better in both"
        if self.linear.high < 0 and self.finding == "leaks more than":
            return "this is worse in both"
        return "this is no comparison at equal accuracy"

    @property
    def finding(self) -> str:
        """The difference of R in words; it counts if its interval excludes 0 and it is at least `SMALLEST_EFFECT`."""
        if self.leak is None:
            return "not compared"
        if abs(self.leak.value) < SMALLEST_EFFECT or self.leak.low <= 0 <= self.leak.high:
            return "no difference shown"
        return "leaks less than" if self.leak.value < 0 else "leaks more than"


def compare(record: RunRecord, ours: Key, theirs: Key, other: RunRecord | None = None) -> Comparison:
    """Compare the system `ours` with the system `theirs`, over the seeds that both have.

    R is measured under the worst case over the attacks that succeeded on both, the ensemble included, since worst cases
    over different attacks are not comparable.

    Args:
        record: The run.
        ours: Key of the first system.
        theirs: Key of the system to compare it with.
        other: The run of `theirs`, if it is another one; its images must be the same.

    """
    both = ((record, ours), (other or record, theirs))
    succeeded = [sound_attacks(run, key) for run, key in both]
    attacks = [name for name in succeeded[0] if name in succeeded[1]]
    leak, p_value = None, math.nan
    if attacks:
        mine, others = paired(*(_closest(of_system(run.per_image, key), attacks) for run, key in both))
        options = bootstrap_options(record)
        found = leak_difference_spread(
            per_seed(mine, "mse"), per_seed(others, "mse"), per_seed(mine, "mse_floor"), groups=groups(mine), **options
        )
        leak, p_value = found.interval(options["confidence"]), found.p_value
    return Comparison(system_name(*theirs), attacks, leak, p_value, accuracy_difference(record, ours, theirs, other))


def accuracy_difference(record: RunRecord, ours: Key, theirs: Key, other: RunRecord | None = None) -> Interval:
    """Return the linear-probe accuracy of `ours` minus that of `theirs`, paired; `other` as for :func:`compare`."""
    mine, others = paired(of_system(record.probe, ours), of_system((other or record).probe, theirs))
    return mean_interval(
        differences(mine, "linear", others, "linear"), groups=groups(mine), **bootstrap_options(record)
    )


def is_matched(difference: Interval) -> bool:
    """Whether accuracies match: their difference is at most `CLOSE`, and its interval contains zero."""
    return difference.low <= 0 <= difference.high and abs(difference.value) <= CLOSE


def sound_attacks(record: RunRecord, key: Key) -> list[str]:
    """Return the attacks on a system that use the smashed data and succeeded with all seeds, in order."""
    blind = {plugin["label"] for plugin in record.info["plugins"]["attacks"] if plugin["blind"]}
    cells = of_system(record.cells, key)
    failed = set(cells["attack"][cells["failure"] != ""])
    return [str(name) for name in cells["attack"].unique() if name not in blind | failed]


def systems_of(record: RunRecord, *, origin: str | None = None, label: str | None = None) -> list[Key]:
    """Return the systems of a run in the order of the results, without those whose training failed with every seed.

    Args:
        record: The run.
        origin: Only systems whose defense is this class, as ``module:Class``.
        label: Only systems whose defense has this label.

    """
    origins = {plugin["label"]: plugin["origin"] for plugin in record.info["plugins"]["defenses"]}
    keys: list[Key] = list(record.cells[GROUP].drop_duplicates().itertuples(index=False, name=None))
    trained = set(record.probe[GROUP].drop_duplicates().itertuples(index=False, name=None))
    asked = [key for key in keys if origin in (None, origins[key[0]]) and label in (None, key[0])]
    return [key for key in asked if key in trained]


def concerns(flag: dict[str, Any], key: Key) -> bool:
    """Whether a flag of run.json concerns the system `key`, as a flag on that system or on the whole run."""
    return all(flag.get(name) in (None, value) for name, value in zip(GROUP, key, strict=True))


def _closest(values: pd.DataFrame, attacks: list[str]) -> pd.DataFrame:
    return closest_attacks(values[values["attack"].isin(attacks)])
