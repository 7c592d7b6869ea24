from __future__ import annotations

import pytest
import torch

from defenses.shredder import Shredder
from mocosfl_priv import MessageKind
from mocosfl_priv.runtime.compute import Compute
from tests.defenses.learned_noise import prepared, require_resumes_exactly


def test_the_noise_has_its_variance_after_clipping(compute: Compute, rng: torch.Generator) -> None:
    defense, shape = prepared(Shredder(initial=0.5, clip=1.0), compute)
    loud = 10 * torch.randn(64, *shape, generator=rng)
    noise = defense.protect(loud, rng) - loud / loud.flatten(1).square().mean(1).sqrt().view(-1, 1, 1, 1)
    assert float(noise.var()) == pytest.approx(2 * 0.5**2, rel=0.03)


def test_noise_grows_to_where_its_cost_equals_its_reward(compute: Compute, rng: torch.Generator) -> None:
    """A quadratic task, whose expected cost of noise of scale s at weight c is c s^2: s = sqrt(reward / (2 c d))."""
    defense, shape = prepared(Shredder(reward=1.0, initial=0.02, learning_rate=0.02), compute)
    weights = torch.linspace(0.5, 4.0, shape[0]).view(-1, 1, 1).expand(shape)
    rows = defense._rows
    for _ in range(400):
        sent = defense.protect(torch.zeros(rows, *shape), rng, MessageKind.QUERY)
        defense.filter_gradient(weights * sent / rows, rng)
    expected = (1.0 / (2 * weights * weights.numel())).sqrt()
    scales = defense.distribution.scale.mean((1, 2))
    torch.testing.assert_close(scales, expected.mean((1, 2)), rtol=0.06, atol=0)
    assert float(defense.distribution.loc.abs().max()) < 0.05


def test_who_resumes_goes_on_with_the_same_noise(compute: Compute) -> None:
    require_resumes_exactly(Shredder, 0.0, lambda sent: sent, compute)
