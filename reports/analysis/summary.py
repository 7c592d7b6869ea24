"""Summarise per-image values as rows with intervals, from which tables, figures and texts are made."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import pandas as pd

from mocosfl_priv.evaluation.shares import Rate, quantile_interval, share_interval
from mocosfl_priv.evaluation.statistics import Interval, leak_ratio_interval, mean_interval
from mocosfl_priv.results import COSTS, METRICS, RECOGNITION_LEVELS, TEST_VICTIMS, UNDEFENDED, RunRecord, semi_column
from reports.analysis.linkage import LinkageRates, linkage_columns, linkage_rates
from reports.analysis.per_image import (
    GROUP,
    Key,
    bootstrap_options,
    closest_attacks,
    differences,
    groups,
    image_leaks,
    of_system,
    per_seed,
)

WORST_CASE = "worst case"
ENSEMBLE = "attacks.ensemble:EnsembleAttack"  # where its code comes from, whatever its label is
TAIL = 0.95
VISIBLE_SSIM = 0.5  # a reconstruction above it shows what is in the picture
SHARES = ("recognised", "reidentified")
VACUOUS = 0.01  # of a blind guess's error: a bound below it excludes nothing that matters


@dataclass(frozen=True)
class SummaryRow:
    """One system (a defense at one cut layer and target fraction) under one attack, over all seeds.

    `metrics` holds an interval per image metric that was measured; `leak_tail` is the leak ratio of single images that
    only a share 1 - `TAIL` of them exceeds, `visible` the share of images reconstructed with an SSIM above
    `VISIBLE_SSIM`. `cost` has the mean cost columns. The gains are paired differences to the utility floors,
    `linear_against_none` the one to the undefended system at the same cut layer. `semi_supervised` holds the accuracy
    by fraction of the labels, `recognition_levels` chance levels and ceilings of the two recognition metrics, NaN where
    not measured; `linkage` how many of its messages are matched with their own image, whatever the attack, None where
    that was not measured. `blind` marks attacks that need nothing and so ignore the smashed data, `is_ensemble` the
    ensemble, under whatever label. `chosen` has, for the worst case, the share of victims that each attack came closest
    to, largest first, and is empty for all other rows. `guarantee` says what the defense promises of any attacker that
    saw as much, `mse_bound` the mean MSE that follows; empty and NaN if nothing, and for the worst case, which chose by
    looking at the victims.
    """

    defense: str
    cut_layer: int
    target_fraction: float
    attack: str
    seeds: int
    leak_ratio: Interval
    metrics: dict[str, Interval]
    leak_tail: Interval
    visible: Interval
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
    linkage: LinkageRates | None
    blind: bool
    is_ensemble: bool
    chosen: dict[str, float]
    guarantee: str
    mse_bound: float
    cost: dict[str, float]

    @property
    def system(self) -> str:
        """The name of the system, for labels."""
        return system_name(self.defense, self.cut_layer, self.target_fraction)

    @property
    def similarity(self) -> Interval:
        """Mean SSIM; zero-padded SSIM if images are too small for the standard one."""
        return self.metrics.get("ssim", self.metrics["ssim_zeropad"])

    @property
    def is_worst_case(self) -> bool:
        """Whether this row is the worst case over all attacks."""
        return bool(self.chosen)

    @property
    def attack_text(self) -> str:
        """The attack in words; of the worst case also how often which attack came closest."""
        if not self.chosen:
            return self.attack
        shares = ", ".join(f"{name} {100 * share:.0f} %" for name, share in self.chosen.items())
        return f"{self.attack} ({shares})"

    @property
    def is_vacuous(self) -> bool:
        """Whether the guaranteed bound is so low that it excludes almost nothing."""
        return self.mse_bound < VACUOUS * self.mse_floor


def system_name(defense: str, cut_layer: int, target_fraction: float) -> str:
    """Return the name of a system: its defense, cut layer and, if any, share of target data."""
    target = f", {100 * target_fraction:.3g} % target data" if target_fraction > 0 else ""
    return f"{defense} (cut {cut_layer}{target})"


def ensembles(record: RunRecord) -> list[str]:
    """The labels under which the ensemble ran, in the order of the configuration."""
    return labels_of(record, "attacks", ENSEMBLE)


def labels_of(record: RunRecord, kind: Literal["attacks", "defenses"], origin: str) -> list[str]:
    """The labels of those plugins of a run whose class is `origin`, in the order of the configuration."""
    return [str(plugin["label"]) for plugin in record.info["plugins"][kind] if plugin["origin"] == origin]


def key_of(row: SummaryRow) -> Key:
    """Return the key of a row's system: its values of `GROUP`."""
    return tuple(getattr(row, name) for name in GROUP)


