"""The clients' side of a training step, computed for many clients at once."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Literal, Protocol

import torch
from torch import Tensor, nn
from torch.func import functional_call, vmap

from mocosfl_priv.config import TrainingConfig
from mocosfl_priv.models.convolution import AutocastConvolutions, matrix_products
from mocosfl_priv.models.modes import in_eval_mode
from mocosfl_priv.models.normalisation import stacked_parameters
from mocosfl_priv.runtime.compute import Compute
from mocosfl_priv.training.state import State, under, within

Kernel = Literal["auto", "grouped", "matmul", "loop"]
KERNELS: tuple[Kernel, ...] = ("auto", "grouped", "matmul", "loop")
# Largest patch (input channels x kernel height x kernel width) for which the convolutions of stacked clients are
# computed as matrix products over unfolded patches; larger ones are computed as grouped convolutions. In "auto", the
# product serves 3x3 convolutions over three colours, where it is faster; over 64 channels the grouped convolution is
# faster (docs/PERFORMANCE.md).
LONGEST_PATCH: dict[Kernel, float] = {"auto": 64, "grouped": 0, "matmul": float("inf"), "loop": 0}


class Clients(Protocol):
    """N clients that can encode, learn from returned gradients, and be averaged.

    pool: int64 (P,), the numbers of the clients that take part. rows: how many images each of them has, in that order.
    Images are float (B, 3, h, w) in [0, 1] and smashed data (B, ...), where B is the sum of `rows`; both are grouped by
    client, in the order of `pool`.
    """

    trainable: bool
    steps_taken: Tensor

    def encode_queries(self, pool: Tensor, rows: Sequence[int], images: Tensor) -> Tensor:
        """Encode images with the clients' online models; the result can be differentiated."""

    def encode_keys(self, pool: Tensor, rows: Sequence[int], images: Tensor) -> Tensor:
        """Encode images with the clients' momentum models, without gradient."""

    def learn(self, pool: Tensor, rates: Tensor) -> None:
        """Take one SGD step per client with the gradients from the backward pass.

        With `ema_update: after_step`, then update the momentum models. rates: float64 (P,), of the clients.
        """

    def end_step(self) -> None:
        """End a step; called after :meth:`learn` was called for all of the step's clients."""

    def average(self, pool: Tensor) -> None:
        """FedAvg: set the models of all N clients to the mean of the pool's models."""

    def consensus(self, pool: Tensor) -> State:
        """Return the mean of the pool's online models; changes no client."""

    def individual(self, client: int) -> State:
        """Return a copy of one client's online model."""

    def state(self) -> State:
        """Return all state except the configuration, as named tensors."""

    def load_state(self, state: State) -> None:
        """Restore what :meth:`state` returned."""


