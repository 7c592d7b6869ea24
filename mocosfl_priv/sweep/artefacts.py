"""Save and load the artefacts of a sweep (expert, system, attempt, score, judge) as JSON and safetensors files."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from mocosfl_priv.evaluation.recognition import Classifier, RecognitionJudge
from mocosfl_priv.evaluation.semi_supervised import SemiSupervisedResult
from mocosfl_priv.evaluation.utility import Utility
from mocosfl_priv.experiment.attack import Attempt, Promise
from mocosfl_priv.experiment.attack_system import observers_of
from mocosfl_priv.experiment.context import EvaluationContext
from mocosfl_priv.experiment.linkage import Linkage
from mocosfl_priv.experiment.observers import Training
from mocosfl_priv.experiment.rows import SystemResult
from mocosfl_priv.experiment.system import System, TrainedSystem
from mocosfl_priv.experiment.train import restored_model, training_guarantee
from mocosfl_priv.models.split import SplitModel
from mocosfl_priv.plugins import TrainedExpert
from mocosfl_priv.sweep.store import Artefact
from mocosfl_priv.training.loop import TrainedModel
from mocosfl_priv.training.mocosfl import Traffic
from mocosfl_priv.training.state import State, under, within

TENSORS, FACTS = "tensors.safetensors", "facts.json"
PARTS = ("client", "trunk", "projector")


def save_expert(expert: TrainedExpert, folder: Path) -> None:
    """Write the expert's weights, its training time and the step of its checkpoint into `folder`."""
    _save(_everything_in(expert.model), folder / TENSORS)
    _write({"seconds": expert.earlier_seconds, "selected_step": expert.selected_step}, folder / FACTS)


def load_expert(context: EvaluationContext, system: System, artefact: Artefact) -> TrainedExpert:
    """Load the expert of `system` that :func:`save_expert` wrote."""
    model = context.models.build(
        system.defense.plugin.architecture(context.config.model), system.cut_layer, system.seed
    )
    _fill(model, load_file(artefact.folder / TENSORS))
    facts = _read(artefact.folder / FACTS)
    return TrainedExpert(model, facts["seconds"], facts["selected_step"])


def save_system(trained: TrainedSystem, folder: Path) -> None:
    """Write a trained system into `folder`: weights, states of defense and observers, utility and costs."""
    model, result = trained.model, trained.result()
    utility = result.utility
    few = {f"{fraction!r}": found for fraction, found in utility.semi_supervised.items()}
    arrays = {
        "knn": utility.knn,
        "linear": utility.linear,
        "untrained": result.untrained,
        **{f"few_labels.{fraction}": found.correct for fraction, found in few.items()},
    }
    tensors = {
        **under("model", _everything_in(model)),
        **{f"participants.{i}.{name}": v for i, copy in enumerate(model.participants) for name, v in copy.items()},
        **under("defense", trained.system.defense.plugin.state()),
        **under("observers", trained.observers.state()),
        **under("arrays", {name: torch.from_numpy(np.asarray(values)) for name, values in arrays.items()}),
    }
    facts = {
        "participants": len(model.participants),
        "checkpoint": list(trained.checkpoint()),
        "few_labels": {fraction: {"labels": found.labels, "epoch": found.epoch} for fraction, found in few.items()},
        "cost": result.cost,
        "history": result.history,
        "leakage_points": result.leakage_points,
        "detection": result.detection,
        "info": result.info,
        "failures": {attack.label: _failure(trained, attack.label) for attack in trained.training.observing},
    }
    _save(tensors, folder / TENSORS)
    _write(facts, folder / FACTS)


