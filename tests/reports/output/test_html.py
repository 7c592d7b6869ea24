from __future__ import annotations

import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pandas as pd
import pytest
from PIL import Image

from mocosfl_priv.api import RunResult
from mocosfl_priv.results import RunRecord
from reports import write_report
from reports.analysis.summary import as_frame, summarise
from reports.drawing.pictures import shown_victims
from tests.reports.analysis.test_summary import watched

VOID = {"meta", "img", "br", "link", "input", "hr"}


class Checker(HTMLParser):
    """Collects addresses and checks that tags are closed in order."""

    def __init__(self) -> None:
        super().__init__()
        self.addresses: list[str] = []
        self.open: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.addresses += [value or "" for name, value in attrs if name in ("src", "href")]
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


@pytest.fixture(scope="module")
def page(tiny_run: RunResult, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_report(tiny_run.record, tmp_path_factory.mktemp("report"))


@pytest.fixture(scope="module")
def other_page(tiny_run: RunResult, tmp_path_factory: pytest.TempPathFactory) -> str:
    """The page of the same run with a detector, a hostile command line, and no semi-supervised evaluation."""
    record = watched(tiny_run)
    evaluation = {**record.info["config"]["evaluation"], "label_fractions": []}
    info = {
        **record.info,
        "config": {**record.info["config"], "evaluation": evaluation},
        "systems": [{**system, "semi_supervised": {}} for system in record.info["systems"]],
        "command": "<script>alert(1)</script>",
    }
    return write_report(replace(record, info=info), tmp_path_factory.mktemp("other")).read_text(encoding="utf-8")


def assert_well_formed_and_self_contained(text: str) -> None:
    checker = Checker()
    checker.feed(text)
    assert checker.open == []
    assert checker.addresses and all(a.startswith(("data:image/png;base64,", "#")) for a in checker.addresses)
    assert not re.search(r"https?://|<script|@import|url\(", text)


def test_page_is_well_formed_and_needs_nothing_from_outside(page: Path) -> None:
    assert_well_formed_and_self_contained(page.read_text(encoding="utf-8"))


def test_page_shows_configuration_hashes_versions_and_seeds(page: Path, tiny_run: RunResult) -> None:
    text, info = page.read_text(encoding="utf-8"), tiny_run.record.info
    assert info["config_sha256"][:12] in text
    assert "server_batch: 32" in text
    for role, record in info["roles"].items():
        assert role in text and record["content_sha256"][:16] in text
    assert f"torch {info['versions']['torch']}" in text
    assert "<th>recognised</th>" in text and f"chance {100 * info['recognition']['recognition_chance']:.1f} %" in text
    assert "[few-seeds]" in text
    assert "worst case" in text and "LPIPS" in text


def test_few_labels_have_a_table_where_they_were_measured(page: Path, other_page: str, tiny_run: RunResult) -> None:
    text, record = page.read_text(encoding="utf-8"), tiny_run.record
    used = record.info["systems"][0]["semi_supervised"]["semi_10"]["labels"]
    assert "10 % of the labels" in text and f"({used} of {record.info['roles']['probe_train']['images']})" in text
    assert "of the labels" not in other_page


def test_figures_are_pictures(page: Path) -> None:
    names = {path.name for path in (page.parent / "figures").iterdir()}
    assert {"tradeoff.png", "leak_ladder.png", "training.png"} <= names
    assert sum(name.startswith("strip_") for name in names) == 4 + 5  # originals, floor, rmle, decoder, mosaics
    for path in (page.parent / "figures").glob("*.png"):
        with Image.open(path) as picture:
            assert picture.width > 100 and len(picture.convert("RGB").getcolors(1 << 24) or []) > 10


def test_names_from_outside_are_escaped(other_page: str) -> None:
    assert "<script>" not in other_page and "&lt;script&gt;" in other_page


def test_shown_victims_are_evenly_spaced() -> None:
    assert shown_victims(3) == [0, 1, 2]
    assert shown_victims(128)[0] == 0 and shown_victims(128)[-1] == 127 and len(shown_victims(128)) == 10


def test_several_seeds_and_cuts_make_one_summary(tiny_run: RunResult) -> None:
    """A run of three seeds at two cuts, made from one run by shifting its values."""
    record = tiny_run.record
    tables: dict[str, list[pd.DataFrame]] = {"cells": [], "per_image": [], "probe": [], "training": []}
    for seed in range(3):
        for cut in (1, 2):
            for name, frames in tables.items():
                frame = getattr(record, name).assign(seed=seed, cut_layer=cut)
                if name == "per_image":
                    frame["mse"] = frame["mse"] * (1 + 0.2 * seed) / cut
                frames.append(frame)
    merged = {name: pd.concat(frames, ignore_index=True) for name, frames in tables.items()}
    wide = RunRecord(**{**vars(record), **merged, "info": {**record.info, "seeds": [0, 1, 2]}})
    summary = as_frame(summarise(wide))
    assert summary["seeds"].eq(3).all() and len(summary) == 2 * 4
    rmle = summary[(summary["attack"] == "rmle") & (summary["cut_layer"] == 1)].iloc[0]
    single = pd.DataFrame(record.per_image).query("attack == 'rmle'")
    spread = single["mse"].mean() * 0.2 / single["mse_floor"].mean()
    assert rmle["leak_ratio_high"] - rmle["leak_ratio_low"] > spread  # seeds differ, and the interval shows it


def test_page_shows_on_how_many_runs_a_detection_rate_rests(page: Path, other_page: str) -> None:
    assert_well_formed_and_self_contained(other_page)
    assert "<td>fsha</td><td>2 of 3 runs [9, 99] %</td><td>1 of 3 runs [1, 91] %</td>" in other_page
    assert "malicious server" not in page.read_text(encoding="utf-8")


def test_a_sweep_has_every_section(sweep_page: Path) -> None:
    text = sweep_page.read_text(encoding="utf-8")
    assert_well_formed_and_self_contained(text)
    for anchor in re.findall(r'href="#(\w+)"', text):
        assert f'id="{anchor}"' in text
    for words in ("Summary", "Defenses compared with no defense", "By cut layer and target data", "Reliability flags",
                  "Leakage over training time", "from the highest to the median", "SSIM above 0.5"):  # fmt: skip
        assert words in text


def test_the_pdf_has_pages_for_words_charts_and_pictures(sweep_page: Path) -> None:
    content = (sweep_page.parent / "report.pdf").read_bytes()
    assert content.startswith(b"%PDF-") and content.count(b"/Type /Page ") >= 9
