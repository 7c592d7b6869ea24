"""The stages of a sweep. Each stage computes one artefact from the artefacts of the stages that it needs.

    expert -> system -> attack -> score
                     -> linkage   ^
                        judge ----'

An artefact is shared: one expert by all systems that start from it, one trained system by all attacks on it, one
attack's reconstructions by all ways to score them, and one recognition judge by all scores of a configuration.
"""

from __future__ import annotations

import shutil
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any, ClassVar, Generic, TypeVar

import numpy as np

from mocosfl_priv.errors import RunFailedError, StorageError
from mocosfl_priv.evaluation.recognition import RecognitionJudge
from mocosfl_priv.experiment.attack import Attempt
from mocosfl_priv.experiment.attack_system import attempt_on, link_system, with_own_plugin
from mocosfl_priv.experiment.linkage import Linkage
from mocosfl_priv.experiment.observers import Training
from mocosfl_priv.experiment.plan import SECONDS_PER_EXPERT_STEP, Plan
from mocosfl_priv.experiment.rows import score_attempt
from mocosfl_priv.experiment.system import System, TrainedSystem
from mocosfl_priv.experiment.train import expert_trainer, train_expert, train_system
from mocosfl_priv.plugins import Attack, Loaded, TrainedExpert
from mocosfl_priv.runtime.progress import Segment
from mocosfl_priv.sweep.addresses import (
    Document,
    attack_document,
    expert_document,
    judge_document,
    linkage_document,
    score_document,
    system_document,
)
from mocosfl_priv.sweep.artefacts import (
    load_attempt,
    load_expert,
    load_judge,
    load_linkage,
    load_score,
    load_system,
    save_attempt,
    save_expert,
    save_judge,
    save_linkage,
    save_score,
    save_system,
)
from mocosfl_priv.sweep.store import Artefact, Store, address
from mocosfl_priv.training.checkpoints import Checkpoints, DamagedCheckpointError

SECONDS_PER_JUDGE_EPOCH, SECONDS_PER_SCORE = 2.0, 0.5

Made = TypeVar("Made")
Place = tuple[int, int, int]  # indices of system, training and attack in a plan


@dataclass(frozen=True)
class Stage(ABC, Generic[Made]):
    """One artefact to compute, at a place in a plan's grid.

    kind: the kind of the artefact, which names its folder in the store.
    plan: the experiment.
    place: indices of system, training and attack in `plan`; those that do not apply are 0.
    """

    kind: ClassVar[str]
    plan: Plan
    place: Place = (0, 0, 0)

    @property
    @abstractmethod
    def document(self) -> Document:
        """Everything that determines the artefact (see :mod:`mocosfl_priv.sweep.addresses`)."""

    @property
    @abstractmethod
    def segment(self) -> Segment:
        """Title and expected duration, for progress displays."""

    @property
    def needs(self) -> Sequence[Stage[Any]]:
        """The stages whose artefacts it is computed from."""
        return ()

    @abstractmethod
    def compute(self, store: Store) -> Made:
        """Compute the artefact; what it needs is read from `store`."""

    @abstractmethod
    def save(self, made: Made, folder: Path) -> None:
        """Write what :meth:`compute` returned into `folder`."""

    @abstractmethod
    def load(self, artefact: Artefact) -> Made:
        """Read what :meth:`save` wrote."""

    def facts(self, made: Made) -> dict[str, Any]:  # noqa: ARG002
        """Return facts about the artefact that can be read from the store without loading it."""
        return {}

    @cached_property
    def key(self) -> str:
        """The artefact's address in the store: the hash of :attr:`document`."""
        return address(self.document)

    @property
    def system(self) -> System:
        """The system at this place of the grid."""
        return self.plan.systems[self.place[0]]

    @property
    def training(self) -> Training:
        """The training of the system at this place of the grid."""
        return self.plan.trainings[self.place[1]]

    @property
    def attack(self) -> Loaded[Attack]:
        """The attack at this place of the grid."""
        return self.training.attacks[self.place[2]]


