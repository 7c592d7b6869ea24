from __future__ import annotations

import html
import json
from functools import partial
from pathlib import Path
from types import FunctionType, MethodType, ModuleType
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from safetensors.numpy import load_file
from torch import Tensor

from defenses.none import NoDefense
from mocosfl_priv import (
    Attack,
    AttackerView,
    Budget,
    Capability,
    DefenderContext,
    Defense,
    Detection,
    Detector,
    Experiment,
    Message,
    PreparedModel,
    StreamView,
)
from mocosfl_priv.api import RunResult
from mocosfl_priv.config import PluginSpec
from mocosfl_priv.data.roles import Role
from mocosfl_priv.errors import ConfigurationError, RunFailedError, ThreatModelError
from mocosfl_priv.experiment.attack import grant_view
from mocosfl_priv.experiment.attack_system import attack_system, target_of
from mocosfl_priv.experiment.plan import Plan
from mocosfl_priv.experiment.system import TrainedSystem
from mocosfl_priv.experiment.train import train_system
from mocosfl_priv.plugins import ATTACKS
from mocosfl_priv.results import CELL_KEYS, DETECTION_COLUMNS, read_record, write_record
from mocosfl_priv.runtime.progress import Silent
from mocosfl_priv.runtime.seeding import global_seed
from mocosfl_priv.training.hooks import ServerHooks, Unattended
from tests.conftest import TINY
from tests.interruption import Interruption

TIMES = ["attack_seconds", "attack_peak_megabytes", "training_seconds"]
# For tests that look at trainings and attacks only: no recognition judge, no evaluation with few labels.
NO_EXTRAS = {**TINY["evaluation"], "recognition_epochs": 0, "label_fractions": []}
SPY, SHOUTING = "tests.experiment.test_experiment:Spy", "tests.experiment.test_experiment:Shouting"
VANDAL, FAULTY = "tests.experiment.test_experiment:Vandal", "tests.experiment.test_experiment:Faulty"


@pytest.fixture(scope="module")
def trained_tiny() -> tuple[Plan, TrainedSystem]:
    """The tiny system, trained once for the tests that only attack it."""
    plan = Experiment.from_dict(TINY).plan()
    return plan, train_system(plan.context, plan.systems[0])


@pytest.fixture(scope="module")
def trained_shouting() -> TrainedSystem:
    """The tiny system behind a defense that shows in every message, trained once for those who look at views."""
    plan = Experiment.from_dict({**TINY, "defenses": [SHOUTING], "attacks": [SPY]}).plan()
    return train_system(plan.context, plan.systems[0])


@pytest.fixture(scope="module")
def troubled_run() -> RunResult:
    """The tiny experiment after an attack that spoils all it is given, and one that fails."""
    return Experiment.from_dict({**TINY, "attacks": [VANDAL, {"name": FAULTY, "how": "nan"}, *TINY["attacks"]]}).run()


def test_one_row_per_cell_with_sane_values(tiny_run: RunResult) -> None:
    table = tiny_run.table()
    assert table[CELL_KEYS].values.tolist() == [
        ["none", "floor", 1, 0.0, 0, "test"],
        ["none", "rmle", 1, 0.0, 0, "test"],
        ["none", "decoder", 1, 0.0, 0, "test"],
    ]
    assert table["mse_floor"].nunique() == 1
    floor, rmle = table.iloc[0], table.iloc[1]
    assert -0.3 < floor["leak_ratio"] < 0.05  # the attacker knows sixty images of the target: a poor guess
    assert rmle["leak_ratio"] > 0.5
    assert rmle["attack_steps"] == 150
    assert table["lpips"].isna().all() or (table["lpips"] >= 0).all()
    for column in ("knn_accuracy", "linear_accuracy", "knn_raw_pixels", "linear_untrained", "recognised"):
        assert table[column].between(0, 1).all()
    assert table["recognition_chance"].nunique() == 1 and (table["recognition_chance"] >= 1 / 6).all()
    assert table["reidentified"].isna().all()  # eight hundred images in all: too few candidates
    assert table["flags"].str.contains("few-seeds").all()


