"""Several defenses at once."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor

from mocosfl_priv import (
    DEFENSES,
    ConfigurationError,
    DefenderContext,
    Defense,
    Detector,
    Guarantee,
    MessageKind,
    ModelConfig,
    PluginEntry,
    PreparedModel,
)
from mocosfl_priv.plugins import Loaded, overrides, under, within

# hooks without effect on clients that do not learn
ON_LEARNING = ("client_loss", "joint_loss", "replace_keys", "filter_gradient")
AT_MOST_ONE = {
    "architecture": "change the model, each to a bottleneck of its own",
    "guarantee": "promise something, and what follows from both is not known",
    "replace_keys": "send false messages, and would judge each other's",
}


class Composition(Defense):
    """Its parts, in their order: a message passes the first one first, and its gradient the last one.

    In a configuration a list of defenses stands for it: ``defenses: [none, [bottleneck, nopeek, gaussian]]``,
    on the command line ``--defense bottleneck+nopeek+gaussian``.
    Refused are parts that get into each other's way: two that change the model, one that works on what clients learn
    beside one that freezes them, or an order in which one would learn about other messages than its own.

    parts: two or more defenses, by name or with parameters.
    """

    hands_hooks_on = True

    def __init__(self, parts: Annotated[tuple[PluginEntry, ...], Field(min_length=2)]) -> None:
        self._parts = tuple(DEFENSES.create(part) for part in parts)
        _check(self._parts)
        self._defenses = [part.plugin for part in self._parts]
        self.recipe = " + ".join(_described(part) for part in self._parts)
        self.randomised = any(defense.randomised for defense in self._defenses)
        self.uses_target_data = any(defense.uses_target_data for defense in self._defenses)

    def __copy__(self) -> Composition:
        twin = object.__new__(type(self))
        twin.__dict__ = self.__dict__ | {"_defenses": [copy.copy(defense) for defense in self._defenses]}
        return twin

    @property
    def parts(self) -> tuple[Loaded[Defense], ...]:
        return self._parts

    @property
    def freezes_clients(self) -> bool:
        return any(defense.freezes_clients for defense in self._defenses)

    @property
    def simulator(self) -> str | None:
        return next((defense.simulator for defense in self._defenses if defense.simulator), None)

    def architecture(self, model: ModelConfig) -> ModelConfig:
        for defense in self._defenses:
            model = defense.architecture(model)
        return model

    def check(self, context: DefenderContext) -> None:
        for defense in self._defenses:
            defense.check(context)

    def prepare(self, context: DefenderContext) -> PreparedModel | None:
        found = [(part, part.plugin.prepare(context)) for part in self._parts]
        prepared = [(part, model) for part, model in found if model is not None]
        if len(prepared) > 1:
            raise ConfigurationError(f"{_named(part for part, _ in prepared)} both bring a model to start from")
        if not prepared:
            return None
        ((part, model),) = prepared
        if model.frozen_client:
            _refuse_idle(part, self._parts)
        return model

    def restore(self, context: DefenderContext) -> PreparedModel | None:
        restored = [part.plugin.restore(context) for part in self._parts]
        return next((model for model in restored if model is not None), None)

    def client_loss(self, images: Tensor, smashed: Tensor) -> Tensor | None:
        return _sum(defense.client_loss(images, smashed) for defense in self._defenses)

    def joint_loss(self, images: Tensor, smashed: Tensor) -> Tensor | None:
        return _sum(defense.joint_loss(images, smashed) for defense in self._defenses)

    def protect(self, smashed: Tensor, rng: torch.Generator, kind: MessageKind = MessageKind.INFERENCE) -> Tensor:
        for defense in self._defenses:
            smashed = defense.protect(smashed, rng, kind)
        return smashed

    def replace_keys(self, keys: Tensor, client_ids: Tensor, step: int, rng: torch.Generator) -> Tensor:
        for defense in self._defenses:
            if isinstance(defense, Detector):
                keys = defense.replace_keys(keys, client_ids, step, rng)
        return keys

    def filter_gradient(self, gradient: Tensor, rng: torch.Generator) -> Tensor:
        for defense in reversed(self._defenses):
            gradient = defense.filter_gradient(gradient, rng)
        return gradient

    def guarantee(self, messages: int) -> Guarantee | None:
        """That of the part that promises one: what other parts do to its messages looks at nothing else."""
        return next((found for d in self._defenses if (found := d.guarantee(messages)) is not None), None)

    def state(self) -> dict[str, Tensor]:
        return {
            key: value
            for index, defense in enumerate(self._defenses)
            for key, value in under(str(index), defense.state()).items()
        }

    def load_state(self, state: dict[str, Tensor]) -> None:
        for index, defense in enumerate(self._defenses):
            defense.load_state(within(state, str(index)))


def _described(part: Loaded[Defense]) -> str:
    values = ", ".join(f"{name}={value}" for name, value in part.parameters.items())
    return f"{part.label}({values})" if values else part.label


def _check(parts: tuple[Loaded[Defense], ...]) -> None:
    """Raise ConfigurationError with the reason why `parts` cannot work together."""
    for part in parts:
        if part.plugin.parts:
            raise ConfigurationError(f"{part.label} consists of several defenses itself: name its parts instead")
        if not any(overrides(part.plugin, hook) for hook in vars(Defense) if not hook.startswith("_")):
            raise ConfigurationError(f"{part.label} does nothing, beside others too")
    origins = [part.origin for part in parts]
    for part in parts:
        if origins.count(part.origin) > 1:
            raise ConfigurationError(f"{part.label} stands twice")
    for hook, clash in AT_MOST_ONE.items():
        several = [part for part in parts if overrides(part.plugin, hook)]
        if len(several) > 1:
            raise ConfigurationError(f"{_named(several)} both {clash}")
    senders = [part for part in parts if overrides(part.plugin, "protect")]
    for part in senders:
        learns_about_messages = overrides(part.plugin, "client_loss") or overrides(part.plugin, "joint_loss")
        if learns_about_messages and part is not senders[0]:
            raise ConfigurationError(
                f"{part.label} learns about its own messages: it must stand before {senders[0].label}"
            )
        if overrides(part.plugin, "filter_gradient") and part is not senders[-1]:
            raise ConfigurationError(
                f"{part.label} learns from the gradients of its own messages: it must stand after {senders[-1].label}"
            )
    for part in parts[:-1]:
        if isinstance(part.plugin, Detector):
            raise ConfigurationError(f"{part.label} drops gradients that others would learn from: it must stand last")
    for part in parts:
        if part.plugin.freezes_clients:
            _refuse_idle(part, parts)


def _refuse_idle(frozen: Loaded[Defense], parts: tuple[Loaded[Defense], ...]) -> None:
    """Raise ConfigurationError where another part works on what the clients of `frozen` learn."""
    for part in parts:
        if part is not frozen and any(overrides(part.plugin, hook) for hook in ON_LEARNING):
            raise ConfigurationError(
                f"{frozen.label} freezes the clients, and {part.label} works on what they learn: it would do nothing"
            )


def _sum(losses: Iterable[Tensor | None]) -> Tensor | None:
    there = [loss for loss in losses if loss is not None]
    return torch.stack(there).sum() if there else None


def _named(parts: Iterable[Loaded[Defense]]) -> str:
    return " and ".join(part.label for part in parts)
