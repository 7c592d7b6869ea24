"""Learning rate schedules: cosine decay without warm-up, and the two variants in MocoSFL's research code."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from mocosfl_priv.config import TrainingConfig


def cosine(base: float, position: float, length: float) -> float:
    """Cosine decay from `base` at position 0 to zero at `length`; periodic beyond that, like torch's scheduler."""
    return 0.5 * base * (1 + math.cos(math.pi * position / length))


def server_rate(training: TrainingConfig, base: float, step: int, steps: int) -> float:
    """The server's learning rate in step `step` (from 0) of `steps`; `base` is the rate at the start."""
    if training.server_schedule == "per_epoch":
        return cosine(base, step * training.epochs // steps, training.epochs)
    return cosine(base, step, steps)


def client_rates(training: TrainingConfig, base: float, step: int, steps: int, steps_taken: Tensor) -> Tensor:
    """The learning rates of P clients: float64 (P,) on the CPU.

    base: the rate at the start, unless `training.client_learning_rate` replaces it.
    steps_taken: int64 (P,), the number of steps in which each client has taken part so far. Only the oscillating
        schedule uses it: it decays over as many *steps* as the training has epochs, rises again over as many, and so
        on. The research code does this; it is kept for comparison.
    """
    base = base if training.client_learning_rate is None else training.client_learning_rate
    if training.client_schedule == "oscillating":
        phase = steps_taken.double().cpu() * (math.pi / training.epochs)
        return 0.5 * base * (1 + torch.cos(phase))
    return torch.full((len(steps_taken),), cosine(base, step, steps), dtype=torch.float64)
