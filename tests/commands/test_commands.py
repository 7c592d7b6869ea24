"""The command as a user runs it: a process of its own, real files, exit codes and what it prints."""

from __future__ import annotations

import re
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import yaml

from mocosfl_priv.cli import main
from mocosfl_priv.commands.devices import device_experiment

GUIDE = Path(__file__).parents[2] / "docs/tasks/own-defense.md"
Run = Callable[..., "subprocess.CompletedProcess[str]"]


@pytest.fixture
def cli(tmp_path: Path) -> Run:
    """Runs `mocosfl-priv` in an empty folder."""

    def run(*words: str, **options: Any) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", "mocosfl_priv.cli", *words],
            cwd=tmp_path, capture_output=True, text=True, timeout=300, check=False, **options,
        )  # fmt: skip

    return run


@pytest.fixture
def in_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Iterator[Run]:
    """The same without the seconds that a new process needs to import torch; for what does not need one."""
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])  # plugins' folders are appended; the next test has others

    def run(*words: str) -> subprocess.CompletedProcess[str]:
        with pytest.raises(SystemExit) as ended:
            main(words)
        printed = capsys.readouterr()
        return subprocess.CompletedProcess(words, int(ended.value.code or 0), printed.out, printed.err)

    yield run
    for number, handler in handlers.items():
        signal.signal(number, handler)


@pytest.fixture
def config(tmp_path: Path, tiny: dict[str, Any]) -> Path:
    """The smallest experiment as a file, without what takes longest."""
    tiny["attacks"] = ["floor", {"name": "rmle", "iterations": 20, "tv": 0.01}]
    tiny["evaluation"] |= {"recognition_epochs": 0, "label_fractions": []}
    tiny["data"] |= {"train_limit": 300}
    path = tmp_path / "tiny.yaml"
    path.write_text(yaml.safe_dump(tiny))
    return path


def one_clear_line(result: subprocess.CompletedProcess[str], code: int) -> str:
    assert result.returncode == code, result.stderr
    assert "Traceback" not in result.stderr and "Traceback" not in result.stdout
    lines = [line for line in result.stderr.splitlines() if line.startswith("mocosfl-priv:")]
    assert len(lines) == 1, result.stderr
    return lines[0]


def test_an_option_under_its_former_name_is_read_with_one_line(in_process: Run, config: Path) -> None:
    result = in_process("run", str(config), "--out", "x", "--checkpoints=x/state")
    assert "--checkpoints is now called --resume-dir; its former name is read for the last time" in result.stderr
    assert result.returncode == 2 and "--resume-dir x/state lies in --out" in result.stderr and not Path("x").exists()


def test_workers_are_no_matter_of_a_cluster(in_process: Run, config: Path) -> None:
    said = one_clear_line(in_process("sweep", str(config), "--out", "x", "--engine", "ray", "--workers", "2"), 2)
    assert "--workers counts processes on this machine" in said and not Path("x").exists()


def guide_block(containing: str) -> str:
    blocks = re.findall(r"```python\n(.*?)```", GUIDE.read_text(encoding="utf-8"), flags=re.DOTALL)
    return next(block for block in blocks if containing in block)


