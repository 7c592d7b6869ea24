"""Ensemble: the strongest attack that a threat model and a budget allow, from all others: the headline number."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any

import torch
from pydantic import Field
from torch import Tensor

from mocosfl_priv import (
    ATTACKS,
    Attack,
    AttackerView,
    Budget,
    Capability,
    PluginSpec,
    RunFailedError,
    blind_guess,
    derive_seed,
    global_seed,
    mse,
)
from mocosfl_priv.plugins import Loaded

HELD_OUT_SHARE, MOST_HELD_OUT = 0.15, 64
TRIAL_IMAGES = 32  # held-out images of a trial: attacks that optimise every image by itself pay for each
TRIAL_STEPS = 300  # of the first trial: with fewer, decoders are beaten by attacks that they overtake soon after
FIRST_TRIAL_SHARE = 0.05  # of the budget; where it does not last for that trial, no comparison would say anything
ENCODED_BEFORE = 2_000  # images that a decoder encodes before its first step, about
SCOUTING_SHARE = 0.2  # of the budget: to find out where the rest pays
REFINING_SHARE = 0.08
WINNER_SHARE = 0.85  # of what is left for the finalists
SHORT_WINNER_SHARE = 0.92  # the same of a short budget
NEARLY_INVERTED = 0.1  # of a blind guess's error: a search that gets there in its trial
ASKED_FOR_SHARE = 0.6  # of the decoder in a short budget, where other members were named
INVERTED_SHARE = 0.4  # then gets this part of a short budget, in which it comes to its end
FINALISTS = 2
CLOSE = 1.5  # times the winner's error in a trial, up to which a second finalist may add to the winner
PATIENCE = 1.5  # times its error in a trial, with which a decoder is compared: it has the longest way to go
GROWN_STEPS = 6_000  # from which on a larger network pays
GROWN_COST = 3.5  # of its step, in steps of the smaller one
FOR_AS_LONG_AS_IT_LASTS = 10**6  # steps planned where only the clock ends an attack
REFINEMENTS = (0.1, 0.3, 1.0, 3.0, 10.0)  # how strongly an image is held to where its refinement began
REFINING_ITERATIONS = 20
REFINING_RATE = 0.01


@dataclass(frozen=True)
class Member:
    """One of the attacks an ensemble consists of, with its parameters.

    planned_by: the parameter that takes the number of steps it may plan with, if it has one. grown: what runs instead
    where the budget lasts for `GROWN_STEPS` of its steps; in a trial, a larger network cannot show what it can do.
    """

    attack: str
    parameters: dict[str, Any] = field(default_factory=dict)
    planned_by: str | None = None
    grown: Member | None = None

    @property
    def label(self) -> str:
        """For messages and seeds."""
        return ", ".join([self.attack, *(f"{k}={v}" for k, v in self.parameters.items())])

    def create(self, steps: int) -> Attack:
        """The attack, planning with `steps`."""
        return self.load(steps).plugin

    def load(self, steps: int) -> Loaded[Attack]:
        """The same, with where its code came from."""
        planned = {self.planned_by: steps} if self.planned_by else {}
        return ATTACKS.create(PluginSpec(name=self.attack, **self.parameters, **planned))


def _decoder(architecture: str, grown: Member | None = None, **parameters: Any) -> Member:
    return Member("decoder", {"architecture": architecture, **parameters}, "steps", grown)


LARGE = _decoder("unet_N3C48", learning_rate=1.5e-3)

# In the order of their trials, of which a short budget has the first two only. Where two do equally well, the earlier
# stays.
WITH_KNOWN_ANSWERS = (
    _decoder("unet_N2C32", grown=LARGE),
    Member("rmle"),
    _decoder("edsr_N4C64", grown=LARGE),
    _decoder("unet_N2C32", grown=LARGE, ssim_weight=0.1),
    Member("glass"),
    Member("dip"),
)
# Without queries nothing can be tried on images of one's own: the first that is allowed runs.
WITHOUT_KNOWN_ANSWERS = (Member("shadow"), Member("unsplit"))


@dataclass(frozen=True)
class Trial:
    """How a member did on held-out images: their mean squared error, infinite if it failed, and what it used.

    A member that goes to the finals without a trial has the defaults.
    """

    member: Member
    error: float = math.inf
    steps: int = 0
    seconds: float = 0.0


@dataclass(frozen=True)
class Candidate:
    """Reconstructions of the victims and, after them, of the held-out auxiliary images.

    distance: (n,) per image, how far the message of the reconstruction is from the message that was received, relative
    to the messages' mean square: the attack's own objective.
    """

    images: Tensor
    distance: Tensor


class EnsembleAttack(Attack):
    """Try what the threat model allows, spend the budget where it pays, and take the best of it image by image.

    A part of the auxiliary images is held out. Allowed attacks, with several settings, first try to reconstruct them,
    the decoder for so many steps that it can show something, and the others as long. How many are tried depends on how
    many such trials a fifth of the budget lasts for. Where it lasts for more, the better half is tried again, twice as
    long, until two are left (successive halving, Jamieson and Talwalkar, AISTATS 2016). The winner gets most of the
    rest, or all of it where the second is far behind. A budget that is too short for such trials goes to the decoder
    and to `rmle`, most of it to the decoder unless a short trial of `rmle` nearly inverts the client. Members that the
    user names, and the decoder that a defense was trained against, take the place of `rmle` then.

    Their reconstructions, a blend of them, and with the client's weights a refinement of the best towards the received
    messages are candidates. What each image is taken from is decided by the attack's own objective, the distance of
    messages, whose meaning is learned on the held-out images. The victims' images play no part.

    steps: limit of all steps together where the threat model sets no limit. members: more attacks to try, as entries of
    a configuration.
    """

    optional = frozenset(
        {
            Capability.CLIENT_WEIGHTS,
            Capability.QUERY,
            Capability.ARCHITECTURE,
            Capability.AUXILIARY_DATA,
            Capability.SERVER_MODEL,
        }
    )

    def __init__(self, steps: Annotated[int, Field(ge=1)] = 40_000, members: tuple[dict[str, Any], ...] = ()) -> None:
        self.steps = steps
        self.members = tuple(
            Member(str(entry["name"]), {k: v for k, v in entry.items() if k not in ("name", "label")})
            for entry in members
        )
        for member in self.members:
            member.create(1)  # what cannot be created is refused before anything runs

    @property
    def parts(self) -> list[Loaded[Attack]]:
        """See :class:`Attack`."""
        return [member.load(1) for member in (*WITH_KNOWN_ANSWERS, *WITHOUT_KNOWN_ANSWERS, *self.members)]

    def reconstruct(self, view: AttackerView, budget: Budget, seed: int) -> Tensor:
        limited = budget.part(steps=None if budget.seconds is not None else self.steps)
        known_answers = view.has(Capability.QUERY) and view.has(Capability.AUXILIARY_DATA)
        if not known_answers or len(view.auxiliary) < 2:
            return self._without_known_answers(view, limited, seed)
        rng = torch.Generator().manual_seed(derive_seed(seed, "ensemble"))
        held_out = view.auxiliary.hold_out(HELD_OUT_SHARE, rng, MOST_HELD_OUT)
        truth = view.auxiliary.select(held_out).images
        finalists, winner_share = self._scout(view, held_out, limited, seed)
        rehearsal = view.rehearsal(held_out)
        smashed = rehearsal.smashed
        refines = view.has(Capability.CLIENT_WEIGHTS)
        finals = limited.share(1 - REFINING_SHARE if refines else 1.0)
        candidates = []
        for place, trial in enumerate(finalists):
            last = place == len(finalists) - 1
            part = finals.share(1.0 if last else winner_share)
            images = _run(_grown(trial, part) if place == 0 else trial.member, rehearsal, part, seed)
            if images is not None:
                candidates.append(Candidate(images, _distance(view, images, smashed)))
        if not candidates:  # a finalist may fail where its trial did not, for want of memory for example
            images = self._reserve(finalists, rehearsal, limited, seed)
            candidates.append(Candidate(images, _distance(view, images, smashed)))
        count = len(view.smashed)
        if len(candidates) > 1:
            blended = _blend([c.images for c in candidates], truth)
            candidates.append(Candidate(blended, _distance(view, blended, smashed)))
        if refines:
            best = min(candidates, key=lambda c: float(mse(c.images[count:], truth).mean()))
            refined = _refine(view, best.images, smashed, truth, limited)
            if refined is not None:
                candidates.append(Candidate(refined, _distance(view, refined, smashed)))
        return choose(candidates, truth)

    def _reserve(self, finalists: Sequence[Trial], view: AttackerView, budget: Budget, seed: int) -> Tensor:
        """The first member that succeeds with what is left of the budget, after all finalists failed."""
        members = {trial.member.label: trial.member for trial in finalists}
        members |= {member.label: member for member in self._members(view)[0]}
        if not members:
            return blind_guess(view)
        for member in members.values():
            images = _run(member, view, budget.share(1.0), seed)
            if images is not None:
                return images
        raise RunFailedError("no attack of the ensemble succeeded on these messages")

    def _members(self, view: AttackerView) -> tuple[list[Member], list[Member]]:
        """All that are allowed, in the order of their trials, and those among them that the view or user names."""
        known = (_decoder(view.simulator, ssim_weight=1.0),) if view.simulator else ()
        asked_for = [member for member in (*known, *self.members) if _allowed(member, view)]
        ordered = (*WITH_KNOWN_ANSWERS[:1], *asked_for, *WITH_KNOWN_ANSWERS[1:])
        return [member for member in ordered if _allowed(member, view)], asked_for

    def _without_known_answers(self, view: AttackerView, budget: Budget, seed: int) -> Tensor:
        for member in WITHOUT_KNOWN_ANSWERS:
            attack = member.create(FOR_AS_LONG_AS_IT_LASTS)
            if all(view.has(need) for need in attack.needs):
                return attack.reconstruct(view.restricted(attack.needs | attack.optional), budget, seed)
        return blind_guess(view)

    def _scout(self, view: AttackerView, held_out: Tensor, budget: Budget, seed: int) -> tuple[list[Trial], float]:
        """Up to two finalists, in their order, found on held-out images alone, and the first one's share."""
        asked = held_out[:TRIAL_IMAGES]
        truth = view.auxiliary.select(asked).images
        view.query(truth[:1])  # a first call takes longer
        began = budget.elapsed
        rehearsal = view.rehearsal(asked, victims=False)
        encoding = (budget.elapsed - began) / len(asked)  # seconds an image
        before = min(ENCODED_BEFORE, len(view.auxiliary)) * encoding
        members, asked_for = self._members(view)
        if not members:
            return [], 1.0
        scouting = budget.share(SCOUTING_SHARE)

        def tried(member: Member, part: Budget) -> Trial:
            started = part.elapsed
            images = _run(member, rehearsal, part, seed)
            error = math.inf if images is None else float(mse(images, truth).mean())
            return Trial(member, error, part.steps, part.elapsed - started)

        decoder = members[0] if members[0].planned_by and members[0] not in asked_for else None
        if decoder and budget.seconds and before > FIRST_TRIAL_SHARE * budget.seconds:
            return self._short(members, asked_for, tried, budget, truth)
        first = tried(members[0], budget.share(FIRST_TRIAL_SHARE).part(steps=TRIAL_STEPS))
        if decoder and first.steps < TRIAL_STEPS and math.isfinite(first.error):
            return self._short(members, asked_for, tried, budget, truth)
        size = first.seconds if scouting.seconds is not None else float(first.steps)
        alive = [first]
        for place, member in enumerate(members[1:], 1):
            if place <= max(1, len(asked_for)):
                even = _size(scouting.share(1 / (len(members) - place)))
                alive.append(tried(member, _sized(scouting, min(size, even) or even)))
            elif _size(scouting.share(1.0)) >= size > 0:
                alive.append(tried(member, _sized(scouting, size)))
        alive.sort(key=_promise)
        while len(alive) > FINALISTS:
            kept = alive[: max(FINALISTS, -(-len(alive) // 2))]
            size *= 2
            if size == 0 or _size(scouting.share(1.0)) < size * len(kept):
                break
            alive = sorted((tried(trial.member, _sized(scouting, size)) for trial in kept), key=_promise)
        best, *others = alive[:FINALISTS]
        return [best, *(trial for trial in others if _promise(trial) <= CLOSE * _promise(best))], WINNER_SHARE

    def _short(
        self,
        members: Sequence[Member],
        asked_for: Sequence[Member],
        tried: Callable[[Member, Budget], Trial],
        budget: Budget,
        truth: Tensor,
    ) -> tuple[list[Trial], float]:
        """The first decoder and the first search, for a budget that is too short to compare them.

        A search says after a short trial whether the client is nearly inverted by it; a decoder says nothing then. What
        the view or the user names takes the place of the search.
        """
        first = Trial(members[0])
        if asked_for:
            return [first, *map(Trial, asked_for)], ASKED_FOR_SHARE
        search = next((member for member in members if member.planned_by is None), None)
        if search is None:
            return [first], 1.0
        second = tried(search, budget.share(FIRST_TRIAL_SHARE))
        blind = float(mse(truth.mean(0).expand_as(truth), truth).mean())
        if second.error < NEARLY_INVERTED * blind:
            return [second, first], INVERTED_SHARE
        return [first, second], SHORT_WINNER_SHARE


def _promise(trial: Trial) -> float:
    """The error of a trial, for comparisons."""
    return trial.error / (PATIENCE if trial.member.planned_by else 1.0)


def _sized(budget: Budget, size: float) -> Budget:
    """A part of `budget` of this size."""
    return budget.part(seconds=size) if budget.seconds is not None else budget.part(steps=max(1, round(size)))


def _grown(trial: Trial, part: Budget) -> Member:
    """The member of a trial, or its larger form where `part` lasts for enough of its steps."""
    if trial.member.grown is None:
        return trial.member
    if part.seconds is None:
        steps = float(part.step_limit or 0)
    else:
        steps = part.seconds * trial.steps / (GROWN_COST * max(trial.seconds, 1e-6))
    return trial.member.grown if steps >= GROWN_STEPS else trial.member


def choose(candidates: Sequence[Candidate], truth: Tensor) -> Tensor:
    """For every victim the candidate with the lowest expected error.

    truth: the m held-out images, whose reconstructions stand last in every candidate. On them, the logarithm of a
    candidate's error is regressed on that of its distance; where the choice by these predictions, made for each half of
    the held-out images from the other, is no better than the candidate that is best on average, the latter is taken for
    all. With that, the ensemble never knows more than what held-out images say.
    """
    count = len(candidates[0].images) - len(truth)
    errors = torch.stack([mse(c.images[count:], truth) for c in candidates])
    logs = torch.stack([c.distance.clamp(min=1e-12).log() for c in candidates])
    held_out = logs[:, count:]
    best = int(errors.mean(1).argmin())
    halves = (slice(0, None, 2), slice(1, None, 2))
    if len(candidates) > 1 and len(truth) >= 16:
        chosen_error = torch.cat(
            [
                _at(errors[:, mine], _predict(errors[:, other], held_out[:, other], held_out[:, mine]).argmin(0))
                for mine, other in (halves, halves[::-1])
            ]
        ).mean()
        if float(chosen_error) < float(errors[best].mean()):
            choice = _predict(errors, held_out, logs[:, :count]).argmin(0)
            return _at(torch.stack([c.images[:count] for c in candidates]), choice)
    return candidates[best].images[:count]


def _at(values: Tensor, choice: Tensor) -> Tensor:
    """``values[choice[i], i]`` for every i."""
    return values[choice, torch.arange(len(choice), device=values.device)]


def _predict(errors: Tensor, known: Tensor, asked: Tensor) -> Tensor:
    """Log error of each candidate (k, q) at log distances `asked` (k, q), by a line through its (k, m) known ones."""
    target = errors.clamp(min=1e-12).log()
    centred = known - known.mean(1, keepdim=True)
    spread = centred.square().sum(1, keepdim=True)
    slope = ((centred * target).sum(1, keepdim=True) / spread.clamp(min=1e-12)).clamp(min=0)
    return target.mean(1, keepdim=True) + slope * (asked - known.mean(1, keepdim=True))


def _allowed(member: Member, view: AttackerView) -> bool:
    needs = ATTACKS.load(member.attack).needs
    return all(view.has(need) for need in needs)


def _size(budget: Budget) -> float:
    """How much a budget allows, to compare parts of the same one."""
    return budget.seconds if budget.seconds is not None else float(budget.step_limit or 0)


def _run(member: Member, view: AttackerView, budget: Budget, seed: int) -> Tensor | None:
    """The reconstructions of one member, or None where it fails: another one may not."""
    attack = member.create(FOR_AS_LONG_AS_IT_LASTS if budget.step_limit is None else max(1, budget.step_limit))
    inner = view.restricted(attack.needs | attack.optional)
    try:
        with global_seed(seed, member.label):
            images = attack.reconstruct(inner, budget, derive_seed(seed, member.label))
    except Exception:
        return None
    return images.clamp(0, 1) if bool(images.isfinite().all()) else None


@torch.no_grad()
def _distance(view: AttackerView, images: Tensor, smashed: Tensor) -> Tensor:
    return (view.query(images) - smashed).square().flatten(1).mean(1) / smashed.square().mean().clamp(min=1e-12)


def _blend(reconstructions: Sequence[Tensor], truth: Tensor) -> Tensor:
    """The convex combination that is nearest to `truth` on the held-out images, which stand last."""
    count = len(reconstructions[0]) - len(truth)
    errors = torch.stack([(images[count:] - truth).flatten().double() for images in reconstructions])
    products = errors @ errors.T
    weights = torch.full((len(errors),), 1 / len(errors), dtype=torch.float64, device=truth.device)
    for _ in range(500):  # exponentiated gradient on the simplex
        weights = weights * torch.exp(-2 * (products @ weights) / products.diagonal().max().clamp(min=1e-12))
        weights = weights / weights.sum()
    return torch.stack([w * images for w, images in zip(weights.float(), reconstructions, strict=True)]).sum(0)


def _refine(view: AttackerView, images: Tensor, smashed: Tensor, truth: Tensor, budget: Budget) -> Tensor | None:
    """Move `images` towards the received messages, as far as that brings held-out images nearer to the truth.

    Minimises |f(x) - z|^2 / mean|z|^2 + strength * |x - start|^2 / spread^2 (means over elements), where spread^2 is
    the error of the start on held-out images; None where no strength helps there, or the budget does not last.
    """
    asked = slice(len(images) - len(truth), len(images) - len(truth) + TRIAL_IMAGES)
    spread = float(mse(images[len(images) - len(truth) :], truth).mean())
    if spread == 0:
        return None
    wanted, start = truth[:TRIAL_IMAGES], images[asked]
    errors = {0.0: float(mse(start, wanted).mean())}
    scale = float(_distance(view, images, smashed).mean())
    for strength in REFINEMENTS:
        found = _pull(view, start, smashed[asked], strength * scale / spread, budget)
        if found is None:
            return None
        errors[strength] = float(mse(found, wanted).mean())
    best = min(errors, key=lambda strength: errors[strength])
    return _pull(view, images, smashed, best * scale / spread, budget) if best > 0 else None


def _pull(view: AttackerView, start: Tensor, smashed: Tensor, strength: float, budget: Budget) -> Tensor | None:
    done = []
    scale = smashed.square().mean().clamp(min=1e-12)
    for begin, messages in zip(start.split(64), smashed.split(64), strict=True):
        free = begin.clone().requires_grad_(True)
        optimiser = torch.optim.Adam([free], lr=REFINING_RATE)
        taken = 0
        for _ in budget.iterate(REFINING_ITERATIONS):
            distance = (view.protect(view.client(free)) - messages).square().flatten(1).mean(1) / scale
            loss = distance + strength * (free - begin).square().flatten(1).mean(1)
            optimiser.zero_grad(set_to_none=True)
            loss.sum().backward()
            optimiser.step()
            taken += 1
        if taken < REFINING_ITERATIONS:
            return None
        done.append(free.detach().clamp(0, 1))
    return torch.cat(done)
