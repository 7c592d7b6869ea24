"""Attacks that attend a training: it does not notice the passive ones, and does what the active ones say."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from mocosfl_priv import Attack, AttackerView, Budget, Capability, Message, StreamView
from mocosfl_priv.config import PluginSpec
from mocosfl_priv.errors import ConfigurationError, RunFailedError, ThreatModelError
from mocosfl_priv.experiment.attack import protect_afresh
from mocosfl_priv.experiment.observers import MaliciousServer, Observer, ObserverGroup, attach, live_server, trainings
from mocosfl_priv.experiment.plan import plan
from mocosfl_priv.plugins import DEFENSES, Loaded, ThreatModel
from mocosfl_priv.plugins.defense_checks import small_context
from mocosfl_priv.runtime.compute import Compute
from tests.training.test_mocosfl import model, state, train

C = Capability


class Meddler:
    """Counts, spoils what it is given, draws from torch's generator, and turns gradients round."""

    def __init__(self) -> None:
        self.steps: list[int] = []
        self.drawn: list[float] = []
        self.last_step = torch.tensor(-1)

    def received(self, message: Message) -> None:
        assert message.queries.shape == message.keys.shape and len(message.client_ids) == len(message.queries)
        assert message.labels is None and message.steps == 6 and message.client_ids.max() < 3
        self.steps.append(message.step)
        self.drawn.append(float(torch.rand(())))
        self.last_step = torch.tensor(message.step)
        message.queries.zero_()
        message.keys.zero_()

    def returned(self, message: Message, gradient: Tensor) -> Tensor:
        return gradient.neg_()

    def state(self) -> dict[str, Tensor]:
        return {"last_step": self.last_step}

    def load_state(self, state: dict[str, Tensor]) -> None:
        self.last_step = state["last_step"]


class Listening(Attack):
    """Attends with what it is told to bring."""

    needs = frozenset({C.TRAINING_STREAM})

    def __init__(self, listener: Any = None) -> None:
        self.listener = listener

    def attend(self, stream: StreamView, seed: int) -> Any:
        return self.listener(stream) if callable(self.listener) else self.listener

    def reconstruct(self, view: AttackerView, budget: Budget, seed: int) -> Tensor:
        return torch.zeros(len(view.smashed), *view.image_shape)


class Hijacking(Listening):
    """The same, with the gradients in its hands."""

    needs = frozenset({C.GRADIENT_CHANNEL})


def observer_of(listener: Any, seed: int = 0, limit: float | None = None) -> Observer:
    return Observer("meddler", listener, seed, limit, torch.device("cpu"))


def loaded(attack: Attack, label: str) -> Loaded[Attack]:
    return Loaded(label, attack, "here", "0")


def test_a_passive_listener_changes_nothing_and_hears_everything(compute: Compute) -> None:
    plain, heard, meddler = model(), model(), Meddler()
    alone = train(plain, compute)
    attended = train(heard, compute, server_hooks=ObserverGroup([observer_of(meddler)]))
    assert meddler.steps == [0, 1, 2, 3, 4, 5]
    assert alone.history == attended.history
    assert all(torch.equal(a, b) for a, b in zip(state(plain), state(heard), strict=True))
    again = Meddler()
    train(model(), compute, server_hooks=ObserverGroup([observer_of(again)]))
    assert again.drawn == meddler.drawn and len(set(again.drawn)) == 6


@pytest.mark.parametrize("name", ["adversarial_noise", "shredder"])
def test_who_asks_the_defense_does_not_change_what_it_remembers_of_training(name: str, compute: Compute) -> None:
    class Curious(Meddler):
        def received(self, message: Message) -> None:
            mine = torch.rand(3, *message.queries.shape[1:], requires_grad=True)
            protect_afresh(defense, mine).sum().backward()
            super().received(message)

    trained = []
    for observers in (None, ObserverGroup([observer_of(Curious())])):
        defense, network = DEFENSES.create(PluginSpec(name=name)).plugin, model()
        defense.prepare(replace(small_context(defense, compute), build_model=model, training_steps=6))
        train(network, compute, hooks=defense, server_hooks=observers)
        assert observers is None or not observers.of("meddler").failure  # type: ignore[union-attr]
        trained.append([*state(network), *defense.state().values()])
    assert len(trained[0]) > len(state(model()))
    assert all(torch.equal(alone, attended) for alone, attended in zip(*trained, strict=True))


