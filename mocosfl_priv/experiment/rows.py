"""What results say of a trained system and of an attack on it: attempts are scored, and become rows."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn

from mocosfl_priv.device.accounting import FLOAT_BYTES
from mocosfl_priv.evaluation.floor import leak_ratio
from mocosfl_priv.evaluation.utility import Utility
from mocosfl_priv.experiment.attack import Attempt, Target, attempt
from mocosfl_priv.experiment.conditions import AttackConditions
from mocosfl_priv.experiment.observers import Observer
from mocosfl_priv.experiment.probes import Probes
from mocosfl_priv.experiment.scoring import Scoring
from mocosfl_priv.experiment.victims import VictimSet
from mocosfl_priv.models.split import forward_flops
from mocosfl_priv.plugins import Attack, Loaded
from mocosfl_priv.results import CELL_KEYS, METRICS, semi_column
from mocosfl_priv.runtime.progress import Progress


@dataclass(frozen=True)
class ScoredAttack:
    """How one attack fared on one set of victims.

    values: metric to (n,); empty if the attack failed.
    """

    victims: VictimSet
    attempt: Attempt
    values: dict[str, np.ndarray]

    @property
    def mse_lower_bound(self) -> np.ndarray:
        """Per victim, terms of the mean MSE that is promised; NaN if nothing is."""
        promise = self.attempt.promise
        return promise.mse_lower_bound if promise else np.full(len(self.victims.images), np.nan)

    @property
    def summary(self) -> dict[str, Any]:
        """What a row says: mean metrics, floor, leak ratio, cost, and the cause of a failure. NaN if it failed."""
        floor = self.victims.floor.mse.numpy()
        missing = np.full(len(floor), np.nan)
        promise = self.attempt.promise
        return {
            **{name: float(self.values.get(name, missing).mean()) for name in METRICS},
            "mse_floor": float(floor.mean()),
            "leak_ratio": leak_ratio(self.values.get("mse", missing), floor),
            "guarantee": promise.claim if promise else "",
            "guarantee_epsilon": promise.epsilon if promise else np.nan,
            "guarantee_delta": promise.delta if promise else np.nan,
            "mse_bound": max(0.0, float(self.mse_lower_bound.mean())) if promise else np.nan,
            **self.attempt.cost,
            "failure": self.attempt.failure,
        }

    def per_image(self, keys: dict[str, Any]) -> pd.DataFrame:
        """One line per victim, none if the attack failed."""
        count = len(self.victims.images) if self.attempt.reconstruction is not None else 0
        return pd.DataFrame(
            {
                **{key: [keys[key]] * count for key in CELL_KEYS},
                "image": np.arange(count),
                "group": self.victims.groups.numpy()[:count],
                **self.values,
                "mse_bound": self.mse_lower_bound[:count],
            }
        )

    @property
    def pixels(self) -> np.ndarray | None:
        """The reconstruction as uint8."""
        if self.attempt.reconstruction is None:
            return None
        return (self.attempt.reconstruction * 255).round().byte().numpy()


@dataclass(frozen=True)
class SystemResult:
    """What results say of a trained system: everything but its model.

    keys: the columns that identify it. hijacker: label of the attack that chose the gradients; empty for none.
    file_stem: a file name that is unique within a run. untrained: the utility floor, see :class:`Probes`.
    history, leakage_points: see :class:`TrainedModel`. detection: what a detector found, as a row says it; None
    without. info: all else, as JSON.
    """

    keys: dict[str, Any]
    hijacker: str
    file_stem: str
    utility: Utility
    untrained: np.ndarray
    cost: dict[str, float]
    history: list[dict[str, float]]
    leakage_points: list[dict[str, Any]]
    detection: dict[str, Any] | None
    info: dict[str, Any]

    def columns(self, probes: Probes, scoring: Scoring) -> dict[str, Any]:
        """What the row of every attack on this system says of it; accuracies are NaN where there are no labels."""
        measured = probes.labelled
        return {
            "checkpoint": f"models/{self.file_stem}.safetensors",
            "knn_accuracy": _share(self.utility.knn, measured),
            "linear_accuracy": _share(self.utility.linear, measured),
            **{
                f"{semi_column(fraction)}_accuracy": _share(result.correct, measured)
                for fraction, result in self.utility.semi_supervised.items()
            },
            **scoring.recognition_levels,
            "knn_raw_pixels": _share(probes.raw_pixels, measured),
            "linear_untrained": _share(self.untrained, measured),
            "probe_selection": probes.evaluation.probe_selection,
            **self.cost,
        }


def _share(correct: np.ndarray, measured: bool) -> float:
    return float(correct.mean()) if measured else float("nan")


@dataclass(frozen=True)
class CellResult:
    """One attack on one system: its row, its per-image values, and its reconstructions as uint8 unless it failed."""

    row: dict[str, Any]
    per_image: pd.DataFrame
    reconstruction: np.ndarray | None

    @classmethod
    def of(cls, trial: ScoredAttack, keys: dict[str, Any], rest: dict[str, Any]) -> CellResult:
        """The cell `keys`, with what else its row says beside the trial's own summary."""
        keys = {**keys, "victims": trial.victims.name}
        return cls({**keys, **rest, **trial.summary}, trial.per_image(keys), trial.pixels)


def client_cost(client: nn.Module, image_shape: Sequence[int]) -> dict[str, float]:
    """What rows say of the cost of a client that was trained elsewhere; its messages are floats.

    Its parameters are those on which messages depend: a client that could not be separated from the whole network has
    more.
    """
    copied = copy.deepcopy(client)
    parameters = [parameter.requires_grad_() for parameter in copied.parameters() if parameter.is_floating_point()]
    smashed = copied(torch.zeros(1, *image_shape))
    used: Sequence[Tensor | None] = parameters
    if smashed.requires_grad:  # else the client lets no gradient through
        used = torch.autograd.grad(smashed.sum(), parameters, allow_unused=True)
    return {
        "client_parameters": sum(p.numel() for p, slope in zip(parameters, used, strict=True) if slope is not None),
        "client_flops": forward_flops(client, image_shape),
        "smashed_bytes_per_image": smashed.numel() * FLOAT_BYTES,
    }


def score_attempt(scoring: Scoring, victims: VictimSet, attempted: Attempt) -> ScoredAttack:
    """`attempted` with every metric of every image of `victims`; without any if the attack failed."""
    reconstruction = attempted.reconstruction
    return ScoredAttack(victims, attempted, {} if reconstruction is None else scoring.score(victims, reconstruction))


def try_attack(
    conditions: AttackConditions,
    scoring: Scoring,
    target: Target,
    attack: Loaded[Attack],
    victim_sets: Sequence[VictimSet],
    progress: Progress | None = None,
    observer: Observer | None = None,
) -> list[ScoredAttack]:
    """Let `attack` try all victims at once, and score each set by itself; see :func:`attempt`."""
    attempts = attempt(conditions, target, attack, victim_sets, progress, observer)
    return [
        score_attempt(scoring, victims, attempted) for victims, attempted in zip(victim_sets, attempts, strict=True)
    ]
