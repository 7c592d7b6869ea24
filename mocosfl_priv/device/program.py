"""The client program that a server sends to a device: graphs, initial parameters, and settings of training."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from functools import cached_property
from typing import Any, Literal

import numpy as np

from .container import pack, require, unpack
from .errors import DeviceError

FORMAT = 2  # format of the serialised program; a device refuses any other
LARGEST_PROGRAM = 256 * 2**20  # bytes; a whole ResNet-18 with both graphs takes 45 million
LARGEST_MAP = 2**24  # largest number of values in one image or its smashed data
LARGEST_DRAW = LARGEST_MAP  # largest number of values in one random input of a graph
MOST_RANDOM_INPUTS = 64
FORWARD, VJP, PARAMETER = "graph.forward", "graph.vjp", "parameter."
DISTRIBUTIONS = ("normal", "uniform")
CHOICES: dict[str, tuple[str, ...]] = {
    "ema_update": ("after_step", "before_encoding"),
    "paper_gradient": ("both", "one_sided"),
    "augmentation": ("moco_v2", "none"),
}


@dataclass(frozen=True)
class ClientSettings:
    """How a client learns; the fields are those of the experiment's `training` section.

    trainable: False for clients that only encode, without gradients and FedAvg.
    momentum, weight_decay: of SGD.
    ema: coefficient of the momentum encoder's exponential moving average.
    ema_update: whether the momentum encoder is updated after a step, or before it next encodes.
    symmetric: whether each view serves as query and as key.
    paper_gradient: with one_sided, each view is encoded once.
    augmentation: how views are made.

    Raises DeviceError for invalid values.
    """

    trainable: bool
    momentum: float = 0.9
    weight_decay: float = 5e-4
    ema: float = 0.99
    ema_update: Literal["after_step", "before_encoding"] = "after_step"
    symmetric: bool = True
    paper_gradient: Literal["both", "one_sided"] = "both"
    augmentation: Literal["moco_v2", "none"] = "moco_v2"

    def __post_init__(self) -> None:
        ranges = {"momentum": (0.0, 1.0), "weight_decay": (0.0, math.inf), "ema": (0.0, 1.0)}
        for name, (low, high) in ranges.items():
            value = getattr(self, name)
            if type(value) not in (int, float) or not math.isfinite(value) or not low <= value <= high:
                raise DeviceError(f"settings: {name} must be a number from {low:g} to {high:g}, not {value!r}")
        for name, known in CHOICES.items():
            if getattr(self, name) not in known:
                raise DeviceError(f"settings: {name} must be one of {', '.join(known)}, not {getattr(self, name)!r}")
        for name in ("trainable", "symmetric"):
            if type(getattr(self, name)) is not bool:
                raise DeviceError(f"settings: {name} must be true or false, not {getattr(self, name)!r}")

    @property
    def encodes_once(self) -> bool:
        """Whether each view is encoded and sent once, and the server uses it as query and key."""
        return self.symmetric and (not self.trainable or self.paper_gradient == "one_sided")


@dataclass(frozen=True)
class RandomInput:
    """A random input of the graphs, per image: independent float32 numbers, standard normal or uniform in [0, 1).

    The device draws new numbers for every message; both graphs use the same numbers for a query.
    """

    distribution: Literal["normal", "uniform"]
    shape: tuple[int, ...]

    def __post_init__(self) -> None:
        if self.distribution not in DISTRIBUTIONS:
            raise DeviceError(
                f"client program: random inputs are {' or '.join(DISTRIBUTIONS)}, not {self.distribution!r}"
            )
        if any(type(side) is not int or side < 1 for side in self.shape) or math.prod(self.shape) > LARGEST_DRAW:
            raise DeviceError(f"client program: a random input cannot have the shape {self.shape!r}")


@dataclass(frozen=True)
class ClientProgram:
    """The client side of a split model as ONNX graphs for one image, with what a device needs to train it.

    image_shape: (3, h, w).
    smashed_shape: (c, h, w), of one image.
    parameters: float32 arrays by name, in the order of the graphs' inputs.
    forward: ONNX model (image, *parameters, *random inputs) -> (smashed data as it is sent,).
    vjp: ONNX model (image, gradient, *parameters, *random inputs) -> the gradient of every parameter; None for a frozen
        client. With `own_loss` it also takes the weight of that loss, float32 ().
    settings: how the client learns.
    random_inputs: random numbers that a defense at the client draws; empty without one.
    own_loss: whether a defense adds a loss, a mean over images, to the server's.

    No unit of a client mixes images, so graphs take a single image: gradients of several images are summed, and memory
    does not grow with the micro-batch. Raises DeviceError if the parts do not fit together.
    """

    image_shape: tuple[int, int, int]
    smashed_shape: tuple[int, int, int]
    parameters: Mapping[str, np.ndarray]
    forward: bytes
    vjp: bytes | None
    settings: ClientSettings
    random_inputs: tuple[RandomInput, ...] = ()
    own_loss: bool = False

    def __post_init__(self) -> None:
        for name, shape in (("image_shape", self.image_shape), ("smashed_shape", self.smashed_shape)):
            if len(shape) != 3 or any(type(side) is not int or side < 1 for side in shape):
                raise DeviceError(f"client program: {name} must be three sizes, not {shape!r}")
            if math.prod(shape) > LARGEST_MAP:
                raise DeviceError(f"client program: {name} {shape} is larger than {LARGEST_MAP} numbers")
        if self.image_shape[0] != 3:
            raise DeviceError(f"client program: images have three colours, not {self.image_shape[0]}")
        if not self.forward or (self.vjp is not None and not self.vjp):
            raise DeviceError("client program: a graph is empty")
        if self.settings.trainable != (self.vjp is not None):
            raise DeviceError(
                "client program: a trainable client needs the graph of its gradients, a frozen one has none"
            )
        if self.own_loss and self.vjp is None:
            raise DeviceError("client program: a frozen client has no loss")
        if len(self.random_inputs) > MOST_RANDOM_INPUTS:
            raise DeviceError(f"client program: more than {MOST_RANDOM_INPUTS} random inputs")
        for name, value in self.parameters.items():
            if value.dtype != np.float32 or not np.isfinite(value).all():
                raise DeviceError(f"client program: parameter {name!r} must be finite float32")

    def to_bytes(self) -> bytes:
        """Serialise in the safetensors format: graphs as uint8, parameters as float32, a manifest as metadata."""
        arrays = {PARAMETER + name: value for name, value in self.parameters.items()}
        arrays[FORWARD] = np.frombuffer(self.forward, np.uint8)
        if self.vjp is not None:
            arrays[VJP] = np.frombuffer(self.vjp, np.uint8)
        manifest = {
            "format": FORMAT,
            "image_shape": self.image_shape,
            "smashed_shape": self.smashed_shape,
            "parameters": list(self.parameters),
            "settings": asdict(self.settings),
            "random_inputs": [[each.distribution, each.shape] for each in self.random_inputs],
            "own_loss": self.own_loss,
        }
        return pack(arrays, {"client_program": json.dumps(manifest, sort_keys=True)})

    @classmethod
    def from_bytes(cls, payload: bytes | memoryview, largest: int = LARGEST_PROGRAM) -> ClientProgram:
        """Parse and check what :meth:`to_bytes` returned; raises DeviceError for anything else.

        Whether the graphs match the manifest is checked by :class:`mocosfl_priv.device.runtime.DeviceClient`.
        """
        arrays, metadata = unpack(payload, largest)
        manifest = _manifest(metadata)
        names = manifest["parameters"]
        known = {FORWARD, VJP, *(PARAMETER + name for name in names)}
        if extra := sorted(set(arrays) - known):
            raise DeviceError(f"client program: array {extra[0]!r} is not in the manifest")
        parameters = {}
        for name in names:
            value = arrays.get(PARAMETER + name)
            if value is None or value.dtype != np.float32:
                raise DeviceError(f"client program: there are no float32 values for parameter {name!r}")
            parameters[name] = value
        return cls(
            tuple(manifest["image_shape"]),
            tuple(manifest["smashed_shape"]),
            parameters,
            require(arrays, FORWARD, "uint8", 1).tobytes(),
            require(arrays, VJP, "uint8", 1).tobytes() if VJP in arrays else None,
            _settings(manifest["settings"]),
            _random_inputs(manifest["random_inputs"]),
            manifest["own_loss"],
        )

    @cached_property
    def digest(self) -> str:
        """SHA-256 of :meth:`to_bytes`, as 64 hexadecimal digits."""
        return hashlib.sha256(self.to_bytes()).hexdigest()


def _manifest(metadata: Mapping[str, str]) -> dict[str, Any]:
    try:
        manifest = json.loads(metadata.get("client_program", ""))
    except (ValueError, RecursionError) as error:
        raise DeviceError("client program: there is no manifest") from error
    wanted = {
        "format": int, "image_shape": list, "smashed_shape": list, "parameters": list, "settings": dict,
        "random_inputs": list, "own_loss": bool,
    }  # fmt: skip
    if not isinstance(manifest, dict) or {k: type(v) for k, v in manifest.items()} != wanted:
        raise DeviceError(
            f"client program: the manifest must have exactly the keys {', '.join(wanted)}, with values of their types"
        )
    if manifest["format"] != FORMAT:
        raise DeviceError(f"client program: format {manifest['format']} is unknown; this device reads format {FORMAT}")
    names = manifest["parameters"]
    if not all(isinstance(name, str) for name in names) or len(set(names)) != len(names):
        raise DeviceError("client program: parameters must be distinct names")
    return manifest


def _settings(raw: Mapping[str, Any]) -> ClientSettings:
    names = {field.name for field in fields(ClientSettings)}
    if set(raw) != names:
        raise DeviceError(f"client program: settings must be {', '.join(sorted(names))}")
    return ClientSettings(**raw)


def _random_inputs(raw: list[Any]) -> tuple[RandomInput, ...]:
    if not all(isinstance(each, list) and len(each) == 2 and isinstance(each[1], list) for each in raw):
        raise DeviceError("client program: a random input is a distribution and a shape")
    return tuple(RandomInput(distribution, tuple(shape)) for distribution, shape in raw)