def load_result(system: System, training: Training, artefact: Artefact) -> SystemResult:
    """Load what reports need of a system that :func:`save_system` wrote, without reading its weights."""
    facts = _read(artefact.folder / FACTS)
    with safe_open(artefact.folder / TENSORS, "np") as file:
        arrays = {name: file.get_tensor(f"arrays.{name}") for name in _within(file.keys(), "arrays")}
    few = {
        float(fraction): SemiSupervisedResult(arrays[f"few_labels.{fraction}"], **found)
        for fraction, found in facts["few_labels"].items()
    }
    return SystemResult(
        keys=system.keys,
        hijacker=training.hijacker.label if training.hijacker else "",
        file_stem=system.trained_stem(training),
        utility=Utility(arrays["knn"], arrays["linear"], facts["info"]["linear_probe_penalty"], few),
        untrained=arrays["untrained"],
        cost=facts["cost"],
        history=facts["history"],
        leakage_points=facts["leakage_points"],
        detection=facts["detection"],
        info=facts["info"],
    )


def load_system(context: EvaluationContext, system: System, training: Training, artefact: Artefact) -> TrainedSystem:
    """Load a trained system that :func:`save_system` wrote, ready to be attacked."""
    tensors, facts = load_file(artefact.folder / TENSORS), _read(artefact.folder / FACTS)
    result = load_result(system, training, artefact)
    info = result.info
    system = system.with_own_defense()
    model = restored_model(context, system)
    _fill(model, within(tensors, "model"))
    model.participants = tuple(within(tensors, f"participants.{i}") for i in range(facts["participants"]))
    system.defense.plugin.load_state(within(tensors, "defense"))
    observers = observers_of(context, system, model, training)
    observers.load_state(within(tensors, "observers"))
    for label, failure in facts["failures"].items():
        if (observer := observers.of(label)) is not None:
            observer.failure = failure
    return TrainedSystem(
        system,
        training,
        observers,
        TrainedModel(
            model,
            info["selected_step"],
            info["steps"],
            Traffic(**info["traffic_bytes"]),
            info["client_kernel"],
            result.history,
            result.leakage_points,
            info["replay_epochs"],
        ),
        result.utility,
        result.untrained,
        result.cost,
        info["frozen_client"],
        training_guarantee(context, system, info["frozen_client"]),
    )


class StoredModels(Mapping[str, dict[str, np.ndarray]]):
    """Models of stored systems by file name, read on access, since all of a grid may not fit into memory."""

    def __init__(self, artefacts: Mapping[str, Artefact]) -> None:
        self._artefacts = artefacts

    def __getitem__(self, name: str) -> dict[str, np.ndarray]:
        folder = self._artefacts[name].folder
        with safe_open(folder / TENSORS, "np") as file:
            return {name: file.get_tensor(_stored_name(name)) for name in _read(folder / FACTS)["checkpoint"]}

    def __iter__(self) -> Iterator[str]:
        return iter(self._artefacts)

    def __len__(self) -> int:
        return len(self._artefacts)


def _stored_name(name: str) -> str:
    """The key under which :func:`save_system` stores the checkpoint's tensor `name`."""
    return name if name.startswith("defense.") else f"model.{name}"


def save_attempt(attempt: Attempt, folder: Path) -> None:
    """Write an attack's reconstructions (float32), cost, failure and the defense's promise into `folder`."""
    promise = attempt.promise
    tensors = {}
    if attempt.reconstruction is not None:
        tensors["reconstruction"] = attempt.reconstruction
    if promise is not None:
        tensors["least_error"] = torch.from_numpy(promise.mse_lower_bound)
    _save(tensors, folder / TENSORS)
    said = {"claim": promise.claim, "epsilon": promise.epsilon, "delta": promise.delta} if promise else None
    _write({"cost": attempt.cost, "failure": attempt.failure, "promise": said}, folder / FACTS)


def load_attempt(artefact: Artefact) -> Attempt:
    """Load the attempt that :func:`save_attempt` wrote."""
    tensors, facts = load_file(artefact.folder / TENSORS), _read(artefact.folder / FACTS)
    said = facts["promise"]
    promise = Promise(**said, mse_lower_bound=tensors["least_error"].numpy()) if said else None
    return Attempt(tensors.get("reconstruction"), facts["cost"], facts["failure"], promise)


