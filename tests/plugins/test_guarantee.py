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
from numpy.typing import NDArray
from scipy import stats
from torch import Tensor

from defenses.local_dp import noise_multiplier, spent
from mocosfl_priv import Defense, Guarantee
from mocosfl_priv.api import Experiment, RunResult
from mocosfl_priv.errors import RunFailedError
from mocosfl_priv.evaluation.floor import hindsight_floor
from mocosfl_priv.plugins.guarantee import two_candidates
from reports import write_report
from reports.analysis.findings_text import caveats, promises
from reports.analysis.summary import summarise
from tests.conftest import TINY

Array = NDArray[np.float64]
PRIORS = st.floats(0.02, 0.98)


def posterior_variance(likelihoods: Array, prior: Array, values: Array, weights: Array) -> float:
    """The best attacker's MSE, by summing over messages: nobody can better the mean of the posterior.

    likelihoods: (messages, images), densities. prior: (images,). values: (images, numbers). weights: (messages,), of
    the quadrature.
    """
    joint = likelihoods * prior
    density = joint.sum(1)
    posterior = joint / np.maximum(density, 1e-300)[:, None]
    second = posterior @ (values**2)
    return float((weights * density * (second - (posterior @ values) ** 2).mean(1)).sum())


def blind_error(prior: Array, values: Array) -> float:
    return float((prior @ (values - prior @ values) ** 2).mean())


def remaining_error(guarantee: Guarantee, blind: float) -> float:
    return float(guarantee.bound(np.array([blind]))[0])


def in_gaussian_noise(places: Array, prior: Array, values: Array, sigma: float) -> float:
    """The same for messages at `places` (images,) on a line, with noise of deviation sigma."""
    y = np.linspace(places.min() - 9 * sigma, places.max() + 9 * sigma, 8001)
    weights = np.full(len(y), y[1] - y[0])
    return posterior_variance(stats.norm.pdf(y[:, None], places, sigma), prior, values, weights)


BIT = np.array([[0.0], [1.0]])


@given(epsilon=st.floats(0, 10), delta=st.floats(0, 0.3), prior=PRIORS)
def test_randomised_response_never_beats_the_bound(epsilon: float, delta: float, prior: float) -> None:
    """A bit is told with probability delta; otherwise an answer is truthful with odds e^eps. This is the worst case."""
    truth = math.exp(epsilon) / (1 + math.exp(epsilon))
    answers = np.array([[delta, 0], [0, delta], [truth, 1 - truth], [1 - truth, truth]])
    answers[2:] *= 1 - delta
    both = np.array([1 - prior, prior])
    error = posterior_variance(answers, both, BIT, np.ones(4))
    bound = remaining_error(Guarantee(epsilon, delta, 1), prior * (1 - prior))
    assert error >= bound - 1e-15
    if delta == 0:  # attained for equally frequent bits
        even = posterior_variance(answers, np.array([0.5, 0.5]), BIT, np.ones(4))
        assert even == pytest.approx(remaining_error(Guarantee(epsilon, 0.0, 1), 0.25), rel=1e-9)


@given(multiplier=st.floats(0.1, 20), prior=PRIORS, delta=st.floats(1e-9, 0.3), messages=st.integers(1, 5))
@settings(max_examples=30)
def test_gaussian_noise_never_beats_the_bound(multiplier: float, prior: float, delta: float, messages: int) -> None:
    """A bit in Gaussian noise, seen `messages` times, against Bayes' rule, by quadrature over the messages' mean."""
    sigma = multiplier / math.sqrt(messages)
    error = in_gaussian_noise(np.array([0.0, 1.0]), np.array([1 - prior, prior]), BIT, sigma)
    epsilon = spent("gaussian", multiplier, delta, messages)
    for mu in (None, 1 / sigma):
        assert error >= remaining_error(Guarantee(epsilon, delta, messages, mu), prior * (1 - prior)) - 1e-12


@given(
    seed=st.integers(0, 10**6), images=st.integers(2, 6), sigma=st.floats(0.1, 5), spread=st.floats(0.05, 1),
    at_the_ends=st.booleans(),
)  # fmt: skip
@settings(max_examples=40)
def test_no_prior_over_images_beats_the_bound(
    seed: int, images: int, sigma: float, spread: float, at_the_ends: bool
) -> None:
    """Several images of several numbers, with any frequencies, and messages anywhere within the sensitivity of 1."""
    random = np.random.default_rng(seed)
    places = random.integers(0, 2, images) if at_the_ends else random.random(images)
    prior = random.dirichlet(np.full(images, spread))
    values = random.random((images, 3))
    error = in_gaussian_noise(places.astype(float), prior, values, sigma)
    mu = 1 / sigma
    epsilon = spent("gaussian", sigma, 1e-5, 1)
    assert error >= remaining_error(Guarantee(epsilon, 1e-5, 1, mu), blind_error(prior, values)) - 1e-9


