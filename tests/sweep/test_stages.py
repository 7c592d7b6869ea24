"""What determines an artefact of each stage, and nothing more."""

from __future__ import annotations

import ast
import math
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from defenses.ressfl import ResSFL
from defenses.taressfl import TAResSFL
from mocosfl_priv.api import Experiment
from mocosfl_priv.config import ComputeConfig, parse_config
from mocosfl_priv.data.roles import Role
from mocosfl_priv.experiment.context import EvaluationContext
from mocosfl_priv.experiment.plan import Plan
from mocosfl_priv.experiment.system import System
from mocosfl_priv.experiment.train import defender_context
from mocosfl_priv.plugins import DEFENSES, TrainedExpert
from mocosfl_priv.plugins.defense_checks import SMALL_TRAINING, small_context
from mocosfl_priv.runtime.compute import Compute
from mocosfl_priv.runtime.progress import Silent
from mocosfl_priv.sweep.addresses import CORE, NO_ATTACK, NO_RESULT, NO_TRAINING, code_version, expert_document
from mocosfl_priv.sweep.artefacts import load_expert, save_expert
from mocosfl_priv.sweep.stages import resumed
from mocosfl_priv.sweep.store import Artefact, Store, address
from mocosfl_priv.sweep.tasks import TaskPlanner
from mocosfl_priv.training.checkpoints import Checkpoints
from tests.conftest import TINY

EXPERT = {"name": "taressfl", "epochs": 1, "batch_size": 32, "decoder": "conv_normN0C8"}


@pytest.fixture(scope="module")
def planned() -> Plan:
    return Experiment.from_dict({**TINY, "defenses": [EXPERT], "target_fractions": [0.02, 0.05]}).plan()


def expert_of(planned: Plan, document: dict[str, Any], place: int = 0) -> str | None:
    """The address of the expert of one system, were the experiment `document`; on the images of `planned`."""
    config, context = parse_config(document), planned.context
    defense = DEFENSES.create(config.defenses[0])
    fraction = planned.systems[place].target_fraction if defense.plugin.uses_target_data else 0.0
    system = System(defense, config.cut_layers[0], fraction, config.seeds[0])
    context = EvaluationContext(config, context.roles, context.compute, context.threat)
    found = expert_document(context, system)
    return address(found) if found else None


@pytest.mark.parametrize(
    ("changed", "same"),
    [
        ({"training": {"clients": 8, "partition": "dirichlet", "dirichlet_alpha": 0.1}}, True),
        ({"training": {"server_batch": 16, "micro_batch": 2, "sync_period": 3, "epochs": 2}}, True),
        ({"training": {"learning_rate": 0.5, "codec": "int8", "gradient_codec": "fp16", "pool": 2}}, True),
        (
            {"training": {"monitor_every": 1, "select_on": "test", "partial_batches": "drop", "checkpoint_every": 2}},
            True,
        ),
        ({"attacks": ["rmle"], "threat": {"messages_per_victim": 3}, "evaluation": {"confidence": 0.9}}, True),
        ({"defenses": [{**EXPERT, "label": "other", "transfer": "low_lr", "client_learning_rate": 0.5}]}, True),
        ({"defenses": [{**EXPERT, "server_start": "scratch", "transfer_learning_rate": 0.5}]}, True),
        ({"defenses": [[EXPERT, {"name": "gaussian", "sigma": 0.5}]]}, True),
        ({"evaluation": {"knn_neighbours": 3}}, True),
        ({"defenses": [{**EXPERT, "batch": "together", "penalty_mode": "train", "checkpoint": "last"}]}, True),
        ({"defenses": [{**EXPERT, "batch": "each"}]}, False),
        ({"defenses": [{**EXPERT, "penalty_mode": "eval"}]}, False),
        ({"defenses": [{**EXPERT, "checkpoint": "best_knn"}]}, False),
        ({"defenses": [{**EXPERT, "decoder": "res_normN0C8"}]}, False),
        ({"defenses": [{**EXPERT, "alpha": 1.0}]}, False),
        ({"defenses": [{**EXPERT, "epochs": 2}]}, False),
        ({"defenses": [{**EXPERT, "learning_rate": 0.01}]}, False),
        ({"defenses": [{**EXPERT, "name": "ressfl"}]}, False),
        ({"defenses": ["none"]}, False),
        ({"seeds": [1]}, False),
        ({"cut_layers": [2]}, False),
        ({"model": {"width": 16}}, False),
        ({"training": {"temperature": 0.2}}, False),
        ({"training": {"ema": 0.9}}, False),
    ],
)
def test_an_expert_is_determined_by_what_decides_about_it(changed: dict[str, Any], same: bool, planned: Plan) -> None:
    document = planned.config.model_dump(mode="json", exclude_defaults=True)
    merged = {**document, **{k: {**document.get(k, {}), **v} if isinstance(v, dict) else v for k, v in changed.items()}}
    assert (expert_of(planned, merged) == expert_of(planned, document)) == same


