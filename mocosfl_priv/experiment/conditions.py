"""The conditions under which all attacks of an experiment work, whichever system they attack."""

from __future__ import annotations

from dataclasses import dataclass

from mocosfl_priv.config.schema import ThreatConfig
from mocosfl_priv.plugins import Attack, AuxiliaryData, Budget, Capability, Defense, Loaded, ThreatModel, with_implied
from mocosfl_priv.runtime.compute import Compute
from mocosfl_priv.runtime.progress import Progress

# what an attack can have only while a system trains, or from another participant of that training
ONLY_IN_TRAINING = frozenset({Capability.COLLUDING_CLIENT, Capability.TRAINING_STREAM, Capability.GRADIENT_CHANNEL})


@dataclass(frozen=True)
class AttackConditions:
    """What an attack is granted, for how long, and on which machine.

    threat: the capabilities. auxiliary: the attacker's images.
    messages_per_victim: how often a victim's message is seen where the defense is randomised.
    seconds, steps: limits of one attack; None for no limit.
    """

    threat: ThreatModel
    auxiliary: AuxiliaryData
    compute: Compute
    messages_per_victim: int = 8
    seconds: float | None = None
    steps: int | None = None

    @classmethod
    def of(
        cls, asked: ThreatConfig, threat: ThreatModel, auxiliary: AuxiliaryData, compute: Compute
    ) -> AttackConditions:
        """The conditions of a configuration's section `threat`; `threat` is what of its grants there is to be had."""
        return cls(threat, auxiliary, compute, asked.messages_per_victim, asked.seconds, asked.steps)

    def visible_to(self, attack: Loaded[Attack]) -> frozenset[Capability]:
        """What `attack` declared, as far as it is granted."""
        return visible_to(attack, self.threat)

    def count_messages(self, defense: Defense) -> int:
        """How many messages of one victim an attacker takes: an attacker who knows that they are randomised waits for
        more of them; another takes the first.
        """
        return self.messages_per_victim if defense.randomised and self.threat.adaptive else 1

    def budget(self, progress: Progress | None, spent_seconds: float, spent_steps: int) -> Budget:
        """The budget of one attack that has spent something before, while it observed training."""
        return Budget(
            self.seconds, progress, steps=self.steps, spent_seconds=spent_seconds, spent_steps=spent_steps
        )  # fmt: skip


def visible_to(attack: Loaded[Attack], threat: ThreatModel) -> frozenset[Capability]:
    """What an attack declared, as far as `threat` grants it."""
    return with_implied(attack.plugin.needs | attack.plugin.optional) & threat.grants
