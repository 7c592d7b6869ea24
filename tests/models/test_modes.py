from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from mocosfl_priv.api import Experiment
from mocosfl_priv.config import ModelConfig
from mocosfl_priv.errors import ConfigurationError
from mocosfl_priv.experiment.model_builder import ModelBuilder
from mocosfl_priv.models.modes import in_eval_mode
from mocosfl_priv.models.split import SplitModel
from mocosfl_priv.training.clients import FrozenClients


def test_every_module_gets_its_own_mode_back() -> None:
    network = nn.Sequential(nn.BatchNorm2d(3), nn.Dropout(), nn.ReLU())
    network[1].eval()
    with pytest.raises(ZeroDivisionError), in_eval_mode(network):
        assert not any(module.training for module in network.modules())
        raise ZeroDivisionError
    assert [module.training for module in network.modules()] == [True, True, False, True]


def test_a_look_at_shapes_and_frozen_clients_teach_batch_norms_nothing() -> None:
    client, trunk = nn.Sequential(nn.BatchNorm2d(3)), nn.Sequential(nn.BatchNorm2d(3), nn.Flatten())
    model = SplitModel(client, trunk, nn.Identity(), (3, 4, 4))
    FrozenClients(client, 2).encode_queries(torch.arange(2), [1, 1], torch.rand(2, 3, 4, 4))
    assert model.feature_dim == 48 and client.training and trunk.training
    for norm in (client[0], trunk[0]):
        assert isinstance(norm, nn.BatchNorm2d) and norm.running_mean is not None
        assert int(norm.num_batches_tracked or 0) == 0 and float(norm.running_mean.abs().sum()) == 0


TRAINED = """
import torch
from torch import nn


class Scale(nn.Module):
    def __init__(self):
        super().__init__()
        self.by = nn.Parameter(torch.randn(4, 1, 1))

    def forward(self, x):
        return x * self.by


def net(width, image_size):
    units = [nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), EXTRA), nn.Conv2d(4, 4, 3, stride=2, padding=1)]
    with torch.random.fork_rng():
        torch.manual_seed(7)
        for unit in units:
            for parameter in unit.parameters():
                torch.nn.init.normal_(parameter)
    return units
"""


def builder() -> ModelBuilder:
    return ModelBuilder(8, (0.5,) * 3, (0.25,) * 3)


def test_a_backbone_that_loads_trained_weights_does_not_hand_them_to_untrained_models(tmp_path: Path) -> None:
    (tmp_path / "trained.py").write_text(TRAINED.replace("EXTRA", "nn.ReLU()"))
    config = ModelConfig(backbone=f"{tmp_path}/trained.py:net")
    trained = builder().build(config, 1, 0)
    untrained = builder().build_untrained(config, 1, 0)
    for part in ("client", "trunk"):
        weights = dict(getattr(trained, part).named_parameters())
        for name, value in getattr(untrained, part).named_parameters():
            assert not torch.equal(value, weights[name]), name
    again = builder().build_client(config, 1, 0)
    assert all(torch.equal(a, b) for a, b in zip(again.parameters(), untrained.client.parameters(), strict=True))


def test_trained_weights_that_nothing_can_draw_anew_are_refused_before_training(tmp_path: Path) -> None:
    (tmp_path / "trained.py").write_text(TRAINED.replace("EXTRA", "Scale()"))
    document = {"model": {"backbone": f"{tmp_path}/trained.py:net", "projector_hidden": 8, "projector_out": 8}}
    with pytest.raises(ConfigurationError, match=r"nothing initialises .*by anew; give Scale a method"):
        Experiment.from_dict(document).plan()


def test_drawn_weights_are_left_as_they_are() -> None:
    config = ModelConfig(backbone="resnet8", width=8, projector_hidden=8, projector_out=8)
    one, two = (make(config, 1, 3) for make in (builder().build, builder().build_untrained))
    assert all(torch.equal(one.named_state()[name], value) for name, value in two.named_state().items())
