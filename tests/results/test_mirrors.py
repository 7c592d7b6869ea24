"""Mirrors: what was written is read back by the readers of those for whom it is."""

from __future__ import annotations

import math
import os
import shutil
import signal
import subprocess
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from benchmarks.report import Grid, synthetic_record
from mocosfl_priv.cli import main
from mocosfl_priv.deployment.loopback import free_port
from mocosfl_priv.errors import ConfigurationError, RunFailedError
from mocosfl_priv.results import CELL_KEYS, RunRecord, read_record, write_record
from mocosfl_priv.results.mirrors import MLflow, TensorBoard, curves, flattened, name_of, outcomes

GRID = Grid(
    defenses=("none", "bottleneck"), cut_layers=(1,), attacks=("floor", "decoder"), seeds=(3,), victims=4, pixels=8
)
SYSTEMS = [f"{defense}_cut_layer1_target_fraction0_seed3" for defense in GRID.defenses]


@pytest.fixture
def stored(tmp_path: Path) -> tuple[RunRecord, Path]:
    """A run of two systems, as read from its folder, one of its attacks failed, with a figure and a page."""
    made_up = synthetic_record(GRID)
    made_up.cells.loc[0, "mse"] = math.nan
    made_up.cells.loc[0, "failure"] = "no memory"
    folder = tmp_path / "first run"
    (folder / "figures").mkdir(parents=True)
    write_record(made_up, folder)
    Image.fromarray(np.arange(60, dtype=np.uint8).reshape(4, 5, 3)).save(folder / "figures" / "leak.png")
    (folder / "report.html").write_text("<p>the page</p>")
    return read_record(folder), folder


def events(folder: Path) -> Any:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    found = EventAccumulator(str(folder))
    found.Reload()
    return found


def test_names_are_folders_and_differ(stored: tuple[RunRecord, Path]) -> None:
    record, _ = stored
    names = [name_of(outcome.keys) for outcome in outcomes(record)]
    assert len(set(names)) == len(record.cells) == 4
    assert name_of({"defense": "a/b ../(c=1)", "seed": 3}) == "a_b_..__c_1__seed3"
    assert [name_of(curve.keys) for curve in curves(record)] == SYSTEMS
    assert flattened({"a": {"b": [1, 2], "c": {"d": None}}, "e": 1}) == {"a.b": [1, 2], "a.c.d": None, "e": 1}


def test_an_audit_without_training_or_target_fraction(stored: tuple[RunRecord, Path]) -> None:
    record, _ = stored
    record.cells["target_fraction"] = math.nan
    record.training = record.training[:0]
    found = curves(record)
    assert len(found) == 2
    assert all("target_fraction" not in curve.keys and not list(curve.values()) for curve in found)
    assert [outcome.system for outcome in outcomes(record)] == [curve.keys for curve in found for _ in GRID.attacks]


