"""Places are checked first and held to the end; names of a user's own fit into files."""

from __future__ import annotations

import multiprocessing
import shutil
from collections import namedtuple
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from mocosfl_priv.api import Experiment, Sweep
from mocosfl_priv.config import parse_config, parse_yaml
from mocosfl_priv.errors import ConfigurationError, RunFailedError
from mocosfl_priv.experiment.train import checkpoints_of
from mocosfl_priv.plugins import DEFENSES
from mocosfl_priv.results import Destination, read_runs, short_name, variant_name
from mocosfl_priv.results.record import LONGEST_NAME
from mocosfl_priv.runtime.files import Lock
from tests.interruption import Interruption


def test_a_second_run_into_one_folder_is_refused_until_the_first_has_ended(tmp_path: Path) -> None:
    with Destination(tmp_path / "out") as first:
        for overwrite in (False, True):
            with pytest.raises(
                ConfigurationError, match=r"out: another run is at work for this folder \(process \d+\)"
            ):
                Destination(tmp_path / "out", overwrite).__enter__()
        first.commit(lambda folder: (folder / "run.json").write_text("{}"))
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    with Destination(tmp_path / "out", overwrite=True):
        pass
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_results_are_kept_where_somebody_else_has_filled_the_folder_meanwhile(tmp_path: Path) -> None:
    with Destination(tmp_path / "out") as destination:
        (tmp_path / "out").mkdir()
        (tmp_path / "out" / "theirs.txt").write_text("theirs")
        with pytest.raises(RunFailedError, match="the results of this run are in"):
            destination.commit(lambda folder: (folder / "ours.txt").write_text("ours"))
    kept = next(path for path in tmp_path.iterdir() if path.name != "out")
    assert (kept / "ours.txt").is_file() and (tmp_path / "out" / "theirs.txt").is_file()


def test_a_full_disk_is_found_before_anything_is_trained(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(2**40, 2**40 - 2**26, 80 * 2**20))
    with Destination(tmp_path / "out") as destination, pytest.raises(ConfigurationError, match="disk has 80 MB left"):
        destination.require_room(2**30)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(2**40, 2**40, 1000))
    with pytest.raises(ConfigurationError, match="disk has 0 MB left, and 64 MB may be needed"):
        Destination(tmp_path / "out").__enter__()
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["n" * 300, "file/below"])
def test_places_that_cannot_be_written_are_refused_first(name: str, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigurationError, match="cannot be written"):
        Destination(tmp_path / name).__enter__()


def _hold(path: Path, ready: Any, leave: Any) -> None:
    with Lock(path):
        ready.set()
        leave.wait(30)


def test_a_lock_ends_with_its_process(tmp_path: Path) -> None:
    context = multiprocessing.get_context("spawn")
    ready, leave = context.Event(), context.Event()
    holder = context.Process(target=_hold, args=(tmp_path / "lock", ready, leave))
    holder.start()
    assert ready.wait(60)
    with pytest.raises(BlockingIOError, match=f"process {holder.pid}"):
        Lock(tmp_path / "lock").__enter__()
    holder.kill()
    holder.join()
    with Lock(tmp_path / "lock"):
        assert (tmp_path / "lock").is_file()  # the one that the dead process has left
    assert not (tmp_path / "lock").exists()


def test_checkpoints_are_held_too(tiny: dict[str, Any], tmp_path: Path) -> None:
    with Lock(tmp_path / "lock"), pytest.raises(ConfigurationError, match="checkpoints: another run is at work in"):
        Experiment.from_dict(tiny).run(checkpoints=tmp_path)


def test_checkpoints_of_another_training_say_which_key_and_threads_do_not_matter(
    tiny: dict[str, Any], tmp_path: Path
) -> None:
    tiny |= {"attacks": ["floor"], "compute": {"device": "cpu", "threads": 1}}
    tiny["evaluation"] |= {"recognition_epochs": 0, "label_fractions": []}
    tiny["training"] |= {"epochs": 2}
    with pytest.raises(KeyboardInterrupt):  # after the first step of the second epoch
        Experiment.from_dict(tiny).run(Interruption(20), tmp_path)
    assert list(tmp_path.glob("*/step_*"))

    def refusal(**changes: Any) -> str:
        document = {**tiny, **{name: {**tiny.get(name, {}), **value} for name, value in changes.items()}}
        plan = Experiment.from_dict(document).plan()
        with pytest.raises(ConfigurationError) as refused:
            checkpoints_of(plan.laboratory, plan.systems[0], tmp_path).verify()  # type: ignore[union-attr]
        return str(refused.value)

    assert "training.epochs is 2 in the checkpoint and 4 here; learning rates depend" in refusal(training={"epochs": 4})
    assert "model.norm is group in the checkpoint and layer here" in refusal(model={"norm": "layer"})
    assert "roles.victims is" in refusal(data={"victims": 15})
    several = refusal(training={"ema": 0.9, "momentum": 0.5, "temperature": 0.2, "sync_period": 3, "queue_size": 64})
    assert several.count(" in the checkpoint and ") == 4 and "and 1 more differ" in several
    tiny["compute"] = {"device": "cpu", "threads": 2}
    assert len(Experiment.from_dict(tiny).run(checkpoints=tmp_path).record.training) > 0


