"""The stages of a sweep: what each computes from what, and under which address its artefact lies.

A trained system serves all attacks on it, the judge of recognition all attacks of a configuration. Every stage is a
function of a :class:`Work` that runs in whichever process an engine gives it to.
"""

from __future__ import annotations

import platform
import shutil
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from pathlib import Path

import torch

from mocosfl_priv.config import ExperimentConfig
from mocosfl_priv.errors import RunFailedError, StorageError
from mocosfl_priv.experiment import CellResult, System, TrainedSystem, attack_system, train_system, with_own_plugin
from mocosfl_priv.plugins import Attack, Loaded
from mocosfl_priv.progress import Segment
from mocosfl_priv.results import ATTACK_COSTS, RunRecord
from mocosfl_priv.stream import Training
from mocosfl_priv.sweep.addresses import Document, attack_document, judge_document, system_document
from mocosfl_priv.sweep.assembly import assemble
from mocosfl_priv.sweep.grid import Plan, lay_out
from mocosfl_priv.sweep.schedule import Task
from mocosfl_priv.sweep.store import Store, address
from mocosfl_priv.sweep.stored import load_cell, load_judge, load_system, save_cell, save_judge, save_system
from mocosfl_priv.target import Trial
from mocosfl_priv.training.checkpoints import DamagedCheckpointError

SYSTEM, JUDGE, ATTACK = "system", "judge", "attack"  # kinds of artefacts
SECONDS_PER_JUDGE_EPOCH = 2.0


Place = tuple[int, int, int]  # indices of system, training and attack in a plan


@dataclass(frozen=True)
class Work:
    """What a stage computes: the artefact `key`, at a place in a grid, into the store that has what it needs.

    config: an `ExperimentConfig` as JSON.
    """

    config: str
    store: Path
    key: str
    place: Place = (0, 0, 0)


@dataclass(frozen=True)
class Cell:
    """An attack on a trained system: where its row comes from."""

    place: Place
    system: System
    training: Training
    attack: Loaded[Attack]
    system_key: str
    key: str


def cells_of(plan: Plan) -> Iterator[Cell]:
    """All rows of a plan, in its order."""
    lab = plan.laboratory
    for i, system in enumerate(plan.systems):
        for j, training in enumerate(plan.trainings):
            system_key = address(system_document(lab, system, training))
            for k, attack in enumerate(training.attacks):
                key = address(attack_document(lab, system, training, attack))
                yield Cell((i, j, k), system, training, attack, system_key, key)


def missing_tasks(plan: Plan, store: Store, where: str = "") -> list[Task]:
    """What is to be computed for `plan`, save for what the store has. An attack that failed before is tried again.

    where: put before their titles.
    """
    config = plan.config.model_dump_json()
    epochs = plan.config.evaluation.recognition_epochs
    judge_key = address(judge_document(plan.laboratory)) if epochs else None
    judged = (judge_key,) if judge_key else ()
    trainings: dict[str, Task] = {}
    attacks: list[Task] = []
    intact: set[str] = set()
    for cell in cells_of(plan):
        if cell.system_key not in intact | trainings.keys():
            if store.get(SYSTEM, cell.system_key) is not None:
                intact.add(cell.system_key)
            else:
                work = Work(config, store.folder, cell.system_key, cell.place)
                segment = _placed(where, plan.training_segment(cell.system, cell.training))
                needs = judged if plan.config.leakage.every else ()  # the points of its curve are judged
                trainings[cell.system_key] = Task(cell.system_key, segment, train, (work,), needs)
        if _is_done(store, cell):
            continue
        work = Work(config, store.folder, cell.key, cell.place)
        segment = _placed(where, plan.attack_segment(cell.system, cell.attack))
        attacks.append(Task(cell.key, segment, attack, (work,), (cell.system_key, *judged)))
    judges = []
    if judge_key is not None and store.get(JUDGE, judge_key) is None:
        segment = Segment("train the judge of recognition", JUDGE, SECONDS_PER_JUDGE_EPOCH * epochs)
        judges.append(Task(judge_key, segment, judge, (Work(config, store.folder, judge_key),)))
    return [*judges, *trainings.values(), *attacks]


