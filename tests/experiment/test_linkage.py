"""Linkage of clients whose matches are known in closed form, of published clients, and in runs, audits and sweeps."""

from __future__ import annotations

import os
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from torch import Tensor, nn

from mocosfl_priv import audit
from mocosfl_priv.api import Experiment, Sweep
from mocosfl_priv.audits import attack_again
from mocosfl_priv.config import PluginSpec
from mocosfl_priv.data.datasets import load_split
from mocosfl_priv.data.image_set import ImageSet
from mocosfl_priv.data.roles import Role
from mocosfl_priv.errors import ConfigurationError
from mocosfl_priv.evaluation.utility import to_unit_range
from mocosfl_priv.experiment import linkage
from mocosfl_priv.experiment.attack import Target
from mocosfl_priv.experiment.conditions import AttackConditions
from mocosfl_priv.experiment.linkage import Library, Linkage, link
from mocosfl_priv.experiment.victims import VictimSet
from mocosfl_priv.models.layers import Normalise
from mocosfl_priv.plugins import DEFENSES, AuxiliaryData, Defense, ThreatModel
from mocosfl_priv.published.discovery import find_published
from mocosfl_priv.published.loader import load_published_client
from mocosfl_priv.results import LINKAGE, LINKAGE_COLUMNS, LINKAGE_RATES, ROLES, read_record
from mocosfl_priv.runtime.compute import Compute
from mocosfl_priv.sweep.schedule import ThisProcess
from tests.conftest import TINY
from tests.sweep.test_sweep import Counter

VICTIMS, CANDIDATES = 24, 300
LINKED = {**TINY, "attacks": ["floor"], "evaluation": {**TINY["evaluation"], "linkage_candidates": 150}}


def noise_images(count: int, seed: int, side: int = 8) -> ImageSet:
    pixels = np.random.default_rng(seed).integers(0, 256, (count, 3, side, side), dtype=np.uint8)
    return ImageSet.ungrouped(f"noise {seed}", torch.from_numpy(pixels), torch.arange(count) % 2, ("a", "b"))


def victims_of(images: ImageSet) -> VictimSet:
    return VictimSet.of("test", to_unit_range(images.images), ROLES, torch.full((4, *images.images.shape[1:]), 0.5))


def conditions(compute: Compute, grants: tuple[str, ...] = ("query",), auxiliary: ImageSet | None = None,
               **options: Any) -> AttackConditions:  # fmt: skip
    known = (auxiliary or noise_images(1, seed=9)).images
    data = AuxiliaryData(known, torch.ones(len(known), dtype=torch.bool))
    return AttackConditions(ThreatModel.of(grants), data, compute, **options)


def defense_of(name: str, **parameters: Any) -> Defense:
    return DEFENSES.create(PluginSpec(name=name, **parameters)).plugin


def target(
    client: nn.Module, defense: str = "none", shape: tuple[int, int, int] = (3, 8, 8), **parameters: Any
) -> Target:
    return Target("test", client.eval(), shape, defense_of(defense, **parameters), None, seed=0)


def linked(client: nn.Module, given: AttackConditions, **defense: Any) -> Linkage:
    victims = noise_images(VICTIMS, seed=1)
    library = Library.draw(victims, [noise_images(500, seed=2)], [], CANDIDATES, seed=0)
    (found,) = link(given, library, target(client, **defense), [victims_of(victims)])
    return found


class Constant(nn.Module):
    """Sends the same whatever it sees."""

    def forward(self, images: Tensor) -> Tensor:
        return images.flatten(1)[:, :5] * 0 + 0.1


class Noisy(nn.Module):
    """Sends the image under noise of `deviation`, drawn anew for each message."""

    def __init__(self, deviation: float) -> None:
        super().__init__()
        self.deviation = deviation

    def forward(self, images: Tensor) -> Tensor:
        return images + self.deviation * torch.randn_like(images)


class OneDeviation(nn.Module):
    """The mean of `messages` messages of `client`, each under Gaussian noise of one deviation of every number."""

    def __init__(self, client: nn.Module, images: Tensor, messages: int = 1) -> None:
        super().__init__()
        self.client = client
        with torch.no_grad():
            self.noise = client(to_unit_range(images)).std(0) / messages**0.5

    def forward(self, images: Tensor) -> Tensor:
        sent = self.client(images)
        return sent + self.noise * torch.randn_like(sent)


@pytest.mark.parametrize("grants", [("query",), ("query", "auxiliary_data")])
def test_an_identity_gives_every_image_away(compute: Compute, grants: tuple[str, ...]) -> None:
    found = linked(nn.Identity(), conditions(compute, grants, noise_images(200, seed=3)))
    assert list(found.values) == LINKAGE_RATES and found.refusal == ""
    for name in ("linkage_same", "linkage_same_tpr", "linkage_jpeg", "linkage_jpeg_tpr"):
        assert found.values[name].tolist() == [1.0] * VICTIMS
    assert found.columns["linkage_chance"] == 1 / CANDIDATES and found.columns["linkage_candidates"] == CANDIDATES
    assert found.values["linkage_view"].mean() < 0.7  # a crop of noise is another image


