from __future__ import annotations

import hashlib
from pathlib import Path

import lpips
import pytest
import torch
from torchvision import models

from mocosfl_priv.evaluation import perceptual


@pytest.fixture
def backbone() -> dict[str, torch.Tensor]:
    """An AlexNet with random weights: enough to check the plumbing, useless as a perceptual metric."""
    torch.manual_seed(0)
    return models.alexnet(weights=None).state_dict()


def test_missing_weights_leave_the_metric_out_with_a_remedy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    metric, note = perceptual.load_lpips("alex")
    assert metric is None
    assert "alexnet(weights='IMAGENET1K_V1')" in note and str(tmp_path) in note and "\n" not in note


def test_a_wrong_file_is_not_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, backbone) -> None:  # type: ignore[no-untyped-def]
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    path = perceptual.weights_path("alex")
    path.parent.mkdir()
    torch.save(backbone, path)
    metric, note = perceptual.load_lpips("alex")
    assert metric is None and "damaged" in note


def test_a_right_file_is_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, backbone) -> None:  # type: ignore[no-untyped-def]
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    torch.save(backbone, tmp_path / "weights")
    digest = hashlib.sha256((tmp_path / "weights").read_bytes()).hexdigest()[:8]
    monkeypatch.setitem(perceptual.WEIGHT_FILES, "alex", ("alexnet", f"alexnet-{digest}.pth"))
    perceptual.weights_path("alex").parent.mkdir()
    (tmp_path / "weights").rename(perceptual.weights_path("alex"))
    metric, note = perceptual.load_lpips("alex")
    assert metric is not None and digest in note


def test_values_equal_the_lpips_package(backbone: dict[str, torch.Tensor]) -> None:
    reference = lpips.LPIPS(net="alex", pnet_rand=True, verbose=False)
    target = models.alexnet(weights=None)
    target.load_state_dict(backbone)
    layers = dict(target.features.named_children())
    for name, parameter in reference.net.named_parameters():
        _, index, kind = name.split(".")
        parameter.data.copy_(getattr(layers[index], kind))
    a, b = torch.rand(3, 3, 64, 64), torch.rand(3, 3, 64, 64)
    ours = perceptual.build_lpips("alex", backbone)(a, b)
    with torch.no_grad():
        expected = reference(a * 2 - 1, b * 2 - 1).flatten()
    torch.testing.assert_close(ours, expected)
    assert perceptual.build_lpips("alex", backbone)(a[..., :32, :32], a[..., :32, :32]).abs().max() < 1e-6
