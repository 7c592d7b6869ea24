"""Experiments on data of one's own: the same data gives the same results, whatever form it has."""

from __future__ import annotations

import signal
import sys
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from mocosfl_priv.api import Experiment
from mocosfl_priv.cli import main
from mocosfl_priv.config import DataConfig, parse_config
from mocosfl_priv.data import photos
from mocosfl_priv.data.given import GivenData
from mocosfl_priv.data.image_set import ImageSet
from mocosfl_priv.data.roles import MAY_OVERLAP, Role, assign_roles
from mocosfl_priv.errors import ConfigurationError
from tests.awkward_inputs import case


@pytest.fixture(scope="module")
def arrays() -> dict[str, np.ndarray]:
    """240 real images of six classes, each of one of 24 subjects."""
    train = photos.load("photos", "train")
    chosen = torch.arange(0, len(train), len(train) // 240)[:240]
    images = train.images[chosen].permute(0, 2, 3, 1).contiguous().numpy()
    return {"images": images, "labels": train.labels[chosen].numpy(), "subject": np.arange(240) % 24}


@pytest.fixture
def npz(arrays: dict[str, np.ndarray], tmp_path: Path) -> Path:
    np.savez(tmp_path / "mine.npz", **arrays)  # type: ignore[arg-type]
    return tmp_path / "mine.npz"


def grouped(dataset: str) -> dict[str, Any]:
    """A small experiment on `dataset`, whose images are of subjects."""
    document: dict[str, Any] = case(dataset)
    document["data"] = {**document["data"], "group_column": "subject"}
    return document


def test_file_function_and_object_give_the_same_results(arrays: dict[str, np.ndarray], npz: Path) -> None:
    (npz.parent / "my_data.py").write_text(
        f"import numpy as np\n\ndef load():\n    data = np.load({str(npz)!r})\n"
        "    return {name: data[name] for name in data}\n"
    )
    of_file = Experiment.from_dict(grouped(str(npz))).run()
    of_function = Experiment.from_dict(grouped(f"{npz.parent / 'my_data.py'}:load")).plan()
    of_object = Experiment.from_dict(grouped("photos")).run(data=arrays)

    info, roles = of_object.record.info, of_function.context.roles.records
    for role, record in info["roles"].items():
        for name in ("content_sha256", "label_sha256", "images"):
            assert record[name] == of_file.record.info["roles"][role][name] == getattr(roles[Role(role)], name)
    for column in ("mse", "linear_accuracy"):
        assert of_object.table()[column].tolist() == of_file.table()[column].tolist()
    assert not of_file.table()["linear_accuracy"].isna().any()
    assert any("24 groups" in line for line in of_file.record.info["read"])

    name = info["config"]["data"]["dataset"]
    assert name.startswith("python:") and len(name) == len("python:") + 64
    again = Experiment.from_dict(info["config"])
    with pytest.raises(ConfigurationError, match=r"give it to Experiment\.run\(data=\.\.\.\)"):
        again.run()
    assert again.checked(data=arrays).config.digest == info["config_sha256"]
    with pytest.raises(ConfigurationError, match="was made for data python:"):
        again.checked(data=arrays | {"labels": arrays["labels"][::-1].copy()})


def test_leakage_is_measured_without_labels(arrays: dict[str, np.ndarray]) -> None:
    result = Experiment.from_dict(case("photos")).run(data=arrays["images"])
    table, info = result.table(), result.record.info
    assert table["mse"].notna().all() and table["linear_accuracy"].isna().all()
    assert "no-labels" in {flag["name"] for flag in info["flags"]}
    assert any("no labels: utility not measurable" in line for line in info["read"])


def test_validate_says_what_was_read(
    npz: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump(grouped(str(npz))))
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])

    def run(*words: str) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as ended:
            main(words)
        printed = capsys.readouterr()
        return int(ended.value.code or 0), printed.out, printed.err

    code, printed, _ = run("validate", "mine.yaml")
    assert code == 0
    for said in (
        "mine.npz/train: ",
        "6 classes (0 ",
        "32x32 pixels",
        "8-bit",
        "RGB",
        "values ",
        "240 images divided into training and test by groups",
        "of the 24 groups",
    ):
        assert said in printed, said
    code, _, error = run("validate", "mine.yaml", "--set", "data.group_column=patient")
    assert code == 2 and "has no 'patient'; it has images, labels, subject" in " ".join(error.split())
    for number, handler in handlers.items():
        signal.signal(number, handler)


