"""The messages between devices and server, and their validation.

:func:`unpack` turns bytes into one of the message classes below, or refuses them with a :class:`Reason`. What depends
on the receiver's request (shape and codec of an array) is checked by :meth:`Packed.array`. Nothing is unpickled, and
every length that a peer states is compared with a limit before memory is allocated.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from enum import IntEnum
from typing import Any

import numpy as np
from google.protobuf.message import DecodeError

from . import codecs
from .codecs import Codec
from .errors import DeviceError
from .wire import split_pb2 as wire

VERSION = 1
LARGEST_FRAME = 320 * 2**20  # bytes of a message; the largest is a welcome with the client's program
# Limit for smashed data, gradients and weights; larger values could make another client's numbers overflow float32.
LARGEST_NUMBER = 1e6
LONGEST_TEXT = 512
MOST_DIMENSIONS = 8
MOST_TENSORS = 10_000
FP32: Codec = "fp32"
CODEC_NUMBERS: dict[Codec, wire.Codec] = {"fp32": wire.FP32, "fp16": wire.FP16, "int8": wire.INT8}
CODEC_NAMES: dict[int, Codec] = {number: name for name, number in CODEC_NUMBERS.items()}
CODEC_FIELDS = ("activations", "gradients")  # of a welcome


class Reason(IntEnum):
    """Why a message was refused; the numbers go over the wire."""

    MALFORMED = 1  # not an envelope, or a field with an invalid value
    OTHER_VERSION = 2
    OTHER_RUN = 3
    OTHER_SESSION = 4
    REPLAYED = 5  # its sequence number was received before
    OUT_OF_ORDER = 6  # the message before it is missing
    UNEXPECTED = 7  # it was not requested
    WRONG_SHAPE = 8
    WRONG_DTYPE = 9  # its codec is not the agreed one
    NOT_FINITE = 10
    OUT_OF_RANGE = 11  # finite, but larger than LARGEST_NUMBER
    OVERSIZE = 12
    WRONG_IDENTITY = 13  # not the device of the certificate, or not a device of this run
    REPLACED = 14  # the same device has opened another connection


class RefusedError(DeviceError):
    """A message was refused; `reason` and `detail` say why."""

    def __init__(self, reason: Reason, detail: str) -> None:
        super().__init__(f"{reason.name.lower()}: {detail}")
        self.reason = reason
        self.detail = detail


@dataclass(frozen=True)
class Header:
    """The fields that every message has; see `split.proto`."""

    run: str
    session: str
    sequence: int


@dataclass(frozen=True)
class Packed:
    """A float32 array as it is sent: encoded by a codec."""

    shape: tuple[int, ...]
    codec: Codec
    data: bytes
    scales: bytes = b""

    @classmethod
    def of(cls, array: np.ndarray, codec: Codec = FP32) -> Packed:
        """Encode a float32 array; codecs other than fp32 take arrays (n, c, h, w) only."""
        if codec == FP32:  # any shape, for weights
            if array.dtype != np.float32 or not np.isfinite(array).all():
                raise DeviceError("only finite float32 numbers can be sent")
            return cls(array.shape, codec, np.ascontiguousarray(array, "<f4").tobytes())
        encoded = codecs.encode(array, codec)
        return cls(array.shape, codec, encoded.payload, encoded.scales)

    @property
    def nbytes(self) -> int:
        """Bytes of numbers and scales together."""
        return len(self.data) + len(self.scales)

    def array(self, shape: Sequence[int], codec: Codec = FP32) -> np.ndarray:
        """Decode the array, as float32.

        Raises RefusedError unless it has this shape and codec, and its numbers are finite and at most `LARGEST_NUMBER`.
        """
        if self.codec != codec:
            raise RefusedError(Reason.WRONG_DTYPE, f"got {self.codec}, but {codec} was agreed on")
        if self.shape != tuple(shape):
            raise RefusedError(Reason.WRONG_SHAPE, f"got {self.shape}, expected {tuple(shape)}")
        expected = (4 * math.prod(shape), 0) if codec == FP32 else codecs.sizes(shape, codec)
        if (len(self.data), len(self.scales)) != expected:
            raise RefusedError(
                Reason.WRONG_SHAPE,
                f"got {len(self.data)} + {len(self.scales)} bytes, expected {expected[0]} + {expected[1]}",
            )
        if codec == FP32:
            array = np.frombuffer(self.data, "<f4").reshape(shape).astype(np.float32)
        else:
            try:
                array = codecs.decode(self.data, self.scales, shape, codec)
            except DeviceError as error:
                raise RefusedError(Reason.NOT_FINITE, str(error)) from error
        if not np.isfinite(array).all():
            raise RefusedError(Reason.NOT_FINITE, "NaN or infinity")
        if array.size and float(np.abs(array).max()) > LARGEST_NUMBER:
            raise RefusedError(Reason.OUT_OF_RANGE, f"a number beyond {LARGEST_NUMBER:g}")
        return array


@dataclass(frozen=True)
class Register:
    """A device's first message.

    device: its name.
    images: number of images that it holds.
    program_digest: digest of the program that it holds; empty for none.
    resumes: its last session, if it still holds the state of that session.
    serial: serial number of the weights that it was sent last.
    """

    device: str
    images: int
    program_digest: str = ""
    resumes: str = ""
    serial: int = 0


@dataclass(frozen=True)
class Welcome:
    """The answer to a registration: which client the device is, what it computes, and the settings of the run.

    program: the client program; empty if the device holds the one with this digest.
    """

    run: str
    session: str
    client: int
    program_digest: str
    program: bytes
    activations: Codec
    gradients: Codec
    seed: int
    drop_partial: bool
    heartbeat_seconds: float


@dataclass(frozen=True)
class Draw:
    """A request to encode `count` images, after the `offset` images that this client has drawn before."""

    request: int
    step: int
    offset: int
    count: int


@dataclass(frozen=True)
class Smashed:
    """The answer to a :class:`Draw`: smashed data of queries and keys."""

    request: int
    queries: Packed
    keys: Packed


@dataclass(frozen=True)
class Gradient:
    """The gradient for the queries of `request`, from which the device learns.

    rate: learning rate.
    share: one divided by the number of queries in the step; the weight of a query's own loss, if a defense has one.
    """

    request: int
    rate: float
    gradient: Packed
    share: float = 0.0


@dataclass(frozen=True)
class Ask:
    """A request for the device's online model and, if set, its momentum model and the optimiser's velocity."""

    request: int
    momentum_model: bool
    velocity: bool


@dataclass(frozen=True)
class Weights:
    """A client's state by name: ``online.<name>``, ``key.<name>``, ``velocity.<name>``.

    From a device it is the answer to `request`; from the server it replaces the device's state, and `request` is 0.

    serial: increases with every state that the server sends; a device repeats the last one that it received.
    """

    request: int
    serial: int
    steps_taken: int
    tensors: Mapping[str, Packed]

    def arrays(self, shapes: Mapping[str, Sequence[int]]) -> dict[str, np.ndarray]:
        """Decode all arrays; raises RefusedError unless names and shapes are exactly those of `shapes`."""
        if set(self.tensors) != set(shapes):
            odd = sorted(set(self.tensors) ^ set(shapes))[0]
            raise RefusedError(Reason.WRONG_SHAPE, f"weights: {odd[:80]!r} is missing or unknown")
        return {name: self.tensors[name].array(shape) for name, shape in shapes.items()}


@dataclass(frozen=True)
class Report:
    """What a device has measured of itself since it started; sent at regular intervals, also as its heartbeat.

    Bytes are resident memory unless named otherwise; 0 stands for not measured.

    energy_method: how energy was measured; empty if it was not.
    """

    cpu_seconds: float = 0.0
    resident_bytes: int = 0
    baseline_bytes: int = 0
    peak_bytes: int = 0
    cgroup_peak_bytes: int = 0
    steps: int = 0
    encode_seconds: float = 0.0
    learn_seconds: float = 0.0
    joules: float = 0.0
    idle_watts: float = 0.0
    energy_seconds: float = 0.0
    energy_method: str = ""


@dataclass(frozen=True)
class Finish:
    """The server has finished: the device sends a last report and disconnects."""

    text: str = ""


@dataclass(frozen=True)
class Refusal:
    """A message was refused, and the connection ends."""

    reason: int
    detail: str


Message = Register | Welcome | Draw | Smashed | Gradient | Ask | Weights | Report | Finish | Refusal


KINDS: dict[str, type[Message]] = {
    kind.__name__.lower(): kind
    for kind in (Register, Welcome, Draw, Smashed, Gradient, Ask, Weights, Report, Finish, Refusal)
}


def payload(message: Message) -> int:
    """Return the bytes of a message that carry tensors or the program, without the protocol's own bytes."""
    if isinstance(message, Smashed):
        return message.queries.nbytes + message.keys.nbytes
    if isinstance(message, Gradient):
        return message.gradient.nbytes
    if isinstance(message, Weights):
        return sum(tensor.nbytes for tensor in message.tensors.values())
    return len(message.program) if isinstance(message, Welcome) else 0


