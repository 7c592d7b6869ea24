"""Noise made against a surrogate of the attacker (after Miyato et al., TPAMI 2019, and adversarial-noise defenses)."""

from __future__ import annotations

from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor

from mocosfl_priv import DefenderContext, Defense, MessageKind, PreparedModel, derive_seed
from mocosfl_priv.defending import SimulatedAttacker, check_decoders, gaussian_like
from mocosfl_priv.inversion import check_architecture


class AdversarialNoise(Defense):
    """Every message moves to where a surrogate decoder's reconstruction changes most.

    `protect` gets messages without their images. The direction is therefore the virtual adversarial one of Miyato et
    al., which needs no image: power iteration on the distance between the surrogate's reconstructions of the message
    and of the moved message. The surrogate is trained while the clients are, on the messages as they are sent, with
    their noise, as an attacker's decoder would be. One surrogate learns from the images of all clients, as if each
    client had its own and these were averaged in every step; that traffic is not counted.

    The move is a function of the message. In Miyato et al. the iteration starts at random, and the sign of the
    direction with it: the mean of k messages of an image would then keep 1 / sqrt(k) of the move only. Here all
    iterations start from one direction, and the move goes against the message's own part along the direction that was
    found. So an attacker gains nothing by averaging; it may still learn to take the move off.

    strength: length of the move, as a share of the message's own. decoder: the surrogate, in the decoder grammar.
    steps: of power iteration.
    """

    def __init__(
        self,
        strength: Annotated[float, Field(ge=0)] = 0.5,
        decoder: str = "res_normN0C16",
        steps: Annotated[int, Field(ge=1)] = 2,
    ) -> None:
        check_architecture(decoder)
        self.strength = strength
        self.decoder = decoder
        self.steps = steps

    @property
    def simulator(self) -> str:
        return self.decoder

    def check(self, context: DefenderContext) -> None:
        check_decoders([self.decoder], context)

    def prepare(self, context: DefenderContext) -> PreparedModel | None:
        model = context.build_model()
        self._compute = context.compute
        rng = torch.Generator().manual_seed(derive_seed(context.seed, "power iteration"))
        start = gaussian_like(torch.empty(model.smashed_shape), rng)
        self._start = start.to(context.compute.device)  # of all messages' power iterations
        self._surrogate = SimulatedAttacker(
            [self.decoder], model.smashed_shape, model.image_shape,
            alpha=0.0, threshold=0.0, steps=context.training_passes, batch_size=1,  # no norm over a batch
            compute=context.compute, seed=context.seed,
        )  # fmt: skip
        return None

    def joint_loss(self, images: Tensor, smashed: Tensor) -> Tensor | None:
        """The surrogate learns; clients do not pay."""
        self._surrogate.learn(images, self._sent)
        return None

    def protect(self, smashed: Tensor, rng: torch.Generator, kind: MessageKind = MessageKind.INFERENCE) -> Tensor:
        moved = smashed + self._perturbation(smashed.detach())
        if kind is MessageKind.QUERY:
            self._sent = moved.detach()  # what the surrogate will learn from
        return moved

    @torch.enable_grad()
    def _perturbation(self, smashed: Tensor) -> Tensor:
        """Of each message (n, ...), `strength` times as long as it."""
        (decoder,) = self._surrogate.decoders
        radius = self.strength * _length(smashed)
        direction = self._start.to(smashed.dtype).expand_as(smashed)
        with torch.no_grad():
            clean = self._decoded(decoder, smashed)
        for _ in range(self.steps):
            move = (radius * direction / _length(direction)).requires_grad_(True)
            change = (self._decoded(decoder, smashed + move) - clean).square().sum()
            (direction,) = torch.autograd.grad(change, move)
        along = (direction * smashed).flatten(1).sum(1).view(-1, 1, 1, 1)
        against = torch.where(along > 0, -1.0, 1.0)
        return radius * against * direction / _length(direction)

    def _decoded(self, decoder: torch.nn.Module, smashed: Tensor) -> Tensor:
        with self._compute.autocast():
            return decoder(smashed).float()

    def state(self) -> dict[str, Tensor]:
        return self._surrogate.state()

    def load_state(self, state: dict[str, Tensor]) -> None:
        self._surrogate.load_state(state)


def _length(messages: Tensor) -> Tensor:
    """Euclidean, of each message (n, c, h, w); shape (n, 1, 1, 1). Never quite zero."""
    return messages.flatten(1).norm(dim=1).clamp(min=1e-20).view(-1, 1, 1, 1)
