from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from skimage.metrics import peak_signal_noise_ratio, structural_similarity

from mocosfl_priv.evaluation.image_metrics import PSNR_CAP, mse, psnr, ssim, ssim_zeropad


def pair(size: int, seed: int, noise: float) -> tuple[torch.Tensor, torch.Tensor]:
    rng = torch.Generator().manual_seed(seed)
    a = torch.rand((3, 3, size, size + 3), generator=rng, dtype=torch.float64)
    b = (a + noise * torch.randn(a.shape, generator=rng, dtype=torch.float64)).clamp(0, 1)
    return a, b


@given(size=st.integers(11, 40), seed=st.integers(0, 99), noise=st.floats(0.01, 1))
def test_ssim_equals_scikit_image(size: int, seed: int, noise: float) -> None:
    a, b = pair(size, seed, noise)
    expected = [
        structural_similarity(
            x.numpy(), y.numpy(), gaussian_weights=True, sigma=1.5, use_sample_covariance=False, data_range=1,
            channel_axis=0,
        )
        for x, y in zip(a, b, strict=True)
    ]  # fmt: skip
    np.testing.assert_allclose(ssim(a, b).numpy(), expected, atol=1e-10)
    np.testing.assert_allclose(ssim(a.float(), b.float()).numpy(), expected, atol=1e-5)


def test_zero_padded_ssim_equals_a_slow_loop() -> None:
    a, b = pair(13, 0, 0.2)
    offsets = np.arange(11) - 5
    kernel = np.exp(-(offsets**2) / (2 * 1.5**2))
    window = np.outer(kernel, kernel) / kernel.sum() ** 2
    for image in range(len(a)):
        values = []
        for channel in range(3):
            x, y = (np.pad(t[image, channel].numpy(), 5) for t in (a, b))
            for i in range(a.shape[2]):
                for j in range(a.shape[3]):
                    p, q = x[i : i + 11, j : j + 11], y[i : i + 11, j : j + 11]
                    mp, mq = (window * p).sum(), (window * q).sum()
                    vp, vq = (window * p * p).sum() - mp**2, (window * q * q).sum() - mq**2
                    cov = (window * p * q).sum() - mp * mq
                    values.append((2 * mp * mq + 1e-4) * (2 * cov + 9e-4) / ((mp**2 + mq**2 + 1e-4) * (vp + vq + 9e-4)))
        assert float(ssim_zeropad(a, b)[image]) == pytest.approx(np.mean(values), abs=1e-10)


def test_psnr_equals_scikit_image_and_is_capped() -> None:
    a, b = pair(16, 3, 0.1)
    expected = [peak_signal_noise_ratio(x.numpy(), y.numpy(), data_range=1) for x, y in zip(a, b, strict=True)]
    np.testing.assert_allclose(psnr(a, b).numpy(), expected, rtol=1e-9)
    assert psnr(a, a).tolist() == [PSNR_CAP] * 3


def test_mse_is_per_image_and_clamped() -> None:
    a = torch.zeros(2, 3, 4, 4)
    b = torch.stack([torch.full((3, 4, 4), 0.5), torch.full((3, 4, 4), 7.0)])
    assert mse(a, b).tolist() == [0.25, 1.0]


@pytest.mark.parametrize("metric", [ssim, ssim_zeropad])
def test_ssim_is_differentiable_and_one_for_equal_images(metric) -> None:  # type: ignore[no-untyped-def]
    a, b = pair(16, 1, 0.3)
    assert metric(a, a).tolist() == pytest.approx([1.0] * 3)
    b.requires_grad_(True)
    metric(a, b).sum().backward()
    assert b.grad is not None and bool(b.grad.isfinite().all()) and float(b.grad.abs().sum()) > 0


def test_small_images_are_refused_by_ssim_only() -> None:
    a = torch.rand(1, 3, 8, 8)
    with pytest.raises(ValueError, match="at least 11 pixels"):
        ssim(a, a)
    assert float(ssim_zeropad(a, a)) == pytest.approx(1.0, abs=1e-5)
