from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from mocosfl_priv.api import RunResult
from mocosfl_priv.errors import ConfigurationError, RunFailedError
from mocosfl_priv.results import (
    CELL_KEYS,
    COLUMNS,
    Destination,
    cell_columns,
    image_key,
    read_record,
    replace_files,
    semi_column,
    write_record,
)


def test_columns_of_the_issue_are_there() -> None:
    wanted = (
        "defense, attack, cut_layer, target_fraction, seed, checkpoint, victims, knn_accuracy, linear_accuracy, mse, "
        "psnr, ssim, ssim_zeropad, lpips, mse_floor, leak_ratio, attack_seconds"
    )
    assert set(wanted.split(", ")) <= set(COLUMNS)


def test_label_fractions_name_their_columns() -> None:
    assert [semi_column(fraction) for fraction in (1.0, 0.1, 0.07, 0.01, 0.005)] == [
        "semi_100", "semi_10", "semi_7", "semi_1", "semi_0.5",
    ]  # fmt: skip
    columns = cell_columns([0.1, 0.01])
    assert columns[columns.index("linear_accuracy") + 1 :][:2] == ["semi_10_accuracy", "semi_1_accuracy"]
    assert [name for name in columns if not name.startswith("semi_")] == cell_columns([]) == COLUMNS


def test_semi_supervised_results_stand_beside_the_linear_probe(tiny_run: RunResult) -> None:
    record = tiny_run.record
    assert record.probe["semi_10"].dtype == bool
    assert record.cells["semi_10_accuracy"].unique() == pytest.approx([record.probe["semi_10"].mean()])
    assert (record.cells["probe_selection"] == "validation").all()
    used = record.info["systems"][0]["semi_supervised"]["semi_10"]
    assert used["labels"] == round(0.1 * record.info["roles"]["probe_train"]["images"]) and 1 <= used["epoch"] <= 100


def test_a_record_reads_back_equal(tiny_run: RunResult, tmp_path: Path) -> None:
    record = tiny_run.record
    write_record(record, tmp_path)
    again = read_record(tmp_path)
    pd.testing.assert_frame_equal(again.cells, record.cells, check_dtype=False)
    pd.testing.assert_frame_equal(again.per_image, record.per_image, check_dtype=False)
    pd.testing.assert_frame_equal(again.probe, record.probe, check_dtype=False)
    assert again.info == json.loads(json.dumps(record.info))
    assert again.images.keys() == record.images.keys()
    assert all(np.array_equal(again.images[key], record.images[key]) for key in again.images)


def test_flags_stand_in_the_rows_they_concern(tiny_run: RunResult, tmp_path: Path) -> None:
    record = tiny_run.record
    assert [flag["name"] for flag in record.info["flags"]][-1] == "few-seeds"
    write_record(replace(record, cells=record.cells.assign(flags=["", "out-of-time;few-seeds", ""])), tmp_path)
    assert read_record(tmp_path).cells["flags"].tolist() == ["", "out-of-time;few-seeds", ""]


def test_rows_agree_with_their_per_image_values(tiny_run: RunResult) -> None:
    record = tiny_run.record
    means = record.per_image.groupby(CELL_KEYS, sort=False)[
        ["mse", "psnr", "ssim", "ssim_zeropad", "recognised", "mse_floor"]
    ].mean()
    for _, row in record.cells.iterrows():
        mean = means.loc[tuple(row[CELL_KEYS])]
        for name in mean.index:
            assert row[name] == pytest.approx(mean[name], rel=1e-5)
        assert row["leak_ratio"] == pytest.approx(1 - mean["mse"] / mean["mse_floor"], abs=1e-5)
        assert image_key(dict(row[CELL_KEYS])) in record.images


@pytest.mark.parametrize("damage", ["run.json", "per_image.parquet", "images.safetensors"])
def test_damaged_or_foreign_folders_are_refused(damage: str, tiny_run: RunResult, tmp_path: Path) -> None:
    write_record(tiny_run.record, tmp_path)
    (tmp_path / damage).write_bytes(b"{damaged")
    with pytest.raises(ConfigurationError, match="cannot be read"):
        read_record(tmp_path)
    (tmp_path / damage).unlink()
    with pytest.raises(ConfigurationError, match=r"is not a run directory|cannot be read"):
        read_record(tmp_path)


def test_other_schema_versions_are_refused(tiny_run: RunResult, tmp_path: Path) -> None:
    write_record(tiny_run.record, tmp_path)
    info = json.loads((tmp_path / "run.json").read_text())
    (tmp_path / "run.json").write_text(json.dumps({**info, "schema_version": 99}))
    with pytest.raises(ConfigurationError, match="schema 99"):
        read_record(tmp_path)


