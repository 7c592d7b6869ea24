from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.distributions import Normal, kl_divergence

from defenses.gaussian_l2 import GaussianL2


@given(sigma=st.floats(0.05, 3), beta=st.floats(0, 4), size=st.floats(0, 5), seed=st.integers(0, 99))
def test_the_penalty_is_the_divergence_of_the_distributions_up_to_a_constant(
    sigma: float, beta: float, size: float, seed: int
) -> None:
    means = size * torch.randn(3, 2, 4, 4, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    means.requires_grad_(True)
    prior = Normal(torch.zeros_like(means), 1.0)
    expected = beta * kl_divergence(Normal(means, sigma), prior).mean()
    constant = beta * kl_divergence(Normal(0.0 * means, sigma), prior).mean()
    loss = GaussianL2(beta, sigma).client_loss(means, means)
    assert loss is not None
    torch.testing.assert_close(loss, expected - constant)
    gradients = [torch.autograd.grad(each, means)[0] for each in (loss, expected)]
    torch.testing.assert_close(*gradients)


def test_the_noise_has_its_deviation(rng: torch.Generator) -> None:
    smashed = 3 * torch.ones(50, 4, 16, 16)
    noise = GaussianL2(sigma=0.7).protect(smashed, rng) - smashed
    assert float(noise.std()) == pytest.approx(0.7, rel=0.02)
    assert abs(float(noise.mean())) < 0.02


def test_training_lowers_what_a_message_may_tell(rng: torch.Generator) -> None:
    """A linear Gaussian channel, where the rate is known: half the log determinant of signal over noise."""
    images = torch.randn(512, 6, generator=rng)
    defense = GaussianL2(beta=1.0, sigma=0.5)
    client = nn.Linear(6, 4)
    optimiser = torch.optim.SGD(client.parameters(), lr=0.1)

    def rate() -> float:
        covariance = torch.cov(client(images).detach().T) / defense.sigma**2
        return 0.5 * float(torch.logdet(torch.eye(4) + covariance))

    first = rate()
    for _ in range(60):
        loss = defense.client_loss(images, client(images))
        assert loss is not None
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    assert rate() < 0.3 * first
