from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from mocosfl_priv.config import EvaluationConfig, ModelConfig
from mocosfl_priv.data.image_set import ImageSet
from mocosfl_priv.evaluation.utility import ProbeData, features, measure_utility, probe_features
from mocosfl_priv.models.split import SplitModel, build_split_model
from mocosfl_priv.runtime.compute import Compute
from mocosfl_priv.training.hooks import NoHooks

CONFIG = EvaluationConfig(linear_probe_penalties=(0.001, 0.1, 10.0), label_fractions=(0.5, 0.25))


@pytest.fixture(scope="module")
def model() -> SplitModel:
    torch.manual_seed(0)
    return build_split_model(ModelConfig(backbone="resnet8", width=16), 1, 16, [0.5] * 3, [0.25] * 3)


@pytest.fixture(scope="module")
def data() -> ProbeData:
    """Two classes of noise that differ a little in brightness: neither easy nor hopeless."""
    rng = torch.Generator().manual_seed(0)

    def split(name: str, n: int) -> ImageSet:
        labels = torch.randint(0, 2, (n,), generator=rng)
        noise = torch.randn((n, 3, 16, 16), generator=rng) * 50 + torch.randn((n, 1, 1, 1), generator=rng) * 12
        images = (noise + 120 + 14 * labels.view(-1, 1, 1, 1)).clamp(0, 255).byte()
        return ImageSet.ungrouped(name, images, labels, ("dark", "bright"))

    return ProbeData(split("train", 80), split("validation", 40), split("test", 60))


def test_labels_of_test_images_decide_nothing(model: SplitModel, data: ProbeData, compute: Compute) -> None:
    """With every test label turned round, every prediction that was right is wrong, and nothing else changes."""
    turned = ProbeData(data.train, data.validation, replace(data.test, labels=1 - data.test.labels))
    ours, other = (measure_utility(model, d, NoHooks(), CONFIG, compute, 0) for d in (data, turned))
    assert np.array_equal(ours.knn, ~other.knn) and np.array_equal(ours.linear, ~other.linear)
    assert ours.linear_penalty == other.linear_penalty
    assert list(ours.semi_supervised) == [0.5, 0.25]
    for fraction, result in ours.semi_supervised.items():
        assert np.array_equal(result.correct, ~other.semi_supervised[fraction].correct)
        assert result.epoch == other.semi_supervised[fraction].epoch and result.labels == fraction * 80


def test_selection_on_test_is_there_to_repeat_published_protocols(
    model: SplitModel, data: ProbeData, compute: Compute
) -> None:
    published = CONFIG.model_copy(update={"probe_selection": "test"})
    rng = torch.Generator().manual_seed(0)
    for config, role in ((CONFIG, data.validation), (published, data.test)):
        _, selection, test = probe_features(model, data, NoHooks(), config, compute, rng)
        assert torch.equal(selection[1], role.labels) and torch.equal(test[1], data.test.labels)
    ours, theirs = (measure_utility(model, data, NoHooks(), c, compute, 0) for c in (CONFIG, published))
    assert theirs.linear.mean() >= ours.linear.mean()
    for fraction, result in theirs.semi_supervised.items():
        assert result.correct.mean() >= ours.semi_supervised[fraction].correct.mean()


def test_features_are_those_of_the_network_in_use(data: ProbeData, compute: Compute) -> None:
    """A user's Dropout is off while features are taken, and on again afterwards."""
    torch.manual_seed(0)
    dropping = build_split_model(ModelConfig(backbone="resnet8", width=16), 1, 16, [0.5] * 3, [0.25] * 3)
    dropping.client.add_module("dropout", torch.nn.Dropout(0.5))
    first, second = (
        features(dropping, data.test.images, NoHooks(), compute, torch.Generator().manual_seed(0)) for _ in range(2)
    )
    assert torch.equal(first, second)
    assert dropping.client.training and dropping.trunk.training
