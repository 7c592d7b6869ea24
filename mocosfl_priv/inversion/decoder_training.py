"""Train an inversion network from smashed data to images, on pairs made from auxiliary data (He et al., ACSAC 2019).

Shared by all attacks that train one: standardisation of smashed data, augmentation and encoding of auxiliary images,
the training loop with its schedule and model selection, and a fallback to the blind guess.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mocosfl_priv.errors import ConfigurationError, RunFailedError
from mocosfl_priv.evaluation.floor import mean_image
from mocosfl_priv.evaluation.image_metrics import mse, ssim_zeropad
from mocosfl_priv.evaluation.perceptual import Lpips
from mocosfl_priv.inversion.arrangement import channel_axes, token_grid
from mocosfl_priv.inversion.confidence import DEAD
from mocosfl_priv.inversion.decoders import ArrangedDecoder, SubPixelDecoder, begins_linear
from mocosfl_priv.plugins import AttackerView, AuxiliaryData, Budget, Capability
from mocosfl_priv.runtime.compute import Compute

BATCH_FOR_INFERENCE = 128
STATISTICS_IMAGES = 1024
AFFORDABLE, AFFORDABLE_BATCH = 0.1, 64  # the share of the time left for each set of images encoded beforehand
SMALLEST_BATCH, LARGEST_BATCH, ENOUGH_BATCHES = 16, 32, 32
WARM_UP = 0.1
LOSS_CHECK_EVERY = 20  # steps
# Gradients are clipped to this norm: GroupNorm in a client amplifies an almost uniform image, and one such image in a
# batch can ruin the training of a decoder without norms.
LARGEST_GRADIENT = 0.2
FARTHEST = 8.0  # standardised smashed data are clamped to this number of standard deviations
POOL_BYTES = 512 << 20  # memory for encoded auxiliary images


@dataclass(frozen=True)
class Recipe:
    """How an inversion network is trained.

    Args:
        steps: planned steps, at least 1.
        batch_size: images of a step.
        learning_rate: peak of a one-cycle schedule, or Adam's constant rate without `one_cycle`.
        one_cycle: whether the rate follows that schedule; it ends with the budget.
        ssim_weight: loss = MSE + ssim_weight * (1 - SSIM) + lpips_weight * LPIPS.
        lpips_weight: see `ssim_weight`; above 0 it needs the `lpips` argument of :func:`train_inverter`.
        flip: whether auxiliary images are mirrored at random.
        shift: by up to how many pixels they are moved.
        reuse: passes over the auxiliary images before they are augmented and encoded afresh. The defense is drawn anew
            in every step in any case.
        validations: how often, evenly, the state is compared with the best one so far.

    >>> Recipe(steps=1).passing(epochs=3, images=100).steps
    12
    """

    steps: int
    batch_size: int = LARGEST_BATCH
    learning_rate: float = 2e-3
    one_cycle: bool = True
    ssim_weight: float = 0.0
    lpips_weight: float = 0.0
    flip: bool = True
    shift: int = 4
    reuse: int = 4
    validations: int = 10

    def passing(self, epochs: int, images: int) -> Recipe:
        """The same with as many steps as `epochs` passes over `images` take.

        Args:
            epochs: passes.
            images: how many there are.

        Returns:
            A new recipe.
        """
        return replace(self, steps=epochs * -(-images // self.batch_size))


@dataclass(frozen=True)
class MessageEncoder:
    """How auxiliary images become messages like the victims'.

    Args:
        encode: images (n, 3, h, w) in [0, 1] to smashed data, without gradient; its results are kept and used again.
        protect: the defense's transformation with fresh randomness, for every step.

    >>> encoder = MessageEncoder(encode=lambda images: 2 * images, protect=lambda smashed: smashed + 1)
    >>> encoder(torch.zeros(1, 3, 2, 2)).unique()
    tensor([1.])
    """

    encode: Callable[[Tensor], Tensor]
    protect: Callable[[Tensor], Tensor]

    @classmethod
    def of(cls, view: AttackerView) -> MessageEncoder:
        """The encoder of an attacker: its own copy of the client if it holds the weights, else queries to the client.

        Args:
            view: with QUERY or CLIENT_WEIGHTS. Answers of queries are protected already.

        Returns:
            The encoder.
        """
        if view.has(Capability.CLIENT_WEIGHTS):
            return cls(in_batches(view.client), view.protect)
        return cls(view.query, _identity)

    @torch.no_grad()
    def __call__(self, images: Tensor) -> Tensor:
        """Return the message of each image (n, 3, h, w)."""
        return self.protect(self.encode(images))


@dataclass
class Inverter:
    """A trained inversion network, and what its training found; called with smashed data, it returns images.

    Args:
        network: standardisation, then the decoder.
        guess: (3, h, w), the image that is returned for all messages if `blind`.
        error: MSE on the validation images at the step that was kept.
        blind: whether the network is no better there than `guess`.

    >>> inverter = Inverter(nn.Identity(), guess=torch.full((3, 2, 2), 0.5), error=0.1, blind=True)
    >>> inverter(torch.rand(4, 8, 2, 2)).shape
    torch.Size([4, 3, 2, 2])
    """

    network: nn.Module
    guess: Tensor
    error: float
    blind: bool

    @property
    def standardise(self) -> Standardise:
        """The network's first layer, which standardises messages by the statistics of the training messages."""
        assert isinstance(self.network, nn.Sequential)
        first = self.network[0]
        assert isinstance(first, Standardise)
        return first

    def __call__(self, smashed: Tensor) -> Tensor:
        """Return images (n, 3, h, w) in [0, 1] for smashed data (n, ...)."""
        if self.blind:
            return self.guess.expand(len(smashed), *self.guess.shape).clone()
        return decode(self.network, smashed)


