"""Split training learns what central training learns: the short form of `benchmarks.learning`."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from benchmarks.learning import compare
from benchmarks.learning_runs import Curve, Job

ROOT = Path(__file__).parents[1]


def curves(scores: dict[tuple[str, int, int], float]) -> dict[Job, Curve]:
    return {
        Job(setting, cut, seed, 10, 100, "data"): Curve(
            [{"step": 10, "loss": 11.0, "knn": knn, "client_signature": 2.8 if setting == "apart" else 0.02}]
        )
        for (setting, cut, seed), knn in scores.items()
    }


GOOD = {("central", 0, 0): 0.47, ("central", 0, 1): 0.48, ("noniid_100", 1, 0): 0.46, ("noniid_100", 1, 1): 0.47,
        ("apart", 1, 0): 0.40, ("iid_5", 3, 0): 0.40}  # fmt: skip


def test_settings_that_learn_pass_and_controls_and_deep_cuts_are_not_judged() -> None:
    found = compare(curves(GOOD), 0.02)
    assert found["passed"] and found["central_knn"] == 0.475 and found["noniid_knn"] == 0.465
    (cell,) = (cell for cell in found["cells"] if cell["setting"] == "noniid_100")
    assert cell["minus_central"] == -0.01 and cell["interval"] == [-0.01, -0.01]


@pytest.mark.parametrize("setting", ["noniid_100", "iid_100", "noniid_5"])
def test_a_setting_that_does_not_learn_fails(setting: str) -> None:
    assert not compare(curves({**GOOD, (setting, 2, 0): 0.40, (setting, 2, 1): 0.40}), 0.02)["passed"]


def test_a_setting_whose_clients_can_be_told_apart_fails_however_well_it_does() -> None:
    good = curves(GOOD)
    (job, *_) = (job for job in good if job.setting == "noniid_100")
    assert compare(good, 0.02)["passed"]
    good[job].points[0]["client_signature"] = 2.8
    assert compare(good, 0.02)["passed"] is False


def test_a_control_whose_clients_cannot_be_told_apart_fails() -> None:
    good = curves(GOOD)
    (control,) = (job for job in good if job.setting == "apart")
    good[control].points[0]["client_signature"] = 0.02
    assert compare(good, 0.02)["passed"] is False


def test_without_central_training_nothing_is_said_to_have_passed() -> None:
    assert compare(curves({("noniid_100", 1, 0): 0.46}), 0.02)["passed"] is None


@pytest.mark.slow
def test_the_hardest_setting_learns_what_central_training_learns(shared: Path) -> None:
    """100 clients with two classes each and one image a step, 800 steps: fails when somebody breaks learning."""
    archive = shared / "data" / "cifar10-full.tar.xz"
    if not archive.is_file():
        pytest.skip(f"{archive} is not there")
    command = [sys.executable, "-m", "benchmarks.learning", "--quick", "--json", "--data", str(archive)]
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    result: dict[str, Any] = json.loads(ended.stdout)
    assert ended.returncode == 0 and result["passed"], result
