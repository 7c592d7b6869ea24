"""Decoder attack: learn to invert the client from pairs of images and their smashed data (He et al., ACSAC 2019)."""

from __future__ import annotations

import copy
from typing import Annotated

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from mocosfl_priv import Attack, AttackerView, Budget, Capability, ConfigurationError
from mocosfl_priv.evaluation.image_metrics import mse, ssim_zeropad
from mocosfl_priv.models.decoder import NormName, build_decoder, check_grammar
from mocosfl_priv.seeding import derive_seed

BATCH_FOR_INFERENCE = 128
STATISTICS_IMAGES = 1024


class DecoderAttack(Attack):
    """Train a decoder on the attacker's auxiliary images, sent through the client and its defense.

    The smashed data is standardised per channel; auxiliary images are flipped and shifted, and sent anew for every
    step, so that a randomised defense is met with fresh randomness (the adaptive attack). The epoch is chosen on
    auxiliary images held out from training, of the target distribution where the attacker has such.

    architecture: in the decoder grammar. epochs: passes over the auxiliary images. learning_rate: peak of a
    one-cycle schedule. ssim_weight: loss = MSE + ssim_weight * (1 - SSIM). norm: of the decoder. shift: largest shift
    of an auxiliary image in pixels. validation_share: of the auxiliary images, held out.
    """

    needs = frozenset({Capability.QUERY, Capability.AUXILIARY_DATA})

    def __init__(
        self,
        architecture: str = "res_normN4C64",
        epochs: Annotated[int, Field(ge=1)] = 30,
        batch_size: Annotated[int, Field(ge=1)] = 32,
        learning_rate: Annotated[float, Field(gt=0)] = 5e-3,
        ssim_weight: Annotated[float, Field(ge=0)] = 0.1,
        norm: NormName = "group",
        shift: Annotated[int, Field(ge=0)] = 4,
        validation_share: Annotated[float, Field(gt=0, lt=1)] = 0.1,
    ) -> None:
        check_grammar(architecture)
        self.architecture = architecture
        self.epochs = epochs
        self.batch_size = batch_size
        self.learning_rate = learning_rate
        self.ssim_weight = ssim_weight
        self.norm: NormName = norm
        self.shift = shift
        self.validation_share = validation_share

    def reconstruct(self, view: AttackerView, budget: Budget, seed: int) -> Tensor:
        rng = torch.Generator().manual_seed(derive_seed(seed, "decoder"))
        train, validation = self._split(view, rng)
        # statistics from a sample: the smashed data of a whole data set need not fit into memory
        sample = torch.randperm(len(train), generator=rng)[:STATISTICS_IMAGES]
        standardise = Standardise(view.query(train[sample.to(train.device)]))
        decoder = build_decoder(self.architecture, view.smashed.shape[1:], view.image_shape, self.norm)
        network = nn.Sequential(standardise, decoder).to(view.compute.device)
        steps_per_epoch = -(-len(train) // self.batch_size)
        optimiser = torch.optim.AdamW(network.parameters(), lr=self.learning_rate)
        schedule = torch.optim.lr_scheduler.OneCycleLR(
            optimiser, max_lr=self.learning_rate, total_steps=self.epochs * steps_per_epoch
        )
        best_error, best_state = float("inf"), None
        order = torch.empty(0, dtype=torch.long)
        for step in budget.iterate(self.epochs * steps_per_epoch):
            position = step % steps_per_epoch
            if position == 0:
                order = torch.randperm(len(train), generator=rng)
            chosen = order[position * self.batch_size : (position + 1) * self.batch_size]
            images = flip_and_shift(train[chosen.to(train.device)], self.shift, rng)
            loss = self._loss(view, network, images)
            optimiser.zero_grad(set_to_none=True)
            loss.backward()
            optimiser.step()
            schedule.step()
            if position == steps_per_epoch - 1:
                error = float(mse(decode(network, view.query(validation)), validation).mean())
                if error < best_error:
                    best_error, best_state = error, copy.deepcopy(network.state_dict())
        if best_state is not None:
            network.load_state_dict(best_state)
        return decode(network, view.smashed)

    def _split(self, view: AttackerView, rng: torch.Generator) -> tuple[Tensor, Tensor]:
        """Auxiliary images for training and for choosing the epoch."""
        auxiliary = view.auxiliary
        if len(auxiliary) < 2:
            raise ConfigurationError("attack 'decoder' needs at least two auxiliary images")
        candidates = auxiliary.of_target.nonzero().squeeze(1).cpu()
        if len(candidates) < 2:
            candidates = torch.arange(len(auxiliary))
        count = max(1, round(self.validation_share * len(candidates)))
        held_out = candidates[torch.randperm(len(candidates), generator=rng)[:count]]
        rest = torch.ones(len(auxiliary), dtype=torch.bool)
        rest[held_out] = False
        device = auxiliary.images.device
        return auxiliary.images[rest.to(device)], auxiliary.images[held_out.to(device)]

    def _loss(self, view: AttackerView, network: nn.Module, images: Tensor) -> Tensor:
        smashed = view.query(images)  # outside autocast: the victims' data was computed in full precision too
        with view.compute.autocast():
            decoded = network(smashed)
        decoded = decoded.float()
        loss = F.mse_loss(decoded, images)
        if self.ssim_weight:
            loss = loss + self.ssim_weight * (1 - ssim_zeropad(decoded, images).mean())
        return loss


class Standardise(nn.Module):
    """Zero mean and unit deviation per channel, by the statistics of smashed data (n, c, ...) seen once."""

    mean: Tensor
    std: Tensor

    def __init__(self, smashed: Tensor) -> None:
        super().__init__()
        axes = [0, *range(2, smashed.dim())]
        self.register_buffer("mean", smashed.mean(axes, keepdim=True))
        # dead channels stay zero instead of being blown up
        self.register_buffer("std", smashed.std(axes, keepdim=True).clamp(min=1e-6))

    def forward(self, smashed: Tensor) -> Tensor:
        return (smashed - self.mean) / self.std


@torch.no_grad()
def decode(network: nn.Module, smashed: Tensor) -> Tensor:
    """Images for `smashed`, in evaluation mode and full precision."""
    network.eval()
    decoded = torch.cat([network(batch) for batch in smashed.split(BATCH_FOR_INFERENCE)])
    network.train()
    return decoded.float().clamp(0, 1)


def flip_and_shift(images: Tensor, shift: int, rng: torch.Generator) -> Tensor:
    """Mirror each image with probability one half and move it by up to `shift` pixels; edges are reflected."""
    n, _, height, width = images.shape
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
