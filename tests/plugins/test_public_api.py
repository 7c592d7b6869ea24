"""What users may rely on: it is documented, its examples run, and shipped plugins use nothing else."""

from __future__ import annotations

import ast
import doctest
import importlib
import inspect
from pathlib import Path
from typing import Any

import pytest

import attacks
import defenses

ROOMS = ("mocosfl_priv", "mocosfl_priv.plugins", "mocosfl_priv.inversion", "mocosfl_priv.defending")
SHIPPED = sorted(
    path for package in (attacks, defenses) for folder in package.__path__ for path in Path(folder).glob("*.py")
)


def public() -> dict[str, Any]:
    """Every public class and function of ours, by its place."""
    found: dict[str, Any] = {}
    for room in ROOMS:
        module = importlib.import_module(room)
        for name in module.__all__:
            value = getattr(module, name)
            if callable(value) and getattr(value, "__module__", "").startswith("mocosfl_priv."):
                found[f"{value.__module__}.{value.__qualname__}"] = value
    return found


FUNCTIONS = {place: value for place, value in public().items() if inspect.isfunction(value)}
EXAMPLES = {
    f"{place}.{test.name}": test
    for place, value in public().items()
    for test in doctest.DocTestFinder(recurse=False).find(
        value, value.__qualname__, module=importlib.import_module(value.__module__)
    )
    if test.examples
}


@pytest.mark.parametrize("room", ROOMS)
def test_every_public_name_is_there(room: str) -> None:
    module = importlib.import_module(room)
    assert len(set(module.__all__)) == len(module.__all__)
    for name in module.__all__:
        assert getattr(module, name) is not None


@pytest.mark.parametrize("place", FUNCTIONS)
def test_a_public_function_says_what_it_takes_and_returns(place: str) -> None:
    function = FUNCTIONS[place]
    text = inspect.getdoc(function) or ""
    signature = inspect.signature(function)
    for name in signature.parameters:
        assert f"\n    {name}: " in text, f"{place} does not describe {name}"
    if signature.return_annotation not in (None, "None"):
        assert "\nReturns:\n" in text, f"{place} does not say what it returns"
    assert ">>> " in text, f"{place} has no example"


@pytest.mark.parametrize("place", EXAMPLES)
def test_an_example_runs(place: str) -> None:
    flags = doctest.NORMALIZE_WHITESPACE | doctest.IGNORE_EXCEPTION_DETAIL
    result = doctest.DocTestRunner(optionflags=flags).run(EXAMPLES[place])
    assert result.attempted > 0 and result.failed == 0


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: f"{path.parent.name}/{path.name}")
def test_shipped_plugins_import_public_names_only(path: Path) -> None:
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            assert not any(name.name.startswith("mocosfl_priv") for name in node.names), "import names, not modules"
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "mocosfl_priv":
            assert node.module in ROOMS, f"{node.module} is private"
            listed = importlib.import_module(node.module).__all__
            for name in node.names:
                assert name.name in listed, f"{node.module}.{name.name} is private"