def ensure(stage: Stage[Made], store: Store) -> Artefact:
    """Return the artefact of `stage` from the store; compute and store it first if it is not there.

    Raises StorageError if what was just written cannot be read back.
    """
    found = store.get(stage.kind, stage.key)
    if found is None:
        started = time.monotonic()
        made = stage.compute(store)
        facts = {"seconds": time.monotonic() - started, **stage.facts(made)}
        store.put(stage.kind, stage.key, partial(stage.save, made), facts, stage.document)
        shutil.rmtree(store.scratch(stage.key), ignore_errors=True)
        found = store.get(stage.kind, stage.key)
        if found is None:
            raise StorageError(f"files written to {store.folder} were damaged when read back; check the disk")
    return found


def obtain(stage: Stage[Made], store: Store) -> Made:
    """Return what `stage` computes. It is always loaded from the store, so that fresh and stored results are equal."""
    return stage.load(ensure(stage, store))


class ExpertStage(Stage[TrainedExpert]):
    """The expert that a defense trains before the clients train; only for systems whose defense has one."""

    kind = "expert"

    @property
    def document(self) -> Document:
        """See :class:`Stage`."""
        found = expert_document(self.plan.context, self.system)
        assert found is not None, f"{self.system.title} has no expert"
        return found

    @property
    def segment(self) -> Segment:
        """See :class:`Stage`."""
        steps = expert_steps(self.plan, self.system)
        return Segment(
            f"train the expert of {self.system.title}", f"expert of {steps} steps", SECONDS_PER_EXPERT_STEP * steps
        )

    def compute(self, store: Store) -> TrainedExpert:
        """See :class:`Stage`; an interrupted training resumes from its last checkpoint."""
        scratch = store.scratch(self.key)
        return resumed(lambda: train_expert(self.plan.context, self.system, Checkpoints(scratch, self.key)), scratch)

    def save(self, made: TrainedExpert, folder: Path) -> None:
        """See :class:`Stage`."""
        save_expert(made, folder)

    def load(self, artefact: Artefact) -> TrainedExpert:
        """See :class:`Stage`."""
        return load_expert(self.plan.context, self.system, artefact)


class SystemStage(Stage[TrainedSystem]):
    """A trained system and its utility (kNN and linear-probe accuracy)."""

    kind = "system"

    @property
    def document(self) -> Document:
        """See :class:`Stage`."""
        return system_document(self.plan.context, self.system, self.training)

    @property
    def segment(self) -> Segment:
        """See :class:`Stage`."""
        others = self.plan.expert_steps(self.system) - expert_steps(self.plan, self.system)
        return self.plan.training_segment(self.system, self.training, others)

    @property
    def needs(self) -> Sequence[Stage[Any]]:
        """See :class:`Stage`: the expert, if any, and the judge if a leakage curve is measured during training."""
        judge = judge_of(self.plan) if self.plan.config.leakage.every else None
        return [stage for stage in (self._expert, judge) if stage is not None]

    @property
    def _expert(self) -> ExpertStage | None:
        has_one = expert_trainer(self.plan.context, self.system) is not None
        return ExpertStage(self.plan, (self.place[0], 0, 0)) if has_one else None

    def compute(self, store: Store) -> TrainedSystem:
        """See :class:`Stage`; an interrupted training resumes from its last checkpoint."""
        if self.plan.config.leakage.every:
            bring_judge(self.plan, store)
        how = replace(self.training, observing=tuple(with_own_plugin(attack) for attack in self.training.observing))
        expert, scratch = self._expert, store.scratch(self.key)

        def train() -> TrainedSystem:
            handed_out = obtain(expert, store) if expert else None
            return train_system(self.plan.context, self.system, None, scratch, how, expert=handed_out)

        return resumed(train, scratch)

    def save(self, made: TrainedSystem, folder: Path) -> None:
        """See :class:`Stage`."""
        save_system(made, folder)

    def load(self, artefact: Artefact) -> TrainedSystem:
        """See :class:`Stage`."""
        return load_system(self.plan.context, self.system, self.training, artefact)