def save_score(values: dict[str, np.ndarray], folder: Path) -> None:
    """Write per-victim metrics into `folder`; `values` maps each metric's name to an array of shape (n,)."""
    _save({name: torch.from_numpy(value) for name, value in values.items()}, folder / TENSORS)
    _write({"metrics": list(values)}, folder / FACTS)  # keeps the order, which safetensors does not


def load_score(artefact: Artefact) -> dict[str, np.ndarray]:
    """Load the metrics that :func:`save_score` wrote: arrays of shape (n,) by name, in the order of saving."""
    tensors = load_file(artefact.folder / TENSORS)
    return {name: tensors[name].numpy() for name in _read(artefact.folder / FACTS)["metrics"]}


def save_linkage(linkage: Linkage, folder: Path) -> None:
    """Write what linkage found into `folder`."""
    _save({name: torch.from_numpy(values) for name, values in linkage.values.items()}, folder / TENSORS)
    facts = {name: value for name, value in vars(linkage).items() if name not in ("values", "groups")}
    _write(facts | {"rates": list(linkage.values)}, folder / FACTS)  # keeps the order, which safetensors does not


def load_linkage(context: EvaluationContext, artefact: Artefact) -> Linkage:
    """Load what :func:`save_linkage` wrote."""
    tensors, facts = load_file(artefact.folder / TENSORS), _read(artefact.folder / FACTS)
    values = {name: tensors[name].numpy() for name in facts.pop("rates")}
    return Linkage(values=values, groups=context.victims.groups.numpy(), **facts)


def save_judge(judge: RecognitionJudge, folder: Path) -> None:
    """Write the recognition judge (classifier, labels, candidates, chance levels) into `folder`."""
    tensors = {**under("classifier", judge.classifier.state_dict()), "labels": judge.labels}
    if judge.candidates is not None:
        tensors["candidates"] = judge.candidates
    _save(tensors, folder / TENSORS)
    _write({"levels": judge.levels, "note": judge.note}, folder / FACTS)


def load_judge(context: EvaluationContext, artefact: Artefact) -> RecognitionJudge:
    """Load the recognition judge that :func:`save_judge` wrote, with its classifier frozen on the compute device."""
    tensors, facts = load_file(artefact.folder / TENSORS), _read(artefact.folder / FACTS)
    classifier = Classifier(context.probes.data.classes)
    classifier.load_state_dict(within(tensors, "classifier"))
    classifier = classifier.to(context.compute.device).eval().requires_grad_(False)
    return RecognitionJudge(
        classifier, tensors["labels"], tensors.get("candidates"), **facts["levels"], note=facts["note"]
    )


def _everything_in(model: SplitModel) -> State:
    """All parameters and buffers, also non-persistent ones (constants of an imported client), unlike a state dict."""
    found = {}
    for part in PARTS:
        network: nn.Module = getattr(model, part)
        for name, value in (*network.named_parameters(), *network.named_buffers()):
            found[f"{part}.{name}"] = value.detach()
    return found


def _fill(model: SplitModel, stored: State) -> None:
    for name, value in _everything_in(model).items():
        value.copy_(stored[name])


def _within(names: list[str], prefix: str) -> list[str]:
    return [name.removeprefix(f"{prefix}.") for name in names if name.startswith(f"{prefix}.")]


def _failure(trained: TrainedSystem, label: str) -> str:
    observer = trained.observers.of(label)
    return observer.failure if observer else ""


def _save(tensors: dict[str, Tensor], path: Path) -> None:
    # safetensors refuses tensors that share memory, hence the clones
    save_file({name: value.detach().cpu().contiguous().clone() for name, value in tensors.items()}, path)


def _write(document: dict[str, Any], path: Path) -> None:
    path.write_text(json.dumps(document, default=_plain), encoding="utf-8")


def _read(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def _plain(value: object) -> object:
    """Convert a NumPy scalar to a Python number; a `default` hook for `json.dumps`."""
    if isinstance(value, np.generic):
        return value.item()
    raise TypeError(f"{type(value).__name__} cannot be stored as JSON")
