from __future__ import annotations

import math
from typing import Any, Literal

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import integrate, optimize, stats

from defenses.local_dp import LocalDP, Mechanism, noise_multiplier, spent
from mocosfl_priv.config import PluginSpec
from mocosfl_priv.errors import ConfigurationError
from mocosfl_priv.plugins import DEFENSES
from mocosfl_priv.plugins.defense_checks import small_context
from mocosfl_priv.runtime.compute import Compute


def analytic_gaussian(epsilon: float, delta: float) -> float:
    """The smallest deviation for sensitivity 1 that is (epsilon, delta)-private (Balle and Wang 2018, theorem 8)."""

    def excess(log_sigma: float) -> float:
        s = math.exp(log_sigma)
        cdf, half = stats.norm.cdf, 1 / (2 * s)
        return float(cdf(half - epsilon * s) - math.exp(epsilon) * cdf(-half - epsilon * s)) - delta

    return math.exp(optimize.bisect(excess, math.log(1e-2), math.log(1e5), xtol=1e-12))


@given(epsilon=st.floats(0.05, 12), delta=st.floats(1e-7, 0.1))
@settings(max_examples=20)
def test_gaussian_noise_is_the_analytic_gaussian_mechanism(epsilon: float, delta: float) -> None:
    assert noise_multiplier("gaussian", epsilon, delta, 1) == pytest.approx(analytic_gaussian(epsilon, delta), rel=1e-6)


def hockey_stick(density: Any, shift: float, epsilon: float) -> float:
    """The delta at `epsilon` of noise with this density, for outputs that `shift` apart, by quadrature."""
    value, _ = integrate.quad(
        lambda y: max(0.0, density(y - shift) - math.exp(epsilon) * density(y)), -40, 40, limit=400
    )
    return float(value)


@pytest.mark.parametrize("epsilon", [0.5, 3.0])
def test_one_message_has_the_epsilon_that_quadrature_finds(epsilon: float) -> None:
    sigma = noise_multiplier("gaussian", epsilon, 1e-3, 1)
    assert hockey_stick(stats.norm(scale=sigma).pdf, 1.0, epsilon) == pytest.approx(1e-3, rel=1e-3)
    scale = noise_multiplier("laplace", epsilon, 0.0, 1)
    assert scale == 1 / epsilon
    assert hockey_stick(stats.laplace(scale=scale).pdf, 1.0, epsilon) < 1e-9
    assert hockey_stick(stats.laplace(scale=0.9 * scale).pdf, 1.0, epsilon) > 1e-3


@given(epsilon=st.floats(0.1, 50), messages=st.integers(1, 2000))
@settings(max_examples=20)
def test_gaussian_messages_compose_like_one_with_less_noise(epsilon: float, messages: int) -> None:
    one, many = noise_multiplier("gaussian", epsilon, 1e-5, 1), noise_multiplier("gaussian", epsilon, 1e-5, messages)
    assert many / math.sqrt(messages) == pytest.approx(one, rel=1e-9)
    assert spent("gaussian", one, 1e-5, messages) == pytest.approx(
        spent("gaussian", one / math.sqrt(messages), 1e-5, 1), rel=1e-9
    )
    assert spent("gaussian", many, 1e-5, messages) == pytest.approx(epsilon, rel=1e-6)


@given(
    epsilon=st.floats(0.1, 50), messages=st.integers(1, 2000), mechanism=st.sampled_from(["gaussian", "laplace"])
)  # fmt: skip
@settings(max_examples=20)
def test_calibration_spends_what_was_asked_for(epsilon: float, messages: int, mechanism: Mechanism) -> None:
    multiplier = noise_multiplier(mechanism, epsilon, 1e-5, messages)
    assert 0.999 * epsilon < spent(mechanism, multiplier, 1e-5, messages) <= epsilon * (1 + 1e-9)


def delta_of_products(shifts: list[float], epsilon: float) -> float:
    """The delta of Laplace noise (scale 1) on a vector that is shifted by `shifts`, from many draws."""
    noise = np.random.default_rng(0).laplace(size=(200_000, len(shifts)))
    losses = (np.abs(noise + shifts) - np.abs(noise)).sum(1)
    return float(np.maximum(0, 1 - np.exp(epsilon - losses)).mean())