class LinkageStage(Stage[Linkage]):
    """How the messages of a trained system are matched with candidate images, where that is measured."""

    kind = "linkage"

    @property
    def document(self) -> Document:
        """See :class:`Stage`."""
        return linkage_document(self.plan.context, self.system, self.training)

    @property
    def segment(self) -> Segment:
        """See :class:`Stage`."""
        (found,) = self.plan.linkage_segments(self.system, self.training)
        return found

    @property
    def needs(self) -> Sequence[Stage[Any]]:
        """See :class:`Stage`."""
        return (SystemStage(self.plan, self.place),)

    def compute(self, store: Store) -> Linkage:
        """See :class:`Stage`. Raises RunFailedError with the cause if it fails, so that the next sweep tries again."""
        trained = obtain(SystemStage(self.plan, self.place), store)
        found = link_system(self.plan.context, trained.system, trained.model)
        if found.refusal:
            raise RunFailedError(found.refusal)
        return found

    def save(self, made: Linkage, folder: Path) -> None:
        """See :class:`Stage`."""
        save_linkage(made, folder)

    def load(self, artefact: Artefact) -> Linkage:
        """See :class:`Stage`."""
        return load_linkage(self.plan.context, artefact)


class AttackStage(Stage[Attempt]):
    """The reconstructions that an attack returned for the victims of a trained system."""

    kind = "attack"

    @property
    def document(self) -> Document:
        """See :class:`Stage`."""
        return attack_document(self.plan.context, self.system, self.training, self.attack)

    @property
    def segment(self) -> Segment:
        """See :class:`Stage`."""
        return self.plan.attack_segment(self.system, self.attack)

    @property
    def needs(self) -> Sequence[Stage[Any]]:
        """See :class:`Stage`."""
        return (SystemStage(self.plan, self.place),)

    def compute(self, store: Store) -> Attempt:
        """See :class:`Stage`."""
        trained = obtain(SystemStage(self.plan, self.place), store)
        return attempt_on(self.plan.context, trained, with_own_plugin(self.attack))

    def save(self, made: Attempt, folder: Path) -> None:
        """See :class:`Stage`."""
        save_attempt(made, folder)

    def load(self, artefact: Artefact) -> Attempt:
        """See :class:`Stage`."""
        return load_attempt(artefact)

    def facts(self, made: Attempt) -> dict[str, Any]:
        """See :class:`Stage`: records the failure, so that the next sweep tries a failed attack again."""
        return {"failure": made.failure}


class ScoreStage(Stage[dict[str, np.ndarray]]):
    """The metrics of an attack's reconstructions, arrays of shape (n,) by name: one cell of the grid."""

    kind = "score"

    @property
    def document(self) -> Document:
        """See :class:`Stage`."""
        return score_document(self.plan.context, self.system, self.training, self.attack)

    @property
    def segment(self) -> Segment:
        """See :class:`Stage`."""
        return Segment(f"score {self.system.title}: {self.attack.label}", "score", SECONDS_PER_SCORE)

    @property
    def attacked(self) -> AttackStage:
        """The stage whose reconstructions are scored."""
        return AttackStage(self.plan, self.place)

    @property
    def needs(self) -> Sequence[Stage[Any]]:
        """See :class:`Stage`."""
        judge = judge_of(self.plan)
        return (self.attacked, judge) if judge else (self.attacked,)

    def compute(self, store: Store) -> dict[str, np.ndarray]:
        """See :class:`Stage`. Raises RunFailedError with the cause if the attack failed."""
        attempted = obtain(self.attacked, store)
        if attempted.failure:
            raise RunFailedError(attempted.failure)
        bring_judge(self.plan, store)
        context = self.plan.context
        return score_attempt(context.scoring, context.victims, attempted).values

    def save(self, made: dict[str, np.ndarray], folder: Path) -> None:
        """See :class:`Stage`."""
        save_score(made, folder)

    def load(self, artefact: Artefact) -> dict[str, np.ndarray]:
        """See :class:`Stage`."""
        return load_score(artefact)


