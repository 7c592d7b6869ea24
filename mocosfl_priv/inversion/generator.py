"""Generators from latents to images: our variational autoencoder, or a user's own network."""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mocosfl_priv.errors import ConfigurationError
from mocosfl_priv.inversion.decoders import NORMS, ResidualBlock
from mocosfl_priv.runtime.imports import load_function, one_line

SMALLEST_MAP = 4  # pixels per side; images are halved until they are this small, or have an odd side
LARGEST_AT_WIDTH = 64  # pixels per side
NORM = NORMS["group"]


class Generator(nn.Module):
    """Latents to images, in stages that double the map, with shortcuts that carry brightness and contrast.

    Args:
        latent_dim: numbers of a latent.
        width: channels at full size; fewer for images larger than 64 pixels (`LARGEST_AT_WIDTH`).
        image_shape: (3, h, w).

    >>> Generator(4, 8, (3, 16, 16))(torch.zeros(2, 4)).shape
    torch.Size([2, 3, 16, 16])
    """

    def __init__(self, latent_dim: int, width: int, image_shape: Sequence[int]) -> None:
        super().__init__()
        colours, height, width_in_pixels = image_shape
        doublings = _halvings(height, width_in_pixels)
        channels = _channels(width, doublings, max(height, width_in_pixels))
        bottom = (channels[-1], height >> doublings, width_in_pixels >> doublings)
        self.latent_dim = latent_dim
        self.stages = nn.ModuleList(
            [
                nn.Sequential(
                    nn.Linear(latent_dim, bottom[0] * bottom[1] * bottom[2]),
                    nn.Unflatten(1, bottom),
                    ResidualBlock(channels[-1], channels[-1], NORM),
                )
            ]
        )
        for level in range(doublings, 0, -1):
            self.stages.append(
                nn.Sequential(nn.Upsample(scale_factor=2), ResidualBlock(channels[level], channels[level - 1], NORM))
            )
        last = cast(nn.Sequential, self.stages[-1])
        last.extend([nn.Conv2d(channels[0], colours, 3, padding=1), nn.Sigmoid()])

    def forward(self, latent: Tensor) -> Tensor:
        for stage in self.stages:
            latent = stage(latent)
        return latent


class VariationalAutoencoder(nn.Module):
    """An encoder and a :class:`Generator`, trained by the objective of the sigma-VAE.

    Rybkin, Daniilidis and Levine, "Simple and Effective VAE Training with Calibrated Decoders", ICML 2021: all pixels
    have one deviation, the optimal one of each batch, so no weight between reconstruction and divergence has to be
    tuned.

    Args:
        latent_dim: numbers of a latent.
        width: channels at full size; fewer for images larger than 64 pixels (`LARGEST_AT_WIDTH`).
        image_shape: (3, h, w).

    >>> vae = VariationalAutoencoder(4, 8, (3, 16, 16))
    >>> vae.loss(torch.rand(2, 3, 16, 16), torch.Generator().manual_seed(0)).shape
    torch.Size([])
    """

    def __init__(self, latent_dim: int, width: int, image_shape: Sequence[int]) -> None:
        super().__init__()
        colours, height, width_in_pixels = image_shape
        halvings = _halvings(height, width_in_pixels)
        channels = _channels(width, halvings, max(height, width_in_pixels))
        layers: list[nn.Module] = [ResidualBlock(colours, channels[0], NORM)]
        for level in range(halvings):
            layers += [nn.AvgPool2d(2), ResidualBlock(channels[level], channels[level + 1], NORM)]
        elements = channels[-1] * (height >> halvings) * (width_in_pixels >> halvings)
        self._encoder = nn.Sequential(*layers, nn.Flatten(), nn.Linear(elements, 2 * latent_dim))
        self.generator = Generator(latent_dim, width, image_shape)

    def encode(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Return mean and log-variance of the latents' posterior, (n, latent_dim) each."""
        mean, log_variance = self._encoder(images).float().chunk(2, 1)
        return mean, log_variance.clamp(-10, 10)

    def loss(self, images: Tensor, rng: torch.Generator) -> Tensor:
        """Return the negative evidence lower bound per pixel value, up to a constant; images (n, 3, h, w) in [0, 1]."""
        mean, log_variance = self.encode(images)
        noise = torch.randn(mean.shape, generator=rng).to(mean)
        drawn = self.generator(mean + (0.5 * log_variance).exp() * noise).float()
        divergence = 0.5 * (mean.square() + log_variance.exp() - 1 - log_variance).sum(1).mean()
        return 0.5 * F.mse_loss(drawn, images).clamp(min=1e-6).log() + divergence / images[0].numel()


def load_generator(reference: str, image_shape: tuple[int, int, int]) -> nn.Module:
    """The generator of a user, frozen.

    Args:
        reference: ``package.module:function`` or ``file.py:function``. The function takes the shape (3, h, w) and
            returns a module from latents (n, latent_dim), standard normal, to images (n, 3, h, w) in [0, 1]. The module
            has an integer attribute `latent_dim`. It may have `stages`, modules whose composition it is.
        image_shape: (3, h, w).

    Returns:
        The module, in evaluation mode, without gradients of its weights.

    Raises:
        ConfigurationError: the function is missing, fails, or returns anything else.

    >>> load_generator("missing.py:net", (3, 16, 16))
    Traceback (most recent call last):
    mocosfl_priv.errors.ConfigurationError: file missing.py does not exist (paths are relative to the current folder)
    """
    function = load_function(reference)
    try:
        generator = function(image_shape)
        if not isinstance(generator, nn.Module):
            raise ConfigurationError(
                f"generator {reference} must return a torch module, not {type(generator).__name__}"
            )
        if not isinstance(getattr(generator, "latent_dim", None), int):
            raise ConfigurationError(f"generator {reference} must have an integer attribute latent_dim")
        generator = generator.eval().requires_grad_(False)
        device = next((p.device for p in generator.parameters()), torch.device("cpu"))
        with torch.no_grad():
            images = generator(torch.zeros((2, cast(int, generator.latent_dim)), device=device))
    except ConfigurationError:
        raise
    except Exception as error:  # a user's code can fail in any way
        raise ConfigurationError(f"generator {reference} failed: {one_line(error)}") from error
    if tuple(images.shape) != (2, *image_shape):
        raise ConfigurationError(
            f"generator {reference} returns shape {tuple(images.shape[1:])}, not images of shape {image_shape}"
        )
    if float(images.min()) < 0 or float(images.max()) > 1:
        raise ConfigurationError(f"generator {reference} returns values outside the range from 0 to 1 of images")
    return generator


def _channels(width: int, halvings: int, side: int) -> list[int]:
    """Channels per level from the full size down: doubled at each level, up to four times `width`.

    Images larger than `LARGEST_AT_WIDTH` begin with fewer, so that no level costs much more than that size does.
    """
    first = width if side <= LARGEST_AT_WIDTH else max(4, width * LARGEST_AT_WIDTH // side // 4 * 4)
    return [min(4 * width, first * 2**level) for level in range(halvings + 1)]


def _halvings(height: int, width: int) -> int:
    count = 0
    while all(side % 2 ** (count + 1) == 0 and side >> (count + 1) >= SMALLEST_MAP for side in (height, width)):
        count += 1
    return count
