"""What every defense promises. Defenses are taken from the registry: a new file in defenses/ is tested by itself."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import Tensor

from mocosfl_priv.config import PluginSpec
from mocosfl_priv.errors import ConfigurationError
from mocosfl_priv.plugins import DEFENSES, DefenderContext, Defense, PreparedModel, summary
from mocosfl_priv.plugins.defense_checks import CHECKS, Make, require_protection

SMALL = {"epochs": 1, "batch_size": 8, "decoder": "res_normN0C8", "parts": ["bottleneck", "nopeek", "gaussian"]}
NAMES = sorted(DEFENSES.origins())


def create(name: str) -> Defense:
    accepted = inspect.signature(DEFENSES.load(name)).parameters
    return DEFENSES.create(PluginSpec(name=name, **{k: v for k, v in SMALL.items() if k in accepted})).plugin


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
@pytest.mark.parametrize("name", NAMES)
def test_it_keeps_the_contract(name: str, check: Callable[[Make], None]) -> None:
    check(partial(create, name))


@pytest.mark.parametrize("name", NAMES)
def test_it_is_documented(name: str) -> None:
    assert summary(DEFENSES.load(name)).endswith(".")


class Mixing(Defense):
    def protect(self, smashed: Tensor, rng: torch.Generator, kind: object = None) -> Tensor:
        return smashed - smashed.mean(0)


class MixingNoise(Defense):
    randomised = True

    def protect(self, smashed: Tensor, rng: torch.Generator, kind: object = None) -> Tensor:
        return smashed + smashed.std() * torch.randn(smashed.shape, generator=rng)


class LooksAtTheBatchSize(Defense):
    def protect(self, smashed: Tensor, rng: torch.Generator, kind: object = None) -> Tensor:
        return smashed / len(smashed)


class Detached(Defense):
    def protect(self, smashed: Tensor, rng: torch.Generator, kind: object = None) -> Tensor:
        return smashed.detach()


class InPlace(Defense):
    def protect(self, smashed: Tensor, rng: torch.Generator, kind: object = None) -> Tensor:
        smashed.data.mul_(0.5)
        return smashed


class Shrinking(Defense):
    def protect(self, smashed: Tensor, rng: torch.Generator, kind: object = None) -> Tensor:
        return smashed[:, :1]


class RootOfZero(Defense):
    def protect(self, smashed: Tensor, rng: torch.Generator, kind: object = None) -> Tensor:
        return smashed + (smashed - smashed).abs().sqrt()


class HidesItsNoise(Defense):
    def protect(self, smashed: Tensor, rng: torch.Generator, kind: object = None) -> Tensor:
        return smashed + torch.randn(smashed.shape, generator=rng)


class ClaimsNoise(Defense):
    randomised = True


class DrawsElsewhere(Defense):
    randomised = True

    def protect(self, smashed: Tensor, rng: torch.Generator, kind: object = None) -> Tensor:
        return smashed + torch.randn(smashed.shape)


class PicksGradients(Defense):
    def filter_gradient(self, gradient: Tensor, rng: torch.Generator) -> Tensor:
        return gradient[0]


class RemembersKeys(Defense):
    def protect(self, smashed: Tensor, rng: torch.Generator, kind: object = None) -> Tensor:
        self.sent = smashed.detach()
        return smashed

    def filter_gradient(self, gradient: Tensor, rng: torch.Generator) -> Tensor:
        return gradient * self.sent.mean()


class CountsMessages(Defense):
    def __init__(self) -> None:
        self.sent = torch.zeros(())

    def protect(self, smashed: Tensor, rng: torch.Generator, kind: object = None) -> Tensor:
        self.sent += len(smashed)
        return smashed

    def state(self) -> dict[str, Tensor]:
        return {"sent": self.sent}


class Forgets(Defense):
    def __init__(self) -> None:
        self.seen = torch.zeros(())

    def client_loss(self, images: Tensor, smashed: Tensor) -> Tensor | None:
        self.seen += 1
        return None

    def state(self) -> dict[str, Tensor]:
        return {"seen": self.seen}


class StartsAnywhere(Defense):
    def prepare(self, context: DefenderContext) -> PreparedModel:
        model = context.build_model()
        for weight in model.client.parameters():
            torch.nn.init.normal_(weight)
        return PreparedModel(model)


@pytest.mark.parametrize(
    ("broken", "message"),
    [
        (Mixing, "mixes the images"),
        (MixingNoise, "mixes the images"),
        (LooksAtTheBatchSize, "an image alone unlike one in a batch"),
        (Detached, "no gradient passes"),
        (InPlace, "changes the smashed data"),
        (Shrinking, r"protect makes \(5, 1, 32, 32\) torch.float32 of smashed data \(5, 8, 32, 32\)"),
        (RootOfZero, "gradient through protect is not finite"),
        (HidesItsNoise, "does not say randomised = True"),
        (ClaimsNoise, "sends the same whatever"),
        (DrawsElsewhere, "draws from elsewhere"),
        (PicksGradients, "filter_gradient makes"),
        (RemembersKeys, "remembers something of a key"),
        (CountsMessages, "protect changes the state"),
        (Forgets, "load_state does not bring back"),
        (StartsAnywhere, "prepare makes another client every time"),
    ],
)
def test_broken_promises_are_found(broken: type[Defense], message: str) -> None:
    with pytest.raises(AssertionError, match=message):
        for check in CHECKS:  # the first that finds fault
            check(broken)


def test_a_defense_that_breaks_its_promises_is_refused_in_one_line() -> None:
    with pytest.raises(ConfigurationError, match=r"mine\.py breaks the contract of a defense: protect mixes"):
        require_protection(Mixing, "mine.py")

    class Raises(Defense):
        def protect(self, smashed: Tensor, rng: torch.Generator, kind: object = None) -> Tensor:
            return smashed @ torch.zeros(3)

    with pytest.raises(ConfigurationError, match=r"mine\.py fails on a small batch: RuntimeError") as caught:
        require_protection(Raises, "mine.py")
    assert "\n" not in str(caught.value)
