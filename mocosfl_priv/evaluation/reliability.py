"""Flags for numbers that cannot be trusted, similar to those of AutoAttack (Croce and Hein, ICML 2020).

A defense looks good when an attack is bad. Each flag is a sign of a bad attack or of a missing control, and is computed
from the results alone: what was run, and the errors per image. Two attacks differ if the interval of their difference,
paired by seed and image (see :mod:`mocosfl_priv.evaluation.statistics`), excludes zero, and their leak ratios differ by
`SMALLEST_EFFECT` or more. If an error is below the bound that a defense guarantees for any attacker, the run ends with
an error.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import permutations
from typing import Any

import numpy as np
import pandas as pd

from mocosfl_priv.config.decoder_grammar import check_grammar
from mocosfl_priv.errors import ConfigurationError
from mocosfl_priv.evaluation.distribution_shift import ImageStatistics, distribution_shifts
from mocosfl_priv.evaluation.statistics import (
    SMALLEST_EFFECT,
    SMALLEST_LEAK,
    Interval,
    leak_difference_interval,
    leak_ratio_interval,
    mean_interval,
)
from mocosfl_priv.results import CELL_KEYS, SYSTEM_KEYS

BOUND_VIOLATED = "bound-violated"
NO_LABELS = "no-labels"
FLAGS = (
    "attack-failed",
    BOUND_VIOLATED,
    "no-undefended-control",
    "attack-at-floor-on-undefended",
    "black-box-beats-white-box",
    "masked-gradients",
    "more-data-worse",
    "larger-decoder-worse",
    "victims-off-distribution",
    "randomised-evaluated-once",
    "not-adaptive",
    "out-of-time",
    "few-seeds",
    "clients-told-apart",
    "loss-fell-without-learning",
    NO_LABELS,
)
PLACE = [key for key in CELL_KEYS if key not in ("attack", "seed")]  # attacks are compared where these keys are equal
ENOUGH_SEEDS = 3
LARGEST_SIGNATURE = 0.5  # nats; beyond it the short cut lowered the loss, and kNN stalled later (docs/LEARNING.md)
FEWEST_VALIDATIONS = 6  # with fewer, a training is too short to judge whether it has stopped learning
FALLING_LOSS = 0.05  # the loss has fallen if it falls by this fraction from the first to the last third of a training
RISING_KNN = 0.01  # kNN accuracy has risen if it rises by this much from the first to the last third
WHITE_BOX = "client_weights"
UNKNOWN = -1.0  # a target fraction that nobody stated
MASKED = 0.5  # a search that finds less than this share of what learning finds is misled
DECODER = "architecture"  # name of the attack parameter that describes a decoder
DATA_PARAMETERS = ("auxiliary_images", "auxiliary_fraction", "target_fraction")  # how much of its data an attack uses


@dataclass(frozen=True)
class Flag:
    """A sign that a number cannot be trusted.

    name: one of `FLAGS`. sentence: what was found, with the numbers. The other fields are keys of the result's rows
    that the flag is about; None stands for every value.
    """

    name: str
    sentence: str
    defense: str | None = None
    cut_layer: int | None = None
    target_fraction: float | None = None
    victims: str | None = None
    attack: str | None = None

    def concerns(self, row: Mapping[str, Any] | pd.Series) -> bool:
        """Whether this flag is about `row` of the results."""
        about = {key: value for key, value in asdict(self).items() if key in CELL_KEYS and value is not None}
        return all(row[key] == value for key, value in about.items())


@dataclass(frozen=True)
class AttackFacts:
    """What is known about an attack before it runs.

    kind: name of its class. parameters: all parameters, defaults included. capabilities: those it was granted.
    blind: whether it ignores the smashed data. searches_by_gradient: whether it searches for images by gradients
    through the client; the ensemble, which also learns, does not count.
    auxiliary_target, auxiliary_source: number of its auxiliary images from the target and from the source data.
    """

    label: str
    kind: str
    parameters: Mapping[str, Any]
    capabilities: frozenset[str]
    blind: bool
    auxiliary_target: int = 0
    auxiliary_source: int = 0
    searches_by_gradient: bool = False


@dataclass(frozen=True)
class RunFacts:
    """What is known about a run besides its rows.

    undefended, randomised: labels of the defenses that do nothing, and of those that use randomness.
    messages_per_victim: how many messages of each victim an attacker sees.
    adaptive: whether the attacker knows the defense.
    victims, target: statistics of each set of victims, by name, and of the data that the victims should represent.
    samples, confidence: of the bootstrap.
    """

    attacks: Sequence[AttackFacts]
    undefended: frozenset[str]
    randomised: frozenset[str]
    messages_per_victim: int
    adaptive: bool
    victims: Mapping[str, ImageStatistics]
    target: ImageStatistics
    samples: int = 2000
    confidence: float = 0.95


def reliability_flags(
    cells: pd.DataFrame, per_image: pd.DataFrame, facts: RunFacts, training: pd.DataFrame | None = None
) -> list[Flag]:
    """Return all flags of a run, in the order of `FLAGS`.

    cells: one row per cell (attack, system and seed), with the columns `CELL_KEYS`, mse, attack_out_of_time, and
        `guarantee`, the text of a defense's guarantee. If the attack failed, mse is NaN and `failure` is the cause.
    per_image: one row per cell and image, with `CELL_KEYS`, image, group, mse, mse_floor and mse_bound (the guaranteed
        lower bound of the error, NaN if there is none). Rows of failed attacks are not used.
    training: one row per validation, with `SYSTEM_KEYS`, step, loss, validation_knn and client_signature (NaN where not
        measured). None for an audit, which trains nothing.
    """
    # an audited client's name may not say its target fraction; missing values would be dropped from all groups
    cells, per_image = (
        frame.assign(target_fraction=frame["target_fraction"].astype(float).fillna(UNKNOWN))
        for frame in (cells, per_image)
    )
    failed = {tuple(row) for row in cells.loc[cells["mse"].isna(), [*PLACE, "attack"]].itertuples(index=False)}
    places: dict[tuple[Any, ...], _Place] = {}
    for key, values in per_image.groupby(PLACE, sort=False):
        place: tuple[Any, ...] = tuple(key)
        sound = {
            str(attack): rows.sort_values(["seed", "image"])
            for attack, rows in values.groupby("attack", sort=False)
            if (*place, attack) not in failed
        }
        places[place] = _Place(dict(zip(PLACE, place, strict=True)), sound, facts)
    found = [
        *_failed(cells),
        *(flag for place in places.values() for flag in _bound_violated(place, cells)),
        *_without_control(list(places.values())),
        *_at_floor(list(places.values())),
        *(flag for place in places.values() for flag in _black_box_beats_white_box(place)),
        *(flag for place in places.values() for flag in _masked_gradients(place)),
        *(flag for place in places.values() for flag in _more_data_worse(place)),
        *(flag for place in places.values() for flag in _larger_decoder_worse(place)),
        *_victims_off_distribution(facts),
        *_about_defenses(cells, facts),
        *_out_of_time(cells),
        *_few_seeds(cells, "attack" if training is None else "training"),
        *_about_trainings(training),
    ]
    told = [replace(flag, target_fraction=None) if flag.target_fraction == UNKNOWN else flag for flag in found]
    return sorted(told, key=lambda flag: FLAGS.index(flag.name))


@dataclass(frozen=True)
class _Place:
    """All attacks on one system and one set of victims, over all seeds.

    key: the values of `PLACE`. attacks: per-image rows of each attack that did not fail, ordered by seed and image.
    """

    key: Mapping[str, Any]
    attacks: Mapping[str, pd.DataFrame]
    facts: RunFacts

    @property
    def title(self) -> str:
        return _title(self.key)

    @property
    def undefended(self) -> bool:
        return self.key["defense"] in self.facts.undefended

    @property
    def informed(self) -> list[AttackFacts]:
        """The attacks that use the smashed data and did not fail here."""
        return [attack for attack in self.facts.attacks if attack.label in self.attacks and not attack.blind]

    def error(self, attack: AttackFacts) -> float:
        return float(self.attacks[attack.label]["mse"].mean())

    def leak(self, attack: AttackFacts) -> Interval:
        rows = self.attacks[attack.label]
        return leak_ratio_interval(
            _per_seed(rows, "mse"), _per_seed(rows, "mse_floor"), groups=_groups(rows),
            samples=self.facts.samples, confidence=self.facts.confidence,
        )  # fmt: skip

    def loss(self, worse: AttackFacts, better: AttackFacts) -> Interval | None:
        """By how much R of `better` exceeds R of `worse`, paired by seed and image; None if it is not significant."""
        ours, theirs = self.attacks[worse.label], self.attacks[better.label]
        seeds = set(ours["seed"]) & set(theirs["seed"])
        if not seeds:
            return None
        ours, theirs = ours[ours["seed"].isin(seeds)], theirs[theirs["seed"].isin(seeds)]
        interval = leak_difference_interval(
            _per_seed(theirs, "mse"), _per_seed(ours, "mse"), _per_seed(ours, "mse_floor"), groups=_groups(ours),
            samples=self.facts.samples, confidence=self.facts.confidence,
        )  # fmt: skip
        return interval if interval.low > 0 and interval.value >= SMALLEST_EFFECT else None

    def flag(self, name: str, sentence: str, attack: AttackFacts | None = None) -> Flag:
        return Flag(name, f"{self.title}: {sentence}", **self.key, attack=attack.label if attack else None)


def _failed(cells: pd.DataFrame) -> Iterator[Flag]:
    for key, rows in _by_attack(cells[cells["mse"].isna()]):
        row = rows.iloc[0]
        cause = f": {row['failure']}" if row.get("failure") else ""
        sentence = (
            f"{_title(key)}: attack {key['attack']} failed with {_seeds(rows)} and takes no part in any average{cause}."
        )
        yield Flag("attack-failed", sentence, **key)


def _bound_violated(place: _Place, cells: pd.DataFrame) -> Iterator[Flag]:
    """Flag attacks whose error is below the bound that a defense guarantees: the guarantee is then wrong."""
    for label, rows in place.attacks.items():
        if rows["mse_bound"].isna().any():
            continue
        above = mean_interval(
            _per_seed(rows.assign(above=rows["mse"] - rows["mse_bound"]), "above"), groups=_groups(rows),
            samples=place.facts.samples, confidence=place.facts.confidence,
        )  # fmt: skip
        if above.high < 0:
            mine = (cells[[*PLACE, "attack"]] == pd.Series({**place.key, "attack": label})).all(axis=1)
            claim = cells.loc[mine, "guarantee"].iloc[0]
            sentence = (
                f"the guarantee does not hold: attack {label} has MSE {rows['mse'].mean():.4f}, below the "
                f"{rows['mse_bound'].mean():.4f} that is claimed for any attacker ({claim}; "
                f"difference {_shown(above)})."
            )
            yield Flag(BOUND_VIOLATED, f"{place.title}: {sentence}", **place.key, attack=label)


def _without_control(places: Sequence[_Place]) -> Iterator[Flag]:
    """Flag attacks on a defended system that were not run on an undefended one, which would show their strength."""
    for place in places:
        controls = [other for other in places if other.undefended and _same_cut(other, place)]
        missing = [a for a in place.informed if not any(a.label in control.attacks for control in controls)]
        if place.undefended or not missing:
            continue
        if len(missing) == len(place.informed):
            sentence = "no attack was run on an undefended system with this cut, so it is not shown that any is strong."
            yield place.flag("no-undefended-control", sentence)
        else:
            for attack in missing:
                sentence = (
                    f"attack {attack.label} was not run on an undefended system with this cut, so it is not shown that "
                    "it is strong."
                )
                yield place.flag("no-undefended-control", sentence, attack)


def _at_floor(places: Sequence[_Place]) -> Iterator[Flag]:
    """Flag undefended systems from which no attack reconstructs more than a blind guess."""
    for place in places:
        if not place.undefended or not place.informed:
            continue
        leaks = {attack.label: place.leak(attack) for attack in place.informed}
        if any(leak.low > SMALLEST_LEAK for leak in leaks.values()):
            continue
        best = max(leaks, key=lambda label: leaks[label].value)
        sentence = (
            f"{place.title}: even without a defense, no attack is better than the floor (best: {best}, "
            f"R {_shown(leaks[best])}), so these attacks prove nothing about a defense at this cut."
        )
        about = {key: value for key, value in place.key.items() if key not in ("defense", "target_fraction")}
        yield Flag("attack-at-floor-on-undefended", sentence, **about)


def _black_box_beats_white_box(place: _Place) -> Iterator[Flag]:
    """Flag white-box attacks that are worse than a black-box attack.

    An attacker with the weights could run the black-box attack too, so the white-box attack is not as good as it could
    be.
    """
    white = [attack for attack in place.informed if WHITE_BOX in attack.capabilities]
    black = [attack for attack in place.informed if WHITE_BOX not in attack.capabilities]
    if not white or not black:
        return
    best_white, best_black = min(white, key=place.error), min(black, key=place.error)
    loss = place.loss(best_white, best_black)
    if loss is not None:
        sentence = (
            f"{best_black.label}, without the client's weights, has MSE {place.error(best_black):.4f}; the best attack "
            f"with them, {best_white.label}, is worse: {place.error(best_white):.4f} (R lower by {_shown(loss)})."
        )
        yield place.flag("black-box-beats-white-box", sentence, best_white)


def _masked_gradients(place: _Place) -> Iterator[Flag]:
    """Flag searches through the client that find less than half of what is learned from pairs of images and messages.

    Such a search has the weights, so it could be as good. Its gradients mislead it (Athalye et al., "Obfuscated
    Gradients Give a False Sense of Security", ICML 2018), and alone it would make the defense look better than it is.
    """
    searching = [attack for attack in place.informed if attack.searches_by_gradient]
    learning = [attack for attack in place.informed if not attack.searches_by_gradient]
    if not searching or not learning:
        return
    search, learned = min(searching, key=place.error), min(learning, key=place.error)
    found, possible = place.leak(search).value, place.leak(learned).value
    if place.loss(search, learned) is not None and found < MASKED * possible:
        sentence = (
            f"{search.label}, the best search by gradients through the client, finds R {found:.2f}, and "
            f"{learned.label} finds R {possible:.2f}: the client masks its gradients, and {search.label} alone says "
            "little."
        )
        yield place.flag("masked-gradients", sentence, search)


def _more_data_worse(place: _Place) -> Iterator[Flag]:
    for more, less in permutations(place.informed, 2):
        if not _alike(more, less, DATA_PARAMETERS):
            continue
        ours, theirs = _data(more), _data(less)
        if ours == theirs or any(mine < other for mine, other in zip(ours, theirs, strict=True)):
            continue
        loss = place.loss(more, less)
        if loss is not None:
            sentence = (
                f"{more.label}, with more data, has MSE {place.error(more):.4f}, which is worse than "
                f"{less.label} with less data: {place.error(less):.4f} (R lower by {_shown(loss)})."
            )
            yield place.flag("more-data-worse", sentence, more)


def _larger_decoder_worse(place: _Place) -> Iterator[Flag]:
    for larger, smaller in permutations(place.informed, 2):
        if not _alike(larger, smaller, (DECODER,)) or _data(larger) != _data(smaller):
            continue
        if not _is_larger(larger.parameters.get(DECODER), smaller.parameters.get(DECODER)):
            continue
        loss = place.loss(larger, smaller)
        if loss is not None:
            sentence = (
                f"{larger.label}, with the decoder {larger.parameters[DECODER]}, has MSE {place.error(larger):.4f}, "
                f"which is worse than {smaller.label} with the smaller decoder {smaller.parameters[DECODER]}: "
                f"{place.error(smaller):.4f} (R lower by {_shown(loss)})."
            )
            yield place.flag("larger-decoder-worse", sentence, larger)


def _alike(first: AttackFacts, second: AttackFacts, but_for: Sequence[str]) -> bool:
    """Whether two attacks have the same class and capabilities, and the same parameters except those in `but_for`."""
    others = [{name: value for name, value in a.parameters.items() if name not in but_for} for a in (first, second)]
    return first.kind == second.kind and first.capabilities == second.capabilities and others[0] == others[1]


def _data(attack: AttackFacts) -> tuple[float, ...]:
    """Amounts of data of an attack; it has more than another if no entry is smaller and at least one is larger."""
    own = (attack.parameters.get(name) for name in DATA_PARAMETERS)
    return (attack.auxiliary_target, attack.auxiliary_source, *(np.inf if share is None else share for share in own))


def _is_larger(first: object, second: object) -> bool:
    """Whether two decoders have the same kind, and the first has more blocks or channels and not fewer of either."""
    try:
        (kind, *size), (other_kind, *other_size) = check_grammar(str(first)), check_grammar(str(second))
    except ConfigurationError:  # not a decoder of the grammar, so sizes cannot be compared
        return False
    no_smaller = all(mine >= other for mine, other in zip(size, other_size, strict=True))
    return kind == other_kind and size != other_size and no_smaller


def _victims_off_distribution(facts: RunFacts) -> Iterator[Flag]:
    for name, victims in facts.victims.items():
        shifts = [shift for shift in distribution_shifts(victims, facts.target) if shift.matters]
        if shifts:
            shown = ", ".join(
                f"{s.statistic} {s.victims:.3f} instead of {s.target:.3f} ({s.effect:+.1f} deviations)" for s in shifts
            )
            sentence = f"The {name} victims do not look like the target data; their means: {shown}."
            yield Flag("victims-off-distribution", sentence, victims=name if len(facts.victims) > 1 else None)


def _about_defenses(cells: pd.DataFrame, facts: RunFacts) -> Iterator[Flag]:
    for defense in cells["defense"].unique():
        if defense in facts.randomised and facts.messages_per_victim == 1:
            sentence = (
                f"{defense} is randomised, but the attacker saw each victim only once. An attacker that sees several "
                "messages of the same image may average the randomness away."
            )
            yield Flag("randomised-evaluated-once", sentence, defense=str(defense))
        if defense not in facts.undefended and not facts.adaptive:
            sentence = (
                f"{defense}: the attacker was not adaptive, that is, it did not know the defense. The leakage may be "
                "underestimated."
            )
            yield Flag("not-adaptive", sentence, defense=str(defense))


def _out_of_time(cells: pd.DataFrame) -> Iterator[Flag]:
    for key, rows in _by_attack(cells[cells["attack_out_of_time"].astype(bool)]):
        sentence = (
            f"{_title(key)}: attack {key['attack']} ran out of its time limit with {_seeds(rows)}. With more time it "
            "may reconstruct more."
        )
        yield Flag("out-of-time", sentence, **key)


def _few_seeds(cells: pd.DataFrame, varied: str) -> Iterator[Flag]:
    """varied: what the seeds vary, "training", or "attack" where nothing was trained."""
    seeds = cells["seed"].nunique()
    if seeds < ENOUGH_SEEDS:
        what = "training" if varied == "training" else "attacks"
        covered = f"and the variation of {what} only roughly" if seeds > 1 else f"but not the variation of {what}"
        sentence = (
            f"{seeds} {varied} seed{'s' if seeds > 1 else ''}: intervals cover the choice of images {covered}. "
            f"A published number needs at least {ENOUGH_SEEDS}."
        )
        yield Flag("few-seeds", sentence)


def _about_trainings(training: pd.DataFrame | None) -> Iterator[Flag]:
    """Flag systems that learned to tell clients apart, or whose loss fell without learning.

    Neither accuracy nor leakage of such a system means much.
    """
    if training is None or training.empty:
        return
    for key, rows in training.groupby(SYSTEM_KEYS, sort=False):
        about: dict[str, Any] = dict(zip(SYSTEM_KEYS, key, strict=True))
        place = {name: value for name, value in about.items() if name != "seed"}
        title = f"{_title(about)}, seed {about['seed']}"
        signature = rows["client_signature"].max() if "client_signature" in rows else np.nan
        if signature > LARGEST_SIGNATURE:
            sentence = (
                f"{title}: the server can tell clients apart: keys of a query's own client score {signature:.2f} nats "
                "higher than other clients' keys of the same images. That lowers the loss without learning from images."
            )
            yield Flag("clients-told-apart", sentence, **place)
        if "validation_knn" not in rows or (stalled := _fall_without_learning(rows)) is None:
            continue
        fall, rise = stalled
        sentence = (
            f"{title}: from the first to the last third of the training the loss fell by {100 * fall:.0f} %, while "
            f"validation kNN changed by {100 * rise:+.1f} points: the loss fell without learning from images."
        )
        yield Flag("loss-fell-without-learning", sentence, **place)


def _fall_without_learning(rows: pd.DataFrame) -> tuple[float, float] | None:
    """Fall of the loss, as a fraction, and rise of kNN accuracy, if the loss falls and kNN does not rise; else None."""
    scored = rows.dropna(subset=["loss", "validation_knn"]).sort_values("step")
    if len(scored) < FEWEST_VALIDATIONS:
        return None
    third = len(scored) // 3
    first, last = scored.iloc[:third].mean(numeric_only=True), scored.iloc[-third:].mean(numeric_only=True)
    fall = float(1 - last["loss"] / first["loss"])
    rise = float(last["validation_knn"] - first["validation_knn"])
    return (fall, rise) if fall > FALLING_LOSS and rise < RISING_KNN else None


def _by_attack(cells: pd.DataFrame) -> Iterator[tuple[dict[str, Any], pd.DataFrame]]:
    """Group cells by place and attack: yield the keys, and the rows of all seeds."""
    names = [*PLACE, "attack"]
    for key, rows in cells.groupby(names, sort=False):
        yield dict(zip(names, key, strict=True)), rows


def _same_cut(first: _Place, second: _Place) -> bool:
    return all(first.key[key] == second.key[key] for key in PLACE if key not in ("defense", "target_fraction"))


def _title(key: Mapping[str, Any]) -> str:
    target = f", {100 * key['target_fraction']:.3g} % target data" if key["target_fraction"] > 0 else ""
    return f"{key['defense']} (cut {key['cut_layer']}{target})"


def _seeds(rows: pd.DataFrame) -> str:
    seeds = sorted(rows["seed"].unique())
    return f"seed{'s' if len(seeds) > 1 else ''} {', '.join(str(seed) for seed in seeds)}"


def _shown(interval: Interval) -> str:
    return f"{interval.value:.3f} [{interval.low:.3f}, {interval.high:.3f}]"


def _per_seed(rows: pd.DataFrame, column: str) -> list[np.ndarray]:
    """One array per seed, in image order."""
    return [values[column].to_numpy(dtype=float) for _, values in rows.groupby("seed", sort=True)]


def _groups(rows: pd.DataFrame) -> np.ndarray:
    """The group of every image, in image order; the same for all seeds."""
    return rows.loc[rows["seed"] == rows["seed"].iloc[0], "group"].to_numpy()
