"""Places are checked first and held to the end; names of a user's own fit into files."""

from __future__ import annotations

import multiprocessing
import os
import re
import shutil
from collections import namedtuple
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from mocosfl_priv.api import Experiment, Sweep
from mocosfl_priv.commands.options import config_path
from mocosfl_priv.config import load_config, parse_config, parse_yaml
from mocosfl_priv.errors import ConfigurationError, RunFailedError
from mocosfl_priv.experiment.disk import checkpoint_bytes, result_bytes
from mocosfl_priv.experiment.run import run_plan
from mocosfl_priv.experiment.train import checkpoints_of
from mocosfl_priv.plugins import DEFENSES
from mocosfl_priv.results import Destination, read_runs, require_room, short_name, variant_name, write_record
from mocosfl_priv.results.record import LONGEST_NAME
from mocosfl_priv.results.storage import SPARE_BYTES
from mocosfl_priv.runtime.files import Lock
from mocosfl_priv.sweep.directory import SweepDirectory
from mocosfl_priv.sweep.schedule import ThisProcess
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
    context = multiprocessing.get_context("fork")  # the parent holds no lock yet, and a fork imports nothing again
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
    with Lock(tmp_path / "lock"), pytest.raises(ConfigurationError, match="--resume-dir: another run is at work in"):
        Experiment.from_dict(tiny).run(resume_dir=tmp_path)


def test_checkpoints_of_another_training_say_which_key_and_threads_do_not_matter(
    tiny: dict[str, Any], tmp_path: Path
) -> None:
    tiny |= {"attacks": ["floor"], "compute": {"device": "cpu", "threads": 1}}
    tiny["evaluation"] |= {"recognition_epochs": 0, "label_fractions": []}
    tiny["training"] |= {"epochs": 2}
    tiny["data"] |= {"train_limit": 600}
    with pytest.raises(KeyboardInterrupt):  # after the first step of the second epoch
        Experiment.from_dict(tiny).run(Interruption(20), tmp_path)
    assert list(tmp_path.glob("*/step_*"))

    def refusal(**changes: Any) -> str:
        document = {**tiny, **{name: {**tiny.get(name, {}), **value} for name, value in changes.items()}}
        plan = Experiment.from_dict(document).plan()
        with pytest.raises(ConfigurationError) as refused:
            checkpoints_of(plan.context, plan.systems[0], tmp_path).verify()  # type: ignore[union-attr]
        return str(refused.value)

    assert "training.epochs is 2 in the checkpoint and 4 here; learning rates depend" in refusal(training={"epochs": 4})
    assert "model.norm is group in the checkpoint and layer here" in refusal(model={"norm": "layer"})
    assert "roles.victims is" in refusal(data={"victims": 15})
    several = refusal(training={"ema": 0.9, "momentum": 0.5, "temperature": 0.2, "sync_period": 3, "queue_size": 64})
    assert several.count(" in the checkpoint and ") == 4 and "and 1 more differ" in several
    tiny["compute"] = {"device": "cpu", "threads": 2}
    assert len(Experiment.from_dict(tiny).run(resume_dir=tmp_path).record.training) > 0


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
    result = Sweep.from_yaml(path).run(tmp_path / "out", ThisProcess())
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


def _spellings(place: Path) -> list[Path]:
    """One place, written in other ways. The working directory is its parent's."""
    link = place.parent.parent / "link"
    link.symlink_to(place.parent)
    return [
        place,
        Path(f"{place}/"),
        Path(os.path.relpath(place)),
        place.parent / ".." / place.parent.name / place.name,
        link / place.name,
    ]


def test_one_folder_is_held_however_it_is_spelt(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "runs").mkdir()
    monkeypatch.chdir(tmp_path)
    spellings = _spellings(tmp_path / "runs" / "out")
    for first in spellings:
        with Destination(first):
            for second in spellings:
                with pytest.raises(ConfigurationError, match="another run is at work"):
                    Destination(second, overwrite=True).__enter__()
    assert not list((tmp_path / "runs").iterdir())


@settings(max_examples=40)
@given(
    left=st.one_of(st.none(), st.binary(max_size=30), st.integers(1, 2**22).map(lambda pid: f"{pid}\n".encode())),
    depth=st.integers(0, 3),
    fills=st.booleans(),
)
def test_a_lock_that_was_left_is_taken_and_nothing_of_it_stays(
    left: bytes | None, depth: int, fills: bool, tmp_path_factory: pytest.TempPathFactory
) -> None:
    root = tmp_path_factory.mktemp("held")
    folder = root.joinpath(*["below"] * depth)
    if left is not None:  # of a process that died; whatever is in it, nobody holds it
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "lock").write_bytes(left)
    there = folder.exists()
    with Lock(folder / "lock"):
        assert (folder / "lock").read_text() == f"{os.getpid()}\n"
        with pytest.raises(BlockingIOError, match=f"process {os.getpid()}"):
            Lock(folder / "lock").__enter__()
        if fills:
            (folder / "result").write_text("")
    assert not (folder / "lock").exists()
    assert folder.exists() == (there or fills) and root.exists()


def _contend(path: Path, start: Any, results: Any) -> None:
    """Holds the lock often, and notes whenever somebody else was inside at the same time."""
    start.wait(60)
    held = clashes = 0
    for _ in range(100):
        try:
            with Lock(path):
                inside = path.with_name("inside")
                try:
                    inside.mkdir()
                except FileExistsError:
                    clashes += 1
                else:
                    inside.rmdir()
                held += 1
        except BlockingIOError:
            pass
    results.put((held, clashes))