def test_recognition_can_be_left_out_and_needs_enough_candidates(tiny: dict[str, Any]) -> None:
    scoring = Experiment.from_dict({**tiny, "evaluation": {"recognition_epochs": 0}}).plan().context.scoring
    assert scoring.judge is None and all(np.isnan(level) for level in scoring.recognition_levels.values())
    more = {**tiny["data"], "train_limit": 900}  # the probe test role has too few: training images fill up
    context = Experiment.from_dict({**tiny, "data": more}).plan().context
    judge, victims = context.scoring.judge, context.victims.images
    assert judge is not None and judge.levels["reidentification_chance"] == 1 / 1000
    judged = judge(victims)
    assert judged["reidentified"].mean() == 1
    assert judged["recognised"].mean() == pytest.approx(judge.levels["recognition_ceiling"])
    noise = judge(torch.rand(victims.shape, generator=torch.Generator().manual_seed(0)))
    assert noise["reidentified"].mean() < 0.1 and noise["recognised"].mean() < judged["recognised"].mean()


def test_the_same_experiment_gives_the_same_numbers(tiny: dict[str, Any], tiny_run: RunResult) -> None:
    again = Experiment.from_dict(tiny).run()
    pd.testing.assert_frame_equal(again.table().drop(columns=TIMES), tiny_run.table().drop(columns=TIMES))
    pd.testing.assert_frame_equal(again.record.per_image, tiny_run.record.per_image)


def test_another_seed_gives_other_numbers_on_the_same_victims(tiny: dict[str, Any], tiny_run: RunResult) -> None:
    other = Experiment.from_dict({**tiny, "seeds": [1], "attacks": tiny["attacks"][:2], "evaluation": NO_EXTRAS}).run()
    assert other.record.info["roles"] == tiny_run.record.info["roles"]
    assert other.table()["mse"][1] != tiny_run.table()["mse"][1]
    assert other.table()["mse_floor"][1] == tiny_run.table()["mse_floor"][1]


def test_the_grid_runs_target_fractions_only_where_they_matter(tiny: dict[str, Any]) -> None:
    plan = Experiment.from_dict(
        {
            **tiny,
            "defenses": ["none", "taressfl"],
            "target_fractions": [0.0, 0.02],
            "cut_layers": [1, 2],
            "seeds": [0, 1],
        }
    ).plan()
    points = [(s.defense.label, s.cut_layer, s.target_fraction, s.seed) for s in plan.systems]
    assert len(points) == len(set(points)) == 2 * 2 * (1 + 2)
    assert {p[2] for p in points if p[0] == "none"} == {0.0}
    assert plan.cells == 12 * 3


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"threat": {"grants": ["query"]}}, ThreatModelError, "attack 'rmle' needs client_weights"),
        ({"cut_layers": [9]}, ConfigurationError, "cut layer 9 is impossible"),
        ({"defenses": ["nonne"]}, ConfigurationError, "did you mean 'none'"),
        ({"attacks": [{"name": "rmle", "iterations": 0}]}, ConfigurationError, "iterations"),
        ({"training": {"clients": 10_000}}, ConfigurationError, "clients but only"),
        ({"training": {"clients": 10_000, "partition": "dirichlet"}}, ConfigurationError, "clients but only"),
        (
            {"training": {"clients": 100, "partition": "classes_per_client", "classes_per_client": 50}},
            ConfigurationError,
            "5000 shards",
        ),
        (
            {"attacks": ["decoder"], "data": {"auxiliary_target_fraction": 0, "auxiliary_source_fraction": 0}},
            ThreatModelError,
            "leave the attacker no image",
        ),
        ({"data": {"dataset": "imagefolder:/nowhere"}}, ConfigurationError, "no folder"),
        ({"data": {"source": "photos"}}, ConfigurationError, "overlap"),
        ({"model": {"backbone": "resnet8", "bottleneck": "C4S64"}}, ConfigurationError, "does not"),
    ],
)
def test_what_cannot_run_is_refused_before_training(
    changes: dict[str, Any], error: type[Exception], message: str, tiny: dict[str, Any]
) -> None:
    with pytest.raises(error, match=message):
        Experiment.from_dict({**tiny, **changes}).plan()


def test_diverging_training_fails_with_the_system_named(tiny: dict[str, Any]) -> None:
    tiny["training"]["learning_rate"] = 1e30
    with pytest.raises(RunFailedError, match="none, cut 1, seed 0: training diverged"):
        Experiment.from_dict(tiny).run()


class Crashing(Defense):
    """Fails in the middle of training."""

    def protect(self, smashed: Tensor, rng: torch.Generator, kind: object = None) -> Tensor:
        raise KeyError("oops")


def test_a_crashing_defense_is_named(tiny: dict[str, Any]) -> None:
    with pytest.raises(RunFailedError, match=r"training Crashing, cut 1, seed 0 failed: KeyError"):
        Experiment.from_dict({**tiny, "defenses": ["tests.experiment.test_experiment:Crashing"]}).run()


