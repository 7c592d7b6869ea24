"""The training loop: runs the steps, validates, writes checkpoints, and keeps the best state so far."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from mocosfl_priv.config import TrainingConfig
from mocosfl_priv.errors import RunFailedError
from mocosfl_priv.models.split import SplitModel
from mocosfl_priv.runtime.compute import Compute
from mocosfl_priv.runtime.progress import Progress, Silent
from mocosfl_priv.runtime.seeding import global_seed
from mocosfl_priv.training.checkpoints import Checkpoints
from mocosfl_priv.training.hooks import ClientHooks, ServerHooks
from mocosfl_priv.training.mocosfl import MocoSFL, Traffic
from mocosfl_priv.training.participants import RemoteParticipants
from mocosfl_priv.training.sampling import Batches
from mocosfl_priv.training.state import State, counted, numbered, under, within

LOSS_CHECK_EVERY = 10  # steps; each reading of the loss makes the CPU wait for the accelerator


@dataclass
class TrainedModel:
    """The result of a training: the state with the best validation score, and the course of the training.

    selected_step: number of steps after which the returned state was reached; `steps`: all steps of the training.
    kernel: see :attr:`MocoSFL.kernel`.
    history: one entry per validation: `step`, `epoch`, `loss` (mean since the previous validation), `validation_knn`
        (the score, if a `validate` function was given) and `client_signature` (nats; only for simulated clients that
        are trained and can differ, see :mod:`mocosfl_priv.training.client_signature`).
    leakage_points: what the function of this name returned, in order.
    replay_epochs: number of epochs in each state (A, B, C) of loss-threshold replay; empty without replay.
    earlier_seconds: time spent by earlier processes, if the training was resumed from a checkpoint.
    """

    model: SplitModel
    selected_step: int
    steps: int
    traffic: Traffic
    kernel: str
    history: list[dict[str, float]] = field(default_factory=list)
    leakage_points: list[dict[str, Any]] = field(default_factory=list)
    replay_epochs: dict[str, int] = field(default_factory=dict)
    earlier_seconds: float = 0.0


def train_mocosfl(
    model: SplitModel,
    batches: Batches,
    training: TrainingConfig,
    *,
    steps: int,
    compute: Compute,
    seed: int,
    hooks: ClientHooks | None = None,
    server_hooks: ServerHooks | None = None,
    frozen_client: bool = False,
    learning_rate: float | None = None,
    remote: RemoteParticipants | None = None,
    validate: Callable[[SplitModel], float] | None = None,
    leakage_points: Callable[[SplitModel, int, float], list[dict[str, Any]]] | None = None,
    leakage_every: int = 0,
    checkpoints: Checkpoints | None = None,
    progress: Progress | None = None,
) -> TrainedModel:
    """Train `model` in place for `steps` steps on `batches`; the returned model is in its best validated state.

    hooks: the defense at the clients; no defense if None.
    server_hooks: observers at the server, or an attack that changes gradients; none if None. When the best state is
        restored, so are the states that `hooks` and `server_hooks` had at that step.
    frozen_client: clients only encode; they receive no gradient, and only the server learns.
    learning_rate: replaces `training.learning_rate`.
    remote: makes the participants that take the place of the simulated clients, for example real devices.
    validate: scores a model, higher is better, on data that is neither test data nor victims; called every
        `training.monitor_every` epochs and at the end. Without it the last state is returned.
    leakage_points: called with (model, step, epoch) every `leakage_every` epochs and at the end; must not change the
        model.
    checkpoints: where the state is saved every `training.checkpoint_every` epochs and at the end. If a checkpoint is
        there, training resumes from the newest one, with the same result as without interruption.
    Raises RunFailedError when the loss is no longer finite.
    """
    progress = progress or Silent()
    started = time.monotonic()
    run = MocoSFL(
        model, batches, training, steps=steps, compute=compute, seed=seed, hooks=hooks, server_hooks=server_hooks,
        frozen_client=frozen_client, learning_rate=learning_rate,
        replay_folder=checkpoints.folder / "replay" if checkpoints else None, remote=remote,
    )  # fmt: skip
    outcome = TrainedModel(model, steps, steps, run.traffic, run.kernel)
    record = _Record(outcome, (run.hooks, run.server_hooks))
    with global_seed(seed, "training"):
        _run_to_the_end(run, record, validate, leakage_points, leakage_every, checkpoints, progress, started)

    run.assemble()
    run.participants.finish()
    record.restore_best()
    outcome.traffic, outcome.kernel = run.traffic, run.kernel
    outcome.replay_epochs = {str(k): v for k, v in run.replay.epochs.items()} if run.replay else {}
    return outcome


def _run_to_the_end(
    run: MocoSFL,
    record: _Record,
    validate: Callable[[SplitModel], float] | None,
    leakage_points: Callable[[SplitModel, int, float], list[dict[str, Any]]] | None,
    leakage_every: int,
    checkpoints: Checkpoints | None,
    progress: Progress,
    started: float,
) -> None:
    """Run all steps from the newest checkpoint, or from the start if there is none."""
    steps, training, outcome = run.steps, run.training, record.outcome
    if checkpoints is not None and (found := checkpoints.latest()) is not None:
        step, tensors, facts = found
        run.load_state(step, within(tensors, "run"), facts["run"])
        record.load_state(within(tensors, "record"), facts["record"])
        outcome.earlier_seconds = facts["seconds"]
        progress.advance(step)

    def due(epochs: int) -> bool:
        """Whether the current step ends a period of `epochs` epochs (rounded up to whole steps) or the training."""
        return run.step_count == steps or run.step_count % -(-epochs * steps // training.epochs) == 0

    while run.step_count < steps:
        record.losses.append(run.step())
        step = run.step_count
        if step % LOSS_CHECK_EVERY == 0 or step == steps:
            _require_finite(record.losses, step)
        epoch = step * training.epochs / steps
        if step == steps or (validate is not None and due(training.monitor_every)):
            record.validated(step, epoch, run, validate)
        if leakage_points is not None and leakage_every and due(leakage_every):
            outcome.leakage_points += leakage_points(run.assemble(), step, epoch)
        if checkpoints is not None and due(training.checkpoint_every):
            tensors, facts = run.state()
            kept, noted = record.state()
            checkpoints.save(
                step,
                under("run", tensors) | under("record", kept),
                {"run": facts, "record": noted, "seconds": outcome.earlier_seconds + time.monotonic() - started},
            )
            if run.replay is not None:
                run.replay.forget_old()
        progress.advance()


class _Record:
    """Losses since the last validation, history, and the best state so far of the model and of the hooks."""

    def __init__(self, outcome: TrainedModel, hooks: Sequence[ClientHooks | ServerHooks]) -> None:
        self.losses: list[Tensor] = []
        self.outcome = outcome
        self._all_hooks = hooks
        self._best_score = -math.inf
        self._best: State = {}
        self._participants: tuple[State, ...] = ()
        self._best_hooks: tuple[State, ...] = ()

    def validated(self, step: int, epoch: float, run: MocoSFL, validate: Callable[[SplitModel], float] | None) -> None:
        entry = {"step": step, "epoch": epoch, "loss": float(torch.stack(self.losses).mean())}
        self.losses = []
        model = run.assemble()
        if (signature := run.client_signature()) is not None:
            entry["client_signature"] = signature
        if validate is not None:
            entry["validation_knn"] = score = validate(model)
            if score > self._best_score:
                self._best_score, self.outcome.selected_step = score, step
                self._best = {name: value.detach().clone() for name, value in model.named_state().items()}
                self._participants = model.participants
                self._best_hooks = tuple(
                    {name: value.detach().clone() for name, value in hooks.state().items()} for hooks in self._all_hooks
                )
        self.outcome.history.append(entry)

    def restore_best(self) -> None:
        if self._best:
            for name, value in self.outcome.model.named_state().items():
                value.copy_(self._best[name])
            self.outcome.model.participants = self._participants
            for hooks, state in zip(self._all_hooks, self._best_hooks, strict=True):
                hooks.load_state(state)

    def state(self) -> tuple[State, dict[str, Any]]:
        losses = torch.stack(self.losses) if self.losses else torch.empty(0)
        return {
            "losses": losses,
            **under("best", self._best),
            **numbered("best_hooks", self._best_hooks),
            **numbered("participants", self._participants),
        }, {
            "best_score": None if self._best_score == -math.inf else self._best_score,
            "selected_step": self.outcome.selected_step,
            "history": self.outcome.history,
            "leakage_points": self.outcome.leakage_points,
        }

    def load_state(self, tensors: State, facts: dict[str, Any]) -> None:
        device = next(iter(self.outcome.model.named_state().values())).device
        self.losses = list(tensors["losses"].to(device).unbind())
        self._best = {name: value.to(device) for name, value in within(tensors, "best").items()}
        self._participants = counted(tensors, "participants", device)
        self._best_hooks = tuple(within(tensors, f"best_hooks.{index}") for index in range(len(self._all_hooks)))
        self._best_score = -math.inf if facts["best_score"] is None else facts["best_score"]
        self.outcome.selected_step = facts["selected_step"]
        self.outcome.history = facts["history"]
        self.outcome.leakage_points = facts["leakage_points"]


def _require_finite(losses: list[Tensor], step: int) -> None:
    if losses and not bool(torch.isfinite(torch.stack(losses[-LOSS_CHECK_EVERY:])).all()):
        raise RunFailedError(
            f"training diverged: the loss was not finite at or shortly before step {step}; "
            "lower training.learning_rate or use compute.precision=float32"
        )
