from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

from defenses.gaussian import GaussianNoise


@given(scale=st.floats(0.01, 100), clip=st.floats(0.1, 5))
def test_messages_are_clipped_before_the_noise(scale: float, clip: float) -> None:
    smashed = scale * torch.randn(4, 3, 8, 8, dtype=torch.float64)
    clipped = GaussianNoise(sigma=0.0, clip=clip).protect(smashed, torch.Generator())
    size = smashed.flatten(1).square().mean(1).sqrt()
    torch.testing.assert_close(clipped.flatten(1).square().mean(1).sqrt(), size.clamp(max=clip))
    within = size <= clip
    torch.testing.assert_close(clipped[within], smashed[within])


def test_noise_has_its_variance_relative_to_the_clip() -> None:
    smashed = torch.zeros(50, 4, 16, 16)
    noise = GaussianNoise(sigma=0.3, clip=2.0).protect(smashed, torch.Generator().manual_seed(0))
    assert abs(float(noise.std()) - 0.6) < 0.01
    assert abs(float(noise.mean())) < 0.01


def test_zero_messages_stay_finite() -> None:
    smashed = torch.zeros(2, 4, 4, 4, requires_grad=True)
    GaussianNoise().protect(smashed, torch.Generator().manual_seed(0)).sum().backward()
    assert smashed.grad is not None and bool(smashed.grad.isfinite().all())