class Spy(Attack):
    """Keeps its view, and returns grey."""

    needs = frozenset({Capability.CLIENT_WEIGHTS, Capability.AUXILIARY_DATA})
    views: list[AttackerView] = []

    def reconstruct(self, view: AttackerView, budget: Budget, seed: int) -> Tensor:
        Spy.views.append(view)
        return torch.full((len(view.smashed), *view.image_shape), 0.5)


class Faulty(Attack):
    """Breaks its contract in the way it is told."""

    def __init__(self, how: str) -> None:
        self.how = how

    def reconstruct(self, view: AttackerView, budget: Budget, seed: int) -> Tensor:
        good = torch.zeros(len(view.smashed), *view.image_shape)
        if self.how == "raise":
            raise IndexError("out of luck")
        if self.how == "reach":
            return view.query(good)
        bad = {"nan": good + float("nan"), "shape": good[:1], "type": None}
        return bad[self.how]  # type: ignore[return-value]


class Shouting(Defense):
    """Sends everything times ten; the attacker's queries must show it."""

    def protect(self, smashed: Tensor, rng: torch.Generator, kind: object = None) -> Tensor:
        return 10 * smashed


class Counting(Defense):
    """Knows how many batches it has seen; another each time."""

    def __init__(self) -> None:
        self.batches = torch.zeros(())

    def joint_loss(self, images: Tensor, smashed: Tensor) -> Tensor | None:
        self.batches = self.batches + 1
        return None

    def state(self) -> dict[str, Tensor]:
        return {"batches": self.batches}

    def load_state(self, state: dict[str, Tensor]) -> None:
        self.batches = state["batches"].clone()


def test_every_system_trains_a_defense_of_its_own_which_is_as_old_as_its_model(tiny: dict[str, Any]) -> None:
    tiny |= {"defenses": [{"name": f"{__name__}:Counting"}], "seeds": [0, 1], "attacks": ["floor"]}
    tiny["training"] |= {"epochs": 2, "monitor_every": 1}
    tiny["data"] |= {"train_limit": 300}
    tiny["evaluation"] |= {"label_fractions": []}
    plan = Experiment.from_dict(tiny).plan()
    for system in plan.systems:
        trained = train_system(plan.context, system)
        learned = trained.checkpoint()["defense.batches"]
        assert learned == trained.trained.selected_step  # one pass per step
        assert system.defense.plugin.state()["batches"] == 0


class Watching(Detector):
    """Detects, with clients that get no gradient."""

    def detection(self) -> Detection:
        raise AssertionError("nothing is trained")

    def prepare(self, context: DefenderContext) -> PreparedModel:
        return PreparedModel(context.build_model(), frozen_client=True)


def test_a_detector_of_frozen_clients_is_refused(tiny: dict[str, Any]) -> None:
    plan = Experiment.from_dict({**tiny, "defenses": [f"{__name__}:Watching"], "attacks": ["floor"]}).plan()
    with pytest.raises(ConfigurationError, match="Watching, cut 1, seed 0: a detector judges gradients"):
        train_system(plan.context, plan.systems[0])


class Blinding(Attack):
    """Hijacks with one gradient for everybody, and guesses grey."""

    needs = frozenset({Capability.GRADIENT_CHANNEL})

    def attend(self, stream: StreamView, seed: int) -> ServerHooks:
        return self.OneGradient()

    def reconstruct(self, view: AttackerView, budget: Budget, seed: int) -> Tensor:
        return torch.full((len(view.smashed), *view.image_shape), 0.5)

    class OneGradient(Unattended):
        def returned(self, message: Message, gradient: Tensor) -> Tensor:
            return torch.full_like(gradient, 1e-4)


def test_what_detectors_found_stands_in_the_record(tiny: dict[str, Any], tmp_path: Path) -> None:
    guard = {"name": "splitguard", "fake_probability": 0.4, "warmup": 1, "window": 1, "wait": 1}
    tiny |= {
        "defenses": [guard],
        "attacks": ["floor", f"{__name__}:Blinding"],
        "threat": {"grants": ["gradient_channel"]},
        "data": tiny["data"] | {"train_limit": 300},
        "evaluation": tiny["evaluation"] | {"recognition_epochs": 0, "label_fractions": []},
    }
    record = Experiment.from_dict(tiny).run().record
    found = record.detections
    assert found.columns.tolist() == DETECTION_COLUMNS and found["defense"].tolist() == ["splitguard"] * 2
    assert found["hijacked_by"].tolist() == ["", "Blinding"] and (found["failure"] == "").all()
    assert (found["clients_judging"] > 0).all() and (found["fakes_judged"] > 0).all()
    hijacked = found.iloc[1]
    assert (
        hijacked["alarm"] and hijacked["first_alarm_step"] >= 1 and hijacked["score"] == pytest.approx(0.25, abs=0.01)
    )
    write_record(record, tmp_path)
    pd.testing.assert_frame_equal(read_record(tmp_path).detections, found, check_dtype=False)