@given(seed=st.integers(0, 10**6), sigma=st.floats(0.25, 2), messages=st.integers(2, 3))
@settings(max_examples=10, deadline=None)
def test_messages_that_are_chosen_one_after_the_other_do_not_beat_it(seed: int, sigma: float, messages: int) -> None:
    """The place of the next message depends on those before; the best attacker is found by drawing many of them."""
    random = np.random.default_rng(seed)
    values, count = random.random((3, 2)), 20_000
    turns = random.normal(size=3)
    errors = []
    truth = random.integers(0, 3, count)
    log_likelihood, before = np.zeros((count, 3)), np.zeros(count)
    for _ in range(messages):
        places = 0.5 + 0.5 * np.sin(turns + 5 * before[:, None])  # (count, images), within a sensitivity of 1
        before = places[np.arange(count), truth] + sigma * random.normal(size=count)
        log_likelihood += stats.norm.logpdf(before[:, None], places, sigma)
    posterior = np.exp(log_likelihood - log_likelihood.max(1, keepdims=True))
    posterior /= posterior.sum(1, keepdims=True)
    errors = ((posterior @ values - values[truth]) ** 2).mean(1)
    mu = math.sqrt(messages) / sigma
    guarantee = Guarantee(spent("gaussian", sigma, 1e-5, messages), 1e-5, messages, mu)
    blind = blind_error(np.full(3, 1 / 3), values)
    assert errors.mean() >= remaining_error(guarantee, blind) - 5 * errors.std() / math.sqrt(count)


@given(mu=st.floats(0.01, 12))
@settings(max_examples=40, deadline=None)
def test_the_bound_is_within_a_factor_of_two_of_what_is_possible(mu: float) -> None:
    """Two images are the case that no share of the blind guess's error can exceed; a quadrature in another variable."""
    even = np.array([0.5, 0.5])
    exact = in_gaussian_noise(np.array([0.0, mu]), even, BIT, 1.0) / 0.25
    assert two_candidates(mu) == pytest.approx(exact, rel=1e-6)
    remaining = Guarantee(math.inf, 1e-5, 1, mu).remaining
    assert 0.4999 * exact <= remaining <= exact * (1 + 1e-9)
    assert remaining == pytest.approx(max(math.exp(-(mu**2) / 4), exact / 2), rel=1e-6)  # no more than was proven
    if mu <= 1:
        assert remaining >= 0.97 * exact


def test_the_shares_of_extreme_promises_are_numbers() -> None:
    assert two_candidates(0.0) == pytest.approx(1, rel=1e-12)
    assert [Guarantee(math.inf, 0.0, 1, mu).remaining for mu in (0.0, 1e3, 1e9)] == [1.0, 0.0, 0.0]
    assert Guarantee(1e6, 0.0, 1).remaining == 0.0


@given(multiplier=st.floats(0.05, 50), delta=st.floats(1e-9, 0.5), blind=st.floats(0, 0.25))
def test_it_is_never_below_the_bounds_that_it_replaces(multiplier: float, delta: float, blind: float) -> None:
    mu, epsilon = 1 / multiplier, spent("gaussian", multiplier, delta, 1)
    former = math.exp(-epsilon) * (blind - delta)
    for each in (Guarantee(epsilon, delta, 1), Guarantee(epsilon, delta, 1, mu)):
        assert remaining_error(each, blind) >= former - 1e-15
    trade_off = stats.norm.cdf(stats.norm.ppf(blind) - mu)  # at 1 - blind
    assert remaining_error(Guarantee(epsilon, delta, 1, mu), blind) >= trade_off - 1e-15


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
    # of the training's messages an attacker saw two: a deviation of `multiplier` sensitivities, seen twice
    multiplier = noise_multiplier("gaussian", 1.0, 1e-5, training["messages"])
    assert training["mu"] == pytest.approx(math.sqrt(training["messages"]) / multiplier)
    assert row["mse_bound"] == pytest.approx(math.exp(-2 / multiplier**2 / 4) * blind, rel=1e-3)


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