class ClientBank:
    """N trainable clients as stacked tensors: parameter ``name`` has shape (N, *shape).

    The pool's clients run in one pass, each with its own parameters, optimiser momentum, momentum model and count of
    steps. FedAvg does not change the optimiser momentum.

    kernel: how the convolutions of different clients are computed: client by client (`loop`), as grouped convolutions
    (`grouped`), as batched matrix products (`matmul`), or as one of the latter two by patch size (`auto`). All give the
    same numbers up to rounding; :func:`fastest_kernel` finds the fastest.
    """

    trainable = True

    def __init__(self, client: nn.Module, clients: int, training: TrainingConfig, kernel: Kernel = "auto") -> None:
        self._module = client
        self._training = training
        self.kernel = kernel
        self.online: State = {
            name: parameter.detach().unsqueeze(0).repeat(clients, *[1] * parameter.dim())
            for name, parameter in client.named_parameters()
        }
        self.key: State = {name: stacked.clone() for name, stacked in self.online.items()}
        self.velocity: State = {name: torch.zeros_like(stacked) for name, stacked in self.online.items()}
        self.steps_taken = torch.zeros(clients, dtype=torch.long)
        device = next(iter(self.online.values())).device if self.online else torch.device("cpu")
        self.keep_per_divergence = torch.full((clients,), torch.nan, dtype=torch.float64, device=device)
        self._leaves: State = {}

    def encode_queries(self, pool: Tensor, rows: Sequence[int], images: Tensor) -> Tensor:
        """See :class:`Clients`."""
        self._leaves = {name: stacked[pool].requires_grad_() for name, stacked in self.online.items()}
        return self._encode(self._leaves, rows, images)

    @torch.no_grad()
    def encode_keys(self, pool: Tensor, rows: Sequence[int], images: Tensor) -> Tensor:
        """See :class:`Clients`."""
        if self._training.ema_update == "before_encoding":
            self._follow(pool, {name: stacked[pool] for name, stacked in self.online.items()})
        return self._encode({name: stacked[pool] for name, stacked in self.key.items()}, rows, images)

    def _encode(self, parameters: State, rows: Sequence[int], images: Tensor) -> Tensor:
        """Encode with the given parameters (P, *shape), in one pass for all clients that have equally many images."""
        sizes = sorted(set(rows))
        if len(sizes) == 1:
            encoded = encode_stacked(self._module, parameters, images.unflatten(0, (len(rows), -1)), self.kernel)
            return encoded.flatten(0, 1)
        size_of = torch.tensor(rows, device=images.device)
        client_of = torch.arange(len(rows), device=images.device).repeat_interleave(size_of)
        parts, places = [], []
        for size in sizes:
            members = (size_of == size).nonzero().squeeze(1)
            place = (size_of[client_of] == size).nonzero().squeeze(1)
            theirs = {name: value[members] for name, value in parameters.items()}
            stacked = images[place].unflatten(0, (len(members), size))
            parts.append(encode_stacked(self._module, theirs, stacked, self.kernel).flatten(0, 1))
            places.append(place)
        return torch.cat(parts)[torch.cat(places).argsort()]

    @torch.no_grad()
    def learn(self, pool: Tensor, rates: Tensor) -> None:
        """See :class:`Clients`."""
        settings = self._training
        updated: State = {}
        for name, leaf in self._leaves.items():
            assert leaf.grad is not None, "learn() before the gradient came back"
            gradient = leaf.grad.add(leaf, alpha=settings.weight_decay)
            velocity = self.velocity[name][pool].mul_(settings.momentum).add_(gradient)
            rate = rates.to(leaf).view(-1, *[1] * (leaf.dim() - 1))
            updated[name] = leaf.detach() - rate * velocity
            self.velocity[name][pool] = velocity
            self.online[name][pool] = updated[name]
        if settings.ema_update == "after_step":
            self._follow(pool, updated)
        self.steps_taken[pool.cpu()] += 1
        self._leaves = {}

    def _follow(self, pool: Tensor, online: State) -> None:
        """Move the momentum models a step towards the online models."""
        for name, fast in online.items():
            self.key[name][pool] = self.key[name][pool].lerp_(fast, 1 - self._training.ema)

    def end_step(self) -> None:
        """Do nothing: :meth:`learn` has updated each client."""

    @torch.no_grad()
    def average(self, pool: Tensor) -> None:
        """See :class:`Clients`.

        With `average_momentum_models`, momentum models are averaged too (MonAcoSFL). With `divergence_aware`, each
        client of the pool keeps the share mu of its own model and takes 1 - mu of the mean. At the client's first
        synchronisation mu is the value of `divergence_aware`; afterwards it is proportional to the L2 distance between
        the client's parameters and the mean, at most 1 (FedEMA, Zhuang et al., 2022).
        """
        mean = self.consensus(pool)
        kept = self._kept_share(pool, mean)
        for name, stacked in self.online.items():
            handed_out = mean[name].expand_as(stacked)
            if kept is not None:
                share = kept.to(stacked).view(-1, *[1] * (stacked.dim() - 1))
                handed_out = handed_out.clone()
                handed_out[pool] = share * stacked[pool] + (1 - share) * mean[name]
            stacked.copy_(handed_out)
        if self._training.average_momentum_models:
            for stacked in self.key.values():
                stacked.copy_(stacked[self._averaged(pool)].mean(0, keepdim=True).expand_as(stacked))

    def _kept_share(self, pool: Tensor, mean: State) -> Tensor | None:
        """Share mu that each client of the pool keeps, float64 (P,); None if `divergence_aware` is not set."""
        first_share = self._training.divergence_aware
        if first_share is None:
            return None
        squares = [
            (stacked[pool] - mean[name]).double().flatten(1).square().sum(1) for name, stacked in self.online.items()
        ]
        divergence = torch.stack(squares).sum(0).sqrt()
        scale = self.keep_per_divergence[pool]
        scale = torch.where(scale.isnan() & (divergence > 0), first_share / divergence, scale)
        self.keep_per_divergence[pool] = scale
        return (scale.nan_to_num(0.0) * divergence).clamp_(max=1.0)

    def _averaged(self, pool: Tensor) -> Tensor:
        """Clients over which the mean is taken, int64 (P,).

        With `average_base: client_0`, as in the research code, client 0 stands in for the pool's first client.
        """
        if self._training.average_base == "client_0":
            return torch.cat([torch.zeros_like(pool[:1]), pool[1:]])
        return pool

    @torch.no_grad()
    def consensus(self, pool: Tensor) -> State:
        """See :class:`Clients`."""
        averaged = self._averaged(pool)
        return {name: stacked[averaged].mean(0) for name, stacked in self.online.items()}

    def individual(self, client: int) -> State:
        """See :class:`Clients`."""
        return {name: stacked[client].clone() for name, stacked in self.online.items()}

    def copies(self, clients: Tensor) -> tuple[State, State]:
        """Return copies of the online and of the momentum models of `clients`, int64 (c,).

        Each is a dictionary of stacked parameters (c, *shape).
        """
        online, key = ({name: stacked[clients] for name, stacked in bank.items()} for bank in (self.online, self.key))
        return online, key

    def state(self) -> State:
        """See :class:`Clients`."""
        return {
            **under("online", self.online),
            **under("key", self.key),
            **under("velocity", self.velocity),
            "steps_taken": self.steps_taken,
            "keep_per_divergence": self.keep_per_divergence,
        }

    def load_state(self, state: State) -> None:
        """See :class:`Clients`."""
        for kind, stack in (("online", self.online), ("key", self.key), ("velocity", self.velocity)):
            for name, value in within(state, kind).items():
                stack[name].copy_(value)
        self.steps_taken.copy_(state["steps_taken"])
        self.keep_per_divergence.copy_(state["keep_per_divergence"])


