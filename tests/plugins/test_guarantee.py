from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from torch import Tensor

from defenses.local_dp import spent
from mocosfl_priv import Defense, Guarantee
from mocosfl_priv.api import Experiment, RunResult
from mocosfl_priv.errors import RunFailedError
from mocosfl_priv.evaluation.floor import hindsight_floor
from reports import write_report
from reports.analysis.findings_text import caveats, promises
from reports.analysis.summary import summarise
from tests.conftest import TINY

PRIORS = st.floats(0.02, 0.98)


@given(epsilon=st.floats(0, 10), prior=PRIORS)
def test_randomised_response_never_beats_the_bound(epsilon: float, prior: float) -> None:
    """A bit is told truthfully with odds e^eps; the attacker guesses its posterior mean, which nobody can better."""
    truth = math.exp(epsilon) / (1 + math.exp(epsilon))
    error = 0.0
    for likelihood in ((truth, 1 - truth), (1 - truth, truth)):  # of one answer, for a bit of 1 and of 0
        one, zero = prior * likelihood[0], (1 - prior) * likelihood[1]
        error += one * zero / (one + zero)  # the answer's probability times the posterior's variance
    blind = np.array([prior * (1 - prior)])
    assert error >= Guarantee(epsilon, 0.0, 1).bound(blind)[0] - 1e-15


@given(multiplier=st.floats(0.1, 20), prior=PRIORS, delta=st.floats(1e-9, 0.3), messages=st.integers(1, 5))
@settings(max_examples=30)
def test_gaussian_noise_never_beats_the_bound(multiplier: float, prior: float, delta: float, messages: int) -> None:
    """A bit in Gaussian noise, seen `messages` times, against Bayes' rule, by quadrature over the messages' mean."""
    sigma = multiplier / math.sqrt(messages)
    y = np.linspace(-12 * sigma, 1 + 12 * sigma, 20_001)
    one, zero = prior * stats.norm.pdf(y, 1, sigma), (1 - prior) * stats.norm.pdf(y, 0, sigma)
    error = np.trapezoid(one * zero / np.maximum(one + zero, 1e-300), y)
    guarantee = Guarantee(spent("gaussian", multiplier, delta, messages), delta, messages)
    assert error >= guarantee.bound(np.array([prior * (1 - prior)]))[0] - 1e-12


def test_without_leak_the_bound_is_the_blind_guess() -> None:
    blind = np.array([0.02, 0.06])
    assert np.array_equal(Guarantee(0.0, 0.0, 1).bound(blind), blind)
    assert Guarantee(math.inf, 1e-5, 1).bound(blind).tolist() == [0.0, 0.0]
    assert Guarantee(math.inf, 1e-5, 1).as_json()["epsilon"] is None


def test_no_single_guess_beats_hindsight(rng: torch.Generator) -> None:
    victims, guesses = torch.rand(6, 3, 4, 4, generator=rng), torch.rand(200, 3, 4, 4, generator=rng)
    own = victims.mean(0)
    candidates = torch.cat([guesses, own + 0.01 * (guesses - 0.5)])
    errors = (candidates[:, None] - victims).square().flatten(2).mean(2).mean(1)
    assert float(hindsight_floor(victims).mean()) < float(errors.min())
    assert hindsight_floor(victims).shape == (6,)


class Boastful(Defense):
    """Sends what the client computes, and claims that nothing can be learned from it (for a test)."""

    def guarantee(self, messages: int) -> Guarantee:
        return Guarantee(0.05 * messages, 0.0, messages)


class Spoilt(Defense):
    """A guarantee that cannot be computed (for a test)."""

    def protect(self, smashed: Tensor, rng: torch.Generator, kind: object = None) -> Tensor:
        return smashed

    def guarantee(self, messages: int) -> Guarantee:
        raise ZeroDivisionError("no noise")


