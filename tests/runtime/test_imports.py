from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from mocosfl_priv.runtime.imports import own_package

ROOT = Path(__file__).parents[2]


def run_beside(folder: Path, command: list[str]) -> subprocess.CompletedProcess[str]:
    """What a script in `folder`, which comes first on its module path, prints for `command`."""
    script = folder / "script.py"
    script.write_text(f"from mocosfl_priv.cli import main\nmain({command!r})\n")
    return subprocess.run(
        [sys.executable, str(script)],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.parametrize(
    ("package", "command"),
    [("attacks", ["ls", "attacks"]), ("defenses", ["validate", "try"]), ("reports", ["report", "somewhere"])],
)
def test_a_foreign_package_is_named_instead_of_losing_the_built_ins(
    tmp_path: Path, package: str, command: list[str]
) -> None:
    (tmp_path / package).mkdir()
    (tmp_path / package / "__init__.py").write_text("")
    ended = run_beside(tmp_path, command)
    assert ended.returncode == 2
    assert ended.stderr.count("\n") == 1
    assert f"another package {package!r}, {tmp_path / package}, hides the one of mocosfl-priv" in ended.stderr


def test_a_folder_that_is_no_package_hides_nothing(tmp_path: Path) -> None:
    (tmp_path / "attacks").mkdir()
    ended = run_beside(tmp_path, ["ls", "attacks"])
    assert ended.returncode == 0
    assert "rmle" in ended.stdout


def test_our_own_packages_are_found() -> None:
    for package in ("attacks", "defenses", "reports"):
        assert list(own_package(package).submodule_search_locations or ()) == [str(ROOT / package)]
