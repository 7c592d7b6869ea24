"""TAResSFL: target-aware ResSFL (Li et al., ICLR 2023; ResSFL: Li et al., CVPR 2022)."""

from __future__ import annotations

from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from mocosfl_priv import ConfigurationError, DefenderContext, Defense, ModelConfig, PreparedModel, RunFailedError
from mocosfl_priv.compute import Compute
from mocosfl_priv.config import parse_bottleneck
from mocosfl_priv.evaluation.image_metrics import ssim_zeropad
from mocosfl_priv.models.decoder import NormName, build_decoder, check_grammar
from mocosfl_priv.seeding import generator, global_seed
from mocosfl_priv.training.hooks import NoHooks
from mocosfl_priv.training.mocosfl import train_mocosfl
from mocosfl_priv.training.sampling import ClientBatch, total_steps
from mocosfl_priv.training.state import load_optimiser_state, optimiser_state, under, within

DECODER_LEARNING_RATE = 1e-3
SMALLEST_BATCH_FOR_BATCH_NORM = 20  # the published decoder turns to GroupNorm below
DECODER_DECAY = 0.2
DECODER_MILESTONES = (0.3, 0.6, 0.8)  # of the pre-training: epochs 60, 120, 160 of 200
# The expert is trained by one party: what concerns many clients and their traffic has no meaning for it.
ONE_CLIENT = {"clients": 1, "pool": None, "heterogeneity": None, "client_learning_rate": None, "replay": None,
              "divergence_aware": None}  # fmt: skip


class TAResSFL(Defense):
    """Clients receive a frozen model that was trained, at the server, against a simulated inversion attacker.

    The server pre-trains an expert on source images and its share of target images, with MoCo's loss plus
    alpha * max(0, SSIM - threshold) of a decoder that is trained along. Clients take the expert's client side and
    keep it: no gradient returns, nothing is synchronised; only the server side goes on learning.

    alpha, threshold: strength of the regulariser, and the SSIM below which it is content.
    layer: the bottleneck. decoder: the simulated attacker, in the decoder grammar.
    epochs, batch_size, learning_rate: of the expert's pre-training; an epoch is a pass over source plus target.
    transfer_learning_rate: of the server after the transfer.
    server_start: the server goes on from the expert's server side, or starts afresh.
    """

    uses_target_data = True

    def __init__(
        self,
        alpha: Annotated[float, Field(ge=0)] = 2.0,
        threshold: Annotated[float, Field(ge=-1, le=1)] = 0.6,
        layer: str = "C4S2",
        decoder: str = "res_normN4C64",
        epochs: Annotated[int, Field(ge=1)] = 200,
        batch_size: Annotated[int, Field(ge=2)] = 128,
        learning_rate: Annotated[float, Field(gt=0)] = 0.06,
        transfer_learning_rate: Annotated[float, Field(gt=0)] = 0.001,
        server_start: Literal["expert", "scratch"] = "expert",
    ) -> None:
        parse_bottleneck(layer)
        check_grammar(decoder)
        self.alpha = alpha
        self.threshold = threshold
        self.layer = layer
        self.decoder = decoder
        self.epochs = epochs
        self.batch_size = batch_size
        self.learning_rate = learning_rate
        self.transfer_learning_rate = transfer_learning_rate
        self.server_start = server_start

    @property
    def simulator(self) -> str:
        return self.decoder

    @property
    def freezes_clients(self) -> bool:
        return True

    def architecture(self, model: ModelConfig) -> ModelConfig:
        return model.model_copy(update={"bottleneck": self.layer})

    def planned_steps(self, context: DefenderContext) -> int:
        if len(context.source_images) + len(context.target_images) == 0:
            raise ConfigurationError("taressfl: the defender has neither source nor target images to pre-train on")
        return total_steps(len(context.source_images) + len(context.target_images), self.batch_size, self.epochs)

    def prepare(self, context: DefenderContext) -> PreparedModel:
        """Pre-train the expert; its client side is then frozen."""
        steps = self.planned_steps(context)
        expert = context.build_model()
        batches = HalfTargetBatches(
            context.target_images, context.source_images, self.batch_size, generator(context.seed, "expert batches")
        )
        attacker = SimulatedAttacker(self, expert.smashed_shape, expert.image_shape, steps, context)
        settings = context.training.model_copy(update={**ONE_CLIENT, "epochs": self.epochs})
        context.progress.begin("expert", steps)
        try:
            trained = train_mocosfl(
                expert, batches, settings, steps=steps, compute=context.compute, seed=context.seed,
                hooks=attacker, learning_rate=self.learning_rate, checkpoints=context.checkpoints,
                progress=context.progress,
            )  # fmt: skip
        except RunFailedError as error:
            raise RunFailedError(f"TAResSFL's expert: {error}") from error
        finally:
            context.progress.end()
        if self.server_start == "scratch":
            fresh = context.build_model()
            expert.trunk, expert.projector = fresh.trunk, fresh.projector
        return PreparedModel(
            expert,
            frozen_client=True,
            learning_rate=self.transfer_learning_rate,
            earlier_seconds=trained.earlier_seconds,
        )


