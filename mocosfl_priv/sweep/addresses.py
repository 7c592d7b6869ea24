"""Documents of everything that determines an artefact: its configuration, data, plugin code and core code.

An artefact is one stored result of a sweep (see :mod:`mocosfl_priv.sweep.stages`). The hash of its document is its
address in the store: a changed document means a new address, so that stale results are never reused.
"""

from __future__ import annotations

import ast
import dataclasses
import hashlib
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

from torch import Tensor

from mocosfl_priv.data.roles import Role
from mocosfl_priv.experiment.context import EvaluationContext
from mocosfl_priv.experiment.linkage import USES
from mocosfl_priv.experiment.observers import Training
from mocosfl_priv.experiment.system import System
from mocosfl_priv.experiment.train import expert_trainer, training_document
from mocosfl_priv.models.custom_backbone import backbone_code
from mocosfl_priv.plugins import Attack, Capability, Loaded
from mocosfl_priv.sweep.store import address

Document = dict[str, Any]

CORE = Path(__file__).parents[1]

# Packages and files of the core that cannot change any stored number. They are left out of all documents.
NO_RESULT = (
    "sweep", "deployment", "commands", "audits.py", "api.py", "cli.py", "plugins/scaffold.py", "plugins/contract.py",
    "plugins/attack_checks.py", "plugins/defense_checks.py", "experiment/disk.py",
    "results", "experiment/plan.py",
    "experiment/own_audit.py", "experiment/attack_again.py", "evaluation/cross_validation.py", "models/own_model.py",
    "models/cutting.py", "models/client_check.py",
    "experiment/run.py", "experiment/audit.py", "experiment/record.py", "experiment/provenance.py", "config/scale.py",
    "config/keys.py",
    "runtime/progress.py", "errors.py", "evaluation/statistics.py",
    "evaluation/shares.py", "evaluation/multiple_comparisons.py", "evaluation/reliability.py",
    "evaluation/distribution_shift.py",
)  # fmt: skip
# Files that only match messages with candidate images.
LINKAGE_ONLY = ("evaluation/linkage.py", "experiment/linkage.py")
# Files that only score reconstructions, and therefore cannot change what an attack returns.
NO_ATTACK = (
    *LINKAGE_ONLY, "experiment/rows.py", "experiment/scoring.py", "evaluation/reconstruction.py",
    "evaluation/recognition.py",
)  # fmt: skip
# Files that cannot change a training. Image metrics are not among them, since defenses train on them too.
NO_TRAINING = (
    *NO_ATTACK, "experiment/attack.py", "experiment/attack_system.py", "experiment/conditions.py",
    "experiment/victims.py",
    "evaluation/floor.py", "evaluation/perceptual.py",
)  # fmt: skip
LINKAGE_THREAT = {"adaptive", "messages_per_victim"}
CLIENT = Capability.CLIENT_WEIGHTS  # who has it need not send queries through the defense
UTILITY = {"knn_neighbours", "knn_temperature", "linear_probe_penalties", "label_fractions", "probe_selection"}


def expert_document(context: EvaluationContext, system: System) -> Document | None:
    """Return the document of the expert that the defense of `system` trains before the clients train.

    The document leaves out the clients, their data, and how they use the expert. None if the defense has no expert.
    """
    found = expert_trainer(context, system)
    if found is None:
        return None
    trainer, prepared_with, decides = found
    model = system.defense.plugin.architecture(context.config.model)
    return {
        "stage": "expert",
        "code": code_version(NO_RESULT + NO_TRAINING),
        "libraries": library_versions(),
        "defense": [trainer.origin, trainer.code_sha256, decides],
        "model": [model.model_dump(mode="json"), backbone_code(model.backbone), system.cut_layer],
        "images": [_pixels(prepared_with.target_images), context.roles.records[Role.DEFENDER_SOURCE].content_sha256],
        "image": dataclasses.asdict(context.models),
        "seed": system.seed,
        "compute": context.compute.describe(),
    }


