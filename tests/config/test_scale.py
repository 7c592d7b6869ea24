from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest

from mocosfl_priv.config import ExperimentConfig, parse_config, read_document
from mocosfl_priv.config.scale import scaled
from mocosfl_priv.errors import ConfigurationError
from mocosfl_priv.sweep.document import load_sweep


def at_scale(path: Path, overrides: Sequence[str] = ()) -> ExperimentConfig:
    return parse_config(scaled(read_document(path), "tiny"), overrides)


PAPER = sorted((Path(__file__).parents[2] / "configs" / "paper").glob("*.yaml"))


@pytest.mark.parametrize("path", PAPER, ids=lambda path: path.stem)
def test_a_paper_configuration_is_small_at_scale_tiny_and_keeps_what_it_studies(path: Path) -> None:
    full, small = (load_sweep(path, scale=scale).variants for scale in (None, "tiny"))
    assert [variant.labels for variant in full] == [variant.labels for variant in small]
    for one, other in zip(full, small, strict=True):
        assert_small(one.config, other.config)


def assert_small(full: ExperimentConfig, small: ExperimentConfig) -> None:
    assert full.data.dataset == "cifar10" and full.training.epochs == 200 and len(full.seeds) >= 3
    assert small.data.dataset == "photos" and small.training.epochs == 1 and small.threat.steps == 20
    for kept in ("cut_layers", "target_fractions"):
        assert getattr(full, kept) == getattr(small, kept)
    assert [spec.label for spec in full.defenses] == [spec.label for spec in small.defenses]
    assert all(spec.parameters.get("epochs", 1) == 1 for spec in small.defenses)
    assert full.training.partition == small.training.partition


def test_overrides_go_on_top_of_a_scale(tmp_path: Path) -> None:
    path = tmp_path / "one.yaml"
    path.write_text("training: {epochs: 50}")
    assert at_scale(path, ["training.epochs=3"]).training.epochs == 3
    with pytest.raises(ConfigurationError, match="--scale 'tinny': did you mean 'tiny'"):
        scaled(read_document(path), "tinny")