@pytest.mark.parametrize(
    ("changed", "same"),
    [
        ({"training": {"monitor_every": 1, "clients": 8, "codec": "int8"}}, True),
        ({"training": {"select_on": "test"}}, False),
        ({"evaluation": {"knn_neighbours": 3}}, False),
        ({"evaluation": {"knn_temperature": 0.5}}, False),
        ({"evaluation": {"probe_selection": "test"}}, True),
    ],
)
def test_an_expert_chosen_by_knn_is_determined_by_the_choice(
    changed: dict[str, Any], same: bool, planned: Plan
) -> None:
    document = planned.config.model_dump(mode="json", exclude_defaults=True)
    document["defenses"] = [{**EXPERT, "checkpoint": "best_knn"}]
    merged = {**document, **{key: {**document.get(key, {}), **value} for key, value in changed.items()}}
    assert (expert_of(planned, merged) == expert_of(planned, document)) == same


@pytest.mark.parametrize("on", ["validation", "test"])
def test_an_expert_is_chosen_by_knn_on_the_images_that_select_on_names(on: str, planned: Plan) -> None:
    """Beside a kNN with loops over images."""
    context, system = planned.context, planned.systems[0]
    training = context.config.training.model_copy(update={"select_on": on})
    evaluation = context.config.evaluation.model_copy(update={"knn_neighbours": 7})
    config = context.config.model_copy(update={"training": training, "evaluation": evaluation})
    context = EvaluationContext(config, context.roles, context.compute, context.threat)
    prepared_with = defender_context(context, system, system.defense.plugin.architecture(config.model), Silent())
    model, score = prepared_with.build_model().to(context.compute.device), prepared_with.checkpoint_score
    assert score is not None
    before = {name: value.clone() for name, value in model.named_state().items()}
    found = score.of(model)
    assert all(torch.equal(before[name], value) for name, value in model.named_state().items())

    @torch.no_grad()
    def directions(role: Role) -> list[tuple[torch.Tensor, int]]:
        images = context.roles[role]
        vectors = model.trunk(model.client(images.images.float() / 255)).double()
        return [(v / v.norm(), int(label)) for v, label in zip(vectors, images.labels, strict=True)]

    bank = directions(Role.PROBE_TRAIN)
    queries = directions(Role.PROBE_VALIDATION if on == "validation" else Role.PROBE_TEST)
    right = 0
    for query, label in queries:
        nearest = sorted(((float(query @ known), name) for known, name in bank), reverse=True)[:7]
        votes: dict[int, float] = {}
        for similarity, name in nearest:
            votes[name] = votes.get(name, 0.0) + math.exp(similarity / 0.1)
        right += max(votes, key=lambda name: votes[name]) == label
    assert found == pytest.approx(right / len(queries), abs=1.5 / len(queries))


def test_a_stored_expert_knows_the_step_of_its_checkpoint(planned: Plan, tmp_path: Path) -> None:
    context, system = planned.context, planned.systems[0]
    model = context.models.build(system.defense.plugin.architecture(context.config.model), 1, 0)
    save_expert(TrainedExpert(model, 2.0, 7), tmp_path)
    found = load_expert(context, system, Artefact(tmp_path, {}))
    assert (found.earlier_seconds, found.selected_step) == (2.0, 7)


def test_an_expert_is_determined_by_the_target_images_it_sees(planned: Plan) -> None:
    document = planned.config.model_dump(mode="json", exclude_defaults=True)
    assert expert_of(planned, document, 0) != expert_of(planned, document, 1)


@pytest.mark.slow
def test_what_does_not_determine_an_expert_does_not_change_it() -> None:
    compute = Compute.resolve(ComputeConfig(device="cpu", precision="float32", threads=1))
    defense = TAResSFL(epochs=1, batch_size=10, decoder="conv_normN0C8")
    context = small_context(defense, compute)
    other = SMALL_TRAINING.model_copy(
        update={"clients": 5, "server_batch": 30, "micro_batch": 3, "sync_period": 9, "average_base": "client_0",
                "learning_rate": 1.0, "client_learning_rate": 1.0, "codec": "int8", "divergence_aware": 0.5}
    )  # fmt: skip
    changed = replace(context, training=other)
    assert defense.expert_document(context) == defense.expert_document(changed)
    first, second = (defense.train_expert(c).model.named_state() for c in (context, changed))
    assert all(torch.equal(first[name], second[name]) for name in first)
    untrained = context.build_model().named_state()
    assert not torch.equal(first["client.cut.weight"], untrained["client.cut.weight"])


