"""How trained systems, attacked cells and the judge are kept in a store and come back: JSON, Parquet, safetensors."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from mocosfl_priv.evaluation.recognition import Classifier, RecognitionJudge
from mocosfl_priv.evaluation.semi_supervised import SemiSupervisedResult
from mocosfl_priv.evaluation.utility import Utility
from mocosfl_priv.experiment import CellResult, System, TrainedSystem, audience_of, restored_model, training_guarantee
from mocosfl_priv.laboratory import Laboratory
from mocosfl_priv.models.split import SplitModel
from mocosfl_priv.stream import Training
from mocosfl_priv.sweep.store import Artefact
from mocosfl_priv.training.mocosfl import Traffic, TrainedModel
from mocosfl_priv.training.state import State, under, within

TENSORS, FACTS, CELL, PER_IMAGE = "tensors.safetensors", "facts.json", "cell.json", "per_image.parquet"
PARTS = ("client", "trunk", "projector")


def save_system(trained: TrainedSystem, folder: Path) -> None:
    """Write `trained` into `folder`."""
    model, outcome, utility = trained.model, trained.trained, trained.utility
    few = {f"{fraction!r}": result for fraction, result in utility.semi_supervised.items()}
    arrays = {
        "knn": utility.knn,
        "linear": utility.linear,
        "untrained": trained.untrained,
        **{f"few_labels.{fraction}": result.correct for fraction, result in few.items()},
    }
    tensors = {
        **under("model", {name: value for part in PARTS for name, value in _everything_in(model, part).items()}),
        **{f"participants.{i}.{name}": v for i, copy in enumerate(model.participants) for name, v in copy.items()},
        **under("defense", trained.system.defense.plugin.state()),
        **under("audience", trained.audience.state()),
        **under("arrays", {name: torch.from_numpy(np.asarray(values)) for name, values in arrays.items()}),
    }
    facts = {
        "participants": len(model.participants),
        "selected_step": outcome.selected_step,
        "steps": outcome.steps,
        "traffic": vars(outcome.traffic),
        "kernel": outcome.kernel,
        "history": outcome.history,
        "observations": outcome.observations,
        "replay_epochs": outcome.replay_epochs,
        "linear_penalty": utility.linear_penalty,
        "few_labels": {fraction: {"labels": r.labels, "epoch": r.epoch} for fraction, r in few.items()},
        "cost": trained.cost,
        "frozen": trained.frozen,
        "failures": {attack.label: _failure(trained, attack.label) for attack in trained.training.attending},
    }
    _save(tensors, folder / TENSORS)
    _write(facts, folder / FACTS)


def load_system(lab: Laboratory, system: System, training: Training, artefact: Artefact) -> TrainedSystem:
    """What :func:`save_system` wrote of `training` of `system`."""
    tensors, facts = load_file(artefact.folder / TENSORS), _read(artefact.folder / FACTS)
    system = system.with_own_defense()
    defense = system.defense.plugin
    model = restored_model(lab, system)
    stored = within(tensors, "model")
    for part in PARTS:
        for name, value in _everything_in(model, part).items():
            value.copy_(stored[name])
    model.participants = tuple(within(tensors, f"participants.{i}") for i in range(facts["participants"]))
    defense.load_state(within(tensors, "defense"))
    audience = audience_of(lab, system, model, training)
    audience.load_state(within(tensors, "audience"))
    for label, failure in facts["failures"].items():
        if (attendee := audience.of(label)) is not None:
            attendee.failure = failure
    arrays = {name: value.numpy() for name, value in within(tensors, "arrays").items()}
    few = {
        float(fraction): SemiSupervisedResult(arrays[f"few_labels.{fraction}"], **result)
        for fraction, result in facts["few_labels"].items()
    }
    return TrainedSystem(
        system,
        training,
        audience,
        TrainedModel(
            model,
            facts["selected_step"],
            facts["steps"],
            Traffic(**facts["traffic"]),
            facts["kernel"],
            facts["history"],
            facts["observations"],
            facts["replay_epochs"],
        ),
        Utility(arrays["knn"], arrays["linear"], facts["linear_penalty"], few),
        arrays["untrained"],
        facts["cost"],
        facts["frozen"],
        training_guarantee(lab, system, facts["frozen"]),
    )


def save_cell(cell: CellResult, folder: Path) -> None:
    """Write `cell` into `folder`."""
    _write(cell.row, folder / CELL)
    cell.per_image.to_parquet(folder / PER_IMAGE, index=False)
    if cell.reconstruction is not None:
        _save({"reconstruction": torch.from_numpy(cell.reconstruction)}, folder / TENSORS)


def load_cell(artefact: Artefact) -> CellResult:
    """What :func:`save_cell` wrote."""
    tensors = artefact.folder / TENSORS
    pixels = load_file(tensors)["reconstruction"].numpy() if tensors.is_file() else None
    return CellResult(_read(artefact.folder / CELL), pd.read_parquet(artefact.folder / PER_IMAGE), pixels)


def save_judge(judge: RecognitionJudge, folder: Path) -> None:
    """Write `judge` into `folder`."""
    tensors = {**under("classifier", judge.classifier.state_dict()), "labels": judge.labels}
    if judge.candidates is not None:
        tensors["candidates"] = judge.candidates
    _save(tensors, folder / TENSORS)
    _write({"levels": judge.levels, "note": judge.note}, folder / FACTS)


def load_judge(lab: Laboratory, artefact: Artefact) -> RecognitionJudge:
    """What :func:`save_judge` wrote."""
    tensors, facts = load_file(artefact.folder / TENSORS), _read(artefact.folder / FACTS)
    classifier = Classifier(lab.probe_data.classes)
    classifier.load_state_dict(within(tensors, "classifier"))
    classifier = classifier.to(lab.compute.device).eval().requires_grad_(False)
    return RecognitionJudge(
        classifier, tensors["labels"], tensors.get("candidates"), **facts["levels"], note=facts["note"]
    )


def _everything_in(model: SplitModel, part: str) -> State:
    """Parameters and all buffers, constants of an imported client included, which are in no state dict."""
    network: nn.Module = getattr(model, part)
    named = {**dict(network.named_parameters()), **dict(network.named_buffers())}
    return {f"{part}.{name}": value.detach() for name, value in named.items()}


def _failure(trained: TrainedSystem, label: str) -> str:
    attendee = trained.audience.of(label)
    return attendee.failure if attendee else ""


def _save(tensors: dict[str, Tensor], path: Path) -> None:
    # clones: what shares memory cannot be written
    save_file({name: value.detach().cpu().contiguous().clone() for name, value in tensors.items()}, path)


def _write(document: dict[str, Any], path: Path) -> None:
    path.write_text(json.dumps(document, default=_plain), encoding="utf-8")


def _read(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def _plain(value: object) -> object:
    """Scalars of numpy as Python's."""
    if isinstance(value, np.generic):
        return value.item()
    raise TypeError(f"{type(value).__name__} cannot be kept")
