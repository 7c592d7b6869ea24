from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest

from mocosfl_priv.runtime.imports import own_package

ROOT = Path(__file__).parents[2]


# What stands in the folder that comes first on the module path, whether it is a package, and what is asked there.
CASES = {
    "foreign attacks": ("attacks", True, ["ls", "attacks"]),
    "foreign defenses": ("defenses", True, ["validate", "try"]),
    "foreign reports": ("reports", True, ["report", "somewhere"]),
    "plain folder": ("attacks", False, ["ls", "attacks"]),
}
# Each case is a process of its own, which imports all but torch anew: that takes seconds, and is not the point here.
SCRIPT = """
import json, os, sys
import torch
for folder, command in json.loads(sys.argv[1]):
    if not os.fork():
        sys.path[0] = folder
        for number, name in ((1, "stdout"), (2, "stderr")):
            os.dup2(os.open(f"{folder}/{name}.txt", os.O_WRONLY | os.O_CREAT, 0o600), number)
        from mocosfl_priv.cli import main
        main(command)
    with open(f"{folder}/code.txt", "w") as file:
        file.write(str(os.waitstatus_to_exitcode(os.wait()[1])))
"""


class Ended(NamedTuple):
    """A case's folder, and how its process ended."""

    folder: Path
    code: int
    stdout: str
    stderr: str


@pytest.fixture(scope="module")
def ended(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Ended]:
    """By case, the folder and what a script in it, which comes first on its module path, prints for the command."""
    folders = {}
    for case, (package, with_init, _) in CASES.items():
        folders[case] = tmp_path_factory.mktemp("beside")
        (folders[case] / package).mkdir()
        if with_init:
            (folders[case] / package / "__init__.py").write_text("")
    script = tmp_path_factory.mktemp("script") / "script.py"
    script.write_text(SCRIPT)
    asked = json.dumps([(str(folders[case]), command) for case, (_, _, command) in CASES.items()])
    subprocess.run([sys.executable, str(script), asked], env=os.environ | {"PYTHONPATH": str(ROOT)}, check=True)
    return {
        case: Ended(
            folder,
            int((folder / "code.txt").read_text()),
            (folder / "stdout.txt").read_text(),
            (folder / "stderr.txt").read_text(),
        )
        for case, folder in folders.items()
    }


@pytest.mark.parametrize("package", ["attacks", "defenses", "reports"])
def test_a_foreign_package_is_named_instead_of_losing_the_built_ins(package: str, ended: dict[str, Ended]) -> None:
    folder, code, _, stderr = ended[f"foreign {package}"]
    assert code == 2
    assert stderr.count("\n") == 1
    assert f"another package {package!r}, {folder / package}, hides the one of mocosfl-priv" in stderr


def test_a_folder_that_is_no_package_hides_nothing(ended: dict[str, Ended]) -> None:
    _, code, stdout, _ = ended["plain folder"]
    assert code == 0
    assert "rmle" in stdout


def test_our_own_packages_are_found() -> None:
    for package in ("attacks", "defenses", "reports"):
        assert list(own_package(package).submodule_search_locations or ()) == [str(ROOT / package)]
