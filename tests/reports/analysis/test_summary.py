from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import numpy as np
import pandas as pd
import pytest

from mocosfl_priv.api import RunResult
from mocosfl_priv.results import DETECTION_COLUMNS, RunRecord
from reports.analysis.findings_text import caveats, finding, sentences
from reports.analysis.summary import ENSEMBLE, WORST_CASE, as_frame, detections, headline_rows, summarise
from tests.reports.made_up import made_up


def test_worst_case_is_the_best_attack_for_every_victim(tiny_run: RunResult) -> None:
    rows = {row.attack: row for row in summarise(tiny_run.record)}
    per_image = tiny_run.record.per_image
    best = per_image.pivot(index="image", columns="attack", values="mse")[["rmle", "decoder"]].min(axis=1)
    assert rows[WORST_CASE].metrics["mse"].value == pytest.approx(best.mean())
    floor = per_image.groupby("image")["mse_floor"].first()
    assert rows[WORST_CASE].leak_ratio.value == pytest.approx(1 - best.mean() / floor.mean())
    assert rows[WORST_CASE].leak_ratio.value >= max(rows["decoder"].leak_ratio.value, rows["rmle"].leak_ratio.value)
    assert [rows[name].blind for name in ("floor", "rmle", WORST_CASE)] == [True, False, False]
    assert [row.attack for row in headline_rows(list(rows.values()))] == [WORST_CASE]


LABEL = "all-together"  # what an attack is called decides nothing


def with_ensemble(run: RunResult, factor: float) -> RunRecord:
    """The same run, and an ensemble with `factor` times rmle's errors."""
    record = run.record
    cells, images = (frame[frame["attack"] == "rmle"].copy() for frame in (record.cells, record.per_image))
    cells["attack"] = images["attack"] = LABEL
    images["mse"] *= factor
    plugins = record.info["plugins"]
    mine = {**plugins["attacks"][0], "label": LABEL, "origin": ENSEMBLE, "blind": False}
    return replace(
        record,
        info={**record.info, "plugins": {**plugins, "attacks": [*plugins["attacks"], mine]}},
        cells=pd.concat([record.cells, cells], ignore_index=True),
        per_image=pd.concat([record.per_image, images], ignore_index=True),
    )


def test_the_headline_is_the_stronger_of_ensemble_and_worst_case(tiny_run: RunResult) -> None:
    stronger, weaker = with_ensemble(tiny_run, 0.01), with_ensemble(tiny_run, 3.0)
    for record, expected in ((stronger, LABEL), (weaker, WORST_CASE)):
        rows = summarise(record)
        (headline,) = headline_rows(rows)
        assert headline.attack == expected
        assert headline.leak_ratio.value == max(row.leak_ratio.value for row in rows)
        assert not any("did not run" in text for text in caveats(record, rows))
    assert not any("the ensemble is weaker" in text for text in caveats(stronger, summarise(stronger)))
    assert any("the ensemble is weaker than rmle alone" in text for text in caveats(weaker, summarise(weaker)))
    without = tiny_run.record
    assert any("The ensemble did not run" in text for text in caveats(without, summarise(without)))


def test_a_single_attack_that_finds_more_is_the_headline_and_the_choice_is_said(tiny_run: RunResult) -> None:
    record = with_ensemble(tiny_run, 3.0)
    values = record.per_image
    best = values[values["attack"] == "rmle"].set_index("image")["mse"]
    others = values[values["attack"].isin([LABEL, "decoder"])].groupby("image")["mse"].min()
    (headline,) = headline_rows(summarise(record))
    assert headline.chosen["rmle"] == pytest.approx((best < others).mean())
    assert sum(headline.chosen.values()) == pytest.approx(1)
    assert f"rmle {100 * headline.chosen['rmle']:.0f} %" in headline.attack_text
    shown = as_frame(summarise(record)).set_index("attack")["worst_case_of"]
    assert f"rmle:{headline.chosen['rmle']:.4f}" in shown[WORST_CASE] and shown["rmle"] == ""


def test_an_attack_that_is_called_worst_case_is_not_taken_for_it(tiny_run: RunResult) -> None:
    record = tiny_run.record
    renamed = replace(
        record,
        info={**record.info, "plugins": {**record.info["plugins"], "attacks": [
            {**plugin, "label": WORST_CASE if plugin["label"] == "decoder" else plugin["label"]}
            for plugin in record.info["plugins"]["attacks"]
        ]}},
        cells=record.cells.replace({"attack": {"decoder": WORST_CASE}}),
        per_image=record.per_image.replace({"attack": {"decoder": WORST_CASE}}),
    )  # fmt: skip
    rows = summarise(renamed)
    assert [(row.attack, row.is_worst_case) for row in rows] == [
        ("floor", False), ("rmle", False), (WORST_CASE, False), (WORST_CASE, True)
    ]  # fmt: skip
    assert [row.is_worst_case for row in headline_rows(rows)] == [True]


