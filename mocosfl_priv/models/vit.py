"""A small vision transformer (Dosovitskiy et al., ICLR 2021; DeiT-Ti of Touvron et al., 2021) as a list of units.

Unit 1 is the patch embedding, and each transformer block is one more unit. Between units, tokens are arranged as a map
(n, channels, h, w), so that bottlenecks, decoders and attacks can treat them like any other smashed data. There is no
class token; the last unit normalises the tokens, and the server averages them. Norms are LayerNorms per token.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from mocosfl_priv.errors import ConfigurationError
from mocosfl_priv.models.layers import LayerOptions, Residual

CHANNELS_PER_HEAD = 64
MLP_RATIO = 4
NORM_EPSILON = 1e-6
POSITION_BASE = 10_000


def patch_size(image_size: int) -> int:
    """Side of a patch in pixels: 4 for images below 48 pixels, 8 below 128, otherwise 16."""
    return 4 if image_size < 48 else 8 if image_size < 128 else 16


def sine_cosine_positions(channels: int, side: int) -> Tensor:
    """Return a fixed sine-cosine position embedding, (channels, side, side), as in MoCo v3 (Chen et al., 2021).

    A quarter of the channels each holds the sine and the cosine of the row and of the column.
    """
    quarter = channels // 4
    frequencies = POSITION_BASE ** -(torch.arange(quarter) / quarter)
    angles = frequencies[:, None] * torch.arange(side)
    rows = torch.cat([angles.sin(), angles.cos()])[:, :, None].expand(-1, -1, side)
    columns = torch.cat([angles.sin(), angles.cos()])[:, None, :].expand(-1, side, -1)
    return torch.cat([rows, columns])


class PatchEmbedding(nn.Module):
    """A convolution over patches that do not overlap, plus the position embedding."""

    positions: Tensor

    def __init__(self, width: int, image_size: int) -> None:
        super().__init__()
        patch = patch_size(image_size)
        self.conv1 = nn.Conv2d(3, width, patch, patch)
        self.register_buffer("positions", sine_cosine_positions(width, image_size // patch), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv1(x) + self.positions


class TokenNorm(nn.LayerNorm):
    """LayerNorm over the channels of every token of a map (n, c, h, w)."""

    def __init__(self, channels: int) -> None:
        super().__init__(channels, eps=NORM_EPSILON)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class SelfAttention(nn.Module):
    """Multi-head self-attention over tokens (n, t, c)."""

    def __init__(self, channels: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = _linear(channels, 3 * channels)
        self.out = _linear(channels, channels)

    def forward(self, tokens: Tensor) -> Tensor:
        query, key, value = (
            part.unflatten(2, (self.heads, -1)).transpose(1, 2) for part in self.qkv(tokens).chunk(3, 2)
        )
        # written out, since torch's fused attention has no batching rule: vmap would run the clients one by one
        scores = query @ key.transpose(2, 3) * query.shape[3] ** -0.5
        return self.out((scores.softmax(3) @ value).transpose(1, 2).flatten(2))


class TransformerBlock(Residual):
    """Self-attention and a two-layer perceptron, each with a norm before it and a shortcut, on a map (n, c, h, w)."""

    def __init__(self, channels: int, heads: int) -> None:
        super().__init__()
        self.norm1 = TokenNorm(channels)
        self.attention = SelfAttention(channels, heads)
        self.norm2 = TokenNorm(channels)
        self.mlp = nn.Sequential(
            _linear(channels, MLP_RATIO * channels), nn.GELU(), _linear(MLP_RATIO * channels, channels)
        )
        self.shortcut = nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        x = self.join(_over_tokens(self.attention, self.norm1(x)), x)
        return self.join(_over_tokens(self.mlp, self.norm2(x)), x)


@dataclass(frozen=True)
class VisionTransformer:
    """The backbone: `blocks` transformer blocks on tokens of `width` channels, one attention head per 64 channels."""

    width: int
    blocks: int
    summary: str

    @property
    def units(self) -> int:
        """Number of units: the patch embedding and the blocks."""
        return 1 + self.blocks

    def build(self, width: int | None, image_size: int, layers: LayerOptions) -> list[nn.Module]:  # noqa: ARG002
        """Build the units in order. `width` replaces the channels of a token; `layers` has no effect.

        Raises ConfigurationError when the image size is not a multiple of the patch size.
        """
        patch = patch_size(image_size)
        if image_size % patch:
            raise ConfigurationError(
                f"data.image_size: patches of {patch} pixels do not tile images of {image_size}; "
                f"choose a multiple of {patch}"
            )
        channels = width or self.width
        units: list[nn.Module] = [PatchEmbedding(channels, image_size)]
        units += [TransformerBlock(channels, _heads(channels)) for _ in range(self.blocks)]
        units[-1] = nn.Sequential(OrderedDict(block=units[-1], norm=TokenNorm(channels)))
        return units


def _heads(channels: int) -> int:
    """One head per 64 channels, or the next smaller number that divides the channels."""
    return next(heads for heads in range(max(1, channels // CHANNELS_PER_HEAD), 0, -1) if channels % heads == 0)


def _linear(in_features: int, out_features: int) -> nn.Linear:
    """A linear layer initialised as usual in ViTs: weights from a normal of deviation 0.02, zero bias."""
    layer = nn.Linear(in_features, out_features)
    nn.init.trunc_normal_(layer.weight, std=0.02)
    nn.init.zeros_(layer.bias)
    return layer


def _over_tokens(module: nn.Module, x: Tensor) -> Tensor:
    """Apply `module`, which maps tokens (n, t, c) to tokens, to a map (n, c, h, w)."""
    return module(x.flatten(2).transpose(1, 2)).transpose(1, 2).reshape(x.shape)


TRANSFORMERS = {"vit_tiny": VisionTransformer(192, 12, "transformer; tokens sent as a map")}
