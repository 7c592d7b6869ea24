"""The protocol's messages: what goes in comes out, and whatever else comes in is refused with a reason."""

from __future__ import annotations

import importlib.util
import sys
from dataclasses import fields
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays

from mocosfl_priv.device import messages
from mocosfl_priv.device.codecs import CODECS, Codec
from mocosfl_priv.device.errors import DeviceError
from mocosfl_priv.device.messages import (
    KINDS,
    VERSION,
    Ask,
    Draw,
    Finish,
    Gradient,
    Header,
    InOrder,
    Message,
    Packed,
    Reason,
    Refusal,
    RefusedError,
    Register,
    Report,
    Smashed,
    Weights,
    Welcome,
    pack,
    payload,
    unpack,
)
from mocosfl_priv.device.wire import split_pb2 as wire
from tests.deployment.fuzz import frames, judge

WIRE = Path(messages.__file__).parent / "wire"
TEXT = st.text(st.characters(codec="ascii", categories=("L", "N", "P")), max_size=40)
COUNT = st.integers(0, 2**32 - 1)
AMOUNT = st.floats(0, 1e9)
MAPS = arrays(np.float32, st.tuples(*[st.integers(1, 3)] * 4), elements=st.floats(-1000, 1000, width=32))
PACKED = st.builds(Packed.of, MAPS, st.sampled_from(CODECS))
TENSORS = st.builds(Packed.of, arrays(np.float32, array_shapes(min_dims=0), elements=st.floats(-9, 9, width=32)))
MESSAGES: dict[type, st.SearchStrategy[Message]] = {
    Register: st.builds(Register, TEXT, COUNT, TEXT, TEXT, COUNT),
    Welcome: st.builds(
        Welcome, TEXT, TEXT, COUNT, TEXT, st.binary(max_size=99), st.sampled_from(CODECS), st.sampled_from(CODECS),
        COUNT, st.booleans(), AMOUNT,
    ),
    Draw: st.builds(Draw, COUNT, COUNT, COUNT, COUNT),
    Smashed: st.builds(Smashed, COUNT, PACKED, PACKED),
    Gradient: st.builds(Gradient, COUNT, AMOUNT, PACKED),
    Ask: st.builds(Ask, COUNT, st.booleans(), st.booleans()),
    Weights: st.builds(Weights, COUNT, COUNT, COUNT, st.dictionaries(TEXT, TENSORS, max_size=3)),
    Report: st.builds(Report, AMOUNT, COUNT, COUNT, COUNT, COUNT, COUNT, AMOUNT, AMOUNT, AMOUNT, AMOUNT, AMOUNT, TEXT),
    Finish: st.builds(Finish, TEXT),
    Refusal: st.builds(Refusal, COUNT, TEXT),
}  # fmt: skip


def test_every_message_of_the_schema_has_a_class_and_the_same_fields() -> None:
    bodies = {field.name: field.message_type for field in wire.Envelope.DESCRIPTOR.oneofs_by_name["body"].fields}
    assert set(bodies) == set(KINDS) == {kind.__name__.lower() for kind in MESSAGES}
    for name, kind in KINDS.items():
        schema = bodies[name]
        assert schema is not None
        assert [field.name for field in schema.fields] == [field.name for field in fields(kind)]


@given(message=st.one_of(*MESSAGES.values()), run=TEXT, session=TEXT, sequence=st.integers(0, 2**64 - 1))
def test_what_was_packed_is_unpacked(message: Message, run: str, session: str, sequence: int) -> None:
    header = Header(run, session, sequence)
    frame = pack(header, message)
    assert unpack(frame) == (header, message)
    assert payload(message) <= len(frame)


@given(array=MAPS, codec=st.sampled_from(CODECS))
def test_an_array_of_the_right_shape_and_codec_is_read(array: np.ndarray, codec: Codec) -> None:
    packed = Packed.of(array, codec)
    largest = float(np.abs(array).max())
    np.testing.assert_allclose(packed.array(array.shape, codec), array, atol={"fp32": 0.0}.get(codec, largest / 200))


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_what_is_not_finite_is_neither_sent_nor_taken(value: float) -> None:
    array = np.array([1, value], np.float32)
    with pytest.raises(DeviceError):
        Packed.of(array)
    with pytest.raises(RefusedError) as caught:
        Packed((2,), "fp32", array.tobytes()).array((2,))
    assert caught.value.reason is Reason.NOT_FINITE


@pytest.mark.parametrize(
    ("edit", "reason"),
    [
        (lambda e: e.ClearField("body") or e, Reason.MALFORMED),
        (lambda e: setattr(e, "version", VERSION + 1), Reason.OTHER_VERSION),
        (lambda e: setattr(e, "run", "x" * 600), Reason.OVERSIZE),
        (lambda e: setattr(e, "run", "line\nbreak"), Reason.MALFORMED),
        (lambda e: setattr(e.smashed.queries, "codec", 99), Reason.WRONG_DTYPE),
        (lambda e: e.smashed.queries.shape.extend([1] * 20), Reason.WRONG_SHAPE),
        (lambda e: setattr(e.gradient, "rate", float("nan")), Reason.NOT_FINITE),
        (lambda e: setattr(e.gradient, "rate", -1.0), Reason.NOT_FINITE),
        (lambda e: e.weights.tensors.extend([wire.NamedTensor(name="a")] * 2), Reason.MALFORMED),
    ],
)
def test_an_envelope_that_no_sender_writes_is_refused(edit: object, reason: Reason) -> None:
    envelope = wire.Envelope(version=VERSION)
    envelope.smashed.request = 1
    assert callable(edit)
    edit(envelope)
    with pytest.raises(RefusedError) as caught:
        unpack(envelope.SerializeToString())
    assert caught.value.reason is reason


def test_sequence_numbers_rise_one_by_one() -> None:
    order = InOrder("r", "s")
    order.check(Header("r", "s", 0))
    order.check(Header("r", "s", 1))
    for header, reason in [
        (Header("r", "s", 1), Reason.REPLAYED),
        (Header("r", "s", 3), Reason.OUT_OF_ORDER),
        (Header("q", "s", 2), Reason.OTHER_RUN),
        (Header("r", "t", 2), Reason.OTHER_SESSION),
    ]:
        with pytest.raises(RefusedError) as caught:
            order.check(header)
        assert caught.value.reason is reason
    order.check(Header("r", "s", 2))


def test_a_short_run_of_the_fuzzer() -> None:
    """The long one: python -m tests.deployment.fuzz --inputs 100000."""
    verdicts = [judge(frame) for frame in frames(2000, seed=1)]
    assert verdicts.count("accepted") > 20  # it does not only throw rubbish
    assert {"malformed", "other_version", "wrong_shape", "not_finite"} <= set(verdicts)


def test_generated_code_is_what_the_schema_generates(tmp_path: Path) -> None:
    """After an edit of split.proto: python -m tests.device.generate."""
    if importlib.util.find_spec("grpc_tools") is None:
        pytest.skip("grpcio-tools is not installed")
    from tests.device.generate import generate

    generate(tmp_path)
    for name in ("split_pb2.py", "split_pb2.pyi"):
        assert (tmp_path / name).read_bytes() == (WIRE / name).read_bytes(), f"{name} is stale"
    assert "grpc_tools" not in Path(sys.modules[wire.__name__].__file__ or "").read_text(encoding="utf-8")