def summarise(record: RunRecord) -> list[SummaryRow]:
    """Return a row per system and attack, in the order of the results; the worst case is the last row of a system.

    The worst case takes for every victim the attack with the lowest MSE, without blind attacks, since choosing among
    guesses would look like a leak. The choice uses the victims, so it is an upper bound on what one attacker reaches
    with these attacks. Systems have a worst case if at least two attacks use the smashed data. An attack that failed
    with any seed is left out, and so is a system on which no attack succeeded.
    """
    options = bootstrap_options(record)
    blind = {plugin["label"] for plugin in record.info["plugins"]["attacks"] if plugin["blind"]}
    ensemble = ensembles(record)
    controls = labels_of(record, "defenses", UNDEFENDED)
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
        undefended = of_system(record.probe, (next(iter(controls), ""), key[1], 0.0))
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
            "linkage": linkage_rates(_linked(record, key), options),
            "recognition_levels": {name: float(cells[name].iloc[0]) for name in RECOGNITION_LEVELS},
            "knn_gain": mean_interval(differences(probe, "knn", probe, "knn_raw_pixels"), groups=places, **options),
            "linear_gain": mean_interval(
                differences(probe, "linear", probe, "linear_untrained"), groups=places, **options
            ),
            "linear_against_none": (
                mean_interval(differences(probe, "linear", undefended, "linear"), groups=places, **options)
                if len(undefended) == len(probe) and key[0] not in controls
                else None
            ),
        }
        # an attack that failed with one seed is not averaged over the other seeds
        failed = set(cells["attack"][cells["failure"] != ""])
        attacks = [str(name) for name in system["attack"].unique() if name not in failed]
        if not attacks:
            continue
        candidates: list[tuple[str, pd.DataFrame, dict[str, float]]] = [
            (name, system[system["attack"] == name], {}) for name in attacks
        ]
        informed = [name for name in attacks if name not in blind]
        if len(informed) > 1:
            closest = closest_attacks(system[system["attack"].isin(informed)])
            candidates.append((WORST_CASE, closest, _shares(closest["attack"])))
        for attack, values, chosen in candidates:
            mine = cells if chosen else cells[cells["attack"] == attack]
            cost = {name: float(mine[name].mean()) for name in COSTS}
            total = mine.groupby("seed")[["attack_seconds", "attack_steps", "attack_queries"]].sum().mean()
            cost |= {str(name): float(value) for name, value in total.items()}
            # the weakest guarantee over seeds
            promised = mine.sort_values("guarantee_epsilon").iloc[-1]
            rows.append(
                SummaryRow(
                    **shared,
                    attack=attack,
                    blind=not chosen and attack in blind,
                    is_ensemble=not chosen and attack in ensemble,
                    chosen=chosen,
                    guarantee="" if chosen else str(promised["guarantee"]),
                    mse_bound=np.nan if chosen else float(np.clip(values["mse_bound"].mean(), 0, None)),
                    leak_ratio=leak_ratio_interval(
                        per_seed(values, "mse"), per_seed(values, "mse_floor"), groups=groups(values), **options
                    ),
                    metrics=_metrics(values, options),
                    leak_tail=_leak_tail(values, options),
                    visible=_visible(values, options),
                    mse_floor=float(values["mse_floor"].mean()),
                    cost=cost,
                )
            )
    return rows


