from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pandas as pd
import pytest

from mocosfl_priv.evaluation.distribution_shift import ImageStatistics
from mocosfl_priv.evaluation.reliability import FLAGS, AttackFacts, Flag, RunFacts, reliability_flags
from mocosfl_priv.results import CELL_KEYS, SYSTEM_KEYS

VICTIMS = 64
FLOOR = 0.06
RNG = np.random.default_rng(0)
HARDNESS = RNG.uniform(0.5, 1.5, VICTIMS)  # some victims are harder than others, for every attack


def attack(label: str, *, white: bool = False, blind: bool = False, **given: Any) -> AttackFacts:
    capabilities = frozenset({"client_weights"} if white else set() if blind else {"query", "auxiliary_data"})
    parameters = given.pop("parameters", {})
    return AttackFacts(label, given.pop("kind", label), parameters, capabilities, blind, **given)


def of_target(seed: int, shift: float = 0.0) -> ImageStatistics:
    values = np.random.default_rng(seed).normal([0.5, 0.5, 0.5, 0.25], 0.06, (VICTIMS, 4)) - [0, 0, 0, shift]
    return ImageStatistics(values, np.arange(VICTIMS))


FACTS = RunFacts(
    attacks=[attack("floor", blind=True), attack("decoder"), attack("rmle", white=True)],
    undefended=frozenset({"none"}),
    randomised=frozenset({"gaussian"}),
    messages_per_victim=8,
    adaptive=True,
    victims={"test": of_target(0)},
    target=of_target(1),
    samples=200,
)


def results(errors: dict[tuple[str, str], float], seeds: int = 3) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Cells and per-image values from mean errors by (defense, attack), in units of the floor's; NaN is a failure."""
    rows: list[dict[str, Any]] = []
    images: list[pd.DataFrame] = []
    for seed in range(seeds):
        for (defense, name), error in errors.items():
            keys = {"defense": defense, "attack": name, "cut_layer": 1, "target_fraction": 0.0, "seed": seed,
                    "victims": "test"}  # fmt: skip
            rows.append({**keys, "mse": error * FLOOR, "attack_out_of_time": False,
                         "failure": "diverged" if np.isnan(error) else "", "guarantee": ""})  # fmt: skip
            if not np.isnan(error):
                noise = np.random.default_rng([seed, len(images)]).normal(1, 0.05, VICTIMS)
                images.append(pd.DataFrame(
                    {**keys, "image": range(VICTIMS), "group": np.arange(VICTIMS) // 2,
                     "mse": error * FLOOR * HARDNESS * noise, "mse_floor": FLOOR * HARDNESS,
                     "mse_bound": np.nan}
                ))  # fmt: skip
    return pd.DataFrame(rows), pd.concat(images, ignore_index=True)


GOOD = {("none", "floor"): 1.0, ("none", "decoder"): 0.3, ("none", "rmle"): 0.1,
        ("bottleneck", "floor"): 1.0, ("bottleneck", "decoder"): 0.6, ("bottleneck", "rmle"): 0.5}  # fmt: skip


def flags(
    errors: dict[tuple[str, str], float] | None = None, *, seeds: int = 3, facts: RunFacts = FACTS, **changed: Any
) -> list[Flag]:
    return reliability_flags(*results({**GOOD, **(errors or {})}, seeds), replace(facts, **changed))


def test_a_sound_run_has_no_flag() -> None:
    assert flags() == []


def test_chance_alone_raises_hardly_any_flag() -> None:
    """Two attacks that are equally good but for noise: never a black box that beats a white box."""
    for seeds in (1, 2, 5):
        same = {("none", "decoder"): 0.1, ("bottleneck", "decoder"): 0.5}
        assert {flag.name for flag in flags(same, seeds=seeds)} <= {"few-seeds"}


def test_attacks_that_fail_without_a_defense_prove_nothing() -> None:
    (flag,) = flags({("none", "decoder"): 1.02, ("none", "rmle"): 0.995})
    assert (flag.name, flag.defense, flag.cut_layer, flag.attack) == ("attack-at-floor-on-undefended", None, 1, None)
    assert "best: rmle, R 0.0" in flag.sentence
    assert flags({("none", "decoder"): 1.02}) == []  # one good attack is enough


