"""GLASS: search the latents and features of a generator of images, white box (Li et al., NeurIPS 2023)."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator, Sequence
from itertools import islice
from typing import Annotated, cast

import torch
from pydantic import Field
from torch import Tensor, nn

from mocosfl_priv import Attack, AttackerView, Budget, Capability, derive_seed, held_out_split, mean_image, mse
from mocosfl_priv.inversion import Ridge, VariationalAutoencoder, channel_axes, load_generator

STRENGTHS = (1e-3, 1e-2, 1e-1, 1.0, 10.0)
TRIAL_IMAGES = 16
KNOWN_IMAGES = 1024  # whose latents are known: searches start from them
MISFIT = 0.01  # of a channel's variance, that even the generator's best image does not explain
RIDGE = 0.1
TRAINING_SHARE = 0.5  # of a limited time: the searches get the rest
ROWS_AT_ONCE = 128
PIXELS_AT_ONCE = ROWS_AT_ONCE * 64**2  # to bound memory: fewer images of more than 64 pixels a side


class GlassAttack(Attack):
    """Find the image of a generator whose smashed data is the victim's, then leave the generator step by step.

    A variational autoencoder is trained on the auxiliary images. The latent is searched first; then, from where that
    ended, the features between the generator's stages, one after the other (intermediate layer optimisation, Daras et
    al., ICML 2021), and at last the pixels. Every search minimises

        distance(f(G(v)), z) + strength * |(v - v0) / deviation|^2 (means over elements)

    with v0 where it began (for the latent: zero, the prior's mean). The distance weights every channel of the smashed
    data by the inverse of the defense's randomness in it plus a share of its variance: maximum likelihood where noise
    dominates, standardised where there is none. A randomised defense is drawn afresh in every iteration.

    Strengths are chosen on auxiliary images held out from training, which are attacked along; a search that does not
    bring them nearer is left out, and the mean image is returned if nothing beats it. The latent is searched from
    several starts: a ridge regression from smashed data to the latents of known images (the encoder of GLASS++ in
    closed form), latents of the nearest known images, and zero; the lowest objective is kept.

    generator: `module:function` or `file.py:function` of a user's own, see `models.generator.load_generator`; our
    autoencoder if left out. latent_dim, width, epochs, batch_size, learning_rate: of the autoencoder, which has
    `width` channels at full size, and fewer for images larger than 64 pixels. iterations: per search. step_size: of a
    search, in deviations of what is searched. neighbours: nearest known images to start from. validation_share: of the
    auxiliary images, held out to choose strengths on.
    """

    searches_by_gradient = True
    needs = frozenset({Capability.CLIENT_WEIGHTS, Capability.AUXILIARY_DATA})

    def __init__(
        self,
        generator: str | None = None,
        latent_dim: Annotated[int, Field(ge=1)] = 128,
        width: Annotated[int, Field(ge=4, multiple_of=4)] = 32,
        epochs: Annotated[int, Field(ge=1)] = 40,
        batch_size: Annotated[int, Field(ge=1)] = 64,
        learning_rate: Annotated[float, Field(gt=0)] = 2e-3,
        iterations: Annotated[int, Field(ge=1)] = 200,
        step_size: Annotated[float, Field(gt=0)] = 0.1,
        neighbours: Annotated[int, Field(ge=0)] = 1,
        validation_share: Annotated[float, Field(gt=0, lt=1)] = 0.1,
    ) -> None:
        self.generator = generator
        self.latent_dim = latent_dim
        self.width = width
        self.epochs = epochs
        self.batch_size = batch_size
        self.learning_rate = learning_rate
        self.iterations = iterations
        self.step_size = step_size
        self.neighbours = neighbours
        self.validation_share = validation_share

    def reconstruct(self, view: AttackerView, budget: Budget, seed: int) -> Tensor:
        view.client  # noqa: B018 - refused here, not after the generator was trained
        rng = torch.Generator().manual_seed(derive_seed(seed, "glass"))
        train, held_out = (part.images for part in held_out_split(view.auxiliary, self.validation_share, rng))
        known = train[torch.randperm(len(train), generator=rng)[:KNOWN_IMAGES].to(train.device)]
        autoencoder, rows = None, rows_at_once(view.image_shape)
        if self.generator is None:
            autoencoder = VariationalAutoencoder(self.latent_dim, self.width, view.image_shape).to(train.device)
            generator: nn.Module = autoencoder.generator
        else:
            generator = load_generator(self.generator, view.image_shape).to(train.device)
        stages = list(cast(Sequence[nn.Module], getattr(generator, "stages", [generator])))
        training_steps = self.epochs * -(-len(train) // self.batch_size) if autoencoder is not None else 0
        steps = budget.iterate(training_steps + 2 * (len(stages) + 1) * self.iterations)  # own images, then victims
        if autoencoder is not None:
            self._train(autoencoder, view, budget, islice(steps, training_steps), train, held_out, rng)
            with torch.no_grad():
                latents = torch.cat([autoencoder.encode(batch)[0] for batch in known.split(rows)])
        else:
            latents = torch.randn((KNOWN_IMAGES, cast(int, generator.latent_dim)), generator=rng).to(train)
            with torch.no_grad():
                known = torch.cat([generator(batch) for batch in latents.split(rows)])
        search = _Search(view, budget, steps, self.iterations, self.step_size, stages, latents, known)
        begun = TRAINING_SHARE if autoencoder is not None else 0.0
        return search.run(held_out[:TRIAL_IMAGES], mean_image(train), self.neighbours, begun)

    def _train(
        self,
        autoencoder: VariationalAutoencoder,
        view: AttackerView,
        budget: Budget,
        steps: Iterator[int],
        train: Tensor,
        held_out: Tensor,
        rng: torch.Generator,
    ) -> None:
        """Train on mirrored images, keep the epoch of the best evidence for `held_out`, and freeze."""
        epoch_steps = -(-len(train) // self.batch_size)
        optimiser = torch.optim.AdamW(autoencoder.parameters(), lr=self.learning_rate)
        schedule = torch.optim.lr_scheduler.OneCycleLR(
            optimiser, max_lr=self.learning_rate, total_steps=self.epochs * epoch_steps
        )
        best_loss, best_state = math.inf, None
        for step in steps:
            position = step % epoch_steps
            if position == 0:
                order = torch.randperm(len(train), generator=rng)
            images = train[order[position * self.batch_size : (position + 1) * self.batch_size].to(train.device)]
            mirrored = (torch.rand(len(images), generator=rng) < 0.5).to(train.device)
            images = torch.where(mirrored.view(-1, 1, 1, 1), images.flip(3), images)
            with view.compute.autocast():
                loss = autoencoder.loss(images, rng)
            optimiser.zero_grad(set_to_none=True)
            loss.backward()
            optimiser.step()
            schedule.step()
            if position == epoch_steps - 1:
                with torch.no_grad():
                    losses = [autoencoder.loss(batch, rng) for batch in held_out.split(rows_at_once(view.image_shape))]
                    loss = torch.stack(losses).mean()
                if float(loss) < best_loss:
                    best_loss, best_state = float(loss), copy.deepcopy(autoencoder.state_dict())
            if budget.past(TRAINING_SHARE):
                break
        if best_state is not None:
            autoencoder.load_state_dict(best_state)
        autoencoder.requires_grad_(False)


class _Search:
    """The searches, one level after the other: level k is what enters stage k, and the last level is the image."""

    def __init__(
        self, view: AttackerView, budget: Budget, steps: Iterator[int], iterations: int, step_size: float,
        stages: list[nn.Module], latents: Tensor, known: Tensor,
    ) -> None:  # fmt: skip
        self.view = view
        self.budget = budget
        self.steps = steps
        self.iterations = iterations
        self.step_size = step_size
        self.stages = stages
        self.latents = latents
        self.rows = rows_at_once(view.image_shape)
        with torch.no_grad():  # at home: the attacker holds the weights
            self.smashed_of_known = torch.cat([view.protect(view.client(rows)) for rows in known.split(self.rows)])
        self.weights = _channel_weights(view, known, self.smashed_of_known)
        self.deviations = self._deviations(known)

    def run(self, own: Tensor, fallback: Tensor, neighbours: int, begun: float) -> Tensor:
        """Images of the victims.

        own: images of the attacker's, attacked along to choose strengths. fallback: the image (3, h, w) for all if
        the search does not beat it on them. begun: share of a limited time that is gone already.
        """
        with torch.no_grad():
            trial = self.view.protect(self.view.client(own))
        victims = self.view.smashed
        at_trial, at_victims = (self._starts(smashed, neighbours) for smashed in (trial, victims))
        levels = len(self.stages) + 1
        best_error = math.inf
        for level in range(levels):
            share = begun + (1 - begun) * torch.tensor([2 * level + 1, 2 * level + 2]) / (2 * levels)
            found = self._optimise(level, trial, at_trial, STRENGTHS, float(share[0]))
            errors = [float(mse(self._decode(level, values), own).mean()) for values in found]
            best = min(range(len(STRENGTHS)), key=errors.__getitem__)
            if level == 0 or errors[best] < best_error:
                best_error = errors[best]
                at_trial = found[best : best + 1]
                at_victims = self._optimise(level, victims, at_victims, STRENGTHS[best : best + 1], float(share[1]))
            if level < len(self.stages):
                at_trial, at_victims = (self._passed_on(level, values) for values in (at_trial, at_victims))
        if float(mse(fallback.expand_as(own), own).mean()) <= best_error:
            return fallback.expand_as(at_victims[0]).clone()
        return at_victims[0].clamp(0, 1)

    def _starts(self, smashed: Tensor, neighbours: int) -> Tensor:
        """Latents to start from, (starts, n, latent_dim)."""
        scale = self.weights.sqrt()
        mean = self.smashed_of_known.mean(0)
        known, sent = (((z - mean) * scale).flatten(1) for z in (self.smashed_of_known, smashed))
        regressed = Ridge(known, self.latents)(sent, RIDGE)
        nearest = torch.cdist(sent, known).topk(min(neighbours, len(known)), largest=False).indices
        return torch.stack([torch.zeros_like(regressed), regressed, *self.latents[nearest].unbind(1)])

    @torch.no_grad()
    def _deviations(self, known: Tensor) -> list[Tensor]:
        """By level, what one unit of a search's offset is; for the latent, the prior's own unit."""
        values = self.latents[:ROWS_AT_ONCE]
        deviations = [torch.ones_like(values[:1])]
        for stage in self.stages[:-1]:
            values = torch.cat([stage(rows) for rows in values.split(self.rows)])
            deviations.append(_deviation(values))
        return [*deviations, _deviation(known)]

    @torch.no_grad()
    def _passed_on(self, level: int, values: Tensor) -> Tensor:
        passed = [self.stages[level](rows) for rows in values[0].split(self.rows)]
        return torch.cat(passed)[None]

    @torch.no_grad()
    def _decode(self, level: int, values: Tensor) -> Tensor:
        return torch.cat([self._image(level, rows) for rows in values.split(self.rows)])

    def _image(self, level: int, values: Tensor) -> Tensor:
        for stage in self.stages[level:]:
            values = stage(values)
        return values.clamp(0, 1) if level == len(self.stages) else values

    def _optimise(
        self, level: int, smashed: Tensor, starts: Tensor, strengths: Sequence[float], share: float
    ) -> Tensor:
        """The values of the lowest objective among `starts` (s, n, *shape) for every strength: (g, n, *shape)."""
        tried, count, shape = len(strengths) * len(starts), len(smashed), starts.shape[2:]
        begin = starts.repeat(len(strengths), *[1] * (starts.dim() - 1)).flatten(0, 1)
        sent = smashed.repeat(tried, *[1] * (smashed.dim() - 1))
        strength = torch.tensor(strengths).repeat_interleave(len(starts) * count).to(begin)
        centre = torch.zeros_like(begin) if level == 0 else begin
        deviation = self.deviations[level]
        offset = ((begin - centre) / deviation).requires_grad_(True)
        optimiser = torch.optim.Adam([offset], lr=self.step_size)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, self.iterations)
        parts = [slice(first, first + self.rows) for first in range(0, len(begin), self.rows)]

        def objective(part: slice) -> Tensor:
            image = self._image(level, centre[part] + deviation * offset[part])
            difference = self.view.protect(self.view.client(image)) - sent[part]
            distance = (self.weights * difference.square()).flatten(1).mean(1)
            return distance + strength[part] * offset[part].square().flatten(1).mean(1)

        for _ in islice(self.steps, self.iterations):
            optimiser.zero_grad(set_to_none=True)
            for part in parts:
                objective(part).sum().backward()
            optimiser.step()
            schedule.step()
            if level == len(self.stages):
                with torch.no_grad():  # a pixel beyond the range would have no gradient to come back by
                    offset.copy_(((centre + deviation * offset).clamp(0, 1) - centre) / deviation)
            if self.budget.past(share):
                break
        with torch.no_grad():
            reached = torch.cat([objective(part) for part in parts]).view(len(strengths), len(starts), count)
            values = (centre + deviation * offset).view(len(strengths), len(starts), count, *shape)
            chosen = reached.argmin(1).view(len(strengths), 1, count, *[1] * len(shape))
            return values.take_along_dim(chosen, 1).squeeze(1)


def rows_at_once(image_shape: Sequence[int]) -> int:
    """How many images of this shape (c, h, w) go through the networks together."""
    return min(ROWS_AT_ONCE, max(1, PIXELS_AT_ONCE // (image_shape[1] * image_shape[2])))


def _deviation(values: Tensor) -> Tensor:
    """Per channel, (1, c, 1, ...); never zero."""
    return values.std([0, *range(2, values.dim())], keepdim=True).clamp(min=1e-3)


@torch.no_grad()
def _channel_weights(view: AttackerView, known: Tensor, smashed: Tensor) -> Tensor:
    """Weights (1, c, 1, ...), for tokens (1, 1, d), of squared differences.

    They are such that guessing the mean of `smashed` costs 1 on average, and all zero where it does not depend on the
    image.
    """
    axes = channel_axes(smashed)
    plain = view.client(known[:ROWS_AT_ONCE])
    randomness = 0.5 * (view.protect(plain) - view.protect(plain)).square().mean(axes, keepdim=True)
    signal = (plain - plain.mean(0)).square().mean(axes, keepdim=True)
    variance = (smashed - smashed.mean(0)).square().mean(axes, keepdim=True)
    expected = randomness + MISFIT * signal
    weights = torch.where(expected > 1e-12, 1 / expected.clamp(min=1e-12), 0)
    return weights / (weights * variance).mean().clamp(min=1e-12)
