"""ResSFL: a resistant client by attacker-aware training and transfer (Li et al., CVPR 2022)."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from pydantic import Field
from torch import Tensor

from mocosfl_priv import ConfigurationError, DefenderContext, PreparedModel, SplitModel
from mocosfl_priv.defending import (
    DECODER_DECAY,
    DECODER_MILESTONES,
    AttackerAware,
    Checkpoint,
    Mode,
    Objective,
    SimulatedAttacker,
    decoder_set,
)
from mocosfl_priv.plugins import PoolShape, under, within


class ResSFL(AttackerAware):
    """Clients start from an expert that was trained against a simulated attacker, and are trained against one too.

    The expert is trained at the server on source images only. Clients take its client side over and go on at a low
    rate, while a small decoder learns along and they pay alpha * max(0, SSIM - threshold) for what it sees.

    Ours is an adaptation: the paper trains classifiers and we MoCo, for the expert and for the clients. And one decoder
    learns from all clients, as if theirs were averaged in every step, where the public code gives each its own and
    leaves averaging to an option. The penalty is computed in one piece as well: BatchNorm in the decoder (20 images or
    more), the colours of `objective: mse+ssim` and the choice of the strongest decoder look at the images of all
    clients, which no real client has.

    during_training: whether clients pay while they learn; without it this is a plain transfer.
    training_decoder: whom they pay for, in the decoder grammar, several in a list: small, since clients train it.
    interval: it learns in every so many-th pass of a step; clients pay in all.
    preset: `paper` changes the defaults of decoder, penalty_mode and checkpoint to what ResSFL's public code does. Its
    expert is a classifier, and its checkpoint the one with the best test accuracy; here it is the best kNN.
    penalty_mode: of the decoders of both trainings while the penalty is computed: train (if left out) or eval (preset).
    batch_size: of the expert's training, in images.
    epochs: of the expert; 0 for none: clients then start untrained, and learn at the rates of the configuration.
    All else: see :class:`AttackerAware`; the schedule of decoders applies to both trainings, in shares of each.
    """

    def __init__(
        self,
        preset: Literal["paper"] | None = None,
        alpha: Annotated[float, Field(ge=0)] = 0.3,
        threshold: Annotated[float, Field(ge=-1, le=1)] = 0.5,
        layer: str = "noReLUC8S1",
        decoder: str | list[str] | None = None,
        penalty_mode: Mode | None = None,
        objective: Objective = "ssim",
        refresh: Annotated[int, Field(ge=0)] = 0,
        decoder_milestones: tuple[Annotated[float, Field(gt=0, lt=1)], ...] = DECODER_MILESTONES,
        decoder_decay: Annotated[float, Field(gt=0, le=1)] = DECODER_DECAY,
        epochs: Annotated[int, Field(ge=0)] = 200,
        batch_size: Annotated[int, Field(ge=2)] = 128,
        checkpoint: Checkpoint | None = None,
        learning_rate: Annotated[float, Field(gt=0)] = 0.05,
        transfer: Literal["frozen", "low_lr"] = "low_lr",
        transfer_learning_rate: Annotated[float, Field(gt=0)] = 0.05,
        client_learning_rate: Annotated[float, Field(gt=0)] = 0.005,
        server_start: Literal["expert", "scratch"] = "expert",
        expert: Path | None = None,
        during_training: bool = True,
        training_decoder: str | list[str] = "conv_normN0C16",
        interval: Annotated[int, Field(ge=1)] = 5,
    ) -> None:
        self.training_decoders = decoder_set(training_decoder)
        self.during_training = during_training
        self.interval = interval
        self.has_expert = epochs > 0 or expert is not None
        self._live: SimulatedAttacker | None = None
        self._passes = 0
        if not during_training and not self.has_expert:
            raise ConfigurationError("epochs: without an expert, clients must be trained against somebody")
        super().__init__(
            preset=preset, alpha=alpha, threshold=threshold, layer=layer, decoder=decoder, penalty_mode=penalty_mode,
            objective=objective, refresh=refresh, decoder_milestones=decoder_milestones, decoder_decay=decoder_decay,
            epochs=epochs, batch_size=batch_size, checkpoint=checkpoint, learning_rate=learning_rate,
            transfer=transfer, transfer_learning_rate=transfer_learning_rate,
            client_learning_rate=client_learning_rate, server_start=server_start, expert=expert,
        )  # fmt: skip
        if during_training and self.freezes_clients:
            raise ConfigurationError(
                "during_training: frozen clients learn nothing; use transfer: low_lr, or set false"
            )

    @property
    def opponents(self) -> list[list[str]]:
        pre_training = [self.decoders] if self.has_expert else []
        return [*pre_training, self.training_decoders] if self.during_training else pre_training

    def planned_steps(self, context: DefenderContext) -> int:
        return super().planned_steps(context) if self.has_expert else 0

    def expert_document(self, context: DefenderContext) -> dict[str, Any] | None:
        return super().expert_document(context) if self.has_expert else None

    def prepare(self, context: DefenderContext) -> PreparedModel:
        prepared = super().prepare(context) if self.has_expert else PreparedModel(context.build_model())
        self._oppose(prepared.model, context)
        return prepared

    def restore(self, context: DefenderContext) -> None:
        self._oppose(context.build_model(), context)

    def _oppose(self, model: SplitModel, context: DefenderContext) -> None:
        """Begin with the attacker of the training itself, where there is one."""
        if self.during_training:
            training = context.training
            self._live = self.attacker(
                self.training_decoders, model, -(-context.training_passes // self.interval), training.epochs,
                min(PoolShape.of(training).images, context.compute.rows_per_pass), context,
            )  # fmt: skip

    def joint_loss(self, images: Tensor, smashed: Tensor) -> Tensor | None:
        if self._live is None:
            return None
        if self._passes % self.interval == 0:
            self._live.learn(images, smashed)
        self._passes += 1
        return self._live.penalty(images, smashed)

    def state(self) -> dict[str, Tensor]:
        if self._live is None:
            return {}
        return {"passes": torch.tensor(self._passes), **under("attacker", self._live.state())}

    def load_state(self, state: dict[str, Tensor]) -> None:
        if self._live is not None:
            self._passes = int(state["passes"])
            self._live.load_state(within(state, "attacker"))
