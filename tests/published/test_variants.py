"""The same published client as other people's trainings would have saved it: understood, or refused with the reason."""

from __future__ import annotations

import os
import pickle
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from mocosfl_priv.errors import ConfigurationError
from mocosfl_priv.published.discovery import find_published
from mocosfl_priv.published.loader import load_published_client
from tests.published.test_loader import fake_state

State = dict[str, Tensor]


def computed(path: Path) -> Tensor:
    images = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        return load_published_client(path)(images)


def prefixed(state: State, prefix: str) -> State:
    return {prefix + name: value for name, value in state.items()}


def momentum_pair(state: State) -> State:
    return {
        **prefixed(state, "module.encoder_q."),
        **prefixed({name: -value for name, value in state.items()}, "module.encoder_k."),
        "module.queue": torch.zeros(4, 8),
    }


@pytest.mark.parametrize(
    "variant",
    [
        lambda state: prefixed(state, "module."),
        lambda state: prefixed(state, "_orig_mod."),
        lambda state: prefixed(state, "module._orig_mod.encoder."),
        lambda state: {"epoch": 3, "state_dict": state, "optimizer": {"lr": 0.1}},
        lambda state: {"model": {"state_dict": prefixed(state, "module.")}},
        lambda state: {"state_dict": momentum_pair(state)},
        lambda state: {name: value.double() for name, value in state.items()},
    ],
)
def test_what_trainings_put_around_weights_is_taken_off(variant: Callable[[State], object], tmp_path: Path) -> None:
    torch.manual_seed(0)
    state = fake_state(1)
    torch.save(state, tmp_path / "plain.tar")
    torch.save(variant(state), tmp_path / "client.tar")
    assert torch.equal(computed(tmp_path / "client.tar"), computed(tmp_path / "plain.tar"))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_read_as_what_it_holds(dtype: torch.dtype, tmp_path: Path) -> None:
    torch.manual_seed(0)
    state = {name: value.to(dtype) for name, value in fake_state(2).items()}
    torch.save(state, tmp_path / "half.tar")
    torch.save({name: value.float() for name, value in state.items()}, tmp_path / "same.tar")
    assert torch.equal(computed(tmp_path / "half.tar"), computed(tmp_path / "same.tar"))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_refused_before_anything_is_attacked(value: float, tmp_path: Path) -> None:
    state = fake_state(1)
    state["1.weight"][0, 0, 0, 0] = value
    torch.save(state, tmp_path / "client.tar")
    with pytest.raises(ConfigurationError, match=r"client\.tar: weights are not finite: 1\.weight"):
        find_published(tmp_path)


def test_unknown_prefixes_are_named(tmp_path: Path) -> None:
    torch.save(prefixed(fake_state(1), "my_trunk."), tmp_path / "client.tar")
    with pytest.raises(ConfigurationError, match=r"are like 'my_trunk\.0\.conv1\.weight'; remove what"):
        load_published_client(tmp_path / "client.tar")