def train_inverter(
    decoder: nn.Module,
    sender: MessageEncoder,
    train: Tensor,
    validation: Tensor,
    recipe: Recipe,
    budget: Budget,
    compute: Compute,
    rng: torch.Generator,
    *,
    guess: Tensor,
    standardise: bool = True,
    lpips: Lpips | None = None,
) -> Inverter:
    """Train `decoder` to invert `sender`, and keep the step that is best on held-out images.

    The attack of He et al., "Model Inversion Attacks Against Collaborative Inference", ACSAC 2019. A decoder with a
    linear path (``unet``, ``edsr``) is given that path in closed form first. Where the loss is the MSE alone, this
    beginning takes part in the choice, so that a budget without a single step has an answer as well. The learning rate
    follows `budget.spent`, so that the schedule ends with the budget, whatever limits it.

    Args:
        decoder: smashed data (n, *smashed_shape) to images (n, 3, h, w); it is trained in place.
        sender: makes the messages of auxiliary images.
        train: float (n, 3, h, w) in [0, 1], the images to learn from.
        validation: float (m, 3, h, w) in [0, 1], the images to choose by; none of them may be in `train`.
        recipe: steps, loss, rate and augmentation.
        budget: steps are drawn from it.
        compute: device and precision.
        rng: on the CPU; decides batches and augmentation.
        guess: (3, h, w), the image that stands for all victims where nothing better was learned; not made of
            `validation`.
        standardise: whether smashed data is standardised per channel first.
        lpips: see :func:`mocosfl_priv.load_lpips`; needed for `recipe.lpips_weight` only.

    Returns:
        The trained network with its error on `validation`.

    Raises:
        RunFailedError: messages or the loss are not finite.

    >>> from mocosfl_priv.config import ComputeConfig
    >>> rng = torch.Generator().manual_seed(0)
    >>> train, validation = torch.rand(32, 3, 8, 8, generator=rng), torch.rand(8, 3, 8, 8, generator=rng)
    >>> halves = MessageEncoder(encode=lambda images: images / 2, protect=lambda smashed: smashed)
    >>> decoder = nn.Conv2d(3, 3, kernel_size=1)
    >>> inverter = train_inverter(
    ...     decoder, halves, train, validation, Recipe(steps=50, learning_rate=0.1), Budget(),
    ...     Compute.resolve(ComputeConfig(device="cpu", precision="float32")), rng, guess=mean_image(train),
    ... )
    >>> inverter.blind, inverter(halves(validation)).shape
    (False, torch.Size([8, 3, 8, 8]))
    """
    known = train[torch.randperm(len(train), generator=rng)[:STATISTICS_IMAGES].to(train.device)]
    with torch.no_grad():
        messages = sender.protect(affordable(sender.encode, known, budget))
    known = known[: len(messages)]
    first = Standardise(messages, train.shape[2:]) if standardise else nn.Identity()
    network = nn.Sequential(first, decoder).to(compute.device).to(memory_format=torch.channels_last)
    encoded = affordable(sender.encode, validation, budget)
    validation = validation[: len(encoded)]
    held_out = HeldOut(sender, validation, encoded, compute)
    if isinstance(decoder, SubPixelDecoder | ArrangedDecoder):
        if not bool(messages.isfinite().all()):
            raise RunFailedError("the inversion network cannot be trained: messages of auxiliary images are not finite")
        needed = decoder.examples_of(messages)
        decoder.begin_linear(first(messages[:needed]), known[:needed])
        # with another loss, the best MSE is not the goal
        if begins_linear(decoder) and not (recipe.ssim_weight or recipe.lpips_weight):
            held_out.compare(network)
    del messages, known
    decay = 0.01 if recipe.one_cycle else 0.0
    optimiser = torch.optim.AdamW(
        network.parameters(), lr=recipe.learning_rate, betas=(0.9, 0.99), weight_decay=decay, fused=True
    )
    pool = EncodedPool(train, sender.encode, recipe, rng)
    validated = 0
    losses: list[Tensor] = []
    for step in budget.iterate(recipe.steps):
        if recipe.one_cycle:
            for group in optimiser.param_groups:
                group["lr"] = recipe.learning_rate * one_cycle(budget.spent(step, recipe.steps))
        images, encoded = pool.next()
        loss = _loss(network, sender.protect(encoded), images, recipe, compute, lpips)
        optimiser.zero_grad(set_to_none=True)
        loss.backward()
        if recipe.one_cycle:
            nn.utils.clip_grad_norm_(network.parameters(), LARGEST_GRADIENT)
        optimiser.step()
        losses.append(loss.detach())
        done = budget.spent(step + 1, recipe.steps)
        if step % LOSS_CHECK_EVERY == 0 or done >= 1:
            if not bool(torch.stack(losses).isfinite().all()):
                raise RunFailedError(f"training of the inversion network diverged near step {step}")
            losses.clear()
        if done >= (validated + 1) / recipe.validations or step == recipe.steps - 1:
            validated = math.floor(done * recipe.validations)
            held_out.compare(network)
    best_error = held_out.restore_best(network)
    blind_error = float(mse(guess.expand_as(validation), validation).mean())
    return Inverter(network.eval(), guess, min(best_error, blind_error), blind=best_error >= blind_error)


