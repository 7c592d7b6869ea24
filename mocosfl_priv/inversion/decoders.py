"""Inversion networks from smashed data to images, by name (the decoder grammar).

``res_normN{N}C{C}`` and ``conv_normN{N}C{C}`` follow the grammar of the published attacks; the simulated attacker of
attacker-aware defenses uses them too. ``ressfl_N{N}C{C}`` is the network in the public code of the published attacks,
which is weaker and is kept for comparison with published numbers. ``edsr_N{N}C{C}`` and ``unet_N{N}C{C}`` are designed
for strong attacks: residual blocks without norms (Lim et al., EDSR, CVPRW 2017) at the resolution of the smashed data,
and sub-pixel up-sampling (Shi et al., CVPR 2016) at the end. Norms would discard an image's brightness and contrast,
and layers at full resolution would take most of the time.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mocosfl_priv.config.decoder_grammar import check_grammar
from mocosfl_priv.errors import ConfigurationError
from mocosfl_priv.inversion.arrangement import CoarseImage, Enlarge, TokenMap, token_grid
from mocosfl_priv.inversion.own_decoder import build_own_decoder
from mocosfl_priv.inversion.ridge import fit_convolution
from mocosfl_priv.models.convolution import zeroed
from mocosfl_priv.models.custom_backbone import is_own

Norm = Callable[[int], nn.Module]
NormName = Literal["group", "batch"]

# Limit for patches times squared numbers per patch in the initial regression: a fifth of a second on two cores.
REGRESSION_COST = (1 << 17) * (9 * 32) ** 2
RIDGE = 1e-4
LARGEST_SCALE = 32  # from a map to the image, from which on the map is taken for a vector


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
        sides = smashed_shape[1:]
        fold = 2 if sides[0] == image[1] and all(side % 2 == 0 for side in sides) else 1
        sizes = [side // fold for side in sides]
        scale = image[1] // sizes[0]
        self.fold = nn.PixelUnshuffle(fold)
        self.head = nn.Conv2d(smashed_shape[0] * fold**2, channels, 3, padding=1)
        has_lower_level = kind == "unet" and all(size % 2 == 0 and size >= 4 for size in sizes)
        self.body = (
            UNetBody(blocks, channels)
            if has_lower_level
            else nn.Sequential(*(PlainBlock(channels) for _ in range(blocks)))
        )
        self.tail = nn.Sequential(nn.Conv2d(channels, image[0] * scale**2, 3, padding=1), nn.PixelShuffle(scale))

    def forward(self, smashed: Tensor) -> Tensor:
        x = self.head(self.fold(smashed))
        return 0.5 + self.tail(x + self.body(x))

    def examples_of(self, smashed: Tensor) -> int:
        """How many of the messages (n, *smashed_shape) are used by :meth:`begin_linear`: the first so many."""
        patches = smashed[0, 0].numel() // self.fold.downscale_factor**2
        convolution = self.tail[0]
        assert isinstance(convolution, nn.Conv2d)
        return max(1, REGRESSION_COST // (patches * convolution.weight[0].numel() ** 2))

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
        count = self.examples_of(smashed)
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


class ArrangedDecoder(nn.Module):
    """A decoder for smashed data that is no map of the right size: it is arranged as one first.

    Args:
        arrange: smashed data to maps.
        decoder: maps to images.
        tokens: numbers of a token where `arrange` makes maps of tokens and `decoder` has a linear path; 0 otherwise. A
            token has more numbers than the decoder has channels. So a linear layer from each token to its patch of the
            image is added to what the decoder makes, and the mean image, since tokens tell where they are.
        scale: side of that patch in pixels.
        image_shape: (c, h, w).

    """

    def __init__(
        self,
        arrange: nn.Module,
        decoder: nn.Module,
        tokens: int = 0,
        scale: int = 1,
        image_shape: Sequence[int] = (3, 1, 1),
    ) -> None:
        super().__init__()
        self.arrange = arrange
        self.decoder = decoder
        self.tokens = tokens
        self.patch = zeroed(nn.Conv2d(tokens, image_shape[0] * scale**2, 1)) if tokens else None
        self.mean = nn.Parameter(torch.zeros(tuple(image_shape))) if tokens else None
        self.shuffle = nn.PixelShuffle(scale)

    def forward(self, smashed: Tensor) -> Tensor:
        maps = self.arrange(smashed)
        images = self.decoder(maps)
        if self.patch is None:
            return images
        return images + self.mean + self.shuffle(self.patch(self._scaled(maps)))

    def _scaled(self, maps: Tensor) -> Tensor:
        """The channels of the grid's tokens, in units in which a step of Adam is as small as in other layers."""
        return self.tokens**-0.5 * maps[:, : self.tokens]

    def examples_of(self, smashed: Tensor) -> int:
        """How many of the messages (n, *smashed_shape) are used by :meth:`begin_linear`: all."""
        return len(smashed)

    @torch.no_grad()
    def begin_linear(self, smashed: Tensor, images: Tensor) -> None:
        """Initialise all linear paths by ridge regressions, each on what the one before it left.

        Args:
            smashed: messages (n, *smashed_shape).
            images: the images (n, channels, h, w) in [0, 1] behind them.

        """
        if isinstance(self.arrange, CoarseImage):
            self.arrange.begin_linear(smashed, images)
        if not begins_linear(self.decoder):
            return
        maps = self.arrange(smashed)
        if self.patch is not None:
            assert self.mean is not None
            scaled, away = self._scaled(maps), images - images.mean(0)
            # a token says how its patch differs from the mean image by how it differs from the mean token at its place
            centre = scaled.mean(0)
            fit_convolution(self.patch, scaled - centre, F.pixel_unshuffle(away, self.shuffle.upscale_factor), RIDGE)
            patches = self.shuffle(self.patch(scaled))
            self.mean.copy_((images - 0.5 - patches).mean(0))
            images = images - self.mean - patches
        assert isinstance(self.decoder, SubPixelDecoder | ArrangedDecoder)
        self.decoder.begin_linear(maps, images)


