"""The attacker that a defense trains against: decoders that learn along, and what they cost a client (ResSFL, 2022)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from mocosfl_priv.compute import Compute
from mocosfl_priv.evaluation.image_metrics import ssim_zeropad
from mocosfl_priv.models.decoder import NormName, build_decoder
from mocosfl_priv.seeding import global_seed
from mocosfl_priv.training.hooks import NoHooks
from mocosfl_priv.training.state import load_optimiser_state, optimiser_state, under, within

DECODER_LEARNING_RATE = 1e-3
SMALLEST_BATCH_FOR_BATCH_NORM = 20  # the published decoder turns to GroupNorm below
DECODER_DECAY = 0.2
DECODER_MILESTONES = (0.3, 0.6, 0.8)  # of the training: epochs 60, 120, 160 of 200


class SimulatedAttacker(NoHooks):
    """Decoders from smashed data to images, each trained by Adam on -SSIM, as a loss for the client.

    decoders: one or several, in the decoder grammar. alpha, threshold: the client pays
        alpha * max(0, SSIM - threshold) for the strongest decoder.
    steps: how often it will :meth:`learn`; its rate decays along them. batch_size: images in a call, which decides
        about the decoders' norms.
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
    ) -> None:
        self._alpha, self._threshold = alpha, threshold
        self._compute = compute
        norm: NormName = "batch" if batch_size >= SMALLEST_BATCH_FOR_BATCH_NORM else "group"
        with global_seed(seed, "simulated attacker"):
            self.decoders: list[nn.Module] = [
                build_decoder(decoder, smashed_shape, image_shape, norm) for decoder in decoders
            ]
        self._optimisers: list[torch.optim.Optimizer] = []
        for decoder in self.decoders:
            decoder.to(compute.device)
            self._optimisers.append(torch.optim.Adam(decoder.parameters(), lr=DECODER_LEARNING_RATE))
        self._milestones = [max(1, round(share * steps)) for share in DECODER_MILESTONES]
        self._steps_taken = 0

    def client_loss(self, images: Tensor, smashed: Tensor) -> Tensor:
        """The decoders learn, then the client pays."""
        self.learn(images, smashed)
        return self.penalty(images, smashed)

    def learn(self, images: Tensor, smashed: Tensor) -> None:
        """One Adam step of every decoder; nothing flows back to `smashed`."""
        passed = sum(milestone <= self._steps_taken for milestone in self._milestones)
        for decoder, optimiser in zip(self.decoders, self._optimisers, strict=True):
            decoder.requires_grad_(True)
            optimiser.param_groups[0]["lr"] = DECODER_LEARNING_RATE * DECODER_DECAY**passed
            optimiser.zero_grad(set_to_none=True)
            (-self.score(decoder, images, smashed.detach())).backward()
            optimiser.step()
        self._steps_taken += 1

    def penalty(self, images: Tensor, smashed: Tensor) -> Tensor:
        """What the client pays for what the strongest decoder sees; a scalar whose gradient passes through that one.

        It is the strongest on this batch that counts: an attacker takes his best decoder, and a mean would fall, and
        its gradient end, whenever one of the others is weak.
        """
        for decoder in self.decoders:
            decoder.requires_grad_(False)  # the client's gradient passes through a decoder, not into it
        scores = [self.score(decoder, images, smashed) for decoder in self.decoders]
        strongest = scores[int(torch.stack(scores).argmax())] if len(scores) > 1 else scores[0]
        return self._alpha * (strongest - self._threshold).clamp(min=0)

    def score(self, decoder: nn.Module, images: Tensor, smashed: Tensor) -> Tensor:
        """How well `decoder` does, higher for better reconstructions: mean SSIM, a scalar."""
        with self._compute.autocast():
            decoded = decoder(smashed)
        return ssim_zeropad(decoded.float(), images).mean()

    def state(self) -> dict[str, Tensor]:
        """Decoders and Adam's moments; rates follow from the number of steps."""
        state = {"steps": torch.tensor(self._steps_taken)}
        for index, (decoder, optimiser) in enumerate(zip(self.decoders, self._optimisers, strict=True)):
            state |= under(f"decoder.{index}", decoder.state_dict())
            state |= under(f"adam.{index}", optimiser_state(optimiser))
        return state

    def load_state(self, state: dict[str, Tensor]) -> None:
        """Go on where :meth:`state` was taken."""
        self._steps_taken = int(state["steps"])
        for index, (decoder, optimiser) in enumerate(zip(self.decoders, self._optimisers, strict=True)):
            decoder.load_state_dict(within(state, f"decoder.{index}"))
            load_optimiser_state(optimiser, within(state, f"adam.{index}"))
