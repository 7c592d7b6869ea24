from __future__ import annotations

import pytest
import torch
import torchvision
from torch import nn
from torch.func import functional_call, vmap

from mocosfl_priv.models.micro_batch import explain, mend


@pytest.mark.parametrize(("name", "norms"), [("resnet18", 20), ("mobilenet_v2", 52)])
def test_torchvision_models_are_explained_and_mended(name: str, norms: int) -> None:
    original = getattr(torchvision.models, name)(weights=None, num_classes=3)
    before = {key: value.clone() for key, value in original.state_dict().items()}
    lines = explain(original)
    assert len(lines) == norms
    assert all("BatchNorm2d mixes the images of a batch and keeps running statistics" in line for line in lines)
    assert lines[0].split(":")[0] in dict(original.named_modules())

    mended = mend(original)
    assert explain(mended) == []
    assert all(torch.equal(value, before[key]) for key, value in original.state_dict().items())
    assert [key for key, _ in mended.named_parameters()] == [key for key, _ in original.named_parameters()]
    for key, module in original.named_modules():
        replacement = mended.get_submodule(key)
        if isinstance(module, nn.BatchNorm2d):
            assert isinstance(replacement, nn.GroupNorm)
            assert (replacement.num_channels, replacement.num_groups) == (module.num_features, module.num_features // 4)
        else:
            assert type(replacement) is type(module)

    parameters = {key: torch.stack([p.detach()] * 2).requires_grad_() for key, p in mended.named_parameters()}
    images = torch.rand(2, 1, 3, 64, 64)
    outputs = vmap(lambda p, x: functional_call(mended.eval(), p, (x,)))(parameters, images)
    torch.testing.assert_close(outputs[1], mended(images[1]), rtol=1e-3, atol=1e-4)
    outputs.sum().backward()
    assert all(p.grad is not None and bool(p.grad.isfinite().all()) for p in parameters.values())


def test_affine_parameters_and_settings_are_kept() -> None:
    norm = nn.BatchNorm1d(12, eps=0.01).double().eval()
    nn.init.normal_(norm.weight)
    nn.init.normal_(norm.bias)
    mended = mend(norm)
    assert isinstance(mended, nn.GroupNorm) and not mended.training
    x = torch.randn(2, 12, dtype=torch.float64)
    groups = x.view(2, 3, 4)
    groups = (groups - groups.mean(2, keepdim=True)) / (groups.var(2, unbiased=False, keepdim=True) + 0.01).sqrt()
    torch.testing.assert_close(mended(x), groups.view(2, 12) * norm.weight + norm.bias)
    assert not list(mend(nn.BatchNorm2d(8, affine=False)).parameters())


@pytest.mark.parametrize(("channels", "groups"), [(64, 16), (4, 1), (6, 2), (10, 2), (5, 1), (7, 1), (9, 3), (2, 1)])
def test_the_nearest_divisor_to_four(channels: int, groups: int) -> None:
    mended = mend(nn.BatchNorm2d(channels))
    assert isinstance(mended, nn.GroupNorm) and mended.num_groups == groups


def test_what_is_fine_is_left_alone() -> None:
    fine = nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.GroupNorm(1, 4), nn.InstanceNorm2d(4, affine=True), nn.Dropout(), nn.LayerNorm(4)
    )
    assert explain(fine) == []
    assert str(mend(fine)) == str(fine)
    relu = nn.ReLU()
    assert explain(nn.Sequential(relu, relu)) == []


def test_other_obstacles_are_named() -> None:
    linear = nn.Linear(3, 3)
    tied = nn.Linear(3, 3)
    tied.weight = linear.weight
    network = nn.ModuleDict(
        {
            "lazy": nn.LazyConv2d(4, 3),
            "lazy_norm": nn.LazyBatchNorm2d(),
            "batch": nn.BatchNorm2d(4, track_running_stats=False),
            "sync": nn.SyncBatchNorm(4),
            "instance": nn.InstanceNorm2d(4, track_running_stats=True),
            "first": linear,
            "tied": tied,
            "again": nn.Sequential(linear),
        }
    )
    lines = dict(line.split(": ", 1) for line in explain(network))
    assert list(lines) == ["lazy", "lazy_norm", "batch", "sync", "instance", "tied", "again.0"]
    assert "has no parameters before its first batch" in lines["lazy"] and lines["lazy"].startswith("LazyConv2d")
    assert lines["batch"] == "BatchNorm2d mixes the images of a batch"
    assert lines["sync"].startswith("SyncBatchNorm mixes")
    assert lines["instance"].startswith("InstanceNorm2d keeps running statistics")
    assert lines["tied"].startswith("Linear shares its weight with first")
    assert lines["again.0"].startswith("Linear shares its weight with first")
    left = [line.split(":")[0] for line in explain(mend(network))]
    assert left == ["lazy", "lazy_norm", "tied", "again.0"]
