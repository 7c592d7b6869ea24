"""Image metrics, one value per image. Images are float (n, c, h, w) in [0, 1]; out-of-range values are clamped.

There are two conventions for SSIM, which differ much on small images: `ssim` uses windows inside the image, as
scikit-image does; `ssim_zeropad` pads images with zeros, as the code of MocoSFL and ResSFL does.
"""

from __future__ import annotations

import torch
from torch import Tensor

PSNR_CAP = 100.0  # dB; the PSNR of equal images would be infinite
WINDOW = 11
SIGMA = 1.5
C1, C2 = 0.01**2, 0.03**2  # K1, K2 squared, for a data range of 1


def mse(a: Tensor, b: Tensor) -> Tensor:
    """Mean squared error of each pair of images, over channels and pixels. Values outside of [0, 1] are clamped first.

    Args:
        a: float (n, c, h, w).
        b: float (n, c, h, w).

    Returns:
        Float (n,), each in [0, 1].

    >>> mse(torch.zeros(2, 3, 4, 4), torch.full((2, 3, 4, 4), 0.5))
    tensor([0.2500, 0.2500])
    """
    return ((a.clamp(0, 1) - b.clamp(0, 1)) ** 2).flatten(1).mean(1)


def psnr(a: Tensor, b: Tensor) -> Tensor:
    """Return 10 log10(1 / MSE) in dB, at most `PSNR_CAP`: (n,). Its mean is not the PSNR of the mean MSE."""
    return (-10 * torch.log10(mse(a, b).clamp(min=10 ** (-PSNR_CAP / 10)))).clamp(max=PSNR_CAP)


def ssim(a: Tensor, b: Tensor) -> Tensor:
    """Return the structural similarity (Wang et al., 2004) over windows inside the image: (n,), differentiable.

    Equals skimage.metrics.structural_similarity(gaussian_weights=True, sigma=1.5, use_sample_covariance=False,
    data_range=1, channel_axis=...). Raises ValueError for images with fewer than 11 pixels a side.
    """
    return _ssim(a, b, padding=0)


def ssim_zeropad(a: Tensor, b: Tensor) -> Tensor:
    """Return SSIM with zero padding, the convention of published split-learning results: (n,), differentiable."""
    return _ssim(a, b, padding=WINDOW // 2)


def _window_matrix(size: int, padding: int, like: Tensor) -> Tensor:
    """The (outputs, size) matrix that applies the Gaussian window along one side; pixels outside the image are zero."""
    offsets = torch.arange(WINDOW, device=like.device, dtype=like.dtype) - WINDOW // 2
    window = torch.exp(-(offsets**2) / (2 * SIGMA**2))
    window = window / window.sum()
    outputs = size + 2 * padding - WINDOW + 1
    matrix = like.new_zeros(outputs, size + 2 * padding)
    for output in range(outputs):
        matrix[output, output : output + WINDOW] = window
    return matrix[:, padding : padding + size]


def _ssim(a: Tensor, b: Tensor, padding: int) -> Tensor:
    if not padding and min(a.shape[-2:]) < WINDOW:
        raise ValueError(f"ssim needs images of at least {WINDOW} pixels a side, got {tuple(a.shape[-2:])}")
    a, b = a.clamp(0, 1), b.clamp(0, 1)
    # Five local means per channel. The window is separable, so it is applied as two products with banded matrices, one
    # for columns and one for rows. This is exact, and much faster than a convolution.
    stacked = torch.stack([a, b, a * a, b * b, a * b])
    rows, columns = (_window_matrix(size, padding, a) for size in a.shape[-2:])
    filtered = rows @ stacked @ columns.T
    mean_a, mean_b, square_a, square_b, product = filtered.unbind()
    variance_a, variance_b = square_a - mean_a**2, square_b - mean_b**2
    covariance = product - mean_a * mean_b
    luminance = (2 * mean_a * mean_b + C1) / (mean_a**2 + mean_b**2 + C1)
    contrast = (2 * covariance + C2) / (variance_a + variance_b + C2)
    return (luminance * contrast).flatten(1).mean(1)
