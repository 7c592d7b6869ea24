from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from defenses.laplace import LaplaceNoise


@given(scale=st.floats(0.01, 100), clip=st.floats(0.1, 5))
def test_messages_are_clipped_in_mean_absolute_value(scale: float, clip: float) -> None:
    smashed = scale * torch.randn(4, 3, 8, 8, dtype=torch.float64)
    clipped = LaplaceNoise(scale=0.0, clip=clip).protect(smashed, torch.Generator())
    size = smashed.flatten(1).abs().mean(1)
    torch.testing.assert_close(clipped.flatten(1).norm(p=1, dim=1) / (3 * 8 * 8), size.clamp(max=clip))
    torch.testing.assert_close(clipped[size <= clip], smashed[size <= clip])


@pytest.mark.parametrize("size", [0.0, 100.0])
def test_noise_is_laplace_around_the_clipped_message(size: float) -> None:
    smashed = torch.full((40, 4, 16, 16), size)
    noisy = LaplaceNoise(scale=0.3, clip=2.0).protect(smashed, torch.Generator().manual_seed(0))
    noise = (noisy - min(size, 2.0)).flatten()
    assert stats.kstest(noise.numpy(), stats.laplace(scale=0.6).cdf).pvalue > 0.01
    exact = torch.distributions.Laplace(0.0, 0.6)
    assert float(noise.var()) == pytest.approx(float(exact.variance), rel=0.03)


def test_zero_messages_stay_finite() -> None:
    smashed = torch.zeros(2, 4, 4, 4, requires_grad=True)
    LaplaceNoise().protect(smashed, torch.Generator().manual_seed(0)).sum().backward()
    assert smashed.grad is not None and bool(smashed.grad.isfinite().all())
