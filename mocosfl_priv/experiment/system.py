"""A system: a point of the grid without its attack; and what training makes of it."""

from __future__ import annotations

import copy
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np

from mocosfl_priv.evaluation.utility import Utility
from mocosfl_priv.experiment.observers import ObserverGroup, Training
from mocosfl_priv.experiment.rows import SystemResult
from mocosfl_priv.models.split import SplitModel
from mocosfl_priv.plugins import Defense, Loaded, detector_in
from mocosfl_priv.plugins.guarantee import Guarantee
from mocosfl_priv.results import ANALYTIC_COSTS, semi_column, short_name
from mocosfl_priv.training.loop import TrainedModel
from mocosfl_priv.training.state import under

HONEST = Training((), ())
LONGEST_LABEL = 80  # bytes of a label in a file name; a hijacked system's name has two


@dataclass(frozen=True)
class System:
    """What is trained once and then attacked by every attack: a point of the grid without its attack."""

    defense: Loaded[Defense]
    cut_layer: int
    target_fraction: float
    seed: int

    @property
    def keys(self) -> dict[str, Any]:
        """The columns that identify it in a result."""
        return {
            "defense": self.defense.label,
            "cut_layer": self.cut_layer,
            "target_fraction": self.target_fraction,
            "seed": self.seed,
        }

    @property
    def title(self) -> str:
        """For people."""
        fraction = f", {self.target_fraction:.3g} target data" if self.defense.plugin.uses_target_data else ""
        return f"{self.defense.label}, cut {self.cut_layer}{fraction}, seed {self.seed}"

    @property
    def file_stem(self) -> str:
        """A file name that is unique within a run."""
        return f"{_in_file_name(self.defense.label)}_cut{self.cut_layer}_target{self.target_fraction:g}_seed{self.seed}"

    def with_own_defense(self) -> System:
        """The same with a copy of the defense, which its training may change and no other system sees."""
        return replace(self, defense=replace(self.defense, plugin=copy.deepcopy(self.defense.plugin)))

    def trained_title(self, training: Training) -> str:
        """For people: this system, trained in that way."""
        return f"{self.title}, hijacked by {training.hijacker.label}" if training.hijacker else self.title

    def trained_stem(self, training: Training) -> str:
        """A file name for what `training` of this system leaves, unique within a run."""
        hijacker = f"_hijacked_by_{_in_file_name(training.hijacker.label)}" if training.hijacker else ""
        return self.file_stem + hijacker


def _in_file_name(label: str) -> str:
    return short_name("".join(c if c.isalnum() or c in "-_." else "_" for c in label), LONGEST_LABEL)


@dataclass
class TrainedSystem:
    """A trained system with its utility and cost, and the observers of its training.

    system: with the defense as training left it.
    guarantee: what it promises of any attacker that sees every message that training makes of an image; None for
        nothing.
    """

    system: System
    training: Training
    observers: ObserverGroup
    trained: TrainedModel
    utility: Utility
    untrained: np.ndarray
    cost: dict[str, float]
    frozen: bool
    guarantee: Guarantee | None = None

    @property
    def model(self) -> SplitModel:
        """The selected checkpoint."""
        return self.trained.model

    @property
    def file_stem(self) -> str:
        """A file name that is unique within a run."""
        return self.system.trained_stem(self.training)

    def checkpoint(self) -> dict[str, np.ndarray]:
        """Client, trunk and projector, and what the defense has learned, as named arrays."""
        state = {**self.model.named_state(), **under("defense", self.system.defense.plugin.state())}
        return {name: value.detach().cpu().contiguous().numpy() for name, value in state.items()}

    def result(self) -> SystemResult:
        """What results say of it."""
        outcome, hijacker = self.trained, self.training.hijacker
        return SystemResult(
            keys=self.system.keys,
            hijacker=hijacker.label if hijacker else "",
            file_stem=self.file_stem,
            utility=self.utility,
            untrained=self.untrained,
            cost=self.cost,
            history=outcome.history,
            leakage_points=outcome.leakage_points,
            detection=self._detection(),
            info={
                "steps": outcome.steps,
                "selected_step": outcome.selected_step,
                "frozen_client": self.frozen,
                "guarantee": self.guarantee.as_json() if self.guarantee else None,
                "smashed_shape": list(self.model.smashed_shape),
                "linear_probe_penalty": self.utility.linear_penalty,
                "semi_supervised": {
                    semi_column(fraction): {"labels": result.labels, "epoch": result.epoch}
                    for fraction, result in self.utility.semi_supervised.items()
                },
                "traffic_bytes": vars(outcome.traffic),
                "analytic_cost": {name: self.cost[name] for name in ANALYTIC_COSTS},
                "client_kernel": outcome.kernel,
                "replay_epochs": outcome.replay_epochs,
            },
        )

    def _detection(self) -> dict[str, Any] | None:
        detector, hijacker = detector_in(self.system.defense.plugin), self.training.hijacker
        if detector is None:
            return None
        detection = detector.detection()
        observer = self.observers.of(hijacker.label) if hijacker else None
        return {
            "hijacked_by": hijacker.label if hijacker else "",
            "alarm": detection.alarm,
            **asdict(detection),
            "failure": observer.failure if observer else "",
        }
