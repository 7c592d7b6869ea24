from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor

from mocosfl_priv import DefenderContext, Defense, Experiment, Guarantee, PreparedModel
from mocosfl_priv.config import ExperimentConfig, ModelConfig, PluginSpec
from mocosfl_priv.errors import ConfigurationError
from mocosfl_priv.plugins import DEFENSES
from mocosfl_priv.plugins.defense_checks import small_context
from mocosfl_priv.runtime.compute import Compute


class Scale(Defense):
    """Multiplies messages by `factor`."""

    def __init__(self, factor: float = 2.0) -> None:
        self.factor = factor

    def protect(self, smashed: Tensor, rng: torch.Generator, kind: object = None) -> Tensor:
        return self.factor * smashed


class Shift(Defense):
    """Adds one to messages."""

    def protect(self, smashed: Tensor, rng: torch.Generator, kind: object = None) -> Tensor:
        return smashed + 1


class ScaleGradient(Defense):
    """Doubles gradients."""

    def filter_gradient(self, gradient: Tensor, rng: torch.Generator) -> Tensor:
        return 2 * gradient


class ShiftGradient(Defense):
    """Adds one to gradients."""

    def filter_gradient(self, gradient: Tensor, rng: torch.Generator) -> Tensor:
        return gradient + 1


class Pull(Defense):
    """Three times the mean of messages as a loss; counts."""

    def __init__(self) -> None:
        self.seen = torch.zeros(())

    def client_loss(self, images: Tensor, smashed: Tensor) -> Tensor:
        self.seen = self.seen + 1
        return 3 * smashed.mean()

    def state(self) -> dict[str, Tensor]:
        return {"seen": self.seen}

    def load_state(self, state: dict[str, Tensor]) -> None:
        self.seen = state["seen"].clone()


SCALE, SHIFT, PULL = f"{__name__}:Scale", f"{__name__}:Shift", f"{__name__}:Pull"


def composed(*parts: Any) -> Defense:
    return DEFENSES.create(PluginSpec(name="composition", parts=list(parts))).plugin


def test_messages_pass_the_first_part_first_and_gradients_last(rng: torch.Generator) -> None:
    ones = torch.ones(2, 4, 6, 6)
    torch.testing.assert_close(composed({"name": SCALE, "factor": 3.0}, SHIFT).protect(ones, rng), 4 * ones)
    filters = composed(f"{__name__}:ScaleGradient", f"{__name__}:ShiftGradient")
    torch.testing.assert_close(filters.filter_gradient(ones, rng), 4 * ones)


def test_losses_add_up_and_states_stay_apart(rng: torch.Generator) -> None:
    both = composed(PULL, {"name": "nopeek", "alpha": 0.0})
    images, smashed = torch.rand(4, 3, 8, 8, generator=rng), torch.rand(4, 2, 4, 4, generator=rng)
    loss = both.client_loss(images, smashed)
    assert loss is not None
    torch.testing.assert_close(loss, 3 * smashed.mean())
    other = composed(PULL, {"name": "nopeek", "alpha": 0.0})
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


def test_the_promise_of_a_part_holds() -> None:
    promising = {"name": "local_dp", "epsilon": 2.0}
    alone = DEFENSES.create(PluginSpec.model_validate(promising)).plugin.guarantee(3)
    assert alone is not None and composed("bottleneck", promising, "topk_prune").guarantee(3) == alone
    assert composed("bottleneck", "dropout").guarantee(1) is None


class Listening(Defense):
    """Remembers what it sent."""

    sent: Tensor | None = None

    def protect(self, smashed: Tensor, rng: torch.Generator, kind: object = None) -> Tensor:
        self.sent = smashed
        return smashed


def test_a_copy_s_parts_remember_for_themselves(rng: torch.Generator) -> None:
    """What an attack that attends training asks of the defense must not be taken for the training's own."""
    both = composed(SHIFT, f"{__name__}:Listening")
    copy.copy(both).protect(torch.rand(2, 2, 4, 4), rng)
    remembering = both.parts[1].plugin
    assert isinstance(remembering, Listening) and remembering.sent is None
    both.protect(torch.rand(2, 2, 4, 4), rng)
    assert remembering.sent is not None


class Promising(Defense):
    """Promises what it likes."""

    def guarantee(self, messages: int) -> Guarantee:
        return Guarantee(1.0, 0.0, messages)


class Freezing(Defense):
    """Does not say that its clients are frozen."""

    def prepare(self, context: DefenderContext) -> PreparedModel:
        return PreparedModel(context.build_model(), frozen_client=True)


def test_clients_that_turn_out_frozen_are_refused_too(compute: Compute) -> None:
    both = composed(f"{__name__}:Freezing", "nopeek")
    with pytest.raises(ConfigurationError, match="Freezing freezes the clients, and nopeek"):
        both.prepare(small_context(both, compute))


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
        (["gaussian", "mid"], "mid learns about its own messages: it must stand before gaussian"),
        (["local_dp", "adversarial_noise"], "adversarial_noise learns about its own messages"),
        (
            ["shredder", "dropout"],
            "shredder learns from the gradients of its own messages: it must stand after dropout",
        ),
        (["splitguard", "shredder"], "splitguard drops gradients that others would learn from: it must stand last"),
        (["taressfl", "splitguard"], "taressfl freezes the clients, and splitguard works on"),
        (["local_dp", f"{__name__}:Promising"], "local_dp and Promising both promise something"),
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
