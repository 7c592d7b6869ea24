from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.distributions import Normal, kl_divergence

from defenses.mid import MutualInformation, divergence


@given(sigma=st.floats(0.05, 3), size=st.floats(0, 5), seed=st.integers(0, 99))
def test_the_divergence_is_that_of_the_distributions(sigma: float, size: float, seed: int) -> None:
    means = size * torch.randn(3, 2, 4, 4, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    expected = kl_divergence(Normal(means, sigma), Normal(torch.zeros_like(means), 1.0)).mean()
    torch.testing.assert_close(divergence(means, sigma), expected)


def test_the_noise_has_its_deviation(rng: torch.Generator) -> None:
    smashed = 3 * torch.ones(50, 4, 16, 16)
    noise = MutualInformation(sigma=0.7).protect(smashed, rng) - smashed
    assert float(noise.std()) == pytest.approx(0.7, rel=0.02)
    assert abs(float(noise.mean())) < 0.02


def test_training_lowers_what_a_message_may_tell(rng: torch.Generator) -> None:
    """A linear Gaussian channel, where the rate is known: half the log determinant of signal over noise."""
    images = torch.randn(512, 6, generator=rng)
    defense = MutualInformation(beta=1.0, sigma=0.5)
    client = nn.Linear(6, 4)
    optimiser = torch.optim.SGD(client.parameters(), lr=0.1)

    def rate() -> float:
        covariance = torch.cov(client(images).detach().T) / defense.sigma**2
        return 0.5 * float(torch.logdet(torch.eye(4) + covariance))

    rates = []
    for _ in range(60):
        rates.append(rate())
        loss = defense.client_loss(images, client(images))
        assert loss is not None and float(loss.detach()) * 4 > rates[-1]  # the bound holds all the way
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    assert rate() < 0.3 * rates[0]
