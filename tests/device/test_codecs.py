"""Error bounds of every codec, exact byte counts, and what is refused."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from mocosfl_priv.device.codecs import CODECS, Codec, decode, encode, sizes
from mocosfl_priv.device.errors import DeviceError

SMALLEST = float(np.finfo(np.float32).tiny)
FLOATS = st.floats(width=32, allow_nan=False, allow_infinity=False)
ARRAYS = hnp.arrays(np.float32, hnp.array_shapes(min_dims=4, max_dims=4, min_side=0, max_side=4), elements=FLOATS)


def largest(array: np.ndarray, axes: tuple[int, ...]) -> np.ndarray:
    return np.abs(array.astype(np.float64)).max(axis=axes, keepdims=True, initial=0)


@given(ARRAYS, st.sampled_from(CODECS))
def test_errors_stay_within_the_bounds_of_the_table(array: np.ndarray, codec: Codec) -> None:
    payload, scales = encode(array, codec)
    assert (len(payload), len(scales)) == sizes(array.shape, codec)
    decoded = decode(payload, scales, array.shape, codec)
    assert decoded.dtype == np.float32 and decoded.shape == array.shape
    bound = {
        "fp32": np.zeros_like(array, np.float64),
        "fp16": np.maximum(2.0**-11 * np.abs(array.astype(np.float64)), 2.0**-39 * largest(array, (1, 2, 3))),
        "int8": largest(array, (2, 3)) / 253,
    }[codec]
    assert (np.abs(decoded.astype(np.float64) - array) <= bound + SMALLEST * (codec != "fp32")).all()


@given(ARRAYS, st.sampled_from(CODECS))
def test_an_image_is_decoded_alike_whatever_its_neighbours(array: np.ndarray, codec: Codec) -> None:
    together = decode(*encode(array, codec), array.shape, codec)
    for row in range(len(array)):
        alone = array[row : row + 1]
        assert np.array_equal(decode(*encode(alone, codec), alone.shape, codec), together[row : row + 1])


@pytest.mark.parametrize(("codec", "numbers", "scales"), [("fp32", 4096, 0), ("fp16", 2048, 4), ("int8", 1024, 16)])
def test_bytes_of_one_image_behind_c4s2(codec: Codec, numbers: int, scales: int) -> None:
    assert sizes((1, 4, 16, 16), codec) == (numbers, scales)
    assert encode(np.ones((1, 4, 16, 16), np.float32), codec).nbytes == numbers + scales


def test_gradients_below_half_precision_survive_it() -> None:
    """dL/dz of a mean over a batch is far below the smallest half-precision number."""
    gradient = np.random.default_rng(0).normal(0, 1e-9, (2, 4, 16, 16)).astype(np.float32)
    decoded = decode(*encode(gradient, "fp16"), gradient.shape, "fp16")
    np.testing.assert_allclose(decoded, gradient, rtol=2**-11, atol=1e-17)
    assert not gradient.astype(np.float16).any()


@pytest.mark.parametrize("codec", CODECS)
def test_what_cannot_be_sent_is_refused(codec: Codec) -> None:
    for bad in (np.nan, np.inf, -np.inf):
        array = np.ones((2, 1, 2, 2), np.float32)
        array[1, 0, 1, 0] = bad
        with pytest.raises(DeviceError, match="NaN or infinity"):
            encode(array, codec)
    with pytest.raises(DeviceError, match="float32"):
        encode(np.ones((1, 1, 1, 1)), codec)
    with pytest.raises(DeviceError, match="float32"):
        encode(np.ones((1, 1, 1), np.float32), codec)
    with pytest.raises(DeviceError, match="unknown codec"):
        encode(np.ones((1, 1, 1, 1), np.float32), "zip")  # type: ignore[arg-type]


@given(
    st.sampled_from(CODECS), st.binary(max_size=40), st.binary(max_size=20), st.lists(st.integers(-1, 3), max_size=5)
)
def test_received_bytes_are_an_array_or_an_error(codec: Codec, payload: bytes, scales: bytes, shape: list[int]) -> None:
    try:
        decoded = decode(payload, scales, shape, codec)
    except DeviceError:
        return
    assert list(decoded.shape) == shape and np.isfinite(decoded).all()


@given(st.sampled_from(CODECS), st.data())
def test_bytes_of_the_right_length_are_an_array_or_an_error(codec: Codec, data: st.DataObject) -> None:
    shape = (1, 2, 2, 1)
    lengths = sizes(shape, codec)
    payload, scales = (data.draw(st.binary(min_size=n, max_size=n)) for n in lengths)
    try:
        decoded = decode(payload, scales, shape, codec)
    except DeviceError:
        return
    assert decoded.shape == shape and np.isfinite(decoded).all()


def test_malformed_messages_are_refused() -> None:
    payload, scales = encode(np.ones((1, 1, 2, 2), np.float32), "int8")
    zero, infinite = np.zeros(1, "<f4").tobytes(), np.full(1, np.inf, "<f4").tobytes()
    for bad_scales in (zero, infinite, b"", np.full(1, -1, "<f4").tobytes()):
        with pytest.raises(DeviceError):
            decode(payload, bad_scales, (1, 1, 2, 2), "int8")
    with pytest.raises(DeviceError, match="levels"):
        decode(b"\x80" * 4, scales, (1, 1, 2, 2), "int8")
    with pytest.raises(DeviceError, match="NaN or infinity was received"):
        decode(b"\x7f" * 4, np.full(1, 3e38, "<f4").tobytes(), (1, 1, 2, 2), "int8")
    with pytest.raises(DeviceError, match="takes 16 bytes"):
        decode(b"\0" * 15, b"", (1, 1, 2, 2), "fp32")
