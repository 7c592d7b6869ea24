"""Attacks that observe a training: which ones do, which training each observes, and how they are kept apart from it.

An observer works with copies, under a seed of its own, on its own time. A training with observers equals, bit for bit,
the training without.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor, nn
from torch.func import functional_call

from mocosfl_priv.errors import MocosflPrivError, RunFailedError, ThreatModelError
from mocosfl_priv.experiment.conditions import visible_to
from mocosfl_priv.models.convolution import in_fast_layout
from mocosfl_priv.plugins import Attack, Capability, Loaded, StreamView, ThreatModel
from mocosfl_priv.runtime.compute import Compute
from mocosfl_priv.runtime.imports import cause
from mocosfl_priv.runtime.seeding import derive_seed, global_seed
from mocosfl_priv.training.hooks import Message, ServerHooks
from mocosfl_priv.training.state import State, under, within


@dataclass(frozen=True)
class Training:
    """One training of a system: the attacks that observe it, and those that then try the model it leads to.

    hijacker: the attack that chooses the gradients; None for the honest training.
    """

    observing: tuple[Loaded[Attack], ...]
    attacks: tuple[Loaded[Attack], ...]
    hijacker: Loaded[Attack] | None = None


def trainings(attacks: Sequence[Loaded[Attack]], threat: ThreatModel) -> tuple[Training, ...]:
    """The honest training, which all passive attacks share, and one for every attack that changes it."""
    active = [a for a in attacks if Capability.GRADIENT_CHANNEL in visible_to(a, threat)]
    passive = [a for a in attacks if a not in active]
    listening = [a for a in passive if Capability.TRAINING_STREAM in visible_to(a, threat)]
    return (Training(tuple(listening), tuple(passive)), *(Training((a,), (a,), a) for a in active))


class Observer:
    """One attack's listener, the seed it draws from, and what it has spent.

    limit: seconds after which it gets no more messages; None for no limit. failure: the cause, in one line. After a
    failure it gets no more messages, and the training goes on.
    """

    def __init__(self, label: str, listener: ServerHooks, seed: int, limit: float | None, device: torch.device) -> None:
        self.label = label
        self.listener = listener
        self.seconds = 0.0
        self.messages = 0
        self.failure = ""
        self._seed = seed
        self._limit = limit
        self._device = device

    def received(self, message: Message) -> None:
        """Hand over a copy of `message`."""
        if not self._stopped:
            self.messages += 1
            self._call("received", _copied(message))

    def returned(self, message: Message, gradient: Tensor) -> Tensor:
        """The gradient that the listener wants the clients to get."""
        if self._stopped:
            return gradient
        chosen = self._call("returned", _copied(message), gradient.clone())
        if self.failure:
            return gradient
        if not isinstance(chosen, Tensor) or chosen.shape != gradient.shape:
            shape = tuple(chosen.shape) if isinstance(chosen, Tensor) else type(chosen).__name__
            self.failure = f"it returned {shape} for a gradient of {tuple(gradient.shape)}"
            return gradient
        return chosen.detach().to(gradient)

    @property
    def _stopped(self) -> bool:
        return bool(self.failure) or (self._limit is not None and self.seconds >= self._limit)

    def _call(self, place: str, *arguments: object) -> object:
        started = self._now()
        try:
            # a seed per message, so that nothing of the generator needs to be kept for a resumed training
            with global_seed(self._seed, place, self.messages), torch.enable_grad():
                return getattr(self.listener, place)(*arguments)
        except ThreatModelError:
            raise
        except Exception as error:  # a user's attack can fail in any way
            self.failure = f"while it observed training: {cause(error)}"
            return None
        finally:
            self.seconds += self._now() - started

    def _now(self) -> float:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        return time.monotonic()

    def state(self) -> State:
        """The listener's state, and what was spent."""
        return {
            **under("listener", self.listener.state()),
            "seconds": torch.tensor(self.seconds, dtype=torch.float64),
            "messages": torch.tensor(self.messages),
        }

    def load_state(self, state: State) -> None:
        """Restore a saved state. What was spent stays spent, also when an earlier state is restored."""
        self.listener.load_state(within(state, "listener"))
        self.seconds = max(self.seconds, float(state["seconds"]))
        self.messages = max(self.messages, int(state["messages"]))


class ObserverGroup:
    """All observers of one training, none of which changes it; implements `ServerHooks`."""

    def __init__(self, observers: Iterable[Observer]) -> None:
        self._observers = {observer.label: observer for observer in observers}

    def of(self, label: str) -> Observer | None:
        """The observer of the attack `label`; None if it has none."""
        return self._observers.get(label)

    @property
    def seconds(self) -> float:
        """Seconds that all of them took of the training's time."""
        return sum(observer.seconds for observer in self._observers.values())

    def received(self, message: Message) -> None:
        """Give a copy to every observer."""
        for observer in self._observers.values():
            observer.received(message)

    def returned(self, message: Message, gradient: Tensor) -> Tensor:  # noqa: ARG002 - observers only listen
        """The gradient, unchanged."""
        return gradient

    def state(self) -> State:
        """The states of all observers, by their order."""
        return {
            key: value
            for place, observer in enumerate(self._observers.values())
            for key, value in under(str(place), observer.state()).items()
        }

    def load_state(self, state: State) -> None:
        """Restore a saved state."""
        for place, observer in enumerate(self._observers.values()):
            observer.load_state(within(state, str(place)))


class MaliciousServer(ObserverGroup):
    """A server whose gradients its observer chooses."""

    def returned(self, message: Message, gradient: Tensor) -> Tensor:
        """What the hijacker makes of the gradient."""
        for observer in self._observers.values():
            gradient = observer.returned(message, gradient)
        return gradient


def attach(attack: Loaded[Attack], stream: StreamView, seed: int, limit: float | None) -> Observer | None:
    """Ask `attack` for its listener; None if it is not interested.

    Raises RunFailedError when it fails, ThreatModelError when it reaches for more than it was granted.
    """
    try:
        with global_seed(seed, "attend"):
            listener = attack.plugin.attend(stream, seed)
    except MocosflPrivError:
        raise
    except Exception as error:  # a user's attack can fail in any way
        raise RunFailedError(
            f"attack {attack.label!r} failed before training: {type(error).__name__}: {error}"
        ) from error
    if listener is None:
        return None
    return Observer(attack.label, listener, derive_seed(seed, "attending"), limit, stream.compute.device)


def live_server(trunk: nn.Module, projector: nn.Module, compute: Compute) -> partial[Tensor]:
    """A function from smashed data to what `trunk` and `projector`, as they then are, make of it; see `StreamView`."""
    return partial(_embed, nn.Sequential(trunk, projector), compute)


def _embed(network: nn.Module, compute: Compute, smashed: Tensor) -> Tensor:
    fixed = {name: parameter.detach() for name, parameter in network.named_parameters()}
    with compute.autocast():
        embedded: Tensor = functional_call(network, fixed, (in_fast_layout(smashed, network),))
    return embedded.to(smashed.dtype)


def _copied(message: Message) -> Message:
    labels = None if message.labels is None else message.labels.clone()
    return replace(
        message,
        client_ids=message.client_ids.clone(),
        queries=message.queries.detach().clone(),
        keys=message.keys.detach().clone(),
        labels=labels,
    )
