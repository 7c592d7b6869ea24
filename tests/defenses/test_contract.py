"""What every defense promises. Defenses are taken from the registry: a new file in defenses/ is tested by itself."""

from __future__ import annotations

import inspect

import pytest
import torch

from mocosfl_priv.compute import Compute
from mocosfl_priv.config import ModelConfig, PluginSpec, TrainingConfig
from mocosfl_priv.models.split import build_split_model
from mocosfl_priv.plugins import DEFENSES, DefenderContext, Defense, PreparedModel, summary
from mocosfl_priv.seeding import global_seed
from mocosfl_priv.training.mocosfl import train_mocosfl
from mocosfl_priv.training.sampling import PooledClients, PoolShape

SMALL = {"epochs": 1, "batch_size": 8, "decoder": "res_normN0C8", "parts": ["bottleneck", "nopeek", "gaussian"]}
NAMES = sorted(DEFENSES.origins())
IMAGES = torch.randint(0, 256, (32, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def create(name: str) -> Defense:
    accepted = inspect.signature(DEFENSES.load(name)).parameters
    return DEFENSES.create(PluginSpec(name=name, **{k: v for k, v in SMALL.items() if k in accepted})).plugin


def context(defense: Defense, compute: Compute) -> DefenderContext:
    model = defense.architecture(ModelConfig(backbone="resnet8", width=8, projector_hidden=8, projector_out=8))

    def build():  # type: ignore[no-untyped-def]
        with global_seed(0):
            return build_split_model(model, 1, 32, [0.5] * 3, [0.25] * 3)

    training = TrainingConfig(clients=2, server_batch=8, queue_size=16, epochs=1, sync_period=2)
    return DefenderContext(IMAGES[:4], IMAGES[4:20], build, training, compute, seed=0)


@pytest.mark.parametrize("name", NAMES)
def test_protection_keeps_shape_and_lets_gradients_through(name: str, rng: torch.Generator) -> None:
    smashed = torch.randn(5, 4, 6, 6, requires_grad=True)
    protected = create(name).protect(smashed, rng)
    assert protected.shape == smashed.shape and protected.dtype == smashed.dtype
    protected.square().sum().backward()
    assert smashed.grad is not None and bool(smashed.grad.isfinite().all())


@pytest.mark.parametrize("name", NAMES)
def test_protection_is_image_by_image(name: str) -> None:
    defense = create(name)
    if defense.randomised:
        return  # covered by its own test: the noise of the others is drawn from the same stream
    smashed = torch.randn(5, 4, 6, 6)
    together = defense.protect(smashed, torch.Generator().manual_seed(0))
    alone = torch.cat([defense.protect(s[None], torch.Generator().manual_seed(0)) for s in smashed])
    torch.testing.assert_close(together, alone)


@pytest.mark.parametrize("name", NAMES)
def test_randomness_comes_from_the_given_generator_and_is_declared(name: str) -> None:
    defense = create(name)
    smashed = torch.randn(5, 4, 6, 6)
    first, same, other = (defense.protect(smashed, torch.Generator().manual_seed(s)) for s in (0, 0, 1))
    assert torch.equal(first, same)
    assert torch.equal(first, other) != defense.randomised


@pytest.mark.parametrize("name", NAMES)
def test_it_trains_a_real_split_model(name: str, compute: Compute) -> None:
    defense = create(name)
    ctx = context(defense, compute)
    prepared = defense.prepare(ctx) or PreparedModel(ctx.build_model())
    shape = PoolShape.of(ctx.training)
    clients = PooledClients(IMAGES, [torch.arange(16), torch.arange(16, 32)], shape, torch.Generator().manual_seed(0))
    rates = {"client_learning_rate": prepared.client_learning_rate}
    outcome = train_mocosfl(
        prepared.model, clients, ctx.training.model_copy(update=rates), steps=3, compute=compute, seed=0, hooks=defense,
        frozen_client=prepared.frozen_client, learning_rate=prepared.learning_rate,
    )  # fmt: skip
    assert all(bool(p.isfinite().all()) for p in outcome.model.client.parameters())


@pytest.mark.parametrize("name", NAMES)
def test_preparation_is_repeatable(name: str, compute: Compute) -> None:
    states = []
    for _ in range(2):
        defense = create(name)
        prepared = defense.prepare(context(defense, compute))
        states.append(prepared.model.client.state_dict() if prepared else {})
    assert all(torch.equal(states[0][key], states[1][key]) for key in states[0])


@pytest.mark.parametrize("name", NAMES)
def test_it_is_documented(name: str) -> None:
    assert summary(DEFENSES.load(name)).endswith(".")
