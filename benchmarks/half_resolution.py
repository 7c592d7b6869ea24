"""A backbone of one's own (docs/tasks/own-model.md): ResNet-8 whose stem halves the resolution, a third of the work."""

from __future__ import annotations

from torch import nn

from mocosfl_priv.models.layers import LayerOptions
from mocosfl_priv.models.resnet import BasicBlock, Stem

WIDTH = 16
HALVED_FROM = 48  # pixels per side; from there on `Stem` has stride 2


def resnet8(width: int | None, image_size: int) -> list[nn.Module]:
    """Stem of stride 2 and three residual blocks, as a list to cut between."""
    channels = width or WIDTH
    layers = LayerOptions("group", weight_standardisation=True)
    return [
        Stem(channels, max(image_size, HALVED_FROM), layers),
        BasicBlock(channels, channels, 1, layers),
        BasicBlock(channels, 2 * channels, 2, layers),
        BasicBlock(2 * channels, 4 * channels, 2, layers),
    ]
