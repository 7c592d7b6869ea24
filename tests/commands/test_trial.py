"""`new defense` -> edit -> `try`, as a user walks it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest

from mocosfl_priv.api import Experiment
from mocosfl_priv.commands.options import shipped_configs
from mocosfl_priv.errors import ConfigurationError
from mocosfl_priv.plugins import ATTACKS, DEFENSES
from mocosfl_priv.plugins.scaffold import new_plugin
from mocosfl_priv.results import read_record
from reports.analysis.comparison import TARESSFL
from tests.commands.test_commands import Run, in_process, one_clear_line  # noqa: F401 - a fixture
from tests.reports.output.test_html import assert_well_formed_and_self_contained

ROOT = Path(__file__).parents[2]
TINY_TRIAL = [
    # attacks that are as short as these find something in colours only
    "data.dataset=photos", "data.source=photos-source",
    "data.train_limit=200", "data.test_limit=120", "data.victims=16", "data.auxiliary_source_fraction=0.9",
    "training.clients=4", "training.epochs=1",
    "training.server_batch=32", "training.queue_size=128", "model.backbone=resnet8", "model.width=8",
    "defenses=[none, {name: taressfl, label: expert, epochs: 1, decoder: res_normN0C8}]",
    "attacks=[floor, {name: decoder, architecture: res_normN0C8, epochs: 1}, {name: rmle, iterations: 20, tv: 0.01}]",
    "evaluation.bootstrap_samples=100", "evaluation.linear_probe_penalties=[0.1]",
    "evaluation.recognition_epochs=0", "evaluation.label_fractions=[]", # a verdict is about leaks and the linear probe
]  # fmt: skip


def test_new_plugins_pass_the_tests_that_come_with_them(tmp_path: Path) -> None:
    _, of_defense = new_plugin("defense", tmp_path / "drop_some.py")
    _, of_attack = new_plugin("attack", tmp_path / "look_again.py")
    command = [sys.executable, "-m", "pytest", "-v", "-p", "no:cacheprovider", of_defense.name, of_attack.name]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert result.returncode == 0 and "16 passed" in result.stdout, result.stdout
    assert [result.stdout.count(f"{test.name}::") for test in (of_defense, of_attack)] == [8, 8]


def test_a_new_defense_is_named_after_its_file_and_keeps_the_house_rules(tmp_path: Path) -> None:
    source, test = files = new_plugin("defense", tmp_path / "drop_others.py")
    assert DEFENSES.load(str(source)).__name__ == "DropOthers"
    assert "from drop_others import DropOthers" in test.read_text() and "MyDefense" not in test.read_text()
    for hook in ("architecture", "prepare", "client_loss", "protect", "filter_gradient", "state", "load_state"):
        assert f"def {hook}(self" in source.read_text()
    for command in (["check", "--ignore", "D102,ARG002,D103,INP,PLR,ANN"], ["format", "--check"]):
        words = [sys.executable, "-m", "ruff", *command, "--config", str(ROOT / "pyproject.toml"), *map(str, files)]
        result = subprocess.run(words, capture_output=True, text=True, check=False)
        assert result.returncode == 0, result.stdout


def test_a_new_attack_is_named_after_its_file_and_keeps_the_house_rules(tmp_path: Path) -> None:
    source, _ = files = new_plugin("attack", tmp_path / "look_again.py")
    assert ATTACKS.load(str(source)).__name__ == "LookAgain"
    for words in (["check", "--ignore", "D102,ARG002,D103,INP,PLR,ANN"], ["format", "--check"]):
        linted = [sys.executable, "-m", "ruff", *words, "--config", str(ROOT / "pyproject.toml"), *map(str, files)]
        result = subprocess.run(linted, capture_output=True, text=True, check=False)
        assert result.returncode == 0, result.stdout


def test_names_of_attacks_that_cannot_be_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="cannot be an attack's file; name it like nearest_images"):
        new_plugin("attack", tmp_path / "mine")
    with pytest.raises(ConfigurationError, match="imports another Recipe"):
        new_plugin("attack", tmp_path / "recipe.py")
    assert not list(tmp_path.iterdir())


def test_check_says_in_one_line_what_is_broken(in_process: Run, tmp_path: Path) -> None:  # noqa: F811
    assert "keeps the contract of an attack" in in_process("check", "attack", "floor").stdout
    assert "keeps the contract of a defense" in in_process("check", "defense", "none").stdout
    assert "did you mean 'attack'" in one_clear_line(in_process("check", "atack", "floor"), 2)
    (tmp_path / "grey.py").write_text(
        "from mocosfl_priv import Attack\n"
        "class Grey(Attack):\n"
        "    def reconstruct(self, view, budget, seed): return view.smashed\n"
    )
    said = one_clear_line(in_process("check", "attack", "grey.py"), 2)
    assert "grey.py breaks the contract of an attack: reconstruct returns shape (6, 8, 8, 8)" in said


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("mine", "name it like drop_channels.py"),
        ("my-defense.py", "name it like drop_channels.py"),
        ("class.py", "name it like drop_channels.py"),
        ("_.py", "name it like drop_channels.py"),
        ("test_mine.py", "is the name of a test"),
        ("random.py", "there is a module 'random' already"),
        ("defense.py", "imports another Defense"),
        ("nowhere/mine.py", "there is no folder"),
        ("there.py", "exists already; it is not overwritten"),
        ("tested.py", "exists already; it is not overwritten"),
    ],
)
def test_names_that_cannot_be_are_refused_and_nothing_is_written(tmp_path: Path, name: str, message: str) -> None:
    kept = [tmp_path / "there.py", tmp_path / "test_tested.py"]
    for path in kept:
        path.write_text("mine")
    with pytest.raises(ConfigurationError, match=message):
        new_plugin("defense", tmp_path / name)
    assert sorted(tmp_path.iterdir()) == sorted(kept) and all(path.read_text() == "mine" for path in kept)


def test_from_new_defense_to_a_verdict(in_process: Run, tmp_path: Path) -> None:  # noqa: F811
    made = in_process("new", "defense", "drop_some.py")
    assert made.returncode == 0 and "mocosfl-priv try drop_some.py" in made.stdout
    assert "not overwritten" in one_clear_line(in_process("new", "defense", "drop_some.py"), 2)
    assert "did you mean 'defense'" in one_clear_line(in_process("new", "defence", "x.py"), 2)

    overrides = [word for pair in TINY_TRIAL for word in ("--set", pair)]
    result = in_process("try", "drop_some.py", *overrides)
    assert result.returncode == 0, result.stderr
    folder = tmp_path / "runs/try-drop_some"
    verdict = (folder / "verdict.txt").read_text()
    assert verdict in result.stdout
    assert verdict.startswith("drop_some (cut 1): leak ratio R ")
    assert "Against no defense: drop_some" in verdict and "Against TAResSFL" in verdict and "[few-seeds]" in verdict
    assert read_record(folder).info["config"]["candidate"] == "drop_some"
    page = (folder / "report.html").read_text()
    assert_well_formed_and_self_contained(page)
    assert "The verdict on drop_some" in page and ">Leaderboard</h2>" in page
    board = pd.read_csv(folder / "leaderboard.csv")
    assert set(board["defense"]) == {"none", "expert", "drop_some"}
    assert (folder / "leaderboard.md").read_text().count("\n| ") == 1 + 3

    (folder / "verdict.txt").unlink()
    assert in_process("report", str(folder)).returncode == 0
    assert (folder / "verdict.txt").read_text() == verdict


HEAD = "from mocosfl_priv import Defense\n"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("x = 1\n", "mine.py must define exactly one Defense, found 0"),
        (
            HEAD + "class A(Defense): ...\nclass B(Defense): ...\n",
            "mine.py must define exactly one Defense, found 2 (A, B); name one as mine.py:A",
        ),
        (HEAD + "class A(Defense):\n    def protect(self, smashed, rng, kind): return smashed.mean(0)\n",
         "mine.py breaks the contract of a defense: protect makes"),
        (HEAD + "class A(Defense):\n    def protect(self, smashed, rng, kind): return missing\n",
         "mine.py fails on a small batch: NameError"),
        (HEAD + "class A(Defense):\n    def protect(self, smashed, rng): return smashed\n",
         "A.protect is called with smashed, rng and kind: write def protect("),
        (HEAD + "class A(Defense):\n    def __init__(self, rate): ...\n", "rate: Field required"),
        ("import nothing_like_this\n", "mine.py cannot be imported"),
    ],
)  # fmt: skip
def test_a_broken_defense_is_one_line_before_training(
    in_process: Run, tmp_path: Path, text: str, message: str  # noqa: F811
) -> None:  # fmt: skip
    (tmp_path / "mine.py").write_text(text)
    assert message in one_clear_line(in_process("try", "mine.py"), 2)
    assert not (tmp_path / "runs").exists()


def test_the_shipped_trial_has_its_controls() -> None:
    plan = Experiment.from_yaml(shipped_configs()["try"]).plan()
    origins = [system.defense.origin for system in plan.systems]
    assert origins[0] == "defenses.none:NoDefense" and origins.count(TARESSFL) == len(origins) - 1 >= 2
    assert {attack.label for attack in plan.attacks} >= {"floor", "decoder", "rmle"}
