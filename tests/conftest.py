"""Shared fixtures. Real images under MOCOSFL_SHARED (default ../shared) are used where they are, else skipped."""

from __future__ import annotations

import os
import shutil
import sys
import tempfile
from pathlib import Path

# Where Python is told to write no bytecode, each of the many processes that tests start would compile torch again,
# which takes longer than most tests. They share compiled modules beside pytest's own cache, and nowhere else.
if os.environ.pop("PYTHONDONTWRITEBYTECODE", None):
    os.environ.setdefault("PYTHONPYCACHEPREFIX", str(Path(__file__).parents[1] / ".pytest_cache" / "bytecode"))
    sys.dont_write_bytecode = False
    sys.pycache_prefix = os.environ["PYTHONPYCACHEPREFIX"]
    for _folder in Path(sys.pycache_prefix, *Path(tempfile.gettempdir()).parts[1:]).glob("pytest-of-*"):
        shutil.rmtree(_folder, ignore_errors=True)  # modules that tests of an earlier run wrote

# The tests' networks are so small that a second thread costs more than it gains: a worker has one core, before torch
# counts them.
if (worker := os.environ.get("PYTEST_XDIST_WORKER")) and hasattr(os, "sched_setaffinity"):
    _cores = sorted(os.sched_getaffinity(0))
    os.sched_setaffinity(0, {_cores[int(worker.removeprefix("gw")) % len(_cores)]})

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import settings
from PIL import Image

from mocosfl_priv.api import Experiment, RunResult
from mocosfl_priv.config import ComputeConfig
from mocosfl_priv.runtime.compute import Compute

settings.register_profile("house", deadline=None, max_examples=50, derandomize=True)
settings.load_profile("house")

# A whole experiment in two seconds: every stage is the real one, only small.
TINY: dict[str, Any] = {
    "name": "tiny",
    "defenses": ["none"],
    "attacks": [
        "floor",
        {"name": "rmle", "iterations": 150, "tv": 0.01},
        {"name": "decoder", "architecture": "res_normN0C8", "steps": 10},
    ],
    "data": {"train_limit": 300, "test_limit": 200, "victims": 16},
    "model": {"backbone": "resnet8", "width": 8, "projector_hidden": 32, "projector_out": 32},
    "training": {"clients": 4, "server_batch": 32, "epochs": 1, "queue_size": 128, "sync_period": 4},
    "evaluation": {
        "bootstrap_samples": 200,
        "linear_probe_penalties": [0.1],
        "label_fractions": [0.1],
        "recognition_epochs": 1,
    },
    "compute": {"device": "cpu", "precision": "float32"},
}


@pytest.fixture(scope="session")
def compute() -> Compute:
    """Full precision on the CPU, so that expectations can be tight."""
    return Compute.resolve(ComputeConfig(device="cpu", precision="float32"))


@pytest.fixture
def tiny() -> dict[str, Any]:
    """A fresh copy of the smallest experiment, to be changed at will."""
    return {key: (dict(value) if isinstance(value, dict) else value) for key, value in TINY.items()}


@pytest.fixture(scope="session")
def tiny_run() -> RunResult:
    """The smallest experiment, run once."""
    return Experiment.from_dict(TINY).run()


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder with real image subsets; tests that need it skip without it."""
    folder = Path(os.environ.get("MOCOSFL_SHARED", Path(__file__).parents[2] / "shared"))
    if not (folder / "data" / "cifar10").is_dir():
        pytest.skip(f"no CIFAR subsets under {folder}; set MOCOSFL_SHARED to where they are")
    return folder


@pytest.fixture
def make_image_folder(tmp_path: Path) -> Callable[..., Path]:
    """Writes a class-folder tree of random images, and returns its root."""

    def make(counts: dict[str, int], size: int = 32, name: str = "tree", seed: int = 0) -> Path:
        rng = np.random.default_rng(seed)
        for folder, count in counts.items():
            (tmp_path / name / folder).mkdir(parents=True)
            for index in range(count):
                pixels = rng.integers(0, 256, (size, size, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(tmp_path / name / folder / f"{index:04}.png")
        return tmp_path / name

    return make


@pytest.fixture
def rng() -> torch.Generator:
    """A seeded generator."""
    return torch.Generator().manual_seed(0)