def test_two_processes_never_hold_one_lock_at_a_time(tmp_path: Path) -> None:
    """The folder goes and comes with the lock, so that either may find it gone between two calls."""
    context = multiprocessing.get_context("fork")
    start, results = context.Event(), context.Queue()
    path = tmp_path / "runs" / "deeper" / "lock"
    both = [context.Process(target=_contend, args=(path, start, results)) for _ in range(2)]
    for process in both:
        process.start()
    start.set()
    found = [results.get(timeout=60) for _ in both]
    for process in both:
        process.join()
    assert all(held > 0 and clashes == 0 for held, clashes in found)
    assert [process.exitcode for process in both] == [0, 0]
    assert not [left for left in tmp_path.rglob("*") if left.is_file()]


@settings(max_examples=60)
@given(free=st.integers(0, 2**40), needed=st.integers(0, 2**40))
def test_a_run_begins_exactly_where_the_disk_has_room_for_it_and_some_to_spare(free: int, needed: int) -> None:
    usage = namedtuple("usage", "total used free")
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(shutil, "disk_usage", lambda _: usage(2**41, 2**41 - free, free))
        if free >= needed + SPARE_BYTES:
            require_room(Path(), needed, "--out x")
        else:
            with pytest.raises(ConfigurationError, match=r"^--out x: the disk has .* MB may be needed$"):
                require_room(Path(), needed, "--out x")


def test_what_a_run_will_write_is_known_before(tiny: dict[str, Any], tmp_path: Path) -> None:
    tiny |= {"attacks": ["floor"], "compute": {"device": "cpu", "threads": 1}}
    tiny["data"] |= {"train_limit": 120, "test_limit": 40}
    tiny["training"] |= {"server_batch": 16}
    tiny["evaluation"] |= {"recognition_epochs": 0, "label_fractions": []}
    tiny["model"] |= {"width": 16, "projector_out": None}
    plan = Experiment.from_dict(tiny).plan()
    (tmp_path / "out").mkdir()
    write_record(run_plan(plan, resume_dir=tmp_path / "state"), tmp_path / "out")
    for expected, folder in ((result_bytes(plan), tmp_path / "out"), (checkpoint_bytes(plan), tmp_path / "state")):
        written = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
        assert written < expected + SPARE_BYTES / 64 and expected < 4 * written
    usage = namedtuple("usage", "total used free")
    with pytest.MonkeyPatch.context() as patched:
        left = SPARE_BYTES + checkpoint_bytes(plan) - 1
        patched.setattr(shutil, "disk_usage", lambda _: usage(2**41, 2**41 - left, left))
        with pytest.raises(ConfigurationError, match=r"--resume-dir .*: the disk has"):
            run_plan(plan, resume_dir=tmp_path / "more")
    assert not (tmp_path / "more").exists()


def test_checkpoints_inside_the_results_and_an_unexpanded_home_are_refused(tmp_path: Path) -> None:
    with Destination(tmp_path / "runs" / "out") as destination:
        destination.require_apart(tmp_path / "runs" / "state", "--resume-dir")
        destination.require_apart(tmp_path / "runs" / "out.checkpoints", "--resume-dir")
        for place in ("out", "out/state", "out/../out/a/b"):
            with pytest.raises(ConfigurationError, match=r"--resume-dir .* lies in --out"):
                destination.require_apart(tmp_path / "runs" / place, "--resume-dir")
        with pytest.raises(ConfigurationError, match="--resume-dir ~/state: the shell has left ~ as it is"):
            destination.require_apart(Path("~/state"), "--resume-dir")
    assert not list(tmp_path.iterdir())
    for open_ in (lambda: Destination(Path("~/out")), lambda: SweepDirectory(Path("~/out"), resume=False)):
        with pytest.raises(ConfigurationError, match="--out ~/out: the shell has left ~ as it is"):
            open_()


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda text: "\ufeff" + text, ""),
        (lambda text: text.replace("\n", "\r\n"), ""),
        (lambda text: text.replace("training:", "training:\n  <<: {momentum: 0.5}"), ""),
        (lambda text: text.replace("  clients", "\tclients"), "not valid YAML"),
        (lambda text: text + "name: again\n", "the key 'name' stands twice"),
        (lambda text: text.replace("\n  clients: 4\n  epochs: 2", " [1]"), "valid dictionary"),
        (lambda text: text + "---\n" + text, "expected a single document"),
        (lambda text: "name: !!python/object/apply:os.system ['true']\n", "could not determine a constructor"),
        (lambda text: "a: " + "[" * 1100 + "]" * 1100, "not valid YAML"),
    ],
)
def test_yaml_as_editors_save_it_is_read_and_what_is_none_is_one_line(
    change: Callable[[str], str], said: str, tmp_path: Path
) -> None:
    path = tmp_path / "mine.yml"
    path.write_bytes(change("name: mine\ntraining:\n  clients: 4\n  epochs: 2\n").encode())
    if not said:
        assert load_config(path).training.clients == 4
        return
    with pytest.raises(ConfigurationError, match=re.escape(said)) as refused:
        load_config(path)
    assert "\n" not in str(refused.value)


def test_a_sweep_that_is_refused_leaves_nothing_behind(tiny: dict[str, Any], tmp_path: Path) -> None:
    path = tmp_path / "sweep.yaml"
    path.write_text(yaml.safe_dump({**tiny, "data": {**tiny["data"], "victims": 100_000}}))
    for _ in range(2):
        with pytest.raises(ConfigurationError, match="victims"):
            Sweep.from_yaml(path).run(tmp_path / "deep" / "out")
    assert [left.name for left in tmp_path.iterdir()] == ["sweep.yaml"]


def test_a_folder_is_no_configuration(tmp_path: Path) -> None:
    (tmp_path / "my.yaml").mkdir()
    with pytest.raises(ConfigurationError, match=r"my\.yaml' is a folder: name a YAML file"):
        config_path(str(tmp_path / "my.yaml"))