def test_a_defense_without_control_is_flagged() -> None:
    cells, per_image = results(GOOD)
    alone = reliability_flags(cells[cells["defense"] != "none"], per_image[per_image["defense"] != "none"], FACTS)
    assert [(flag.name, flag.defense, flag.attack) for flag in alone] == [("no-undefended-control", "bottleneck", None)]
    other_cut = per_image.assign(cut_layer=np.where(per_image["defense"] == "none", 2, 1))
    assert [f.name for f in reliability_flags(cells, other_cut, FACTS)] == ["no-undefended-control"]
    kept = ~((per_image["defense"] == "none") & (per_image["attack"] == "rmle"))
    (one,) = reliability_flags(cells, per_image[kept], FACTS)
    assert (one.name, one.defense, one.attack) == ("no-undefended-control", "bottleneck", "rmle")


def test_a_black_box_that_beats_the_white_box_shows_a_weak_attack() -> None:
    (flag,) = flags({("bottleneck", "rmle"): 0.8})
    assert (flag.name, flag.defense, flag.attack) == ("black-box-beats-white-box", "bottleneck", "rmle")
    assert "decoder, without the client's weights, has MSE 0.0" in flag.sentence
    assert flags({("bottleneck", "rmle"): 0.603}) == []  # a difference too small to matter


def test_a_search_that_masked_gradients_mislead_is_flagged() -> None:
    searching = replace(
        FACTS, attacks=[attack("floor", blind=True), attack("decoder", white=True),
                        attack("rmle", white=True, searches_by_gradient=True)],
    )  # fmt: skip
    (flag,) = flags({("bottleneck", "rmle"): 0.99, ("bottleneck", "decoder"): 0.13}, facts=searching)
    assert (flag.name, flag.defense, flag.attack) == ("masked-gradients", "bottleneck", "rmle")
    assert "finds R 0.01" in flag.sentence and "decoder finds R 0.87" in flag.sentence
    # a search that is only weaker, or that finds more, is not misled
    assert flags({("bottleneck", "rmle"): 0.5, ("bottleneck", "decoder"): 0.3}, facts=searching) == []
    assert flags({("bottleneck", "rmle"): 0.2, ("bottleneck", "decoder"): 0.9}, facts=searching) == []


def test_a_system_whose_target_fraction_nobody_stated_has_the_same_flags() -> None:
    cells, per_image = results(
        {("client.tar", "floor"): 1.0, ("client.tar", "decoder"): 0.5, ("client.tar", "rmle"): 0.9}
    )
    known = reliability_flags(cells, per_image, FACTS)
    unknown = [frame.assign(target_fraction=np.nan) for frame in (cells, per_image)]
    found = reliability_flags(unknown[0], unknown[1], FACTS)
    assert [flag.name for flag in found] == [flag.name for flag in known] != []
    assert "no-undefended-control" in {flag.name for flag in found}
    row = unknown[0].iloc[1]
    assert [flag.concerns(row) for flag in found] == [flag.concerns(cells.iloc[1]) for flag in known]


def ladder(parameter: str, small: object, large: object, **more: Any) -> RunFacts:
    same: dict[str, Any] = {"kind": "attacks.decoder:DecoderAttack"}
    attacks = [
        attack("small", parameters={parameter: small, "epochs": 30}, **same),
        attack("large", parameters={parameter: large, "epochs": 30}, **same, **more),
    ]
    return replace(FACTS, attacks=attacks)


SMALL_BETTER = {
    ("none", "small"): 0.2,
    ("none", "large"): 0.4,
    ("bottleneck", "small"): 0.5,
    ("bottleneck", "large"): 0.5,
}
LARGE_BETTER = {
    ("none", "small"): 0.4,
    ("none", "large"): 0.2,
    ("bottleneck", "small"): 0.5,
    ("bottleneck", "large"): 0.5,
}