def test_ordinary_axes_with_long_values_fit_into_file_names(tiny: dict[str, Any], tmp_path: Path) -> None:
    tiny |= {"attacks": ["floor"], "compute": {"device": "cpu"}}
    tiny["evaluation"] |= {"recognition_epochs": 0, "label_fractions": []}
    axes = {
        f"{axis}-of-the-clients-in-this-study": {f"{'a-long-and-telling-value-' * 2}{axis}": {key: value}}
        for axis, key, value in (
            ("momentum", "training.momentum", 0.5),
            ("weight-decay", "training.weight_decay", 1e-3),
            ("temperature", "training.temperature", 0.2),
            ("synchronisation", "training.sync_period", 2),
        )
    }
    path = tmp_path / "long.yaml"
    path.write_text(yaml.safe_dump({**tiny, "axes": axes}))
    result = Sweep.from_yaml(path).run(tmp_path / "out")
    (name,) = result.runs
    assert len(name.encode()) <= LONGEST_NAME and (tmp_path / "out" / "runs" / name / "results.csv").is_file()
    (stored,) = read_runs(tmp_path / "out")
    assert len("_".join(f"{axis}={label}" for axis, label in stored.labels.items())) > 255


@given(st.lists(st.text(st.characters(categories=["L", "N"]), max_size=200), min_size=2, max_size=2, unique=True))
def test_short_names_stay_distinct_and_short(names: list[str]) -> None:
    first, second = (short_name(name, 80) for name in names)
    assert first != second and len(first.encode()) <= 80 and len(second.encode()) <= 80
    labels = {f"axis{place}": name for place, name in enumerate(names)}
    assert len(variant_name(labels).encode()) <= LONGEST_NAME


@pytest.mark.parametrize("labels", [("a b", "a_b"), ("Strong", "strong"), ("x" * 300, "y" * 300)])
def test_labels_become_file_names_that_differ(labels: tuple[str, str], tiny: dict[str, Any]) -> None:
    tiny["defenses"] = [{"name": "gaussian", "sigma": sigma, "label": label} for sigma, label in enumerate(labels, 1)]
    experiment = Experiment.from_dict(tiny)
    if len(labels[0]) > 100:
        stems = {system.file_stem for system in experiment.plan().systems}
        assert len(stems) == 2 and all(len(stem.encode()) < 200 for stem in stems)
    else:
        with pytest.raises(ConfigurationError, match="would leave files of one name"):
            experiment.plan()


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("training: {clients: 010}", "training.clients: 010 is 8 in YAML"),
        ("training: {clients: 1:10}", "training.clients: 1:10 is 70 in YAML"),
        ("training: {learning_rate: 1:10.5}", "training.learning_rate: 1:10.5 is 70.5 in YAML"),
        ("seeds: [0, 010]", "seeds.1: 010 is 8 in YAML"),
        ("defenses: [none, {name: gaussian, sigma: 01}]", "defenses.1.sigma: 01 is 1 in YAML"),
        ("training: {clients: true}", "training.clients: true is no number"),
        ("training: {learning_rate: on}", "training.learning_rate: true is no number"),
        ("training: {micro_batch: off}", "training.micro_batch: false is no number"),
        ("seeds: [yes]", "seeds: [true] is no number"),
        ("training: {weight_decay: .inf}", "training.weight_decay: Input should be a finite number"),
        ("name: ..", "name: String should match"),
        ("name: 2026-13-45", "not valid YAML: month must be in 1..12"),
    ],
)
def test_numbers_are_what_they_look_like_or_refused_with_their_key(text: str, said: str) -> None:
    with pytest.raises(ConfigurationError) as refused:
        parse_config(parse_yaml(text, "my.yaml"), where="my.yaml")
    assert f"my.yaml: {said}" in str(refused.value)


def test_settings_of_the_command_line_and_of_plugins_are_read_alike() -> None:
    with pytest.raises(ConfigurationError, match=r"--set training\.clients: 010 is 8 in YAML"):
        parse_config({}, ["training.clients=010"])
    (defense,) = parse_config({"defenses": [{"name": "gaussian", "sigma": True}]}).defenses
    with pytest.raises(ConfigurationError, match="'gaussian': sigma: true is no number"):
        DEFENSES.create(defense)


@settings(max_examples=300)
@given(
    st.one_of(
        st.integers(-5, 2000).map(str),
        st.from_regex(r"[-+]?0[0-9]{1,4}", fullmatch=True),
        st.from_regex(r"[0-9]{1,2}:[0-9]{2}(:[0-9]{2})?", fullmatch=True),
        st.floats(-10, 1e4, allow_nan=False).map(str),
        st.sampled_from(["true", "no", "On", "~", "null", ".nan", "-.inf", "1_000", "0x10", "1e3", "'12'", "12 ",
                         "2026-11-27", "[]", "{}", "[3]", "twelve", "!!int 3", "0b11", "0o14", "1.", "+7", "۳"]),
    )
)  # fmt: skip
def test_every_scalar_is_the_number_that_people_read_or_refused_with_its_key(text: str) -> None:
    try:
        read = parse_config(parse_yaml(f"training: {{clients: {text}}}", "x.yaml"), where="x.yaml").training.clients
    except ConfigurationError as error:
        assert str(error).startswith(("x.yaml: training.clients", "x.yaml: not valid YAML")), error
    else:
        special = {"1_000": 1000, "0x10": 16, "'12'": 12, "12 ": 12, "!!int 3": 3, "0b11": 3, "1e3": 1000, "۳": 3}
        assert read == special.get(text, float(text) if text not in special else None)
