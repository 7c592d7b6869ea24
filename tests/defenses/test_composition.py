from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from mocosfl_priv import Defense, Experiment
from mocosfl_priv.config import ExperimentConfig, ModelConfig, PluginSpec
from mocosfl_priv.errors import ConfigurationError
from mocosfl_priv.plugins import DEFENSES


class Scale(Defense):
    """Multiplies by `factor`, its gradient too."""

    def __init__(self, factor: float = 2.0) -> None:
        self.factor = factor
        self.seen = torch.zeros(())

    def client_loss(self, images: Tensor, smashed: Tensor) -> Tensor:
        self.seen = self.seen + 1
        return self.factor * smashed.mean()

    def protect(self, smashed: Tensor, rng: torch.Generator) -> Tensor:
        return self.factor * smashed

    def filter_gradient(self, gradient: Tensor, rng: torch.Generator) -> Tensor:
        return gradient * self.factor

    def state(self) -> dict[str, Tensor]:
        return {"seen": self.seen}

    def load_state(self, state: dict[str, Tensor]) -> None:
        self.seen = state["seen"].clone()


class Shift(Defense):
    """Adds one, to the gradient too."""

    def protect(self, smashed: Tensor, rng: torch.Generator) -> Tensor:
        return smashed + 1

    def filter_gradient(self, gradient: Tensor, rng: torch.Generator) -> Tensor:
        return gradient + 1


SCALE, SHIFT = f"{__name__}:Scale", f"{__name__}:Shift"


def composed(*parts: Any) -> Defense:
    return DEFENSES.create(PluginSpec(name="composition", parts=list(parts))).plugin


def test_messages_pass_the_first_part_first_and_gradients_last(rng: torch.Generator) -> None:
    both = composed({"name": SCALE, "factor": 3.0}, SHIFT)
    ones = torch.ones(2, 4, 6, 6)
    torch.testing.assert_close(both.protect(ones, rng), 4 * ones)
    torch.testing.assert_close(both.filter_gradient(ones, rng), 6 * ones)


def test_losses_add_up_and_states_stay_apart(rng: torch.Generator) -> None:
    both = composed({"name": SCALE, "factor": 3.0}, {"name": "nopeek", "alpha": 0.0})
    images, smashed = torch.rand(4, 3, 8, 8, generator=rng), torch.rand(4, 2, 4, 4, generator=rng)
    loss = both.client_loss(images, smashed)
    assert loss is not None
    torch.testing.assert_close(loss, 3 * smashed.mean())
    other = composed({"name": SCALE, "factor": 3.0}, {"name": "nopeek", "alpha": 0.0})
    other.load_state(both.state())
    assert other.state().keys() == {"0.seen"} and float(other.state()["0.seen"]) == 1
    assert composed("bottleneck", "gaussian").client_loss(images, smashed) is None


def test_it_has_the_traits_of_its_parts() -> None:
    both = composed("bottleneck", "gaussian")
    assert both.randomised and not both.uses_target_data and not both.freezes_clients and both.simulator is None
    assert both.architecture(ModelConfig()).bottleneck == "C4S2"
    with_expert = composed("taressfl", "topk_prune")
    assert with_expert.uses_target_data and with_expert.freezes_clients and not with_expert.randomised
    assert with_expert.simulator == "res_normN4C64"


def test_the_strongest_promise_of_its_parts_holds() -> None:
    weak, strong = {"name": "local_dp", "epsilon": 4.0}, {"name": "local_dp", "epsilon": 2.0}
    alone = DEFENSES.create(PluginSpec.model_validate(strong)).plugin.guarantee(3)
    assert composed("bottleneck", strong, "topk_prune").guarantee(3) == alone
    assert composed("bottleneck", weak).guarantee(1) != alone and composed("bottleneck", "dropout").guarantee(1) is None


def test_its_code_is_that_of_its_parts() -> None:
    one, other = (
        DEFENSES.create(PluginSpec(name="composition", parts=p)) for p in (["dropout", SHIFT], [SHIFT, SCALE])
    )
    assert one.code_sha256 != other.code_sha256


@pytest.mark.parametrize(
    ("parts", "reason"),
    [
        (["none", "gaussian"], "none does nothing"),
        (["gaussian", "gaussian"], "gaussian stands twice"),
        (["bottleneck", "taressfl"], "bottleneck and taressfl both change the model"),
        (["taressfl", "nopeek"], "taressfl freezes the clients, and nopeek works on what they learn"),
        (["gaussian", {"name": "composition", "parts": ["dropout", "nopeek"]}], "name its parts"),
        (["gaussian"], "at least 2 items"),
        (["gaussian", "nopeak"], "nopeek"),
    ],
)
def test_what_makes_no_sense_is_refused_with_the_reason(parts: list[Any], reason: str, tiny: dict[str, Any]) -> None:
    with pytest.raises(ConfigurationError, match=reason):
        Experiment.from_dict({**tiny, "defenses": ["none", {"name": "composition", "parts": parts}]}).plan()


def test_a_list_in_a_configuration_is_a_composition() -> None:
    config = ExperimentConfig.model_validate(
        {"defenses": ["none", ["bottleneck", {"name": "gaussian", "sigma": 0.1}], ["nopeek", SCALE], "dropout+mid"]}
    )
    labels = ["none", "bottleneck+gaussian", "nopeek+Scale", "dropout+mid"]
    assert [spec.label for spec in config.defenses] == labels
    assert ExperimentConfig.model_validate(config.model_dump(mode="json")) == config


def test_three_defenses_train_together_and_are_attacked(tiny: dict[str, Any]) -> None:
    tiny["defenses"] = [["bottleneck", "nopeek", {"name": "gaussian", "sigma": 0.3}]]
    tiny["attacks"] = ["floor", {"name": "decoder", "architecture": "res_normN0C8", "epochs": 1}]
    run = Experiment.from_dict(tiny).run()
    assert run.table()["defense"].unique().tolist() == ["bottleneck+nopeek+gaussian"]
    assert run.table()["smashed_bytes_per_image"].iloc[0] == 4 * 4 * 16 * 16  # the bottleneck's four channels
    (recorded,) = run.record.info["plugins"]["defenses"]
    assert recorded["parameters"]["recipe"] == "bottleneck + nopeek + gaussian(sigma=0.3)"
    assert "randomised" in recorded["traits"]


def test_a_composition_comes_from_where_its_parts_do() -> None:
    """Two different compositions are no two strengths of one defense."""
    (spec,) = ExperimentConfig(defenses=[["bottleneck", "gaussian"]]).defenses
    assert DEFENSES.create(spec).origin == "defenses.bottleneck:BottleneckDefense+defenses.gaussian:GaussianNoise"
