"""MocoSFL (Li et al., ICLR 2023): the training loop.

One image goes data -> client -> defense -> message -> server trunk -> loss, and its gradient the same way back.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from mocosfl_priv.compute import Compute
from mocosfl_priv.config import TrainingConfig
from mocosfl_priv.data.augmentation import moco_v2_view
from mocosfl_priv.errors import RunFailedError
from mocosfl_priv.models.split import SplitModel, count_parameters
from mocosfl_priv.progress import Progress, Silent
from mocosfl_priv.seeding import generator
from mocosfl_priv.training.clients import ClientBank, Clients, FrozenClients
from mocosfl_priv.training.hooks import ClientHooks, NoHooks
from mocosfl_priv.training.sampling import Batches
from mocosfl_priv.training.server import MocoServer

LOSS_CHECK_EVERY = 10  # steps; reading the loss more often would stall an accelerator


@dataclass
class Traffic:
    """Payload bytes that the protocol moved, counted at the messages themselves."""

    smashed_up: int = 0
    gradient_down: int = 0
    weights_up: int = 0
    weights_down: int = 0

    @property
    def total(self) -> int:
        """Everything, both ways."""
        return self.smashed_up + self.gradient_down + self.weights_up + self.weights_down


@dataclass
class TrainedModel:
    """The outcome: the checkpoint with the best validation, and how training went.

    history: one entry per validation: step, epoch, loss (mean since the last one), validation score.
    """

    model: SplitModel
    selected_step: int
    steps: int
    traffic: Traffic
    history: list[dict[str, float]] = field(default_factory=list)


def cosine_rate(base: float, step: int, steps: int) -> float:
    """Cosine decay from `base` to zero over `steps`, the same for clients and server, without warm-up."""
    return 0.5 * base * (1 + math.cos(math.pi * step / steps))


def train_mocosfl(
    model: SplitModel,
    batches: Batches,
    training: TrainingConfig,
    *,
    steps: int,
    compute: Compute,
    seed: int,
    hooks: ClientHooks | None = None,
    frozen_client: bool = False,
    learning_rate: float | None = None,
    validate: Callable[[SplitModel], float] | None = None,
    progress: Progress | None = None,
) -> TrainedModel:
    """Train `model` (in place) on `batches` and return the validated best of its states.

    frozen_client: clients only encode; nothing flows back to them and only the server learns.
    learning_rate: replaces `training.learning_rate`.
    validate: scores a model, higher is better, on data that is neither test nor victims; called every
        `training.monitor_every` epochs and at the end. Without it the last state is returned.
    Raises RunFailedError when the loss is no longer finite.
    """
    hooks = hooks or NoHooks()
    progress = progress or Silent()
    device = compute.device
    model.to(device)
    views_rng = generator(seed, "augmentation", device=device)
    noise_rng = generator(seed, "defense", device=device)
    clients: Clients = (
        FrozenClients(model.client) if frozen_client else ClientBank(model.client, batches.clients, training)
    )
    server = MocoServer(
        model.trunk, model.projector, training, compute, generator(seed, "feature memory", device=device)
    )
    base_rate = training.learning_rate if learning_rate is None else learning_rate
    monitor_steps = -(-training.monitor_every * steps // training.epochs)  # rounded up: the last one is the end
    client_bytes = 4 * count_parameters(model.client)
    outcome = TrainedModel(model, steps, steps, Traffic())
    best_score, best_state = -math.inf, None
    losses: list[Tensor] = []

    for step in range(1, steps + 1):
        batch = batches.next()
        rate = cosine_rate(base_rate, step - 1, steps)
        loss = _train_step(batch.pool.to(device), batch.images.to(device), clients, server, hooks, rate,
                           training.symmetric, compute, views_rng, noise_rng, outcome.traffic)  # fmt: skip
        losses.append(loss)
        if step % LOSS_CHECK_EVERY == 0 or step == steps:
            _require_finite(losses, step)
        if clients.trainable and (step % training.sync_period == 0 or batch.pool_changes):
            clients.average(batch.pool.to(device))
            models = 2 if training.average_momentum_models else 1
            outcome.traffic.weights_up += models * len(batch.pool) * client_bytes
            outcome.traffic.weights_down += models * batches.clients * client_bytes
        if step == steps or (validate is not None and step % monitor_steps == 0):
            if clients.trainable:
                # not strict: constant buffers of a user's units are no part of the consensus
                model.client.load_state_dict(clients.consensus(batch.pool.to(device)), strict=False)
            entry = {"step": step, "epoch": step * training.epochs / steps, "loss": float(torch.stack(losses).mean())}
            losses = []
            if validate is not None:
                entry["validation_knn"] = score = validate(model)
                if score > best_score:
                    best_score, outcome.selected_step = score, step
                    best_state = _snapshot(model)
            outcome.history.append(entry)
        progress.advance()

    if best_state is not None:
        for part, state in zip((model.client, model.trunk, model.projector), best_state, strict=True):
            part.load_state_dict(state)
    return outcome


def _train_step(
    pool: Tensor,
    images: Tensor,
    clients: Clients,
    server: MocoServer,
    hooks: ClientHooks,
    rate: float,
    symmetric: bool,
    compute: Compute,
    views_rng: torch.Generator,
    noise_rng: torch.Generator,
    traffic: Traffic,
) -> Tensor:
    """One step of every client of the pool and of the server; returns the server's loss."""
    participants, micro_batch = images.shape[:2]
    flat = images.flatten(0, 1)
    first, second = (moco_v2_view(flat, views_rng).unflatten(0, (participants, micro_batch)) for _ in range(2))
    query_views = torch.cat([first, second], dim=1) if symmetric else first
    key_views = torch.cat([second, first], dim=1) if symmetric else second
    with compute.autocast():
        smashed = clients.encode_queries(pool, query_views)
        keys = clients.encode_keys(pool, key_views)
    smashed, keys = smashed.flatten(0, 1).to(first.dtype), keys.flatten(0, 1).to(first.dtype)
    sent = hooks.protect(smashed, noise_rng)
    with torch.no_grad():
        sent_keys = hooks.protect(keys, noise_rng)
    traffic.smashed_up += (sent.numel() + sent_keys.numel()) * sent.element_size()

    views = 2 if symmetric else 1
    loss, gradient = server.step(
        _views_first(sent, participants, views), _views_first(sent_keys, participants, views), rate, clients.trainable
    )
    if clients.trainable:
        assert gradient is not None
        returned = _clients_first(gradient, participants)
        traffic.gradient_down += returned.numel() * returned.element_size()
        returned = hooks.filter_gradient(returned, noise_rng)
        extra = hooks.client_loss(query_views.flatten(0, 1), smashed)
        outputs, gradients = [sent], [returned]
        if extra is not None:
            outputs.append(extra)
            gradients.append(torch.ones_like(extra))
        torch.autograd.backward(outputs, gradients)
        clients.step(pool, rate)
    return loss


def _views_first(smashed: Tensor, participants: int, views: int) -> Tensor:
    """(P * V * b, ...) as the clients send it to (V, P * b, ...) as the server scores it."""
    return smashed.unflatten(0, (participants, views, -1)).transpose(0, 1).flatten(1, 2)


def _clients_first(gradient: Tensor, participants: int) -> Tensor:
    """The inverse of :func:`_views_first`."""
    return gradient.unflatten(1, (participants, -1)).transpose(0, 1).flatten(0, 2)


def _require_finite(losses: list[Tensor], step: int) -> None:
    if not bool(torch.isfinite(torch.stack(losses[-LOSS_CHECK_EVERY:])).all()):
        raise RunFailedError(
            f"training diverged: the loss was not finite at or shortly before step {step}; "
            "lower training.learning_rate or use compute.precision=float32"
        )


def _snapshot(model: SplitModel) -> list[dict[str, Tensor]]:
    return [
        {name: value.detach().clone() for name, value in part.state_dict().items()}
        for part in (model.client, model.trunk, model.projector)
    ]
