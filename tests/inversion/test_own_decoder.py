from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from mocosfl_priv.api import Experiment
from mocosfl_priv.config import PluginSpec
from mocosfl_priv.errors import ConfigurationError
from mocosfl_priv.inversion import build_decoder
from mocosfl_priv.inversion.own_decoder import check_own_decoder
from mocosfl_priv.plugins import ATTACKS, DEFENSES, Budget, Capability
from mocosfl_priv.plugins.attack_checks import small_view

NET = """
from torch import nn
def decoder(smashed_shape, image_shape):
    scale = image_shape[1] // smashed_shape[1]
    return nn.Sequential(
        nn.Conv2d(smashed_shape[0], image_shape[0] * scale**2, 3, padding=1), nn.PixelShuffle(scale)
    )
def fails(smashed_shape, image_shape):
    raise RuntimeError("no such layer")
def no_module(smashed_shape, image_shape):
    return 3
def too_small(smashed_shape, image_shape):
    return nn.Conv2d(smashed_shape[0], 3, 1)
def wants_more(smashed_shape, image_shape):
    return nn.Conv2d(smashed_shape[0] + 1, 3, 1)
"""


@pytest.fixture
def net(tmp_path: Path) -> Path:
    path = tmp_path / "net.py"
    path.write_text(NET)
    return path


def test_it_is_built_and_learns(net: Path) -> None:
    assert build_decoder(f"{net}:decoder", (4, 8, 8), (3, 16, 16))(torch.rand(2, 4, 8, 8)).shape == (2, 3, 16, 16)
    attack = ATTACKS.create(PluginSpec(name="decoder", architecture=f"{net}:decoder", steps=5)).plugin
    view = small_view(attack, frozenset({Capability.QUERY, Capability.AUXILIARY_DATA}))
    assert attack.reconstruct(view, Budget(), 0).shape == (6, 3, 16, 16)


@pytest.mark.parametrize("name", ["decoder", "colluder", "shadow", "sdar", "fsha"])
def test_every_attack_with_a_decoder_takes_it_and_counts_its_file(name: str, net: Path) -> None:
    before = ATTACKS.create(PluginSpec(name=name, architecture=f"{net}:decoder"))
    before.plugin.check((4, 8, 8), (3, 16, 16))
    with pytest.raises(ConfigurationError, match="makes"):
        ATTACKS.create(PluginSpec(name=name, architecture=f"{net}:too_small")).plugin.check((4, 8, 8), (3, 16, 16))
    net.write_text(NET + "# changed\n")
    after = ATTACKS.create(PluginSpec(name=name, architecture=f"{net}:decoder"))
    plain = ATTACKS.create(PluginSpec(name=name))
    assert len({before.code_sha256, after.code_sha256, plain.code_sha256}) == 3


@pytest.mark.parametrize("name", ["adversarial_noise", "ressfl"])
def test_a_defense_with_a_decoder_counts_its_file(name: str, net: Path) -> None:
    before = DEFENSES.create(PluginSpec(name=name, decoder=f"{net}:decoder"))
    net.write_text(NET + "# changed\n")
    assert DEFENSES.create(PluginSpec(name=name, decoder=f"{net}:decoder")).code_sha256 != before.code_sha256


@pytest.mark.parametrize(
    ("function", "message"),
    [
        ("fails", r"fails\(\(4, 8, 8\), \(3, 16, 16\)\) failed: RuntimeError: no such layer"),
        ("no_module", "must return a torch module, not a int"),
        ("too_small", r"makes \(2, 3, 8, 8\) of 2 messages \(4, 8, 8\), not images \(3, 16, 16\)"),
        ("wants_more", r"fails on smashed data \(4, 8, 8\): RuntimeError"),
        ("decodr", "did you mean 'decoder'"),
    ],
)
def test_what_does_not_fit_is_one_line(net: Path, function: str, message: str) -> None:
    with pytest.raises(ConfigurationError, match=message) as caught:
        check_own_decoder(f"{net}:{function}", (4, 8, 8), (3, 16, 16))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("attacks", [True, False])
def test_a_plan_refuses_it_before_training(net: Path, tiny: dict[str, Any], attacks: bool) -> None:
    if attacks:
        tiny["attacks"] = [{"name": "decoder", "architecture": f"{net}:wants_more"}]
    else:
        tiny["defenses"] = [{"name": "adversarial_noise", "decoder": f"{net}:wants_more"}]
    with pytest.raises(ConfigurationError, match="wants_more fails on smashed data"):
        Experiment.from_dict(tiny).plan()
