from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from mocosfl_priv.config import ModelConfig, TrainingConfig
from mocosfl_priv.errors import ConfigurationError
from mocosfl_priv.models.layers import Residual
from mocosfl_priv.models.split import SplitModel, build_split_model, validate_cut
from mocosfl_priv.training.clients import ClientBank

MODULE = "tests.models.test_custom_backbone"


def plain(width: int | None, image_size: int) -> list[nn.Module]:
    channels = width or 8
    return [
        nn.Sequential(nn.Conv2d(3, channels, 3, padding=1), nn.GroupNorm(2, channels), nn.ReLU()),
        nn.Dropout(0.5),
        nn.Conv2d(channels, 2 * channels, 3, 2, 1),
    ]


def with_batch_norm(width: int | None, image_size: int) -> list[nn.Module]:
    return [nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(inplace=True), nn.MaxPool2d(2)), nn.ReLU()]


def flat(width: int | None, image_size: int) -> list[nn.Module]:
    return [nn.Conv2d(3, 4, 3), nn.Flatten()]


class Doubling(Residual):
    def __init__(self) -> None:
        super().__init__()
        self.shortcut = nn.Identity()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.join(x, x)


def residual(width: int | None, image_size: int) -> list[nn.Module]:
    return [Doubling(), Doubling(), nn.Conv2d(3, 4, 1)]


class Pair(nn.Module):
    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return x, x


def pair(width: int | None, image_size: int) -> list[nn.Module]:
    return [Pair()]


class Deciding(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x if float(x.sum()) > 0 else -x


def deciding(width: int | None, image_size: int) -> list[nn.Module]:
    return [nn.Conv2d(3, 4, 3), Deciding()]


class Unused(nn.Conv2d):
    def __init__(self) -> None:
        super().__init__(3, 4, 3)
        self.spare = nn.Parameter(torch.zeros(3))


def unused(width: int | None, image_size: int) -> list[nn.Module]:
    return [Unused()]


def shared(width: int | None, image_size: int) -> list[nn.Module]:
    unit = nn.Conv2d(3, 3, 1)
    return [unit, unit]


def mismatched(width: int | None, image_size: int) -> list[nn.Module]:
    return [nn.Conv2d(3, 4, 3), nn.Conv2d(8, 4, 3)]


def failing(width: int | None, image_size: int) -> list[nn.Module]:
    raise RuntimeError("no\nsuch size")


def empty(width: int | None, image_size: int) -> list[nn.Module]:
    return []


def no_list(width: int | None, image_size: int) -> nn.Module:
    return nn.ReLU()


def no_modules(width: int | None, image_size: int) -> list[object]:
    return [torch.relu]


def build(function: str, cut: int = 1, **settings: object) -> SplitModel:
    torch.manual_seed(0)
    model = ModelConfig(backbone=f"{MODULE}:{function}", projector_hidden=8, projector_out=8, **settings)
    validate_cut(model, cut)
    return build_split_model(model, cut, 16, [0.5] * 3, [0.25] * 3)


@pytest.mark.parametrize("cut", [1, 2, 3])
def test_a_users_backbone_cuts_anywhere_and_trains_in_the_bank(cut: int) -> None:
    model = build("plain", cut, width=4)
    assert model.smashed_shape == [(4, 16, 16), (4, 16, 16), (8, 8, 8)][cut - 1]
    assert model.feature_dim == 8
    bank = ClientBank(model.client, 2, TrainingConfig(clients=2))
    smashed = bank.encode_queries(torch.arange(2), [1, 1], torch.rand(2, 3, 16, 16))
    smashed.sum().backward()
    bank.learn(torch.arange(2), torch.full((2,), 0.1))
    assert bool(torch.stack([stacked.isfinite().all() for stacked in bank.online.values()]).all())


def test_a_users_file(tmp_path: Path) -> None:
    path = tmp_path / "mine.py"
    path.write_text(
        "from torch import nn\ndef net(width, image_size):\n    return [nn.Conv2d(3, width, 3), nn.ReLU()]\n"
    )
    model = build_split_model(ModelConfig(backbone=f"{path}:net", width=4), 2, 16, [0.5] * 3, [0.25] * 3)
    assert model.smashed_shape == (4, 14, 14)


def test_batch_norm_is_refused_or_mended() -> None:
    with pytest.raises(
        ConfigurationError, match=r"0\.1: BatchNorm2d mixes the images .*; with model\.mend_norms: true"
    ):
        build("with_batch_norm")
    mended = build("with_batch_norm", mend_norms=True)
    assert [type(m).__name__ for m in mended.client.get_submodule("0").children()] == [
        "Conv2d",
        "GroupNorm",
        "ReLU",
        "MaxPool2d",
    ]


@pytest.mark.parametrize(
    ("function", "message"),
    [
        ("plian", "there is no function 'plian'; did you mean 'plain'"),
        ("MODULE", "MODULE is a str, not a function"),
        ("flat", r"unit 2 \(Flatten\) of .*:flat maps \(1, 4, 14, 14\) to a tensor of shape \(1, 784\)"),
        ("pair", r"unit 1 \(Pair\) .* to a tuple"),
        ("deciding", r"unit 2 \(Deciding\) of .* cannot be run for several clients at once"),
        ("unused", r"unit 1 \(Unused\) .* does not use its parameter spare"),
        ("shared", "1: Conv2d shares its weight with 0"),
        ("mismatched", r"unit 2 \(Conv2d\) of .* cannot process an input of shape \(1, 4, 14, 14\)"),
        ("failing", "failed: RuntimeError: no such size"),
        ("empty", "must return a list of torch modules, not an empty list"),
        ("no_list", "must return a list of torch modules, not a ReLU"),
        ("no_modules", "unit 1 of .* is a builtin_function_or_method, not a torch module"),
    ],
)
def test_what_cannot_work_is_explained_in_one_line(function: str, message: str) -> None:
    with pytest.raises(ConfigurationError, match=message) as caught:
        build(function, cut=2 if function == "deciding" else 1)
    assert "\n" not in str(caught.value)


def test_cuts_and_options_that_do_not_fit() -> None:
    with pytest.raises(ConfigurationError, match=r"cut layer 4 is impossible: .*:plain has 3 units"):
        build("plain", 4)
    with pytest.raises(ConfigurationError, match="has no shortcut that can be removed"):
        build("plain", client_residuals=False)
    images = torch.rand(2, 3, 16, 16)
    with_shortcuts, without = (build("residual", client_residuals=kept) for kept in (True, False))
    torch.testing.assert_close(with_shortcuts.client(images), 2 * without.client(images))
    torch.testing.assert_close(with_shortcuts.trunk(images), without.trunk(images))
    with pytest.raises(ConfigurationError, match=r"importing no\.such.module failed"):
        validate_cut(ModelConfig(backbone="no.such.module:net"), 1)