def pack(header: Header, message: Message) -> bytes:
    """Serialise a message as one frame."""
    envelope = wire.Envelope(version=VERSION, run=header.run, session=header.session, sequence=header.sequence)
    name = type(message).__name__.lower()
    getattr(envelope, name).CopyFrom(_to_wire(message))
    return envelope.SerializeToString()


def unpack(frame: bytes, largest: int = LARGEST_FRAME) -> tuple[Header, Message]:
    """Parse a frame of at most `largest` bytes; raises RefusedError for anything that :func:`pack` would not write."""
    if len(frame) > largest:
        raise RefusedError(Reason.OVERSIZE, f"got {len(frame)} bytes, but at most {largest} are allowed")
    envelope = wire.Envelope()
    try:
        envelope.ParseFromString(frame)
    except (DecodeError, ValueError, RecursionError) as error:
        raise RefusedError(Reason.MALFORMED, "not an envelope") from error
    if envelope.version != VERSION:
        raise RefusedError(Reason.OTHER_VERSION, f"got protocol version {envelope.version}, expected {VERSION}")
    header = Header(_text(envelope.run), _text(envelope.session), envelope.sequence)
    name = envelope.WhichOneof("body")
    if name is None:
        raise RefusedError(Reason.MALFORMED, "an envelope without a message")
    return header, _from_wire(KINDS[name], getattr(envelope, name))


