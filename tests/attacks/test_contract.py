"""What every attack promises. Attacks are taken from the registry: a new file in attacks/ is tested by itself."""

from __future__ import annotations

import gc
import inspect
from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import Tensor

from mocosfl_priv.config import PluginSpec
from mocosfl_priv.errors import ConfigurationError
from mocosfl_priv.plugins import (
    ATTACKS,
    Attack,
    AttackerView,
    Budget,
    Capability,
    Message,
    ServerHooks,
    State,
    StreamView,
    summary,
)
from mocosfl_priv.plugins.attack_checks import CHECKS, Make, require_attack_contract, small_view

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


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
@pytest.mark.parametrize("name", NAMES)
def test_it_keeps_the_contract(name: str, check: Callable[[Make], None]) -> None:
    check(partial(create, name))


@pytest.mark.parametrize("name", NAMES)
def test_it_counts_its_steps(name: str) -> None:
    attack, budget = create(name), Budget(steps=12)
    torch.manual_seed(0)
    attack.reconstruct(small_view(attack), budget, 0)
    assert (budget.steps > 0) != attack.blind


@pytest.mark.parametrize("name", NAMES)
def test_it_is_documented(name: str) -> None:
    cls = ATTACKS.load(name)
    assert summary(cls).endswith(".")
    assert not inspect.isabstract(cls)


class Grey(Attack):
    """Keeps the contract."""

    def reconstruct(self, view: AttackerView, budget: Budget, seed: int) -> Tensor:
        return view.smashed.new_full((len(view.smashed), *view.image_shape), 0.5)


class ReturnsMessages(Grey):
    def reconstruct(self, view: AttackerView, budget: Budget, seed: int) -> Tensor:
        return view.smashed


class ReturnsBytes(Grey):
    def reconstruct(self, view: AttackerView, budget: Budget, seed: int) -> Tensor:
        return super().reconstruct(view, budget, seed).mul(255).byte()


class ReturnsNothing(Grey):
    def reconstruct(self, view: AttackerView, budget: Budget, seed: int) -> Tensor:
        return None  # type: ignore[return-value]


class LeavesTheRange(Grey):
    def reconstruct(self, view: AttackerView, budget: Budget, seed: int) -> Tensor:
        return 3 * super().reconstruct(view, budget, seed)


class Diverges(Grey):
    def reconstruct(self, view: AttackerView, budget: Budget, seed: int) -> Tensor:
        return super().reconstruct(view, budget, seed).log().log()


class DrawsElsewhere(Grey):
    def reconstruct(self, view: AttackerView, budget: Budget, seed: int) -> Tensor:
        rng = torch.Generator()
        rng.seed()
        return torch.rand((len(view.smashed), *view.image_shape), generator=rng)


class FindsTheVictims(Grey):
    def reconstruct(self, view: AttackerView, budget: Budget, seed: int) -> Tensor:
        shape = (len(view.smashed), *view.image_shape)
        found = [thing for thing in gc.get_objects() if type(thing) is Tensor and thing.shape == shape]
        return found[0].clone().nan_to_num(0.0) if found else super().reconstruct(view, budget, seed)


class HidesANeed(Grey):
    def reconstruct(self, view: AttackerView, budget: Budget, seed: int) -> Tensor:
        return view.auxiliary.images.mean(0).expand(len(view.smashed), *view.image_shape)


class HidesANeedInOptional(HidesANeed):
    optional = frozenset({Capability.AUXILIARY_DATA})


class NeedsTooMuch(Grey):
    needs = frozenset({Capability.QUERY})


class IgnoresTheClock(Grey):
    def reconstruct(self, view: AttackerView, budget: Budget, seed: int) -> Tensor:
        free = super().reconstruct(view, budget, seed).requires_grad_(True)
        optimiser = torch.optim.SGD([free], lr=0.1)
        for _ in range(3):
            free.square().sum().backward()
            optimiser.step()
        return free.detach().clamp(0, 1)


class LooksAtTheClockOnce(IgnoresTheClock):
    def reconstruct(self, view: AttackerView, budget: Budget, seed: int) -> Tensor:
        if budget.exhausted:
            return Grey.reconstruct(self, view, budget, seed)
        return super().reconstruct(view, budget, seed)


class LooksAtTheMean(Grey):
    blind = True

    def reconstruct(self, view: AttackerView, budget: Budget, seed: int) -> Tensor:
        return super().reconstruct(view, budget, seed) * float(view.smashed.mean().sigmoid())