def test_attacks_see_the_defended_message_and_no_victim(tiny: dict[str, Any], trained_shouting: TrainedSystem) -> None:
    plan = Experiment.from_dict({**tiny, "defenses": [SHOUTING], "attacks": [SPY]}).plan()
    context, trained = plan.context, trained_shouting
    attack_system(context, trained, plan.attacks[0])
    view = Spy.views.pop()
    victims = context.victims.images
    with torch.no_grad():
        plain = trained.model.client(victims)
    torch.testing.assert_close(view.smashed, 10 * plain)
    torch.testing.assert_close(view.query(victims), 10 * plain)
    torch.testing.assert_close(view.protect(plain), 10 * plain)
    # who has the weights knows the architecture; the untrained client is another model of the same shape
    clone = view.untrained_client()
    assert {n: p.shape for n, p in clone.named_parameters()} == {n: p.shape for n, p in view.client.named_parameters()}
    assert not torch.equal(next(clone.parameters()), next(view.client.parameters()))


def view_of(plan: Plan, trained: TrainedSystem) -> AttackerView:
    context = plan.context
    target = target_of(context, trained.system, trained.model)
    return grant_view(context.conditions, target, plan.attacks[0], context.victims.images)


def reachable(root: object) -> list[object]:
    """Everything that can be reached from `root` through attributes, containers, closures, partials and methods."""
    found: dict[int, object] = {}
    frontier: list[object] = [root]
    while frontier:
        thing = frontier.pop()
        if id(thing) in found or isinstance(thing, type | ModuleType | str | int | float | None):
            continue
        found[id(thing)] = thing
        if isinstance(thing, FunctionType):
            frontier += [cell.cell_contents for cell in thing.__closure__ or ()]
            frontier += list(thing.__defaults__ or ())
        elif isinstance(thing, MethodType):
            frontier += [thing.__self__, thing.__func__]
        elif isinstance(thing, partial):
            frontier += [thing.func, *thing.args, *thing.keywords.values()]
        elif isinstance(thing, dict):
            frontier += [*thing.keys(), *thing.values()]
        elif isinstance(thing, list | tuple | set | frozenset):
            frontier += list(thing)
        else:
            frontier += list(getattr(thing, "__dict__", {}).values())
    return list(found.values())


def test_nothing_that_a_view_reaches_holds_victims(
    tiny: dict[str, Any], trained_tiny: tuple[Plan, TrainedSystem]
) -> None:
    plan = Experiment.from_dict({**tiny, "attacks": [SPY]}).plan()
    context, (_, trained) = plan.context, trained_tiny
    view = view_of(plan, trained)
    things = reachable(view)
    assert any(thing is view.client for thing in things) and any(isinstance(thing, NoDefense) for thing in things)
    forbidden = {id(context), id(context.roles), id(context.victims), id(context.victims.images), id(trained)}
    assert not forbidden & {id(thing) for thing in things}
    storages = {context.victims.images.data_ptr(), *(context.roles[role].images.data_ptr() for role in Role)}
    assert not any(isinstance(thing, Tensor) and thing.numel() and thing.data_ptr() in storages for thing in things)
    # the walk does see what a closure over the context would carry along
    assert id(context) in {id(thing) for thing in reachable(lambda: context)}


def test_victims_poisoned_after_the_view_was_built_change_nothing(
    tiny: dict[str, Any], trained_tiny: tuple[Plan, TrainedSystem]
) -> None:
    attack = {"name": "decoder", "architecture": "unet_N1C8", "steps": 10}
    plan = Experiment.from_dict({**tiny, "attacks": [attack]}).plan()  # its context is poisoned, and nobody else's
    _, trained = trained_tiny
    plugin = plan.attacks[0].plugin
    with global_seed(0, "clean"):
        clean = plugin.reconstruct(view_of(plan, trained), Budget(), 0)
    view = view_of(plan, trained)
    plan.context.victims.images.fill_(float("nan"))
    plan.context.roles[Role.VICTIMS].images.fill_(255)
    with global_seed(0, "clean"):
        assert torch.equal(plugin.reconstruct(view, Budget(), 0), clean)


