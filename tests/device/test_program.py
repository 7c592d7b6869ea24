from __future__ import annotations

import contextlib
import dataclasses
import json
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mocosfl_priv.device.container import pack, unpack
from mocosfl_priv.device.errors import DeviceError
from mocosfl_priv.device.program import ClientProgram, ClientSettings, RandomInput

PROGRAM = ClientProgram(
    (3, 8, 8),
    (4, 2, 2),
    {"b": np.arange(3, dtype=np.float32), "a": np.array(2, np.float32)},
    b"forward",
    b"vjp",
    ClientSettings(trainable=True, ema=0.5),
    (RandomInput("normal", (1, 4, 2, 2)), RandomInput("uniform", (1, 4, 1, 1))),
    own_loss=True,
)
BLOCK = PROGRAM.to_bytes()


def test_a_program_comes_back_with_its_parameters_in_order() -> None:
    again = ClientProgram.from_bytes(BLOCK)
    assert list(again.parameters) == ["b", "a"]
    for field in ("image_shape", "smashed_shape", "forward", "vjp", "settings", "random_inputs", "own_loss"):
        assert getattr(again, field) == getattr(PROGRAM, field)
    assert all(np.array_equal(again.parameters[name], value) for name, value in PROGRAM.parameters.items())
    assert again.to_bytes() == BLOCK and again.digest == PROGRAM.digest


def test_the_digest_sees_every_change() -> None:
    frozen = dataclasses.replace(PROGRAM, vjp=None, settings=ClientSettings(trainable=False), own_loss=False)
    others = [
        frozen,
        dataclasses.replace(PROGRAM, forward=b"other"),
        dataclasses.replace(PROGRAM, own_loss=False),
        dataclasses.replace(PROGRAM, random_inputs=PROGRAM.random_inputs[:1]),
        dataclasses.replace(PROGRAM, settings=ClientSettings(trainable=True, ema=0.6)),
        dataclasses.replace(PROGRAM, parameters={"b": np.arange(3, dtype=np.float32), "a": np.array(3, np.float32)}),
    ]
    assert len({program.digest for program in (PROGRAM, *others)}) == 7


def test_what_a_frozen_client_encodes_once() -> None:
    assert not ClientSettings(trainable=True).encodes_once
    assert ClientSettings(trainable=True, paper_gradient="one_sided").encodes_once
    assert ClientSettings(trainable=False).encodes_once
    assert not ClientSettings(trainable=False, symmetric=False).encodes_once


def altered(change: Any) -> bytes:
    arrays, metadata = unpack(BLOCK, len(BLOCK))
    manifest = json.loads(metadata["client_program"])
    change(arrays, manifest)
    return pack(arrays, {"client_program": json.dumps(manifest)})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda a, m: m.update(format=1), "format 1"),
        (lambda a, m: m.update(own_loss=1), "values of their types"),
        (lambda a, m: m.update(random_inputs=[["normal"]]), "a distribution and a shape"),
        (lambda a, m: m.update(random_inputs=[["cauchy", [1]]]), "normal or uniform"),
        (lambda a, m: m.update(random_inputs=[[["normal"], [1]]]), "normal or uniform"),
        (lambda a, m: m.update(random_inputs=[["normal", [1, 0]]]), "cannot have the shape"),
        (lambda a, m: m.update(random_inputs=[["normal", [4096, 4097, 1]]]), "cannot have the shape"),
        (lambda a, m: m.update(random_inputs=[["normal", [1]]] * 65), "more than 64"),
        (lambda a, m: m.update(more=1), "exactly the keys"),
        (lambda a, m: m.pop("settings"), "exactly the keys"),
        (lambda a, m: m.update(image_shape=[1, 8, 8]), "three colours"),
        (lambda a, m: m.update(image_shape=[3, 8.0, 8]), "three sizes"),
        (lambda a, m: m.update(smashed_shape=[4096, 4096, 4096]), "larger than"),
        (lambda a, m: m.update(parameters=["b", "b"]), "distinct"),
        (lambda a, m: m.update(parameters=["b", "a", "c"]), "'c'"),
        (lambda a, m: m.update(parameters=["b"]), "is not in the manifest"),
        (lambda a, m: m["settings"].update(momentum="1"), "momentum"),
        (lambda a, m: m["settings"].update(ema=1.5), "ema"),
        (lambda a, m: m["settings"].update(trainable=1), "trainable"),
        (lambda a, m: m["settings"].update(ema_update="never"), "ema_update"),
        (lambda a, m: m["settings"].update(ema_update=["never"]), "ema_update"),
        (lambda a, m: m["settings"].update(more=1), "settings must be"),
        (lambda a, m: m["settings"].update(trainable=False), "a frozen one has none"),
        (lambda a, m: a.pop("graph.vjp"), "needs the graph"),
        (lambda a, m: a.pop("graph.forward"), "graph.forward"),
        (lambda a, m: a.update({"graph.forward": np.zeros(0, np.uint8)}), "empty"),
        (lambda a, m: a.update({"graph.forward": np.zeros(3, np.float32)}), "graph.forward"),
        (lambda a, m: a.update({"parameter.b": np.zeros(3, np.float16)}), "float32"),
        (lambda a, m: a.update({"parameter.b": np.full(3, np.nan, np.float32)}), "finite"),
    ],
)
def test_what_is_no_program_is_refused(change: Any, message: str) -> None:
    with pytest.raises(DeviceError, match=message):
        ClientProgram.from_bytes(altered(change))


@given(st.integers(0, len(BLOCK) - 1), st.integers(0, 255))
def test_a_changed_byte_never_does_worse_than_a_device_error(position: int, value: int) -> None:
    with contextlib.suppress(DeviceError):
        ClientProgram.from_bytes(BLOCK[:position] + bytes([value]) + BLOCK[position + 1 :])


def test_sizes_are_limited() -> None:
    with pytest.raises(DeviceError, match="allowed"):
        ClientProgram.from_bytes(BLOCK, largest=100)
