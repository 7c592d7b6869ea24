"""Fresh models for the images of an experiment."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from mocosfl_priv.config import ModelConfig
from mocosfl_priv.models.split import SplitModel, build_split_model
from mocosfl_priv.runtime.seeding import global_seed


@dataclass(frozen=True)
class ModelBuilder:
    """Builds models with weights drawn by a seed. It holds settings only, so that it can be handed to an attacker.

    colour_means, colour_deviations: of the clients' private images, which clients normalise with.
    """

    image_size: int
    colour_means: tuple[float, ...]
    colour_deviations: tuple[float, ...]

    def build(self, model: ModelConfig, cut_layer: int, seed: int) -> SplitModel:
        """A fresh model; equal for equal seeds whatever the defense, so that defenses can be compared in pairs."""
        with global_seed(seed, "initialisation"):
            return build_split_model(
                model, cut_layer, self.image_size, list(self.colour_means), list(self.colour_deviations)
            )

    def build_client(self, model: ModelConfig, cut_layer: int, seed: int) -> nn.Module:
        """The client of a fresh model."""
        return self.build(model, cut_layer, seed).client
