from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from mocosfl_priv.plugins import DEFENSES
from mocosfl_priv.results import UNDEFENDED, RunRecord
from reports.analysis.comparison import BOTTLENECK, TARESSFL, compare
from reports.analysis.summary import summarise
from reports.analysis.verdict import Verdict, verdicts
from tests.reports.made_up import FLOOR, made_up

NONE = (0.8, 0.60)
STRENGTHS = {"taressfl-weak": (0.7, 0.56), "taressfl-medium": (0.5, 0.50), "taressfl-strong": (0.2, 0.40)}


def verdict_on(leak: float, accuracy: float, **options: object) -> Verdict:
    systems = {"none": NONE, **STRENGTHS, "mine": (leak, accuracy)}
    (verdict,) = verdicts(made_up(systems, candidate="mine", **options))  # type: ignore[arg-type]
    return verdict


def key(label: str) -> tuple[str, int, float]:
    return (label, 1, 0.0)


def test_the_controls_are_known_by_their_classes() -> None:
    for name, origin in {"none": UNDEFENDED, "bottleneck": BOTTLENECK, "taressfl": TARESSFL}.items():
        cls = DEFENSES.load(name)
        assert origin == f"{cls.__module__}:{cls.__qualname__}"


@pytest.mark.parametrize(
    ("leak", "accuracy", "nearest", "against_none", "against_taressfl"),
    [
        (0.40, 0.50, "taressfl-medium", "leaks less than", "leaks less than"),
        (0.60, 0.50, "taressfl-medium", "leaks less than", "leaks more than"),
        (0.50, 0.50, "taressfl-medium", "leaks less than", "no difference shown"),
        (0.20, 0.57, "taressfl-weak", "leaks less than", "leaks less than"),
        (0.90, 0.40, "taressfl-strong", "leaks more than", "leaks more than"),
        (0.80, 0.40, "taressfl-strong", "no difference shown", "leaks more than"),
    ],
)
def test_matched_means_the_strength_with_the_nearest_accuracy(
    leak: float, accuracy: float, nearest: str, against_none: str, against_taressfl: str
) -> None:
    verdict = verdict_on(leak, accuracy)
    assert verdict.against_none is not None and verdict.against_taressfl is not None
    assert verdict.against_none.finding == against_none
    assert verdict.against_taressfl.other == f"{nearest} (cut 1)"
    assert verdict.against_taressfl.matched and verdict.against_taressfl.finding == against_taressfl
    difference = leak - STRENGTHS[nearest][0]
    assert verdict.against_taressfl.leak is not None
    assert verdict.against_taressfl.leak.value == pytest.approx(difference, abs=0.005)
    said = verdict.sentences()[2]
    assert said.startswith("Against TAResSFL at matched accuracy: ") and against_taressfl in said
    assert f"{nearest} (cut 1): R differs by " in said and "an interval that contains zero" in said


def test_where_no_strength_is_as_accurate_the_verdict_says_so() -> None:
    verdict = verdict_on(0.4, 0.75)
    assert verdict.against_taressfl is not None and not verdict.against_taressfl.matched
    assert verdict.against_taressfl.other == "taressfl-weak (cut 1)"
    said = " ".join(verdict.sentences())
    assert "no strength of it is matched. The nearest is less accurate" in said
    assert "linear probe differs by +1" in said and "this is better in both" in said
    worse = " ".join(verdict_on(0.97, 0.2).sentences())
    assert "The nearest is more accurate" in worse and "this is worse in both" in worse
    neither = " ".join(verdict_on(0.97, 0.75).sentences())
    assert "The nearest is less accurate" in neither and "no comparison at equal accuracy" in neither


def test_a_matched_strength_goes_before_a_nearer_one_that_is_not() -> None:
    """With few answers that differ, a small difference is a certain one."""
    record = made_up({"none": NONE, **STRENGTHS, "mine": (0.4, 0.53)}, candidate="mine")
    (before,) = verdicts(record)
    assert before.against_taressfl is not None and before.against_taressfl.other == "taressfl-medium (cut 1)"
    probe = record.probe
    mine = probe[probe["defense"] == "mine"]["linear"].to_numpy()
    noisy = np.random.default_rng(0).permutation(mine)  # far from mine image by image
    noisy[np.flatnonzero(noisy)[:8]] = False  # and two points less accurate on average
    probe.loc[probe["defense"] == "taressfl-strong", "linear"] = noisy
    probe.loc[probe["defense"] == "taressfl-medium", "linear"] = (
        mine & (probe.loc[probe["defense"] == "mine", "image"] % 30 > 0).to_numpy()
    )
    (after,) = verdicts(record)
    assert after.against_taressfl is not None
    assert after.against_taressfl.other == "taressfl-strong (cut 1)" and after.against_taressfl.matched
    assert abs(compare(record, key("mine"), key("taressfl-medium")).linear.value) < abs(
        after.against_taressfl.linear.value
    )


