"""From per-image values to rows with intervals: what the table, the figures and the text all show."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import numpy as np
import pandas as pd

from mocosfl_priv.evaluation.shares import Rate
from mocosfl_priv.evaluation.statistics import Finding, Interval, leak_finding, leak_ratio_interval, mean_interval
from mocosfl_priv.results import COSTS, METRICS, RECOGNITION_LEVELS, RunRecord, semi_column
from reports.per_image import GROUP, bootstrap_options, closest_attacks, differences, groups, of_system, per_seed

WORST_CASE = "worst case"
ENSEMBLE = "ensemble"
VACUOUS = 0.01  # of a blind guess's error: a bound below it excludes nothing that matters


@dataclass(frozen=True)
class SummaryRow:
    """One defense at one cut layer and target fraction, under one attack, over all seeds.

    `metrics` holds an interval per image metric that was measured; `cost` the mean cost columns. The gains are paired
    differences to the utility floors, `linear_against_none` the one to the undefended system at the same cut layer.
    `semi_supervised` holds the accuracy by fraction of the labels, `recognition_levels` chance levels and ceilings of
    the two recognition metrics, NaN where not measured. `blind` marks attacks that need nothing and so ignore the
    smashed data. `guarantee` says what the defense promises of any attacker that saw as much, `mse_bound` the mean MSE
    that follows; empty and NaN if nothing, and for the worst case, which chose by looking at the victims.
    """

    defense: str
    cut_layer: int
    target_fraction: float
    attack: str
    seeds: int
    leak_ratio: Interval
    metrics: dict[str, Interval]
    mse_floor: float
    knn: Interval
    linear: Interval
    knn_raw_pixels: float
    linear_untrained: float
    knn_gain: Interval
    linear_gain: Interval
    linear_against_none: Interval | None
    semi_supervised: dict[float, Interval]
    recognition_levels: dict[str, float]
    blind: bool
    guarantee: str
    mse_bound: float
    cost: dict[str, float]

    @property
    def system(self) -> str:
        """The defended system, for labels."""
        return system_name(self.defense, self.cut_layer, self.target_fraction)

    @property
    def is_worst_case(self) -> bool:
        """Whether this row combines all attacks."""
        return self.attack == WORST_CASE

    @property
    def is_vacuous(self) -> bool:
        """Whether the bound allows of an attacker almost everything."""
        return self.mse_bound < VACUOUS * self.mse_floor


def system_name(defense: str, cut_layer: int, target_fraction: float) -> str:
    """A defense with where and on how much target data it stands."""
    target = f", {100 * target_fraction:.3g} % target data" if target_fraction > 0 else ""
    return f"{defense} (cut {cut_layer}{target})"


def summarise(record: RunRecord) -> list[SummaryRow]:
    """All rows in the order of the results; each system ends with its worst case over attacks.

    The worst case takes, for every victim, the attack that came closest by MSE; blind attacks do not take part, since
    picking among guesses would look like a leak. Looking at the victims for the choice makes it an upper bound on
    what one attacker reaches with these attacks: the number a defense must answer for.
    """
    options = bootstrap_options(record)
    blind = {plugin["label"] for plugin in record.info["plugins"]["attacks"] if plugin["blind"]}
    rows = []
    for group, system in record.per_image.groupby(GROUP, sort=False):
        key: tuple[Any, ...] = tuple(group)
        probe = of_system(record.probe, key)
        cells = of_system(record.cells, key)
        places = groups(probe)
        accuracy = {name: mean_interval(per_seed(probe, name), groups=places, **options) for name in ("knn", "linear")}
        few_labels = {
            fraction: mean_interval(per_seed(probe, semi_column(fraction)), groups=places, **options)
            for fraction in record.info["config"]["evaluation"]["label_fractions"]
        }
        undefended = of_system(record.probe, ("none", key[1], 0.0))
        shared: dict[str, Any] = {
            "defense": str(key[0]),
            "cut_layer": int(key[1]),
            "target_fraction": float(key[2]),
            "seeds": int(system["seed"].nunique()),
            "knn": accuracy["knn"],
            "linear": accuracy["linear"],
            "semi_supervised": few_labels,
            "knn_raw_pixels": float(probe["knn_raw_pixels"].mean()),
            "linear_untrained": float(probe["linear_untrained"].mean()),
            "recognition_levels": {name: float(cells[name].iloc[0]) for name in RECOGNITION_LEVELS},
            "knn_gain": mean_interval(differences(probe, "knn", probe, "knn_raw_pixels"), groups=places, **options),
            "linear_gain": mean_interval(
                differences(probe, "linear", probe, "linear_untrained"), groups=places, **options
            ),
            "linear_against_none": (
                mean_interval(differences(probe, "linear", undefended, "linear"), groups=places, **options)
                if len(undefended) == len(probe) and key[0] != "none"
                else None
            ),
        }
        # an attack that failed with one seed is not averaged over the others: `failures` lists it instead
        failed = set(cells["attack"][cells["failure"] != ""])
        attacks = [str(name) for name in system["attack"].unique() if name not in failed]
        if not attacks:
            continue
        candidates = {name: system[system["attack"] == name] for name in attacks}
        informed = [name for name in attacks if name not in blind]
        if len(informed) > 1:
            candidates[WORST_CASE] = closest_attacks(system[system["attack"].isin(informed)])
        for attack, values in candidates.items():
            mine = cells[cells["attack"] == attack] if attack != WORST_CASE else cells
            cost = {name: float(mine[name].mean()) for name in COSTS}
            total = mine.groupby("seed")[["attack_seconds", "attack_steps", "attack_queries"]].sum().mean()
            cost |= {str(name): float(value) for name, value in total.items()}
            # with several seeds the one that promises least
            promised = mine.sort_values("guarantee_epsilon").iloc[-1]
            rows.append(
                SummaryRow(
                    **shared,
                    attack=attack,
                    blind=attack in blind,
                    guarantee=str(promised["guarantee"]) if attack != WORST_CASE else "",
                    mse_bound=float(np.clip(values["mse_bound"].mean(), 0, None)) if attack != WORST_CASE else np.nan,
                    leak_ratio=leak_ratio_interval(
                        per_seed(values, "mse"), per_seed(values, "mse_floor"), groups=groups(values), **options
                    ),
                    metrics={
                        name: mean_interval(per_seed(values, name), groups=groups(values), **options)
                        for name in METRICS
                        if not bool(values[name].isna().any())
                    },
                    mse_floor=float(values["mse_floor"].mean()),
                    cost=cost,
                )
            )
    return rows


@dataclass(frozen=True)
class DetectionRow:
    """How a system's detector did over all seeds, against one hijacker.

    detected: alarms of the trainings it hijacked; falsely: alarms of the honest ones, the same for every hijacker.
    undecided: trainings of both kinds in which no client could judge; failed: those in which the hijacker gave up
    (its gradients are honest from there on). Neither counts as a run.
    """

    system: str
    hijacker: str
    detected: Rate
    falsely: Rate
    undecided: int
    failed: int


def detections(record: RunRecord) -> list[DetectionRow]:
    """A row for every detector and hijacker; one without a hijacker where there was none. Empty without a detector."""
    confidence = record.info["config"]["evaluation"]["confidence"]
    rows = []
    for group, system in record.detections.groupby(GROUP, sort=False):
        key: tuple[Any, ...] = tuple(group)
        honest = system[system["hijacked_by"] == ""]
        for hijacker in [name for name in system["hijacked_by"].unique() if name] or [""]:
            hijacked = system[(system["hijacked_by"] == hijacker) & (hijacker != "")]
            both = pd.concat([honest, hijacked])
            rows.append(
                DetectionRow(
                    system=system_name(*key),
                    hijacker=hijacker,
                    detected=_alarms(hijacked, confidence),
                    falsely=_alarms(honest, confidence),
                    undecided=int((both["clients_judging"] == 0).sum()),
                    failed=int((both["failure"] != "").sum()),
                )
            )
    return rows


def _alarms(trainings: pd.DataFrame, confidence: float) -> Rate:
    """Of those trainings in which what clients judged went on; where none of them could judge, none gave alarm."""
    sound = trainings[trainings["failure"] == ""]
    return Rate.of_runs(int(sound["alarm"].sum()), len(sound), confidence)


def as_frame(rows: list[SummaryRow]) -> pd.DataFrame:
    """The summary as a flat table, intervals as three columns each."""
    flat = []
    for row in rows:
        entry: dict[str, object] = {
            "defense": row.defense,
            "cut_layer": row.cut_layer,
            "target_fraction": row.target_fraction,
            "attack": row.attack,
            "seeds": row.seeds,
        }
        intervals = {
            "leak_ratio": row.leak_ratio,
            **row.metrics,
            "knn_accuracy": row.knn,
            "linear_accuracy": row.linear,
            **{f"{semi_column(fraction)}_accuracy": interval for fraction, interval in row.semi_supervised.items()},
        }
        for name, interval in intervals.items():
            entry |= {name: interval.value, f"{name}_low": interval.low, f"{name}_high": interval.high}
        entry |= {
            "mse_floor": row.mse_floor,
            "guarantee": row.guarantee,
            "mse_bound": row.mse_bound,
            "knn_raw_pixels": row.knn_raw_pixels,
            "linear_untrained": row.linear_untrained,
            **row.recognition_levels,
            **row.cost,
        }
        flat.append(entry)
    return pd.DataFrame(flat)


def headline_rows(rows: list[SummaryRow]) -> list[SummaryRow]:
    """One row per system: the ensemble's, which chose without looking at the victims; where it did not run, the worst
    case, or the only attack that is not blind, or else the first.
    """

    def rank(row: SummaryRow) -> int:
        return 0 if row.attack == ENSEMBLE else 1 if row.is_worst_case else 3 if row.blind else 2

    return [min(mine, key=rank) for mine in _by_system(rows).values()]


def _by_system(rows: list[SummaryRow]) -> dict[str, list[SummaryRow]]:
    found: dict[str, list[SummaryRow]] = {}
    for row in rows:
        found.setdefault(row.system, []).append(row)
    return found


def finding(rows: list[SummaryRow], system: str) -> Finding:
    """Whether any single attack on `system` does better than a blind guess; not judged by the best-of choice."""
    return leak_finding([row.leak_ratio for row in _single(rows) if row.system == system])


def _single(rows: list[SummaryRow]) -> list[SummaryRow]:
    """Of attacks that use the smashed data, the worst case aside."""
    return [row for row in rows if not row.blind and not row.is_worst_case]


def undecided(leak_ratios: Sequence[Interval]) -> str:
    """What is said where attacks are neither shown to see something nor to see nothing."""
    return f"no leak is shown, and none is excluded: R may be up to {max(leak.high for leak in leak_ratios):.2f}"


def sentences(rows: list[SummaryRow]) -> list[str]:
    """The findings in plain words."""
    said = []
    for row in headline_rows(rows):
        if row.blind:
            leak = "no attack that uses the smashed data succeeded, so nothing is known of what leaks"
        elif (found := finding(rows, row.system)) == "blind":
            leak = "no attack does better than a blind guess"
        elif found == "undecided":
            leak = undecided([one.leak_ratio for one in _single(rows) if one.system == row.system])
        else:
            similarity = row.metrics.get("ssim", row.metrics["ssim_zeropad"])
            leak = (
                f"the attacks remove {_percent(row.leak_ratio)} of a blind guess's error, and reach a mean SSIM of "
                f"{similarity.value:.2f}"
            )
        parts = [
            leak,
            _against(row.linear, "Linear probe", row.linear_gain, "the untrained network", row.linear_untrained),
            _against(row.knn, "kNN", row.knn_gain, "raw pixels", row.knn_raw_pixels),
        ]
        if row.linear_against_none is not None:
            parts.append(f"Against no defense the linear probe changes by {points(row.linear_against_none)}")
        said.append(f"{row.system}: {'. '.join(parts)}.")
    return said


def promises(record: RunRecord, rows: list[SummaryRow]) -> list[str]:
    """What is guaranteed, beside the best that a single attack did; a sentence for each system with a guarantee."""
    said = []
    for system, mine in _by_system(rows).items():
        single = [row for row in mine if row.guarantee and not row.blind]
        if not single:
            continue
        best = min(single, key=lambda row: row.metrics["mse"].value)
        training = [entry["guarantee"] for entry in _trained(record, system) if entry["guarantee"]]
        vacuous = f", vacuous: it allows R = {1 - VACUOUS:g}" if best.is_vacuous else ""
        said.append(
            f"{system}: any attacker: MSE >= {best.mse_bound:.2g} ({best.guarantee}{vacuous}); measured "
            f"{best.metrics['mse'].value:.4f} ({best.attack}). Whole training: "
            + " and ".join(dict.fromkeys(entry["claim"] for entry in training))
            + "."
        )
    return said


def _trained(record: RunRecord, system: str) -> list[dict[str, Any]]:
    """What run.json says of the trainings of `system`, by seed."""
    return [
        entry
        for entry in record.info["systems"]
        if system_name(entry["defense"], entry["cut_layer"], entry["target_fraction"]) == system
    ]


def caveats(record: RunRecord, rows: list[SummaryRow]) -> list[str]:
    """What a reader must know before trusting the numbers."""
    found = flagged(record)
    for system, mine in _by_system(rows).items():
        single = [row for row in mine if not row.blind and not row.is_worst_case]
        if not any(row.attack == ENSEMBLE for row in single):
            continue
        best = max(single, key=lambda row: row.leak_ratio.value)
        if best.attack != ENSEMBLE:
            found.append(f"{system}: {best.attack} found more than the ensemble, which is the headline all the same.")
    for system in _by_system(rows):
        if any(entry["guarantee"] and not entry["frozen_client"] for entry in _trained(record, system)):
            found.append(
                f"{system}: the guarantee of the whole training is about an image's own messages. Clients that learn "
                "hold it in their weights as well, which are averaged in the clear and make later messages."
            )
    if all(row.attack != ENSEMBLE for row in headline_rows(rows)):
        found.append(
            "The ensemble did not run: headlines are the worst of the attacks that did, with the settings they had."
        )
    informed = {row.attack for row in rows if not row.blind and not row.is_worst_case}
    if len(informed) < 2 and ENSEMBLE not in informed:
        found.append("Fewer than two attacks that use the smashed data: the worst case may be far from the worst.")
    if record.info["config"]["evaluation"]["probe_selection"] == "test":
        found.append(
            "Probes were selected on the test images (probe_selection: test), as some published protocols do: "
            "linear-probe and semi-supervised accuracies are optimistic."
        )
    if record.info["config"]["training"]["select_on"] == "test":
        found.append(
            "The kept checkpoint was selected on the test images (select_on: test), as MocoSFL's research code does: "
            "all accuracies are optimistic."
        )
    if record.info["lpips"].startswith("LPIPS not measured"):
        found.append(record.info["lpips"] + ".")
    if "not measured" in record.info["recognition"]["note"]:
        found.append(record.info["recognition"]["note"] + ".")
    return found


FLAGS_SHOWN = 4


def flagged(record: RunRecord) -> list[str]:
    """The sentences of the run's flags, of each kind the first few."""
    found = []
    for name, flags in groupby(record.info["flags"], key=lambda flag: flag["name"]):
        sentences_of = [f"{flag['sentence']} [{name}]" for flag in flags]
        found += sentences_of[:FLAGS_SHOWN]
        if len(sentences_of) > FLAGS_SHOWN:
            found.append(f"{len(sentences_of) - FLAGS_SHOWN} more of the kind {name} are in run.json.")
    return found


def _against(accuracy: Interval, what: str, gain: Interval, whom: str, floor: float) -> str:
    """How an accuracy stands to its floor, judged by the paired difference."""
    relation = "above" if gain.low > 0 else "below" if gain.high < 0 else "not shown to differ from"
    return f"{what} {100 * accuracy.value:.1f} %, {relation} {whom} ({100 * floor:.1f} %)"


def points(difference: Interval) -> str:
    """A difference of accuracies in percentage points."""
    low, high = 100 * difference.low, 100 * difference.high
    return f"{100 * difference.value:+.1f} points [{low:+.1f}, {high:+.1f}]"


def _percent(interval: Interval) -> str:
    return f"{100 * interval.value:.0f} % [{100 * interval.low:.0f}, {100 * interval.high:.0f}]"
