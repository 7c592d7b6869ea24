"""What determines an artefact: configuration part, data, plugin code, and the code around it."""

from __future__ import annotations

import ast
import hashlib
from functools import cache
from pathlib import Path
from typing import Any

from mocosfl_priv.data.roles import Role
from mocosfl_priv.experiment import System, training_document
from mocosfl_priv.laboratory import Laboratory
from mocosfl_priv.plugins import Attack, Loaded
from mocosfl_priv.stream import Training
from mocosfl_priv.sweep.store import address

Document = dict[str, Any]

# Rooms and files of the core in which nothing decides about a number that is stored.
NO_RESULT = (
    "sweep", "device", "deployment", "templates", "api.py", "cli.py", "display.py", "scaffold.py", "results.py",
    "progress.py", "peak_memory.py", "errors.py", "config.py", "evaluation/statistics.py", "evaluation/reliability.py",
    "evaluation/distribution_shift.py",
)  # fmt: skip
# Of the rest, those in which nothing decides about a training.
NO_TRAINING = (
    "target.py", "evaluation/floor.py", "evaluation/image_metrics.py", "evaluation/perceptual.py",
    "evaluation/recognition.py", "evaluation/reconstruction.py",
)  # fmt: skip
UTILITY = {"knn_neighbours", "knn_temperature", "linear_probe_penalties", "label_fractions", "probe_selection"}


def system_document(lab: Laboratory, system: System, training: Training) -> Document:
    """Of a trained system with its utility."""
    return {
        "stage": "system",
        "code": code_version(NO_RESULT + NO_TRAINING),
        "training": training_document(lab, system, training),
        "utility": lab.config.evaluation.model_dump(mode="json", include=UTILITY),
    }


def judge_document(lab: Laboratory) -> Document:
    """Of the classifier that judges what is recognised; the victims' labels and the candidates belong to it."""
    return {
        "stage": "judge",
        "code": code_version(NO_RESULT),
        "epochs": lab.config.evaluation.recognition_epochs,
        "seed": lab.config.data.role_seed,
        "roles": {role: record.content_sha256 for role, record in lab.roles.records.items()},
        "compute": lab.compute.describe(),
    }


def attack_document(lab: Laboratory, system: System, training: Training, attack: Loaded[Attack]) -> Document:
    """Of one attack on a trained system, scored."""
    threat = lab.config.threat.model_dump(mode="json")
    return {
        "stage": "attack",
        "code": code_version(NO_RESULT),
        "system": address(system_document(lab, system, training)),
        "judge": address(judge_document(lab)),
        "attack": [attack.label, attack.origin, attack.code_sha256, attack.parameters],
        "threat": threat | {"grants": sorted(threat["grants"])},
        "victims": lab.roles.records[Role.VICTIMS].content_sha256,
        "lpips": [lab.config.evaluation.lpips_network, lab.lpips_note],
    }


@cache
def code_version(without: tuple[str, ...]) -> str:
    """SHA-256 of the core's code, but for what is named; comments and layout do not count."""
    core = Path(__file__).parents[1]
    digest = hashlib.sha256()
    for path in sorted(core.rglob("*.py")):
        name = path.relative_to(core).as_posix()
        if not any(name == left_out or name.startswith(f"{left_out}/") for left_out in without):
            digest.update(name.encode() + b"\0" + ast.dump(ast.parse(path.read_bytes())).encode() + b"\0")
    return digest.hexdigest()
