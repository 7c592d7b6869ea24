"""Smashed data of any shape, arranged as the maps that inversion networks and statistics are made for.

Smashed data is a map (n, c, h, w), tokens (n, t, d) or vectors (n, d). Tokens become a map with a place for every
token of the grid; tokens before the grid, as a class token, join it as channels that are the same everywhere. Vectors
become a coarse image by a linear layer. Nothing is left out on the way.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mocosfl_priv.inversion.ridge import Ridge

# Tokens before the grid: none; a class token; that and one for distillation (DeiT); that and four registers (DINOv2).
PREFIXES = (0, 1, 2, 5)
SMALLEST_GRID = 4  # tokens; fewer are taken for a vector
MOST_WEIGHTS = 1 << 24  # of the linear layer for vectors: 64 MiB
LARGEST_SHRINK = 16  # of its image, however many weights that takes
STRENGTHS = (1e-4, 1e-3, 1e-2, 1e-1, 1.0)  # of that layer's regression
COMPARED_SHARE = 4  # one image in so many is held out to choose a strength by


@dataclass(frozen=True)
class TokenGrid:
    """Where tokens stand in the image.

    Args:
        prefix: tokens before the grid, as a class token.
        height: tokens in a column.
        width: tokens in a row.

    """

    prefix: int
    height: int
    width: int


def token_grid(tokens: int, image_size: Sequence[int] = (1, 1)) -> TokenGrid | None:
    """The grid that so many tokens make, row by row.

    Args:
        tokens: how many there are.
        image_size: (h, w) of the image, whose aspect the grid has.

    Returns:
        The grid with the fewest tokens before it; None where no grid of at least four tokens has that aspect.

    >>> token_grid(17)
    TokenGrid(prefix=1, height=4, width=4)
    >>> token_grid(24, (24, 16))
    TokenGrid(prefix=0, height=6, width=4)
    """
    height, width = image_size
    for prefix in PREFIXES:
        placed = tokens - prefix
        if placed < SMALLEST_GRID:
            break
        rows = math.isqrt(placed * height // width)
        if rows and placed % rows == 0 and rows * width == placed // rows * height:
            return TokenGrid(prefix, rows, placed // rows)
    return None


def as_maps(smashed: Tensor, image_size: Sequence[int] = (1, 1)) -> Tensor:
    """Smashed data of any shape as maps, without a change of its numbers.

    Args:
        smashed: float (n, c, h, w), which is returned as it is; tokens (n, t, d); or vectors (n, d).
        image_size: (h, w) of the images, whose aspect the grid of the tokens has.

    Returns:
        Float (n, c', h', w'). Tokens: (n, d + prefix * d, rows, columns), the tokens before the grid as channels that
        are the same everywhere; tokens without a grid: (n, d, t, 1). Vectors: (n, d, 1, 1).

    >>> as_maps(torch.rand(2, 17, 8)).shape, as_maps(torch.rand(2, 5)).shape
    (torch.Size([2, 16, 4, 4]), torch.Size([2, 5, 1, 1]))
    """
    if smashed.dim() == 4:
        return smashed
    if smashed.dim() != 3:
        return smashed.flatten(1)[:, :, None, None]
    grid = token_grid(smashed.shape[1], image_size)
    if grid is None:
        return smashed.transpose(1, 2).unsqueeze(3)
    maps = smashed[:, grid.prefix :].transpose(1, 2).unflatten(2, (grid.height, grid.width))
    if not grid.prefix:
        return maps
    before = smashed[:, : grid.prefix].flatten(1)[:, :, None, None]
    return torch.cat([maps, before.expand(-1, -1, grid.height, grid.width)], 1)


def channel_axes(smashed: Tensor) -> list[int]:
    """The axes of smashed data over which statistics of a channel are taken.

    Args:
        smashed: float (n, c, h, w), tokens (n, t, d), or vectors (n, d).

    Returns:
        All axes but that of the channels: the second one, and for tokens the last one.

    >>> channel_axes(torch.rand(2, 3, 4, 4)), channel_axes(torch.rand(2, 17, 8)), channel_axes(torch.rand(2, 5))
    ([0, 2, 3], [0, 1], [0])
    """
    return [0, 1] if smashed.dim() == 3 else [0, *range(2, smashed.dim())]


class TokenMap(nn.Module):
    """:func:`as_maps` as a layer, for tokens of images of one size."""

    def __init__(self, image_size: Sequence[int]) -> None:
        super().__init__()
        self.image_size = tuple(image_size)

    def forward(self, smashed: Tensor) -> Tensor:
        return as_maps(smashed, self.image_size)


class Enlarge(nn.Module):
    """Maps (n, c, h, w) enlarged bilinearly to a size, and then folded: (n, c * fold**2, size / fold)."""

    def __init__(self, size: Sequence[int], fold: int) -> None:
        super().__init__()
        self.size = tuple(size)
        self.fold = fold

    def forward(self, maps: Tensor) -> Tensor:
        if maps.shape[2:] != self.size:
            maps = F.interpolate(maps, size=self.size, mode="bilinear", align_corners=False)
        return F.pixel_unshuffle(maps, self.fold) if self.fold > 1 else maps


class CoarseImage(nn.Module):
    """A linear layer from smashed data, taken as vectors, to a coarse image, which is folded to half its size.

    The image is as large as `MOST_WEIGHTS` allow. Weights are stored in units of 1 / sqrt(numbers), so that a step of
    Adam changes what they give by as much as in a convolution.

    Args:
        numbers: of one message.
        image_shape: (c, h, w) of the images.

    """

    def __init__(self, numbers: int, image_shape: Sequence[int]) -> None:
        super().__init__()
        colours, height, width = image_shape
        most = max(1, MOST_WEIGHTS // (numbers * colours))
        shrink = 1
        while -(-height // shrink) * -(-width // shrink) > most and shrink < LARGEST_SHRINK:
            shrink *= 2
        self.size = (-(-height // shrink), -(-width // shrink))
        self.fold = 1 if any(side % 2 or side < 4 for side in self.size) else 2
        self.shape = (colours * self.fold**2, self.size[0] // self.fold, self.size[1] // self.fold)
        self.gain = numbers**-0.5
        self.linear = nn.Linear(numbers, colours * self.size[0] * self.size[1])

    def forward(self, smashed: Tensor) -> Tensor:
        return self.linear(self.gain * smashed.flatten(1)).view(-1, *self.shape)

    @torch.no_grad()
    def begin_linear(self, smashed: Tensor, images: Tensor) -> None:
        """Give the layer the weights of a ridge regression from messages to images around mid-grey.

        Its strength is the one of `STRENGTHS` that does best on every fourth image, learned on the others.

        Args:
            smashed: messages (n, ...).
            images: the images (n, c, h, w) in [0, 1] behind them.

        """
        wanted = F.pixel_unshuffle(F.interpolate(images - 0.5, size=self.size, mode="area"), self.fold).flatten(1)
        inputs = smashed.flatten(1)
        compared = torch.arange(len(inputs), device=inputs.device) % COMPARED_SHARE == COMPARED_SHARE - 1
        strength = STRENGTHS[-1]
        if bool(compared.any()):
            trial = Ridge(inputs[~compared], wanted[~compared])
            errors = [float((trial(inputs[compared], s) - wanted[compared]).square().mean()) for s in STRENGTHS]
            strength = STRENGTHS[min(range(len(STRENGTHS)), key=errors.__getitem__)]
        weight, bias = Ridge(inputs, wanted).affine(strength)
        self.linear.weight.copy_(weight / self.gain)
        self.linear.bias.copy_(bias)
