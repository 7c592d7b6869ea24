"""Inversion networks from smashed data to images, by name (the decoder grammar).

``res_normN{N}C{C}`` and ``conv_normN{N}C{C}`` follow the grammar of the published attacks; the simulated attacker of
attacker-aware defenses uses them too. ``ressfl_N{N}C{C}`` is the network in the public code of the published attacks,
which is weaker and is kept for comparison with published numbers. ``edsr_N{N}C{C}`` and ``unet_N{N}C{C}`` are designed
for strong attacks: residual blocks without norms (Lim et al., EDSR, CVPRW 2017) at the resolution of the smashed data,
and sub-pixel up-sampling (Shi et al., CVPR 2016) at the end. Norms would discard an image's brightness and contrast,
and layers at full resolution would take most of the time.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mocosfl_priv.config.decoder_grammar import check_grammar
from mocosfl_priv.errors import ConfigurationError
from mocosfl_priv.inversion.own_decoder import build_own_decoder
from mocosfl_priv.inversion.ridge import fit_convolution
from mocosfl_priv.models.convolution import zeroed
from mocosfl_priv.models.custom_backbone import is_own

Norm = Callable[[int], nn.Module]
NormName = Literal["group", "batch"]

# Limit for patches times squared numbers per patch in the initial regression: a fifth of a second on two cores.
REGRESSION_COST = (1 << 17) * (9 * 32) ** 2
RIDGE = 1e-4


class ResidualBlock(nn.Module):
    """Two 3x3 convolutions with norms, and a shortcut without norms.

    GroupNorm discards each image's brightness and contrast. The shortcut preserves them; without it, even an invertible
    client could not be inverted exactly.
    """

    def __init__(self, in_channels: int, channels: int, norm: Norm) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, channels, 3, padding=1)
        self.norm1 = norm(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1)
        self.norm2 = norm(channels)
        self.shortcut = nn.Conv2d(in_channels, channels, 1) if in_channels != channels else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm2(self.conv2(F.relu(self.norm1(self.conv1(x)))))
        return self.shortcut(x) + y


class PreActivationBlock(nn.Module):
    """Norm, ReLU and 3x3 convolution, twice; and a shortcut, with a 1x1 convolution and norm if channels change."""

    def __init__(self, in_channels: int, channels: int, norm: Norm) -> None:
        super().__init__()
        self.norm1 = norm(in_channels)
        self.conv1 = nn.Conv2d(in_channels, channels, 3, padding=1)
        self.norm2 = norm(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1)
        self.shortcut = (
            nn.Sequential(nn.Conv2d(in_channels, channels, 1, bias=False), norm(channels))
            if in_channels != channels
            else nn.Identity()
        )

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv2(F.relu(self.norm2(self.conv1(F.relu(self.norm1(x))))))
        return self.shortcut(x) + y


class ConvBlock(nn.Sequential):
    """Convolution, norm, ReLU."""

    def __init__(self, in_channels: int, channels: int, norm: Norm) -> None:
        super().__init__(nn.Conv2d(in_channels, channels, 3, padding=1), norm(channels), nn.ReLU())


class PlainBlock(nn.Module):
    """Two 3x3 convolutions and a shortcut, without norms; initially the identity."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1)
        self.conv2 = zeroed(nn.Conv2d(channels, channels, 3, padding=1))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv2(F.relu(self.conv1(x)))


class UNetBody(nn.Module):
    """A U-Net with one lower level (Ronneberger et al., 2015); initially the identity.

    N blocks; N blocks with twice the channels at half the resolution, whose result is added; N blocks.
    """

    def __init__(self, blocks: int, channels: int) -> None:
        super().__init__()
        self.enter = nn.Sequential(*(PlainBlock(channels) for _ in range(blocks)))
        self.down = nn.Conv2d(channels, 2 * channels, 2, stride=2)
        self.middle = nn.Sequential(*(PlainBlock(2 * channels) for _ in range(blocks)))
        self.up = nn.Sequential(zeroed(nn.Conv2d(2 * channels, 4 * channels, 1)), nn.PixelShuffle(2))
        self.leave = nn.Sequential(*(PlainBlock(channels) for _ in range(blocks)))

    def forward(self, x: Tensor) -> Tensor:
        x = self.enter(x)
        return self.leave(x + self.up(self.middle(self.down(x))))


