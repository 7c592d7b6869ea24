from __future__ import annotations

from typing import Any

from mocosfl_priv import Experiment
from mocosfl_priv.experiment.plan import plan
from mocosfl_priv.experiment.run import run_plan
from mocosfl_priv.runtime.progress import Segment, Silent


class Counter(Silent):
    """Counts what a run reports."""

    def __init__(self) -> None:
        self.planned: list[Segment] = []
        self.started = 0
        self.steps: dict[str, int] = {}
        self.announced: dict[str, int] = {}
        self._stage = ""

    def plan(self, segments: list[Segment]) -> None:
        self.planned = segments

    def segment(self) -> None:
        self.started += 1

    def begin(self, stage: str, steps: int) -> None:
        self._stage = stage
        self.announced[stage] = self.announced.get(stage, 0) + steps

    def advance(self, steps: int = 1) -> None:
        self.steps[self._stage] = self.steps.get(self._stage, 0) + steps


def test_progress_is_what_was_planned(tiny: dict[str, Any]) -> None:
    tiny["defenses"] = ["none", {"name": "taressfl", "epochs": 1, "batch_size": 64, "decoder": "res_normN0C8"}]
    tiny["attacks"] = ["floor", {"name": "rmle", "iterations": 2, "tv": 0.01}]
    tiny["evaluation"] |= {"recognition_epochs": 0}
    tiny["data"] |= {"train_limit": 300, "auxiliary_source_fraction": 0.95}
    counter = Counter()
    checked = plan(Experiment.from_dict(tiny).config)
    run_plan(checked, counter)
    assert counter.started == len(counter.planned) == 2 * (1 + 2)
    assert counter.steps["training"] == counter.announced["training"] == 2 * checked.training_steps
    assert counter.steps["expert"] == counter.announced["expert"] == checked.expert_steps(checked.systems[1])


def test_system_files_are_unique(tiny: dict[str, Any]) -> None:
    tiny |= {"cut_layers": [1, 2], "seeds": [0, 1], "defenses": ["none", {"name": "gaussian", "label": "a b/c"}]}
    stems = [system.file_stem for system in Experiment.from_dict(tiny).plan().systems]
    assert len(set(stems)) == len(stems) == 8
    assert all("/" not in stem and " " not in stem for stem in stems)