def test_a_hijacker_chooses_what_the_clients_learn(compute: Compute) -> None:
    plain, hijacked = model(), model()
    before = [p.detach().clone() for p in plain.client.parameters()]
    one_step: dict[str, Any] = {
        "steps": 1,
        "clients": 1,
        "sync_period": 1,
        "epochs": 1,
        "momentum": 0,
        "weight_decay": 0,
    }

    class Turning(Meddler):
        def received(self, message: Message) -> None:
            pass

    train(plain, compute, **one_step)
    train(hijacked, compute, **one_step, server_hooks=MaliciousServer([observer_of(Turning())]))
    for start, honest, turned in zip(before, plain.client.parameters(), hijacked.client.parameters(), strict=True):
        torch.testing.assert_close(turned - start, start - honest)
    for honest, turned in zip(plain.trunk.parameters(), hijacked.trunk.parameters(), strict=True):
        assert torch.equal(honest, turned)  # the server itself learned what it would have


@pytest.mark.parametrize(("wrong", "what"), [(lambda g: g[:1], r"\(1, 4, 16, 16\)"), (lambda g: None, "NoneType")])
def test_a_gradient_that_does_not_fit_is_named(compute: Compute, wrong: Any, what: str) -> None:
    class Wrong(Meddler):
        def returned(self, message: Message, gradient: Tensor) -> Tensor:
            return wrong(gradient)

    observer = observer_of(Wrong())
    train(
        model(), compute, server_hooks=MaliciousServer([observer])
    )  # the clients' training goes on with the honest gradient
    assert re.fullmatch(rf"it returned {what} for a gradient of \(.*\)", observer.failure)
    assert observer.messages == 1


def test_a_listener_that_fails_is_named(compute: Compute) -> None:
    class Failing(Meddler):
        def received(self, message: Message) -> None:
            raise KeyError("oops")

    observer = observer_of(Failing())
    train(model(), compute, server_hooks=ObserverGroup([observer]))
    assert observer.failure.startswith("while it observed training: KeyError")


def test_who_is_out_of_time_hears_no_more(compute: Compute) -> None:
    meddler = Meddler()
    observer = observer_of(meddler, limit=1e-9)
    train(model(), compute, server_hooks=ObserverGroup([observer]))
    assert meddler.steps == [0] and observer.messages == 1 and observer.seconds > 0


def test_listeners_come_back_to_the_moment_of_the_chosen_checkpoint(compute: Compute) -> None:
    scores = iter([1.0, 2.0, 0.5])
    meddler = Meddler()
    observer = observer_of(meddler)
    outcome = train(
        model(), compute, epochs=3, validate=lambda _: next(scores), server_hooks=ObserverGroup([observer])
    )  # fmt: skip
    assert outcome.selected_step == 4 and int(meddler.last_step) == 3
    assert observer.messages == 6  # what was spent stays spent


def test_active_attacks_get_a_training_of_their_own() -> None:
    attacks = [loaded(Listening(), "l"), loaded(Hijacking(), "h"), loaded(Hijacking(), "i")]
    honest, first, second = trainings(attacks, ThreatModel.of(["gradient_channel"]))
    assert honest.observing == honest.attacks == (attacks[0],) and honest.hijacker is None
    assert first.observing == first.attacks == (attacks[1],) and first.hijacker is attacks[1]
    assert second.hijacker is attacks[2]


def test_the_live_server_gives_gradients_to_smashed_data_only(compute: Compute) -> None:
    split = model()
    serve = live_server(split.trunk, split.projector, compute)
    smashed = torch.randn(2, *split.smashed_shape, requires_grad=True)
    before = serve(smashed)
    torch.testing.assert_close(before, split.projector(split.trunk(smashed)))
    before.square().sum().backward()
    assert smashed.grad is not None
    assert all(p.grad is None for part in (split.trunk, split.projector) for p in part.parameters())
    with torch.no_grad():
        next(split.trunk.parameters()).mul_(2)
    assert not torch.equal(serve(smashed), before)


def test_no_interest_is_no_listener_and_reaching_too_far_is_refused(compute: Compute) -> None:
    stream = StreamView(smashed_shape=(1,), image_shape=(3, 8, 8), compute=compute, visible=frozenset())
    assert attach(loaded(Listening(), "x"), stream, 0, None) is None
    with pytest.raises(ThreatModelError, match="reached for auxiliary_data"):
        attach(loaded(Listening(lambda s: s.auxiliary), "x"), stream, 0, None)
    with pytest.raises(RunFailedError, match="attack 'x' failed before training: ZeroDivisionError"):
        attach(loaded(Listening(lambda s: 1 / 0), "x"), stream, 0, None)


def test_a_leakage_curve_has_no_place_for_them(tiny: dict[str, Any]) -> None:
    from mocosfl_priv import Experiment

    stream = {
        **tiny,
        "attacks": ["floor", "sdar"],
        "threat": {"grants": ["training_stream", "auxiliary_data", "architecture"]},
    }
    plan(Experiment.from_dict(stream).config)
    with pytest.raises(ConfigurationError, match="leakage: attack 'sdar' observes a whole training"):
        plan(Experiment.from_dict({**stream, "leakage": {"every": 1}}).config)
    plan(Experiment.from_dict({**stream, "leakage": {"every": 1, "attacks": ["floor"]}}).config)
