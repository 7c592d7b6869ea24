"""Exported clients against torch: smashed data and gradients, for what can be cut, normalised and compressed."""

from __future__ import annotations

import copy
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")

from mocosfl_priv.config import ModelConfig, TrainingConfig
from mocosfl_priv.deployment.export import client_settings, export_client
from mocosfl_priv.device.program import ClientProgram
from mocosfl_priv.device.runtime import DeviceClient
from mocosfl_priv.errors import ConfigurationError
from mocosfl_priv.models.backbones import find_backbone
from mocosfl_priv.models.split import build_split_model

TOLERANCE = 1e-4  # relative to a gradient's largest number
LIKE_TORCH = 5  # times torch's own rounding, which is another for another order of sums
ROUNDING = 1e-3  # a gradient that is so much smaller than the largest one is nothing but rounding
NORMS = ("group", "layer", "instance", "batch")
BOTTLENECKS = ("none", "C4S2", "noReLUK5C8S4", "K1C4S1")
WIDTHS = {"resnet18": 8, "resnet50": 4, "vgg13": 8, "mobilenetv2": 8, "vit_tiny": 32}


def settings(trainable: bool = True) -> Any:
    return client_settings(TrainingConfig(), trainable)


def build(backbone: str, cut: int, norm: str = "group", bottleneck: str = "none", **options: Any) -> nn.Module:
    """A client whose parameters are nowhere at their initial zeros and ones, and which sends something.

    Narrow and deep ones can be dead, where equality would say nothing: then others are drawn.
    """
    for seed in range(20):
        client = _drawn(seed, backbone, cut, norm, bottleneck, **options)
        with torch.no_grad():
            alive = client(images(32)).flatten(1).any(1)
        if alive.all():
            return client
    raise AssertionError("no client that sends something was found")


def images(side: int) -> torch.Tensor:
    return torch.rand(5, 3, side, side, generator=torch.Generator().manual_seed(3))


def _drawn(seed: int, backbone: str, cut: int, norm: str, bottleneck: str, **options: Any) -> nn.Module:
    torch.manual_seed(seed)
    model = ModelConfig.model_validate(
        {
            "backbone": backbone,
            "width": WIDTHS.get(backbone),
            "norm": norm,
            "mend_norms": norm == "batch",
            "bottleneck": bottleneck,
            **options,
        }
    )
    client = build_split_model(model, cut, 32, [0.5, 0.4, 0.45], [0.2, 0.25, 0.3]).client
    with torch.no_grad():
        for parameter in client.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape))
    return client


Gradients = dict[str, np.ndarray]


def gradients(client: nn.Module, images: torch.Tensor, returned: torch.Tensor) -> Gradients:
    """Torch's, in the client's own precision."""
    kind = next(client.parameters()).dtype
    named = dict(client.named_parameters())
    computed = torch.autograd.grad(client(images.to(kind)), list(named.values()), returned.to(kind))
    return {name: value.numpy() for name, value in zip(named, computed, strict=True)}


def error(found: Gradients, expected: Gradients) -> float:
    """The largest error of any parameter, relative to its own largest number."""
    least = ROUNDING * max(np.abs(value).max() for value in expected.values())
    assert least > 0, "without any gradient equality says nothing"
    return float(max(np.abs(found[k] - v).max() / max(np.abs(v).max(), least) for k, v in expected.items()))


def assert_as_good_as_torch(client: nn.Module, device: DeviceClient, singles: Sequence[torch.Tensor]) -> None:
    """The device's error over single images is within the tolerance, or like torch's; both against torch in float64.

    The median error, since at a ReLU whose input is nothing but rounding the gradient jumps by percents: now and then
    on the device, and as often in torch. Like torch's, since a norm over a handful of pixels loses digits there too.
    """
    exact = copy.deepcopy(client).double()
    errors: dict[str, list[tuple[float, float]]] = {"smashed data": [], "gradients": []}
    for image in singles:
        returned = torch.randn((1, *device.program.smashed_shape), generator=torch.Generator().manual_seed(4))
        expected = {"sent": exact(image.double()).detach().numpy()}
        wanted = gradients(exact, image, returned)
        sent = {"sent": device.encode_queries(image.numpy())}
        found = device.parameter_gradients(returned.numpy())
        assert list(found) == list(wanted)
        sent_by_torch = {"sent": client(image).detach().numpy()}
        errors["smashed data"].append((error(sent, expected), error(sent_by_torch, expected)))
        errors["gradients"].append((error(found, wanted), error(gradients(client, image, returned), wanted)))
    for what, pairs in errors.items():
        ours, torchs = (statistics.median(each) for each in zip(*pairs, strict=True))
        assert ours <= max(TOLERANCE, LIKE_TORCH * torchs), what


def assert_equal_gradients(client: nn.Module, side: int = 32) -> ClientProgram:
    program = export_client(client, (3, side, side), settings())
    device = DeviceClient(ClientProgram.from_bytes(program.to_bytes()))
    assert_as_good_as_torch(client, device, images(side).split(1))
    return program


