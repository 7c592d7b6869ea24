"""Split models: a backbone cut into the client's part and the server's part."""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from mocosfl_priv.config import ModelConfig, parse_bottleneck
from mocosfl_priv.errors import ConfigurationError
from mocosfl_priv.models.backbones import build_units, find_backbone, unit_shapes
from mocosfl_priv.models.bottleneck import compress, expand
from mocosfl_priv.models.custom_backbone import check_stackable, is_own
from mocosfl_priv.models.layers import GlobalAveragePool, Normalise, drop_shortcuts
from mocosfl_priv.models.modes import in_eval_mode
from mocosfl_priv.models.projector import build_projector
from mocosfl_priv.runtime.imports import load_function


@dataclass
class SplitModel:
    """The client's and the server's part of a model.

    Args:
        client: images (n, 3, h, w) in [0, 1] to smashed data (n, *smashed_shape).
        trunk: smashed data to features (n, feature_dim).
        projector: features to contrastive embeddings (n, projector_out).
        image_shape: (3, h, w).
        participants: parameters of `client` as single clients held them before they were last averaged; empty where
            no clients were trained. Not part of :meth:`named_state`.
    """

    client: nn.Module
    trunk: nn.Module
    projector: nn.Module
    image_shape: tuple[int, int, int]
    participants: tuple[dict[str, Tensor], ...] = ()
    smashed_shape: tuple[int, ...] = field(init=False)
    feature_dim: int = field(init=False)

    def __post_init__(self) -> None:
        probe = torch.zeros(1, *self.image_shape)
        with torch.no_grad(), in_eval_mode(self.client, self.trunk):
            smashed = self.client(probe)
            self.smashed_shape = tuple(smashed.shape[1:])
            self.feature_dim = int(self.trunk(smashed).shape[1])

    def to(self, device: torch.device) -> SplitModel:
        """Move all three parts; returns self."""
        for part in (self.client, self.trunk, self.projector):
            part.to(device)
        return self

    def named_state(self) -> dict[str, Tensor]:
        """Return parameters and persistent buffers of all three parts as ``<part>.<name>``; they are not copied."""
        parts = {"client": self.client, "trunk": self.trunk, "projector": self.projector}
        return {f"{part}.{name}": value for part, m in parts.items() for name, value in m.state_dict().items()}

    def copy(self) -> SplitModel:
        """Return an independent deep copy."""
        return copy.deepcopy(self)


def validate_cut(model: ModelConfig, cut_layer: int, where: str = "cut_layers") -> None:
    """Raise ConfigurationError unless `model`'s backbone exists and can be cut after unit `cut_layer` (from 1).

    For a user's own backbone only its existence is checked, since the number of its units is not known before
    :func:`build_split_model` builds it. where: the configuration key that the message names.
    """
    if is_own(model.backbone):
        load_function(model.backbone)
    else:
        _require_unit(model.backbone, find_backbone(model.backbone).units, cut_layer, where)


def _require_unit(backbone: str, units: int, cut_layer: int, where: str) -> None:
    if not 1 <= cut_layer <= units:
        raise ConfigurationError(
            f"{where}: cut layer {cut_layer} is impossible: {backbone} has {units} units, "
            f"so it can be cut after unit 1 to {units}"
        )


def build_split_model(
    model: ModelConfig, cut_layer: int, image_size: int, mean: Sequence[float], std: Sequence[float]
) -> SplitModel:
    """Build a freshly initialised model, cut after unit `cut_layer` (from 1).

    The server gets the remaining units, global average pooling, and the projector; with a cut after the last unit,
    only the latter two. Initialisation draws from torch's global generator.

    image_size: height and width in pixels.
    mean, std: colour mean and standard deviation, for images in [0, 1], with which the client normalises.
    Raises ConfigurationError when backbone, cut, image size and bottleneck do not fit together.
    """
    units = build_units(model, image_size)
    _require_unit(model.backbone, len(units), cut_layer, "cut_layers")
    shapes = unit_shapes(units, image_size, model.backbone)
    ours, theirs = units[:cut_layer], units[cut_layer:]
    if is_own(model.backbone):
        check_stackable(ours, image_size, model.backbone)
    if not model.client_residuals:
        drop_shortcuts(ours)
    client = OrderedDict[str, nn.Module](normalise=Normalise(mean, std))
    client.update((str(index), unit) for index, unit in enumerate(ours))
    trunk = OrderedDict[str, nn.Module]()
    bottleneck = parse_bottleneck(model.bottleneck)
    if bottleneck is not None:
        channels, *size = shapes[cut_layer - 1]
        if any(side % bottleneck.stride for side in size):
            raise ConfigurationError(
                f"model.bottleneck: {model.bottleneck} is impossible at cut layer {cut_layer}: its stride "
                f"{bottleneck.stride} does not divide the map size {size[0]}x{size[1]}"
            )
        client["cut"] = compress(bottleneck, channels)
        trunk["uncut"] = expand(bottleneck, channels)
    trunk.update((str(cut_layer + index), unit) for index, unit in enumerate(theirs))
    trunk["pool"] = GlobalAveragePool()
    projector = build_projector(model, features=shapes[-1][0])
    return SplitModel(nn.Sequential(client), nn.Sequential(trunk), projector, (3, image_size, image_size))


def count_parameters(module: nn.Module) -> int:
    """Return the number of parameters in `module`, counted as single numbers."""
    return sum(parameter.numel() for parameter in module.parameters())


def forward_flops(module: nn.Module, input_shape: Sequence[int]) -> int:
    """Return the floating-point operations of a forward pass of one input, by torch's counter (a multiply-add is two).

    input_shape: without the batch axis.
    """
    parameter = next(module.parameters(), None)
    device = parameter.device if parameter is not None else torch.device("cpu")
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        module(torch.zeros(1, *input_shape, device=device))
    return int(counter.get_total_flops())
