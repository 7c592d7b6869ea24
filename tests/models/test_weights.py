"""Trained weights as other people save them: understood, or refused with what does not fit."""

from __future__ import annotations

import os
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import Tensor, nn

from mocosfl_priv.errors import ConfigurationError
from mocosfl_priv.models.weights import load_weights, read_weights

State = dict[str, Tensor]


def network() -> nn.Module:
    """Convolution, norm with statistics, and a head."""
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.LazyLinear(2))


def built() -> nn.Module:
    model = network()
    model(torch.rand(2, 3, 8, 8))
    return model


def trained(seed: int = 0) -> State:
    torch.manual_seed(seed)
    return {
        name: torch.randn(value.shape).abs() if value.is_floating_point() else torch.tensor(7)
        for name, value in built().state_dict().items()
    }


def prefixed(state: State, prefix: str) -> State:
    return {prefix + name: value for name, value in state.items()}


def loaded(model: nn.Module, state: State) -> bool:
    return all(torch.equal(value, state[name]) for name, value in model.state_dict().items())


@settings(max_examples=40)
@given(
    prefixes=st.lists(st.sampled_from(["module.", "_orig_mod.", "encoder_q.", "backbone."]), max_size=3),
    wrappers=st.lists(st.sampled_from(["state_dict", "model", "model_state_dict", "net"]), max_size=3),
    beside=st.booleans(),
    dtype=st.sampled_from([torch.float32, torch.float16, torch.bfloat16, torch.float64]),
    ending=st.sampled_from([".pt", ".pth", ".tar", ".safetensors"]),
)
def test_what_trainings_put_around_weights_is_taken_off(
    prefixes: list[str], wrappers: list[str], beside: bool, dtype: torch.dtype, ending: str,
    tmp_path_factory: pytest.TempPathFactory,
) -> None:  # fmt: skip
    plain = {n: v.to(dtype) if v.is_floating_point() else v for n, v in trained().items()}
    path = tmp_path_factory.mktemp("weights") / f"mine{ending}"
    stored: Any = prefixed(plain, "".join(prefixes))
    if ending == ".safetensors":
        save_file(stored, path)
    else:
        # as Adam's state_dict(); making one imports torch's compiler, which takes seconds
        optimiser = {"state": {0: {"step": torch.ones(()), "exp_avg": torch.ones(4)}}, "param_groups": [{"lr": 0.1}]}
        for wrapper in wrappers:
            stored = {wrapper: stored, **({"epoch": 3, "optimizer": optimiser} if beside else {})}
        torch.save(stored, path)
    model = built()
    assert load_weights(model, path) == "".join(prefixes)
    assert loaded(model, {n: v.to(built().state_dict()[n].dtype) for n, v in plain.items()})


def test_of_two_encoders_the_query_encoder_is_read_and_of_two_parts_each(tmp_path: Path) -> None:
    state, other = trained(), trained(1)
    momentum = {**prefixed(state, "module.encoder_q."), **prefixed(other, "module.encoder_k."), "queue": torch.ones(3)}
    model = built()
    assert load_weights(model, momentum) == "module.encoder_q."
    assert loaded(model, state)
    load_weights(model, momentum, prefix="module.encoder_k.")
    assert loaded(model, other)
    torch.save({"client": state, "server": prefixed(other, "module."), "round": 3}, tmp_path / "both.pth")
    assert {name.split(".")[0] for name in read_weights(tmp_path / "both.pth")} == {"client", "server"}
    load_weights(model, tmp_path / "both.pth", prefix="server.module.")
    assert loaded(model, other)
    assert load_weights(model, tmp_path / "both.pth") == "client."
    assert loaded(model, state)
    with pytest.raises(
        ConfigurationError, match=r"several sets of weights fit: say which by prefix='model\.' or 'net\.'"
    ):
        load_weights(model, {**prefixed(state, "model."), **prefixed(other, "net.")})


def test_modules_that_are_wrapped_themselves_and_files_without_counters() -> None:
    state = trained()
    wrapped = nn.DataParallel(built())
    assert load_weights(wrapped, state) == ""
    assert loaded(wrapped.module, state)
    model = built()
    load_weights(model, {name: value for name, value in state.items() if not name.endswith("num_batches_tracked")})
    assert torch.equal(model.get_parameter("0.weight"), state["0.weight"])
    half = built().half()
    load_weights(half, state)
    assert torch.equal(half.get_parameter("0.weight"), state["0.weight"].half())
    outer = nn.ModuleDict({"trunk": built()})
    with pytest.raises(ConfigurationError, match="the weights of the module's part trunk: load them into that part"):
        load_weights(outer, state)


def without(*names: str) -> Callable[[State], State]:
    return lambda state: {name: value for name, value in state.items() if name not in names}


