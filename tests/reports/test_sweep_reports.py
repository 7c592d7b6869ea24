"""One report, one export, one comparison of all variants of a sweep, from what a sweep leaves on the disk."""

from __future__ import annotations

import re
from copy import deepcopy
from dataclasses import replace
from pathlib import Path

import pandas as pd
import pytest

from benchmarks.report import Grid, synthetic_record
from mocosfl_priv.cli import main
from mocosfl_priv.errors import ConfigurationError
from mocosfl_priv.results import RunRecord, StoredRun, read_runs, variant_name, write_record
from reports import compare_runs, export_tables
from reports.analysis.findings_text import caveats
from reports.analysis.run_section import Section, said_of, sections_of
from reports.analysis.side_by_side import side_by_side
from reports.analysis.summary import as_frame
from reports.output.paper_tables import paper_tables
from tests.reports.output.test_html import assert_well_formed_and_self_contained
from tests.reports.output.test_page_in_a_browser import CHROMIUM, assert_quiet_and_narrow

GRID = Grid(
    defenses=("none", "bottleneck"),
    cut_layers=(1,),
    attacks=("floor", "rmle", "decoder"),
    victims=24,
    probes=100,
    pixels=8,
)
VARIANTS = [{"data": data, "codec": codec} for data, codec in (("photos", "32"), ("photos", "8"), ("digits", "32"))]
PHOTOS, ROUNDED = VARIANTS[0], VARIANTS[1]
BROKEN = {"data": "digits", "codec": "8"}  # every attack failed
AWAY = 0.15  # of a blind guess's error that rounding takes from every attack


def variant(data: str, codec: str) -> RunRecord:
    """Where codec is 8, everything as with 32, save that attacks do worse and messages are smaller."""
    record = synthetic_record(GRID, seed=["photos", "digits"].index(data))
    info = deepcopy(record.info)
    info["config"]["evaluation"]["bootstrap_samples"] = 200
    for role in ("client_private", "victims", "probe_test"):
        info["roles"][role] = {**info["roles"]["victims"], "content_sha256": data}
    info["config"]["data"]["dataset"] = data
    record = replace(record, info=info, leakage=record.leakage.iloc[:0])
    if codec == "8":
        info["config"]["training"]["codec"] = "int8"
        record.per_image["mse"] += AWAY * record.per_image["mse_floor"]
        for column in ("smashed_bytes_per_image", "training_megabytes"):
            record.cells[column] /= 4
    if (data, codec) == tuple(BROKEN.values()):
        return replace(record, per_image=record.per_image.iloc[:0], cells=record.cells.assign(failure="no memory"))
    return record


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A sweep's folder, as a sweep writes it."""
    place, tables = tmp_path_factory.mktemp("sweep"), []
    for labels in [*VARIANTS, BROKEN]:
        record = variant(**labels)
        run = place / "runs" / variant_name(labels)
        run.mkdir(parents=True)
        write_record(record, run)
        table = record.cells.copy()
        for column, (axis, label) in enumerate(labels.items()):
            table.insert(column, axis, label)
        tables.append(table)
    (place / "runs" / "data=of-another-day_codec=32").mkdir()  # the table says what belongs to the sweep
    pd.concat(tables).to_csv(place / "results.csv", index=False)
    return place


@pytest.fixture(scope="module")
def runs(folder: Path) -> list[StoredRun]:
    return read_runs(folder)


@pytest.fixture(scope="module")
def sections(runs: list[StoredRun]) -> list[Section]:
    return sections_of(runs)


@pytest.fixture(scope="module")
def page(folder: Path) -> Path:
    with pytest.raises(SystemExit) as ended:
        main(["report", str(folder)])
    assert not ended.value.code
    return folder / "report.html"


def test_a_sweep_is_read_with_its_labels_as_they_were_written(runs: list[StoredRun]) -> None:
    assert [run.labels for run in runs] == [*VARIANTS, BROKEN]  # "8" is no number
    assert runs[1].record.info["config"]["training"]["codec"] == "int8"


def test_a_sweep_of_one_experiment_is_that_run(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "mine").symlink_to(folder / "runs" / variant_name(PHOTOS))
    record = read_runs(tmp_path / "runs" / "mine")[0].record
    record.cells.to_csv(tmp_path / "results.csv", index=False)
    (run,) = read_runs(tmp_path)
    assert run.labels == {} and len(run.record.cells) == len(record.cells)
    (tmp_path / "runs" / "older").symlink_to(folder / "runs" / variant_name(ROUNDED))
    with pytest.raises(ConfigurationError, match="holds 2 runs: give the path of one"):
        read_runs(tmp_path)