class HasNoAnswerWithoutSteps(Grey):
    def reconstruct(self, view: AttackerView, budget: Budget, seed: int) -> Tensor:
        for _ in budget.iterate(5):
            images = super().reconstruct(view, budget, seed)
        return images


class TrainsTheClient(Grey):
    needs = frozenset({Capability.CLIENT_WEIGHTS})

    def reconstruct(self, view: AttackerView, budget: Budget, seed: int) -> Tensor:
        for weight in view.client.parameters():
            weight.data.mul_(0.5)
        return super().reconstruct(view, budget, seed)


class ChangesMessages(Grey):
    def reconstruct(self, view: AttackerView, budget: Budget, seed: int) -> Tensor:
        view.smashed.mul_(0.5)
        return super().reconstruct(view, budget, seed)


class LooksThough(Grey):
    blind = True

    def reconstruct(self, view: AttackerView, budget: Budget, seed: int) -> Tensor:
        return view.smashed.mean((1, 2, 3)).sigmoid().view(-1, 1, 1, 1).expand(-1, *view.image_shape)


class Listener:
    def __init__(self) -> None:
        self.heard = torch.zeros(())

    def received(self, message: Message) -> None:
        self.heard += 1

    def returned(self, message: Message, gradient: Tensor) -> Tensor:
        return gradient

    def state(self) -> State:
        return {"heard": self.heard}

    def load_state(self, state: State) -> None:
        pass


class Forgets(Grey):
    needs = frozenset({Capability.TRAINING_STREAM})

    def attend(self, stream: StreamView, seed: int) -> ServerHooks | None:
        return Listener()

    def reconstruct(self, view: AttackerView, budget: Budget, seed: int) -> Tensor:
        assert view.listener is not None
        return super().reconstruct(view, budget, seed)


class SavesNothing(Forgets):
    def attend(self, stream: StreamView, seed: int) -> ServerHooks | None:
        class Silent(Listener):
            def state(self) -> dict[str, Tensor]:
                return {}

            def load_state(self, state: dict[str, Tensor]) -> None:
                pass

        return Silent()

    def reconstruct(self, view: AttackerView, budget: Budget, seed: int) -> Tensor:
        assert isinstance(view.listener, Listener)
        return super().reconstruct(view, budget, seed) * float(view.listener.heard) / 10


class StealsTheGradient(Forgets):
    def attend(self, stream: StreamView, seed: int) -> ServerHooks | None:
        class Steals(Listener):
            def returned(self, message: Message, gradient: Tensor) -> Tensor:
                return gradient[0]

        return Steals()


def test_a_small_attack_keeps_the_contract() -> None:
    for check in CHECKS:
        check(Grey)


@pytest.mark.parametrize(
    ("broken", "message"),
    [
        (ReturnsMessages, r"reconstruct returns shape \(6, 8, 8, 8\) for victims of shape \(6, 3, 16, 16\)"),
        (ReturnsBytes, "returns torch.uint8, not floats"),
        (ReturnsNothing, "returns a NoneType, not a tensor"),
        (LeavesTheRange, "returns values from 1.5 to 1.5"),
        (Diverges, "returns NaN or infinity"),
        (DrawsElsewhere, "draw from `seed`"),
        (FindsTheVictims, "look at nothing but `view`"),
        (HidesANeed, "breaks the contract of an attack: this attack reached for auxiliary_data"),
        (HidesANeedInOptional, "with nothing but its `needs` it does not work"),
        (NeedsTooMuch, "works without query"),
        (IgnoresTheClock, "with no time left it takes 3 optimiser steps"),
        (LooksAtTheClockOnce, "it takes 3 optimiser steps with a budget of one step, and 3 with 12"),
        (LooksAtTheMean, "blind = True"),
        (TrainsTheClient, "changes the weights of view.client"),
        (ChangesMessages, "changes view.smashed"),
        (LooksThough, "blind = True"),
        (Forgets, "load_state of its listener"),
        (SavesNothing, "state must hold all that it learned"),
        (StealsTheGradient, "returns no gradient of shape"),
    ],
)
def test_broken_promises_are_found(broken: type[Attack], message: str) -> None:
    with pytest.raises((AssertionError, ConfigurationError), match=message):
        require_attack_contract(broken, "mine.py")


def test_an_attack_that_fails_is_refused_in_one_line() -> None:
    with pytest.raises(ConfigurationError, match=r"mine\.py fails on six small images: UnboundLocalError") as caught:
        require_attack_contract(HasNoAnswerWithoutSteps, "mine.py")
    assert "\n" not in str(caught.value)