def changed(name: str, change: Callable[[Tensor], Tensor]) -> Callable[[State], State]:
    return lambda state: {**state, name: change(state[name])}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (without("0.bias"), "does not fit the module: missing 0.bias; too many none$"),
        (lambda state: {**state, "4.bias": torch.ones(1)}, "missing none; too many 4.bias$"),
        (
            lambda state: prefixed(state, "student."),
            r"missing 0\.weight, 0\.bias, 1\.weight and 5 more; too many student\.0\.weight, .* and 6 more; "
            r"it would fit with prefix='student\.'$",
        ),
        (
            lambda state: prefixed(without("0.bias")(state), "student."),
            r"with prefix='student\.', 8 of 9 would match$",
        ),
        (
            lambda state: prefixed(without("0.bias")(state), "module."),
            r"does not fit the module without its prefix 'module\.': missing 0\.bias; too many none$",
        ),
        (lambda state: {"other": torch.ones(2)}, r"missing 0\.weight, .*; too many other$"),
        (
            changed("0.weight", lambda value: value[:, :1]),
            r"shapes differ from the module's: 0\.weight is \(4, 1, 3, 3\), not \(4, 3, 3, 3\)$",
        ),
        (changed("3.bias", lambda value: value * torch.nan), r"weights are not finite: 3\.bias"),
        (changed("3.bias", lambda value: value.double() * 1e300), r"weights are not finite: 3\.bias"),
        (changed("1.running_var", lambda value: value * torch.nan), r"weights are not finite: 1\.running_var"),
        (changed("3.weight", lambda value: (value * 100).to(torch.int8)), r"3\.weight holds int8 numbers"),
        (changed("3.weight", lambda value: value.to(torch.complex64)), r"3\.weight holds complex64 numbers"),
        (changed("3.weight", lambda value: value.to_sparse()), r"3\.weight is quantised or sparse"),
        (changed("3.weight", lambda value: value.to("meta")), r"3\.weight holds no numbers"),
        (lambda state: {"epoch": 3}, "not a state dict of tensors, but a dict without any"),
    ],
)
def test_what_does_not_fit_is_explained_in_one_line_and_changes_nothing(
    change: Callable[[State], State], message: str
) -> None:
    model = built()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(ConfigurationError, match=message) as caught:
        load_weights(model, change(trained()))
    assert "\n" not in str(caught.value)
    assert loaded(model, before)


def test_a_prefix_that_is_asked_for_must_be_there() -> None:
    with pytest.raises(ConfigurationError, match=r"no name begins with 'encoder\.'; they are 0\.weight, "):
        load_weights(built(), trained(), prefix="encoder.")
    with pytest.raises(
        ConfigurationError, match=r"without its prefix '0\.': missing 0\.weight, .*; too many weight, bias"
    ):
        load_weights(built(), trained(), prefix="0.")
    with pytest.raises(ConfigurationError, match=r"3\.weight has no shape before the first batch"):
        load_weights(network(), trained())


class Code:
    """What makes a file where it is unpickled."""

    def __init__(self, proof: Path) -> None:
        self.proof = proof

    def __reduce__(self) -> tuple[Callable[[str], object], tuple[str]]:
        return os.system, (f"touch {self.proof}",)


def test_files_of_another_kind_are_refused_and_no_code_is_run(tmp_path: Path) -> None:
    torch.save(built(), tmp_path / "model.pt")
    with pytest.raises(
        ConfigurationError, match=r"save the state dict instead: torch\.save\(model\.state_dict\(\), file\)"
    ):
        read_weights(tmp_path / "model.pt")
    torch.save({"state_dict": trained(), "args": Namespace(lr=0.1)}, tmp_path / "options.pth")
    with pytest.raises(ConfigurationError, match=r"\(UnpicklingError: it holds argparse\.Namespace\)\. Pickled models"):
        read_weights(tmp_path / "options.pth")
    torch.save({"state_dict": trained(), "more": Code(tmp_path / "it-ran")}, tmp_path / "code.pth")
    with pytest.raises(ConfigurationError, match="Pickled models are not loaded"):
        read_weights(tmp_path / "code.pth")
    assert not (tmp_path / "it-ran").exists()
    torch.load(tmp_path / "code.pth", weights_only=False)
    assert (tmp_path / "it-ran").exists()  # so this is code that would have run
    for ending in (".pt", ".safetensors"):
        with pytest.raises(ConfigurationError, match="cannot be read: No such file"):
            read_weights(tmp_path / f"missing{ending}")
    (tmp_path / "text.safetensors").write_text("hello")
    with pytest.raises(ConfigurationError, match="not a safetensors file"):
        read_weights(tmp_path / "text.safetensors")
    torch.save([1, 2], tmp_path / "list.pt")
    with pytest.raises(ConfigurationError, match="not a state dict of tensors, but a list without any"):
        read_weights(tmp_path / "list.pt")