def test_intervals_contain_their_estimate(tiny_run: RunResult) -> None:
    for row in summarise(tiny_run.record):
        for interval in (row.leak_ratio, row.knn, row.linear, *row.metrics.values()):
            assert interval.low <= interval.value <= interval.high
            assert interval.seeds == 1


def test_means_agree_with_the_results_table(tiny_run: RunResult) -> None:
    cells = tiny_run.table().set_index("attack")
    for row in summarise(tiny_run.record):
        if row.attack in cells.index:
            assert row.leak_ratio.value == pytest.approx(cells.loc[row.attack, "leak_ratio"], abs=1e-5)
            assert row.linear.value == pytest.approx(cells.loc[row.attack, "linear_accuracy"])
    frame = as_frame(summarise(tiny_run.record))
    assert len(frame) == 4 and np.isfinite(frame["leak_ratio_low"]).all()


def test_words_warn_of_what_is_missing(tiny_run: RunResult) -> None:
    rows = summarise(tiny_run.record)
    assert any("1 training seed" in text for text in caveats(tiny_run.record, rows))
    alone = [row for row in rows if row.attack in ("floor", "rmle")]
    assert any("Fewer than two attacks" in text for text in caveats(tiny_run.record, alone))
    assert not any("Fewer than two attacks" in text for text in caveats(tiny_run.record, rows))
    said = sentences(rows, [])
    assert len(said) == 1 and "none (cut 1)" in said[0]


def test_flags_are_caveats_the_first_few_of_a_kind(tiny_run: RunResult) -> None:
    record = tiny_run.record
    many = [{"name": "out-of-time", "sentence": f"Attack {i} was late."} for i in range(7)]
    twice = [{"name": "few-seeds", "sentence": "One seed."}] * 2  # of two sets of victims
    info = {**record.info, "flags": [*many, *twice]}
    found = caveats(replace(record, info=info), summarise(record))
    assert found[:6] == [
        *(f"Attack {i} was late. [out-of-time]" for i in range(4)),
        "3 more of the kind out-of-time are in run.json.",
        "One seed. [few-seeds]",
    ]
    assert found.count("One seed. [few-seeds]") == 1
    assert any("Re-identification not measured" in text for text in found)


def test_recognition_stands_beside_its_levels(tiny_run: RunResult) -> None:
    rows = summarise(tiny_run.record)
    cells = tiny_run.table()
    assert rows[0].metrics["recognised"].value == pytest.approx(cells["recognised"][0])
    assert "reidentified" not in rows[0].metrics
    frame = as_frame(rows)
    assert frame["recognition_ceiling"].iloc[0] == cells["recognition_ceiling"][0]


def test_probes_selected_on_test_images_are_called_optimistic(tiny_run: RunResult) -> None:
    record = tiny_run.record
    evaluation = {**record.info["config"]["evaluation"], "probe_selection": "test"}
    info = {**record.info, "config": {**record.info["config"], "evaluation": evaluation}}
    rows = summarise(record)
    assert not any("optimistic" in text and "Probes" in text for text in caveats(record, rows))
    assert any("Probes were selected on the test images" in text for text in caveats(replace(record, info=info), rows))


def test_a_checkpoint_selected_on_test_images_is_called_optimistic(tiny_run: RunResult) -> None:
    record = tiny_run.record
    training = {**record.info["config"]["training"], "select_on": "test"}
    info = {**record.info, "config": {**record.info["config"], "training": training}}
    rows = summarise(record)
    assert not any("kept checkpoint" in text for text in caveats(record, rows))
    assert any(
        "kept checkpoint was selected on the test images" in t for t in caveats(replace(record, info=info), rows)
    )


@pytest.mark.parametrize(
    ("plugin", "on", "said"),
    [
        ({"name": "taressfl", "checkpoint": "best_knn"}, "test", True),
        ({"name": "ressfl", "preset": "paper"}, "test", True),
        ({"name": "composition", "parts": ["topk_prune", {"name": "taressfl", "preset": "paper"}]}, "test", True),
        ({"name": "taressfl", "checkpoint": "best_knn"}, "validation", False),
        ({"name": "taressfl", "preset": "paper", "checkpoint": "last"}, "test", False),
        ({"name": "taressfl"}, "test", False),
    ],
)
def test_an_expert_selected_on_test_images_is_named(
    plugin: dict[str, Any], on: str, said: bool, tiny_run: RunResult
) -> None:
    record = tiny_run.record
    config = record.info["config"]
    config = {**config, "defenses": [*config["defenses"], plugin], "training": {**config["training"], "select_on": on}}
    found = caveats(replace(record, info={**record.info, "config": config}), summarise(record))
    assert any("expert was selected on the test images" in text for text in found) == said


def test_few_labels_have_intervals_like_the_linear_probe(tiny_run: RunResult) -> None:
    rows = summarise(tiny_run.record)
    interval = rows[0].semi_supervised[0.1]
    assert list(rows[0].semi_supervised) == [0.1]
    assert interval.value == pytest.approx(tiny_run.record.probe["semi_10"].mean())
    assert interval.low < interval.value < interval.high
    assert {"semi_10_accuracy", "semi_10_accuracy_low", "semi_10_accuracy_high"} <= set(as_frame(rows).columns)


