"""Read and write named arrays as one block of bytes in the safetensors format, fully checked when read.

Layout: the length of the header in eight bytes, little endian; the header, a JSON object with dtype, shape and offsets
of every array by name, and ``__metadata__`` with texts by name; then the bytes of the arrays without gaps. This reader
is used instead of the safetensors library because it checks sizes before it allocates anything, refuses what
:func:`pack` never writes, and saves devices a package. Tests compare it with the library.
"""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import numpy as np

from .errors import DeviceError

DTYPES: dict[str, np.dtype[Any]] = {
    "F32": np.dtype("<f4"),
    "F16": np.dtype("<f2"),
    "I64": np.dtype("<i8"),
    "I8": np.dtype("i1"),
    "U8": np.dtype("u1"),
}
NAMES = {dtype: name for name, dtype in DTYPES.items()}
LENGTH = struct.Struct("<Q")
ALIGNMENT = 8  # the header is padded with spaces to a multiple, so that arrays are aligned
LARGEST_HEADER = 2**20
MOST_DIMENSIONS = 8


class Entry(NamedTuple):
    """Type, shape and place of an array; `begin` and `end` are offsets after the header."""

    dtype: np.dtype[Any]
    shape: tuple[int, ...]
    begin: int
    end: int


def pack(arrays: Mapping[str, np.ndarray], metadata: Mapping[str, str]) -> bytes:
    """Serialise `arrays` and `metadata`; equal contents give equal bytes in any order.

    Raises DeviceError for an array whose dtype is not in `DTYPES`.
    """
    header: dict[str, Any] = {"__metadata__": dict(sorted(metadata.items()))}
    parts: list[bytes] = []
    place = 0
    # wide types first, as in the safetensors library, so that each array is aligned to its type
    for name in sorted(arrays, key=lambda name: (-arrays[name].dtype.itemsize, name)):
        array = np.asarray(arrays[name])
        dtype = array.dtype.newbyteorder("<")
        if dtype not in NAMES or name == "__metadata__":
            raise DeviceError(f"array {name!r} of {array.dtype} cannot be stored")
        parts.append(np.ascontiguousarray(array, dtype).tobytes())
        header[name] = {
            "dtype": NAMES[dtype],
            "shape": list(array.shape),
            "data_offsets": [place, place + array.nbytes],
        }
        place += array.nbytes
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % ALIGNMENT)
    return LENGTH.pack(len(text)) + text + b"".join(parts)


def unpack(payload: bytes | memoryview, largest: int) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """Parse a block of at most `largest` bytes; returns read-only views of `payload` by name, and the metadata.

    Raises DeviceError for anything that :func:`pack` does not write.
    """
    if len(payload) > largest:
        raise DeviceError(f"{len(payload)} bytes are more than the {largest} allowed")
    entries, metadata, start = read_header(payload, len(payload))
    arrays = {
        name: np.frombuffer(payload, e.dtype, math.prod(e.shape), start + e.begin).reshape(e.shape)
        for name, e in entries.items()
    }
    for array in arrays.values():
        array.flags.writeable = False
    return arrays, metadata


def read_header(head: bytes | memoryview, total: int) -> tuple[dict[str, Entry], dict[str, str], int]:
    """Parse the header of a block; returns entries by name, metadata, and the offset at which the arrays begin.

    Args:
        head: The first bytes of the block, with at least the whole header.
        total: Size of the block in bytes.

    Raises:
        DeviceError: The header is invalid, or the arrays do not fill the rest of the block without gap or overlap.

    """
    if len(head) < LENGTH.size:
        raise DeviceError("not a block of arrays: it is shorter than its own length field")
    (length,) = LENGTH.unpack(bytes(head[: LENGTH.size]))
    start = LENGTH.size + length
    if length > LARGEST_HEADER or start > min(total, len(head)):
        raise DeviceError(f"not a block of arrays: a header of {length} bytes in a block of {total}")
    try:
        header = json.loads(
            bytes(head[LENGTH.size : start]).decode(), object_pairs_hook=_distinct, parse_constant=_no_constant
        )
    except (ValueError, RecursionError) as error:
        raise DeviceError(f"not a block of arrays: its header is not JSON ({type(error).__name__})") from error
    if not isinstance(header, dict):
        raise DeviceError("not a block of arrays: its header is not a JSON object")
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(text, str) for text in metadata.values()):
        raise DeviceError("not a block of arrays: its metadata are not texts")
    entries = {name: _entry(name, raw) for name, raw in header.items()}
    place = 0
    for name, entry in sorted(entries.items(), key=lambda item: item[1][2:]):
        if entry.begin != place:
            raise DeviceError(f"array {name!r} begins at byte {entry.begin} instead of {place}")
        place = entry.end
    if start + place != total:
        raise DeviceError(f"the arrays fill {place} bytes, but there are {total - start}")
    return entries, metadata, start


def require(arrays: Mapping[str, np.ndarray], name: str, dtype: str, dimensions: int) -> np.ndarray:
    """Return the array `name`; raises DeviceError if it is missing or has another dtype or number of dimensions."""
    array = arrays.get(name)
    if array is None or array.dtype != np.dtype(dtype) or array.ndim != dimensions:
        found = "missing" if array is None else f"{array.dtype} with {array.ndim} dimensions"
        raise DeviceError(f"array {name!r} must be {dtype} with {dimensions} dimensions, and is {found}")
    return array


def _entry(name: str, raw: Any) -> Entry:
    if not isinstance(raw, dict) or set(raw) != {"dtype", "shape", "data_offsets"}:
        raise DeviceError(f"array {name!r} is not described by dtype, shape and data_offsets")
    kind, shape, offsets = raw["dtype"], raw["shape"], raw["data_offsets"]
    dtype = DTYPES.get(kind) if isinstance(kind, str) else None
    if dtype is None:
        raise DeviceError(f"array {name!r} has an unknown dtype")
    if not _are_sizes(shape, MOST_DIMENSIONS) or not _are_sizes(offsets, 2) or len(offsets) != 2:
        raise DeviceError(f"array {name!r} has an impossible shape or place")
    if offsets[1] - offsets[0] != math.prod(shape) * dtype.itemsize:
        raise DeviceError(f"array {name!r} of shape {shape} does not fill its place")
    return Entry(dtype, tuple(shape), *offsets)


def _are_sizes(values: Any, most: int) -> bool:
    """Whether `values` is a list of at most `most` integers of 0 or more (not booleans)."""
    return isinstance(values, list) and len(values) <= most and all(type(v) is int and 0 <= v < 2**48 for v in values)


def _distinct(pairs: Iterable[tuple[str, Any]]) -> dict[str, Any]:
    pairs = list(pairs)
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a name occurs twice")
    return found


def _no_constant(text: str) -> Any:
    raise ValueError(f"{text} is not JSON")