def test_the_defense_of_the_guide_runs_and_appears_in_the_report(
    cli: Run, in_process: Run, config: Path, tmp_path: Path
) -> None:
    source = guide_block("(Defense)")
    assert len(source.splitlines()) <= 35
    class_name = re.search(r"class (\w+)\(Defense\)", source)[1]  # type: ignore[index]
    (tmp_path / "my_defense.py").write_text(source)
    result = cli("run", "tiny.yaml", "--out", "out", "--defense", f"my_defense.py:{class_name}")
    assert result.returncode == 0, result.stderr
    table = pd.read_csv(tmp_path / "out/results.csv")
    assert table["defense"].tolist() == ["none"] * 2 + [class_name] * 2
    assert class_name in (tmp_path / "out/report.html").read_text()
    assert "leak R" in result.stdout and "out/report.html" in result.stdout
    assert "left" in result.stderr  # the progress lines

    again = in_process("run", "tiny.yaml", "--out", "out")
    assert "is not empty" in one_clear_line(again, 2)
    (tmp_path / "out/report.html").unlink()
    assert in_process("report", "out").returncode == 0
    assert class_name in (tmp_path / "out/report.html").read_text()


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["run", "nowhere", "--out", "o"], "unknown configuration (no such file) 'nowhere'"),
        (["run", "tiny.yaml"], "Missing option '--out'"),
        (["run", "tiny.yaml", "--out", "o", "--set", "trainin.clients=2"], "did you mean 'training'"),
        (["run", "tiny.yaml", "--out", "o", "--set", "cut_layers=[7]"], "cut layer 7 is impossible"),
        (["run", "tiny.yaml", "--out", "o", "--defense", "gausian"], "did you mean 'gaussian'"),
        (["run", "tiny.yaml", "--out", "o", "--attack", "no.py:X"], "does not exist"),
        (["run", "tiny.yaml", "--out", "o", "--set", "threat.grants=[query]"], "does not grant"),
        (["run", "tiny.yaml", "--out", "o", "--set", "training.clients=5000"], "5000 clients but only"),
        (["run", "tiny.yaml", "--out", "o", "--set", "data.source=photos"], "overlap"),
        (["run", "tiny.yaml", "--out", "o", "--set", "data.dataset=svhn", "--set", "data.path=."], "download=True"),
        (["validate", "tiny.yaml", "--set", "model.backbone=resnet9"], "did you mean 'resnet8'"),
        (["report", "."], "not a run directory"),
        (["loopback", "tiny.yaml", "--out", "o", "--codec", "int9"], "training.codec: Input should be 'fp32', 'fp16'"),
        (["ls", "attack"], "did you mean 'attacks'"),
        (["dmeo"], "No such command 'dmeo'"),
        (["run", "tiny.yaml", "--out", "/proc/no/place"], "cannot be written"),
    ],
)
def test_unusable_requests_end_with_one_line_and_exit_code_2(
    words: list[str], expected: str, in_process: Run, config: Path, tmp_path: Path
) -> None:
    assert expected in one_clear_line(in_process(*words), 2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["tiny.yaml"]


def test_how_messages_travel_is_part_of_a_served_experiment(config: Path) -> None:
    plain = device_experiment(str(config), None, None, None).config
    assert (plain.training.codec, plain.training.gradient_codec) == ("fp32", "fp32")
    written = ["training.codec=fp16", "training.gradient_codec=fp16"]
    chosen = device_experiment(str(config), written, "int8", None).config
    assert (chosen.training.codec, chosen.training.gradient_codec) == ("int8", "fp16")
    assert chosen.digest != plain.digest


def test_corrupt_and_empty_data_end_with_one_line(
    in_process: Run, config: Path, tmp_path: Path, make_image_folder: Callable[..., Path]
) -> None:
    root = make_image_folder({"train/a": 20, "train/b": 20, "test/a": 20, "test/b": 20})
    words = ["run", "tiny.yaml", "--out", "o", "--set", f"data.dataset=imagefolder:{root}"]
    (root / "train/a/0003.png").write_bytes(b"broken")
    assert "0003.png cannot be read" in one_clear_line(in_process(*words), 2)
    (root / "train/c").mkdir()
    (root / "train/a/0003.png").unlink()
    assert "holds no images" in one_clear_line(in_process(*words), 2)
    assert not (tmp_path / "o").exists()


def test_failed_training_is_exit_code_3_and_writes_nothing(in_process: Run, config: Path, tmp_path: Path) -> None:
    result = in_process("run", "tiny.yaml", "--out", "o", "--set", "training.learning_rate=1e30")
    assert "training diverged" in one_clear_line(result, 3)
    debug = in_process("run", "tiny.yaml", "--out", "o", "--debug", "--set", "training.learning_rate=1e30")
    assert debug.returncode == 3 and "Traceback" in debug.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == ["tiny.yaml"]


def test_a_disk_that_fills_up_leaves_nothing(in_process: Run, config: Path, tmp_path: Path) -> None:
    """A limit on file size is the closest to a full disk that a test may make: writes fail in the kernel."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limits[1]))  # Python ignores the signal that comes with it
    try:
        result = in_process("run", "tiny.yaml", "--out", "o")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert "could not be written" in one_clear_line(result, 3)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["tiny.yaml"]


@pytest.mark.parametrize("signal_number", [signal.SIGINT, pytest.param(signal.SIGTERM, marks=pytest.mark.slow)])
def test_interruption_leaves_nothing(signal_number: int, config: Path, tmp_path: Path) -> None:
    process = subprocess.Popen(
        [sys.executable, "-m", "mocosfl_priv.cli", "run", "tiny.yaml", "--out", "o", "--set", "training.epochs=500"],
        cwd=tmp_path, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert process.stderr is not None
    while "train none" not in process.stderr.readline():
        assert process.poll() is None
    time.sleep(0.5)
    process.send_signal(signal_number)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130 and "interrupted" in errors and "Traceback" not in errors
    assert sorted(path.name for path in tmp_path.iterdir()) == ["tiny.yaml"]


def test_listings_and_help_show_what_there_is(in_process: Run) -> None:
    for kind, names in {
        "attacks": ["decoder", "rmle", "floor", "shadow", "colluder"],
        "defenses": ["none", "taressfl", "gaussian", "bottleneck"],
        "datasets": ["photos", "cifar10", "cifar100", "svhn", "stl10", "imagefolder:PATH"],
        "models": ["resnet18", "resnet50", "vgg13", "mobilenetv2", "vit_tiny", "FILE.py:FUNCTION"],
        "configs": ["demo", "try"],
        "keys": ["name", "training.epochs", "training.replay.threshold"],
        "capabilities": ["client_weights", "query", "auxiliary_data", "server_model", "colluding_client"],
    }.items():
        listed = in_process("ls", kind)
        assert listed.returncode == 0
        assert set(names) <= {line.split(" ")[0] for line in listed.stdout.splitlines() if line.strip()}
    text = in_process("--help").stdout
    for command in ("demo", "new", "try", "run", "report", "validate", "ls", "Exit codes"):
        assert command in text


def test_validate_warns_of_the_short_cut_where_it_is_certain(in_process: Run) -> None:
    non_iid = ["--set", "training.partition=dirichlet", "--set", "training.average_momentum_models=false"]
    warned = in_process("validate", "demo", *non_iid)
    assert warned.returncode == 0
    assert "warning: training.average_momentum_models is false" in warned.stdout
    frozen = in_process("validate", "demo", *non_iid, "--set", "defenses=[taressfl]")
    assert frozen.returncode == 0 and "warning" not in frozen.stdout
    assert "warning" not in in_process("validate", "demo", *non_iid[:2]).stdout


def test_validate_counts_without_training(in_process: Run) -> None:
    result = in_process("validate", "demo")
    assert result.returncode == 0 and "valid: 4 systems" in result.stdout and "12 result rows" in result.stdout