class SubPixelDecoder(nn.Module):
    """A head, a body with a shortcut, and sub-pixel up-sampling to images around mid-grey, which are not clamped.

    The path through head, shortcut and tail is linear, so that a linear client can be inverted exactly. Since the body
    is initially the identity, the best weights of this path can be computed in closed form (:meth:`begin_linear`).
    Smashed data as large as the image is first folded to half the resolution.
    """

    def __init__(
        self, kind: str, blocks: int, channels: int, smashed_shape: Sequence[int], image: Sequence[int]
    ) -> None:
        super().__init__()
        height, target = smashed_shape[1], image[1]
        fold = 2 if height == target and height % 2 == 0 else 1
        size = height // fold
        scale = target // size
        self.fold = nn.PixelUnshuffle(fold)
        self.head = nn.Conv2d(smashed_shape[0] * fold**2, channels, 3, padding=1)
        has_lower_level = kind == "unet" and size % 2 == 0 and size >= 4
        self.body = (
            UNetBody(blocks, channels)
            if has_lower_level
            else nn.Sequential(*(PlainBlock(channels) for _ in range(blocks)))
        )
        self.tail = nn.Sequential(nn.Conv2d(channels, image[0] * scale**2, 3, padding=1), nn.PixelShuffle(scale))

    def forward(self, smashed: Tensor) -> Tensor:
        x = self.head(self.fold(smashed))
        return 0.5 + self.tail(x + self.body(x))

    @torch.no_grad()
    def begin_linear(self, smashed: Tensor, images: Tensor) -> None:
        """Initialise the tail by ridge regression on the outputs of the head.

        These are random mixtures of neighbouring positions and, if there is room, the input channels themselves.

        Args:
            smashed: Messages (n, *smashed_shape); only as many are used as `REGRESSION_COST` allows.
            images: The images (n, channels, h, w) in [0, 1] behind them.

        """
        convolution, shuffle = self.tail
        assert isinstance(convolution, nn.Conv2d) and isinstance(shuffle, nn.PixelShuffle)
        assert self.head.bias is not None
        if 2 * self.head.in_channels <= self.head.out_channels:
            nn.init.dirac_(self.head.weight[: self.head.in_channels])
            nn.init.zeros_(self.head.bias[: self.head.in_channels])
        patches = smashed[0, 0].numel() // self.fold.downscale_factor**2
        count = max(1, REGRESSION_COST // (patches * convolution.weight[0].numel() ** 2))
        maps = 2 * self.head(self.fold(smashed[:count]))  # the sum of body, initially the identity, and shortcut
        fit_convolution(convolution, maps, F.pixel_unshuffle(images[:count] - 0.5, shuffle.upscale_factor), RIDGE)


class ResSflDecoder(nn.Sequential):
    """The inversion network in the public code of ResSFL and MocoSFL; images in (0, 1).

    A block to C channels and N blocks of C; then at least two stages, each of which doubles the resolution until it is
    that of the image, or else is a block at full resolution; then a block to the image's channels and a sigmoid.
    """

    def __init__(
        self, blocks: int, channels: int, smashed_channels: int, image_channels: int, scale: int, norm: Norm
    ) -> None:
        doublings = scale.bit_length() - 1
        layers: list[nn.Module] = [PreActivationBlock(smashed_channels, channels, norm), nn.ReLU()]
        for _ in range(blocks):
            layers += [PreActivationBlock(channels, channels, norm), nn.ReLU()]
        for stage in range(max(2, doublings)):
            if stage < doublings:
                layers.append(nn.ConvTranspose2d(channels, channels, 3, stride=2, padding=1, output_padding=1))
                layers.append(norm(channels))
            else:
                layers.append(PreActivationBlock(channels, channels, norm))
            layers.append(nn.ReLU())
        super().__init__(*layers, PreActivationBlock(channels, image_channels, norm), nn.Sigmoid())


def _group_norm(channels: int) -> nn.Module:
    return nn.GroupNorm(channels // 4 if channels % 4 == 0 else 1, channels)


NORMS: dict[NormName, Norm] = {"group": _group_norm, "batch": nn.BatchNorm2d}


def build_decoder(
    architecture: str, smashed_shape: Sequence[int], image_shape: Sequence[int], norm: NormName = "group"
) -> nn.Module:
    """An inversion network by its name.

    - ``unet_N<blocks>C<channels>``, ``edsr_...``: :class:`SubPixelDecoder`, built for the score; images are not
    bounded. - ``res_normN<blocks>C<channels>``, ``conv_normN...``: a block to C channels, N blocks of C, transposed
      convolutions up to the image size, a block to the image's channels, a sigmoid.
    - ``ressfl_N<blocks>C<channels>``: :class:`ResSflDecoder`, the network of the public code of Li et al., "ResSFL: A
      Resistance Transfer Framework for Defending Model Inversion Attack in Split Federated Learning", CVPR 2022.
    - ``file.py:function`` or ``package.module:function``: a decoder of one's own. The function takes the two shapes and
      returns a module as below; `norm` plays no part.

    Args:
        architecture: the name.
        smashed_shape: (c, h, w) of smashed data.
        image_shape: (3, h, w); its side is the side of smashed data, or that doubled one or more times.
        norm: group or batch, for networks that have norms.

    Returns:
        A module from (n, *smashed_shape) to images (n, *image_shape).

    Raises:
        ConfigurationError: the name is not in the grammar, the sizes are no power of two apart, or a function of
            one's own fails or returns something else.

    >>> build_decoder("unet_N1C8", (4, 8, 8), (3, 16, 16))(torch.rand(2, 4, 8, 8)).shape
    torch.Size([2, 3, 16, 16])
    """
    if is_own(architecture):
        return build_own_decoder(architecture, smashed_shape, image_shape)
    kind, blocks, channels = check_grammar(architecture)
    block = ResidualBlock if kind == "res" else ConvBlock
    if len(smashed_shape) != 3 or len(image_shape) != 3:
        raise ConfigurationError(f"decoder: smashed data of shape {tuple(smashed_shape)} is not an image-like tensor")
    height, target = smashed_shape[1], image_shape[1]
    if height > target or target % height or (target // height).bit_count() != 1:
        raise ConfigurationError(f"decoder: {height} pixels cannot be doubled to {target}")
    if kind in ("edsr", "unet"):
        return SubPixelDecoder(kind, blocks, channels, smashed_shape, image_shape)
    make_norm = NORMS[norm]
    if kind == "ressfl":
        return ResSflDecoder(blocks, channels, smashed_shape[0], image_shape[0], target // height, make_norm)
    layers: list[nn.Module] = [block(smashed_shape[0], channels, make_norm)]
    layers += [block(channels, channels, make_norm) for _ in range(blocks)]
    while height < target:
        layers += [nn.ConvTranspose2d(channels, channels, 4, stride=2, padding=1), nn.ReLU()]
        height *= 2
    last = (
        ResidualBlock(channels, image_shape[0], make_norm)
        if kind == "res"
        else nn.Conv2d(channels, image_shape[0], 3, padding=1)
    )
    return nn.Sequential(*layers, last, nn.Sigmoid())
