"""What device and server say to each other, checked on the way in.

Bytes become one of the classes below in :func:`unpack`, or are refused with a :class:`Reason`. What only the receiver
can know (which shape it asked for, which codec was agreed on) is checked where it reads a :class:`Packed` array.
Nothing here is ever unpickled, and no length that a peer claims is allocated before it was compared with a limit.
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
LARGEST_NUMBER = 1e6  # of smashed data, gradients and weights: whoever sends more could carry others out of float32
LONGEST_TEXT = 512
MOST_DIMENSIONS = 8
MOST_TENSORS = 10_000
FP32: Codec = "fp32"
CODEC_NUMBERS: dict[Codec, wire.Codec] = {"fp32": wire.FP32, "fp16": wire.FP16, "int8": wire.INT8}
CODEC_NAMES: dict[int, Codec] = {number: name for name, number in CODEC_NUMBERS.items()}
CODEC_FIELDS = ("activations", "gradients")  # of a welcome


class Reason(IntEnum):
    """Why a message was refused; the numbers go over the wire."""

    MALFORMED = 1  # not an envelope, or a field that no sender of ours would write
    OTHER_VERSION = 2
    OTHER_RUN = 3
    OTHER_SESSION = 4
    REPLAYED = 5  # its sequence number has been there
    OUT_OF_ORDER = 6  # one before it is missing
    UNEXPECTED = 7  # nobody asked for it
    WRONG_SHAPE = 8
    WRONG_DTYPE = 9  # another codec than was agreed on
    NOT_FINITE = 10
    OUT_OF_RANGE = 11  # finite, but larger than any honest number
    OVERSIZE = 12
    WRONG_IDENTITY = 13  # not the device of the certificate, or none of this run
    REPLACED = 14  # the same device has opened another conversation


class RefusedError(DeviceError):
    """A message that is not accepted."""

    def __init__(self, reason: Reason, detail: str) -> None:
        super().__init__(f"{reason.name.lower()}: {detail}")
        self.reason = reason
        self.detail = detail


@dataclass(frozen=True)
class Header:
    """What every message begins with; see `split.proto`."""

    run: str
    session: str
    sequence: int


@dataclass(frozen=True)
class Packed:
    """A float32 array as it goes over the wire."""

    shape: tuple[int, ...]
    codec: Codec
    data: bytes
    scales: bytes = b""

    @classmethod
    def of(cls, array: np.ndarray, codec: Codec = FP32) -> Packed:
        """Pack a float32 array; codecs other than fp32 take (n, c, h, w) only."""
        if codec == FP32:  # of any shape: weights have all sorts
            if array.dtype != np.float32 or not np.isfinite(array).all():
                raise DeviceError("only finite float32 numbers can be sent")
            return cls(array.shape, codec, np.ascontiguousarray(array, "<f4").tobytes())
        encoded = codecs.encode(array, codec)
        return cls(array.shape, codec, encoded.payload, encoded.scales)

    @property
    def nbytes(self) -> int:
        """Payload: numbers and scales."""
        return len(self.data) + len(self.scales)

    def array(self, shape: Sequence[int], codec: Codec = FP32) -> np.ndarray:
        """The float32 array, which must be of this shape and codec, finite, and of honest size; else RefusedError."""
        if self.codec != codec:
            raise RefusedError(Reason.WRONG_DTYPE, f"{self.codec} where {codec} was agreed on")
        if self.shape != tuple(shape):
            raise RefusedError(Reason.WRONG_SHAPE, f"{self.shape} where {tuple(shape)} is due")
        expected = (4 * math.prod(shape), 0) if codec == FP32 else codecs.sizes(shape, codec)
        if (len(self.data), len(self.scales)) != expected:
            raise RefusedError(
                Reason.WRONG_SHAPE, f"{len(self.data)} + {len(self.scales)} bytes where {expected} are due"
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
    """A device's first message. resumes, serial: the session whose state it still has, the weights it was handed."""

    device: str
    images: int
    program_digest: str = ""
    resumes: str = ""
    serial: int = 0


@dataclass(frozen=True)
class Welcome:
    """The answer: which client the device is, and what it computes.

    program: empty where the device holds that of the digest.
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
    """Encode `count` images, behind the `offset` that were drawn before."""

    request: int
    step: int
    offset: int
    count: int


@dataclass(frozen=True)
class Smashed:
    """The answer to a draw."""

    request: int
    queries: Packed
    keys: Packed


@dataclass(frozen=True)
class Gradient:
    """For the queries of `request`, each of which is this `share` of the step's: learn from it at `rate`."""

    request: int
    rate: float
    gradient: Packed
    share: float = 0.0


@dataclass(frozen=True)
class Ask:
    """Send your online model, and more where it is asked for."""

    request: int
    momentum_model: bool
    velocity: bool


