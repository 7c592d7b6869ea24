"""The attacker that a defense trains against: decoders that train together with the client (ResSFL, CVPR 2022)."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from typing import Literal

import torch
from torch import Tensor, nn

from mocosfl_priv.evaluation.image_metrics import ssim_zeropad
from mocosfl_priv.inversion.decoders import NormName, build_decoder
from mocosfl_priv.inversion.own_decoder import check_own_decoder
from mocosfl_priv.models.custom_backbone import is_own
from mocosfl_priv.models.modes import in_eval_mode
from mocosfl_priv.plugins import DefenderContext
from mocosfl_priv.runtime.compute import Compute
from mocosfl_priv.runtime.seeding import global_seed
from mocosfl_priv.training.hooks import NoHooks
from mocosfl_priv.training.state import load_optimiser_state, optimiser_state, under, within

Objective = Literal["ssim", "mse+ssim"]
Mode = Literal["train", "eval"]

DECODER_LEARNING_RATE = 1e-3
SMALLEST_BATCH_FOR_BATCH_NORM = 20  # below, the published decoder uses GroupNorm
DECODER_DECAY = 0.2
DECODER_MILESTONES = (0.3, 0.6, 0.8)  # shares of the training: epochs 60, 120, 160 of 200
SMALLEST_SPREAD = 1e-4  # lower limit for the variance of a batch's colours, which uniform images would make zero


class SimulatedAttacker(NoHooks):
    """Decoders from smashed data to images, trained by Adam for the best score; their success is a loss for the client.

    The simulated attacker of Li et al., "ResSFL: A Resistance Transfer Framework for Defending Model Inversion Attack
    in Split Federated Learning", CVPR 2022.

    Args:
        decoders: Architectures of one or several decoders, in the decoder grammar; see
            :func:`mocosfl_priv.build_decoder`.
        smashed_shape: (c, h, w) of smashed data.
        image_shape: (3, h, w) of images.
        alpha: Weight of the client's loss, alpha * max(0, score - threshold) for the strongest decoder.
        threshold: Score below which the client has no loss.
        steps: Number of calls of :meth:`learn` in the training.
        batch_size: Images per call, which determines the decoders' norm layers.
        compute: Device and precision.
        seed: Seed of the decoders' weights.
        objective: Definition of the score, see :func:`score`.
        refresh: Number of steps after which, again and again, the decoder that has learned longest is restarted with
            new weights and the full learning rate; 0 for never. Otherwise clients adapt to decoders whose rate has
            decayed, while a real attacker starts after training. One decoder is restarted at a time, so that the
            others keep up the pressure.
        milestones: Shares of `steps` after which a decoder's learning rate is multiplied by `decay`.
        decay: See `milestones`.
        penalty_mode: Mode of the decoders while :meth:`penalty` is computed. In train mode, a BatchNorm normalises
            with the statistics of this batch, and adds them to its running statistics a second time. In eval mode, it
            normalises with its running statistics, as in the released code, and the penalty leaves them as they are.
            Decoders without BatchNorm and Dropout compute the same in both modes.

    >>> from mocosfl_priv.config import ComputeConfig
    >>> attacker = SimulatedAttacker(
    ...     ["res_normN0C8"], (4, 8, 8), (3, 16, 16), alpha=1.0, threshold=-1.0, steps=10, batch_size=2,
    ...     compute=Compute.resolve(ComputeConfig(device="cpu", precision="float32")), seed=0,
    ... )
    >>> float(attacker.client_loss(torch.rand(2, 3, 16, 16), torch.rand(2, 4, 8, 8))) > 0
    True
    """

    def __init__(
        self,
        decoders: Sequence[str],
        smashed_shape: Sequence[int],
        image_shape: Sequence[int],
        *,
        alpha: float,
        threshold: float,
        steps: int,
        batch_size: int,
        compute: Compute,
        seed: int,
        objective: Objective = "ssim",
        refresh: int = 0,
        milestones: Sequence[float] = DECODER_MILESTONES,
        decay: float = DECODER_DECAY,
        penalty_mode: Mode = "train",
    ) -> None:
        self._penalty_mode = penalty_mode
        self._alpha, self._threshold, self._objective = alpha, threshold, objective
        self._milestones = [max(1, round(share * steps)) for share in milestones]
        self._decay = decay
        self._refresh = refresh
        self._compute = compute
        self._seed = seed
        norm: NormName = "batch" if batch_size >= SMALLEST_BATCH_FOR_BATCH_NORM else "group"
        self._blueprints = [(decoder, smashed_shape, image_shape, norm) for decoder in decoders]
        with global_seed(seed, "simulated attacker"):
            self.decoders = [self._built(blueprint) for blueprint in self._blueprints]
        self._optimisers = [_adam(decoder) for decoder in self.decoders]
        self._ages = [0] * len(self.decoders)  # number of steps that each decoder has learned
        self._steps_taken = 0

    def client_loss(self, images: Tensor, smashed: Tensor) -> Tensor:
        """Train the decoders for one step, then return :meth:`penalty`."""
        self.learn(images, smashed)
        return self.penalty(images, smashed)

    def learn(self, images: Tensor, smashed: Tensor) -> None:
        """Take one Adam step with every decoder, in train mode; no gradient reaches `smashed`."""
        if self._refresh and self._steps_taken and self._steps_taken % self._refresh == 0:
            self._begin_afresh(self._ages.index(max(self._ages)))
        for index, (decoder, optimiser) in enumerate(zip(self.decoders, self._optimisers, strict=True)):
            passed = sum(milestone <= self._ages[index] for milestone in self._milestones)
            optimiser.param_groups[0]["lr"] = DECODER_LEARNING_RATE * self._decay**passed
            decoder.requires_grad_(True)
            optimiser.zero_grad(set_to_none=True)
            (-self.score(decoder, images, smashed.detach())).backward()
            optimiser.step()
            self._ages[index] += 1
        self._steps_taken += 1

    def penalty(self, images: Tensor, smashed: Tensor) -> Tensor:
        """Return the client's loss, a scalar, for the decoder with the highest score on this batch.

        The maximum is used because an attacker uses the best decoder. A mean would drop, and lose its gradient,
        whenever another decoder is weak or has just been restarted.
        """
        for decoder in self.decoders:
            decoder.requires_grad_(False)  # the client's gradient passes through decoders, but does not change them
        with in_eval_mode(*self.decoders) if self._penalty_mode == "eval" else nullcontext():
            scores = [self.score(decoder, images, smashed) for decoder in self.decoders]
        strongest = scores[int(torch.stack(scores).argmax())] if len(scores) > 1 else scores[0]
        return self._alpha * (strongest - self._threshold).clamp(min=0)

    def score(self, decoder: nn.Module, images: Tensor, smashed: Tensor) -> Tensor:
        """Return the score of `decoder` for reconstructing `images` from `smashed`, a scalar; see :func:`score`."""
        with self._compute.autocast():
            decoded = decoder(smashed)
        return score(decoded.float(), images, self._objective)

    def state(self) -> dict[str, Tensor]:
        """Return the decoders' weights, Adam's moments, and numbers of steps, from which learning rates follow."""
        state = {"steps": torch.tensor(self._steps_taken), "ages": torch.tensor(self._ages)}
        for index, (decoder, optimiser) in enumerate(zip(self.decoders, self._optimisers, strict=True)):
            state |= under(f"decoder.{index}", decoder.state_dict())
            state |= under(f"adam.{index}", optimiser_state(optimiser))
        return state

    def load_state(self, state: dict[str, Tensor]) -> None:
        """Restore what :meth:`state` returned."""
        self._steps_taken, self._ages = int(state["steps"]), state["ages"].tolist()
        for index, (decoder, optimiser) in enumerate(zip(self.decoders, self._optimisers, strict=True)):
            decoder.load_state_dict(within(state, f"decoder.{index}"))
            load_optimiser_state(optimiser, within(state, f"adam.{index}"))

    def _begin_afresh(self, index: int) -> None:
        with global_seed(self._seed, "simulated attacker", "begin afresh", self._steps_taken):
            self.decoders[index] = self._built(self._blueprints[index])
        self._optimisers[index] = _adam(self.decoders[index])
        self._ages[index] = 0

    def _built(self, blueprint: tuple[str, Sequence[int], Sequence[int], NormName]) -> nn.Module:
        return build_decoder(*blueprint).to(self._compute.device)


def check_decoders(decoders: Sequence[str], context: DefenderContext) -> None:
    """Refuse decoders of one's own that do not fit the model of `context`; a defense calls it in `check`.

    Args:
        decoders: names, or ``file.py:function`` each.
        context: of the defense.

    Raises:
        ConfigurationError: see :func:`mocosfl_priv.inversion.check_own_decoder`.

    >>> from mocosfl_priv.plugins.defense_checks import small_context
    >>> from mocosfl_priv.plugins import Defense
    >>> from mocosfl_priv.config import ComputeConfig
    >>> compute = Compute.resolve(ComputeConfig(device="cpu", precision="float32"))
    >>> check_decoders(["res_normN1C16"], small_context(Defense(), compute))
    """
    own = [decoder for decoder in decoders if is_own(decoder)]
    if own:
        model = context.build_model()
        for decoder in own:
            check_own_decoder(decoder, model.smashed_shape, model.image_shape)


def score(decoded: Tensor, images: Tensor, objective: Objective) -> Tensor:
    """Return the score of reconstructions over a batch: a scalar, 1 for perfect ones, and lower otherwise.

    With objective ``ssim`` it is the mean SSIM with zero padding, as published. With ``mse+ssim`` it is the mean of
    that and of 1 - MSE / spread, where spread is the MSE of guessing the batch's mean colour. SSIM alone is hardly
    sensitive to colour and brightness, which also identify images. `decoded` is not clamped for the MSE, so that values
    out of range have a gradient.
    """
    similarity = ssim_zeropad(decoded, images).mean()
    if objective == "ssim":
        return similarity
    spread = (images - images.mean((0, 2, 3), keepdim=True)).square().mean().clamp(min=SMALLEST_SPREAD)
    return (similarity + 1 - (decoded - images).square().mean() / spread) / 2


def _adam(decoder: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.Adam(decoder.parameters(), lr=DECODER_LEARNING_RATE)