@pytest.mark.parametrize("grants", [("query",), ("query", "auxiliary_data")])
def test_a_constant_gives_nothing_away(compute: Compute, grants: tuple[str, ...]) -> None:
    found = linked(Constant(), conditions(compute, grants, noise_images(200, seed=3)))
    assert all(not found.values[name].any() for name in LINKAGE_RATES)


def test_heavy_noise_hides_whose_image_it_is(compute: Compute) -> None:
    found = linked(Noisy(100.0), conditions(compute, ("query", "auxiliary_data"), noise_images(200, seed=3)))
    assert all(found.values[name].sum() <= 2 for name in LINKAGE_RATES)
    slight = linked(Noisy(0.05), conditions(compute, ("query", "auxiliary_data"), noise_images(200, seed=3)))
    assert slight.values["linkage_same"].mean() == 1


def test_matches_are_those_of_a_slow_double_loop(compute: Compute) -> None:
    """A client that keeps so little that some matches fail, compared pair by pair, image by image."""

    class Coarse(nn.Module):
        def forward(self, images: Tensor) -> Tensor:
            return (images.mean((2, 3)) * 60).round()

    victims, others = noise_images(VICTIMS, seed=1), noise_images(500, seed=2)
    library = Library.draw(victims, [others], [], CANDIDATES, seed=0)
    (found,) = link(conditions(compute), library, target(Coarse()), [victims_of(victims)])
    images = torch.cat([victims.images, library.bystanders[: CANDIDATES - VICTIMS]]).double() / 255
    sent = Coarse()(images.float()).double().numpy()
    spread = np.where(sent.std(0) > 0, sent.std(0), np.inf)
    standard = (sent - sent.mean(0)) / spread
    unit = standard / np.linalg.norm(standard, axis=1, keepdims=True)
    expected = []
    for i in range(VICTIMS):
        own = unit[i] @ unit[i]
        # equal messages score alike up to rounding, and are ties
        expected.append(all(own > unit[i] @ unit[j] + 1e-12 for j in range(CANDIDATES) if j != i))
    assert found.values["linkage_same"].astype(bool).tolist() == expected
    assert 0 < sum(expected) < VICTIMS