class HalfTargetBatches:
    """Batches of one "client", half target images (over-sampled) and half source images; all source if no target."""

    clients = 1

    def __init__(self, target: Tensor, source: Tensor, batch_size: int, rng: torch.Generator) -> None:
        self.images_per_epoch = len(target) + len(source)
        self._parts = [(source, batch_size - batch_size // 2), (target, batch_size // 2)]
        if len(target) == 0:
            self._parts = [(source, batch_size)]
        if len(source) == 0:
            self._parts = [(target, batch_size)]
        self._rng = rng

    def next(self) -> ClientBatch:
        """The next batch, drawn with replacement: a one-percent target share is repeated within a batch."""
        chosen = [images[torch.randint(len(images), (count,), generator=self._rng)] for images, count in self._parts]
        images = torch.cat(chosen)
        return ClientBatch(torch.zeros(1, dtype=torch.long), (len(images),), images)

    def state(self) -> dict[str, Tensor]:
        """The generator's state; nothing else decides about the next batch."""
        return {"generator": self._rng.get_state()}

    def load_state(self, state: dict[str, Tensor]) -> None:
        """Go on where :meth:`state` was taken."""
        self._rng.set_state(state["generator"])


class SimulatedAttacker(NoHooks):
    """The decoder that the expert is trained against, as a client loss."""

    def __init__(
        self,
        defense: TAResSFL,
        smashed_shape: tuple[int, ...],
        image_shape: tuple[int, int, int],
        steps: int,
        context: DefenderContext,
    ) -> None:
        self._alpha, self._threshold = defense.alpha, defense.threshold
        self._compute: Compute = context.compute
        norm: NormName = "batch" if defense.batch_size >= SMALLEST_BATCH_FOR_BATCH_NORM else "group"
        with global_seed(context.seed, "simulated attacker"):
            self.decoder: nn.Module = build_decoder(defense.decoder, smashed_shape, image_shape, norm)
        self.decoder.to(context.compute.device)
        self._optimiser = torch.optim.Adam(self.decoder.parameters(), lr=DECODER_LEARNING_RATE)
        self._schedule = torch.optim.lr_scheduler.MultiStepLR(
            self._optimiser, [max(1, round(share * steps)) for share in DECODER_MILESTONES], gamma=DECODER_DECAY
        )

    def client_loss(self, images: Tensor, smashed: Tensor) -> Tensor:
        """One Adam step of the decoder on -SSIM, then alpha * max(0, SSIM - threshold) for the client."""
        self.decoder.requires_grad_(True)
        self._optimiser.zero_grad(set_to_none=True)
        (-self._similarity(images, smashed.detach())).backward()
        self._optimiser.step()
        self._schedule.step()
        self.decoder.requires_grad_(False)  # the client's gradient passes through the decoder, not into it
        return self._alpha * (self._similarity(images, smashed) - self._threshold).clamp(min=0)

    def state(self) -> dict[str, Tensor]:
        """Decoder and Adam's moments; the schedule follows from the number of steps."""
        return {
            **under("decoder", self.decoder.state_dict()),
            **under("adam", optimiser_state(self._optimiser)),
            "steps": torch.tensor(self._schedule.last_epoch),
        }

    def load_state(self, state: dict[str, Tensor]) -> None:
        """Go on where :meth:`state` was taken."""
        self.decoder.load_state_dict(within(state, "decoder"))
        load_optimiser_state(self._optimiser, within(state, "adam"))
        steps = int(state["steps"])
        passed = sum(1 for milestone in self._schedule.milestones.elements() if milestone <= steps)
        self._schedule.last_epoch = steps
        self._optimiser.param_groups[0]["lr"] = DECODER_LEARNING_RATE * DECODER_DECAY**passed

    def _similarity(self, images: Tensor, smashed: Tensor) -> Tensor:
        with self._compute.autocast():
            decoded = self.decoder(smashed)
        return ssim_zeropad(decoded.float(), images).mean()