@pytest.mark.parametrize(
    ("backbone", "cut", "norm", "bottleneck"),
    [
        ("resnet18", 1, "group", "C4S2"),
        ("resnet18", 4, "layer", "none"),  # a block with stride 2 and a projection
        ("vgg13", 3, "instance", "noReLUK5C8S4"),  # behind a max-pool
        ("mobilenetv2", 2, "batch", "K1C4S1"),  # depthwise convolutions
        ("vit_tiny", 2, "group", "C4S2"),
    ],
)
def test_gradients_are_torchs(backbone: str, cut: int, norm: str, bottleneck: str) -> None:
    assert_equal_gradients(build(backbone, cut, norm, bottleneck))


EVERY_CUT = [(name, cut) for name in WIDTHS for cut in range(1, find_backbone(name).units + 1)]


@pytest.mark.slow
@pytest.mark.parametrize("shift", range(4))
@pytest.mark.parametrize(("backbone", "cut"), EVERY_CUT)
def test_gradients_are_torchs_at_every_cut(backbone: str, cut: int, shift: int) -> None:
    """Over the four shifts every cut meets every norm and every bottleneck that fits it."""
    try:
        client = build(backbone, cut, NORMS[shift], BOTTLENECKS[(cut + shift) % len(BOTTLENECKS)])
    except ConfigurationError:  # the stride does not divide so small a map
        client = build(backbone, cut, NORMS[shift])
    assert_equal_gradients(client)


@pytest.mark.slow
@pytest.mark.parametrize("options", [{"client_residuals": False}, {"weight_standardisation": False}])
def test_gradients_are_torchs_whatever_the_options(options: dict[str, Any]) -> None:
    assert_equal_gradients(build("resnet18", 3, **options))


class Unusual(nn.Module):
    """What users' units may hold and ours do not."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.ConvTranspose2d(3, 6, 3, stride=2, padding=1, output_padding=1, groups=3)
        self.dilated = nn.Conv2d(6, 8, 3, stride=3, padding=2, dilation=2)  # a stride that does not divide
        self.norm = nn.GroupNorm(2, 8, affine=False)
        self.pool = nn.AvgPool2d(2)
        self.overlapping = nn.MaxPool2d(3, 1, 1)
        self.scale = nn.Parameter(torch.tensor(0.5))
        self.act = nn.PReLU()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.act(self.norm(self.dilated(nn.functional.silu(self.up(x)))))
        mixed = [x, x[:, 1:6:2].sigmoid(), nn.functional.pad(x[:, 3:4, 1:], (0, 0, 1, 0)), x[:, -1].unsqueeze(1).tanh()]
        x = self.overlapping(self.pool(torch.cat(mixed, 1)))
        return nn.functional.leaky_relu_(x * self.scale.exp(), 0.1)


def test_gradients_of_a_users_own_units_are_torchs() -> None:
    torch.manual_seed(0)
    assert_equal_gradients(Unusual(), side=20)


def test_a_client_for_larger_images_has_a_strided_stem() -> None:
    torch.manual_seed(0)
    model = ModelConfig(backbone="resnet8", width=8, bottleneck="C4S2")
    client = build_split_model(model, 1, 64, [0.5] * 3, [0.25] * 3).client
    program = assert_equal_gradients(client, side=64)
    assert program.smashed_shape == (4, 16, 16)


@pytest.mark.parametrize(
    ("unit", "reason"),
    [
        ([nn.Dropout(0.5)], "draws random numbers"),
        ([nn.Conv2d(3, 4, 3), nn.AvgPool2d(3, 2, 1, count_include_pad=False)], "count_include_pad=False"),
        ([nn.Conv2d(3, 4, 3), nn.AdaptiveMaxPool2d(5)], "no rule for the operation aten.adaptive_max_pool2d"),
        ([nn.Flatten()], "cannot be exported"),
    ],
)
def test_what_cannot_be_exported_is_refused_with_the_reason(unit: Sequence[nn.Module], reason: str) -> None:
    with pytest.raises(ConfigurationError, match=reason):
        export_client(nn.Sequential(*unit, nn.Conv2d(3 if len(unit) == 1 else 4, 2, 1)), (3, 12, 12), settings())


def test_a_wrong_graph_is_not_handed_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """The program is run beside the client before anybody gets it."""
    from mocosfl_priv.deployment import onnx_rules

    relu = torch.ops.aten.relu.default
    monkeypatch.setitem(onnx_rules.RULES, relu, lambda g, _, x: g.node("Abs", g.name(x)))
    with pytest.raises(ConfigurationError, match="smashed data are wrong"):
        export_client(build("resnet8", 1), (3, 32, 32), settings())


def test_a_frozen_client_has_no_gradient_graph_and_the_exporter_changes_nothing(tmp_path: Path) -> None:
    client = build("resnet8", 1)
    before = {name: value.clone() for name, value in client.state_dict().items()}
    program = export_client(client, (3, 32, 32), settings(trainable=False))
    assert program.vjp is None
    assert all(torch.equal(before[name], value) for name, value in client.state_dict().items())
    assert all(parameter.requires_grad and parameter.grad is None for parameter in client.parameters())
    again = export_client(client, (3, 32, 32), settings(trainable=False))
    assert again.digest == program.digest
