"""The public release's clients, where they are at hand, against a forward pass written out in plain functions."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from mocosfl_priv.errors import ConfigurationError
from mocosfl_priv.models.split import count_parameters
from mocosfl_priv.published.loader import load_published_client

NAME = "resnet18_cifar10_C4S2_cut{}_alpha2.0_ssim{}_target{}_cifar100.tar"


def published(cut: int, threshold: str, target: str) -> Path:
    shared = Path(os.environ.get("MOCOSFL_SHARED", Path(__file__).parents[3] / "shared"))
    path = shared / "published" / NAME.format(cut, threshold, target)
    if not path.is_file():
        pytest.skip(f"no published client {path}; set MOCOSFL_SHARED to the folder that has published/ in it")
    return path


def by_hand(state: dict[str, Tensor], images: Tensor, cut: int) -> Tensor:
    def conv(x: Tensor, name: str) -> Tensor:
        weight = state[f"{name}.weight"]
        rows = weight.flatten(1)
        rows = rows - rows.mean(1, keepdim=True)
        deviation = (rows.square().sum(1, keepdim=True) / (rows.shape[1] - 1)).sqrt()
        return F.conv2d(x, (rows / (deviation + 1e-5)).view_as(weight), padding=1)

    def norm(x: Tensor, name: str) -> Tensor:
        return F.group_norm(x, 16, state[f"{name}.weight"], state[f"{name}.bias"])

    mean, std = (torch.tensor(v).view(3, 1, 1) for v in ((0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010)))
    x = F.relu(norm(conv((images - mean) / std, "0.conv1"), "0.bn1"))
    for unit in range(1, cut):
        y = F.relu(norm(conv(x, f"{unit}.conv1"), f"{unit}.bn1"))
        x = F.relu(norm(conv(y, f"{unit}.conv2"), f"{unit}.bn2") + x)
    return F.relu(F.conv2d(x, state[f"{cut}.weight"], state[f"{cut}.bias"], stride=2, padding=1))


@pytest.mark.parametrize(
    ("cut", "threshold", "target", "parameters"),
    [(1, "0.6", "0.00", 4_164), (1, "0.6", "0.005", 4_164), (2, "0.6", "0.01", 78_148), (2, "0.5", "0.01", 78_148)],
)
def test_published_clients_compute_what_the_release_did(cut: int, threshold: str, target: str, parameters: int) -> None:
    path = published(cut, threshold, target)
    client = load_published_client(path, cut)
    assert count_parameters(client) == parameters
    images = torch.rand(3, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    state = torch.load(path, weights_only=True, map_location="cpu")
    smashed = client(images)
    assert smashed.shape == (3, 4, 16, 16)
    torch.testing.assert_close(smashed, by_hand(state, images, cut), rtol=1e-6, atol=1e-6)
    with pytest.raises(ConfigurationError, match=f"cut after unit {cut}, not after unit 7"):
        load_published_client(path, 7)


def fake_state(cut: int) -> dict[str, Tensor]:
    """Names and shapes as in the release, where the bottleneck is numbered like one more unit."""
    state = {"0.conv1.weight": torch.randn(64, 3, 3, 3), f"{cut}.weight": torch.randn(4, 64, 3, 3) / 24}
    state |= {"0.bn1.weight": torch.ones(64), "0.bn1.bias": torch.zeros(64), f"{cut}.bias": torch.ones(4)}
    for unit in range(1, cut):
        for layer in (1, 2):
            state[f"{unit}.conv{layer}.weight"] = torch.randn(64, 64, 3, 3)
            state |= {f"{unit}.bn{layer}.weight": torch.ones(64), f"{unit}.bn{layer}.bias": torch.zeros(64)}
    return state


@pytest.mark.parametrize("cut", [1, 3])
def test_cut_and_bottleneck_are_inferred(cut: int, tmp_path: Path) -> None:
    path, state, images = tmp_path / "client.tar", fake_state(cut), torch.rand(2, 3, 32, 32)
    expected = by_hand(state, images, cut)
    names = {f"{cut}.weight": "cut.weight", f"{cut}.bias": "cut.bias"}
    for written in (state, {names.get(name, name): value for name, value in state.items()}):
        torch.save(written, path)
        torch.testing.assert_close(load_published_client(path, cut)(images), expected, rtol=1e-4, atol=1e-5)
    torch.save({name: v for name, v in state.items() if not name.startswith(f"{cut}.")}, path)
    assert load_published_client(path)(images).shape == (2, 64, 32, 32)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"0.bn1.bias": None}, "without 0.bn1.bias"),
        ({"0.bn1.running_mean": torch.zeros(64)}, "with an unexpected 0.bn1.running_mean"),
        (
            {"0.conv1.weight": torch.zeros(32, 3, 3, 3)},
            r"0.conv1.weight has shape \(32, 3, 3, 3\), not \(64, 3, 3, 3\)",
        ),
        ({"1.weight": torch.zeros(4)}, "with an unexpected cut.bias"),
        ({"1.weight": torch.zeros(4, 32, 3, 3)}, r"cut.weight has shape \(4, 32, 3, 3\), not \(4, 64, 3, 3\)"),
        ({"12.conv1.weight": torch.zeros(1)}, "no parameter belongs to a unit from 0 to 8"),
        ({"epoch": 3}, "not a plain state dict"),
    ],
)
def test_files_that_do_not_fit(change: dict[str, object], message: str, tmp_path: Path) -> None:
    state: dict[str, object] = {**fake_state(1), **change}
    torch.save({name: value for name, value in state.items() if value is not None}, tmp_path / "client.tar")
    with pytest.raises(ConfigurationError, match=message) as caught:
        load_published_client(tmp_path / "client.tar")
    assert "\n" not in str(caught.value)


def test_files_of_another_kind(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="cannot be read: No such file"):
        load_published_client(tmp_path / "missing.tar")
    path = tmp_path / "text.tar"
    path.write_text("hello")
    with pytest.raises(ConfigurationError, match="not a torch file with weights only"):
        load_published_client(path)
    torch.save([1, 2], path)
    with pytest.raises(ConfigurationError, match="not a plain state dict"):
        load_published_client(path)
