"""Whole backbones against torchvision's: equal but for the stem, biases before norms, and what follows the pool."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torchvision
from torch import nn

from mocosfl_priv.config import ModelConfig
from mocosfl_priv.models.backbones import build_units
from mocosfl_priv.models.split import count_parameters


def ours(backbone: str) -> int:
    return sum(count_parameters(unit) for unit in build_units(ModelConfig(backbone=backbone), 32))


@pytest.mark.parametrize("backbone", ["resnet18", "resnet34", "resnet50"])
def test_resnets(backbone: str) -> None:
    theirs: nn.Module = getattr(torchvision.models, backbone)(weights=None)
    stem = 64 * 3 * (7 * 7 - 3 * 3)
    assert ours(backbone) == count_parameters(theirs) - stem - count_parameters(theirs.get_submodule("fc"))


@pytest.mark.parametrize("backbone", ["vgg11", "vgg13", "vgg16"])
def test_vggs(backbone: str) -> None:
    make: Callable[..., nn.Module] = getattr(torchvision.models, f"{backbone}_bn")
    with torch.device("meta"):  # counting needs no weights, and VGG's linear layers are large
        layers = list(make(weights=None).get_submodule("features").children())
    biases = sum(layer.bias.numel() for layer in layers if isinstance(layer, nn.Conv2d) and layer.bias is not None)
    assert ours(backbone) == sum(count_parameters(layer) for layer in layers) - biases


def test_mobilenetv2() -> None:
    theirs = torchvision.models.mobilenet_v2(weights=None)
    assert ours("mobilenetv2") == count_parameters(theirs.features)


def test_vit_tiny() -> None:
    """torchvision's has learned positions and a class token besides."""
    theirs = torchvision.models.VisionTransformer(
        image_size=32, patch_size=4, num_layers=12, num_heads=3, hidden_dim=192, mlp_dim=768
    )
    extras = theirs.class_token.numel() + theirs.encoder.pos_embedding.numel() + count_parameters(theirs.heads)
    assert ours("vit_tiny") == count_parameters(theirs) - extras
