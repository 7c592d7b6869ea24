from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations

from mocosfl_priv.config import ModelConfig
from mocosfl_priv.errors import ConfigurationError
from mocosfl_priv.models.initialisation import reinitialised
from mocosfl_priv.models.split import build_split_model
from mocosfl_priv.runtime.seeding import global_seed


def test_our_clients_get_the_weights_that_they_always_got() -> None:
    client = build_split_model(ModelConfig(backbone="resnet8", bottleneck="C4S2"), 2, 16, [0.5] * 3, [0.2] * 3).client
    expected = copy.deepcopy(client)
    with global_seed(3, "initialisation"):
        for module in expected.modules():
            if hasattr(module, "reset_parameters"):
                module.reset_parameters()  # type: ignore[operator]
    fresh = reinitialised(client, 3).state_dict()
    assert fresh.keys() == expected.state_dict().keys()
    assert all(torch.equal(value, fresh[name]) for name, value in expected.state_dict().items())


def test_statistics_and_attention_are_new_and_constants_are_kept() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.BatchNorm1d(8), nn.TransformerEncoderLayer(8, 2, 16), nn.Linear(8, 2))
    net.register_buffer("mean", torch.tensor([0.4]))
    for value in net.parameters():
        nn.init.constant_(value, 5.0)
    net.get_buffer("0.running_mean").fill_(5.0)
    fresh = reinitialised(net, 0)
    assert not any(bool((value == 5).any()) for value in fresh.state_dict().values())
    assert float(fresh.get_buffer("mean")) == pytest.approx(0.4)
    assert all(bool((value == 5).all()) for value in net.parameters())
    assert all(torch.equal(a, b) for a, b in zip(fresh.parameters(), reinitialised(net, 0).parameters(), strict=True))
    other = reinitialised(net, 1)
    assert not torch.equal(other.get_parameter("2.weight"), fresh.get_parameter("2.weight"))


class Scaled(nn.Conv2d):
    """Inherits a reset_parameters that does not know its own parameter."""

    def __init__(self) -> None:
        super().__init__(3, 2, 1)
        self.scale = nn.Parameter(torch.ones(2))


class Positions(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.positions = nn.Parameter(torch.randn(4))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.positions


class OwnReset(Positions):
    def reset_parameters(self) -> None:
        nn.init.normal_(self.positions)


class BrokenReset(Positions):
    def reset_parameters(self) -> None:
        raise RuntimeError("no\nway")


@pytest.mark.parametrize(
    ("net", "message"),
    [
        (Positions(), r"nothing initialises positions anew; give Positions a method reset_parameters\(\)"),
        (nn.Sequential(nn.Linear(4, 4), Positions()), r"nothing initialises 1\.positions anew"),
        (Scaled(), r"nothing initialises scale anew; give Scaled"),
        (
            parametrizations.weight_norm(nn.Linear(3, 2)),
            r"nothing initialises parametrizations\.weight\.original0 anew",
        ),
        (nn.Sequential(BrokenReset()), "reset_parameters of 0 failed: RuntimeError: no way"),
    ],
)
def test_trained_weights_that_would_stay_are_refused(net: nn.Module, message: str) -> None:
    with pytest.raises(ConfigurationError, match=message) as caught:
        reinitialised(net, 0)
    assert "\n" not in str(caught.value)


def test_a_users_own_way_is_used_and_only_what_is_needed_is_asked_for() -> None:
    net = OwnReset()
    assert not (reinitialised(net, 0).get_parameter("positions") == net.positions).any()
    both = nn.Sequential(nn.Linear(4, 4), Positions())
    fresh = reinitialised(both, 0, {"0.weight", "0.bias"})
    assert not torch.equal(fresh.get_parameter("0.weight"), both.get_parameter("0.weight"))
    assert bool(fresh.get_parameter("1.positions").isnan().all())  # rather than the trained ones
