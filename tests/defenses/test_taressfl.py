from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from defenses.taressfl import TAResSFL
from mocosfl_priv.config import ModelConfig, TrainingConfig
from mocosfl_priv.data.datasets import load_split
from mocosfl_priv.defending.simulated_attacker import SimulatedAttacker
from mocosfl_priv.errors import ConfigurationError
from mocosfl_priv.evaluation.utility import to_unit_range
from mocosfl_priv.models.split import SplitModel, build_split_model
from mocosfl_priv.plugins import DefenderContext
from mocosfl_priv.runtime.compute import Compute
from mocosfl_priv.runtime.seeding import global_seed
from mocosfl_priv.training.loop import train_mocosfl
from mocosfl_priv.training.sampling import PooledClients, PoolShape


def context(compute: Compute, defense: TAResSFL, target: int = 20, size: int = 32) -> DefenderContext:
    model = defense.architecture(ModelConfig(backbone="resnet8", width=8, projector_hidden=16, projector_out=16))

    def build() -> SplitModel:
        with global_seed(0):
            return build_split_model(model, 1, size, [0.5] * 3, [0.25] * 3)

    images = load_split("photos-source", "train").images[::9, :, :: 32 // size, :: 32 // size]
    training = TrainingConfig(clients=5, queue_size=64)
    return DefenderContext(images[:target], images[20:], build, training, compute, seed=0)


@pytest.mark.slow
def test_training_against_the_attacker_lowers_its_similarity(compute: Compute) -> None:
    """The regulariser does what it says: a fresh decoder, trained as long, sees less."""

    def final_similarity(alpha: float) -> float:
        defense = TAResSFL(alpha=alpha, threshold=0.0, decoder="res_normN0C16", batch_size=16, epochs=16)
        ctx = context(compute, defense, size=16)
        prepared = defense.prepare(ctx)
        images = to_unit_range(ctx.source_images[:64])
        attacker = SimulatedAttacker(
            ["res_normN0C16"], prepared.model.smashed_shape, prepared.model.image_shape, alpha=1.0, threshold=-1.0,
            steps=10_000, batch_size=16, compute=compute, seed=0,
        )  # fmt: skip
        smashed = prepared.model.client(images).detach()
        return [float(attacker.client_loss(images, smashed)) - 1.0 for _ in range(150)][-1]

    undefended, defended = final_similarity(0.0), final_similarity(20.0)
    assert defended < undefended - 0.1


def test_the_expert_is_frozen_and_the_server_start_is_as_asked(compute: Compute) -> None:
    options: dict[str, Any] = {"decoder": ["conv_normN0C8", "edsr_N1C8"], "batch_size": 32, "epochs": 1, "refresh": 1}
    expert_start, scratch = TAResSFL(**options), TAResSFL(**options, server_start="scratch")
    first, second = (d.prepare(context(compute, d, size=16)) for d in (expert_start, scratch))
    assert first.frozen_client and expert_start.freezes_clients
    assert first.learning_rate == 0.001 and first.client_learning_rate is None
    for a, b in zip(first.model.client.parameters(), second.model.client.parameters(), strict=True):
        assert torch.equal(a, b)
    fresh = context(compute, scratch, size=16).build_model()
    for a, b in zip(second.model.trunk.parameters(), fresh.trunk.parameters(), strict=True):
        assert torch.equal(a, b)
    assert any(
        not torch.equal(a, b) for a, b in zip(first.model.trunk.parameters(), fresh.trunk.parameters(), strict=True)
    )


def test_low_rate_transfer_moves_clients_a_little(compute: Compute) -> None:
    """Trained as a system is, a frozen client stays what the expert is; another leaves it as far as its rate says."""
    small: dict[str, Any] = {"decoder": "conv_normN0C8", "batch_size": 64, "epochs": 1}

    def moved(**options: Any) -> float:
        defense = TAResSFL(**small, **options)
        ctx = context(compute, defense, size=16)
        prepared = defense.prepare(ctx)
        before = prepared.model.copy().client.state_dict()
        images = ctx.source_images[:40]
        clients = PooledClients(images, list(torch.arange(40).split(8)), PoolShape(5, 2), torch.Generator())
        rates = {"client_learning_rate": prepared.client_learning_rate}
        train_mocosfl(
            prepared.model, clients, ctx.training.model_copy(update=rates), steps=4, compute=compute, seed=0,
            hooks=defense, frozen_client=prepared.frozen_client, learning_rate=prepared.learning_rate,
        )  # fmt: skip
        after = prepared.model.client.state_dict()
        return max(float((after[name] - before[name]).abs().max()) for name in before)

    low, lower = moved(transfer="low_lr", client_learning_rate=0.01), moved(transfer="low_lr")
    assert moved() == 0 < lower < 0.1 * low


def test_settings_that_contradict_are_refused() -> None:
    with pytest.raises(ConfigurationError, match="single decoder cannot be restarted"):
        TAResSFL(refresh=2)
    with pytest.raises(ConfigurationError, match="name at least one"):
        TAResSFL(decoder=[])
    with pytest.raises(ConfigurationError, match="'unet_9' is not of the form"):
        TAResSFL(decoder=["res_normN4C64", "unet_9"])
    assert TAResSFL(decoder=["unet_N2C32", "res_normN4C64"]).simulator == "unet_N2C32"


def test_a_defender_without_images_is_refused(compute: Compute) -> None:
    defense = TAResSFL()
    empty = replace(context(compute, defense, target=0), source_images=torch.empty(0, 3, 32, 32, dtype=torch.uint8))
    with pytest.raises(ConfigurationError, match="neither source nor target"):
        defense.prepare(empty)
