"""The client side of a step, for all clients of the pool at once."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor, nn
from torch.func import functional_call, vmap

from mocosfl_priv.config import TrainingConfig

StateDict = dict[str, Tensor]


class Clients(Protocol):
    """N clients that can encode, learn from returned gradients, and be averaged.

    Images are (P, b, 3, h, w) for the P clients of `pool`; smashed data is (P, b, *smashed_shape).
    """

    trainable: bool

    def encode_queries(self, pool: Tensor, images: Tensor) -> Tensor:
        """Online models; keeps the graph that a backward pass of the result will use."""

    def encode_keys(self, pool: Tensor, images: Tensor) -> Tensor:
        """Momentum models, without gradient."""

    def step(self, pool: Tensor, learning_rate: float) -> None:
        """One SGD step with the gradients that have arrived, then the momentum models' moving average."""

    def average(self, pool: Tensor) -> None:
        """FedAvg: the mean of the pool's models becomes everybody's."""

    def consensus(self, pool: Tensor) -> StateDict:
        """What :meth:`average` would hand out, without handing it out."""


class ClientBank:
    """N trainable clients as stacked tensors: parameter ``name`` has shape (N, *shape).

    The pool's clients run in one vectorised pass, each with its own parameters, optimiser momentum and momentum
    model. Optimiser momentum stays with its client across synchronisations.
    """

    trainable = True

    def __init__(self, client: nn.Module, clients: int, training: TrainingConfig) -> None:
        self._module = client
        self._training = training
        self.online: StateDict = {
            name: parameter.detach().unsqueeze(0).repeat(clients, *[1] * parameter.dim())
            for name, parameter in client.named_parameters()
        }
        self.key: StateDict = {name: stacked.clone() for name, stacked in self.online.items()}
        self.velocity: StateDict = {name: torch.zeros_like(stacked) for name, stacked in self.online.items()}
        self._leaves: StateDict = {}

    def encode_queries(self, pool: Tensor, images: Tensor) -> Tensor:
        """See :class:`Clients`."""
        self._leaves = {name: stacked[pool].requires_grad_() for name, stacked in self.online.items()}
        return self._encode(self._leaves, images)

    @torch.no_grad()
    def encode_keys(self, pool: Tensor, images: Tensor) -> Tensor:
        """See :class:`Clients`."""
        return self._encode({name: stacked[pool] for name, stacked in self.key.items()}, images)

    def _encode(self, parameters: StateDict, images: Tensor) -> Tensor:
        def one_client(its_parameters: StateDict, its_images: Tensor) -> Tensor:
            encoded: Tensor = functional_call(self._module, its_parameters, (its_images,))
            return encoded

        if len(images) == 1:  # vectorising over one client costs more than it saves
            return one_client({k: v[0] for k, v in parameters.items()}, images[0]).unsqueeze(0)
        # a user's Dropout draws anew for every client
        encoded: Tensor = vmap(one_client, randomness="different")(parameters, images)
        return encoded

    @torch.no_grad()
    def step(self, pool: Tensor, learning_rate: float) -> None:
        """See :class:`Clients`."""
        settings = self._training
        for name, leaf in self._leaves.items():
            assert leaf.grad is not None, "step() before the gradient came back"
            gradient = leaf.grad.add(leaf, alpha=settings.weight_decay)
            velocity = self.velocity[name][pool].mul_(settings.momentum).add_(gradient)
            updated = leaf.detach().sub(velocity, alpha=learning_rate)
            self.velocity[name][pool] = velocity
            self.online[name][pool] = updated
            self.key[name][pool] = self.key[name][pool].lerp_(updated, 1 - settings.ema)
        self._leaves = {}

    @torch.no_grad()
    def average(self, pool: Tensor) -> None:
        """See :class:`Clients`. Momentum models are averaged too where the settings ask for it (MonAcoSFL)."""
        stacks = [self.online, self.key] if self._training.average_momentum_models else [self.online]
        for stack in stacks:
            for stacked in stack.values():
                stacked.copy_(stacked[pool].mean(0, keepdim=True).expand_as(stacked))

    @torch.no_grad()
    def consensus(self, pool: Tensor) -> StateDict:
        """See :class:`Clients`."""
        return {name: stacked[pool].mean(0) for name, stacked in self.online.items()}


class FrozenClients:
    """N clients that share one fixed model: no backward pass, no optimiser, no averaging, no state of their own."""

    trainable = False

    def __init__(self, client: nn.Module) -> None:
        self._module = client

    @torch.no_grad()
    def encode_queries(self, pool: Tensor, images: Tensor) -> Tensor:
        """See :class:`Clients`."""
        encoded: Tensor = self._module(images.flatten(0, 1))
        return encoded.unflatten(0, images.shape[:2])

    encode_keys = encode_queries

    def step(self, pool: Tensor, learning_rate: float) -> None:
        """Frozen means frozen."""

    def average(self, pool: Tensor) -> None:
        """All clients are equal already."""

    def consensus(self, pool: Tensor) -> StateDict:
        """See :class:`Clients`."""
        return {name: parameter.detach().clone() for name, parameter in self._module.named_parameters()}