def leftovers(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_destination_appears_as_a_whole(tmp_path: Path) -> None:
    with Destination(tmp_path / "run") as destination:
        assert not (tmp_path / "run").exists()
        destination.commit(lambda folder: (folder / "run.json").touch())
    assert leftovers(tmp_path) == ["run"]


def test_a_failed_write_leaves_nothing(tmp_path: Path) -> None:
    def full_disk(folder: Path) -> None:
        (folder / "half").write_text("written")
        raise OSError(28, "No space left on device")

    with pytest.raises(RunFailedError, match="No space left on device"), Destination(tmp_path / "run") as destination:
        destination.commit(full_disk)
    assert leftovers(tmp_path) == []


def test_an_interrupted_run_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt), Destination(tmp_path / "run"):
        raise KeyboardInterrupt
    assert leftovers(tmp_path) == []


def test_earlier_results_survive_a_failed_overwrite_and_are_replaced_by_a_good_one(tmp_path: Path) -> None:
    def old(folder: Path) -> None:
        (folder / "run.json").write_text("old")

    def fail(folder: Path) -> None:
        raise OSError(28, "No space left on device")

    def new(folder: Path) -> None:
        (folder / "run.json").write_text("new")

    with Destination(tmp_path / "run") as destination:
        destination.commit(old)
    with pytest.raises(RunFailedError), Destination(tmp_path / "run", overwrite=True) as destination:
        destination.commit(fail)
    assert (tmp_path / "run/run.json").read_text() == "old"
    with Destination(tmp_path / "run", overwrite=True) as destination:
        destination.commit(new)
    assert (tmp_path / "run/run.json").read_text() == "new"
    assert leftovers(tmp_path) == ["run"]


def test_occupied_destinations_are_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder/precious").write_text("x")
    with pytest.raises(ConfigurationError, match="is a file"):
        Destination(tmp_path / "file")
    with pytest.raises(ConfigurationError, match="is not empty"):
        Destination(tmp_path / "folder")
    with pytest.raises(ConfigurationError, match="not overwritten"):
        Destination(tmp_path / "folder", overwrite=True)
    with pytest.raises(ConfigurationError, match="cannot be written"), Destination(tmp_path / "file" / "below"):
        pass


def test_replaced_files_keep_the_rest_and_fail_clean(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    (folder / "figures").mkdir(parents=True)
    (folder / "results.csv").write_text("kept")
    (folder / "report.html").write_text("old")

    def write(staging: Path) -> None:
        (staging / "figures").mkdir()
        (staging / "figures/a.png").write_text("new")
        (staging / "report.html").write_text("new")

    def fail(staging: Path) -> None:
        write(staging)
        raise OSError(28, "No space left on device")

    with pytest.raises(RunFailedError, match="No space left"):
        replace_files(folder, fail)
    assert (folder / "report.html").read_text() == "old"
    replace_files(folder, write)
    assert (folder / "report.html").read_text() == (folder / "figures/a.png").read_text() == "new"
    assert (folder / "results.csv").read_text() == "kept"
    assert leftovers(tmp_path) == ["run"]


def test_the_current_folder_may_be_the_destination(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    with Destination(Path()) as destination:
        destination.commit(lambda folder: (folder / "run.json").touch())
    assert (tmp_path / "here/run.json").exists() and leftovers(tmp_path) == ["here"]


def test_a_place_that_cannot_be_replaced_is_refused_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "mount").mkdir()

    def busy(self: Path, target: Path) -> None:
        raise OSError(16, "Device or resource busy")

    monkeypatch.setattr(Path, "rename", busy)  # what a mount point answers; a test may not mount
    with pytest.raises(ConfigurationError, match="choose a new folder below it"), Destination(tmp_path / "mount"):
        pass
    assert leftovers(tmp_path) == ["mount"]


def test_an_interruption_between_the_renames_restores_the_earlier_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with Destination(tmp_path / "run") as destination:
        destination.commit(lambda folder: (folder / "run.json").write_text("old"))
    rename = Path.rename

    def interrupted(self: Path, target: Path) -> Path:
        if ".partial-" in self.name:
            raise KeyboardInterrupt
        return rename(self, target)

    with pytest.raises(KeyboardInterrupt), Destination(tmp_path / "run", overwrite=True) as destination:
        monkeypatch.setattr(Path, "rename", interrupted)
        destination.commit(lambda folder: (folder / "run.json").write_text("new"))
    assert (tmp_path / "run/run.json").read_text() == "old"
    assert leftovers(tmp_path) == ["run"]