class EqualClients(ClientBank):
    """N trainable clients that are equal after every step, computed as one model; see :meth:`fits`.

    An SGD update is linear in the gradient, so the mean of N updates is the update with the mean gradient.
    """

    def __init__(self, client: nn.Module, clients: int, training: TrainingConfig) -> None:
        super().__init__(client, 1, training)
        self._clients = clients
        self.steps_taken = torch.zeros(clients, dtype=torch.long)
        self._rate = torch.zeros(1)

    @staticmethod
    def fits(training: TrainingConfig, pool: int) -> bool:
        """Whether clients are equal after every step under `training`.

        That requires that all take part in each step, and that online and momentum models are averaged after it.
        """
        return (
            pool == training.clients
            and training.sync_period == 1
            and training.average_momentum_models
            and training.ema_update == "after_step"
            and training.divergence_aware is None
        )

    def encode_queries(self, pool: Tensor, rows: Sequence[int], images: Tensor) -> Tensor:
        """See :class:`Clients`. All calls of a step use the same leaf tensors, in which gradients add up."""
        if not self._leaves:
            self._leaves = {name: stacked.clone().requires_grad_() for name, stacked in self.online.items()}
        return self._encode(self._leaves, [sum(rows)], images)

    @torch.no_grad()
    def encode_keys(self, pool: Tensor, rows: Sequence[int], images: Tensor) -> Tensor:
        """See :class:`Clients`."""
        return self._encode(self.key, [sum(rows)], images)

    def learn(self, pool: Tensor, rates: Tensor) -> None:
        """Note the learning rate; :meth:`end_step` makes the update, when the gradients of all clients are there."""
        self._rate = rates[:1]

    def end_step(self) -> None:
        """Update the model with the mean of the clients' gradients."""
        for leaf in self._leaves.values():
            assert leaf.grad is not None, "end_step() before the gradient came back"
            leaf.grad.div_(self._clients)
        steps_taken, self.steps_taken = self.steps_taken, torch.zeros(1, dtype=torch.long)
        super().learn(torch.zeros(1, dtype=torch.long), self._rate)
        self.steps_taken = steps_taken + 1

    def average(self, pool: Tensor) -> None:
        """Do nothing: the clients are equal."""

    def consensus(self, pool: Tensor) -> State:
        """See :class:`Clients`."""
        return self.individual(0)

    def individual(self, client: int) -> State:
        """See :class:`Clients`."""
        return super().individual(0)


