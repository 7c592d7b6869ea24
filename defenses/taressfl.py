"""TAResSFL: target-aware ResSFL (Li et al., ICLR 2023; ResSFL: Li et al., CVPR 2022)."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from mocosfl_priv import DefenderContext, Defense, ModelConfig, PreparedModel
from mocosfl_priv.config import parse_bottleneck
from mocosfl_priv.expert import expert_steps, train_expert
from mocosfl_priv.models.decoder import check_grammar
from mocosfl_priv.simulated_attacker import SimulatedAttacker


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

    def architecture(self, model: ModelConfig) -> ModelConfig:
        return model.model_copy(update={"bottleneck": self.layer})

    def planned_steps(self, context: DefenderContext) -> int:
        return expert_steps(context.target_images, context.source_images, self.batch_size, self.epochs)

    def prepare(self, context: DefenderContext) -> PreparedModel:
        """Pre-train the expert; its client side is then frozen."""
        expert = context.build_model()
        attacker = SimulatedAttacker(
            [self.decoder], expert.smashed_shape, expert.image_shape, alpha=self.alpha, threshold=self.threshold,
            steps=self.planned_steps(context), batch_size=self.batch_size, compute=context.compute, seed=context.seed,
        )  # fmt: skip
        trained = train_expert(
            expert, context.target_images, context.source_images, attacker, context,
            batch_size=self.batch_size, epochs=self.epochs, learning_rate=self.learning_rate,
        )  # fmt: skip
        if self.server_start == "scratch":
            fresh = context.build_model()
            expert.trunk, expert.projector = fresh.trunk, fresh.projector
        return PreparedModel(
            expert,
            frozen_client=True,
            learning_rate=self.transfer_learning_rate,
            earlier_seconds=trained.earlier_seconds,
        )