@pytest.mark.parametrize(
    ("data", "said"),
    [
        ({"group_pattern": "x"}, "has 0 capture groups; it needs exactly one"),
        ({"group_pattern": "("}, "is no regular expression"),
        ({"group_pattern": "(x)", "group_column": "y"}, "both say which images belong together"),
        ({"group_column": "patient"}, r"data\.group_column is for data of one's own; photos has"),
        ({"labels": "labels.csv"}, r"data\.labels is for data of one's own"),
    ],
)
def test_wrong_keys_are_refused(data: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigurationError, match=said):
        assign_roles(parse_config({"data": data}).data, 0.0)


def made(groups: list[int], seed: int, name: str, prefix: str) -> ImageSet:
    rng = np.random.default_rng(seed)
    images = torch.from_numpy(rng.integers(0, 256, (len(groups), 3, 8, 8)).astype(np.uint8))
    names = sorted({f"{prefix}{group}" for group in groups})
    numbers = torch.tensor([names.index(f"{prefix}{group}") for group in groups])
    labels = torch.from_numpy(rng.integers(0, 3, len(groups)))
    return ImageSet(name, images, labels, ("a", "b", "c"), numbers, group_names=tuple(names))


@settings(max_examples=60)
@given(
    train=st.lists(st.integers(0, 15), min_size=12, max_size=60),
    test=st.lists(st.integers(0, 9), min_size=6, max_size=30),
    source=st.lists(st.integers(0, 9), min_size=6, max_size=20),
    victims=st.integers(1, 8),
    target=st.sampled_from([0.0, 0.1, 0.3]),
    auxiliary=st.sampled_from([0.0, 0.1, 0.4]),
    seed=st.integers(0, 3),
)
def test_no_two_roles_share_a_named_group(
    train: list[int], test: list[int], source: list[int], victims: int, target: float, auxiliary: float, seed: int
) -> None:
    config = DataConfig(victims=victims, auxiliary_target_fraction=auxiliary, role_seed=seed, image_size=8)
    sets = made(train, 1, "t", "p"), made(test, 2, "e", "q")
    try:
        roles = assign_roles(config, target, GivenData(sets, made(source, 3, "s", "r")))
    except ConfigurationError as error:
        assert "data" in str(error) and "overlap" not in str(error)
        return
    assert len(roles[Role.VICTIMS]) == victims and len(roles[Role.PROBE_TEST]) > 0
    for first, second in combinations(Role, 2):
        if frozenset({first, second}) not in MAY_OVERLAP:
            assert not roles[first].names_of_groups() & roles[second].names_of_groups(), (first, second)
    assert any(line.startswith("groups: ") for line in roles.reading)


def test_enough_groups_are_enough() -> None:
    """The property above is not met by refusals only."""
    config = DataConfig(victims=8, image_size=8)
    subjects = [index % 30 for index in range(120)]
    given = GivenData((made(subjects, 1, "t", "p"), made(subjects, 2, "e", "q")), made(subjects, 3, "s", "r"))
    roles = assign_roles(config, 0.05, given)
    assert all(len(roles[role]) > 0 for role in Role)


@pytest.mark.parametrize(
    ("prefixes", "said"),
    [
        (("p", "p", "r"), "in the training and in the test split; give the images without splits"),
        (("p", "q", "q"), "in the target and in the source data; if they differ, rename them"),
    ],
)
def test_groups_in_two_places_are_refused(prefixes: tuple[str, str, str], said: str) -> None:
    train, test, source = (made([*range(20)], i, str(i), prefix) for i, prefix in enumerate(prefixes))
    with pytest.raises(ConfigurationError, match=said):
        assign_roles(DataConfig(image_size=8), 0.0, GivenData((train, test), source))
