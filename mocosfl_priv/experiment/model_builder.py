"""Fresh models for the images of an experiment."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import nn

from mocosfl_priv.config import ModelConfig
from mocosfl_priv.models.custom_backbone import is_own
from mocosfl_priv.models.initialisation import reinitialised
from mocosfl_priv.models.split import SplitModel, build_split_model
from mocosfl_priv.runtime.seeding import derive_seed, global_seed


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

    def build_untrained(self, model: ModelConfig, cut_layer: int, seed: int) -> SplitModel:
        """A fresh model that has learned nothing, also where a user's backbone function loads trained weights.

        Raises ConfigurationError where it does, and its modules cannot be initialised anew.
        """
        fresh = self.build(model, cut_layer, seed)
        if not is_own(model.backbone):
            return fresh
        other = self.build(model, cut_layer, derive_seed(seed, "another initialisation"))
        drawn = [_is_drawn(part, twin) for part, twin in ((fresh.client, other.client), (fresh.trunk, other.trunk))]
        if all(drawn):
            return fresh
        return replace(fresh, client=reinitialised(fresh.client, seed), trunk=reinitialised(fresh.trunk, seed))

    def build_client(self, model: ModelConfig, cut_layer: int, seed: int) -> nn.Module:
        """The client of a fresh model that has learned nothing."""
        return self.build_untrained(model, cut_layer, seed).client


def _is_drawn(network: nn.Module, twin: nn.Module) -> bool:
    """Whether the weights of a network were drawn: those of a twin, built with another seed, are then others.

    Parameters of one value, such as biases of zero, are the same in all fresh networks.
    """
    other = dict(twin.named_parameters())
    varied = [(name, value) for name, value in network.named_parameters() if len(value.unique()) > 1]
    return not any(torch.equal(value, other[name]) for name, value in varied)
