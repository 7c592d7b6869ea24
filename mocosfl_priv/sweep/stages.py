"""The stages of a sweep: what each computes from what, and under which address its artefact lies.

A trained system serves all attacks on it, the judge of recognition all attacks of a configuration. Every stage is a
function of a :class:`Work` that runs in whichever process an engine gives it to.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from pathlib import Path

from mocosfl_priv.config import ExperimentConfig
from mocosfl_priv.errors import RunFailedError, StorageError
from mocosfl_priv.experiment import CellResult, System, TrainedSystem, attack_system, train_system
from mocosfl_priv.plugins import Attack, Loaded
from mocosfl_priv.progress import Segment
from mocosfl_priv.references import cause
from mocosfl_priv.results import ATTACK_COSTS, RunRecord
from mocosfl_priv.stream import Training
from mocosfl_priv.sweep.addresses import attack_document, judge_document, system_document
from mocosfl_priv.sweep.assembly import assemble
from mocosfl_priv.sweep.grid import Plan, lay_out
from mocosfl_priv.sweep.schedule import Task
from mocosfl_priv.sweep.store import Store, address
from mocosfl_priv.sweep.stored import load_cell, load_judge, load_system, save_cell, save_judge, save_system
from mocosfl_priv.target import Trial
from mocosfl_priv.training.checkpoints import DamagedCheckpointError

SYSTEM, JUDGE, ATTACK = "system", "judge", "attack"  # kinds of artefacts
SECONDS_PER_JUDGE_EPOCH = 2.0


@dataclass(frozen=True)
class Work:
    """What a stage computes: a place in the grid of `config`, and the store that holds what it needs.

    config: an `ExperimentConfig` as JSON. system, training, attack: indices into the plan, as far as the stage is
    about them.
    """

    config: str
    store: Path
    system: int = 0
    training: int = 0
    attack: int = 0


@dataclass(frozen=True)
class Cell:
    """An attack on a trained system: where its row comes from."""

    system: System
    training: Training
    attack: Loaded[Attack]
    system_key: str
    key: str


def cells_of(plan: Plan) -> list[Cell]:
    """All rows of a plan, in its order."""
    lab = plan.laboratory
    return [
        Cell(
            system,
            training,
            attack,
            address(system_document(lab, system, training)),
            address(attack_document(lab, system, training, attack)),
        )
        for system in plan.systems
        for training in plan.trainings
        for attack in training.attacks
    ]


def missing_tasks(plan: Plan, store: Store, where: str = "") -> list[Task]:
    """What is to be computed for `plan`, save for what the store has. An attack that failed before is tried again.

    where: put before their titles.
    """
    config = plan.config.model_dump_json()
    lab = plan.laboratory
    epochs = lab.config.evaluation.recognition_epochs
    judge_key = address(judge_document(lab)) if epochs else None
    trainings: dict[str, Task] = {}
    attacks: list[Task] = []
    intact: set[str] = set()
    for work, cell in _places(plan, config, store.folder):
        if cell.system_key not in intact | trainings.keys():
            if store.get(SYSTEM, cell.system_key) is not None:
                intact.add(cell.system_key)
            else:
                segment = _placed(where, plan.training_segment(cell.system, cell.training))
                trainings[cell.system_key] = Task(cell.system_key, segment, train, (work,))
        found = store.get(ATTACK, cell.key)
        if found is not None and not found.facts["failure"]:
            continue
        if found is not None:
            store.discard(ATTACK, cell.key)
        needs = (cell.system_key,) if judge_key is None else (cell.system_key, judge_key)
        segment = _placed(where, plan.attack_segment(cell.system, cell.attack))
        attacks.append(Task(cell.key, segment, attack, (work,), needs))
    judges = []
    if attacks and judge_key is not None and not store.has(JUDGE, judge_key):
        segment = Segment("train the judge of recognition", JUDGE, SECONDS_PER_JUDGE_EPOCH * epochs)
        judges.append(Task(judge_key, segment, judge, (Work(config, store.folder),)))
    return [*judges, *trainings.values(), *attacks]


def _placed(where: str, segment: Segment) -> Segment:
    return replace(segment, title=f"{where}: {segment.title}") if where else segment


def _places(plan: Plan, config: str, store: Path) -> Iterator[tuple[Work, Cell]]:
    cells = iter(cells_of(plan))
    for i in range(len(plan.systems)):
        for j, training in enumerate(plan.trainings):
            for k in range(len(training.attacks)):
                yield Work(config, store, i, j, k), next(cells)


def train(work: Work) -> None:
    """Train a system and store it; an interrupted training goes on from its last checkpoint."""
    plan = _plan(work.config)
    _trained(plan, Store(work.store), plan.systems[work.system], plan.trainings[work.training])


def judge(work: Work) -> None:
    """Train the judge of recognition and store it."""
    _give_judge(_plan(work.config), Store(work.store))


def attack(work: Work) -> None:
    """Attack a stored system, score, and store the cell. A stored system that is damaged is trained again."""
    plan, store = _plan(work.config), Store(work.store)
    system, training = plan.systems[work.system], plan.trainings[work.training]
    loaded = training.attacks[work.attack]
    document = attack_document(plan.laboratory, system, training, loaded)
    if store.has(ATTACK, address(document)):
        return
    _give_judge(plan, store)
    trained = _trained(plan, store, system, training)
    started = time.monotonic()
    try:
        cell = attack_system(plan.laboratory, trained, loaded)
    except Exception as error:  # what is raised must survive the way to another process
        raise RunFailedError(cause(error)) from error
    facts = {"seconds": time.monotonic() - started, "failure": cell.row["failure"]}
    store.put(ATTACK, address(document), partial(save_cell, cell), facts, document)


def stored_record(config: ExperimentConfig, store: Store, failures: Mapping[str, str]) -> RunRecord:
    """The record of `config` from the store; failures: causes by key, of what could not be computed."""
    plan = lay_out(config)
    _give_judge(plan, store)
    cells = [_read_cell(plan, store, cell, failures) for cell in cells_of(plan)]
    systems = _read_systems(plan, store)
    seconds = sum(system.cost["training_seconds"] for system in systems)
    seconds += sum(cell.row["attack_seconds"] for cell in cells if not cell.row["failure"])
    return assemble(plan, systems, cells, seconds)


def _read_cell(plan: Plan, store: Store, cell: Cell, failures: Mapping[str, str]) -> CellResult:
    """The row of `cell`: from the store, or with the cause why it is not there."""
    found = store.get(ATTACK, cell.key)
    if found is not None:
        return load_cell(found)
    cause = failures.get(cell.key, "its artefact was damaged; --resume computes it again")
    cost = dict.fromkeys(ATTACK_COSTS, float("nan")) | {"attack_out_of_time": False}
    trial = Trial(plan.laboratory.victims, None, {}, cost, cause)
    return CellResult.of(trial, {**cell.system.keys, "attack": cell.attack.label}, {})


def _read_systems(plan: Plan, store: Store) -> list[TrainedSystem]:
    """The trained systems of `plan` that there are, in its order."""
    lab = plan.laboratory
    found = []
    for system in plan.systems:
        for training in plan.trainings:
            artefact = store.get(SYSTEM, address(system_document(lab, system, training)))
            if artefact is not None:
                found.append(load_system(lab, system, training, artefact))
    return found


@lru_cache(maxsize=2)  # a process works on one configuration after the other
def _plan(config: str) -> Plan:
    return lay_out(ExperimentConfig.model_validate_json(config))


def _give_judge(plan: Plan, store: Store) -> None:
    lab = plan.laboratory
    if "recognition" in vars(lab) or not lab.config.evaluation.recognition_epochs:
        return
    document = judge_document(lab)
    found = store.get(JUDGE, address(document))
    if found is not None:
        lab.recognition = load_judge(lab, found)
    else:
        started = time.monotonic()
        judge = lab.recognition
        assert judge is not None
        seconds = {"seconds": time.monotonic() - started}
        store.put(JUDGE, address(document), partial(save_judge, judge), seconds, document)


def _trained(plan: Plan, store: Store, system: System, training: Training) -> TrainedSystem:
    """From the store; else trained, and from then on there."""
    lab = plan.laboratory
    document = system_document(lab, system, training)
    key = address(document)
    found = store.get(SYSTEM, key)
    if found is None:
        started = time.monotonic()
        unfinished = store.scratch(key)
        trained = _train(plan, system, training, unfinished)
        facts = {"seconds": time.monotonic() - started}
        store.put(SYSTEM, key, partial(save_system, trained), facts, document)
        shutil.rmtree(unfinished, ignore_errors=True)
        found = store.get(SYSTEM, key)
        if found is None:
            raise StorageError(f"what was written to {store.folder} came back damaged")
    # also what was just trained is read back: an attack must find the same, whoever trained
    return load_system(lab, system, training, found)


def _train(plan: Plan, system: System, training: Training, unfinished: Path) -> TrainedSystem:
    try:
        return train_system(plan.laboratory, system, None, unfinished, training)
    except DamagedCheckpointError:
        shutil.rmtree(unfinished)
        return train_system(plan.laboratory, system, None, unfinished, training)
    except StorageError:
        raise
    except Exception as error:  # what is raised must survive the way to another process
        raise RunFailedError(cause(error)) from error