def test_tensorboard_reads_what_the_run_holds(stored: tuple[RunRecord, Path], tmp_path: Path) -> None:
    record, folder = stored
    TensorBoard(tmp_path / "logs").show(record, folder)
    place = tmp_path / "logs" / "first run"
    for system, (_, rows) in zip(SYSTEMS, record.training.groupby("defense", sort=False), strict=True):
        training = events(place / system)
        for name in ("loss", "validation_knn"):
            found = [(event.step, event.value) for event in training.Scalars(name)]
            assert found == [(step, pytest.approx(value)) for step, value in zip(rows["step"], rows[name], strict=True)]
    for index, row in enumerate(record.cells.to_dict("records")):
        cell = events(place / SYSTEMS[index // 2] / f"{row['attack']}_test")
        assert cell.Scalars("linear_accuracy")[0].value == pytest.approx(row["linear_accuracy"])
        assert ("mse" in cell.Tags()["scalars"]) == (index > 0)
        assert index == 0 or cell.Scalars("mse")[0].value == pytest.approx(row["mse"])
        assert hyperparameters(cell) == {key: row[key] for key in CELL_KEYS}
    (image,) = events(place).Images("figures/leak")
    (tmp_path / "back.png").write_bytes(image.encoded_image_string)
    shown, drawn = (np.asarray(Image.open(path)) for path in (tmp_path / "back.png", folder / "figures" / "leak.png"))
    assert np.array_equal(shown, drawn)
    with pytest.raises(ConfigurationError, match="would show both runs"):
        TensorBoard(tmp_path / "logs").show(record, folder)


def hyperparameters(cell: Any) -> dict[str, Any]:
    from tensorboard.plugins.hparams.metadata import SESSION_START_INFO_TAG, parse_session_start_info_plugin_data

    content = cell.SummaryMetadata(SESSION_START_INFO_TAG).plugin_data.content
    fields = parse_session_start_info_plugin_data(content).hparams.items()
    return {
        name: value.string_value if value.HasField("string_value") else value.number_value for name, value in fields
    }


def test_an_unwritable_place_is_named(stored: tuple[RunRecord, Path], tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(RunFailedError, match="could not be written: Not a directory"):
        TensorBoard(tmp_path / "file").show(*stored)


def test_the_command(stored: tuple[RunRecord, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    _, folder = stored
    words = ["mirror", str(folder), "--tensorboard", str(tmp_path / "logs")]
    for arguments, code, expected in [
        (words, 0, "copied to"),
        (words, 2, "would show both runs"),
        (words[:2], 2, "no destination"),
        (["mirror", str(tmp_path), *words[2:]], 2, "not a run directory"),
    ]:
        with pytest.raises(SystemExit) as ended:
            main(arguments)
        printed = capsys.readouterr()
        assert ended.value.code == code
        assert expected in (printed.err or printed.out) and len((printed.err + printed.out).splitlines()) == 1
    assert events(tmp_path / "logs" / folder.name / SYSTEMS[0]).Tags()["scalars"] == ["loss", "validation_knn"]


def server_command() -> str:
    """`mlflow` of an installation that has the server: this one's, or that of MLFLOW_COMMAND."""
    command = os.environ.get("MLFLOW_COMMAND") or shutil.which("mlflow")
    if command is None:
        pytest.skip("no mlflow command; install mlflow somewhere and set MLFLOW_COMMAND to it")
    return command


@pytest.fixture
def tracking(tmp_path: Path) -> Iterator[str]:
    """A real tracking server on a loopback port."""
    pytest.importorskip("mlflow", reason="mocosfl-priv[mlflow] is not installed")
    port = free_port()
    command = [
        server_command(), "server", "--host", "127.0.0.1", "--port", str(port), "--workers", "1",
        "--backend-store-uri", f"sqlite:///{tmp_path}/mlflow.db",
        "--artifacts-destination", str(tmp_path / "artifacts"),
    ]  # fmt: skip
    settings = {"DO_NOT_TRACK": "1", "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}  # jobs would outlive the server
    with (tmp_path / "server.log").open("wb") as log:
        process = subprocess.Popen(
            command, cwd=tmp_path, stdout=log, stderr=log, env=os.environ | settings, start_new_session=True
        )
        try:
            wait_for(f"http://127.0.0.1:{port}", process, tmp_path / "server.log")
            yield f"http://127.0.0.1:{port}"
        finally:
            os.killpg(process.pid, signal.SIGTERM)  # it has workers of its own
            process.wait(60)


def wait_for(uri: str, process: subprocess.Popen[bytes], log: Path) -> None:
    until = time.monotonic() + 120
    while time.monotonic() < until:
        assert process.poll() is None, log.read_text()
        try:
            with urllib.request.urlopen(f"{uri}/health", timeout=2) as answer:
                assert answer.status == 200
                return
        except OSError:
            time.sleep(0.5)
    raise AssertionError(log.read_text())


@pytest.mark.slow
def test_mlflow_has_a_run_in_a_run_in_a_run(tracking: str, stored: tuple[RunRecord, Path], tmp_path: Path) -> None:
    from mlflow import MlflowClient
    from mlflow.artifacts import download_artifacts

    record, folder = stored
    MLflow(tracking).show(record, folder)
    client = MlflowClient(tracking)
    experiment = client.get_experiment_by_name(record.info["config"]["name"])
    assert experiment is not None
    found = client.search_runs([experiment.experiment_id])
    assert len(found) == 1 + 2 + 4 and {run.info.status for run in found} == {"FINISHED"}
    runs = {(run.data.tags.get("mlflow.parentRunId"), run.info.run_name): run for run in found}
    outer = runs[None, "first run"]
    assert outer.data.params == {key: str(value) for key, value in flattened(record.info["config"]).items()}
    systems = [runs[outer.info.run_id, name] for name in SYSTEMS]
    for system, (_, rows) in zip(systems, record.training.groupby("defense", sort=False), strict=True):
        history = client.get_metric_history(system.info.run_id, "loss")
        assert [(point.step, point.value) for point in history] == list(zip(rows["step"], rows["loss"], strict=True))
    for index, row in enumerate(record.cells.to_dict("records")):
        cell = runs[systems[index // 2].info.run_id, f"{row['attack']}_test"]
        assert cell.data.params == {key: str(row[key]) for key in CELL_KEYS}
        assert cell.data.metrics["linear_accuracy"] == pytest.approx(row["linear_accuracy"])
        assert ("mse" in cell.data.metrics) == (index > 0)
    assert {file.path for file in client.list_artifacts(outer.info.run_id)} == {"report.html", "leak.png"}
    back = download_artifacts(run_id=outer.info.run_id, artifact_path="report.html", tracking_uri=tracking)
    assert Path(back).read_bytes() == (folder / "report.html").read_bytes()


@pytest.mark.slow
def test_a_server_that_is_not_there_is_named(stored: tuple[RunRecord, Path]) -> None:
    pytest.importorskip("mlflow", reason="mocosfl-priv[mlflow] is not installed")
    uri = f"http://127.0.0.1:{free_port()}"
    with pytest.raises(RunFailedError, match=f"MLflow at {uri}"):
        MLflow(uri).show(*stored)
