"""The audit page of a made-up run: two checkpoints, two sets of victims, values that are known."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from mocosfl_priv.errors import RunFailedError
from mocosfl_priv.results import COLUMNS, LEAKAGE_COLUMNS, LINKAGE_RATES, SYSTEM_KEYS, RunRecord, image_key
from reports import write_report
from reports.analysis.linkage import BEFORE
from reports.analysis.summary import ENSEMBLE
from reports.audit.summary import DECODER, audit_caveats, audit_sentences, checkpoint_labels, summarise_audit
from tests.reports.output.test_html import assert_well_formed_and_self_contained

VICTIMS = 12
PAPER = "theirs"  # labels decide nothing
ORIGINS = {"ensemble": ENSEMBLE, PAPER: DECODER}
FLOORS = {"published128": 0.0405, "test": 0.06}
# MSE by checkpoint and attack, as a share of the floor
SHARES = {
    "blind": {"floor": 1.0, PAPER: 1.01, "rmle": 0.995, "ensemble": 1.0},
    "seen": {"floor": 1.0, PAPER: 0.95, "rmle": 0.5, "ensemble": 0.22},
}


def entry(name: str, threshold: float | None, mse: float | None) -> dict[str, Any]:
    logged = {
        "mse": mse,
        "ssim": mse and 0.4539,
        "psnr": mse and 14.88,
        "knn_accuracy": 0.6989,
        "linear_accuracy": None,
    }
    return {
        "name": name,
        "cut_layer": 2,
        "bottleneck": "C4S2",
        "alpha": 2.0,
        "ssim_threshold": threshold,
        "target_fraction": 0.01,
        "source": None,
        "client_parameters": 78_148,
        "notes": ["MIA.log holds 5 finished attacks"],
        "logged": logged,
    }


def made_up(shares: dict[str, dict[str, float]] = SHARES, seeds: int = 2) -> RunRecord:
    rng = np.random.default_rng(0)
    frames, cells, images = [], [], {}
    for victims, floor in FLOORS.items():
        images[f"victims={victims}"] = rng.integers(0, 256, (VICTIMS, 3, 16, 16), dtype=np.uint8)
        for name, attacks in shares.items():
            for attack, share in attacks.items():
                for seed in range(seeds):
                    floors = floor * np.linspace(0.7, 1.3, VICTIMS)
                    values = (
                        share * floors * (1 + 0.001 * (seed - (seeds - 1) / 2))
                    )  # two seeds show little unless alike
                    keys = {"defense": name, "attack": attack, "cut_layer": 2, "target_fraction": 0.01, "seed": seed}
                    cell = {**keys, "victims": victims, "checkpoint": name, "mse": values.mean()}
                    cells.append({**cell, "mse_floor": floor, "attack_out_of_time": False, "failure": ""})
                    measured = {"mse": values, "psnr": -10 * np.log10(values), "ssim": 0.4, "ssim_zeropad": 0.45}
                    places = {"image": np.arange(VICTIMS), "group": np.arange(VICTIMS), "mse_floor": floors}
                    frames.append(
                        pd.DataFrame(
                            {
                                **keys,
                                "victims": victims,
                                **places,
                                **measured,
                                "lpips": np.nan,
                                "recognised": np.nan,
                                "reidentified": np.nan,
                            }
                        )
                    )
                    images[image_key(cell)] = rng.integers(0, 256, (VICTIMS, 3, 16, 16), dtype=np.uint8)
    return RunRecord(
        cells=pd.DataFrame(cells, columns=COLUMNS),
        per_image=pd.concat(frames, ignore_index=True),
        probe=pd.DataFrame(columns=SYSTEM_KEYS),
        training=pd.DataFrame(columns=SYSTEM_KEYS),
        leakage=pd.DataFrame(columns=LEAKAGE_COLUMNS),
        images=images,
        info={
            "name": "release",
            "created": "2025-01-01T00:00:00+00:00",
            "seconds": 12.0,
            "compute": {"device": "cpu", "precision": "float32", "threads": 1},
            "config": {
                "evaluation": {"bootstrap_samples": 50, "confidence": 0.95},
                "attacks": [{"name": "decoder", "label": PAPER, "preset": "paper"}],
            },
            "config_sha256": "c" * 64,
            "seeds": list(range(seeds)),
            "threat_model": {"grants": ["query", "weights"], "adaptive": True},
            "plugins": {
                "attacks": [
                    {"label": label, "origin": ORIGINS.get(label, "mine:Mine"), "blind": label == "floor"}
                    for label in next(iter(shares.values()))
                ]
            },
            "victims": {"published128": "release", "test": "roles"},
            "audit": [entry("blind", 0.6, None), entry("seen", 0.5, 0.0386)],
            "flags": [{"name": "black-box-beats-white-box", "sentence": "black box beats white box on <seen>"}],
            "versions": {"torch": "2.6"},
            "platform": "Linux x86_64",
            "command": "mocosfl-priv audit <folder>",
        },
        config_yaml="name: release\n",
    )


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_report(made_up(), tmp_path_factory.mktemp("audit"))


def test_the_page_is_well_formed_and_needs_nothing_from_outside(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    assert_well_formed_and_self_contained(text)
    assert "&lt;seen&gt;" in text and "mocosfl-priv audit &lt;folder&gt;" in text


def test_the_page_puts_logged_and_measured_values_side_by_side(page: Path) -> None:
    text = re.sub(r"<[^>]+>|\s+", " ", page.read_text(encoding="utf-8"))
    row = re.search(r"cut 2, t 0\.5 +((?:[-\d.]+ +|\[[^\]]+\] +)+)", text)
    assert row is not None
    # floor, logged, paper's attack, worst case; R of the two; SSIM and PSNR as logged and of the two
    assert re.sub(r"\[[^\]]+\]", "", row[1]).split() == [
        "0.0405", "0.0386", "0.0385", "0.0089", "0.050", "0.780", "0.454", "0.450", "0.450", "14.9", "14.2", "20.6",
    ]  # fmt: skip
    assert "MIA.log holds 5 finished attacks" in text and "69.9 %" in text


def test_figures_and_summary_are_kept_as_files(page: Path) -> None:
    names = {path.stem for path in (page.parent / "figures").iterdir()}
    assert "mse_ladder" in names
    # originals, their mosaics, and each checkpoint under the paper's attack and the best one
    assert sum(name.startswith("strip_test_") for name in names) == 1 + 4 + 2 * 2
    for path in (page.parent / "figures").glob("*.png"):
        with Image.open(path) as picture:
            assert picture.width > 100 and picture.convert("L").getextrema() != (255, 255)
    summary = pd.read_csv(page.parent / "summary.csv")
    # the attacks, and before each set of victims the worst case of `blind`, for which rmle is closer than the ensemble
    assert len(summary) == 2 * 2 * 4 + 2
    seen = summary.query("checkpoint == 'seen' and victims == 'test' and attack == 'ensemble'").iloc[0]
    assert seen["leak_ratio"] == pytest.approx(0.78) and seen["logged_mse"] == 0.0386
    assert seen["leak_ratio_low"] < seen["leak_ratio"] < seen["leak_ratio_high"]


def test_sentences_read_logged_values_against_the_floor() -> None:
    blind, seen = audit_sentences(summarise_audit(made_up()))
    assert "logged MSE 0.0386 is at the floor 0.0405: the published attack recovered almost nothing" in seen
    assert "our worst case reaches 0.0089, which removes 78 % [" in seen
    assert "On test images (floor 0.0600)" in seen and "0.0132" in seen
    assert "its authors logged no attack" in blind and "none of our attacks does better" in blind
    record = made_up()
    record.info["audit"][1]["logged"]["mse"] = 0.008
    assert "is 80 % below the floor 0.0405: the published attack recovered image content" in audit_sentences(
        summarise_audit(record)
    )[1]  # fmt: skip


def test_without_an_ensemble_the_worst_case_is_the_closest_attack_of_every_victim() -> None:
    record = made_up({"seen": {"floor": 1.0, PAPER: 0.5, "rmle": 0.5}})
    frame = record.per_image
    odd = frame["image"] % 2 == 1
    frame.loc[odd & (frame["attack"] == "rmle"), "mse"] *= 0.2
    frame.loc[~odd & (frame["attack"] == PAPER), "mse"] *= 0.2
    (checkpoint,) = summarise_audit(record)["test"]
    assert checkpoint.worst is not None and checkpoint.worst.attack == "worst case"
    assert checkpoint.worst.leak_ratio.value == pytest.approx(0.9)
    assert checkpoint.mse_floor == pytest.approx(FLOORS["test"])


def test_guesses_are_no_leak(tmp_path: Path) -> None:
    """Best-of over attacks that see nothing beats any one guess, and still is called none."""
    record = made_up({"blind": {"floor": 1.0, PAPER: 1.0, "rmle": 1.0}})
    frame = record.per_image
    lucky = (frame["image"] % 2 == 1) == (frame["attack"] == "rmle")
    frame["mse"] *= np.where(lucky & (frame["attack"] != "floor"), 0.75, 4.0)
    (checkpoint,) = summarise_audit(record)["test"]
    assert checkpoint.worst is not None and checkpoint.worst.leak_ratio.low > 0.02 and checkpoint.finding == "blind"
    assert "none of our attacks does better than a blind guess" in audit_sentences(summarise_audit(record))[0]
    assert write_report(record, tmp_path).is_file()  # the strip shows the better of the two


def told(record: RunRecord) -> list[str]:
    return audit_caveats(record, summarise_audit(record))


def test_caveats_of_every_audit() -> None:
    said = told(made_up())
    for expected in ("black box beats white box", "not distributed like", "2 attack seeds on clients"):
        assert any(expected in text for text in said)
    assert any("cut 2, t 0.6: on test images no attack beats the floor" in text for text in said)
    assert not any("cut 2, t 0.5" in text for text in said)
    assert not any("attack seed" in text for text in told(made_up(seeds=3)))


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (
            lambda r: {"per_image": r.per_image.assign(mse=r.per_image["mse"] * 0.5)},
            "cut 2, t 0.5: the published attack, run by us, reaches 0.0192 where 0.0386 was logged",
        ),
        (lambda r: {"cells": r.cells.assign(attack_out_of_time=True)}, "reached its time limit"),
        (lambda r: {"info": {**r.info, "threat_model": {"adaptive": False}}}, "was not adaptive"),
        (lambda r: {"per_image": r.per_image[r.per_image["victims"] != "test"]}, "No test images were attacked"),
        (
            lambda r: {"per_image": r.per_image[r.per_image["attack"] != "ensemble"]},
            "cut 2, t 0.5 on test images. The worst case takes",
        ),
        (
            lambda r: {
                "per_image": r.per_image.assign(mse=r.per_image["mse"].where(r.per_image["attack"] != "rmle", 0))
            },
            "rmle alone has a lower MSE (0.0000) than the ensemble (0.0132)",
        ),
    ],
)
def test_caveats_of_some_audits(change: Callable[[RunRecord], dict[str, Any]], expected: str) -> None:
    record = made_up()
    assert not any(expected in text for text in told(record))
    assert any(expected in text for text in told(replace(record, **change(record))))


def test_an_attack_that_failed_takes_no_part() -> None:
    record = made_up()
    failed = record.cells.assign(failure=np.where(record.cells["attack"] == "ensemble", "diverged", ""))
    (_, seen) = summarise_audit(replace(record, cells=failed))["test"]
    assert [row.attack for row in seen.rows] == ["floor", PAPER, "rmle"]
    assert seen.worst is not None and seen.worst.leak_ratio.value == pytest.approx(0.5)
    with pytest.raises(RunFailedError, match="nothing to report"):
        write_report(replace(record, per_image=record.per_image.iloc[:0]), Path("unused"))


def test_labels_say_what_tells_checkpoints_apart() -> None:
    one, other = entry("one", 0.6, None), entry("other", 0.6, None)
    assert checkpoint_labels([one, {**other, "cut_layer": 1}]) == {"one": "cut 2, t 0.6", "other": "cut 1, t 0.6"}
    assert checkpoint_labels([one, {**other, "target_fraction": 0.005}]) == {
        "one": "cut 2, t 0.6, 1 % target",
        "other": "cut 2, t 0.6, 0.5 % target",
    }
    assert checkpoint_labels([one, other]) == {"one": "one", "other": "other"}
    assert checkpoint_labels([one, entry("plain", None, None)]) == {"one": "cut 2, t 0.6", "plain": "plain"}


def test_an_audit_by_blind_attacks_alone_has_a_page(tmp_path: Path) -> None:
    record = made_up({"blind": {"floor": 1.0}, "seen": {"floor": 1.0}})
    record.info["plugins"]["attacks"] = [{"label": "floor", "origin": "attacks.floor:Floor", "blind": True}]
    page = write_report(record, tmp_path).read_text(encoding="utf-8")
    assert "data:image" in page  # the figure of floors


def test_checkpoints_say_whose_photo_a_message_is_of(tmp_path: Path) -> None:
    record = made_up()
    hits = np.arange(VICTIMS) < VICTIMS // 2
    linked = pd.concat(
        [
            pd.DataFrame({"defense": name, "cut_layer": 2, "target_fraction": 0.01, "seed": seed, "victims": "test",
                          "image": np.arange(VICTIMS), "group": np.arange(VICTIMS),
                          **dict.fromkeys(LINKAGE_RATES, hits.astype(float)), "candidates": 2000, "score": "cosine"})
            for name in record.cells["defense"].unique() for seed in record.info["seeds"]
        ],
        ignore_index=True,
    )  # fmt: skip
    record = replace(record, linkage=linked, info={**record.info, "linkage": {"notes": [], "systems": []}})
    text = write_report(record, tmp_path).read_text(encoding="utf-8")
    assert "Whose photo is it: among 2000 candidates, messages are matched 50 % [" in text
    assert_well_formed_and_self_contained(text)
    table = pd.read_csv(tmp_path / "summary.csv")
    assert (table.loc[table["victims"] == "test", "linkage_same"] == 0.5).all()
    assert table.loc[table["victims"] != "test", "linkage_same"].isna().all()


def test_a_record_of_before_linkage_says_that_it_is_not_measured(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    assert BEFORE in text and "<td>not measured</td>" in text
