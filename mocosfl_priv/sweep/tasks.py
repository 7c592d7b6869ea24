"""Turn the stages of plans into tasks for what the store lacks, and run such a task in a worker process."""

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
from mocosfl_priv.sweep.stages import STAGES, AttackStage, Place, Stage, cells_of, ensure, linkages_of, systems_of
from mocosfl_priv.sweep.store import Store


@dataclass(frozen=True)
class Work:
    """The description of a stage that is sent to a worker process.

    config: an `ExperimentConfig` as JSON.
    store: the store's folder.
    kind, place: identify the stage in the plan of `config`.
    key: the address that the sweep planned; the worker checks that it computes the same.
    """

    config: str
    store: Path
    kind: str
    key: str
    place: Place


@dataclass
class TaskPlanner:
    """Collects what the store lacks for several plans, each stage once.

    store: where results are looked up and stored.
    tasks: tasks by artefact key, each after those that it needs.
    cells: maps the key of the score of each cell to the key of the attack that is scored.
    """

    store: Store
    tasks: dict[str, Task] = field(default_factory=dict)
    cells: dict[str, str] = field(default_factory=dict)
    _stored: set[str] = field(default_factory=set)

    @property
    def in_order(self) -> list[Task]:
        """The tasks by kind, in the order of :data:`STAGES`: tasks that others need come first."""
        order = list(STAGES)
        return sorted(self.tasks.values(), key=lambda task: order.index(task.arguments[0].kind))

    @property
    def cached(self) -> int:
        """The number of cells whose results are all in the store."""
        return sum(score not in self.tasks and attack not in self.tasks for score, attack in self.cells.items())

    def add(self, plan: Plan, where: str = "") -> None:
        """Add tasks for what the store lacks of `plan`. An attack that failed in an earlier sweep is tried again.

        where: prefix of the tasks' titles, such as the name of the variant.
        """
        config = plan.config.model_dump_json()
        for system in systems_of(plan):  # results include the system, even if all attacks on it are stored
            self._require([system], config, where)
        for linkage in linkages_of(plan):
            self._require([linkage], config, where)
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
    """Compute and store the artefact described by `work`; anything it needs that the store has lost is computed too.

    Raises RunFailedError if code, data or hardware here differ from those that the sweep was planned with.
    """
    stage = STAGES[work.kind](_plan(work.config), work.place)
    if stage.key != work.key:
        raise RunFailedError(
            f"code, data or precision on {platform.node()} differ from those that the sweep was planned with: files "
            "were changed while it ran, or its machines differ. Set compute.device and compute.precision, and resume it"
        )
    ensure(stage, Store(work.store, make=False))


def _placed(where: str, segment: Segment) -> Segment:
    return replace(segment, title=f"{where}: {segment.title}") if where else segment


def _plan(config: str) -> Plan:
    """The plan of `config`, cached per GPU: a process may get another GPU with its next task."""
    return _plan_on(config, torch.cuda.current_device() if torch.cuda.is_available() else 0)


@lru_cache(maxsize=2)  # tasks of one configuration mostly follow each other
def _plan_on(config: str, device: int) -> Plan:  # noqa: ARG001 - only a cache key
    return lay_out(ExperimentConfig.model_validate_json(config))
