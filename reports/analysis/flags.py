"""What each kind of reliability flag means, and how to fix its cause."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

EXPLANATIONS = {
    "attack-failed": (
        "The attack did not finish, so its cell has no number and enters no average. Fix the cause and run it again."
    ),
    "bound-violated": (
        "An attack reached a lower MSE than the defense guarantees for any attacker. The guarantee, its proof or its "
        "code is wrong: do not rely on it."
    ),
    "no-undefended-control": (
        "Without the same attack on an undefended model it is unknown whether the attack is strong enough to "
        "reconstruct anything. Add the defense `none` at this cut."
    ),
    "attack-at-floor-on-undefended": (
        "Attacks that reconstruct nothing from an undefended model cannot show that a defense works. Give them more "
        "steps, more auxiliary images or a larger decoder."
    ),
    "black-box-beats-white-box": (
        "A white-box attacker can run the black-box attack too, so a weaker white-box result is a sign of a badly "
        "tuned attack."
    ),
    "masked-gradients": (
        "A search by gradients through the client fails where an attack that learns from pairs of images and messages "
        "succeeds. The client's gradients are masked, which protects from this kind of attack only; judge the defense "
        "by the others."
    ),
    "more-data-worse": (
        "More auxiliary images should never hurt an attacker; if they do, the attack was not trained long enough."
    ),
    "larger-decoder-worse": (
        "A larger decoder can represent what a smaller one can; if it does worse, it was not trained long enough."
    ),
    "victims-off-distribution": (
        "The victims are distributed differently from the private images that they stand for, so the number may not "
        "hold for the images that must be protected."
    ),
    "randomised-evaluated-once": (
        "A randomised defense was attacked with one message per victim. A patient attacker sees several messages of an "
        "image and averages out the randomness: raise threat.messages_per_victim."
    ),
    "not-adaptive": (
        "The attacker did not know the defense. A real attacker may know it and reconstruct more than shown here."
    ),
    "out-of-time": ("The attack stopped at its time limit; with more time it may reconstruct more."),
    "few-seeds": ("Trainings differ from seed to seed, and fewer than three seeds do not show by how much."),
    "clients-told-apart": (
        "The model lowers its loss by recognising which client an image comes from, instead of what is in it. Average "
        "the momentum models (training.average_momentum_models), or synchronise more often. As it is, accuracy and "
        "leakage are those of a system that learned this shortcut."
    ),
    "loss-fell-without-learning": (
        "The loss fell while validation kNN accuracy did not improve, so the model learned something other than image "
        "content. Its accuracy and leakage say little about a system that learns properly."
    ),
    "no-labels": (
        "All images are of one class, so accuracy has no meaning and is not measured. Leakage is still measured. To "
        "measure accuracy, provide images of several classes in a folder per class."
    ),
}


@dataclass(frozen=True)
class ExplainedFlag:
    """All flags of one kind: its name, what it means, and a sentence for each flag."""

    name: str
    meaning: str
    sentences: list[str]


def explained_flags(flags: Sequence[Mapping[str, str]]) -> list[ExplainedFlag]:
    """Group flags, as run.json stores them, by kind, in order; a kind without explanation gets an empty one."""
    kinds: dict[str, list[str]] = {}
    for flag in flags:
        kinds.setdefault(flag["name"], []).append(flag["sentence"])
    return [ExplainedFlag(name, EXPLANATIONS.get(name, ""), sentences) for name, sentences in kinds.items()]