def _is_done(store: Store, cell: Cell) -> bool:
    found = store.get(ATTACK, cell.key)
    if found is None or not found.facts["failure"]:
        return found is not None
    store.discard(ATTACK, cell.key)
    return False


def _placed(where: str, segment: Segment) -> Segment:
    return replace(segment, title=f"{where}: {segment.title}") if where else segment


def train(work: Work) -> None:
    """Train a system and store it; an interrupted training goes on from its last checkpoint."""
    plan, store = _plan(work.config), Store(work.store, make=False)
    system, training, _ = _at(plan, work.place)
    _require(work, system_document(plan.laboratory, system, training))
    if plan.config.leakage.every:
        _give_judge(plan, store)
    _trained(plan, store, system, training)


def judge(work: Work) -> None:
    """Train the judge of recognition and store it."""
    lab, store = _plan(work.config).laboratory, Store(work.store, make=False)
    document = judge_document(lab)
    _require(work, document)
    started = time.monotonic()
    trained = lab.recognition
    assert trained is not None, "a judge was planned where recognition is switched off"
    store.put(JUDGE, work.key, partial(save_judge, trained), {"seconds": time.monotonic() - started}, document)


def attack(work: Work) -> None:
    """Attack a stored system, score, and store the cell. A stored system that is damaged is trained again."""
    plan, store = _plan(work.config), Store(work.store, make=False)
    system, training, loaded = _at(plan, work.place)
    document = attack_document(plan.laboratory, system, training, loaded)
    _require(work, document)
    if store.has(ATTACK, work.key):
        return
    _give_judge(plan, store)
    trained = _trained(plan, store, system, training)
    started = time.monotonic()
    cell = attack_system(plan.laboratory, trained, with_own_plugin(loaded))
    facts = {"seconds": time.monotonic() - started, "failure": cell.row["failure"]}
    store.put(ATTACK, work.key, partial(save_cell, cell), facts, document)


def stored_record(config: ExperimentConfig, store: Store, failures: Mapping[str, str]) -> RunRecord:
    """The record of `config` from the store; failures: causes by key, of what could not be computed."""
    plan = lay_out(config)
    judge = store.get(JUDGE, address(judge_document(plan.laboratory)))
    # nothing is computed here: without a judge nothing was recognised
    plan.laboratory.recognition = load_judge(plan.laboratory, judge) if judge else None
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


def _plan(config: str) -> Plan:
    """The plan of `config`, made once where its images lie: a process may get another GPU with its next task."""
    return _plan_on(config, torch.cuda.current_device() if torch.cuda.is_available() else 0)


@lru_cache(maxsize=2)  # a process works on one configuration after the other
def _plan_on(config: str, device: int) -> Plan:  # noqa: ARG001 - the current one
    return lay_out(ExperimentConfig.model_validate_json(config))


def _at(plan: Plan, place: Place) -> tuple[System, Training, Loaded[Attack]]:
    i, j, k = place
    training = plan.trainings[j]
    return plan.systems[i], training, training.attacks[k]


def _require(work: Work, document: Document) -> None:
    """What is stored must be what was planned: here may be other code, other data, or another kind of machine."""
    if address(document) != work.key:
        raise RunFailedError(
            f"code, data or precision on {platform.node()} are not those that the sweep was planned with: were files "
            "changed while it ran, or are its machines unlike? Resume it, with compute.device and compute.precision set"
        )


def _give_judge(plan: Plan, store: Store) -> None:
    """Have the laboratory use the stored judge; where that was lost meanwhile, it trains the same when it needs it."""
    lab = plan.laboratory
    if "recognition" not in vars(lab) and lab.config.evaluation.recognition_epochs:
        found = store.get(JUDGE, address(judge_document(lab)))
        if found is not None:
            lab.recognition = load_judge(lab, found)


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
    own = replace(training, attending=tuple(with_own_plugin(attack) for attack in training.attending))
    try:
        return train_system(plan.laboratory, system, None, unfinished, own)
    except DamagedCheckpointError:
        shutil.rmtree(unfinished)
        return train_system(plan.laboratory, system, None, unfinished, own)
