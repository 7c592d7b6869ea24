from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.distributions import Normal, kl_divergence

from defenses.mid import MutualInformation, divergence
from mocosfl_priv import MessageKind
from mocosfl_priv.config import PluginSpec
from mocosfl_priv.errors import ConfigurationError
from mocosfl_priv.plugins import DEFENSES
from mocosfl_priv.runtime.compute import Compute
from tests.defenses.learned_noise import prepared, require_resumes_exactly


@given(scale=st.floats(0, 3), size=st.floats(0, 5), seed=st.integers(0, 99))
def test_the_divergence_is_that_of_the_distributions(scale: float, size: float, seed: int) -> None:
    random = torch.Generator().manual_seed(seed)
    means = size * torch.randn(3, 2, 4, 4, generator=random, dtype=torch.float64)
    log_variance = scale * torch.randn(2, 4, 4, generator=random, dtype=torch.float64)
    expected = kl_divergence(Normal(means, (log_variance / 2).exp().expand_as(means)), Normal(0.0 * means, 1.0)).mean()
    torch.testing.assert_close(divergence(means, log_variance), expected)


def test_every_element_has_noise_of_its_own_deviation(compute: Compute, rng: torch.Generator) -> None:
    defense, shape = prepared(MutualInformation(), compute)
    deviations = torch.rand(shape, generator=rng) + 0.1
    defense.load_state(defense.state() | {"log_variance": 2 * deviations.log()})
    torch.testing.assert_close(defense.deviation, deviations)
    noise = defense.protect(torch.full((400, *shape), 3.0), rng) - 3
    relative = noise / deviations
    assert abs(float(relative.mean())) < 0.01 and float(relative.std()) == pytest.approx(1, rel=0.01)
    assert float(noise.std(0).div(deviations).sub(1).abs().max()) < 0.25  # element by element, of 400 draws each


@given(seed=st.integers(0, 10**6), beta=st.floats(0, 50), passes=st.integers(1, 3))
@settings(max_examples=10, deadline=None)
def test_variances_get_the_gradient_of_task_and_divergence(
    seed: int, beta: float, passes: int, compute: Compute
) -> None:
    """Against autograd through the reparametrised messages of a whole step, also where a step has several passes."""
    defense, shape = prepared(MutualInformation(beta=beta, initial=0.3), compute)
    random = torch.Generator().manual_seed(seed)
    log_variance = 0.5 * torch.randn(shape, generator=random)
    rows = defense._rows // passes
    defense._rows = rows * passes
    means = torch.randn(rows * passes, *shape, generator=random)
    weights = torch.randn(rows * passes, *shape, generator=random)

    leaf, found, drawn = log_variance.clone().requires_grad_(True), torch.zeros(shape), []
    for part in range(passes):
        mine = slice(part * rows, (part + 1) * rows)
        defense.load_state(defense.state() | {"log_variance": log_variance})  # the same for all passes
        sent = defense.protect(means[mine], random, MessageKind.QUERY)
        drawn.append(defense._drawn)
        defense.filter_gradient((weights[mine] * sent.cos() / len(means)), random)  # of sin, times weights
        assert defense._log_variance.grad is not None
        found += defense._log_variance.grad
    sent = means + (leaf / 2).exp() * torch.cat(drawn)
    objective = (weights * sent.sin()).sum() / len(means) + beta * divergence(means, leaf)
    (expected,) = torch.autograd.grad(objective, leaf)
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-5 * float(expected.abs().max()))


def test_variances_grow_to_the_prior_s_where_an_element_tells_nothing(compute: Compute, rng: torch.Generator) -> None:
    """A quadratic task, whose cost of noise is c sigma^2 an element: sigma^2 = 1 / (1 + 2 c d / beta); 1 at no cost."""
    defense, shape = prepared(MutualInformation(beta=1.0, initial=0.1, learning_rate=0.05), compute)
    elements = torch.Size(shape).numel()
    cost = torch.tensor([0.0, 0.5, 5.0, 50.0]).repeat_interleave(shape[0] // 4).view(-1, 1, 1).expand(shape) / elements
    rows = defense._rows
    for _ in range(400):
        sent = defense.protect(torch.zeros(rows, *shape), rng, MessageKind.QUERY)
        defense.filter_gradient(2 * cost * sent / rows, rng)
    expected = 1 / (1 + 2 * cost * elements)
    torch.testing.assert_close(defense.deviation.square().mean((1, 2)), expected.mean((1, 2)), rtol=0.05, atol=0)
    assert float(defense.deviation[: shape[0] // 4].sub(1).abs().max()) < 0.05


def test_training_lowers_what_a_message_may_tell_and_the_divergence_bounds_it(
    compute: Compute, rng: torch.Generator
) -> None:
    """A linear Gaussian channel, where the rate is known: half the log determinant of signal over noise."""
    defense, shape = prepared(MutualInformation(beta=1.0, initial=0.3), compute)
    elements = torch.Size(shape).numel()
    images = torch.randn(512, 6, generator=rng)
    client = nn.Linear(6, 4)
    optimiser = torch.optim.SGD(client.parameters(), lr=0.2 * elements / 4)

    def message() -> Tensor:
        """The first four elements of a map that is zero besides."""
        rest = torch.zeros(len(images), elements - 4)
        return torch.cat([client(images), rest], 1).view(-1, *shape)

    def rate() -> float:
        noise = defense.deviation.flatten()[:4].square()
        covariance = torch.cov(client(images).detach().T)
        return 0.5 * float(torch.logdet(torch.eye(4) + covariance / noise))

    rates = []
    for _ in range(60):
        rates.append(rate())
        loss = defense.client_loss(images, message())
        assert loss is not None and float(loss.detach()) * elements > rates[-1]  # the bound holds all the way
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        defense.protect(message(), rng, MessageKind.QUERY)
        defense._rows = len(images)
        defense.filter_gradient(torch.zeros(len(images), *shape), rng)  # a task that needs nothing
    assert rate() < 0.3 * rates[0]


def test_who_resumes_goes_on_with_the_same_noise(compute: Compute) -> None:
    require_resumes_exactly(MutualInformation, 1.0, lambda sent: sent / 8, compute)


def test_a_configuration_of_the_former_mid_is_told_its_present_name() -> None:
    with pytest.raises(ConfigurationError, match=r"sigma: mid learns its deviation now.* gaussian_l2"):
        DEFENSES.create(PluginSpec.model_validate({"name": "mid", "beta": 1.0, "sigma": 1.0}))