@pytest.fixture(scope="module")
def promising_run() -> RunResult:
    """A false promise and an honest one, before a real attack."""
    return Experiment.from_dict(
        {
            **TINY,
            "data": {"train_limit": 160, "test_limit": 60, "victims": 16},
            "training": {**TINY["training"], "clients": 2, "server_batch": 16, "queue_size": 32},
            "defenses": [f"{__file__}:Boastful", {"name": "local_dp", "epsilon": 1.0, "per": "training"}],
            "attacks": ["floor", {"name": "rmle", "iterations": 100, "tv": 0.01}],
            "evaluation": {**TINY["evaluation"], "recognition_epochs": 0, "label_fractions": []},
            "threat": {"messages_per_victim": 2},
        }
    ).run()


def row_of(run: RunResult, defense: str, attack: str) -> dict[str, Any]:
    cells = run.table()
    (row,) = cells[(cells["defense"] == defense) & (cells["attack"] == attack)].to_dict("records")
    return {str(key): value for key, value in row.items()}


def test_a_false_promise_is_an_error_and_an_honest_one_holds(promising_run: RunResult, tmp_path: Path) -> None:
    broken = [flag for flag in promising_run.record.info["flags"] if flag["name"] == "bound-violated"]
    assert [(flag["defense"], flag["attack"]) for flag in broken] == [("Boastful", "rmle")]
    assert "bound-violated" in row_of(promising_run, "Boastful", "rmle")["flags"].split(";")
    for attack in ("floor", "rmle"):
        row = row_of(promising_run, "local_dp", attack)
        assert 0.25 * row["mse_floor"] < row["mse_bound"] <= row["mse"]  # a bound that says something
    page = promising_run.report(tmp_path / "run")  # results are written all the same
    assert "<th>bound</th>" in page.read_text()
    with pytest.raises(RunFailedError, match=r"Boastful \(cut 1\): the guarantee does not hold: attack rmle has MSE"):
        promising_run.require_success()


def test_rows_say_what_is_promised_for_what_was_seen(promising_run: RunResult) -> None:
    record = promising_run.record
    row = row_of(promising_run, "local_dp", "rmle")
    # who averages saw two messages; a defense without randomness sends the same one again
    assert row["guarantee"].endswith("delta 1e-05 for 2 messages")
    assert row_of(promising_run, "Boastful", "rmle")["guarantee"] == "local DP, eps 0.05, delta 0 for 1 message"
    # eps is that of the whole training, of which two messages are a part
    assert 0 < row["guarantee_epsilon"] < 1.0
    (training,) = [entry["guarantee"] for entry in record.info["systems"] if entry["defense"] == "local_dp"]
    assert training["epsilon"] == pytest.approx(1.0) and training["messages"] % 4 == 0
    victims = torch.from_numpy(record.images["victims=test"]) / 255
    blind = float((victims - victims.mean(0)).square().mean())
    assert row["mse_bound"] == pytest.approx(math.exp(-row["guarantee_epsilon"]) * (blind - 1e-5), rel=1e-3)


def test_reports_set_promise_and_measurement_side_by_side(promising_run: RunResult) -> None:
    record = promising_run.record
    rows = [row for row in summarise(record) if row.defense == "local_dp"]
    (said,) = promises(record, rows)
    assert said.startswith("local_dp (cut 1): any attacker: MSE >= 0.0") and "vacuous" not in said
    assert "measured 0.0" in said and "Whole training: local DP, eps 1, delta 1e-05 for" in said
    (weak,) = promises(record, [replace(row, mse_bound=1e-4) for row in rows])
    assert "MSE >= 0.0001 (local DP, eps" in weak and "vacuous: it allows R = 0.99" in weak
    assert any("an image's own messages" in text for text in caveats(record, rows))


def test_without_promises_reports_say_nothing_of_them(tiny_run: RunResult, tmp_path: Path) -> None:
    record = tiny_run.record
    assert promises(record, summarise(record)) == []
    assert (record.cells["guarantee"] == "").all() and record.cells["mse_bound"].isna().all()
    assert "<th>bound</th>" not in write_report(record, tmp_path).read_text()
    tiny_run.require_success()


def test_a_guarantee_that_fails_is_a_failed_run(tiny: dict[str, Any]) -> None:
    tiny["defenses"] = [f"{__file__}:Spoilt"]
    tiny["attacks"] = ["floor"]
    tiny["evaluation"]["recognition_epochs"] = 0
    with pytest.raises(RunFailedError, match="no noise"):
        Experiment.from_dict(tiny).run()
