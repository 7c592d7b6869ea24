"""Flags on numbers that cannot be trusted, in the manner of AutoAttack's (Croce and Hein, ICML 2020).

A defense looks good when an attack is bad. Each flag is a sign of a bad attack or of a missing control, found in the
results alone: what was run, and the errors per image. A difference counts where the interval of the paired difference
(hierarchical bootstrap over seeds, then images) excludes zero and the leak ratio changes by `SMALLEST_EFFECT` or more.
A measured error below the one that a defense promises of any attacker is more than a sign: it ends the run as an error.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
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
PLACE = [key for key in CELL_KEYS if key not in ("attack", "seed")]  # what an attack is compared within
ENOUGH_SEEDS = 3
LARGEST_SIGNATURE = 0.5  # nats: a key of the same client counts for e^.5 = 1.6 keys of another (docs/LEARNING.md)
FEWEST_VALIDATIONS = 6  # below which a training is too short to say that it has stopped learning
FALLING_LOSS = 0.05  # share of the loss by which it falls from the first to the last third of a training
RISING_KNN = 0.01  # by which validation kNN rises meanwhile, where something is learned
WHITE_BOX = "client_weights"
DECODER = "architecture"  # the parameter that holds a decoder of the grammar
DATA_PARAMETERS = ("auxiliary_images", "auxiliary_fraction", "target_fraction")  # an attack's own share of its data


@dataclass(frozen=True)
class Flag:
    """A sign that a number cannot be trusted: one of `FLAGS`, what it is about, and a sentence with the numbers.

    The other fields are keys of a result's rows; None stands for every value.
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
    """What is known of an attack before it runs.

    kind: its class. parameters: all of them, defaults included. capabilities: those it was granted. blind: it does not
    use the smashed data. auxiliary_target, auxiliary_source: its own images of the target distribution and of others.
    """

    label: str
    kind: str
    parameters: Mapping[str, Any]
    capabilities: frozenset[str]
    blind: bool
    auxiliary_target: int = 0
    auxiliary_source: int = 0