class Insider(Attack):
    """Server and participant at once."""

    needs = frozenset({Capability.SERVER_MODEL, Capability.COLLUDING_CLIENT})

    def reconstruct(self, view: AttackerView, budget: Budget, seed: int) -> Tensor:
        return torch.full((len(view.smashed), *view.image_shape), 0.5)


def test_a_colluder_holds_its_own_copy_and_the_victims_send_with_theirs(tiny: dict[str, Any]) -> None:
    insider, spy = "tests.experiment.test_experiment:Insider", "tests.experiment.test_experiment:Spy"
    tiny["training"] |= {"sync_period": 10_000, "partition": "classes_per_client", "classes_per_client": 1}
    tiny["data"] = {"train_limit": 240, "test_limit": 100, "victims": 8}
    tiny["model"] |= {"width": 16}
    grants = ["client_weights", "auxiliary_data", "server_model", "colluding_client"]
    threat = {"grants": grants, "steps": 100}
    plan = Experiment.from_dict({**tiny, "attacks": [insider, spy], "threat": threat}).plan()
    context, system = plan.context, plan.systems[0]
    trained = train_system(context, system)
    target, victims = target_of(context, system, trained.model), context.victims.images
    inside, outside = (grant_view(context.conditions, target, attack, victims) for attack in plan.attacks)
    victim, colluder = trained.model.participants
    with torch.no_grad():
        sender = trained.model.copy().client
        sender.load_state_dict(victim, strict=False)
        torch.testing.assert_close(inside.smashed, sender(victims))
        assert all(torch.equal(parameter, colluder[name]) for name, parameter in inside.colluder.named_parameters())
        assert not torch.allclose(inside.smashed, inside.colluder(victims), atol=1e-3)
        # an attack that does not collude sees what it always saw
        torch.testing.assert_close(outside.smashed, trained.model.client(victims))
        features = trained.model.trunk(inside.smashed)
        torch.testing.assert_close(inside.server(inside.smashed), trained.model.projector(features))
    assert {n for n, _ in inside.server.named_children()} == {"trunk", "projector"}
    things = reachable(inside)
    own = {id(part) for part in (context, trained, trained.model, trained.model.trunk, trained.model.client)}
    assert not own & {id(thing) for thing in things}
    held = {thing.data_ptr() for thing in things if isinstance(thing, Tensor) and thing.numel()}
    parts = (trained.model.client, trained.model.trunk, trained.model.projector)
    theirs = [*victim.values(), *colluder.values(), *(p for part in parts for p in part.parameters()), victims]
    assert not held & {tensor.data_ptr() for tensor in theirs}
    # the walk would see the victim's copy, were it there: no tensor in view has its values
    assert not any(
        torch.equal(thing, value)
        for thing in things
        if isinstance(thing, Tensor)
        for value in (victim[name] for name in victim if not torch.equal(victim[name], colluder[name]))
    )
    rows = {}
    for name in ("floor", "colluder", "shadow"):
        fast = {} if name == "floor" else {"architecture": "res_normN0C8", "epochs": 2, "iterations": 10}
        fast |= {"starts": 2} if name == "shadow" else {}
        rows[name] = attack_system(context, trained, ATTACKS.create(PluginSpec(name=name, **fast))).row
    for name in ("colluder", "shadow"):
        assert rows[name]["attack_steps"] > 0 and rows[name]["attack_queries"] == 0
        assert rows[name]["mse"] < 1.15 * rows["floor"]["mse"]  # little learned, and little claimed


def test_a_single_client_has_nobody_to_collude_with(tiny: dict[str, Any]) -> None:
    tiny["training"] |= {"clients": 1}
    with pytest.raises(ThreatModelError, match="only one client takes part"):
        grants = {"grants": ["auxiliary_data", "colluding_client"]}
        Experiment.from_dict({**tiny, "attacks": ["colluder"], "threat": grants}).plan()


class Vandal(Attack):
    """Spoils everything it is given."""

    needs = frozenset({Capability.CLIENT_WEIGHTS, Capability.AUXILIARY_DATA})

    def reconstruct(self, view: AttackerView, budget: Budget, seed: int) -> Tensor:
        for parameter in view.client.parameters():
            parameter.zero_()
        view.auxiliary.images.zero_()
        view.smashed.zero_()
        return torch.zeros(len(view.smashed), *view.image_shape)


def test_an_attack_cannot_spoil_what_comes_after_it(troubled_run: RunResult, tiny_run: RunResult) -> None:
    assert troubled_run.table()["attack"].tolist()[:2] == ["Vandal", "Faulty"]
    after = troubled_run.table().iloc[2:].reset_index(drop=True)
    pd.testing.assert_frame_equal(after.drop(columns=TIMES), tiny_run.table().drop(columns=TIMES))
    name, arrays = next(iter(troubled_run.record.models.items()))
    assert all(np.array_equal(arrays[key], tiny_run.record.models[name][key]) for key in arrays)


