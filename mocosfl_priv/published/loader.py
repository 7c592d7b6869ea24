"""Client models of the public MocoSFL release (Li et al., ICLR 2023): to attack a published defense again."""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from mocosfl_priv.config import Bottleneck
from mocosfl_priv.errors import ConfigurationError
from mocosfl_priv.models.bottleneck import compress
from mocosfl_priv.models.layers import LayerOptions, Normalise
from mocosfl_priv.models.resnet import RESNETS
from mocosfl_priv.runtime.imports import one_line
from mocosfl_priv.runtime.seeding import global_seed

CIFAR_MEAN = (0.4914, 0.4822, 0.4465)
CIFAR_STD = (0.2023, 0.1994, 0.2010)
IMAGE_SIZE = 32
STEM_CHANNELS = 64
WRAPPERS = ("state_dict", "model_state_dict", "model", "client", "net", "network", "weights")
# what DataParallel, torch.compile, MoCo and a user's own module put before every name; of MoCo's two the query encoder
PREFIXES = (
    "module.",
    "_orig_mod.",
    "encoder_q.",
    "base_encoder.",
    "backbone.",
    "encoder.",
    "client.",
    "model.",
    "net.",
)
DEEPEST_WRAPPER = 3
PARTIAL_PREFIX = "encoder_q."  # which has others beside it that are no part of the client
STRIDE = 2  # of every published bottleneck (C4S2); a state dict does not tell it


def load_published_client(path: Path | str, cut_layer: int | None = None) -> nn.Module:
    """The ResNet-18 client in the release's file `path`, for images (n, 3, 32, 32) in [0, 1].

    What trainings put around a state dict is taken off: a wrapper such as ``{"state_dict": ...}``, prefixes such as
    ``module.``, half or double precision. Its first layer normalises as the release did. Cut layer and bottleneck are
    inferred from the names and shapes of the parameters; `cut_layer` only states which is expected. Smashed data is
    (n, 4, 16, 16) with the published C4S2, and the cut's own (n, 64, 32, 32) without.

    Raises ConfigurationError for a file that is not such a client, or whose weights are not finite.
    """
    state = _with_named_bottleneck(_read(Path(path)))
    found = max(_unit_numbers(state), default=-1) + 1
    units = RESNETS["resnet18"].build(STEM_CHANNELS, IMAGE_SIZE, LayerOptions())
    if not 1 <= found <= len(units):
        first = next(iter(state), "nothing")
        raise ConfigurationError(
            f"{path}: not a published client: no parameter of a unit from 0 to {len(units) - 1}; names begin like "
            f"{first!r}, and should like '0.conv.weight': take off what stands before the number"
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


def reinitialised(client: nn.Module, seed: int) -> nn.Module:
    """A client of the same layers with freshly drawn weights."""
    fresh = copy.deepcopy(client)
    with global_seed(seed, "initialisation"):
        for module in fresh.modules():
            reset = getattr(module, "reset_parameters", None)
            if callable(reset):
                reset()
    return fresh


def _unit_numbers(state: Mapping[str, Tensor]) -> set[int]:
    return {int(name.split(".")[0]) for name in state if name.split(".")[0].isdecimal()}


def _with_named_bottleneck(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """`state` with the bottleneck called ``cut``: the files number it like one more unit (``2.weight``)."""
    last = max(_unit_numbers(state), default=-1)
    return {f"cut.{name.split('.')[1]}" if name in (f"{last}.weight", f"{last}.bias") else name: value
            for name, value in state.items()}  # fmt: skip


def read_weights_only(path: Path) -> object:
    """What torch saved in `path`, on the CPU: tensors and plain containers of them, never an unpickled object.

    Raises ConfigurationError for a file that is missing or anything else.
    """
    try:
        return torch.load(path, weights_only=True, map_location="cpu")
    except OSError as error:
        raise ConfigurationError(f"{path} cannot be read: {error.strerror or one_line(error)}") from error
    except Exception as error:  # a file that is something else fails in any way
        raise ConfigurationError(
            f"{path}: not a torch file with weights only ({type(error).__name__}); a whole pickled model is never run: "
            "save its state dict, torch.save(model.state_dict(), file)"
        ) from error


def _read(path: Path) -> dict[str, Tensor]:
    state = read_weights_only(path)
    for _ in range(DEEPEST_WRAPPER):
        inner = [state[wrapper] for wrapper in WRAPPERS if wrapper in state] if isinstance(state, Mapping) else []
        state = next((found for found in inner if isinstance(found, Mapping)), state)
    if not isinstance(state, Mapping) or not all(
        isinstance(name, str) and isinstance(value, Tensor) for name, value in state.items()
    ):
        raise ConfigurationError(f"{path}: not a plain state dict, but a {type(state).__name__} of something else")
    for name, value in state.items():
        if value.layout is not torch.strided or value.is_quantized:
            raise ConfigurationError(f"{path}: {name} is quantised or sparse: save it as plain float32")
        if value.is_meta:
            raise ConfigurationError(f"{path}: {name} holds no numbers: it was saved from the meta device")
        if not bool((value if value.is_complex() else value.float()).isfinite().all()):  # float64 reaches further
            raise ConfigurationError(f"{path}: weights are not finite: {name}")
    mine = _without_prefixes(state)
    for name, value in mine.items():
        if value.dim() > 1 and not value.is_floating_point():  # a counter is no weight
            kind = str(value.dtype).removeprefix("torch.")
            raise ConfigurationError(f"{path}: {name} holds {kind} numbers: save weights as plain float32")
    return {name: value.float() for name, value in mine.items() if value.is_floating_point()}


def _without_prefixes(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """`state` with names that begin with a unit's number, where only known prefixes stand before them."""
    found = dict(state)
    while True:
        for prefix in PREFIXES:
            mine = {name.removeprefix(prefix): value for name, value in found.items() if name.startswith(prefix)}
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
