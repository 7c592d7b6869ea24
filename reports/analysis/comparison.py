"""Two systems of a run side by side, paired by image and seed: what a verdict and a leaderboard rest on."""

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
from reports.analysis.summary import ensembles, system_name

BOTTLENECK = "defenses.bottleneck:BottleneckDefense"
TARESSFL = "defenses.taressfl:TAResSFL"
CLOSE = 0.03  # of linear-probe accuracy: what is further apart is not matched, however uncertain


@dataclass(frozen=True)
class Comparison:
    """One system beside an `other`: its leak ratio R and its linear-probe accuracy, each minus the other's.

    attacks: those under which `leak` was found, the same for both; where there is none, `leak` is None. p_value: of the
    hypothesis that both leak alike, by itself; NaN where `leak` is None.
    """

    other: str
    attacks: list[str]
    leak: Interval | None
    p_value: float
    linear: Interval

    @property
    def matched(self) -> bool:
        """Whether the two are about as accurate."""
        return is_matched(self.linear)

    @property
    def unmatched(self) -> str:
        """How accuracies stand, where they are not matched."""
        if self.linear.low > 0:
            return "The nearest is less accurate"
        return (
            "The nearest is more accurate" if self.linear.high < 0 else "The accuracy of the nearest is too uncertain"
        )

    @property
    def without_match(self) -> str:
        """What a comparison says all the same."""
        if self.linear.low > 0 and self.finding == "leaks less than":
            return "this is better in both"
        if self.linear.high < 0 and self.finding == "leaks more than":
            return "this is worse in both"
        return "this is no comparison at equal accuracy"

    @property
    def finding(self) -> str:
        """In words. A difference counts where its interval excludes zero and it is no smaller than SMALLEST_EFFECT."""
        if self.leak is None:
            return "not compared"
        if abs(self.leak.value) < SMALLEST_EFFECT or self.leak.low <= 0 <= self.leak.high:
            return "no difference shown"
        return "leaks less than" if self.leak.value < 0 else "leaks more than"


def compare(record: RunRecord, ours: Key, theirs: Key, other: RunRecord | None = None) -> Comparison:
    """`ours` beside `theirs`, over the seeds that both have.

    other: the run of `theirs`, where that is another one, of the same images.

    Under the ensemble where it succeeded on both, else under the worst case over all attacks that did: a worst case
    over other attacks would be another measure.
    """
    both = ((record, ours), (other or record, theirs))
    succeeded = [sound_attacks(run, key) for run, key in both]
    attacks = [name for name in succeeded[0] if name in succeeded[1]]
    ensemble = [name for name in attacks if all(name in ensembles(run) for run, _ in both)]
    attacks = ensemble[:1] or attacks
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
    """Linear-probe accuracy of one system minus that of another. other: as for :func:`compare`."""
    mine, others = paired(of_system(record.probe, ours), of_system((other or record).probe, theirs))
    return mean_interval(
        differences(mine, "linear", others, "linear"), groups=groups(mine), **bootstrap_options(record)
    )


def is_matched(difference: Interval) -> bool:
    """Whether a difference of accuracies is small, and not shown to be one."""
    return difference.low <= 0 <= difference.high and abs(difference.value) <= CLOSE


def sound_attacks(record: RunRecord, key: Key) -> list[str]:
    """The attacks on a system that use the smashed data and failed with no seed, in the order of the results."""
    blind = {plugin["label"] for plugin in record.info["plugins"]["attacks"] if plugin["blind"]}
    cells = of_system(record.cells, key)
    failed = set(cells["attack"][cells["failure"] != ""])
    return [str(name) for name in cells["attack"].unique() if name not in blind | failed]


def systems_of(record: RunRecord, *, origin: str | None = None, label: str | None = None) -> list[Key]:
    """The systems of a run in the order of the results: all, or those of one class, or under one label.

    One whose training failed with every seed is none.
    """
    origins = {plugin["label"]: plugin["origin"] for plugin in record.info["plugins"]["defenses"]}
    keys: list[Key] = list(record.cells[GROUP].drop_duplicates().itertuples(index=False, name=None))
    trained = set(record.probe[GROUP].drop_duplicates().itertuples(index=False, name=None))
    asked = [key for key in keys if origin in (None, origins[key[0]]) and label in (None, key[0])]
    return [key for key in asked if key in trained]


def concerns(flag: dict[str, Any], key: Key) -> bool:
    """Whether a flag of run.json is about a system, or about the whole run."""
    return all(flag.get(name) in (None, value) for name, value in zip(GROUP, key, strict=True))


def _closest(values: pd.DataFrame, attacks: list[str]) -> pd.DataFrame:
    return closest_attacks(values[values["attack"].isin(attacks)])
