"""The backbones by name. A backbone is a list of units, and a model can be cut after any of them."""

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
from mocosfl_priv.models.modes import in_eval_mode
from mocosfl_priv.models.resnet import RESNETS
from mocosfl_priv.models.vgg import VGGS
from mocosfl_priv.models.vit import TRANSFORMERS
from mocosfl_priv.runtime.imports import one_line


class Backbone(Protocol):
    """A built-in backbone, such as ResNet-18: how many units it has, and how they are built."""

    @property
    def units(self) -> int:
        """Number of units; the model can be cut after each of them."""

    @property
    def summary(self) -> str:
        """A short description, shown by ``ls models``."""

    def build(self, width: int | None, image_size: int, layers: LayerOptions) -> list[nn.Module]:
        """Build freshly initialised units in order; each maps (n, c, h, w) to (n, c', h', w'), the first one images.

        width: channels of the first unit, which scale those of all others; the backbone's default if None.
        layers: the norms and convolutions to use.
        """


BACKBONES: dict[str, Backbone] = {**RESNETS, **VGGS, **MOBILENETS, **TRANSFORMERS}


def find_backbone(name: str) -> Backbone:
    """Return the built-in backbone `name`; raises ConfigurationError, with a suggestion, for an unknown name."""
    if name not in BACKBONES:
        raise unknown_name("model", name, BACKBONES)
    return BACKBONES[name]


def build_units(model: ModelConfig, image_size: int) -> list[nn.Module]:
    """Build the units of `model`'s backbone and check that they can be trained on micro-batches of one image.

    With `mend_norms`, norms that prevent it are replaced first. Raises ConfigurationError, with the reason, if the
    units cannot be trained so, or if there are no shortcuts that `client_residuals: false` could remove.
    """
    if not is_own(model.backbone):
        layers = LayerOptions(model.norm, model.weight_standardisation)
        units = find_backbone(model.backbone).build(model.width, image_size, layers)
        if not model.client_residuals and not _has_shortcuts(units):
            raise ConfigurationError(f"model.client_residuals: {model.backbone} has no shortcuts to remove")
        return _trainable(units, model, f"model.norm: {model.norm}")
    units = build_own_units(model.backbone, model.width, image_size)
    if not model.client_residuals and not _has_shortcuts(units):
        raise ConfigurationError(
            f"model.client_residuals: {model.backbone} has no shortcut that can be removed; leave its shortcuts out "
            "yourself, or derive its blocks from mocosfl_priv.models.layers.Residual"
        )
    return _trainable(units, model, f"model.backbone: {model.backbone}")


def _has_shortcuts(units: list[nn.Module]) -> bool:
    return any(isinstance(module, Residual) for unit in units for module in unit.modules())


def _trainable(units: list[nn.Module], model: ModelConfig, who: str) -> list[nn.Module]:
    """Return `units` if they can be trained on single images; otherwise mended ones, if `model.mend_norms` is set.

    Raises ConfigurationError, which begins with `who`, if neither is possible.
    """
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
    """Return the output shape (c, h, w) of every unit, found by running all of them on one image.

    Raises ConfigurationError, which names the unit (from 1, like cut layers), if a unit fails on its input or does not
    return a 4-d tensor for one image.
    """
    shapes = []
    x = torch.zeros(1, 3, image_size, image_size)
    for number, unit in enumerate(units, start=1):
        who = f"model.backbone: unit {number} ({type(unit).__name__}) of {backbone}"
        try:
            with in_eval_mode(unit):
                result = unit(x)
        except Exception as error:  # a user's unit can fail in any way
            raise ConfigurationError(
                f"{who} cannot process an input of shape {tuple(x.shape)}, at data.image_size {image_size}: "
                f"{one_line(error)}"
            ) from error
        if not isinstance(result, Tensor) or result.dim() != 4 or len(result) != 1:
            raise ConfigurationError(
                f"{who} maps {tuple(x.shape)} to {_described(result)}; since a model can be cut after any unit, every "
                "unit must map (n, channels, h, w) to (n, channels, h, w)"
            )
        x = result
        shapes.append((int(x.shape[1]), int(x.shape[2]), int(x.shape[3])))
    return shapes


def _described(result: object) -> str:
    return f"a tensor of shape {tuple(result.shape)}" if isinstance(result, Tensor) else f"a {type(result).__name__}"