def system_document(context: EvaluationContext, system: System, training: Training) -> Document:
    """Return the document of a trained system and its utility."""
    attacked = context.curve_attacks if context.config.leakage.every else training.observing
    expert = expert_document(context, system)
    return {
        "stage": "system",
        "code": code_version(NO_RESULT + (LINKAGE_ONLY if attacked else NO_TRAINING)),
        "libraries": library_versions(),
        "expert": address(expert) if expert else None,
        "training": training_document(context, system, training),
        "utility": context.config.evaluation.model_dump(mode="json", include=UTILITY),
        # attacks and metrics of the leakage curve, which is measured during training
        "curve": [[attack.label for attack in attacked], _scoring(context)] if context.config.leakage.every else None,
    }


def judge_document(context: EvaluationContext) -> Document:
    """Return the document of the classifier that judges recognition, with the victims' labels and the candidates."""
    return {
        "stage": "judge",
        "code": code_version(NO_RESULT + LINKAGE_ONLY),
        "libraries": library_versions(),
        "epochs": context.config.evaluation.recognition_epochs,
        "seed": context.config.data.role_seed,
        "roles": {role: [r.content_sha256, r.label_sha256] for role, r in context.roles.records.items()},
        "compute": context.compute.describe(),
    }


def linkage_document(context: EvaluationContext, system: System, training: Training) -> Document:
    """Return the document of how the messages of a trained system are matched with candidate images."""
    threat = context.config.threat.model_dump(mode="json", include=LINKAGE_THREAT)
    return {
        "stage": "linkage",
        "code": code_version(NO_RESULT),
        "system": address(system_document(context, system, training)),
        "threat": threat | {"grants": sorted(context.threat.grants & USES), "home": CLIENT in context.threat.grants},
        "candidates": [context.config.evaluation.linkage_candidates, context.config.data.role_seed],
        "roles": {role: record.content_sha256 for role, record in context.roles.records.items()},
        "pillow": version("pillow"),
    }


def attack_document(context: EvaluationContext, system: System, training: Training, attack: Loaded[Attack]) -> Document:
    """Return the document of what one attack on a trained system returns, without how it is scored."""
    threat = context.config.threat.model_dump(mode="json")
    return {
        "stage": "attack",
        "code": code_version(NO_RESULT + NO_ATTACK),
        "system": address(system_document(context, system, training)),
        "attack": [attack.label, attack.origin, attack.code_sha256, attack.parameters],
        "threat": threat | {"grants": sorted(threat["grants"])},
    }


def score_document(context: EvaluationContext, system: System, training: Training, attack: Loaded[Attack]) -> Document:
    """Return the document of the metrics of one attack's reconstructions."""
    return {
        "stage": "score",
        "code": code_version(NO_RESULT + LINKAGE_ONLY),
        "attack": address(attack_document(context, system, training, attack)),
        "scoring": _scoring(context),
    }


def _pixels(images: Tensor) -> str:
    return hashlib.sha256(images.numpy().tobytes()).hexdigest()


def _scoring(context: EvaluationContext) -> Document:
    return {
        "judge": address(judge_document(context)),
        "lpips": [context.config.evaluation.lpips_network, context.scoring.lpips_note],
    }


@cache
def library_versions() -> dict[str, str]:
    """Return the versions of the libraries that can change results, by name."""
    return {name: version(name) for name in ("torch", "torchvision", "numpy", "scikit-learn", "lpips")}


@cache
def code_version(without: tuple[str, ...], core: Path = CORE) -> str:
    """Return the SHA-256 of the core's code; comments, docstrings and layout do not change it.

    Args:
        without: Files and folders to leave out, relative to `core`.
        core: The package folder.

    """
    digest = hashlib.sha256()
    for path in sorted(core.rglob("*.py")):
        name = path.relative_to(core).as_posix()
        if not any(name == left_out or name.startswith(f"{left_out}/") for left_out in without):
            digest.update(name.encode() + b"\0" + _code(path) + b"\0")
    return digest.hexdigest()


@cache
def _code(path: Path) -> bytes:
    """The syntax tree of a file without docstrings, as text."""
    tree = ast.parse(path.read_bytes())
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef) and ast.get_docstring(node, clean=False):
            node.body = node.body[1:]
    return ast.dump(tree).encode()
