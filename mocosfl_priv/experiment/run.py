"""Run a plan in this process, one system after the other."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import numpy as np

from mocosfl_priv.errors import ConfigurationError, RunFailedError
from mocosfl_priv.experiment.attack_system import attack_system, link_system, with_own_plugin
from mocosfl_priv.experiment.disk import checkpoint_bytes
from mocosfl_priv.experiment.linkage import Linked
from mocosfl_priv.experiment.plan import Plan
from mocosfl_priv.experiment.record import assemble
from mocosfl_priv.experiment.rows import CellResult, SystemResult
from mocosfl_priv.experiment.train import DEFENDER, checkpoints_of, train_system
from mocosfl_priv.results import RunRecord, require_room
from mocosfl_priv.runtime.files import Lock, remove_empty
from mocosfl_priv.runtime.progress import Progress, Segment, Silent
from mocosfl_priv.training.participants import RemoteParticipants


def run_plan(
    plan: Plan,
    progress: Progress | None = None,
    resume_dir: Path | None = None,
    remote: RemoteParticipants | None = None,
) -> RunRecord:
    """Train every system, attack it with every attack, and gather the record.

    resume_dir: folder for the checkpoints of trainings, from which they resume; nothing else is written.
    remote: see :func:`mocosfl_priv.training.loop.train_mocosfl`.
    Errors propagate.
    """
    with _held(resume_dir, plan):
        return _run_plan(plan, progress or Silent(), resume_dir, remote)


@contextmanager
def _held(resume_dir: Path | None, plan: Plan) -> Iterator[None]:
    """Lock the folder of checkpoints, and check that it has room; ConfigurationError where that is not so."""
    if resume_dir is None:
        yield
        return
    with ExitStack() as held:
        try:
            held.enter_context(Lock(resume_dir / "lock"))
        except BlockingIOError as error:
            raise ConfigurationError(
                f"--resume-dir: another run is at work in {resume_dir} ({error.strerror}); wait for it, or choose "
                "another folder"
            ) from error
        except OSError as error:
            raise ConfigurationError(f"--resume-dir: {resume_dir} cannot be written: {error.strerror}") from error
        held.callback(remove_empty, resume_dir)  # of trainings that kept no state
        there = any(resume_dir.glob("*/step_*"))  # what an earlier run has written needs no room again
        require_room(resume_dir, 0 if there else checkpoint_bytes(plan), f"--resume-dir {resume_dir}")
        yield


def _run_plan(plan: Plan, progress: Progress, resume_dir: Path | None, remote: RemoteParticipants | None) -> RunRecord:
    context = plan.context
    started = time.monotonic()
    systems: list[SystemResult] = []
    models: dict[str, dict[str, np.ndarray]] = {}
    cells: list[CellResult] = []
    linked: list[Linked] = []
    for system in plan.systems:  # somebody else's checkpoints are refused before anything is trained
        for training in plan.trainings:
            if (kept := checkpoints_of(context, system, resume_dir, training)) is not None:
                kept.verify()
                kept.below(DEFENDER).verify()
    progress.plan(_segments(plan))
    context.scoring.judge  # noqa: B018 - trained here, lest the time of a system's training includes it
    try:
        for system in plan.systems:
            for training in plan.trainings:
                progress.segment()
                trained = train_system(context, system, progress, resume_dir, training, remote)
                systems.append(trained.result())
                models[f"{trained.file_stem}.safetensors"] = trained.checkpoint()
                for _ in plan.linkage_segments(system, training):
                    progress.segment()
                linkage = link_system(context, trained.system, trained.model)
                if not training.hijacker:
                    linked.append((system.keys, linkage))
                for attack in training.attacks:
                    progress.segment()
                    cells.append(attack_system(context, trained, with_own_plugin(attack), progress, linkage=linkage))
    except ConfigurationError as error:  # found too late to be called a request that was refused
        raise RunFailedError(str(error)) from error
    return assemble(plan, systems, models, cells, linked, time.monotonic() - started)


def _segments(plan: Plan) -> list[Segment]:
    """Training and attacks in the order in which they run."""
    return [
        segment
        for system in plan.systems
        for training in plan.trainings
        for segment in (
            plan.training_segment(system, training, plan.expert_steps(system)),
            *plan.linkage_segments(system, training),
            *(plan.attack_segment(system, attack) for attack in training.attacks),
        )
    ]
