from __future__ import annotations

import pytest
import torch
from torch import nn

from mocosfl_priv.config import ModelConfig, parse_config
from mocosfl_priv.errors import ConfigurationError
from mocosfl_priv.models.projector import build_projector


@pytest.mark.parametrize(
    ("settings", "sizes"),
    [
        ({}, [(512, 1024), (1024, 1024)]),
        ({"head": "v1"}, [(512, 1024)]),
        ({"head": "large_v2"}, [(512, 4096), (4096, 2048)]),
        ({"head": "v1", "projector_out": 64}, [(512, 64)]),
        ({"projector_hidden": 32}, [(512, 32), (32, 1024)]),
        ({"head": "large_v2", "projector_hidden": 32, "projector_out": 16}, [(512, 32), (32, 16)]),
    ],
)
def test_heads(settings: dict[str, object], sizes: list[tuple[int, int]]) -> None:
    projector = build_projector(ModelConfig(**settings), 512)
    linear = [m for m in projector if isinstance(m, nn.Linear)]
    assert [(m.in_features, m.out_features) for m in linear] == sizes
    assert [type(m) for m in projector] == [nn.Linear, nn.ReLU, nn.Linear][: 2 * len(sizes) - 1]
    assert projector(torch.zeros(2, 512)).shape == (2, sizes[-1][1])


def test_a_single_layer_has_no_hidden_size() -> None:
    with pytest.raises(ConfigurationError, match="head v1 is a single linear layer"):
        parse_config({"model": {"head": "v1", "projector_hidden": 3}})