def test_a_variant_that_is_gone_is_named(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "runs").mkdir()
    (tmp_path / "results.csv").write_bytes((folder / "results.csv").read_bytes())
    with pytest.raises(ConfigurationError, match="data=photos_codec=32 is not a run directory"):
        read_runs(tmp_path)


def test_one_page_has_all_variants(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    assert_well_formed_and_self_contained(text)
    assert "3 variants along data, codec" in text and '<a href="#beside">' in text
    assert "data digits, codec 8: no attack succeeded, so this variant is missing from the report." in text
    assert "<th>data</th><th>codec</th>" in text and "<td>photos</td><td>8</td>" in text
    figures = {path.name for path in (page.parent / "figures").glob("*.png")}
    assert {f"tradeoff_data_{v['data']}__codec_{v['codec']}.png" for v in VARIANTS} < figures
    assert "side_by_side.png" in figures and not any(name.startswith("heat_maps") for name in figures)
    assert (page.parent / "report.pdf").read_bytes().startswith(b"%PDF")


@pytest.mark.skipif(not CHROMIUM, reason="no Chromium on the path")
def test_a_browser_shows_the_page_without_errors(page: Path, tmp_path: Path) -> None:
    assert_quiet_and_narrow(page, tmp_path)


def test_numbers_are_those_of_each_variant_by_itself(page: Path, sections: list[Section]) -> None:
    text = {"data": str, "codec": str}
    together = pd.read_csv(page.parent / "summary.csv", dtype=text, keep_default_na=False, na_values=[""])
    for section in sections:
        alone = as_frame(section.rows)
        mine = together[(together["data"] == section.labels["data"]) & (together["codec"] == section.labels["codec"])]
        numbers = alone.columns.drop(["guarantee", "worst_case_of"])
        pd.testing.assert_frame_equal(mine[numbers].reset_index(drop=True), alone[numbers], check_dtype=False)


def test_a_run_without_axes_has_none_of_it(sweep_page: Path) -> None:
    text = sweep_page.read_text(encoding="utf-8")
    assert "Side by side" not in text and "variants along" not in text and "configuration " in text
    assert (sweep_page.parent / "figures" / "tradeoff.png").is_file()
    assert pd.read_csv(sweep_page.parent / "leaderboard.csv").columns[0] == "defense"


def test_only_the_same_images_are_paired(sections: list[Section]) -> None:
    lines = side_by_side(sections).lines
    compared = {(line.section.name, line.reference.name if line.reference else "") for line in lines}
    assert compared == {
        ("data photos, codec 32", ""),
        ("data photos, codec 8", "data photos, codec 32"),
        ("data digits, codec 32", ""),
    }
    apart = deepcopy(sections[1].record.info)
    apart["config"]["training"]["partition"] = "classes_per_client"
    other = replace(sections[1], record=replace(sections[1].record, info=apart))
    assert all(line.reference is None for line in side_by_side([sections[0], other]).lines)


def test_the_difference_is_that_of_paired_images(sections: list[Section]) -> None:
    found = side_by_side(sections[:2])
    line = next(line for line in found.lines if line.reference is not None and line.row.defense == "bottleneck")
    informed = [
        s.record.per_image.query("defense == 'bottleneck' and attack != 'floor'").groupby(["seed", "image"])
        for s in (sections[1], sections[0])
    ]
    mine, theirs = (images["mse"].min() for images in informed)
    expected = -(mine - theirs).mean() / informed[0]["mse_floor"].first().mean()
    assert line.comparison is not None and line.comparison.leak is not None
    assert line.comparison.leak.value == pytest.approx(expected) == pytest.approx(-AWAY, abs=1e-9)
    assert line.finding == "leaks less" and line.comparison.linear.value == 0
    assert "Of 2 comparisons 2 show a difference" in found.statement


def test_accuracy_leakage_and_bytes_stand_side_by_side(sections: list[Section]) -> None:
    four, one = (line.cells() for line in side_by_side(sections[:2]).lines if line.row.defense == "none")
    assert four[:5] == ["photos", "32", "none", "1", "–"] and one[1] == "8"
    sizes = [float(cells[10].replace(",", "")) for cells in (four, one)]
    assert sizes[1] == pytest.approx(sizes[0] / 4, rel=1e-3)
    assert four[12:] == ["–"] * 4 and one[14] == "leaks less"


def test_what_is_said_of_all_is_said_once(sections: list[Section]) -> None:
    said = said_of(sections, lambda s: ["of all", f"of {s.labels['data']}"])
    assert said[0] == "of all" and said[1] == "data photos, codec 32: of photos" and len(said) == 4
    assert said_of(sections[:1], lambda _: ["one", "two"]) == ["one", "two"]


def test_a_codec_is_a_caveat_of_its_variant(sections: list[Section]) -> None:
    whole, rounded = (caveats(s.record, s.rows) for s in sections[:2])
    assert not any("are sent as" in text for text in whole)
    (said,) = [text for text in rounded if "are sent as" in text]
    assert said.startswith("Smashed data are sent as int8, gradients as fp32") and "decoded messages" in said
    everywhere = said_of(sections, lambda s: caveats(s.record, s.rows))
    assert [text for text in everywhere if "are sent as" in text] == [f"data photos, codec 8: {said}"]


def test_tables_of_papers_have_a_column_per_axis(runs: list[StoredRun]) -> None:
    accuracies, defenses, communication, client = paper_tables(runs)
    assert list(accuracies.headings[:3]) == ["data", "codec", "method"] and len(accuracies.lines) == 3
    assert [line[:2] for line in accuracies.lines] == [list(labels.values()) for labels in VARIANTS]
    assert len(defenses.lines) == len(communication.lines) == len(client.lines) == 6


def test_files_hold_all_variants(runs: list[StoredRun], tmp_path: Path) -> None:
    files = {form: tmp_path / f"t.{form}" for form in ("csv", "parquet", "latex", "markdown")}
    export_tables(runs, files)
    rows, images = pd.read_csv(files["csv"], dtype={"codec": str}), pd.read_parquet(files["parquet"])
    assert len(rows) == sum(len(run.record.cells) for run in runs)
    assert rows[["data", "codec"]].drop_duplicates().to_dict("records") == [*VARIANTS, BROKEN]
    assert (rows["client_energy_joules"] == "not measured").all()
    assert len(images) == sum(len(run.record.per_image) for run in runs) and list(images.columns[:2]) == [
        "data",
        "codec",
    ]
    assert "| data | codec | system |" in files["markdown"].read_text()


def test_sweeps_are_compared_variant_by_variant(runs: list[StoredRun]) -> None:
    assert all(line.finding == "no difference shown" for line in compare_runs(runs, runs).lines)
    worse = [replace(run, record=replace(run.record, per_image=run.record.per_image.copy())) for run in runs]
    worse[2].record.per_image["mse"] *= 0.5
    found = compare_runs(runs, worse[1:])
    changed = {(*line.labels.values(),) for line in found.lines if line.finding == "the second leaks more"}
    assert changed == {("digits", "32")} and found.headings[:3] == ["data", "codec", "system"]
    assert len(found.lines[0].cells()) == len(found.headings)
    assert found.notes[-1] == "Only the first has: data photos, codec 32."
    with pytest.raises(ConfigurationError, match="the first has axes data, codec and the second has no axes"):
        compare_runs(runs, [StoredRun({}, runs[0].record)])


@pytest.mark.slow
def test_a_sweep_over_codecs_ends_with_one_report(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A real one, of four codecs: bytes are those of the messages, and victims are the same."""
    out = tmp_path / "codecs"
    with pytest.raises(SystemExit) as ended:
        main(["sweep", "sweep/codecs", "--out", str(out), "--set", "attacks=[floor, {name: decoder, steps: 20}]"])
    assert not ended.value.code and f"report of all variants: {out / 'report.html'}" in capsys.readouterr().out
    runs = read_runs(out)
    lines = {line.section.labels["codec"]: line for line in side_by_side(sections_of(runs)).lines}
    assert list(lines) == ["fp32", "fp16", "int8", "int8-both-ways"]
    sizes = {name: line.row.cost["smashed_bytes_per_image"] for name, line in lines.items()}
    numbers = sizes["fp32"] / 4
    channels = runs[0].record.info["systems"][0]["smashed_shape"][0]
    assert sizes["fp16"] == pytest.approx(2 * numbers, abs=8) and sizes["int8"] == numbers + 4 * channels
    assert all(lines[name].comparison is not None for name in list(lines)[1:])
    text = (out / "report.html").read_text(encoding="utf-8")
    assert "Smashed data are sent as int8, gradients as int8" in text and "<td>int8-both-ways</td>" in text
    assert not re.search(r"\bnan\b", text)