def test_who_trains_no_expert_has_none(compute: Compute) -> None:
    without = ResSFL(epochs=0)
    assert without.expert_document(small_context(without, compute)) is None


def test_what_variants_share_is_planned_once(planned: Plan, tmp_path: Path) -> None:
    missing = TaskPlanner(Store(tmp_path / "store"))
    missing.add(planned, "one")
    missing.add(planned, "other")
    kinds = [task.arguments[0].kind for task in missing.in_order]
    cells = planned.cells
    assert kinds == ["judge"] + ["expert"] * 2 + ["system"] * 2 + ["attack"] * cells + ["score"] * cells
    assert len(missing.cells) == cells == 6 and missing.cached == 0
    place = {task.key: index for index, task in enumerate(missing.in_order)}
    assert all(place[need] < place[task.key] for task in missing.in_order for need in task.needs)


def test_a_changed_metric_is_another_score_and_no_other_attack(tmp_path: Path) -> None:
    stages = {"score": NO_RESULT, "attack": NO_RESULT + NO_ATTACK, "training": NO_RESULT + NO_TRAINING}
    changes = {
        "evaluation/reconstruction.py": {"score"},
        "evaluation/recognition.py": {"score"},
        "experiment/attack.py": {"score", "attack"},
        "evaluation/image_metrics.py": {"score", "attack", "training"},  # defenses learn from them
        "sweep/stages.py": set(),
    }
    for number, (changed, concerned) in enumerate(changes.items()):
        before, after = (tmp_path / f"{number}{when}" for when in ("before", "after"))
        for file in changes:
            for core in (before, after):
                (core / file).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(CORE / file, core / file)
        with (after / changed).open("a") as text:
            text.write("\nCHANGED = 1\n")
        versions = {
            stage: [code_version(without, core) for core in (before, after)] for stage, without in stages.items()
        }
        assert {stage for stage, (old, new) in versions.items() if old != new} == concerned, changed


def test_nothing_that_trains_imports_what_is_left_out_of_its_code() -> None:
    trains = [
        *(CORE / "training").glob("*.py"),
        *(CORE.parent / "defenses").glob("*.py"),
        CORE / "defending" / "expert.py",
    ]
    reached: set[Path] = set()
    while trains:
        file = trains.pop()
        if file not in reached:
            reached.add(file)
            trains += imported(file)
    left_out = {CORE / name for name in NO_TRAINING}
    assert (CORE / "defending" / "simulated_attacker.py") in reached and not reached & left_out


def imported(file: Path) -> list[Path]:
    """Files of the core that `file` imports itself; of a room, those that hold the names it takes from there."""
    nodes = [node for node in ast.walk(ast.parse(file.read_text())) if isinstance(node, ast.ImportFrom)]
    return [path for node in nodes for alias in node.names for path in homes(node.module or "", alias.name)]


def homes(module: str, name: str) -> list[Path]:
    """Where `name` of `module` is defined, if that is in the core: a room's ``__init__`` only hands it on."""
    place = CORE.parent / module.replace(".", "/")
    if not module.startswith("mocosfl_priv."):
        return []
    if not place.is_dir():
        return [place.with_suffix(".py")]
    if (place / f"{name}.py").is_file():
        return [place / f"{name}.py"]
    handed_on = [
        node for node in ast.parse((place / "__init__.py").read_text()).body if isinstance(node, ast.ImportFrom)
    ]
    return [
        path for node in handed_on if name in [a.name for a in node.names] for path in homes(node.module or "", name)
    ]


def test_a_damaged_checkpoint_leaves_the_one_before(tmp_path: Path) -> None:
    kept = Checkpoints(tmp_path / "scratch", "identity")
    for step in (1, 2):
        kept.save(step, {"value": torch.tensor(step)}, {})

    def latest() -> int | None:
        kept.verify()
        found = kept.latest()
        return found[0] if found else None

    assert resumed(latest, kept.folder) == 2
    state = kept.folder / "step_000000002" / "state.safetensors"
    state.write_bytes(state.read_bytes()[:-1])
    assert resumed(latest, kept.folder) == 1
    (kept.folder / "step_000000001" / "state.json").write_text("{")
    assert resumed(latest, kept.folder) is None
