from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from defenses.ressfl import ResSFL
from mocosfl_priv.config import ModelConfig, TrainingConfig
from mocosfl_priv.data.datasets import load_split
from mocosfl_priv.defending.simulated_attacker import SimulatedAttacker
from mocosfl_priv.errors import ConfigurationError
from mocosfl_priv.evaluation.utility import to_unit_range
from mocosfl_priv.models.split import SplitModel, build_split_model
from mocosfl_priv.plugins import DefenderContext
from mocosfl_priv.runtime.compute import Compute
from mocosfl_priv.runtime.seeding import global_seed

LIVE: dict[str, Any] = {"epochs": 0, "training_decoder": "conv_normN0C16", "interval": 1}


def context(compute: Compute, defense: ResSFL, steps: int = 10) -> DefenderContext:
    model = defense.architecture(ModelConfig(backbone="resnet8", width=8, projector_hidden=16, projector_out=16))

    def build() -> SplitModel:
        with global_seed(0):
            return build_split_model(model, 1, 16, [0.5] * 3, [0.25] * 3)

    images = load_split("photos-source", "train").images[::9, :, ::2, ::2]
    training = TrainingConfig(clients=4, server_batch=32, queue_size=64, epochs=8, sync_period=1)
    return DefenderContext(images[:20], images[20:], build, training, compute, seed=0, training_steps=steps)


def test_without_an_expert_clients_start_untrained_and_learn_at_the_configured_rates(compute: Compute) -> None:
    defense = ResSFL(**LIVE)
    ctx = replace(context(compute, defense), source_images=torch.empty(0, 3, 16, 16, dtype=torch.uint8))
    assert defense.planned_steps(ctx) == 0 and defense.simulator == "conv_normN0C16"
    prepared, fresh = defense.prepare(ctx), ctx.build_model()
    assert prepared.learning_rate is None and prepared.client_learning_rate is None and not prepared.frozen_client
    assert all(
        torch.equal(a, b) for a, b in zip(prepared.model.client.parameters(), fresh.client.parameters(), strict=True)
    )


def test_the_expert_sees_no_target_data(compute: Compute) -> None:
    defense = ResSFL(epochs=1, batch_size=64, decoder="conv_normN0C8")
    ctx = context(compute, defense)
    other = replace(ctx, target_images=255 - ctx.target_images)
    first, second = (ResSFL(epochs=1, batch_size=64, decoder="conv_normN0C8").prepare(c) for c in (ctx, other))
    assert first.client_learning_rate == 0.005 and first.learning_rate == 0.05 and not first.frozen_client
    assert all(
        torch.equal(a, b)
        for a, b in zip(first.model.client.parameters(), second.model.client.parameters(), strict=True)
    )


def test_the_decoder_learns_at_intervals_and_clients_pay_always(compute: Compute) -> None:
    defense = ResSFL(**{**LIVE, "interval": 3}, threshold=-1.0, alpha=2.0)
    model = defense.prepare(context(compute, defense)).model
    images = to_unit_range(load_split("photos-source", "train").images[:8, :, ::2, ::2])
    ages = []
    for _ in range(7):
        loss = defense.joint_loss(images, model.client(images))
        assert loss is not None and float(loss.detach()) > 0
        ages.append(int(defense.state()["attacker.steps"]))
    assert ages == [1, 1, 1, 2, 2, 2, 3]


def test_a_plain_transfer_asks_nothing_of_clients(compute: Compute) -> None:
    defense = ResSFL(epochs=1, batch_size=64, decoder="conv_normN0C8", transfer="frozen", during_training=False)
    prepared = defense.prepare(context(compute, defense))
    assert prepared.frozen_client and defense.freezes_clients and defense.state() == {}
    images = torch.rand(2, 3, 16, 16)
    assert defense.joint_loss(images, prepared.model.client(images)) is None


def test_settings_that_contradict_are_refused() -> None:
    with pytest.raises(ConfigurationError, match="frozen clients learn nothing"):
        ResSFL(transfer="frozen")
    with pytest.raises(ConfigurationError, match="trained against somebody"):
        ResSFL(epochs=0, during_training=False)
    with pytest.raises(ConfigurationError, match="single decoder cannot be restarted"):
        ResSFL(**LIVE, decoder=["conv_normN0C16", "edsr_N1C8"], refresh=1)
    with pytest.raises(ConfigurationError, match="'mlp' is not of the form"):
        ResSFL(training_decoder=["conv_normN0C16", "mlp"])


def trained(defense: ResSFL, compute: Compute, images: Tensor, steps: int) -> Tensor:
    """Smashed data of a client that learned nothing but the defense's loss."""
    client = defense.prepare(context(compute, defense, steps)).model.client
    optimiser = torch.optim.Adam(client.parameters(), lr=0.003)
    for _ in range(steps):
        loss = defense.joint_loss(images, client(images))
        assert loss is not None
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    return client(images).detach()


def photographs(compute: Compute, count: int) -> Tensor:
    return to_unit_range(context(compute, ResSFL()).source_images[:count])


def test_its_decoder_loses_sight_of_clients_that_pay(compute: Compute) -> None:
    images = photographs(compute, 16)

    def seen(alpha: float) -> float:
        defense = ResSFL(**LIVE, alpha=alpha, threshold=0.0, layer="C4S2")
        smashed = trained(defense, compute, images, steps=60)
        assert defense._live is not None
        return float(defense._live.score(defense._live.decoders[0], images, smashed).detach())

    assert seen(1.0) < seen(0.0) - 0.1


@pytest.mark.slow
def test_refreshed_decoders_protect_from_one_that_begins_later(compute: Compute) -> None:
    """Clients outrun decoders whose rate decays: a new one of another kind sees about what it saw without a defense.
    They cannot where one of the decoders is always new.
    """
    images = photographs(compute, 32)

    def seen(**options: Any) -> float:
        settings = {**LIVE, "training_decoder": ["conv_normN0C16"] * 2, "threshold": 0.0, "layer": "C4S2", **options}
        smashed = trained(ResSFL(**settings), compute, images, steps=150)
        attacker = SimulatedAttacker(
            ["res_normN1C16"], smashed.shape[1:], images.shape[1:], alpha=1.0, threshold=0.0, steps=10_000,
            batch_size=32, compute=compute, seed=1,
        )  # fmt: skip
        for _ in range(80):
            attacker.learn(images, smashed)
        return float(attacker.score(attacker.decoders[0], images, smashed).detach())

    refreshed = seen(alpha=1.0, refresh=1)
    outrun, undefended = seen(alpha=1.0), seen(alpha=0.0)
    assert refreshed < min(outrun, undefended) - 0.2, (refreshed, outrun, undefended)