def test_guesses_alone_are_never_called_a_leak(tiny_run: RunResult) -> None:
    """Best-of over attacks that ignore the smashed data beats any one guess, and still is no leak."""
    record = tiny_run.record
    guesses = record.per_image.assign(
        attack=record.per_image["attack"].map({"floor": "a", "rmle": "b", "decoder": "c"})
    )
    # each guess is lucky on another third of the victims and bad on the rest: alone worse than the floor
    lucky = guesses["image"] % 3 == guesses["attack"].map({"a": 0, "b": 1, "c": 2})
    guesses["mse"] = guesses["mse_floor"] * np.where(lucky, 0.75, 2.5)
    cells = record.cells.assign(attack=["a", "b", "c"])
    rows = summarise(replace(record, per_image=guesses, cells=cells))
    worst = next(row for row in rows if row.is_worst_case)
    assert worst.leak_ratio.low > 0.02
    assert finding(rows, worst.system) == "blind"
    assert "no attack does better than a blind guess" in sentences(rows, [])[0]


@pytest.mark.parametrize("label", ["none", "control"])
def test_cost_in_accuracy_is_paired_with_the_undefended_system(label: str, tiny_run: RunResult) -> None:
    """The undefended system is the one whose defense is `none`, whatever its label."""
    record = tiny_run.record
    info = json.loads(json.dumps(record.info))
    info["plugins"]["defenses"][0]["label"] = label
    record = replace(
        record,
        info=info,
        probe=record.probe.assign(defense=label),
        per_image=record.per_image.assign(defense=label),
        cells=record.cells.assign(defense=label),
    )
    worse = record.probe.assign(defense="mine", linear=False)
    both = replace(
        record,
        probe=pd.concat([record.probe, worse], ignore_index=True),
        per_image=pd.concat([record.per_image, record.per_image.assign(defense="mine")], ignore_index=True),
        cells=pd.concat([record.cells, record.cells.assign(defense="mine")], ignore_index=True),
    )
    rows = [row for row in summarise(both) if row.is_worst_case]
    assert rows[0].linear_against_none is None
    change = rows[1].linear_against_none
    assert change is not None and change.value == pytest.approx(-record.probe["linear"].mean())
    assert "Against no defense the linear probe changes by -" in sentences(rows, [])[1]


def watched(run: RunResult) -> RunRecord:
    """The same run, and a detector over three seeds: one honest false alarm, one hijacker missed, one that gave up."""
    trainings = [
        (0, "", True, 4), (1, "", False, 4), (2, "", False, 0),
        (0, "fsha", True, 4), (1, "fsha", False, 4), (2, "fsha", True, 4),
        (0, "mine", True, 4), (1, "mine", False, 4), (2, "mine", False, 4),
    ]  # fmt: skip
    table = pd.DataFrame(
        [
            {
                "defense": "guard",
                "cut_layer": 1,
                "target_fraction": 0.0,
                "seed": seed,
                "hijacked_by": hijacker,
                "alarm": alarm,
                "clients_judging": judging,
                "failure": "it broke" if (hijacker, seed) == ("mine", 2) else "",
            }
            for seed, hijacker, alarm, judging in trainings
        ],
        columns=DETECTION_COLUMNS,
    )
    return replace(run.record, detections=table)


def test_detectors_are_counted_over_runs(tiny_run: RunResult) -> None:
    assert detections(tiny_run.record) == []
    fsha, mine = detections(watched(tiny_run))
    assert (fsha.system, fsha.hijacker, mine.hijacker) == ("guard (cut 1)", "fsha", "mine")
    assert str(fsha.detected) == "2 of 3 runs [9, 99] %" and str(mine.detected) == "1 of 2 runs [1, 99] %"
    assert str(fsha.falsely) == str(mine.falsely) == "1 of 3 runs [1, 91] %"
    assert (fsha.undecided, fsha.failed, mine.undecided, mine.failed) == (1, 0, 1, 1)


def test_without_a_hijacker_only_false_alarms_are_counted(tiny_run: RunResult) -> None:
    record = watched(tiny_run)
    honest = replace(record, detections=record.detections[record.detections["hijacked_by"] == ""])
    (row,) = detections(honest)
    assert str(row.detected) == "no run" and row.falsely.of == 3


def test_a_leak_that_few_seeds_neither_show_nor_exclude_is_called_undecided() -> None:
    clear, unclear, none = (made_up({"none": (leak, 0.8)}, seeds=3) for leak in (0.5, 0.01, 0.01))
    unclear.per_image["mse"] *= 1 + 0.05 * (unclear.per_image["seed"] - 1)
    for record, found, words in (
        (clear, "leaks", "the attacks remove"),
        (unclear, "undecided", "a leak is neither shown nor excluded: R may be up to 0.0"),
        (none, "blind", "no attack does better than a blind guess"),
    ):
        rows = summarise(record)
        assert finding(rows, "none (cut 1)") == found and words in sentences(rows, [])[0]