def batch_size_for(images: int, budget: Budget) -> int:
    """A batch size that suits what ends the training.

    In the same time, more small steps learn more of few images than half as many large ones do. Of equally many steps,
    large ones learn more.

    Args:
        images: how many there are to learn from.
        budget: of the training.

    Returns:
        32; where the clock ends the training, 16 or more, so that few images still make 32 batches.

    >>> batch_size_for(500, Budget(steps=100)), batch_size_for(500, Budget(seconds=60.0))
    (32, 16)
    """
    if budget.seconds is None:
        return LARGEST_BATCH
    return max(SMALLEST_BATCH, min(LARGEST_BATCH, images // ENOUGH_BATCHES))


def affordable(encode: Callable[[Tensor], Tensor], images: Tensor, budget: Budget) -> Tensor:
    """Encode images before a training; where the clock ends it, no more of them than a part of its time allows.

    A deep client takes seconds for a thousand images, which a training of a few seconds does not have.

    Args:
        encode: images (n, 3, h, w) to smashed data.
        images: float (n, 3, h, w) in [0, 1].
        budget: of the training.

    Returns:
        The smashed data of all images, or of the first ones, at least `AFFORDABLE_BATCH`.
    """
    if budget.seconds is None:
        return encode(images)
    end = budget.elapsed + AFFORDABLE * max(0.0, budget.seconds - budget.elapsed)
    encoded = []
    for batch in images.split(AFFORDABLE_BATCH):
        encoded.append(encode(batch))
        if budget.elapsed > end:
            break
    return torch.cat(encoded)


class HeldOut:
    """Keeps the best state of a network so far, by its MSE on images that it is not trained on."""

    def __init__(self, sender: MessageEncoder, images: Tensor, encoded: Tensor, compute: Compute) -> None:
        """encoded: what `sender` encodes of `images`; `protect` applies the defense anew in every comparison."""
        self._sender = sender
        self._images = images
        self._compute = compute
        self._encoded = encoded
        self._error = math.inf
        self._state: dict[str, Tensor] | None = None

    @torch.no_grad()
    def compare(self, network: nn.Module) -> None:
        """Keep the current state of `network` if it is the best so far."""
        self._messages = self._sender.protect(self._encoded)
        with self._compute.autocast():
            error = self._error_of(network)
        if error < self._error:
            self._error, self._state = error, copy.deepcopy(network.state_dict())

    def restore_best(self, network: nn.Module) -> float:
        """Restore the best state of `network`, and return its MSE in full precision; infinite if there is no state."""
        if self._state is None:
            return math.inf
        network.load_state_dict(self._state)
        return self._error_of(network)

    def _error_of(self, network: nn.Module) -> float:
        return float(mse(decode(network, self._messages), self._images).mean())


def _loss(
    network: nn.Module, smashed: Tensor, images: Tensor, recipe: Recipe, compute: Compute, lpips: Lpips | None
) -> Tensor:
    with compute.autocast():
        decoded = network(_channels_last(smashed))
    decoded = decoded.float()
    loss = F.mse_loss(decoded, images)
    if recipe.ssim_weight:
        loss = loss + recipe.ssim_weight * (1 - ssim_zeropad(decoded, images).mean())
    if recipe.lpips_weight:
        assert lpips is not None
        loss = loss + recipe.lpips_weight * lpips.distance(decoded, images).mean()
    return loss


class EncodedPool:
    """Batches of augmented and encoded auxiliary images, in random order.

    Encoding costs as much as a step of a small decoder. Each augmented image is therefore used `recipe.reuse` times
    before all are augmented again, unless the smashed data of all images take more than `POOL_BYTES`.
    """

    def __init__(
        self, images: Tensor, encode: Callable[[Tensor], Tensor], recipe: Recipe, rng: torch.Generator
    ) -> None:
        self._source = images
        self._encode = encode
        self._recipe = recipe
        self._rng = rng
        self._order = torch.empty(0, dtype=torch.long)
        self._passes = 0
        self._images, self._encoded = images[:0], images[:0]
        self._keeps = True
        augments = recipe.flip or recipe.shift > 0
        self._fresh_every = recipe.reuse if augments else None

    def next(self) -> tuple[Tensor, Tensor]:
        """Return a batch of images (b, 3, h, w) and their smashed data before the defense."""
        if not len(self._order):
            self._order = torch.randperm(len(self._source), generator=self._rng)
            self._passes += 1
        chosen, self._order = self._order[: self._recipe.batch_size], self._order[self._recipe.batch_size :]
        chosen = chosen.to(self._source.device)
        afresh = self._passes == 1 or (self._fresh_every is not None and (self._passes - 1) % self._fresh_every == 0)
        if self._keeps and not afresh:
            return self._images[chosen], self._encoded[chosen]
        images = self._augment(self._source[chosen])
        encoded = self._encode(images)
        self._keep(chosen, images, encoded)
        return images, encoded

    def _keep(self, chosen: Tensor, images: Tensor, encoded: Tensor) -> None:
        """Store an encoded batch for later passes, if the first batch shows that all fit into `POOL_BYTES`."""
        if self._keeps and not len(self._encoded):
            size = encoded.element_size() * (encoded[0].numel() + images[0].numel()) * len(self._source)
            self._keeps = size <= POOL_BYTES and self._fresh_every != 1
            if self._keeps:
                self._images = torch.empty_like(self._source)
                self._encoded = encoded.new_empty((len(self._source), *encoded.shape[1:]))
        if self._keeps:
            self._images[chosen], self._encoded[chosen] = images, encoded

    def _augment(self, images: Tensor) -> Tensor:
        return flip_and_shift(images, self._recipe.shift, self._rng, self._recipe.flip)


class Standardise(nn.Module):
    """Zero mean and unit deviation per channel, by the statistics of smashed data that is seen once.

    Tokens have a mean at every place, since embeddings of positions are added to them; a token before the grid, as a
    class token, has deviations of its own.

    Args:
        smashed: float (n, c, h, w), tokens (n, t, d) or vectors (n, d): the examples.
        image_size: (h, w) of the images, whose aspect the grid of the tokens has.

    >>> standardise = Standardise(torch.tensor([[1.0], [3.0]]))
    >>> standardise(torch.tensor([[2.0]]))
    tensor([[0.]])
    """

    mean: Tensor
    std: Tensor

    def __init__(self, smashed: Tensor, image_size: Sequence[int] = (1, 1)) -> None:
        super().__init__()
        if smashed.dim() == 3:
            mean = smashed.mean(0, keepdim=True)
            std = (smashed - mean).square().mean(0, keepdim=True)
            if (grid := token_grid(smashed.shape[1], image_size)) is not None:
                std[:, grid.prefix :] = std[:, grid.prefix :].mean(1, keepdim=True)
            std = std.sqrt()
        else:
            axes = channel_axes(smashed)
            mean, std = smashed.mean(axes, keepdim=True), smashed.std(axes, keepdim=True)
        self.register_buffer("mean", mean)
        # channels without variance stay zero instead of being amplified
        self.register_buffer("std", std.clamp(min=DEAD))

    def forward(self, smashed: Tensor) -> Tensor:
        """Return standardised smashed data of the same shape, clamped to `FARTHEST` deviations."""
        away = smashed - self.mean
        if away.requires_grad:
            return (away / self.std).clamp(-FARTHEST, FARTHEST)
        return away.div_(self.std).clamp_(-FARTHEST, FARTHEST)  # in place: messages of all images can be large

    def restore(self, standardised: Tensor) -> Tensor:
        """Return smashed data for standardised data, the inverse of :meth:`forward` (without the clamping)."""
        return standardised * self.std + self.mean


def held_out_split(auxiliary: AuxiliaryData, share: float, rng: torch.Generator) -> tuple[AuxiliaryData, AuxiliaryData]:
    """Auxiliary images to train on, and some that are held out to choose by.

    Args:
        auxiliary: at least two images.
        share: of the images of the target distribution, or of all where that would be too few; see
            :meth:`AuxiliaryData.hold_out`.
        rng: on the CPU.

    Returns:
        The images to train on, and the held-out ones.

    Raises:
        ConfigurationError: there are fewer than two images.

    >>> images = AuxiliaryData(torch.rand(10, 3, 8, 8), of_target=torch.ones(10, dtype=torch.bool))
    >>> train, validation = held_out_split(images, 0.2, torch.Generator().manual_seed(0))
    >>> len(train), len(validation)
    (8, 2)
    """
    if len(auxiliary) < 2:
        raise ConfigurationError("at least two auxiliary images are needed: one for training, one for validation")
    held_out = auxiliary.hold_out(share, rng)
    return auxiliary.without(held_out), auxiliary.select(held_out)


def blind_guess(view: AttackerView) -> Tensor:
    """The reconstruction of an attacker that learned nothing: one image for every victim.

    Args:
        view: of the attack.

    Returns:
        Float (n, 3, h, w) in [0, 1]: the mean of the auxiliary images that are nearest to the target distribution; grey
        where the attacker has none.

    >>> from mocosfl_priv.config import ComputeConfig
    >>> compute = Compute.resolve(ComputeConfig(device="cpu"))
    >>> view = AttackerView(smashed=torch.rand(2, 4, 4, 4), image_shape=(3, 8, 8), compute=compute, visible=frozenset())
    >>> blind_guess(view).unique()
    tensor([0.5000])
    """
    guess = view.smashed.new_full(view.image_shape, 0.5)
    if view.has(Capability.AUXILIARY_DATA) and len(view.auxiliary):
        guess = mean_image(view.auxiliary.nearest_images)
    return guess.expand(len(view.smashed), *view.image_shape).clone()


def one_cycle(spent: float) -> float:
    """Return the share of the peak learning rate after the share `spent` of the training, both in [0, 1].

    A linear warm-up, then a cosine to zero.
    """
    if spent < WARM_UP:
        return 0.04 + 0.96 * spent / WARM_UP
    return 0.5 * (1 + math.cos(math.pi * (spent - WARM_UP) / (1 - WARM_UP)))


@torch.no_grad()
def decode(network: nn.Module, smashed: Tensor) -> Tensor:
    """Return images (n, 3, h, w) in [0, 1] for `smashed`, with the network in evaluation mode."""
    was_training = network.training
    network.eval()
    decoded = torch.cat([network(_channels_last(batch)) for batch in smashed.split(BATCH_FOR_INFERENCE)])
    network.train(was_training)
    return decoded.float().clamp(0, 1).contiguous()


def in_batches(client: nn.Module) -> Callable[[Tensor], Tensor]:
    """The client as a function without gradient that takes a bounded number of images at a time.

    Args:
        client: images (n, 3, h, w) to smashed data.

    Returns:
        A function from images (n, 3, h, w) to smashed data (n, *smashed_shape).

    >>> in_batches(nn.Conv2d(3, 4, 1))(torch.rand(2, 3, 8, 8)).shape
    torch.Size([2, 4, 8, 8])
    """

    @torch.no_grad()
    def encode(images: Tensor) -> Tensor:
        return torch.cat([client(batch) for batch in images.split(BATCH_FOR_INFERENCE)])

    return encode


def flip_and_shift(images: Tensor, shift: int, rng: torch.Generator, flip: bool = True) -> Tensor:
    """Mirror each image with probability one half and move it by up to `shift` pixels; edges are reflected."""
    n, _, height, width = images.shape
    if flip:
        flips = (torch.rand(n, generator=rng) < 0.5).to(images.device)
        images = torch.where(flips.view(-1, 1, 1, 1), images.flip(3), images)
    if shift == 0:
        return images
    padded = F.pad(images, (shift,) * 4, mode="reflect")
    offsets = torch.randint(0, 2 * shift + 1, (n, 2), generator=rng).to(images.device)
    rows = (offsets[:, :1] + torch.arange(height, device=images.device))[:, None, :, None]
    columns = (offsets[:, 1:] + torch.arange(width, device=images.device))[:, None, None, :]
    batch = torch.arange(n, device=images.device)[:, None, None, None]
    channels = torch.arange(images.shape[1], device=images.device)[None, :, None, None]
    return padded[batch, channels, rows, columns]


def _channels_last(smashed: Tensor) -> Tensor:
    return smashed.contiguous(memory_format=torch.channels_last) if smashed.dim() == 4 else smashed


def _identity(smashed: Tensor) -> Tensor:
    return smashed
