"""What each kind of reliability flag means, and what mends it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

EXPLANATIONS = {
    "attack-failed": (
        "The attack did not finish, so its cell has no number and enters no average. Mend the cause and run it again."
    ),
    "bound-violated": (
        "An attack came closer than the defense says any attacker can. The promise, its proof or its code is "
        "wrong: do not rely on it."
    ),
    "no-undefended-control": (
        "Without the same attack on the undefended model nobody knows whether it is strong enough to find "
        "anything. Add the defense `none` at this cut."
    ),
    "attack-at-floor-on-undefended": (
        "Attacks that find nothing where nothing protects say nothing about a defense. Give them more steps, "
        "more auxiliary images or a larger decoder."
    ),
    "black-box-beats-white-box": (
        "Whoever has the weights could run the black-box attack as well, so a weaker white-box result is a "
        "sign of a badly tuned attack."
    ),
    "more-data-worse": (
        "More auxiliary images should never hurt an attacker; where they do, the attack is not trained to its end."
    ),
    "larger-decoder-worse": (
        "A larger decoder contains the smaller one; where it does worse, it is not trained to its end."
    ),
    "victims-off-distribution": (
        "The victims look different from the private images that they stand for, so the number is about other"
        " images than those to be protected."
    ),
    "randomised-evaluated-once": (
        "A randomised defense was attacked with one message per victim. Who waits sees several and averages: "
        "raise threat.messages_per_victim."
    ),
    "not-adaptive": ("The attacker did not know the defense. Real ones do, so these numbers are optimistic."),
    "out-of-time": ("The attack stopped at its limit; with more time it may reconstruct more."),
    "few-seeds": ("Trainings differ from seed to seed, and fewer than three do not show by how much."),
    "clients-told-apart": (
        "The server lowers its loss by recognising which client sent something. Average the momentum models "
        "(training.average_momentum_models), or synchronise more often; until then, accuracy and leak are those of a "
        "system that learned the short cut."
    ),
    "loss-fell-without-learning": (
        "A loss that falls while validation kNN stands still is lowered by something else than images. Its accuracy "
        "and its leak say little about a system that has learned."
    ),
    "no-labels": (
        "All images are of one class, so every classifier is right always and no accuracy says anything. Leakage is "
        "measured all the same. Give images of several classes in a folder per class."
    ),
}


@dataclass(frozen=True)
class ExplainedFlag:
    """All flags of one kind: what the kind means, and a sentence for each."""

    name: str
    meaning: str
    sentences: list[str]


def explained_flags(flags: Sequence[Mapping[str, str]]) -> list[ExplainedFlag]:
    """Flags as run.json has them, by kind, in their order."""
    kinds: dict[str, list[str]] = {}
    for flag in flags:
        kinds.setdefault(flag["name"], []).append(flag["sentence"])
    return [ExplainedFlag(name, EXPLANATIONS.get(name, ""), sentences) for name, sentences in kinds.items()]