class JudgeStage(Stage[RecognitionJudge]):
    """The classifier that judges whether reconstructions are recognised, if the configuration measures that."""

    kind = "judge"

    @property
    def document(self) -> Document:
        """See :class:`Stage`."""
        return judge_document(self.plan.context)

    @property
    def segment(self) -> Segment:
        """See :class:`Stage`."""
        epochs = self.plan.config.evaluation.recognition_epochs
        return Segment("train the recognition judge", self.kind, SECONDS_PER_JUDGE_EPOCH * epochs)

    def compute(self, store: Store) -> RecognitionJudge:  # noqa: ARG002 - it needs nothing
        """See :class:`Stage`."""
        trained = self.plan.context.scoring.judge
        assert trained is not None, "a judge was planned where recognition is switched off"
        return trained

    def save(self, made: RecognitionJudge, folder: Path) -> None:
        """See :class:`Stage`."""
        save_judge(made, folder)

    def load(self, artefact: Artefact) -> RecognitionJudge:
        """See :class:`Stage`."""
        return load_judge(self.plan.context, artefact)


STAGES: dict[str, type[Stage[Any]]] = {
    stage.kind: stage for stage in (JudgeStage, ExpertStage, SystemStage, LinkageStage, AttackStage, ScoreStage)
}


def systems_of(plan: Plan) -> Iterator[SystemStage]:
    """Yield a stage for every training of every system of `plan`, in the plan's order."""
    for i in range(len(plan.systems)):
        for j in range(len(plan.trainings)):
            yield SystemStage(plan, (i, j, 0))


def linkages_of(plan: Plan) -> Iterator[LinkageStage]:
    """Yield a stage for the linkage of every training of every system of `plan`; none where it is not measured."""
    context = plan.context
    if not context.library.refusal(context.conditions, len(context.victims.images)):
        for stage in systems_of(plan):
            yield LinkageStage(plan, stage.place)


def cells_of(plan: Plan) -> Iterator[ScoreStage]:
    """Yield a stage for every cell (result row) of `plan`, in the plan's order."""
    for stage in systems_of(plan):
        i, j, _ = stage.place
        for k in range(len(stage.training.attacks)):
            yield ScoreStage(plan, (i, j, k))


def judge_of(plan: Plan) -> JudgeStage | None:
    """Return the recognition judge of `plan`, or None if recognition is not measured."""
    measured = plan.config.evaluation.recognition_epochs and plan.context.roles.labelled
    return JudgeStage(plan) if measured else None


def bring_judge(plan: Plan, store: Store) -> None:
    """Make `plan` use the recognition judge from `store`, which computes it if needed; nothing if it has none."""
    judge, scoring = judge_of(plan), plan.context.scoring
    if judge is not None and not scoring.has_judge:
        scoring.use(obtain(judge, store))


def expert_steps(plan: Plan, system: System) -> int:
    """Return the number of training steps of the expert of `system`; 0 if it has none."""
    found = expert_trainer(plan.context, system)
    if found is None:
        return 0
    trainer, context, _ = found
    return trainer.plugin.planned_steps(context)


def resumed(train: Callable[[], Made], scratch: Path) -> Made:
    """Return what `train` returns; if it finds a damaged checkpoint, delete that checkpoint and call it again.

    `train` resumes from its newest checkpoint in `scratch`, or starts from the beginning if there is none.
    """
    while True:
        try:
            return train()
        except DamagedCheckpointError as damaged:
            shutil.rmtree(damaged.place or scratch)
