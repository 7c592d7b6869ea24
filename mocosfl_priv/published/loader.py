"""Loader of the client models in the public MocoSFL release (Li et al., ICLR 2023), so that they can be attacked."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping
from pathlib import Path

from torch import Tensor, nn

from mocosfl_priv.config import Bottleneck
from mocosfl_priv.errors import ConfigurationError
from mocosfl_priv.models.bottleneck import compress
from mocosfl_priv.models.layers import LayerOptions, Normalise
from mocosfl_priv.models.resnet import RESNETS
from mocosfl_priv.models.weights import (
    DEEPEST_WRAPPER,
    PREFIXES,
    WRAPPERS,
    read_weights_only,
    require_plain,
    without_prefix,
)

CIFAR_MEAN = (0.4914, 0.4822, 0.4465)
CIFAR_STD = (0.2023, 0.1994, 0.2010)
IMAGE_SIZE = 32
STEM_CHANNELS = 64
PARTIAL_PREFIX = "encoder_q."  # parameters without this prefix are not part of the client and are dropped
STRIDE = 2  # of every published bottleneck (C4S2); it cannot be inferred from a state dict


def load_published_client(path: Path | str, cut_layer: int | None = None) -> nn.Module:
    """Load the ResNet-18 client in the release's file `path`, for images (n, 3, 32, 32) in [0, 1].

    Wrappers such as ``{"state_dict": ...}`` and prefixes such as ``module.`` are removed, and weights are converted to
    float32. The client's first layer normalises as the release did. Cut layer and bottleneck are inferred from names
    and shapes of the parameters. Smashed data is (n, 4, 16, 16) with the published bottleneck C4S2; without one, it has
    the shape at the cut, for example (n, 64, 32, 32).

    cut_layer: the expected cut layer, if known.
    Raises ConfigurationError for a file that is not such a client, is cut elsewhere than after unit `cut_layer`, or has
    weights that are not finite.
    """
    state = _with_named_bottleneck(_read(Path(path)))
    found = max(_unit_numbers(state), default=-1) + 1
    units = RESNETS["resnet18"].build(STEM_CHANNELS, IMAGE_SIZE, LayerOptions())
    if not 1 <= found <= len(units):
        first = next(iter(state), "nothing")
        raise ConfigurationError(
            f"{path}: not a published client: no parameter belongs to a unit from 0 to {len(units) - 1}. Names must "
            f"begin with the unit's number, like '0.conv1.weight', but are like {first!r}; remove what stands before it"
        )
    if cut_layer not in (None, found):
        raise ConfigurationError(f"{path}: the client is cut after unit {found}, not after unit {cut_layer}")
    client = OrderedDict[str, nn.Module](normalise=Normalise(CIFAR_MEAN, CIFAR_STD))
    client.update((str(index), unit) for index, unit in enumerate(units[:found]))
    weight = state.get("cut.weight")
    if weight is not None and weight.dim() == 4:
        bottleneck = Bottleneck(channels=weight.shape[0], stride=STRIDE, kernel=weight.shape[2])
        client["cut"] = compress(bottleneck, STEM_CHANNELS * 2 ** (max(0, found - 2) // 2))  # doubled every two blocks
    module = nn.Sequential(client)
    _require_fit(state, module.state_dict(), path)
    module.load_state_dict(state)
    return module


def _unit_numbers(state: Mapping[str, Tensor]) -> set[int]:
    return {int(name.split(".")[0]) for name in state if name.split(".")[0].isdecimal()}


def _with_named_bottleneck(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Rename the bottleneck to ``cut``; in the release's files it has the next unit's number (``2.weight``)."""
    last = max(_unit_numbers(state), default=-1)
    return {f"cut.{name.split('.')[1]}" if name in (f"{last}.weight", f"{last}.bias") else name: value
            for name, value in state.items()}  # fmt: skip


def _read(path: Path) -> dict[str, Tensor]:
    state = read_weights_only(path)
    for _ in range(DEEPEST_WRAPPER):
        inner = [state[wrapper] for wrapper in WRAPPERS if wrapper in state] if isinstance(state, Mapping) else []
        state = next((found for found in inner if isinstance(found, Mapping)), state)
    if not isinstance(state, Mapping) or not all(
        isinstance(name, str) and isinstance(value, Tensor) for name, value in state.items()
    ):
        raise ConfigurationError(f"{path}: not a plain state dict of tensors, but a {type(state).__name__}")
    require_plain(state, path)
    for name, value in state.items():
        if not bool((value if value.is_complex() else value.float()).isfinite().all()):  # float64 reaches further
            raise ConfigurationError(f"{path}: weights are not finite: {name}")
    mine = _without_prefixes(state)
    for name, value in mine.items():
        if value.dim() > 1 and not value.is_floating_point():  # a counter is no weight
            kind = str(value.dtype).removeprefix("torch.")
            raise ConfigurationError(f"{path}: {name} holds {kind} numbers: save weights as plain float32")
    return {name: value.float() for name, value in mine.items() if value.is_floating_point()}


def _without_prefixes(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Remove known prefixes from parameter names, so that the names begin with the unit's number."""
    found = dict(state)
    while True:
        for prefix in PREFIXES:
            mine = without_prefix(found, prefix)
            if mine and (len(mine) == len(found) or prefix == PARTIAL_PREFIX):
                found = mine
                break
        else:
            return found


def _require_fit(state: Mapping[str, Tensor], expected: Mapping[str, Tensor], path: Path | str) -> None:
    missing, unexpected = sorted(expected.keys() - state.keys()), sorted(state.keys() - expected.keys())
    if missing or unexpected:
        what = [f"without {name}" for name in missing[:1]] + [f"with an unexpected {name}" for name in unexpected[:1]]
        raise ConfigurationError(f"{path}: not a published client: a state dict {' and '.join(what)}")
    for name, value in expected.items():
        if state[name].shape != value.shape:
            raise ConfigurationError(
                f"{path}: not a published client: {name} has shape {tuple(state[name].shape)}, not {tuple(value.shape)}"
            )