def test_a_non_adaptive_attacker_does_not_know_the_defense(
    tiny: dict[str, Any], trained_shouting: TrainedSystem
) -> None:
    threat = {"adaptive": False}
    plan = Experiment.from_dict({**tiny, "defenses": [SHOUTING], "attacks": [SPY], "threat": threat}).plan()
    trained, view = trained_shouting, view_of(plan, trained_shouting)
    images = torch.rand(2, 3, 32, 32)
    with torch.no_grad():
        torch.testing.assert_close(view.query(images), trained.model.client(images))
        torch.testing.assert_close(view.protect(images), images)


def test_a_real_query_passes_the_defense_even_if_the_attacker_does_not_know_it(
    tiny: dict[str, Any], trained_shouting: TrainedSystem
) -> None:
    threat = {"adaptive": False, "grants": ["query", "auxiliary_data"]}
    plan = Experiment.from_dict({**tiny, "defenses": [SHOUTING], "attacks": ["decoder"], "threat": threat}).plan()
    trained, view = trained_shouting, view_of(plan, trained_shouting)
    images = torch.rand(2, 3, 32, 32)
    with torch.no_grad():
        torch.testing.assert_close(view.query(images), 10 * trained.model.client(images))


def test_what_turns_out_impossible_during_a_run_is_a_failed_run(tiny: dict[str, Any]) -> None:
    tiny |= {"attacks": [{"name": FAULTY, "how": "reach"}]}
    with pytest.raises(RunFailedError, match="reached for query"):
        Experiment.from_dict(tiny).run()


@pytest.mark.parametrize(
    ("how", "cause"),
    [
        ("nan", "not finite"),
        ("shape", "returned shape"),
        ("type", "NoneType"),
        ("raise", "IndexError: out of luck"),
    ],
)
def test_a_failed_attack_is_a_row_with_its_cause(
    how: str, cause: str, trained_tiny: tuple[Plan, TrainedSystem]
) -> None:
    plan, trained = trained_tiny
    faulty = ATTACKS.create(PluginSpec(name=FAULTY, how=how))
    cell = attack_system(plan.context, trained, faulty)
    assert cause in cell.row["failure"]
    assert np.isnan([cell.row[name] for name in ("mse", "psnr", "leak_ratio")]).all()
    assert cell.reconstruction is None and len(cell.per_image) == 0


def test_an_attack_that_reaches_for_more_ends_the_run(trained_tiny: tuple[Plan, TrainedSystem]) -> None:
    plan, trained = trained_tiny
    reaching = ATTACKS.create(PluginSpec(name=FAULTY, how="reach"))
    with pytest.raises(ThreatModelError, match="reached for query"):
        attack_system(plan.context, trained, reaching)


def test_a_failure_is_reported_and_takes_no_part_in_averages(troubled_run: RunResult, tmp_path: Path) -> None:
    run = troubled_run
    page = run.report(tmp_path / "run")
    assert "attack Faulty failed with seed 0 and takes no part in any average" in html.unescape(page.read_text())
    summary = pd.read_csv(tmp_path / "run" / "summary.csv")
    assert "Faulty" not in set(summary["attack"]) and np.isfinite(summary["leak_ratio"]).all()
    assert read_record(tmp_path / "run").cells["failure"].tolist() == run.table()["failure"].tolist()
    with pytest.raises(RunFailedError, match="1 of 5 attacks failed; the first: 'Faulty' on none"):
        run.require_success()


def test_run_files_and_checkpoint(tiny_run: RunResult, tmp_path: Path) -> None:
    page = tiny_run.report(tmp_path / "run")
    folder = page.parent
    assert {path.name for path in folder.iterdir()} == {
        "results.csv", "per_image.parquet", "probe.parquet", "training.csv", "leakage.csv", "run.json", "config.yaml",
        "images.safetensors", "models", "report.html", "report.pdf", "summary.csv", "figures", "detections.csv",
        "leaderboard.csv", "leaderboard.md", "linkage.parquet",
    }  # fmt: skip
    row = pd.read_csv(folder / "results.csv").iloc[0]
    weights = load_file(folder / row["checkpoint"])
    assert "client.0.conv1.weight" in weights and weights["client.0.conv1.weight"].shape == (8, 3, 3, 3)
    info = json.loads((folder / "run.json").read_text())
    assert {"roles", "versions", "seeds", "config", "config_sha256", "plugins", "compute"} <= set(info)
    assert all(len(role["content_sha256"]) == 64 for role in info["roles"].values())
    assert Experiment.from_yaml(folder / "config.yaml").config == Experiment.from_dict(info["config"]).config
    assert np.isfinite(pd.read_csv(folder / "summary.csv")["leak_ratio"]).all()


