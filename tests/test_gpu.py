"""Whatever runs on the CPU runs on a GPU, too, in the precision it is asked for. Skipped without one."""

from __future__ import annotations

import copy
import inspect
from typing import Any

import numpy as np
import pytest
import torch

from mocosfl_priv import Experiment
from mocosfl_priv.plugins import ATTACKS, DEFENSES, Attack, Capability, Defense, Registry

DEVICE = "cuda"
ON_GPU = {"device": DEVICE, "precision": "float32"}
EVERYTHING = {"grants": [capability.value for capability in Capability], "messages_per_victim": 2, "steps": 60}
SMALL = {
    "architecture": "res_normN0C8",
    "batch_size": 8,
    "channels": 8,
    "decoder": "res_normN0C8",
    "epochs": 1,
    "iterations": 20,
    "latent_dim": 8,
    "parts": ["bottleneck", "nopeek", "gaussian"],
    "starts": 2,
    "width": 8,
}

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no GPU")


def small(registry: Registry[Attack] | Registry[Defense], name: str) -> dict[str, Any]:
    accepted = inspect.signature(registry.load(name)).parameters
    return {"name": name, **{key: value for key, value in SMALL.items() if key in accepted}}


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_every_attack_attacks_what_was_trained_there(precision: str, tiny: dict[str, Any]) -> None:
    compute = {"device": DEVICE, "precision": precision}
    attacks = [small(ATTACKS, name) for name in sorted(ATTACKS.origins())]
    table = Experiment.from_dict({**tiny, "compute": compute, "threat": EVERYTHING, "attacks": attacks}).run().table()
    assert dict(zip(table["attack"], table["failure"], strict=True)) == dict.fromkeys(table["attack"], "")
    assert np.isfinite(table["mse"]).all()


@pytest.mark.parametrize("name", sorted(DEFENSES.origins()))
def test_every_defense_defends_what_is_trained_there(name: str, tiny: dict[str, Any]) -> None:
    attacks = [{"name": "decoder", "architecture": "res_normN0C8", "steps": 12}]
    document = {**tiny, "compute": ON_GPU, "attacks": attacks, "target_fractions": [0.05]}
    run = Experiment.from_dict({**document, "defenses": [small(DEFENSES, name)]}).run()
    run.require_success()
    assert np.isfinite(run.table()["mse"]).all()


def test_float32_there_is_float32(tiny: dict[str, Any]) -> None:
    """Convolutions in TensorFloat-32, which is torch's default, err by a thousandth."""
    plan = Experiment.from_dict({**tiny, "compute": ON_GPU}).plan()
    model = plan.context.models.build(plan.config.model, 1, 0)
    images = plan.context.victims.images
    found = []
    for device in ("cpu", DEVICE):
        there = copy.deepcopy(model).to(torch.device(device))
        smashed = there.client(images.to(device))
        embedding = there.projector(there.trunk(smashed))
        (gradient,) = torch.autograd.grad(embedding.square().mean(), smashed)
        found.append([value.detach().cpu() for value in (smashed, embedding, gradient)])
    for ours, theirs in zip(*found, strict=True):
        assert float((theirs - ours).norm() / ours.norm()) < 1e-5