class FrozenClients:
    """N clients that share one fixed model: no backward pass, no optimiser, no averaging, no state of their own."""

    trainable = False

    def __init__(self, client: nn.Module, clients: int) -> None:
        self._module = client
        self.steps_taken = torch.zeros(clients, dtype=torch.long)

    @torch.no_grad()
    def encode_queries(self, pool: Tensor, rows: Sequence[int], images: Tensor) -> Tensor:
        """See :class:`Clients`."""
        with in_eval_mode(self._module):  # a frozen client is in use, not in training
            encoded: Tensor = self._module(images)
        return encoded

    encode_keys = encode_queries

    def learn(self, pool: Tensor, rates: Tensor) -> None:
        """Do nothing: frozen clients do not learn."""

    def end_step(self) -> None:
        """Do nothing: frozen clients do not learn."""

    def average(self, pool: Tensor) -> None:
        """Do nothing: all clients share one model."""

    def consensus(self, pool: Tensor) -> State:
        """See :class:`Clients`."""
        return {name: parameter.detach().clone() for name, parameter in self._module.named_parameters()}

    def individual(self, client: int) -> State:
        """See :class:`Clients`."""
        return self.consensus(torch.empty(0))

    def state(self) -> State:
        """Return the parameters of the shared model."""
        return self.consensus(torch.empty(0))

    def load_state(self, state: State) -> None:
        """See :class:`Clients`."""
        self._module.load_state_dict(state, strict=False)  # not strict: `state` holds no buffers


def encode_stacked(module: nn.Module, parameters: State, images: Tensor, kernel: Kernel) -> Tensor:
    """Run `module` once per client: parameters (P, *shape) each, images (P, b, ...); returns (P, b, ...)."""

    def one_client(its_parameters: State, its_images: Tensor) -> Tensor:
        encoded: Tensor = functional_call(module, its_parameters, (its_images,))
        return encoded

    clients = len(images)
    if kernel == "loop" or clients == 1:  # vectorising over one client costs more than it saves
        singles = [one_client({k: v[i] for k, v in parameters.items()}, images[i]) for i in range(clients)]
        return singles[0].unsqueeze(0) if clients == 1 else torch.stack(singles)
    # "different": Dropout in a user's own backbone draws a mask of its own for every client
    all_clients = vmap(one_client, randomness="different")
    with stacked_parameters(), matrix_products(LONGEST_PATCH[kernel]), AutocastConvolutions(images.device):
        return all_clients(parameters, images)


MEASURED_PASSES = 3


def fastest_kernel(client: nn.Module, clients: int, rows: int, image_shape: Sequence[int], compute: Compute) -> Kernel:
    """Time a forward and backward pass of `clients` clients with `rows` images each, and return the fastest kernel.

    image_shape: (channels, height, width). The pass runs on the device and at the precision of `compute`.
    """
    parameters = {
        name: p.detach().unsqueeze(0).repeat(clients, *[1] * p.dim()).requires_grad_()
        for name, p in client.named_parameters()
    }
    device = next(iter(parameters.values())).device
    images = torch.rand(clients, rows, *image_shape, device=device)
    seconds: dict[Kernel, float] = {}
    for kernel in KERNELS:
        best = float("inf")
        for _ in range(MEASURED_PASSES):
            started = time.perf_counter()
            with compute.autocast():
                smashed = encode_stacked(client, parameters, images, kernel)
            smashed.float().sum().backward()
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            best = min(best, time.perf_counter() - started)
        seconds[kernel] = best
    return min(KERNELS, key=lambda kernel: seconds[kernel])