def _shares(attacks: pd.Series) -> dict[str, float]:
    """How often each attack occurs, the most frequent first."""
    return {str(name): float(share) for name, share in attacks.value_counts(normalize=True).items()}


def _linked(record: RunRecord, key: Key) -> pd.DataFrame:
    """The lines of linkage of a system's test victims."""
    lines = of_system(record.linkage, key)
    return lines[lines["victims"] == TEST_VICTIMS]


def _metrics(values: pd.DataFrame, options: dict[str, Any]) -> dict[str, Interval]:
    """Intervals of the metrics that were measured on all images."""
    places = groups(values)
    return {
        name: (share_interval if name in SHARES else mean_interval)(per_seed(values, name), groups=places, **options)
        for name in METRICS
        if not bool(values[name].isna().any())
    }


def _leak_tail(values: pd.DataFrame, options: dict[str, Any]) -> Interval:
    leaks = values.assign(leak=image_leaks(values))
    return quantile_interval(per_seed(leaks, "leak"), TAIL, groups=groups(values), **options)


def _visible(values: pd.DataFrame, options: dict[str, Any]) -> Interval:
    similarity = "ssim_zeropad" if bool(values["ssim"].isna().any()) else "ssim"
    hits = [of_seed > VISIBLE_SSIM for of_seed in per_seed(values, similarity)]
    return share_interval(hits, groups=groups(values), **options)


@dataclass(frozen=True)
class DetectionRow:
    """How well a system's detector noticed one hijacker (a server that sends malicious gradients), over all seeds.

    detected: rate of alarms among the trainings that it hijacked.
    falsely: rate of alarms among the honest trainings, the same for every hijacker.
    undecided: number of trainings of both kinds in which no client could judge; the rates count them as no alarm.
    failed: number of trainings in which the hijacker failed and sent honest gradients from then on; the rates leave
        them out.
    """

    system: str
    hijacker: str
    detected: Rate
    falsely: Rate
    undecided: int
    failed: int


def detections(record: RunRecord) -> list[DetectionRow]:
    """Return a row per system with a detector and hijacker; without hijackers, a row per system with a detector."""
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
    """The rate of alarms among trainings whose hijacker did not fail; without a client that could judge, no alarm."""
    sound = trainings[trainings["failure"] == ""]
    return Rate.of_runs(int(sound["alarm"].sum()), len(sound), confidence)


def as_frame(rows: list[SummaryRow]) -> pd.DataFrame:
    """Return the summary as a table; an interval has the columns ``name``, ``name_low`` and ``name_high``."""
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
            f"leak_{100 * TAIL:.0f}th_percentile": row.leak_tail,
            f"share_ssim_above_{VISIBLE_SSIM:g}": row.visible,
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
            "worst_case_of": ";".join(f"{name}:{share:.4f}" for name, share in row.chosen.items()),
            "knn_raw_pixels": row.knn_raw_pixels,
            "linear_untrained": row.linear_untrained,
            **row.recognition_levels,
            **linkage_columns(row.linkage),
            **row.cost,
        }
        flat.append(entry)
    return pd.DataFrame(flat)


def headline_rows(rows: list[SummaryRow]) -> list[SummaryRow]:
    """Return the headline row of each system.

    It is the one with the higher leak ratio of the ensemble, which chooses among attacks without access to the victims,
    and the worst case, which has access; the ensemble where both are equal. With neither, it is the only attack that is
    not blind, or else the first blind attack.
    """

    def rank(row: SummaryRow) -> tuple[int, float, bool]:
        group = 0 if row.is_ensemble or row.is_worst_case else 2 if row.blind else 1
        return group, -row.leak_ratio.value if group == 0 else 0.0, row.is_worst_case

    return [min(mine, key=rank) for mine in by_system(rows).values()]


def by_system(rows: list[SummaryRow]) -> dict[str, list[SummaryRow]]:
    """Return the rows of each system, in order."""
    found: dict[str, list[SummaryRow]] = {}
    for row in rows:
        found.setdefault(row.system, []).append(row)
    return found
