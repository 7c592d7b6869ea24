"""rMLE: regularised maximum-likelihood estimation of the images, white box (He et al., ACSAC 2019)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor

from mocosfl_priv import (
    Attack,
    AttackerView,
    AuxiliaryData,
    Budget,
    Capability,
    MessageEncoder,
    RunFailedError,
    derive_seed,
    mse,
)
from mocosfl_priv.inversion import Ridge, Standardise

TV_WITHOUT_AUXILIARY_DATA = 1e-2
SATURATED = 0.02  # nearer to black or white, a sigmoid has hardly a gradient
FLAT = 1e-3  # contrast below which there is none
CALIBRATION_RIDGE = 1e-10
REGRESSION_RIDGES = (1e-2, 1e-1, 1.0)
KNOWN_IMAGES = 32  # that are searched along
TRIAL_IMAGES = 16  # of these, on which schedules are tried
REGRESSED_IMAGES = 1024
TRIAL_SHARE = 0.4  # of a limited time: the victims get the rest


@dataclass(frozen=True)
class Schedule:
    """Weights of the total variation, from the first iteration's to the last one's by equal factors."""

    first: float
    last: float

    def __call__(self, spent: float) -> float:
        """The weight after `spent` of the search, in [0, 1]."""
        return self.first if self.first == self.last else self.first * (self.last / self.first) ** spent


SCHEDULES = (*(Schedule(weight, weight) for weight in (1e-3, 1e-2, 1e-1)), Schedule(1.0, 3e-2), Schedule(3.0, 0.3))


class Calibration:
    """The linear map from what a search finds to what it should have found, in brightness and contrast.

    found, truth: images (n, 3, h, w) to learn it from by least squares. It sees of every image its mean colour, its
    deviations from that, and the same deviations at equal contrast: so it can tell right contrast from none.
    """

    def __init__(self, found: Tensor, truth: Tensor) -> None:
        seen, wanted = self._seen(found), truth.flatten().double()
        gram = seen.T @ seen  # with a ridge, since flat images leave it singular
        ridge = CALIBRATION_RIDGE * gram.diagonal().mean() * torch.eye(len(gram), dtype=gram.dtype, device=gram.device)
        self._weights = torch.linalg.solve(gram + ridge, seen.T @ wanted)

    def __call__(self, found: Tensor) -> Tensor:
        """Images (n, 3, h, w) in [0, 1]."""
        return (self._seen(found) @ self._weights).view(found.shape).to(found.dtype).clamp(0, 1)

    @staticmethod
    def _seen(found: Tensor) -> Tensor:
        mean = found.mean((2, 3), keepdim=True)
        away = found - mean
        contrast = away.square().mean((1, 2, 3), keepdim=True).sqrt().clamp(min=FLAT)
        seen = (mean.expand_as(found), away, away / contrast, torch.ones_like(found))
        return torch.stack([part.flatten().double() for part in seen], dim=1)


class RmleAttack(Attack):
    """Optimise the images until the client, with its defense, would send what the victims sent.

    Minimises |f(x) - z|^2 / |z|^2 + tv * TV(x) + l2 * |x - 1/2|^2 (means over elements) with AMSGrad and a cosine
    schedule, all victims in one batch. A randomised defense is drawn afresh in every iteration. Of several starts,
    each image keeps the one with the lowest objective; the true images are never consulted.

    iterations: per start. learning_rate: AMSGrad's at the beginning. tv: weight of the total variation, chosen by the
    attack if left out. l2: weight of the distance to mid-grey. starts: searches from different beginnings.
    parametrisation: x = sigmoid(w), or x = w clamped to
    [0, 1] after every iteration.

    Where `tv` is left out, an attacker with images of its own makes more of them; ours. The search begins where a
    linear map from smashed data to images, learned on them in closed form, puts the victims. Of `SCHEDULES` for the
    weight of the total variation, the one is taken that finds a few of them best: a weight that falls during the search
    lets coarse shapes settle before details do, while a small one throughout ends, on clients with norms, in noise that
    sends what the image sends. Such clients do not say how bright and how rich in contrast an image is, and the search
    leaves that where the prior wants it; so it is set as is right on average for the images that are known
    (`Calibration`).
    """

    searches_by_gradient = True
    needs = frozenset({Capability.CLIENT_WEIGHTS})
    optional = frozenset({Capability.AUXILIARY_DATA})

    def __init__(
        self,
        iterations: Annotated[int, Field(ge=1)] = 500,
        learning_rate: Annotated[float, Field(gt=0)] = 0.1,
        tv: Annotated[float, Field(ge=0)] | None = None,
        l2: Annotated[float, Field(ge=0)] = 0.0,
        starts: Annotated[int, Field(ge=1)] = 1,
        parametrisation: Literal["sigmoid", "clamp"] = "clamp",
    ) -> None:
        self.iterations = iterations
        self.learning_rate = learning_rate
        self.tv = tv
        self.l2 = l2
        self.starts = starts
        self.parametrisation = parametrisation

    def reconstruct(self, view: AttackerView, budget: Budget, seed: int) -> Tensor:
        rng = torch.Generator().manual_seed(derive_seed(seed, "rmle"))
        view.client  # noqa: B018 - refused here, not after the time for the first step ran out
        weight = TV_WITHOUT_AUXILIARY_DATA if self.tv is None else self.tv
        schedule, known, smashed = Schedule(weight, weight), None, view.smashed
        begin = _grey(smashed, view.image_shape)
        if self.tv is None and view.has(Capability.AUXILIARY_DATA) and len(view.auxiliary) > 0:
            known, others = _own_images(view.auxiliary, rng)
            send = MessageEncoder.of(view)
            sent = send(known)
            smashed = torch.cat([sent, view.smashed])  # searched along, to see what this very search gets wrong
            begin = _beginning(send, smashed, known, others)
            trial = slice(min(TRIAL_IMAGES, len(known)))
            part = budget.share(TRIAL_SHARE)
            schedule = self._best_on(known[trial], sent[trial], begin[trial], view, part)
        best = _grey(smashed, view.image_shape)
        best_objective = smashed.new_full((len(smashed),), math.inf)
        for start in range(self.starts):
            part = budget.share(1 / (self.starts - start))
            images = self._optimise(view, smashed, schedule, part, begin if start == 0 else _noise(begin, rng))
            with torch.no_grad():
                objective = self._objective(view, images, smashed, schedule.last)
            better = objective < best_objective
            best[better], best_objective[better] = images[better], objective[better]
        if not bool(best_objective.isfinite().all()):
            raise RunFailedError("the search diverged")
        if known is None:
            return best
        return Calibration(best[: len(known)], known)(best[len(known) :])

    def _best_on(self, own: Tensor, sent: Tensor, begin: Tensor, view: AttackerView, budget: Budget) -> Schedule:
        """The schedule with which images (n, 3, h, w) are found best, from their messages."""
        errors = []
        for place, schedule in enumerate(SCHEDULES):
            found = self._optimise(view, sent, schedule, budget.share(1 / (len(SCHEDULES) - place)), begin)
            finite = bool(found.isfinite().all())
            errors.append(float(mse(Calibration(found, own)(found), own).mean()) if finite else math.inf)
        return SCHEDULES[min(range(len(SCHEDULES)), key=errors.__getitem__)]

    def _optimise(
        self, view: AttackerView, smashed: Tensor, schedule: Schedule, budget: Budget, begin: Tensor
    ) -> Tensor:
        """One run of the optimiser, from images `begin` (n, 3, h, w)."""
        sigmoid = self.parametrisation == "sigmoid"
        free = (begin.logit(SATURATED) if sigmoid else begin.clone()).requires_grad_(True)
        optimiser = torch.optim.Adam([free], lr=self.learning_rate, amsgrad=True)
        for step in budget.iterate(self.iterations):
            spent = budget.spent(step, self.iterations)
            for group in optimiser.param_groups:
                group["lr"] = self.learning_rate * 0.5 * (1 + math.cos(math.pi * spent))
            optimiser.zero_grad(set_to_none=True)
            images = free.sigmoid() if sigmoid else free
            self._objective(view, images, smashed, schedule(spent)).sum().backward()
            optimiser.step()
            if not sigmoid:
                with torch.no_grad():
                    free.clamp_(0, 1)
        return (free.sigmoid() if sigmoid else free).detach()

    def _objective(self, view: AttackerView, images: Tensor, smashed: Tensor, tv: float) -> Tensor:
        """The objective of every image, (n,)."""
        scale = smashed.square().mean().clamp(min=1e-12)
        distance = (view.protect(view.client(images)) - smashed).square().flatten(1).mean(1) / scale
        vertical = (images[:, :, 1:] - images[:, :, :-1]).abs().flatten(1).mean(1)
        horizontal = (images[:, :, :, 1:] - images[:, :, :, :-1]).abs().flatten(1).mean(1)
        prior = (images - 0.5).square().flatten(1).mean(1)
        return distance + tv * (vertical + horizontal) + self.l2 * prior


def _own_images(auxiliary: AuxiliaryData, rng: torch.Generator) -> tuple[Tensor, Tensor]:
    """Some of the attacker's images to see its success on, and others to learn from; of the target if it has such."""
    held_out = auxiliary.hold_out(1.0, rng, KNOWN_IMAGES)
    rest = auxiliary.without(held_out)
    order = torch.randperm(len(rest), generator=rng)
    of_target_first = order[rest.of_target.cpu()[order].int().argsort(descending=True, stable=True)]
    return auxiliary.select(held_out).images, rest.select(of_target_first[:REGRESSED_IMAGES]).images


def _beginning(send: MessageEncoder, smashed: Tensor, known: Tensor, others: Tensor) -> Tensor:
    """Where the search begins for each row of `smashed`, whose first ones are the messages of `known`.

    Grey, or what a linear map that was learned from `others` makes of it: whatever is nearer for `known`.
    """
    begin = _grey(smashed, known.shape[1:])
    if len(others) == 0:
        return begin
    sent = send(others)
    standardise = Standardise(sent, known.shape[2:])
    regression, messages = Ridge(standardise(sent), others), standardise(smashed)
    candidates = [begin, *(regression(messages, strength).clamp(0, 1) for strength in REGRESSION_RIDGES)]
    return min(candidates, key=lambda images: float(mse(images[: len(known)], known).mean()))


def _grey(smashed: Tensor, image_shape: Sequence[int]) -> Tensor:
    """A mid-grey image (3, h, w) for every message."""
    return smashed.new_full((len(smashed), *image_shape), 0.5)


def _noise(like: Tensor, rng: torch.Generator) -> Tensor:
    """Noise around mid-grey, of the same shape."""
    return (0.5 + 0.2 * torch.randn(like.shape, generator=rng).to(like)).clamp(0, 1)