def begins_linear(decoder: nn.Module) -> bool:
    """Whether a decoder has a linear path from smashed data to images that is known in closed form."""
    if isinstance(decoder, ArrangedDecoder):
        return begins_linear(decoder.decoder)
    return isinstance(decoder, SubPixelDecoder)


def _group_norm(channels: int) -> nn.Module:
    return nn.GroupNorm(channels // 4 if channels % 4 == 0 else 1, channels)


SUB_PIXEL = ("edsr", "unet")
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
        smashed_shape: of one message: a map (c, h, w), tokens (t, d), or a vector (d,). A map whose sides are those of
            the image, or these halved one or more times, is decoded as it is. A map of another size is enlarged to the
            next size that fits. Tokens that are a grid of the image's aspect become a map, to which a class token is
            added as constant channels. A vector, a single pixel, and tokens without a grid pass a linear layer to a
            coarse image first.
        image_shape: (c, h, w), grey or colour.
        norm: group or batch, for networks that have norms.

    Returns:
        A module from (n, *smashed_shape) to images (n, *image_shape).

    Raises:
        ConfigurationError: the name is not in the grammar, smashed data is none of these, or a function of one's own
            fails or returns something else.

    >>> build_decoder("unet_N1C8", (4, 8, 8), (3, 16, 16))(torch.rand(2, 4, 8, 8)).shape
    torch.Size([2, 3, 16, 16])
    >>> build_decoder("unet_N1C8", (17, 6), (1, 16, 16))(torch.rand(2, 17, 6)).shape
    torch.Size([2, 1, 16, 16])
    """
    if is_own(architecture):
        return build_own_decoder(architecture, smashed_shape, image_shape)
    kind, blocks, channels = check_grammar(architecture)
    if not 1 <= len(smashed_shape) <= 3 or len(image_shape) != 3 or min(*smashed_shape, *image_shape) < 1:
        raise ConfigurationError(
            f"decoder: smashed data of shape {tuple(smashed_shape)} for images of shape {tuple(image_shape)} is "
            "neither a map (c, h, w), nor tokens (t, d), nor a vector (d,)"
        )
    if not _doubles_to(smashed_shape, image_shape):
        return _arranged(architecture, kind in SUB_PIXEL, smashed_shape, image_shape, norm)
    block = ResidualBlock if kind == "res" else ConvBlock
    height, target = smashed_shape[1], image_shape[1]
    if kind in SUB_PIXEL:
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


def _doubles_to(smashed_shape: Sequence[int], image_shape: Sequence[int]) -> bool:
    """Whether smashed data is a map that a decoder takes as it is.

    A single pixel is better taken for a vector. For square images in colour it is not, so that results that exist stay
    as they are.
    """
    if len(smashed_shape) != 3:
        return False
    (height, width), (target, breadth) = smashed_shape[1:], image_shape[1:]
    if height * width == 1 < target * breadth and not (image_shape[0] == 3 and target == breadth):
        return False
    scale = target // height
    return scale.bit_count() == 1 and (height * scale, width * scale) == (target, breadth)


def _arranged(
    architecture: str, any_scale: bool, smashed_shape: Sequence[int], image_shape: Sequence[int], norm: NormName
) -> ArrangedDecoder:
    """A decoder whose smashed data is arranged as a map of the right size first.

    any_scale: whether the architecture enlarges maps by any factor, in place of doublings alone.
    """
    image_size = image_shape[1:]
    arrange: list[nn.Module] = []
    shape, tokens = tuple(smashed_shape), 0
    if len(shape) == 2 and (grid := token_grid(shape[0], image_size)) is not None:
        arrange.append(TokenMap(image_size))
        tokens = shape[1] if any_scale else 0
        shape = ((1 + grid.prefix) * shape[1], grid.height, grid.width)
    map_size = shape[1:] if len(shape) == 3 else (1, 1)
    # a map that is larger than the image is folded; one that is smaller is enlarged until a factor leads to the image
    fold = max(-(-side // target) for side, target in zip(map_size, image_size, strict=True))
    scale = 1 if fold > 1 else _scale(map_size, image_size, any_scale)
    if math.prod(map_size) == 1 or scale > LARGEST_SCALE:
        coarse = CoarseImage(math.prod(smashed_shape), image_shape)
        return ArrangedDecoder(coarse, build_decoder(architecture, coarse.shape, image_shape, norm))
    size = tuple(fold * side // scale for side in image_size)
    if fold > 1 or map_size != size:
        arrange.append(Enlarge(size, fold))
        shape = (shape[0] * fold**2, size[0] // fold, size[1] // fold)
    kind, blocks, channels = check_grammar(architecture)
    decoder = (
        SubPixelDecoder(kind, blocks, channels, shape, image_shape)
        if any_scale
        else build_decoder(architecture, shape, image_shape, norm)
    )
    return ArrangedDecoder(nn.Sequential(*arrange), decoder, tokens, scale, image_shape)


def _scale(map_size: Sequence[int], image_size: Sequence[int], any_scale: bool) -> int:
    """The largest factor to the image's size from a size that is at least the map's."""
    most = min(target // side for side, target in zip(map_size, image_size, strict=True))
    scales = (s for s in range(most, 0, -1) if any_scale or s.bit_count() == 1)
    return next(s for s in scales if all(target % s == 0 for target in image_size))
