"""Throw frames at the decoder: ``python -m tests.deployment.fuzz --inputs 100000 [--seed N]``.

Rubbish, mutated honest frames, and envelopes built field by field from hostile values. A frame is accepted, or refused
with a reason; anything else that is raised ends the run with the frame, in hexadecimal, that did it.
"""

from __future__ import annotations

import argparse
import random
from collections import Counter
from collections.abc import Iterator, Sequence

import numpy as np

from mocosfl_priv.device.errors import DeviceError
from mocosfl_priv.device.messages import (
    VERSION,
    Ask,
    Draw,
    Finish,
    Gradient,
    Header,
    Message,
    Packed,
    Refusal,
    RefusedError,
    Register,
    Report,
    Smashed,
    Weights,
    Welcome,
    pack,
    unpack,
)
from mocosfl_priv.device.program import ClientProgram
from mocosfl_priv.device.wire import split_pb2 as wire

LARGEST = 2**16
SHAPE = (2, 4, 2, 2)
NUMBERS = (0, 1, 2, 7, 127, 128, 2**31 - 1, 2**32 - 1)
LONG_NUMBERS = (*NUMBERS, 2**63, 2**64 - 1)
FLOATS = (0.0, -0.0, 1.5, -1.0, 1e38, float("nan"), float("inf"), float("-inf"))
TEXTS = ("", "r", "client-0001", "x" * 1000, "\x00", "line\nbreak", "\u202e", "online.x", "../../etc/passwd")


def frames(count: int, seed: int) -> Iterator[bytes]:
    """So many hostile or honest frames, the same for the same seed."""
    rng = random.Random(seed)
    honest = [pack(Header("r", "s", 0), message) for message in _honest()]
    for _ in range(count):
        kind = rng.random()
        if kind < 0.1:
            yield rng.randbytes(rng.choice((0, 1, 3, 17, 200)))
        elif kind < 0.6:
            yield _mutated(rng.choice(honest), rng)
        else:
            yield _built(rng)


def judge(frame: bytes) -> str:
    """What becomes of a frame that a server gets: "accepted", or the reason of its refusal."""
    try:
        _, message = unpack(frame, LARGEST)
        if isinstance(message, Smashed):
            message.queries.array(SHAPE, "fp32")
            message.keys.array(SHAPE, "int8")
        elif isinstance(message, Gradient):
            message.gradient.array(SHAPE, "fp16")
        elif isinstance(message, Weights):
            message.arrays({"online.x": (3,)})
        elif isinstance(message, Welcome) and message.program:
            try:
                ClientProgram.from_bytes(message.program)
            except DeviceError:
                return "program"
    except RefusedError as error:
        return error.reason.name.lower()
    return "accepted"


def _honest() -> list[Message]:
    array = np.linspace(-1, 1, 32, dtype=np.float32).reshape(SHAPE)
    maps = {codec: Packed.of(array, codec) for codec in ("fp32", "fp16", "int8")}
    return [
        Register("client-0001", 12, "d" * 64, "s" * 16, 3),
        Welcome("r", "s", 1, "d" * 64, b"program", "fp32", "fp16", 7, False, 5.0),
        Draw(1, 2, 3, 4),
        Smashed(1, maps["fp32"], maps["int8"]),
        Gradient(1, 0.06, maps["fp16"]),
        Ask(1, True, False),
        Weights(1, 2, 3, {"online.x": Packed.of(np.zeros(3, np.float32))}),
        Report(1.0, 2, 3, 4, 5, 6, 7.0, 8.0, 9.0, 10.0, 11.0, "meter"),
        Finish("done"),
        Refusal(3, "detail"),
    ]


def _mutated(frame: bytes, rng: random.Random) -> bytes:
    changed = bytearray(frame)
    for _ in range(rng.choice((0, 1, 1, 2, 5))):
        place = rng.randrange(len(changed) + 1)
        match rng.randrange(4):
            case 0 if place < len(changed):
                changed[place] = rng.randrange(256)
            case 1:
                changed[place:place] = rng.randbytes(rng.choice((1, 4)))
            case 2:
                del changed[place : place + rng.choice((1, 4, 40))]
            case _:
                changed[place:place] = changed[: rng.randrange(len(changed) + 1)]
    return bytes(changed)


def _built(rng: random.Random) -> bytes:
    envelope = wire.Envelope(version=rng.choice((VERSION, VERSION, VERSION, 0, 2)))
    envelope.run, envelope.session = rng.choice(TEXTS), rng.choice(TEXTS)
    envelope.sequence = rng.choice(LONG_NUMBERS)
    body = rng.choice([field.name for field in envelope.DESCRIPTOR.oneofs_by_name["body"].fields])
    _fill(getattr(envelope, body), rng)
    getattr(envelope, body).SetInParent()
    return envelope.SerializeToString()


def _fill(message, rng: random.Random) -> None:  # type: ignore[no-untyped-def] # any message of the schema
    for field in message.DESCRIPTOR.fields:
        if rng.random() < 0.3:
            continue
        if field.message_type is not None:
            many = isinstance(getattr(message, field.name), Sequence)
            for _ in range(rng.randrange(3) if many else 1):
                _fill(getattr(message, field.name).add() if many else getattr(message, field.name), rng)
        elif field.name == "shape":
            message.shape.extend(rng.choice((SHAPE, (3,), (), (0,), (2**31, 2**31), [rng.choice(NUMBERS)] * 9)))
        elif field.type == field.TYPE_BYTES:
            floats = np.array(rng.choices(FLOATS, k=rng.choice((0, 3, 32))), np.float32).tobytes()
            setattr(message, field.name, rng.choice((floats, rng.randbytes(32), b"")))
        elif field.type == field.TYPE_STRING:
            setattr(message, field.name, rng.choice(TEXTS))
        elif field.type == field.TYPE_DOUBLE:
            setattr(message, field.name, rng.choice(FLOATS))
        elif field.type == field.TYPE_BOOL:
            setattr(message, field.name, rng.random() < 0.5)
        elif field.type == field.TYPE_ENUM:
            setattr(message, field.name, rng.choice((0, 1, 2, 3, 2**31 - 1)))
        else:
            setattr(message, field.name, rng.choice(LONG_NUMBERS if field.type == field.TYPE_UINT64 else NUMBERS))


def main() -> None:
    """Run, and say what became of the frames."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--inputs", type=int, default=100_000)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    verdicts: Counter[str] = Counter()
    for frame in frames(options.inputs, options.seed):
        try:
            verdicts[judge(frame)] += 1
        except Exception:
            print("the frame:", frame.hex())
            raise
    for verdict, count in verdicts.most_common():
        print(f"{count:8d} {verdict}")


if __name__ == "__main__":
    main()