@dataclass(frozen=True)
class RunFacts:
    """What is known of a run beside its rows.

    undefended, randomised: labels of the defenses that do nothing, and of those that draw at random.
    messages_per_victim: how often an attacker sees each victim sent.
    victims: statistics of each set of victims by name; target: of the distribution they stand for.
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
    """Every flag of a run, in the order of `FLAGS`.

    cells: one row per cell with `CELL_KEYS`, mse, attack_out_of_time and, where an attack failed, NaN as its mse and
    the cause in `failure`; `guarantee` is what was promised. per_image: `CELL_KEYS`, image, group, mse, mse_floor,
    mse_bound (NaN where nothing was promised); nothing of failed attacks is used. training: a row per validation with
    `SYSTEM_KEYS`, step, loss, validation_knn and client_signature (NaN where it is not measured); None for an audit,
    which trains nothing.
    """
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
        *(flag for place in places.values() for flag in _more_data_worse(place)),
        *(flag for place in places.values() for flag in _larger_decoder_worse(place)),
        *_victims_off_distribution(facts),
        *_about_defenses(cells, facts),
        *_out_of_time(cells),
        *_few_seeds(cells),
        *_about_trainings(training),
    ]
    return sorted(found, key=lambda flag: FLAGS.index(flag.name))


@dataclass(frozen=True)
class _Place:
    """A system, over all seeds, before one set of victims: `key` says which; rows per attack, ordered by image."""

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
        """By how much R falls from `better` to `worse`, paired by seed and image; None if that is not significant."""
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
    """An attack that does what a defense says none can: the promise is false, or what leads to it is."""
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
                f"{rows['mse_bound'].mean():.4f} that is claimed of any attacker ({claim}; difference {_shown(above)})."
            )
            yield Flag(BOUND_VIOLATED, f"{place.title}: {sentence}", **place.key, attack=label)


def _without_control(places: Sequence[_Place]) -> Iterator[Flag]:
    """The attack-strength certificate: what the same attack does where nothing protects."""
    for place in places:
        controls = [other for other in places if other.undefended and _same_cut(other, place)]
        missing = [a for a in place.informed if not any(a.label in control.attacks for control in controls)]
        if place.undefended or not missing:
            continue
        if len(missing) == len(place.informed):
            sentence = "no attack has an undefended control at this cut: whether they are strong enough is not shown."
            yield place.flag("no-undefended-control", sentence)
        else:
            for attack in missing:
                sentence = f"attack {attack.label} has no undefended control at this cut: its strength is not shown."
                yield place.flag("no-undefended-control", sentence, attack)


def _at_floor(places: Sequence[_Place]) -> Iterator[Flag]:
    for place in places:
        if not place.undefended or not place.informed:
            continue
        leaks = {attack.label: place.leak(attack) for attack in place.informed}
        if any(leak.low > SMALLEST_LEAK for leak in leaks.values()):
            continue
        best = max(leaks, key=lambda label: leaks[label].value)
        sentence = (
            f"{place.title}: the attacks stay at the floor without any defense (best: {best}, "
            f"R {_shown(leaks[best])}), so they prove nothing about a defense at this cut."
        )
        about = {key: value for key, value in place.key.items() if key not in ("defense", "target_fraction")}
        yield Flag("attack-at-floor-on-undefended", sentence, **about)


def _black_box_beats_white_box(place: _Place) -> Iterator[Flag]:
    """Who has the weights could run the black-box attack, too; if that is better, the white-box attack is at fault."""
    white = [attack for attack in place.informed if WHITE_BOX in attack.capabilities]
    black = [attack for attack in place.informed if WHITE_BOX not in attack.capabilities]
    if not white or not black:
        return
    best_white, best_black = min(white, key=place.error), min(black, key=place.error)
    loss = place.loss(best_white, best_black)
    if loss is not None:
        sentence = (
            f"{best_black.label}, without the client's weights, has MSE {place.error(best_black):.4f}, the best attack "
            f"that holds them, {best_white.label}, only {place.error(best_white):.4f} (R lower by {_shown(loss)})."
        )
        yield place.flag("black-box-beats-white-box", sentence, best_white)


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
                f"{more.label}, with more data, has MSE {place.error(more):.4f}, "
                f"{less.label}, with less, {place.error(less):.4f} (R lower by {_shown(loss)})."
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
                f"{larger.label}, a {larger.parameters[DECODER]}, has MSE {place.error(larger):.4f}, the smaller "
                f"{smaller.parameters[DECODER]} of {smaller.label} {place.error(smaller):.4f} "
                f"(R lower by {_shown(loss)})."
            )
            yield place.flag("larger-decoder-worse", sentence, larger)


def _alike(first: AttackFacts, second: AttackFacts, but_for: Sequence[str]) -> bool:
    """Whether two attacks are of one class and have the same other parameters and capabilities."""
    others = [{name: value for name, value in a.parameters.items() if name not in but_for} for a in (first, second)]
    return first.kind == second.kind and first.capabilities == second.capabilities and others[0] == others[1]


def _data(attack: AttackFacts) -> tuple[float, ...]:
    """What an attack has to learn from; one has more than another if no entry is smaller and one is larger."""
    own = (attack.parameters.get(name) for name in DATA_PARAMETERS)
    return (attack.auxiliary_target, attack.auxiliary_source, *(np.inf if share is None else share for share in own))


def _is_larger(first: object, second: object) -> bool:
    """Whether the first decoder has no fewer blocks and channels than the second, of its kind, and more of one."""
    try:
        (kind, *size), (other_kind, *other_size) = check_grammar(str(first)), check_grammar(str(second))
    except ConfigurationError:  # another kind of architecture, without an order
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
            sentence = f"The {name} victims are not of the target distribution: their mean {shown}."
            yield Flag("victims-off-distribution", sentence, victims=name if len(facts.victims) > 1 else None)


def _about_defenses(cells: pd.DataFrame, facts: RunFacts) -> Iterator[Flag]:
    for defense in cells["defense"].unique():
        if defense in facts.randomised and facts.messages_per_victim == 1:
            sentence = (
                f"{defense} draws at random, but each victim was seen once: who sees one sent repeatedly "
                "may average the randomness away."
            )
            yield Flag("randomised-evaluated-once", sentence, defense=str(defense))
        if defense not in facts.undefended and not facts.adaptive:
            sentence = (
                f"{defense}: the attacker was not adaptive, it did not know the defense. Its numbers are optimistic."
            )
            yield Flag("not-adaptive", sentence, defense=str(defense))


def _out_of_time(cells: pd.DataFrame) -> Iterator[Flag]:
    for key, rows in _by_attack(cells[cells["attack_out_of_time"].astype(bool)]):
        sentence = (
            f"{_title(key)}: attack {key['attack']} ran out of its time limit with {_seeds(rows)}: with more time it "
            "may reconstruct more."
        )
        yield Flag("out-of-time", sentence, **key)


def _few_seeds(cells: pd.DataFrame) -> Iterator[Flag]:
    seeds = cells["seed"].nunique()
    if seeds < ENOUGH_SEEDS:
        covered = "and training only poorly" if seeds > 1 else "but not the variation of training"
        sentence = (
            f"{seeds} training seed{'s' if seeds > 1 else ''}: intervals cover the choice of images {covered}. "
            f"A published number needs at least {ENOUGH_SEEDS}."
        )
        yield Flag("few-seeds", sentence)


def _about_trainings(training: pd.DataFrame | None) -> Iterator[Flag]:
    """Systems that learned to tell clients apart, or nothing, so that neither accuracy nor leaks mean much."""
    if training is None or training.empty:
        return
    for key, rows in training.groupby(SYSTEM_KEYS, sort=False):
        about: dict[str, Any] = dict(zip(SYSTEM_KEYS, key, strict=True))
        place = {name: value for name, value in about.items() if name != "seed"}
        title = f"{_title(about)}, seed {about['seed']}"
        signature = rows["client_signature"].max() if "client_signature" in rows else np.nan
        if signature > LARGEST_SIGNATURE:
            sentence = (
                f"{title}: the server can tell clients apart: a key of the query's own client outscores another "
                f"client's key of the same image by {signature:.2f} nats. That lowers the loss without learning."
            )
            yield Flag("clients-told-apart", sentence, **place)
        if "validation_knn" not in rows or (stalled := _fall_without_learning(rows)) is None:
            continue
        fall, rise = stalled
        sentence = (
            f"{title}: from the first to the last third of the training its loss fell by {100 * fall:.0f} % while "
            f"validation kNN changed by {100 * rise:+.1f} points: what lowers the loss is not learned for images."
        )
        yield Flag("loss-fell-without-learning", sentence, **place)


def _fall_without_learning(rows: pd.DataFrame) -> tuple[float, float] | None:
    """The fall of the loss, as a share, and the rise of kNN, where the one is large and the other is not."""
    scored = rows.dropna(subset=["loss", "validation_knn"]).sort_values("step")
    if len(scored) < FEWEST_VALIDATIONS:
        return None
    third = len(scored) // 3
    first, last = scored.iloc[:third].mean(numeric_only=True), scored.iloc[-third:].mean(numeric_only=True)
    fall = float(1 - last["loss"] / first["loss"])
    rise = float(last["validation_knn"] - first["validation_knn"])
    return (fall, rise) if fall > FALLING_LOSS and rise < RISING_KNN else None


def _by_attack(cells: pd.DataFrame) -> Iterator[tuple[dict[str, Any], pd.DataFrame]]:
    """Cells by place and attack: the keys, and the rows of all seeds."""
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