def test_a_larger_decoder_must_not_be_worse() -> None:
    facts = ladder("architecture", "res_normN0C16", "res_normN4C64")
    (flag,) = reliability_flags(*results(SMALL_BETTER), facts)
    assert (flag.name, flag.defense, flag.attack) == ("larger-decoder-worse", "none", "large")
    assert reliability_flags(*results(LARGE_BETTER), facts) == []


@pytest.mark.parametrize("large", ["conv_normN4C64", "res_normN8C8", "unet"])
def test_decoders_without_an_order_are_not_compared(large: str) -> None:
    assert reliability_flags(*results(SMALL_BETTER), ladder("architecture", "res_normN0C16", large)) == []


def test_decoders_with_other_settings_are_not_compared() -> None:
    facts = ladder("architecture", "res_normN0C16", "res_normN4C64")
    small, large = facts.attacks
    shorter = replace(large, parameters={**large.parameters, "epochs": 1})
    assert reliability_flags(*results(SMALL_BETTER), replace(facts, attacks=[small, shorter])) == []


def test_more_data_must_not_be_worse() -> None:
    by_parameter = ladder("auxiliary_fraction", 0.1, 0.5)
    by_grant = ladder("tv", 1.0, 1.0, auxiliary_target=400)
    for facts in (by_parameter, by_grant):
        (flag,) = reliability_flags(*results(SMALL_BETTER), facts)
        assert (flag.name, flag.defense, flag.attack) == ("more-data-worse", "none", "large")
        assert reliability_flags(*results(LARGE_BETTER), facts) == []
    small, large = by_grant.attacks  # more of one kind and less of another is not more
    traded = [replace(small, auxiliary_source=50), large]
    assert reliability_flags(*results(SMALL_BETTER), replace(by_grant, attacks=traded)) == []


def test_victims_of_another_distribution_are_flagged() -> None:
    (flag,) = flags(victims={"test": of_target(0, shift=0.05)})
    assert flag.name == "victims-off-distribution" and "contrast 0.2" in flag.sentence
    assert "red" not in flag.sentence


def test_what_the_run_itself_says() -> None:
    gaussian = {("gaussian", "floor"): 1.0, ("gaussian", "decoder"): 0.8, ("gaussian", "rmle"): 0.7}
    (once,) = flags(gaussian, messages_per_victim=1)
    assert (once.name, once.defense) == ("randomised-evaluated-once", "gaussian")
    assert flags(gaussian) == []
    assert [(f.name, f.defense) for f in flags(adaptive=False)] == [("not-adaptive", "bottleneck")]
    assert [f.name for f in flags(seeds=2)] == ["few-seeds"]
    assert "1 attack seed: intervals cover the choice of images but not" in flags(seeds=1)[0].sentence
    trained = pd.DataFrame(columns=[*SYSTEM_KEYS, "step", "loss", "validation_knn"])
    (few,) = reliability_flags(*results(GOOD, 1), FACTS, trained)
    assert "1 training seed: intervals cover the choice of images but not" in few.sentence
    cells, per_image = results(GOOD)
    cells.loc[
        (cells["attack"] == "rmle") & (cells["defense"] == "none") & (cells["seed"] == 1), "attack_out_of_time"
    ] = True
    (late,) = reliability_flags(cells, per_image, FACTS)
    assert (late.name, late.defense, late.attack) == ("out-of-time", "none", "rmle") and "seed 1" in late.sentence


def test_failed_attacks_are_named_and_compared_with_nothing() -> None:
    failed, control = flags({("none", "rmle"): float("nan")})
    assert (failed.name, failed.defense, failed.attack) == ("attack-failed", "none", "rmle")
    assert "seeds 0, 1, 2" in failed.sentence and "diverged" in failed.sentence
    assert (control.name, control.defense, control.attack) == ("no-undefended-control", "bottleneck", "rmle")
    cells, per_image = results({**GOOD, ("none", "rmle"): 0.9})
    cells.loc[(cells["attack"] == "rmle") & (cells["defense"] == "none") & (cells["seed"] == 1), "mse"] = np.nan
    names = [flag.name for flag in reliability_flags(cells, per_image, FACTS)]
    assert names == ["attack-failed", "no-undefended-control"]  # one failed seed: its other seeds prove nothing


