from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from defenses.taressfl import TAResSFL
from mocosfl_priv.config import ModelConfig, TrainingConfig
from mocosfl_priv.defending.expert import HalfTargetBatches, import_client
from mocosfl_priv.errors import ConfigurationError
from mocosfl_priv.models.split import SplitModel, build_split_model
from mocosfl_priv.plugins import DefenderContext
from mocosfl_priv.published.loader import load_published_client
from mocosfl_priv.runtime.compute import Compute

NONE = torch.empty(0, 3, 32, 32, dtype=torch.uint8)


def test_batches_are_half_target() -> None:
    target, source = torch.zeros(3, 3, 8, 8, dtype=torch.uint8), torch.ones(50, 3, 8, 8, dtype=torch.uint8)
    batch = HalfTargetBatches(target, source, 16, torch.Generator().manual_seed(0)).next()
    assert batch.images.shape == (16, 3, 8, 8) and batch.sizes == (16,)
    assert batch.images[:, 0, 0, 0].tolist() == [1] * 8 + [0] * 8
    none = HalfTargetBatches(target[:0], source, 16, torch.Generator().manual_seed(0)).next()
    assert none.images.min() == 1


def published(shared: Path) -> Path:
    path = shared / "published" / "resnet18_cifar10_C4S2_cut1_alpha2.0_ssim0.6_target0.005_cifar100.tar"
    if not path.is_file():
        pytest.skip(f"no published client {path}")
    return path


def build(cut: int = 1, size: int = 32, **model: object) -> SplitModel:
    settings = {"bottleneck": "C4S2", "projector_hidden": 8, "projector_out": 8, **model}
    torch.manual_seed(0)
    return build_split_model(ModelConfig(**settings), cut, size, [0.5] * 3, [0.25] * 3)


def test_an_imported_expert_is_the_published_client(shared: Path, compute: Compute) -> None:
    path = published(shared)
    defense = TAResSFL(expert=path)
    assert not defense.uses_target_data
    context = DefenderContext(NONE, NONE, build, TrainingConfig(), compute, seed=0)
    assert defense.planned_steps(context) == 0
    prepared = defense.prepare(context)
    assert prepared.frozen_client
    file, images = torch.load(path, weights_only=True, map_location="cpu"), torch.rand(2, 3, 32, 32)
    found = prepared.model.client.state_dict()
    assert torch.equal(found["0.conv1.weight"], file["0.conv1.weight"])
    assert torch.equal(found["cut.weight"], file["1.weight"])
    smashed = prepared.model.client(images)
    assert torch.equal(smashed, load_published_client(path)(images))  # its normalisation included
    fresh = build()
    assert all(
        torch.equal(a, b) for a, b in zip(prepared.model.trunk.parameters(), fresh.trunk.parameters(), strict=True)
    )
    assert prepared.model.trunk(smashed).shape == (2, 512)


@pytest.mark.parametrize(
    "make",
    [
        lambda: build(cut=2),
        lambda: build(size=64),
        lambda: build(width=16),
        lambda: build(norm="layer"),
        lambda: build(weight_standardisation=False),
        lambda: build(bottleneck="C8S2"),
        lambda: build(bottleneck="C4S1"),
        lambda: build(bottleneck="noReLUC4S2"),
        lambda: build(bottleneck="none"),
        lambda: build(backbone="mobilenetv2"),
    ],
)
def test_a_published_client_that_does_not_fit_is_refused(make: Callable[[], SplitModel], shared: Path) -> None:
    with pytest.raises(ConfigurationError, match=r"ResNet-18 for 32 pixels, cut after unit 1, .* does not match it"):
        import_client(make(), published(shared))


def test_a_file_that_is_no_client_is_refused_at_once(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="cannot be read: No such file"):
        TAResSFL(expert=tmp_path / "missing.tar")
