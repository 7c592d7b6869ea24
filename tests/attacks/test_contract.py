"""What every attack promises. Attacks are taken from the registry: a new file in attacks/ is tested by itself."""

from __future__ import annotations

import inspect

import pytest
import torch

from mocosfl_priv.config import PluginSpec
from mocosfl_priv.errors import ThreatModelError
from mocosfl_priv.plugins import ATTACKS, Attack, AttackerView, Budget, Capability, summary, with_implied
from mocosfl_priv.runtime.compute import Compute
from tests.attacks.closed_form import ColourMixClient, attend, make_view, photo_patches

# smaller than the defaults where an attack has the parameter; every attack must run in seconds with these
SMALL = {
    "epochs": 2,
    "iterations": 20,
    "steps": 12,
    "architecture": "res_normN0C8",
    "width": 8,
    "latent_dim": 8,
    "channels": 8,
    "starts": 2,
}
NAMES = sorted(ATTACKS.origins())


def create(name: str) -> Attack:
    accepted = inspect.signature(ATTACKS.load(name)).parameters
    return ATTACKS.create(PluginSpec(name=name, **{k: v for k, v in SMALL.items() if k in accepted})).plugin


def view_for(
    attack: Attack, compute: Compute, visible: frozenset[Capability] | None = None, poisoned: bool = False
) -> AttackerView:
    """A view on six victims, whose images are `poisoned` once it is built."""
    visible = with_implied(attack.needs | attack.optional if visible is None else visible)
    client, known = ColourMixClient((1.0, 0.7, 0.5)), photo_patches(80)
    listener = None
    if Capability.TRAINING_STREAM in visible:
        listener = attend(attack, client, photo_patches(24), known, compute, visible)
    victims = photo_patches(6, "test")
    view = make_view(client, victims, known, compute, 0.05, visible, listener=listener)
    if poisoned:
        victims.fill_(float("nan"))
    return view


def run(attack: Attack, view: AttackerView, seed: int = 0) -> torch.Tensor:
    torch.manual_seed(seed)
    return attack.reconstruct(view, Budget(), seed)


@pytest.mark.parametrize("name", NAMES)
def test_it_returns_images_of_the_victims(name: str, compute: Compute) -> None:
    attack = create(name)
    images = run(attack, view_for(attack, compute))
    assert images.shape == (6, 3, 16, 16) and images.dtype == torch.float32
    assert bool(images.isfinite().all())
    assert float(images.min()) >= 0 and float(images.max()) <= 1


@pytest.mark.parametrize("name", NAMES)
def test_same_seed_same_reconstruction_whatever_becomes_of_the_victims(name: str, compute: Compute) -> None:
    first, second = (run(create(name), view_for(create(name), compute, poisoned=p)) for p in (False, True))
    assert torch.equal(first, second)


@pytest.mark.parametrize("name", NAMES)
def test_its_declared_needs_suffice(name: str, compute: Compute) -> None:
    attack = create(name)
    run(attack, view_for(attack, compute, attack.needs))


@pytest.mark.parametrize("name", NAMES)
def test_it_fails_without_any_of_its_needs(name: str, compute: Compute) -> None:
    attack = create(name)
    for need in attack.needs:
        with pytest.raises(ThreatModelError):
            run(attack, view_for(attack, compute, attack.needs - {need}))


@pytest.mark.parametrize("name", NAMES)
def test_it_respects_the_time_limit_and_counts_steps(name: str, compute: Compute) -> None:
    attack = create(name)
    budget = Budget(seconds=1e-9)
    torch.manual_seed(0)
    assert attack.reconstruct(view_for(attack, compute), budget, 0).shape == (6, 3, 16, 16)
    assert budget.steps == 0
    full = Budget()
    attack.reconstruct(view_for(attack, compute), full, 0)
    assert (full.steps > 0) != attack.blind


@pytest.mark.parametrize("name", NAMES)
def test_it_leaves_the_view_as_it_was(name: str, compute: Compute) -> None:
    attack = create(name)
    view = view_for(attack, compute, frozenset(Capability))
    smashed, auxiliary = view.smashed.clone(), view.auxiliary.images.clone()
    client = {k: v.clone() for k, v in view.client.state_dict().items()}
    run(attack, view)
    assert torch.equal(view.smashed, smashed) and torch.equal(view.auxiliary.images, auxiliary)
    assert all(torch.equal(v, client[k]) for k, v in view.client.state_dict().items())


@pytest.mark.parametrize("name", NAMES)
def test_it_is_documented(name: str) -> None:
    cls = ATTACKS.load(name)
    assert summary(cls).endswith(".")
    assert not inspect.isabstract(cls)