def promised(share: float, seeds: int = 3) -> list[Flag]:
    """A defense that promises `share` of the floor's error of any attacker; rmle reaches half of it."""
    cells, per_image = results(GOOD, seeds)
    cells.loc[cells["defense"] == "bottleneck", "guarantee"] = "a promise"
    mine = per_image["defense"] == "bottleneck"
    per_image.loc[mine, "mse_bound"] = share * per_image.loc[mine, "mse_floor"]
    return reliability_flags(cells, per_image, FACTS)


def test_a_measurement_below_a_promised_bound_is_flagged_first() -> None:
    (flag,) = promised(0.55)
    assert (flag.name, flag.defense, flag.attack) == ("bound-violated", "bottleneck", "rmle")
    assert FLAGS.index(flag.name) == FLAGS.index("attack-failed") + 1
    assert "bottleneck (cut 1): the guarantee does not hold: attack rmle has MSE 0.0" in flag.sentence
    assert "claimed for any attacker (a promise; difference -0.0" in flag.sentence
    assert {flag.attack for flag in promised(0.9)} == {"rmle", "decoder"}
    assert promised(0.45) == []


def test_chance_does_not_break_a_promise() -> None:
    """A bound that is reached exactly lies within the interval of the paired difference."""
    for seeds in (3, 5):
        assert promised(0.5, seeds) == []


def test_flags_know_the_rows_they_are_about() -> None:
    cells, _ = results(GOOD)
    flag = Flag("out-of-time", "", defense="bottleneck", attack="rmle", cut_layer=1)
    concerned = [row for _, row in cells.iterrows() if flag.concerns(row)]
    assert {(row["defense"], row["attack"]) for row in concerned} == {("bottleneck", "rmle")} and len(concerned) == 3
    assert all(Flag("few-seeds", "").concerns(row) for _, row in cells.iterrows())
    assert set(CELL_KEYS) - {"seed"} <= set(Flag.__dataclass_fields__)
    assert flag.name in FLAGS


def trained(losses: list[float], knn: list[float], signature: list[float] | None = None) -> pd.DataFrame:
    rows = {"defense": "none", "cut_layer": 1, "target_fraction": 0.0, "seed": 0, "step": range(len(losses)),
            "loss": losses, "validation_knn": knn}  # fmt: skip
    return pd.DataFrame(rows if signature is None else {**rows, "client_signature": signature})


# Measured: 100 clients with two classes each, momentum models apart and averaged, ResNet-8, 20,000 images.
SHORT_CUT = [12.10, 11.70, 11.03, 10.47, 9.96, 9.66], [0.395, 0.401, 0.408, 0.398, 0.400, 0.395]
LEARNING = [12.20, 12.15, 12.02, 11.87, 11.63, 11.57], [0.397, 0.410, 0.420, 0.438, 0.456, 0.457]


def test_a_loss_that_falls_without_learning_is_flagged() -> None:
    (flag,) = reliability_flags(*results(GOOD), FACTS, trained(*SHORT_CUT))
    assert (flag.name, flag.defense) == ("loss-fell-without-learning", "none")
    assert "18 %" in flag.sentence
    assert reliability_flags(*results(GOOD), FACTS, trained(*LEARNING)) == []
    converged = [11.0] * 6, [0.50] * 6
    assert reliability_flags(*results(GOOD), FACTS, trained(*converged)) == []
    short = [values[:4] for values in SHORT_CUT]
    assert reliability_flags(*results(GOOD), FACTS, trained(*short)) == []


def test_clients_that_can_be_told_apart_are_flagged() -> None:
    (flag,) = reliability_flags(*results(GOOD), FACTS, trained(*LEARNING, [0.0, 0.1, 0.4, 0.9, 1.6, 2.0]))
    assert flag.name == "clients-told-apart"
    assert "2.00 nats" in flag.sentence
    assert reliability_flags(*results(GOOD), FACTS, trained(*LEARNING, [0.01] * 6)) == []


def test_an_audit_trains_nothing_and_says_nothing_of_it() -> None:
    assert reliability_flags(*results(GOOD), FACTS, None) == reliability_flags(*results(GOOD), FACTS, pd.DataFrame())
