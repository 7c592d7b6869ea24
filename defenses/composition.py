"""Several defenses at once."""

from __future__ import annotations

from dataclasses import replace
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor

from mocosfl_priv import ConfigurationError, DefenderContext, Defense, Detection, Guarantee, ModelConfig, PreparedModel
from mocosfl_priv.config import PluginEntry
from mocosfl_priv.plugins import DEFENSES, Loaded
from mocosfl_priv.training.state import under, within

ON_LEARNING = ("client_loss", "disguise", "filter_gradient")  # hooks without effect on clients that do not learn


class Composition(Defense):
    """Its parts, in their order: a message passes the first one first, and its gradient the last one.

    In a configuration a list of defenses stands for it: ``defenses: [none, [bottleneck, nopeek, gaussian]]``,
    on the command line ``--defense bottleneck+nopeek+gaussian``.
    Refused are parts that get into each other's way: two that change the model, or one that works on what clients
    learn beside one that freezes them.

    parts: two or more defenses, by name or with parameters.
    """

    def __init__(self, parts: Annotated[tuple[PluginEntry, ...], Field(min_length=2)]) -> None:
        self._parts = tuple(DEFENSES.create(part) for part in parts)
        _check(self._parts)
        self._defenses = [part.plugin for part in self._parts]
        self.recipe = " + ".join(_described(part) for part in self._parts)
        self.randomised = any(defense.randomised for defense in self._defenses)
        self.detects = any(defense.detects for defense in self._defenses)
        self.uses_target_data = any(defense.uses_target_data for defense in self._defenses)

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

    def planned_steps(self, context: DefenderContext) -> int:
        return sum(defense.planned_steps(context) for defense in self._defenses)

    def prepare(self, context: DefenderContext) -> PreparedModel | None:
        prepared: dict[str, PreparedModel] = {}
        for part in self._parts:
            kept = context.checkpoints.below(part.label) if context.checkpoints else None
            if (model := part.plugin.prepare(replace(context, checkpoints=kept))) is not None:
                prepared[part.label] = model
        if len(prepared) > 1:
            raise ConfigurationError(f"{' and '.join(prepared)} both bring a model to start from")
        return next(iter(prepared.values()), None)

    def client_loss(self, images: Tensor, smashed: Tensor) -> Tensor | None:
        losses = [loss for d in self._defenses if (loss := d.client_loss(images, smashed)) is not None]
        return torch.stack(losses).sum() if losses else None

    def protect(self, smashed: Tensor, rng: torch.Generator) -> Tensor:
        for defense in self._defenses:
            smashed = defense.protect(smashed, rng)
        return smashed

    def disguise(self, keys: Tensor, owners: Tensor, step: int, rng: torch.Generator) -> Tensor:
        for defense in self._defenses:
            keys = defense.disguise(keys, owners, step, rng)
        return keys

    def filter_gradient(self, gradient: Tensor, rng: torch.Generator) -> Tensor:
        for defense in reversed(self._defenses):
            gradient = defense.filter_gradient(gradient, rng)
        return gradient

    def guarantee(self, messages: int) -> Guarantee | None:
        """The strongest of its parts': what comes before it or after it looks at the same message only."""
        promised = [found for defense in self._defenses if (found := defense.guarantee(messages)) is not None]
        return min(promised, key=lambda found: found.epsilon, default=None)

    def detection(self) -> Detection | None:
        return next((found for defense in self._defenses if (found := defense.detection()) is not None), None)

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
        if not any(_overrides(part, hook) for hook in vars(Defense) if not hook.startswith("_")):
            raise ConfigurationError(f"{part.label} does nothing, beside others too")
    origins = [part.origin for part in parts]
    for part in parts:
        if origins.count(part.origin) > 1:
            raise ConfigurationError(f"{part.label} stands twice")
    detectors = [part.label for part in parts if part.plugin.detects]
    if len(detectors) > 1:
        raise ConfigurationError(
            f"{' and '.join(detectors)} would judge each other's false messages: one detector is enough"
        )
    shapers = [part.label for part in parts if _overrides(part, "architecture")]
    if len(shapers) > 1:
        raise ConfigurationError(f"{' and '.join(shapers)} both change the model, each to a bottleneck of its own")
    for frozen in parts:
        idle = [part.label for part in parts if part is not frozen and any(_overrides(part, h) for h in ON_LEARNING)]
        if frozen.plugin.freezes_clients and idle:
            raise ConfigurationError(
                f"{frozen.label} freezes the clients, and {idle[0]} works on what they learn: it would do nothing"
            )


def _overrides(part: Loaded[Defense], hook: str) -> bool:
    return getattr(type(part.plugin), hook) is not getattr(Defense, hook)
