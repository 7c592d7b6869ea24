from __future__ import annotations

import pytest
import torch
from torch import nn

from mocosfl_priv.config import ModelConfig
from mocosfl_priv.errors import ConfigurationError
from mocosfl_priv.models.split import SplitModel, build_split_model, count_parameters, forward_flops, validate_cut

MEAN, STD = [0.5, 0.4, 0.3], [0.2, 0.25, 0.3]


def build(cut: int, **settings: object) -> SplitModel:
    torch.manual_seed(0)
    return build_split_model(ModelConfig(**settings), cut, 32, MEAN, STD)


@pytest.mark.parametrize(
    ("cut", "bottleneck", "shape", "parameters"),
    [
        (1, "none", (64, 32, 32), 1_856),
        (1, "C4S2", (4, 16, 16), 4_164),
        (2, "none", (64, 32, 32), 75_840),
        (2, "C4S2", (4, 16, 16), 78_148),
        (3, "none", (64, 32, 32), 149_824),
        (3, "C4S2", (4, 16, 16), 152_132),
    ],
)
def test_resnet18_clients_have_the_papers_sizes(
    cut: int, bottleneck: str, shape: tuple[int, ...], parameters: int
) -> None:
    model = build(cut, backbone="resnet18", bottleneck=bottleneck)
    assert model.smashed_shape == shape
    assert count_parameters(model.client) == parameters


def test_published_parameter_names() -> None:
    names = set(build(2, backbone="resnet18", bottleneck="C4S2").client.state_dict())
    assert names == {
        "0.conv1.weight", "0.bn1.weight", "0.bn1.bias",
        "1.conv1.weight", "1.bn1.weight", "1.bn1.bias", "1.conv2.weight", "1.bn2.weight", "1.bn2.bias",
        "cut.weight", "cut.bias",
    }  # fmt: skip


def test_client_forward_by_hand() -> None:
    """Normalise, standardised convolution, GroupNorm with four channels a group, ReLU: written out."""
    client = build(1, backbone="resnet8", width=8).client.double()
    nn.init.normal_(client.get_parameter("0.bn1.weight"))
    nn.init.normal_(client.get_parameter("0.bn1.bias"))
    x = torch.rand(2, 3, 32, 32, dtype=torch.float64)
    state = client.state_dict()
    w = state["0.conv1.weight"]
    flat = w.flatten(1)
    w = ((flat - flat.mean(1, keepdim=True)) / (flat.std(1, keepdim=True) + 1e-5)).view_as(w)
    normalised = (x - torch.tensor(MEAN).double().view(3, 1, 1)) / torch.tensor(STD).double().view(3, 1, 1)
    y = nn.functional.conv2d(normalised, w, padding=1)
    groups = y.view(2, 2, -1)
    groups = (groups - groups.mean(2, keepdim=True)) / (groups.var(2, unbiased=False, keepdim=True) + 1e-5).sqrt()
    y = groups.view_as(y) * state["0.bn1.weight"].view(1, -1, 1, 1) + state["0.bn1.bias"].view(1, -1, 1, 1)
    torch.testing.assert_close(client(x), y.relu(), atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("bottleneck", ["C4S1", "C4S2", "noReLUC2S4", "K5C3S2", "C4S8"])
def test_bottleneck_is_mirrored(bottleneck: str) -> None:
    model = build(1, backbone="resnet8", bottleneck=bottleneck)
    smashed = model.client(torch.rand(2, 3, 32, 32))
    uncut = model.trunk.get_submodule("uncut")
    assert uncut(smashed).shape == (2, 16, 32, 32)
    assert (float(smashed.detach().min()) >= 0) == ("noReLU" not in bottleneck)


@pytest.mark.parametrize(
    ("backbone", "cut", "message"),
    [
        ("resnet19", 1, "did you mean 'resnet18'"),
        ("resnet8", 5, "cut layer 5 is impossible: resnet8 has 4 units, so it can be cut after unit 1 to 4"),
        ("resnet18", 0, "impossible"),
    ],
)
def test_impossible_cuts(backbone: str, cut: int, message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        validate_cut(ModelConfig(backbone=backbone), cut)


def test_bottleneck_that_does_not_fit() -> None:
    with pytest.raises(ConfigurationError, match="does not divide"):
        build(1, backbone="resnet8", bottleneck="C4S64")


def test_flops_of_one_convolution() -> None:
    model = build(1, backbone="resnet8")
    assert forward_flops(model.client, (3, 32, 32)) == 2 * 16 * 3 * 9 * 32 * 32
