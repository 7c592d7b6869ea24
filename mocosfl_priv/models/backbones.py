"""The backbones by name: each a list of units, and a model can be cut after any of them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor, nn

from mocosfl_priv.config import ModelConfig
from mocosfl_priv.errors import ConfigurationError, unknown_name
from mocosfl_priv.models import micro_batch
from mocosfl_priv.models.custom_backbone import build_own_units, is_own
from mocosfl_priv.models.layers import LayerOptions, Residual
from mocosfl_priv.models.mobilenetv2 import MOBILENETS
from mocosfl_priv.models.resnet import RESNETS
from mocosfl_priv.models.vgg import VGGS
from mocosfl_priv.models.vit import TRANSFORMERS
from mocosfl_priv.runtime.imports import one_line


class Backbone(Protocol):
    """A family member: how many units it has, and how they are built."""

    @property
    def units(self) -> int:
        """Places to cut: the model can be cut after unit 1 to this."""

    @property
    def summary(self) -> str:
        """A few words for ``ls models``."""

    def build(self, width: int | None, image_size: int, layers: LayerOptions) -> list[nn.Module]:
        """Freshly initialised units in order, from images (n, 3, h, w) to a map; each maps 4-d to 4-d tensors.

        width: channels of the first unit, which scale all others; the backbone's own if None.
        layers: which norms and convolutions to build it from.
        """


BACKBONES: dict[str, Backbone] = {**RESNETS, **VGGS, **MOBILENETS, **TRANSFORMERS}


def find_backbone(name: str) -> Backbone:
    """The backbone called `name`; raises ConfigurationError with a suggestion."""
    if name not in BACKBONES:
        raise unknown_name("model", name, BACKBONES)
    return BACKBONES[name]


def build_units(model: ModelConfig, image_size: int) -> list[nn.Module]:
    """The units of `model`'s backbone, fit for micro-batches of one image and for stacking per client.

    Raises ConfigurationError with the reason where they are not, and where an option cannot be obeyed.
    """
    if not is_own(model.backbone):
        layers = LayerOptions(model.norm, model.weight_standardisation)
        units = find_backbone(model.backbone).build(model.width, image_size, layers)
        if not model.client_residuals and not _has_shortcuts(units):
            raise ConfigurationError(f"model.client_residuals: {model.backbone} has no shortcuts to take away")
        return _trainable(units, model, f"model.norm: {model.norm}")
    units = build_own_units(model.backbone, model.width, image_size)
    if not model.client_residuals and not _has_shortcuts(units):
        raise ConfigurationError(
            f"model.client_residuals: {model.backbone} has no shortcut that can be taken away; leave its shortcuts out "
            "yourself, or build them on mocosfl_priv.models.layers.Residual"
        )
    return _trainable(units, model, f"model.backbone: {model.backbone}")


def _has_shortcuts(units: list[nn.Module]) -> bool:
    return any(isinstance(module, Residual) for unit in units for module in unit.modules())


def _trainable(units: list[nn.Module], model: ModelConfig, who: str) -> list[nn.Module]:
    """`units` if nothing stands in the way of their training, mended ones where that is asked for."""
    problems = micro_batch.explain(nn.Sequential(*units))
    if not problems:
        return units
    mended = micro_batch.mend(nn.Sequential(*units))
    unmendable = micro_batch.explain(mended)
    if model.mend_norms and not unmendable:
        assert isinstance(mended, nn.Sequential)
        return list(mended)
    shown = unmendable if model.mend_norms else problems
    more = f" (and {len(shown) - 1} more)" if len(shown) > 1 else ""
    advice = "" if unmendable else "; with model.mend_norms: true each such norm becomes a GroupNorm"
    raise ConfigurationError(f"{who} cannot train clients on micro-batches of one image: {shown[0]}{more}{advice}")


@torch.no_grad()
def unit_shapes(units: Sequence[nn.Module], image_size: int, backbone: str) -> list[tuple[int, int, int]]:
    """Shape (c, h, w) of every unit's output for one image, found by running it.

    Raises ConfigurationError that names the unit, counted from 1 as cut layers are, which cannot take its input or
    gives no 4-d tensor.
    """
    shapes = []
    x = torch.zeros(1, 3, image_size, image_size)
    for number, unit in enumerate(units, start=1):
        who = f"model.backbone: unit {number} ({type(unit).__name__}) of {backbone}"
        try:
            result = unit(x)
        except Exception as error:  # a user's unit can fail in any way
            raise ConfigurationError(
                f"{who} cannot take {tuple(x.shape)}, at data.image_size {image_size}: {one_line(error)}"
            ) from error
        if not isinstance(result, Tensor) or result.dim() != 4 or len(result) != 1:
            raise ConfigurationError(
                f"{who} maps {tuple(x.shape)} to {_described(result)}; to be cut anywhere, every unit maps "
                "(n, channels, h, w) to (n, channels, h, w)"
            )
        x = result
        shapes.append((int(x.shape[1]), int(x.shape[2]), int(x.shape[3])))
    return shapes


def _described(result: object) -> str:
    return f"a tensor of shape {tuple(result.shape)}" if isinstance(result, Tensor) else f"a {type(result).__name__}"
