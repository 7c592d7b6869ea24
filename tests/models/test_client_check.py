from __future__ import annotations

import random
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from mocosfl_priv.errors import ConfigurationError
from mocosfl_priv.models.client_check import check_client

SHAPE = (3, 8, 8)


class Function(nn.Module):
    """A module that computes `function` of the images."""

    def __init__(self, function: object) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)  # type: ignore[operator]


class OwnGenerator(nn.Module):
    """Noise of a generator that the client brings."""

    def __init__(self) -> None:
        super().__init__()
        self.numbers = np.random.default_rng(0)

    def forward(self, x: Tensor) -> Tensor:
        return x + torch.from_numpy(self.numbers.normal(size=tuple(x.shape))).float()


class Remembering(nn.Module):
    """Subtracts a mean that it goes on averaging, in eval mode too."""

    mean: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(3, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        y = x - self.mean
        self.mean = 0.9 * self.mean + 0.1 * x.mean((0, 2, 3)).view(3, 1, 1)
        return y


class TrainingOnly(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            raise RuntimeError("no inference")
        return x


class NotCopied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stream = Path(__file__).open()  # noqa: SIM115 - what cannot be copied

    def forward(self, x: Tensor) -> Tensor:
        return x


class Masked(nn.Module):
    """An attention mask has infinities, and that is right."""

    mask: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mask", torch.full((8, 8), -torch.inf).triu(1))

    def forward(self, x: Tensor) -> Tensor:
        return (x + self.mask).softmax(-1)


def net_with(value: float) -> nn.Module:
    net = nn.Sequential(nn.Conv2d(3, 2, 1), nn.BatchNorm2d(2))
    with torch.no_grad():
        net.get_parameter("1.weight")[0] = value
    return net


def jitter(x: Tensor) -> Tensor:
    return x * random.uniform(0.5, 1.5) + float(np.random.normal())  # noqa: NPY002 - as users do


@pytest.mark.parametrize(
    ("client", "image_shape", "smashed_shape", "randomised"),
    [
        (nn.Sequential(nn.Conv2d(3, 4, 3, 2), nn.BatchNorm2d(4)), SHAPE, (4, 3, 3), False),
        (nn.Conv2d(1, 4, 3), (1, 28, 28), (4, 26, 26), False),
        (nn.Sequential(nn.Flatten(), nn.Dropout(0.5), nn.Linear(192, 5)), SHAPE, (5,), False),
        (nn.Sequential(nn.Flatten(2), nn.TransformerEncoderLayer(64, 2, 8, batch_first=True)), SHAPE, (3, 64), False),
        (Function(lambda x: x + torch.randn_like(x)), SHAPE, SHAPE, True),
        (Function(lambda x: nn.functional.dropout(x, 0.5)), SHAPE, SHAPE, True),
        (Function(jitter), SHAPE, SHAPE, True),
        (OwnGenerator(), SHAPE, SHAPE, True),
        (Masked(), SHAPE, SHAPE, False),
        (Function(lambda x: x.bfloat16() / 3), SHAPE, SHAPE, False),
    ],
)
def test_clients_are_understood(
    client: nn.Module, image_shape: tuple[int, int, int], smashed_shape: tuple[int, ...], randomised: bool
) -> None:
    checked = check_client(client, image_shape)
    assert (checked.smashed_shape, checked.randomised) == (smashed_shape, randomised)
    assert checked.client(torch.rand(2, *image_shape)).shape == (2, *smashed_shape)


@pytest.mark.parametrize(
    ("client", "message"),
    [
        ("resnet18", "the client is a str, not a torch module"),
        (NotCopied(), "the client cannot be copied, and only a copy of it is run"),
        (nn.LazyConv2d(3, 1), "weight has no shape before the first batch"),
        (net_with(float("nan")), r"weights are not finite: 1\.weight"),
        (net_with(float("inf")), r"weights are not finite: 1\.weight"),
        (TrainingOnly(), "runs in training mode only; in eval mode it fails: RuntimeError: no inference"),
        (
            nn.Conv2d(1, 2, 3),
            r"fails on images of shape \(5, 3, 8, 8\): .*tried \(5, 1, 8, 8\), .*takes \(5, 1, 8, 8\)",
        ),
        (nn.Sequential(nn.Flatten(), nn.Linear(3 * 32 * 32, 2)), r"it takes \(5, 3, 32, 32\)$"),
        (nn.Linear(7, 2), r"\(5, 3, 28, 28\).*none works$"),
        (nn.Conv2d(3, 2, 1).half(), "images are float32, but it has float16 weights"),
        (Function(lambda x: (x, x)), "must send one tensor, not a tuple"),
        (Function(lambda x: x.argmax(1)), "must send floating-point numbers, not int64"),
        (Function(lambda x: x.flatten()), r"maps 5 images to shape \(960,\)"),
        (Function(lambda x: x.mean((1, 2, 3))), r"maps 5 images to shape \(5,\)"),
        (Function(lambda x: x.flatten(1).T), r"maps 5 images to shape \(192, 5\)"),
        (Function(lambda x: x.flatten(1)[:, :0]), r"maps 5 images to shape \(5, 0\)"),
        (Function(lambda x: x / (x - x)), "maps images in .0, 1. to values that are not finite"),
        (Function(lambda x: x.sub_(0.5)), "changes the images that it is given, in place"),
        (Remembering(), "changes mean in eval mode, so its output depends on what it was given before"),
        (nn.BatchNorm2d(3, track_running_stats=False), "mixes the images .*BatchNorm2d without running statistics"),
        (
            nn.Sequential(nn.Flatten(), nn.BatchNorm1d(192, track_running_stats=False)),
            "mixes the images .*; 1 is a BatchNorm1d without running statistics",
        ),
        (Function(lambda x: x.cumsum(0)), "mixes the images of a batch"),
        (Function(lambda x: x.flip(0).cumsum(0)), "mixes the images of a batch"),
        (Function(lambda x: x / x.amax()), "mixes the images of a batch"),
        (Function(lambda x: x * len(x)), "mixes the images of a batch"),
        (Function(lambda x: x.mean(0, keepdim=True) + torch.randn_like(x)), "mixes the images of a batch"),
        (
            Function(lambda x: x + float(np.random.default_rng().normal())),
            "draws noise that no seed repeats",
        ),
        (Function(lambda x: x if len(x) > 1 else x.missing), "fails on a single image: AttributeError"),
        (Function(lambda x: x.squeeze() if len(x) > 1 else x[:, 0]), r"one image to \(1, 8, 8\) and 5 images to"),
    ],
)
def test_what_cannot_be_audited_is_explained_in_one_line(client: object, message: str) -> None:
    with pytest.raises(ConfigurationError, match=message) as caught:
        check_client(client, SHAPE)
    assert "\n" not in str(caught.value)


def test_a_users_module_stays_as_it_is() -> None:
    client = nn.Sequential(nn.Conv2d(3, 2, 1), nn.BatchNorm2d(2), nn.Dropout(0.5)).train()
    state = {name: value.clone() for name, value in client.state_dict().items()}
    states = torch.get_rng_state(), random.getstate(), str(np.random.get_state())  # noqa: NPY002
    checked = check_client(client, SHAPE)
    assert all(module.training for module in client.modules())
    assert all(torch.equal(value, state[name]) for name, value in client.state_dict().items())
    assert torch.equal(torch.get_rng_state(), states[0])
    assert (random.getstate(), str(np.random.get_state())) == states[1:]  # noqa: NPY002
    assert not any(module.training for module in checked.client.modules())
    checked.client.get_parameter("0.weight").data.zero_()
    assert torch.equal(client.get_parameter("0.weight"), state["0.weight"])