def test_equal_seeds_match_alike_and_leave_the_global_generator_alone(
    compute: Compute, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = conditions(compute, ("query", "auxiliary_data"), noise_images(200, seed=3))
    torch.manual_seed(5)
    before = torch.get_rng_state()
    first, second = linked(Noisy(0.5), given), linked(Noisy(0.5), given)
    assert torch.equal(torch.get_rng_state(), before)
    assert first.columns == second.columns
    torch.manual_seed(0)
    client = nn.Conv2d(3, 4, 3)
    whole = linked(client, given)
    monkeypatch.setattr(linkage, "BATCH_BYTES", 10 * 4 * 36 * 12)  # ten candidates and seven victims at a time
    monkeypatch.setattr(linkage, "CHUNK_BYTES", 7 * 4 * 36 * 8)
    pieces = linked(client, given)
    assert all(np.array_equal(whole.values[name], pieces.values[name]) for name in LINKAGE_RATES)


def test_the_attacker_averages_messages_where_the_defense_draws_anew(compute: Compute) -> None:
    auxiliary = noise_images(200, seed=3)
    single, mean = (
        linked(nn.Identity(), conditions(compute, ("query", "auxiliary_data"), auxiliary, messages_per_victim=count),
               defense="gaussian", sigma=4.0)
        for count in (1, 64)
    )  # fmt: skip
    assert mean.values["linkage_same"].mean() > single.values["linkage_same"].mean() + 0.2


@pytest.mark.parametrize(
    ("grants", "wanted", "others", "reason"),
    [
        (("architecture", "auxiliary_data"), CANDIDATES, 500, "the threat model does not grant query"),
        (("query",), 0, 500, "evaluation.linkage_candidates is 0"),
        (("query",), 2000, 500, "524 candidates, at least 1000 are needed"),
        (("query",), 600, 500, "524 candidates, at least 600 are needed"),
    ],
)
def test_what_cannot_be_measured_says_why(
    compute: Compute, grants: tuple[str, ...], wanted: int, others: int, reason: str
) -> None:
    victims = noise_images(VICTIMS, seed=1)
    library = Library.draw(victims, [noise_images(others, seed=2)], [], wanted, seed=0)
    (found,) = link(conditions(compute, grants), library, target(nn.Identity()), [victims_of(victims)])
    assert found.refusal.startswith(reason) and found.note == f"Linkage not measured: {found.refusal}"
    assert found.queries == 0 and not found.values
    assert all(np.isnan(found.columns[name]) for name in LINKAGE if name != "linkage_score")


def test_a_client_that_fails_costs_linkage_only(compute: Compute) -> None:
    class Broken(nn.Module):
        def forward(self, images: Tensor) -> Tensor:
            return images.log() * 0 if len(images) else images

    found = linked(Broken(), conditions(compute))
    assert found.refusal == "it failed: messages are not finite" and not found.values


def test_a_library_holds_no_victim_and_no_image_twice() -> None:
    victims, first, second = noise_images(VICTIMS, 1), noise_images(300, 2), noise_images(900, 3)
    mixed = replace(first, images=torch.cat([victims.images, first.images[:276]]))
    library = Library.draw(victims, [mixed, first], [second], 2000, seed=0)
    pixels = [image.numpy().tobytes() for image in library.bystanders]
    assert len(set(pixels)) == len(pixels) == 1000 - VICTIMS
    assert not {image.numpy().tobytes() for image in victims.images} & set(pixels)
    assert library.unseen == 300  # images that were trained on only fill up to the fewest
    assert library.count(VICTIMS) == 1000 and library.trained_on(VICTIMS) == 1000 - VICTIMS - 300
    enough = Library.draw(victims, [second, first], [noise_images(500, 4)], 1100, seed=0)
    assert enough.count(VICTIMS) == 1100 and enough.trained_on(VICTIMS) == 0
    ordered = replace(second, labels=torch.arange(900) // 450)
    few = Library.draw(victims, [ordered], [], 100, seed=0)
    kept = {image.numpy().tobytes() for image in few.bystanders}
    labels = [int(label) for image, label in zip(ordered.images, ordered.labels, strict=True)
              if image.numpy().tobytes() in kept]  # fmt: skip
    assert 20 < sum(labels) < 80  # stored class by class, drawn from both


def test_noise_of_one_deviation_does_not_hide_whose_photograph_it_is(compute: Compute) -> None:
    """At cuts 1 and 2 of an untrained network, one message each."""
    document = {**LINKED, "cut_layers": [1, 2]}
    plan = Experiment.from_dict(document).plan()
    context = plan.context
    given = replace(context.conditions, messages_per_victim=1)
    for system in plan.systems:
        model = context.models.build_untrained(context.config.model, system.cut_layer, 0)

        attacked = target(OneDeviation(model.client, context.private.images[:256]), shape=(3, 32, 32))
        (found,) = link(given, context.library, attacked, [context.victims])
        assert found.values["linkage_same"].mean() >= 0.95


@pytest.fixture(scope="module")
def cifar() -> tuple[Path, ImageSet, ImageSet]:
    """Folder of published clients, and CIFAR-10 test and training images."""
    shared = Path(os.environ.get("MOCOSFL_SHARED", Path(__file__).parents[3] / "shared"))
    folder, images = shared / "published", shared / "data" / "cifar10"
    if not folder.is_dir() or not images.is_dir():
        pytest.skip(f"no published clients and images in {shared}; set MOCOSFL_SHARED to where they are")
    return folder, load_split("cifar10", "test", 32, images), load_split("cifar10", "train", 32, images)


@pytest.mark.parametrize("place", [0, *(pytest.param(place, marks=pytest.mark.slow) for place in (1, 2, 3))])
def test_published_clients_give_every_photograph_away(
    cifar: tuple[Path, ImageSet, ImageSet], place: int, compute: Compute
) -> None:
    folder, test, train = cifar
    found = find_published(folder)
    if place >= len(found):
        pytest.skip(f"{folder} has {len(found)} published clients")
    victims = test.select(torch.arange(128))
    library = Library.draw(victims, [test.select(torch.arange(128, len(test))), train], [], 1200, seed=0)
    client = load_published_client(found[place].path)
    attacked = target(client, shape=(3, 32, 32))
    (matched,) = link(conditions(compute, ("query",)), library, attacked, [victims_of(victims)])
    assert matched.candidates >= 1000
    assert matched.columns["linkage_same"] >= 0.99 and matched.columns["linkage_same_tpr"] >= 0.99
    assert matched.columns["linkage_jpeg"] >= 0.98
    assert 1 / 1200 < matched.columns["linkage_view"] < 0.6
    # as an adaptive attacker gets them where messages are noisy: means of eight
    hidden = target(OneDeviation(client, train.images[:256], messages=8), shape=(3, 32, 32))
    (noisy,) = link(conditions(compute, ("query",)), library, hidden, [victims_of(victims)])
    assert noisy.columns["linkage_same"] >= 0.97


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, pd.DataFrame]:
    folder = tmp_path_factory.mktemp("run") / "run"
    result = Experiment.from_dict(LINKED).run()
    result.report(folder)
    return folder, result.table()


def test_a_run_records_linkage_in_rows_and_per_victim(run: tuple[Path, pd.DataFrame]) -> None:
    folder, table = run
    record = read_record(folder)
    assert record.linkage.columns.tolist() == LINKAGE_COLUMNS and len(record.linkage) == 16
    for name in LINKAGE_RATES:
        assert record.linkage[name].mean() == pytest.approx(table[name].iloc[0], nan_ok=True)
    assert table["linkage_same"].tolist() == [1.0] and table["linkage_candidates"].tolist() == [150]
    assert record.info["linkage"]["notes"] == ["Linkage of 16 messages among 150 candidates"]


def test_attacks_on_a_finished_run_match_its_messages_again(run: tuple[Path, pd.DataFrame]) -> None:
    folder, table = run
    ((_, again),) = attack_again(folder, ["floor"])
    pd.testing.assert_frame_equal(again.table()[LINKAGE], table[LINKAGE])
    grants = "threat.grants=[architecture,auxiliary_data]"
    ((_, without),) = attack_again(folder, ["floor"], overrides=[grants])
    assert without.table()[LINKAGE_RATES].isna().all(axis=None) and len(without.record.linkage) == 0
    assert without.record.info["linkage"]["notes"] == [
        "Linkage not measured: the threat model does not grant query"
    ]  # fmt: skip


def test_a_run_of_before_linkage_still_loads(run: tuple[Path, pd.DataFrame], tmp_path: Path) -> None:
    old = tmp_path / "old"
    shutil.copytree(run[0], old)
    (old / "linkage.parquet").unlink()
    pd.read_csv(old / "results.csv").drop(columns=LINKAGE).to_csv(old / "results.csv", index=False)
    record = read_record(old)
    assert record.linkage.empty and record.linkage.columns.tolist() == LINKAGE_COLUMNS
    ((_, again),) = attack_again(old, ["floor"])
    assert again.table()["linkage_same"].tolist() == [1.0]


def test_a_sweep_matches_as_a_run_does_and_once_only(run: tuple[Path, pd.DataFrame], tmp_path: Path) -> None:
    config = Experiment.from_dict(LINKED).config.to_yaml()
    (tmp_path / "sweep.yaml").write_text(config)
    sweep = Sweep.from_yaml(tmp_path / "sweep.yaml")
    first = sweep.run(tmp_path / "sweep", ThisProcess())
    rates = first.cells[LINKAGE].reset_index(drop=True)
    pd.testing.assert_frame_equal(rates, run[1][LINKAGE].reset_index(drop=True))
    counter = Counter()
    second = sweep.run(tmp_path / "sweep", ThisProcess(), counter, resume=True)
    assert counter.tasks == [] and second.cells["linkage_same"].tolist() == [1.0]
    (place,) = (tmp_path / "sweep" / "runs").iterdir()
    pd.testing.assert_frame_equal(read_record(place).linkage, read_record(run[0]).linkage)


def test_an_audit_of_ones_own_model_is_linked_too() -> None:
    images = noise_images(400, seed=0, side=16)
    victims, auxiliary = images.select(torch.arange(20)), images.select(torch.arange(20, 400))
    client = nn.Sequential(Normalise((0.5,) * 3, (0.25,) * 3), nn.Conv2d(3, 4, 3, 2, 1))
    few = audit(client=client, victims=victims.images, auxiliary=auxiliary.images, attacks=["floor"])
    assert few.record.info["linkage"]["notes"] == [
        "Linkage not measured: 400 candidates, at least 1000 are needed; evaluation.linkage_candidates asks for fewer"
    ]
    found = audit(
        client=client, victims=victims.images, auxiliary=auxiliary.images, attacks=["floor"],
        linkage_candidates=300,
    )  # fmt: skip
    assert found.table()["linkage_same"].tolist() == [1.0] and found.table()["linkage_candidates"].tolist() == [300]


def test_candidates_are_images_on_which_no_system_trained(tiny: dict[str, Any]) -> None:
    context = Experiment.from_dict({**tiny, "evaluation": LINKED["evaluation"]}).plan().context
    private = set(context.roles[Role.CLIENT_PRIVATE].digests().tolist())
    shown = replace(context.roles[Role.PROBE_TEST], images=context.library.bystanders,
                    labels=torch.zeros(len(context.library.bystanders), dtype=torch.long),
                    groups=torch.arange(len(context.library.bystanders)))  # fmt: skip
    assert not private & set(shown.digests().tolist()) and context.library.trained_on(16) == 0


def test_settings_out_of_range_are_refused_in_one_line() -> None:
    with pytest.raises(ConfigurationError, match="linkage_candidates"):
        Experiment.from_dict({**TINY, "evaluation": {"linkage_candidates": -1}}).plan()
