"""A backbone cut in two: the client's units and bottleneck, the server's trunk and projector."""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from mocosfl_priv.config import Bottleneck, ModelConfig, parse_bottleneck
from mocosfl_priv.errors import ConfigurationError, unknown_name
from mocosfl_priv.models.layers import GlobalAveragePool, Normalise
from mocosfl_priv.models.resnet import BACKBONES


@dataclass
class SplitModel:
    """Client and server side of one model.

    client: images (n, 3, h, w) in [0, 1] to smashed data (n, *smashed_shape).
    trunk: smashed data to features (n, feature_dim).
    projector: features to contrastive embeddings (n, projector_out).
    """

    client: nn.Module
    trunk: nn.Module
    projector: nn.Module
    image_shape: tuple[int, int, int]
    smashed_shape: tuple[int, ...] = field(init=False)
    feature_dim: int = field(init=False)

    def __post_init__(self) -> None:
        probe = torch.zeros(1, *self.image_shape)
        with torch.no_grad():
            smashed = self.client(probe)
            self.smashed_shape = tuple(smashed.shape[1:])
            self.feature_dim = int(self.trunk(smashed).shape[1])

    def to(self, device: torch.device) -> SplitModel:
        """Move all three parts; returns self."""
        for part in (self.client, self.trunk, self.projector):
            part.to(device)
        return self

    def copy(self) -> SplitModel:
        """An independent deep copy."""
        return copy.deepcopy(self)


def validate_cut(model: ModelConfig, cut_layer: int, where: str = "cut_layers") -> None:
    """Raise ConfigurationError unless `model`'s backbone exists and leaves the server a unit after `cut_layer`."""
    if model.backbone not in BACKBONES:
        raise unknown_name("model", model.backbone, BACKBONES)
    units = BACKBONES[model.backbone].units
    if not 1 <= cut_layer < units:
        raise ConfigurationError(
            f"{where}: cut layer {cut_layer} is impossible: {model.backbone} has {units} units (the stem and "
            f"{units - 1} blocks), so it can be cut after unit 1 to {units - 1}"
        )


def build_split_model(
    model: ModelConfig, cut_layer: int, image_size: int, mean: Sequence[float], std: Sequence[float]
) -> SplitModel:
    """Build and cut a freshly initialised model; initialisation draws from torch's global generator.

    mean, std: colour statistics that the client normalises with, for images in [0, 1].
    """
    validate_cut(model, cut_layer)
    units = BACKBONES[model.backbone].build(model.width, image_size)
    ours, theirs = units[:cut_layer], units[cut_layer:]
    client = OrderedDict[str, nn.Module](normalise=Normalise(mean, std))
    client.update((str(index), unit) for index, unit in enumerate(ours))
    trunk = OrderedDict[str, nn.Module]()
    bottleneck = parse_bottleneck(model.bottleneck)
    if bottleneck is not None:
        probe = torch.zeros(1, 3, image_size, image_size)
        with torch.no_grad():
            channels, *size = nn.Sequential(client)(probe).shape[1:]
        if any(side % bottleneck.stride for side in size):
            raise ConfigurationError(
                f"model.bottleneck: {model.bottleneck} does not fit: its stride does not divide {size[0]}x{size[1]}"
            )
        client["cut"] = _compress(bottleneck, channels)
        trunk["uncut"] = _expand(bottleneck, channels)
    trunk.update((str(cut_layer + index), unit) for index, unit in enumerate(theirs))
    trunk["pool"] = GlobalAveragePool()
    features = _last_channels(theirs)
    projector = nn.Sequential(
        nn.Linear(features, model.projector_hidden),
        nn.ReLU(),
        nn.Linear(model.projector_hidden, model.projector_out),
    )
    return SplitModel(nn.Sequential(client), nn.Sequential(trunk), projector, (3, image_size, image_size))


class _Compress(nn.Conv2d):
    """One bottleneck convolution with its ReLU; a plain convolution with bias, as published (`cut.weight`)."""

    def __init__(self, in_channels: int, channels: int, kernel: int, stride: int, relu: bool) -> None:
        super().__init__(in_channels, channels, kernel, stride, kernel // 2)
        self.relu = relu

    def forward(self, x: Tensor) -> Tensor:
        y = super().forward(x)
        return y.relu() if self.relu else y


def _compress(bottleneck: Bottleneck, channels: int) -> nn.Module:
    """The client's end: one convolution per halving, at least one, all to the bottleneck's channels."""
    halvings = bottleneck.stride.bit_length() - 1
    layers = [
        _Compress(
            channels if index == 0 else bottleneck.channels,
            bottleneck.channels,
            bottleneck.kernel,
            2 if halvings else 1,
            bottleneck.relu,
        )
        for index in range(max(1, halvings))
    ]
    return layers[0] if len(layers) == 1 else nn.Sequential(*layers)


def _expand(bottleneck: Bottleneck, channels: int) -> nn.Module:
    """The server's mirror image: transposed convolutions back to the cut's channels and size."""
    halvings = bottleneck.stride.bit_length() - 1
    layers: list[nn.Module] = []
    steps = max(1, halvings)
    for index in range(steps):
        layers.append(
            nn.ConvTranspose2d(
                bottleneck.channels,
                channels if index == steps - 1 else bottleneck.channels,
                bottleneck.kernel,
                stride=2 if halvings else 1,
                padding=bottleneck.kernel // 2,
                output_padding=1 if halvings else 0,
            )
        )
        if bottleneck.relu:
            layers.append(nn.ReLU())
    return nn.Sequential(*layers)


def _last_channels(units: Sequence[nn.Module]) -> int:
    norms = [m for unit in units for m in unit.modules() if isinstance(m, nn.GroupNorm)]
    return norms[-1].num_channels


def count_parameters(module: nn.Module) -> int:
    """Trainable numbers in `module`."""
    return sum(parameter.numel() for parameter in module.parameters())


def forward_flops(module: nn.Module, input_shape: Sequence[int]) -> int:
    """Floating-point operations of one forward pass of one image, by torch's counter (a multiply-add is two)."""
    parameter = next(module.parameters(), None)
    device = parameter.device if parameter is not None else torch.device("cpu")
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        module(torch.zeros(1, *input_shape, device=device))
    return int(counter.get_total_flops())
