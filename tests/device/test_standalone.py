"""The folder is also a distribution of its own: it must work under another name, without torch and without us."""

from __future__ import annotations

import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import mocosfl_priv.device

FOLDER = Path(mocosfl_priv.device.__file__).parent
IMPORT_EVERYTHING = """
import importlib, pathlib, sys
sys.path.insert(0, sys.argv[1])
for path in sorted(pathlib.Path(sys.argv[1], "mocosfl_priv_device").rglob("*.py")):
    importlib.import_module(".".join(path.relative_to(sys.argv[1]).with_suffix("").parts))
loaded = {name.split(".")[0] for name in sys.modules}
sys.exit(" ".join(loaded & {"torch", "mocosfl_priv", "pydantic", "scipy"}) or 0)
"""


def test_every_module_works_alone_under_the_distributions_name(tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime")
    shutil.copytree(FOLDER, tmp_path / "mocosfl_priv_device", ignore=shutil.ignore_patterns("__pycache__"))
    done = subprocess.run(
        [sys.executable, "-P", "-c", IMPORT_EVERYTHING, str(tmp_path)],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        check=False,
    )
    assert done.returncode == 0, done.stderr


def test_the_distribution_asks_for_nothing_heavy() -> None:
    project = tomllib.loads((FOLDER / "pyproject.toml").read_text())["project"]
    names = {requirement.split(">=")[0] for requirement in project["dependencies"]}
    assert names == {"grpcio", "numpy", "onnxruntime", "pillow", "protobuf"}
    assert project["version"] == mocosfl_priv.__version__