class Marker:
    """Writes a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.path,)


def test_a_pickled_model_is_never_run(tmp_path: Path) -> None:
    torch.save(nn.Conv2d(3, 64, 3), tmp_path / "client.tar")
    with pytest.raises(ConfigurationError, match=r"save the state dict instead: torch\.save\(model\.state_dict\(\)"):
        load_published_client(tmp_path / "client.tar")
    torch.save({"state_dict": Marker(tmp_path / "ran")}, tmp_path / "client.tar")
    with pytest.raises(ConfigurationError, match="Pickled models are not loaded"):
        load_published_client(tmp_path / "client.tar")
    assert not (tmp_path / "ran").exists()


def test_other_endings_are_found_and_what_lies_there_is_said(tmp_path: Path) -> None:
    torch.save(fake_state(1), tmp_path / "checkpoint_c_200.tar")
    with pytest.raises(
        ConfigurationError, match=r"neither checkpoint_c_best\.tar nor .*; it holds checkpoint_c_200\.tar"
    ):
        find_published(tmp_path)
    torch.save(fake_state(1), tmp_path / "client.pth")
    (tmp_path / "._client.pth").write_bytes(b"\0\5\x16\7")
    assert [found.name for found in find_published(tmp_path)] == ["client"]


@settings(max_examples=25)
@given(
    prefixes=st.lists(st.sampled_from(["module.", "_orig_mod.", "encoder.", "backbone.", "client."]), max_size=3),
    wrappers=st.lists(st.sampled_from(["state_dict", "model", "net", "somewhere"]), max_size=2),
    dtype=st.sampled_from([torch.float32, torch.float16, torch.bfloat16, torch.float64, torch.int8]),
    spoilt=st.sampled_from(["", "nan", "missing", "shape", "text"]),
)
def test_every_saved_state_is_that_client_or_one_line(
    prefixes: list[str], wrappers: list[str], dtype: torch.dtype, spoilt: str,
    tmp_path_factory: pytest.TempPathFactory,
) -> None:  # fmt: skip
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("state")
    values = {name: value.to(dtype) for name, value in fake_state(1).items()}
    plain = {name: value.float() for name, value in values.items()}
    stored: Any = prefixed(values, "".join(prefixes))
    first = next(iter(stored))
    if spoilt == "nan":
        stored[first] = stored[first].float() * float("nan")
    elif spoilt == "missing":
        del stored[first]
    elif spoilt == "shape":
        stored[first] = stored[first][:-1]
    elif spoilt == "text":
        stored[first] = "no tensor"
    for wrapper in wrappers:
        stored = {wrapper: stored, "epoch": 3}
    torch.save(stored, folder / "client.tar")
    torch.save(plain, folder / "plain.tar")
    readable = not spoilt and dtype is not torch.int8 and "somewhere" not in wrappers
    try:
        found = computed(folder / "client.tar")
    except ConfigurationError as error:
        assert not readable
        assert str(error).startswith(f"{folder / 'client.tar'}: ") and "\n" not in str(error)
    else:
        assert readable and torch.equal(found, computed(folder / "plain.tar"))


class Code:
    """What runs a command where it is unpickled."""

    def __init__(self, proof: Path) -> None:
        self.proof = proof

    def __reduce__(self) -> tuple[Callable[[str], object], tuple[str]]:
        return os.system, (f"touch {self.proof}",)


@pytest.mark.parametrize("form", ["pickle", "torch", "legacy torch", "beside weights"])
def test_code_in_a_checkpoint_is_never_run(form: str, tmp_path: Path) -> None:
    proof, path = tmp_path / "it-ran", tmp_path / "clients" / "client.tar"
    path.parent.mkdir()
    content: object = {**fake_state(1), "more": Code(proof)} if form == "beside weights" else Code(proof)
    if form == "pickle":
        path.write_bytes(pickle.dumps(content))
    else:
        torch.save(content, path, _use_new_zipfile_serialization=form != "legacy torch")
    with pytest.raises(ConfigurationError, match="Pickled models are not loaded"):
        find_published(path.parent)
    assert not proof.exists()
    pickle.loads(pickle.dumps(Code(proof)))
    assert proof.exists()  # so this is code that would have run


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda value: value.double() * 1e300, "weights are not finite: 0.conv1.weight"),
        (lambda value: value * float("-inf"), "weights are not finite: 0.conv1.weight"),
        (lambda value: value.to(torch.complex64), "0.conv1.weight holds complex64 numbers"),
        (lambda value: (value * 10).int(), "0.conv1.weight holds int32 numbers"),
        (lambda value: value > 0, "0.conv1.weight holds bool numbers"),
        (lambda value: value.to("meta"), "0.conv1.weight holds no numbers"),
        (lambda value: value.flatten(1).to_sparse(), "0.conv1.weight is quantised or sparse"),
        (lambda value: value * 1e-42, ""),
        (lambda value: value.bfloat16(), ""),
    ],
)
def test_weights_are_finite_floating_point_numbers(
    change: Callable[[Tensor], Tensor], said: str, tmp_path: Path
) -> None:
    state = fake_state(1)
    torch.save({**state, "0.conv1.weight": change(state["0.conv1.weight"])}, tmp_path / "client.tar")
    if not said:
        assert computed(tmp_path / "client.tar").isfinite().all()
        return
    with pytest.raises(ConfigurationError, match=re.escape(said)):
        load_published_client(tmp_path / "client.tar")


@settings(max_examples=25)
@given(cut=st.floats(0, 1, exclude_max=True), flips=st.lists(st.floats(0, 1, exclude_max=True), max_size=2))
def test_a_damaged_archive_is_a_client_or_one_line(
    cut: float, flips: list[float], tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = tmp_path_factory.mktemp("damaged") / "client.tar"
    torch.save(fake_state(1), path)
    content = bytearray(path.read_bytes())
    for place in flips:
        content[int(place * len(content))] ^= 255
    path.write_bytes(content if flips else content[: int(cut * len(content))])
    try:
        load_published_client(path)
    except ConfigurationError as error:
        assert "\n" not in str(error) and str(path) in str(error)