def test_a_run_is_not_lost_when_its_page_fails(
    tiny_run: RunResult, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import reports

    def broken(record: object, folder: Path) -> Path:
        raise ZeroDivisionError("no page")

    monkeypatch.setattr(reports, "write_report", broken)
    with pytest.raises(RunFailedError, match=r"results are kept in .*no page"):
        tiny_run.report(tmp_path / "run")
    assert (tmp_path / "run/results.csv").is_file()


@pytest.mark.parametrize(
    "partition",
    ["iid", *(pytest.param(other, marks=pytest.mark.slow) for other in ("classes_per_client", "dirichlet"))],
)
def test_real_images_run_through_the_whole_path(partition: str, shared: Path, tiny: dict[str, Any]) -> None:
    data = shared / "data"
    tiny["data"] = {
        "dataset": f"imagefolder:{data / 'cifar10'}",
        "source": f"imagefolder:{data / 'cifar100'}",
        "train_limit": 400,
        "test_limit": 200,
        "victims": 16,
    }
    tiny["training"] |= {"partition": partition, "clients": 8, "sync_period": 2}
    taressfl = {"name": "taressfl", "epochs": 1, "batch_size": 64, "decoder": "res_normN0C8"}
    tiny |= {"defenses": [taressfl if partition == "iid" else "none"], "target_fractions": [0.01]}
    # the published protocol: probes selected on test images; and no evaluation with few labels
    published = {"probe_selection": "test", "label_fractions": []} if partition == "dirichlet" else {}
    tiny["evaluation"] |= published
    table = Experiment.from_dict(tiny).run().table()
    assert len(table) == 3 and table["mse"].between(0, 1).all()
    assert ("semi_10_accuracy" in table) is not bool(published)
    assert table["probe_selection"].unique().tolist() == ["test" if published else "validation"]


def test_the_leakage_curve_watches_training_and_leaves_it_alone(tiny: dict[str, Any], tiny_run: RunResult) -> None:
    curve = {"every": 1, "attacks": ["floor", {"name": "rmle", "iterations": 150, "tv": 0.01}]}
    training = {**tiny["training"], "epochs": 2, "monitor_every": 2}
    document = {**tiny, "training": training, "attacks": tiny["attacks"][:2], "evaluation": NO_EXTRAS}
    plain = Experiment.from_dict(document).run()
    watched = Experiment.from_dict({**document, "leakage": curve}).run()
    pd.testing.assert_frame_equal(watched.table().drop(columns=TIMES), plain.table().drop(columns=TIMES))
    pd.testing.assert_frame_equal(watched.record.training, plain.record.training)
    leakage = watched.record.leakage
    assert leakage["attack"].tolist() == ["floor", "rmle"] * 2
    assert leakage["epoch"].round().tolist() == [1, 1, 2, 2]
    assert (leakage["leak_ratio"][leakage["attack"] == "rmle"] > 0.1).all()
    assert plain.record.leakage.empty
    for (name, arrays), (other, others) in zip(
        watched.record.models.items(), plain.record.models.items(), strict=True
    ):  # what more evaluation would look at
        assert name == other and all(np.array_equal(arrays[key], others[key]) for key in arrays | others)


def test_attacks_attend_the_training_they_attack(tiny: dict[str, Any], tiny_run: RunResult) -> None:
    small = {"architecture": "res_normN0C8", "rows": 8, "epochs": 1}
    fit = {"starts": 1, "iterations": 30}
    grants = ["architecture", "auxiliary_data", "gradient_channel"]
    document = {
        **tiny,
        "attacks": [{"name": "fsha", **small, **fit}, "floor", {"name": "sdar", **small, **fit}],
        "threat": {"grants": grants, "steps": 100},
        "evaluation": NO_EXTRAS,
    }

    class Counting(Silent):
        """Segments planned and started."""

        planned: list[Any] = []
        started = 0

        def plan(self, segments: list[Any]) -> None:
            self.planned = segments

        def segment(self) -> None:
            self.started += 1

    counting = Counting()
    experiment = Experiment.from_dict(document)
    run = experiment.run(counting)
    assert counting.started == len(counting.planned) == 2 + 3
    # who only listens leaves the training as it was, bit by bit
    pd.testing.assert_frame_equal(run.record.training, tiny_run.record.training)
    (honest_file, honest), (hijacked_file, hijacked) = run.record.models.items()
    before = next(iter(tiny_run.record.models.values()))
    assert all(np.array_equal(honest[name], before[name]) for name in before)
    assert not all(np.array_equal(hijacked[name], before[name]) for name in before)
    table = run.table().set_index("attack")
    assert table.index.tolist() == ["floor", "sdar", "fsha"]
    files = [Path(name).name for name in table["checkpoint"]]
    assert files == [honest_file, honest_file, hijacked_file] and "fsha" in hijacked_file
    assert table["knn_accuracy"]["sdar"] == table["knn_accuracy"]["floor"]
    steps = experiment.plan().training_steps
    assert (table["attack_steps"][["sdar", "fsha"]] > steps).all() and (table["attack_seconds"] > 0).all()
    assert [system["attack"] for system in run.record.info["hijacked"]] == ["fsha"]
    assert len(run.record.info["systems"]) == 1 and len(run.record.probe) == len(tiny_run.record.probe)


@pytest.mark.slow  # the interrupted sweep does the same, in the default suite
@pytest.mark.parametrize(
    "expert",
    [
        {"name": "taressfl", "decoder": ["conv_normN0C8", "edsr_N1C8"], "refresh": 1},
        {
            "name": "ressfl",
            "decoder": "conv_normN0C8",
            "training_decoder": ["conv_normN0C8", "edsr_N1C8"],
            "interval": 2,
        },
    ],
    ids=lambda expert: expert["name"],
)
def test_an_interrupted_experiment_goes_on_from_its_checkpoints(
    expert: dict[str, Any], tiny: dict[str, Any], tmp_path: Path
) -> None:
    expert = {**expert, "epochs": 2, "batch_size": 64}
    few = {**tiny["data"], "auxiliary_source_fraction": 0.9}  # what is left for the expert is soon seen
    document = {
        **tiny, "defenses": [expert], "attacks": ["floor"], "data": few,
        "training": {**tiny["training"], "epochs": 2},
        "evaluation": {**tiny["evaluation"], "recognition_epochs": 0},
    }  # fmt: skip
    whole = Experiment.from_dict(document).run()

    experiment = Experiment.from_dict(document)
    expert_steps = experiment.plan().expert_steps(experiment.plan().systems[0])
    for steps in (expert_steps // 2 + 2, expert_steps + 14):  # within the expert, and within the training after it
        with pytest.raises(KeyboardInterrupt):
            experiment.run(Interruption(steps), tmp_path)
    assert next(tmp_path.glob(f"{expert['name']}_cut1_target*_seed0/defender")).is_dir()
    resumed = experiment.run(resume_dir=tmp_path)
    pd.testing.assert_frame_equal(resumed.table().drop(columns=TIMES), whole.table().drop(columns=TIMES))
    pd.testing.assert_frame_equal(resumed.record.training, whole.record.training)
    for file, found in resumed.record.models.items():
        expected = whole.record.models[file]
        assert found.keys() == expected.keys() and all(np.array_equal(found[name], expected[name]) for name in found)
        assert any(name.startswith("defense.attacker.") for name in found) == (expert["name"] == "ressfl")
    other = Experiment.from_dict({**document, "training": {**document["training"], "ema": 0.9}})
    with pytest.raises(ConfigurationError, match="belongs to another configuration"):
        other.run(resume_dir=tmp_path)


def test_everything_at_once(tiny: dict[str, Any]) -> None:
    """Sampled, unequal clients under the research code's protocol, with replay and a mobile backbone."""
    run = Experiment.from_dict(
        {
            **tiny,
            "protocol": "paper",
            "attacks": ["floor"],
            "evaluation": NO_EXTRAS,
            "cut_layers": [2],
            "data": {"train_limit": 160, "test_limit": 100, "victims": 8},
            "model": {"backbone": "mobilenetv2", "width": 8, "head": "v1", "projector_out": 16},
            "training": {
                **tiny["training"],
                "partition": "dirichlet",
                "pool": 2,
                "micro_batch": 2,
                "heterogeneity": {"clients": 0.25, "data": 0.5, "micro_batch": 8},
                "replay": {"threshold": 100.0, "warmup_epochs": 0},
                "epochs": 3,
                "feature_memory": "per_client",
            },
        }
    ).run()
    system = run.record.info["systems"][0]
    assert sum(system["replay_epochs"].values()) == 3
    assert run.record.info["config"]["training"]["client_schedule"] == "oscillating"
    assert run.table()["probe_selection"].tolist() == ["test"]