@dataclass
class InOrder:
    """Checks the headers in one direction of a connection: same run and session, sequence numbers rising by 1."""

    run: str
    session: str
    next: int = 0

    def check(self, header: Header) -> None:
        """Raise RefusedError unless `header` is that of the next message."""
        if header.run != self.run:
            raise RefusedError(Reason.OTHER_RUN, f"got run {header.run[:80]!r}, but this is {self.run!r}")
        if header.session != self.session:
            raise RefusedError(
                Reason.OTHER_SESSION, f"session {header.session[:80]!r} is not the session of this connection"
            )
        if header.sequence < self.next:
            raise RefusedError(Reason.REPLAYED, f"message {header.sequence} was received before")
        if header.sequence > self.next:
            raise RefusedError(Reason.OUT_OF_ORDER, f"got message {header.sequence}, expected {self.next}")
        self.next += 1


# The dataclasses above have the same field names as the schema `split.proto`; only tensors and codecs are converted.


def _to_wire(message: Message) -> Any:
    written: dict[str, Any] = {}
    for name, value in vars(message).items():
        if isinstance(value, Packed):
            written[name] = _tensor(value)
        elif name == "tensors":
            written[name] = [wire.NamedTensor(name=each, tensor=_tensor(packed)) for each, packed in value.items()]
        else:
            written[name] = CODEC_NUMBERS[value] if name in CODEC_FIELDS else value
    return getattr(wire, type(message).__name__)(**written)


def _from_wire(kind: type[Message], body: Any) -> Message:
    read: dict[str, Any] = {}
    for name in (field.name for field in fields(kind)):
        value = getattr(body, name)
        if isinstance(value, wire.Tensor):
            read[name] = _packed(value)
        elif name == "tensors":
            read[name] = _named(value)
        elif name in CODEC_FIELDS:
            read[name] = _codec(value)
        elif isinstance(value, str):
            read[name] = _text(value)
        elif isinstance(value, float):
            read[name] = _number(value)
        else:
            read[name] = value
    return kind(**read)


def _tensor(packed: Packed) -> wire.Tensor:
    return wire.Tensor(shape=packed.shape, codec=CODEC_NUMBERS[packed.codec], data=packed.data, scales=packed.scales)


def _packed(tensor: wire.Tensor) -> Packed:
    if len(tensor.shape) > MOST_DIMENSIONS:
        raise RefusedError(Reason.WRONG_SHAPE, f"{len(tensor.shape)} dimensions")
    return Packed(tuple(tensor.shape), _codec(tensor.codec), tensor.data, tensor.scales)


def _named(tensors: Sequence[wire.NamedTensor]) -> dict[str, Packed]:
    if len(tensors) > MOST_TENSORS:
        raise RefusedError(Reason.OVERSIZE, f"got {len(tensors)} tensors, but at most {MOST_TENSORS} are allowed")
    read = {_text(each.name): _packed(each.tensor) for each in tensors}
    if len(read) < len(tensors):
        raise RefusedError(Reason.MALFORMED, "two tensors have the same name")
    return read


def _codec(number: int) -> Codec:
    if number not in CODEC_NAMES:
        raise RefusedError(Reason.WRONG_DTYPE, f"codec {number} is unknown")
    return CODEC_NAMES[number]


def _text(value: str) -> str:
    if len(value) > LONGEST_TEXT:
        raise RefusedError(
            Reason.OVERSIZE, f"got a text of {len(value)} characters, but at most {LONGEST_TEXT} are allowed"
        )
    if not value.isprintable():  # it may be written to a log
        raise RefusedError(Reason.MALFORMED, "a text with unprintable characters")
    return value


def _number(value: float) -> float:
    if not (math.isfinite(value) and value >= 0):
        raise RefusedError(Reason.NOT_FINITE, f"got {value}, expected a finite number of 0 or more")
    return value