@pytest.mark.parametrize("shifts", [[4.0], [2.0, 2.0], [0.5] * 8, [3.5, 0.25, 0.25]])
def test_the_accountant_of_laplace_noise_is_right_for_vectors(shifts: list[float]) -> None:
    """Whatever shape the difference of two messages has; here noise of a fourth of the sensitivity, four messages."""
    delta = 0.01
    epsilon = spent("laplace", 1 / 4, delta, 4)
    assert epsilon < 16  # delta bought something
    assert delta_of_products(shifts * 4, epsilon) <= delta


@pytest.mark.parametrize("clip_of", ["element", "message"])
@pytest.mark.parametrize("shape", [(1, 2, 2), (4, 16, 16)])
def test_noise_has_the_calibrated_variance_after_clipping(
    clip_of: Literal["element", "message"], shape: tuple[int, ...]
) -> None:
    """sensitivity = twice the clip of the whole message, in the norm that the mechanism answers for."""
    elements, clip, count = math.prod(shape), 3.0, 200_000 // math.prod(shape)
    smashed = torch.full((count, *shape), 1e6)
    gaussian, laplace = (
        LocalDP(2.0, 1e-4, mechanism, clip=clip, clip_of=clip_of) for mechanism in ("gaussian", "laplace")
    )
    norms = (clip * math.sqrt(elements), clip * elements) if clip_of == "element" else (clip, clip)
    for defense, norm, order in ((gaussian, norms[0], 2), (laplace, norms[1], 1)):
        assert defense.noise_multiplier is not None
        noisy = defense.protect(smashed, torch.Generator().manual_seed(0))
        clipped = norm / elements ** (1 / order)
        noise = 2 * norm * defense.noise_multiplier
        deviation = noise if order == 2 else math.sqrt(2) * noise
        assert float(noisy.std()) == pytest.approx(deviation, rel=0.02)
        assert float(noisy.mean()) == pytest.approx(clipped, abs=5 * deviation / math.sqrt(noisy.numel()))


def test_two_messages_never_differ_by_more_than_the_sensitivity(monkeypatch: pytest.MonkeyPatch) -> None:
    for mechanism, order in (("gaussian", 2), ("laplace", 1)):
        defense = LocalDP(mechanism=mechanism, clip=1.5, clip_of="message")  # type: ignore[arg-type]
        monkeypatch.setattr(defense, "noise_multiplier", 0.0)
        opposite = torch.randn(1, 3, 4, 4, dtype=torch.float64)
        first, second = (defense.protect(size * opposite, torch.Generator()) for size in (50, -1e9))
        assert float((first - second).norm(p=order)) == pytest.approx(3.0)


def test_a_training_is_calibrated_to_its_messages(compute: Compute) -> None:
    """per training: all messages together spend epsilon. per message: each does, and the training spends more."""
    whole, single = LocalDP(4.0, per="training"), LocalDP(4.0, per="message")
    for defense in (whole, single):
        assert defense.prepare(small_context(defense, compute)) is None
    messages = small_context(whole, compute).messages_per_image
    assert messages == 4
    assert whole.guarantee(messages).epsilon == pytest.approx(4.0)
    assert whole.guarantee(1).epsilon < 4.0
    assert single.guarantee(1).epsilon == pytest.approx(4.0)
    assert single.guarantee(messages).epsilon > 4.0


def test_what_cannot_be_private_is_refused() -> None:
    with pytest.raises(ConfigurationError, match="Gaussian noise has no epsilon at delta 0"):
        DEFENSES.create(PluginSpec(name="local_dp", delta=0.0))
    with pytest.raises(ConfigurationError, match="epsilon"):
        DEFENSES.create(PluginSpec(name="local_dp", epsilon=0.0))
    assert LocalDP(1.0, 0.0, "laplace").guarantee(3).epsilon == pytest.approx(3.0)


@given(epsilon=st.floats(0.3, 12), messages=st.integers(1, 50))
@settings(max_examples=20)
def test_its_mu_is_that_of_its_epsilon(epsilon: float, messages: int) -> None:
    """Dong, Roth and Su, corollary 2.13: mu-GDP is (epsilon, delta)-DP for exactly these pairs. Laplace has no mu."""
    found = LocalDP(epsilon).guarantee(messages)
    assert found.mu is not None
    cdf, half, slope = stats.norm.cdf, found.mu / 2, found.epsilon / found.mu
    delta = cdf(half - slope) - math.exp(found.epsilon) * cdf(-half - slope)
    assert delta == pytest.approx(1e-5, rel=1e-2)
    assert LocalDP(epsilon, 0.0, "laplace").guarantee(messages).mu is None
