"""From the stages of a plan to tasks: what the store lacks, and what a process does that is given one of them."""

from __future__ import annotations

import platform
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch

from mocosfl_priv.config import ExperimentConfig
from mocosfl_priv.errors import RunFailedError
from mocosfl_priv.experiment.plan import Plan, lay_out
from mocosfl_priv.runtime.progress import Segment
from mocosfl_priv.sweep.schedule import Task
from mocosfl_priv.sweep.stages import STAGES, AttackStage, Place, Stage, cells_of, ensure, systems_of
from mocosfl_priv.sweep.store import Store


@dataclass(frozen=True)
class Work:
    """What another process needs to know of a stage: its kind and place, and the address that it was planned with.

    config: an `ExperimentConfig` as JSON.
    """

    config: str
    store: Path
    kind: str
    key: str
    place: Place


@dataclass
class TaskPlanner:
    """What a store lacks for several plans: every stage once, whoever needs it, after what it needs itself.

    tasks: by their keys. cells: of all plans, by the keys of their scores; the key of the attack that is scored.
    """

    store: Store
    tasks: dict[str, Task] = field(default_factory=dict)
    cells: dict[str, str] = field(default_factory=dict)
    _stored: set[str] = field(default_factory=set)

    @property
    def in_order(self) -> list[Task]:
        """The tasks, kind by kind: what others wait for first."""
        order = list(STAGES)
        return sorted(self.tasks.values(), key=lambda task: order.index(task.arguments[0].kind))

    @property
    def cached(self) -> int:
        """Cells for which nothing is left to do."""
        return sum(score not in self.tasks and attack not in self.tasks for score, attack in self.cells.items())

    def add(self, plan: Plan, where: str = "") -> None:
        """What `plan` lacks, too. An attack that failed before is tried again. where: put before the tasks' titles."""
        config = plan.config.model_dump_json()
        for system in systems_of(plan):  # results say what became of it, though all attacks on it be stored
            self._require([system], config, where)
        for cell in cells_of(plan):
            attacked = cell.attacked
            self.cells[cell.key] = attacked.key
            self._require([attacked, cell], config, where)

    def _require(self, stages: Sequence[Stage[Any]], config: str, where: str) -> None:
        for stage in stages:
            if stage.key in self._stored or stage.key in self.tasks:
                continue
            if self._has(stage):
                self._stored.add(stage.key)
                continue
            needs = stage.needs
            self._require(needs, config, where)
            work = Work(config, self.store.folder, stage.kind, stage.key, stage.place)
            segment = _placed(where, stage.segment)
            self.tasks[stage.key] = Task(stage.key, segment, compute, (work,), tuple(need.key for need in needs))

    def _has(self, stage: Stage[Any]) -> bool:
        found = self.store.get(stage.kind, stage.key)
        if found is not None and isinstance(stage, AttackStage) and found.facts["failure"]:
            self.store.discard(stage.kind, stage.key)
            return False
        return found is not None


def compute(work: Work) -> None:
    """Compute what `work` names, and store it. What it needs and was lost meanwhile is made again."""
    stage = STAGES[work.kind](_plan(work.config), work.place)
    if stage.key != work.key:
        raise RunFailedError(
            f"code, data or precision on {platform.node()} are not those that the sweep was planned with: were files "
            "changed while it ran, or are its machines unlike? Resume it, with compute.device and compute.precision set"
        )
    ensure(stage, Store(work.store, make=False))


def _placed(where: str, segment: Segment) -> Segment:
    return replace(segment, title=f"{where}: {segment.title}") if where else segment


def _plan(config: str) -> Plan:
    """The plan of `config`, made once where its images lie: a process may get another GPU with its next task."""
    return _plan_on(config, torch.cuda.current_device() if torch.cuda.is_available() else 0)


@lru_cache(maxsize=2)  # a process works on one configuration after the other
def _plan_on(config: str, device: int) -> Plan:  # noqa: ARG001 - the current one
    return lay_out(ExperimentConfig.model_validate_json(config))