@dataclass(frozen=True)
class Weights:
    """A client's state by name: ``online.<name>``, ``key.<name>``, ``velocity.<name>``.

    Up: the answer to `request`. Down: what the client goes on with; request is 0.
    serial: counts what was handed out; a device repeats the last one it got.
    """

    request: int
    serial: int
    steps_taken: int
    tensors: Mapping[str, Packed]

    def arrays(self, shapes: Mapping[str, Sequence[int]]) -> dict[str, np.ndarray]:
        """All of them, which must be exactly those of `shapes`; else RefusedError."""
        if set(self.tensors) != set(shapes):
            odd = sorted(set(self.tensors) ^ set(shapes))[0]
            raise RefusedError(Reason.WRONG_SHAPE, f"weights: {odd[:80]!r} is missing or unknown")
        return {name: self.tensors[name].array(shape) for name, shape in shapes.items()}


@dataclass(frozen=True)
class Report:
    """What a device measured of itself since it started; sent now and then, and shows that it lives.

    Bytes are resident memory. energy_method: empty where nothing measured energy.
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
    """The server has finished: report, and leave."""

    text: str = ""


@dataclass(frozen=True)
class Refusal:
    """A message was refused; the conversation ends."""

    reason: int
    detail: str


Message = Register | Welcome | Draw | Smashed | Gradient | Ask | Weights | Report | Finish | Refusal


KINDS: dict[str, type[Message]] = {
    kind.__name__.lower(): kind
    for kind in (Register, Welcome, Draw, Smashed, Gradient, Ask, Weights, Report, Finish, Refusal)
}


def payload(message: Message) -> int:
    """Bytes of a message that carry tensors or the program; all others are the protocol's own."""
    if isinstance(message, Smashed):
        return message.queries.nbytes + message.keys.nbytes
    if isinstance(message, Gradient):
        return message.gradient.nbytes
    if isinstance(message, Weights):
        return sum(tensor.nbytes for tensor in message.tensors.values())
    return len(message.program) if isinstance(message, Welcome) else 0


def pack(header: Header, message: Message) -> bytes:
    """One frame."""
    envelope = wire.Envelope(version=VERSION, run=header.run, session=header.session, sequence=header.sequence)
    name = type(message).__name__.lower()
    getattr(envelope, name).CopyFrom(_to_wire(message))
    return envelope.SerializeToString()


def unpack(frame: bytes, largest: int = LARGEST_FRAME) -> tuple[Header, Message]:
    """Read a frame of at most `largest` bytes; raises RefusedError for anything that :func:`pack` would not write."""
    if len(frame) > largest:
        raise RefusedError(Reason.OVERSIZE, f"{len(frame)} bytes where at most {largest} are allowed")
    envelope = wire.Envelope()
    try:
        envelope.ParseFromString(frame)
    except (DecodeError, ValueError, RecursionError) as error:
        raise RefusedError(Reason.MALFORMED, "not an envelope") from error
    if envelope.version != VERSION:
        raise RefusedError(Reason.OTHER_VERSION, f"protocol version {envelope.version} where {VERSION} is spoken")
    header = Header(_text(envelope.run), _text(envelope.session), envelope.sequence)
    name = envelope.WhichOneof("body")
    if name is None:
        raise RefusedError(Reason.MALFORMED, "an envelope without a message")
    return header, _from_wire(KINDS[name], getattr(envelope, name))


@dataclass
class InOrder:
    """One direction of a conversation: run and session stay, sequence numbers rise one by one."""

    run: str
    session: str
    next: int = 0

    def check(self, header: Header) -> None:
        """Raise RefusedError unless `header` is that of the next message."""
        if header.run != self.run:
            raise RefusedError(Reason.OTHER_RUN, f"run {header.run[:80]!r} where this is {self.run!r}")
        if header.session != self.session:
            raise RefusedError(Reason.OTHER_SESSION, f"session {header.session[:80]!r} is not this conversation's")
        if header.sequence < self.next:
            raise RefusedError(Reason.REPLAYED, f"message {header.sequence} was there before")
        if header.sequence > self.next:
            raise RefusedError(Reason.OUT_OF_ORDER, f"message {header.sequence} where {self.next} is next")
        self.next += 1


# The dataclasses above have the fields of the schema, by the same names; only tensors and codecs look different there.


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
        raise RefusedError(Reason.OVERSIZE, f"{len(tensors)} tensors where at most {MOST_TENSORS} are allowed")
    read = {_text(each.name): _packed(each.tensor) for each in tensors}
    if len(read) < len(tensors):
        raise RefusedError(Reason.MALFORMED, "a tensor stands twice")
    return read


def _codec(number: int) -> Codec:
    if number not in CODEC_NAMES:
        raise RefusedError(Reason.WRONG_DTYPE, f"codec {number} is unknown")
    return CODEC_NAMES[number]


def _text(value: str) -> str:
    if len(value) > LONGEST_TEXT:
        raise RefusedError(Reason.OVERSIZE, f"a text of {len(value)} characters where {LONGEST_TEXT} are allowed")
    if not value.isprintable():  # it will stand in a log
        raise RefusedError(Reason.MALFORMED, "a text with unprintable characters")
    return value


def _number(value: float) -> float:
    if not (math.isfinite(value) and value >= 0):
        raise RefusedError(Reason.NOT_FINITE, f"{value} where a finite number from 0 on is due")
    return value
