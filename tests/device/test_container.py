"""The safetensors layout against its own library, and against everything that is not it."""

from __future__ import annotations

import json

import numpy as np
import pytest
import safetensors.numpy
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from mocosfl_priv.device.container import LENGTH, pack, require, unpack
from mocosfl_priv.device.errors import DeviceError

LARGEST = 2**20
NAMES = st.text(st.characters(exclude_categories=["Cs"]), max_size=8).filter(lambda name: name != "__metadata__")
ARRAYS = st.sampled_from(["<f4", "<f2", "<i8", "i1", "u1"]).flatmap(
    lambda kind: hnp.arrays(kind, hnp.array_shapes(min_dims=0, max_dims=4, min_side=0, max_side=4))
)


@given(st.dictionaries(NAMES, ARRAYS, max_size=5), st.dictionaries(NAMES, NAMES, max_size=3))
def test_what_is_packed_comes_back_and_the_library_reads_it(
    arrays: dict[str, np.ndarray], metadata: dict[str, str]
) -> None:
    block = pack(arrays, metadata)
    found, texts = unpack(block, LARGEST)
    assert texts == metadata
    for other in (found, safetensors.numpy.load(block)):
        assert set(other) == set(arrays)
        for name, array in arrays.items():
            assert other[name].dtype == array.dtype and other[name].tobytes() == array.tobytes()
            assert other[name].shape == array.shape
    assert pack(dict(reversed(arrays.items())), metadata) == block


@given(st.dictionaries(NAMES.filter(bool), ARRAYS, max_size=5))
def test_what_the_library_writes_is_read(arrays: dict[str, np.ndarray]) -> None:
    found, _ = unpack(safetensors.numpy.save(arrays, {"a": "b"}), LARGEST)
    assert {name: value.tobytes() for name, value in found.items()} == {k: v.tobytes() for k, v in arrays.items()}


BLOCK = pack({"a": np.arange(6, dtype=np.float32).reshape(2, 3), "b": np.arange(3, dtype=np.uint8)}, {"k": "v"})


@given(st.binary(max_size=200))
def test_noise_is_refused_in_one_way(noise: bytes) -> None:
    with pytest.raises(DeviceError):
        unpack(noise, LARGEST)


@given(st.integers(0, len(BLOCK) - 1), st.integers(0, 255))
def test_a_changed_byte_is_refused_or_still_a_block(position: int, value: int) -> None:
    changed = BLOCK[:position] + bytes([value]) + BLOCK[position + 1 :]
    try:
        arrays, _ = unpack(changed, LARGEST)
    except DeviceError:
        return
    assert sum(array.nbytes for array in arrays.values()) == 27


def block_of(header: object, data: bytes = bytes(8)) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return LENGTH.pack(len(text)) + text + data


@pytest.mark.parametrize(
    "block",
    [
        BLOCK + b"x",
        BLOCK[:-1],
        LENGTH.pack(2**63) + BLOCK[8:],
        block_of([1]),
        block_of({"a": 1}),
        block_of({"__metadata__": {"a": 1}}, b""),
        block_of(b'{"a":NaN}'),
        block_of(b'{"a":{},"a":{}}'),
        block_of(b"[" * 100_000, b""),
        block_of({"a": {"dtype": "F64", "shape": [1], "data_offsets": [0, 8]}}),
        block_of({"a": {"dtype": ["U8"], "shape": [8], "data_offsets": [0, 8]}}),
        block_of({"a": {"dtype": "U8", "shape": [-8], "data_offsets": [0, 8]}}),
        block_of({"a": {"dtype": "U8", "shape": [True, 8], "data_offsets": [0, 8]}}),
        block_of({"a": {"dtype": "U8", "shape": [1] * 40, "data_offsets": [0, 1]}}),
        block_of({"a": {"dtype": "U8", "shape": [9], "data_offsets": [0, 9]}}),
        block_of({"a": {"dtype": "U8", "shape": [4], "data_offsets": [4, 8]}}),
        block_of({"a": {"dtype": "U8", "shape": [2**40, 2**40], "data_offsets": [0, 8]}}),
        block_of({k: {"dtype": "U8", "shape": [8], "data_offsets": [0, 8]} for k in "ab"}),
    ],
)
def test_malformed_blocks_are_refused(block: bytes) -> None:
    with pytest.raises(DeviceError):
        unpack(block, LARGEST)


def test_sizes_are_limited_and_arrays_checked() -> None:
    with pytest.raises(DeviceError, match="more than the 10 allowed"):
        unpack(BLOCK, 10)
    with pytest.raises(DeviceError, match="cannot be stored"):
        pack({"a": np.zeros(1, np.float64)}, {})
    arrays, _ = unpack(BLOCK, LARGEST)
    assert not arrays["a"].flags.writeable
    assert require(arrays, "a", "float32", 2) is arrays["a"]
    for name, dtype, dimensions in (("c", "uint8", 1), ("a", "uint8", 2), ("a", "float32", 1)):
        with pytest.raises(DeviceError, match=f"'{name}' must be"):
            require(arrays, name, dtype, dimensions)