def test_a_difference_too_small_to_matter_is_none() -> None:
    verdict = verdict_on(0.505, 0.50)
    against = verdict.against_taressfl
    assert against is not None and against.leak is not None and against.leak.low > 0
    assert against.finding == "no difference shown"


def test_differences_are_paired_by_image_and_seed() -> None:
    """Victims differ far more than systems do: unpaired, this difference would drown."""
    record = made_up({"none": NONE, "mine": (0.78, 0.6)}, seeds=3, candidate="mine")
    rows = {row.defense: row for row in summarise(record) if row.is_worst_case}
    assert rows["mine"].leak_ratio.value == pytest.approx(0.78, abs=0.005)
    paired = compare(record, key("mine"), key("none"))
    assert paired.leak is not None and paired.leak.seeds == 3
    assert paired.leak.value == pytest.approx(rows["mine"].leak_ratio.value - rows["none"].leak_ratio.value)
    assert paired.leak.high < 0


def test_both_are_compared_under_the_attacks_that_succeeded_on_both() -> None:
    record = made_up({"none": NONE, "mine": (0.8, 0.6)}, candidate="mine", failed=[("mine", "rmle")])
    comparison = compare(record, key("mine"), key("none"))
    assert comparison.attacks == ["decoder"] and comparison.leak is not None
    assert comparison.finding == "no difference shown"  # though the worst case of all is closer on none
    nothing = made_up({"none": NONE, "mine": (0.8, 0.6)}, failed=[("mine", "rmle"), ("none", "decoder")])
    assert compare(nothing, key("mine"), key("none")).leak is None
    (verdict,) = verdicts(replace(nothing, info={**nothing.info, "config": record.info["config"]}))
    assert "no attack succeeded on both" in verdict.sentences()[1]


def test_an_ensemble_that_fails_to_see_hides_no_leak() -> None:
    record = made_up({"none": NONE, "mine": (0.6, 0.6)}, candidate="mine", attacks=("decoder", "ensemble-long"))
    values = record.per_image
    (honest,) = verdicts(record)
    values.loc[(values["defense"] == "mine") & (values["attack"] == "ensemble-long"), "mse"] = FLOOR
    (verdict,) = verdicts(record)
    assert verdict.against_none is not None and verdict.against_none.attacks == ["decoder", "ensemble-long"]
    assert honest.headline is not None and verdict.headline is not None
    # on half of the victims the decoder comes second, by a tenth of the floor
    assert verdict.headline.leak_ratio.value == pytest.approx(honest.headline.leak_ratio.value - 0.05, abs=0.01)
    assert "in the worst case over decoder, ensemble-long" in verdict.sentences()[0]


def test_an_ensemble_that_comes_closest_to_every_victim_is_named() -> None:
    record = made_up({"none": NONE, "mine": (0.6, 0.6)}, candidate="mine", attacks=("decoder", "ensemble-long"))
    record.per_image.loc[record.per_image["attack"] == "ensemble-long", "mse"] *= 0.5
    (verdict,) = verdicts(record)
    assert "under the ensemble" in verdict.sentences()[0]


def test_costs_and_flags_stand_in_the_verdict() -> None:
    flags = [
        {"name": "few-seeds", "sentence": "One seed."},
        {"name": "attack-failed", "sentence": "On mine.", "defense": "mine", "cut_layer": 1, "target_fraction": 0.0},
        {"name": "attack-failed", "sentence": "Elsewhere.", "defense": "taressfl-weak", "cut_layer": 1},
    ]
    said = verdict_on(0.4, 0.5, flags=flags).sentences()
    assert said[3].startswith("Costs: 5,000 (none: 1,000) bytes sent per image")
    assert said[4:] == ["One seed. [few-seeds]", "On mine. [attack-failed]"]


def test_what_is_missing_is_said() -> None:
    (alone,) = verdicts(made_up({"mine": (0.4, 0.5)}, candidate="mine"))
    assert "no undefended system" in alone.sentences()[1] and "no TAResSFL" in alone.sentences()[2]
    failed = [("mine", "rmle"), ("mine", "decoder")]
    (silent,) = verdicts(made_up({"none": NONE, "mine": (0.4, 0.5)}, candidate="mine", failed=failed))
    assert silent.sentences() == ["mine (cut 1): no attack succeeded, so there is no verdict."]
    harmless = verdict_on(0.0, 0.5)
    assert "No attack does better than a blind guess" in harmless.sentences()[0]
    assert verdicts(made_up({"none": NONE})) == []


def test_every_target_fraction_of_a_candidate_has_a_verdict() -> None:
    record = made_up({"none": NONE, **STRENGTHS, "mine": (0.4, 0.5)}, candidate="mine")
    assert isinstance(record, RunRecord)
    for frame in (record.cells, record.per_image, record.probe):
        frame.loc[frame["defense"] == "mine", "target_fraction"] = 0.1
    (verdict,) = verdicts(record)
    assert verdict.system == "mine (cut 1, 10 % target data)"
    assert verdict.against_none is not None
