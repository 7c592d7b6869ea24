from __future__ import annotations

from importlib.metadata import EntryPoint
from pathlib import Path
from typing import Annotated

import pytest
from pydantic import Field

from mocosfl_priv.config import PluginSpec
from mocosfl_priv.errors import ConfigurationError
from mocosfl_priv.plugins import ATTACKS, DEFENSES, Defense, registry

MINE = '''
from mocosfl_priv import Defense

class Mine(Defense):
    """Halves."""
    def __init__(self, factor: float = 0.5) -> None:
        self.factor = factor
    def protect(self, smashed, rng, kind):
        return smashed * self.factor
'''


class Ranged(Defense):
    """A defense for the parameter tests."""

    def __init__(self, sigma: Annotated[float, Field(ge=0)], mode: str = "a") -> None:
        if mode == "bad":
            raise ValueError("mode may not be bad")
        self.sigma = sigma


def write(tmp_path: Path, text: str = MINE) -> Path:
    path = tmp_path / "mine.py"
    path.write_text(text)
    return path


def test_built_ins_are_found_by_file_name() -> None:
    assert {"decoder", "rmle", "floor"} <= set(ATTACKS.origins())
    assert {"none", "taressfl", "gaussian"} <= set(DEFENSES.origins())


def test_a_users_file(tmp_path: Path) -> None:
    loaded = DEFENSES.create(PluginSpec(name=f"{write(tmp_path)}:Mine", factor=0.25))
    assert loaded.label == "Mine"
    assert loaded.plugin.factor == 0.25  # type: ignore[attr-defined]
    assert len(loaded.code_sha256) == 64


def test_a_file_with_a_single_defense_needs_no_class(tmp_path: Path) -> None:
    loaded = DEFENSES.create(PluginSpec(name=str(write(tmp_path)), factor=0.25))
    assert loaded.label == "mine" and type(loaded.plugin).__name__ == "Mine"
    (tmp_path / "two").mkdir()
    both = write(tmp_path / "two", MINE + "\n\nclass Other(Mine):\n    pass\n")
    with pytest.raises(
        ConfigurationError, match=r"exactly one Defense, found 2 \(Mine, Other\); name one as .*mine\.py:Mine"
    ):
        DEFENSES.load(str(both))


def test_a_module_of_another_package() -> None:
    assert DEFENSES.load("tests.plugins.test_registry:Ranged") is Ranged


def test_entry_points_of_other_packages(monkeypatch: pytest.MonkeyPatch) -> None:
    point = EntryPoint("halver", "tests.plugins.test_registry:Ranged", "mocosfl_priv.defenses")
    monkeypatch.setattr(registry, "entry_points", lambda group: [point] if group == "mocosfl_priv.defenses" else [])
    assert DEFENSES.load("halver") is Ranged
    clash = EntryPoint("gaussian", "tests.plugins.test_registry:Ranged", "mocosfl_priv.defenses")
    monkeypatch.setattr(registry, "entry_points", lambda group: [clash])
    with pytest.raises(ConfigurationError, match="two defenses are called 'gaussian'"):
        DEFENSES.origins()


@pytest.mark.parametrize(
    ("reference", "message"),
    [
        ("gausian", "did you mean 'gaussian'"),
        ("nowhere.py:Mine", "does not exist"),
        ("no.such.module:Mine", "importing no.such.module failed"),
        ("tests.plugins.test_registry:Rangd", "did you mean 'Ranged'"),
        ("tests.plugins.test_registry:PluginSpec", "is not a Defense"),
    ],
)
def test_bad_references(reference: str, message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        DEFENSES.load(reference)


@pytest.mark.parametrize("text", ["def broken(:\n", "import not_installed_anywhere\n", "1 / 0\n"])
def test_a_file_that_cannot_be_imported_is_one_line(tmp_path: Path, text: str) -> None:
    with pytest.raises(ConfigurationError, match=r"mine\.py cannot be imported") as caught:
        DEFENSES.load(f"{write(tmp_path, text)}:Mine")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        ({"sigma": -1}, "sigma: Input should be greater than or equal to 0"),
        ({"sigma": "much"}, "sigma"),
        ({"sigmaa": 1}, "unknown parameter 'sigmaa'; did you mean 'sigma'"),
        ({}, "sigma: Field required"),
        ({"sigma": 1, "mode": "bad"}, "mode may not be bad"),
    ],
)
def test_parameters_are_checked_by_annotation(parameters: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        DEFENSES.create(PluginSpec(name="tests.plugins.test_registry:Ranged", **parameters))


def test_parameters_are_converted() -> None:
    created = DEFENSES.create(PluginSpec(name="tests.plugins.test_registry:Ranged", sigma="0.5"))
    assert created.plugin.sigma == 0.5  # type: ignore[attr-defined]


def test_a_hook_under_its_former_name_is_refused() -> None:
    with pytest.raises(ConfigurationError, match=r"Old\.disguise: this hook is now called replace_keys"):
        type("Old", (Defense,), {"disguise": lambda self, *_: None})


def test_protect_with_its_former_signature_is_refused(tmp_path: Path) -> None:
    path = write(tmp_path, MINE.replace("rng, kind", "rng"))
    with pytest.raises(
        ConfigurationError, match=r"Mine\.protect is called with smashed, rng and kind: write"
    ) as caught:
        DEFENSES.load(f"{path}:Mine")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("hook", "kind"),
    [("replace_keys", "Detector"), ("detects", "Detector"), ("train_expert", "ExpertDefense")],
)
def test_hooks_of_another_kind_of_defense_are_refused(hook: str, kind: str) -> None:
    with pytest.raises(ConfigurationError, match=rf"Old\.{hook}: only a defense that extends mocosfl_priv\.{kind}"):
        type("Old", (Defense,), {hook: lambda self, *_: None})
