"""A user's own model under attack, and the systems of a finished run under attack again."""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from mocosfl_priv import (
    Attack,
    AttackerView,
    Capability,
    ConfigurationError,
    Defense,
    MessageKind,
    ThreatModelError,
    attack_again,
    audit,
    load_model,
)
from mocosfl_priv.api import RunResult, write_results
from mocosfl_priv.audits import plan_model_audit
from mocosfl_priv.data.image_set import ImageSet
from mocosfl_priv.evaluation.cross_validation import FOLDS, cross_validated_knn, cross_validated_probe, folds_of
from mocosfl_priv.experiment.own_audit import RepeatedMessages, limited, own_roles
from mocosfl_priv.models.own_model import own_splits
from mocosfl_priv.results import Destination, read_record, victims_key, write_record
from mocosfl_priv.runtime.seeding import generator
from tests.conftest import TINY
from tests.experiment.test_experiment import reachable

DECODER = {"name": "decoder", "architecture": "conv_normN0C16", "steps": 60}
UNLIMITED = {"seconds": None}  # with a limit of time, numbers depend on the machine
TIMES = ["attack_seconds", "attack_peak_megabytes", "training_seconds", "attack_out_of_time"]


def blobs(count: int, seed: int, channels: int = 3, size: int = 16) -> Tensor:
    """Smooth images with structure, float (n, channels, size, size) in [0, 1]."""
    rng = torch.Generator().manual_seed(seed)
    coarse = torch.rand(count, channels, 4, 4, generator=rng)
    return nn.functional.interpolate(coarse, size=size, mode="bilinear").clamp(0, 1)


def image_set(images: Tensor) -> ImageSet:
    return ImageSet.ungrouped("made", (255 * images).byte(), torch.zeros(len(images), dtype=torch.long), ("all",))


class Whole(nn.Module):
    """A small network with BatchNorm, as a user may have trained one."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU())
        self.second = nn.Sequential(nn.Conv2d(8, 16, 3, stride=2, padding=1), nn.BatchNorm2d(16), nn.ReLU())
        self.head = nn.Linear(16, 5)

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.second(self.first(images)).mean((2, 3)))


class Constant(nn.Module):
    def forward(self, images: Tensor) -> Tensor:
        return torch.ones(len(images), 4, 8, 8)


class Shifted(nn.Module):
    """Brightness around its middle, so that it decides the direction of a message, too."""

    def forward(self, images: Tensor) -> Tensor:
        return torch.stack([images.mean((1, 2, 3)) - 0.4, torch.full((len(images),), 0.3)], dim=1)


class Noisy(nn.Module):
    def forward(self, images: Tensor) -> Tensor:
        return images + torch.randn_like(images)


class Signs(Defense):
    def protect(self, smashed: Tensor, rng: torch.Generator, kind: MessageKind = MessageKind.INFERENCE) -> Tensor:
        return smashed.sign()


class Taking(Attack):
    """Keeps the messages that it is granted, and what two calls of an untrained client make of one image."""

    needs = frozenset({Capability.ARCHITECTURE})
    smashed = untrained = torch.empty(0)

    def reconstruct(self, view: AttackerView, budget: Any, seed: int) -> Tensor:
        client = view.untrained_client()
        one = torch.zeros(1, *view.image_shape)
        Taking.smashed, Taking.untrained = view.smashed, torch.stack([client(one), client(one)]).diff(dim=0)
        return view.smashed.new_full((len(view.smashed), *view.image_shape), 0.5)


def test_an_open_client_leaks_everything_and_a_constant_one_nothing() -> None:
    victims, auxiliary = blobs(16, 0), blobs(300, 1)
    turned = nn.Conv2d(3, 3, 1, bias=False)
    with torch.no_grad():
        turned.weight.copy_(
            torch.linalg.qr(torch.randn(3, 3, generator=torch.Generator().manual_seed(0)))[0][..., None, None]
        )
    attacks: list[Any] = [{"name": "rmle", "iterations": 150, "tv": 0.0}, DECODER]
    leaks = (
        audit(turned, victims=victims, auxiliary=auxiliary, attacks=attacks).table().set_index("attack")["leak_ratio"]
    )
    assert leaks["rmle"] > 0.99 and leaks["decoder"] > 0.8 and abs(leaks["floor"]) < 0.02
    shut = audit(Constant(), victims=victims, auxiliary=auxiliary, attacks=attacks).table()
    assert (shut["failure"] == "").all() and (shut["leak_ratio"] < 0.02).all()


def test_every_cut_of_a_whole_model_is_attacked_and_the_model_stays_as_it_is() -> None:
    torch.manual_seed(0)
    model = Whole().train()
    before = copy.deepcopy(model.state_dict())
    options: dict[str, Any] = {
        "victims": blobs(8, 0),
        "auxiliary": blobs(40, 1),
        "attacks": [DECODER],
        "threat": UNLIMITED,
    }
    run = audit(model, cuts=["first", "second"], **options)
    after = model.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before) and model.training
    table = run.table()
    assert (
        table["cut_layer"].tolist() == [1, 1, 2, 2] and table["checkpoint"].tolist() == ["first"] * 2 + ["second"] * 2
    )
    assert run.record.info["cuts"] == {"1": "first", "2": "second"}
    assert table["smashed_bytes_per_image"].tolist() == [4 * 8 * 256] * 2 + [4 * 16 * 64] * 2
    assert "server_model" in run.record.info["threat_model"]["grants"]
    alone = audit(nn.Sequential(model.first), **options)
    assert "server_model" not in alone.record.info["threat_model"]["grants"]
    assert alone.table()["client_parameters"].iloc[0] == table["client_parameters"].iloc[0] == 3 * 8 * 9 + 8 + 16
    # cutting is only another way to name the same client
    assert alone.table()["leak_ratio"].tolist() == table["leak_ratio"].tolist()[:2]


def test_the_same_audit_gives_the_same_numbers_and_another_seed_others() -> None:
    torch.manual_seed(0)
    client = nn.Conv2d(1, 4, 3, padding=1)

    def leak(seed: int) -> float:
        run = audit(
            client, victims=blobs(8, 0, 1), auxiliary=blobs(40, 1, 1), attacks=[DECODER], seed=seed, threat=UNLIMITED
        )
        assert run.record.images[victims_key("test")].shape == (8, 1, 16, 16)
        return float(run.table()["leak_ratio"].iloc[1])

    assert leak(0) == leak(0) != leak(1)


def test_a_defense_is_compared_with_none_and_one_that_trains_is_refused() -> None:
    images: dict[str, Any] = {"victims": blobs(8, 0), "auxiliary": blobs(40, 1), "attacks": [DECODER]}
    client = nn.Conv2d(3, 4, 3, padding=1)
    run = audit(client, defense={"name": "gaussian", "sigma": 5.0}, **images)
    assert run.table()["defense"].tolist() == ["none", "none", "gaussian", "gaussian"]
    assert "no-undefended-control" not in {flag["name"] for flag in run.record.info["flags"]}
    leaks = run.table().set_index(["defense", "attack"])["leak_ratio"]
    assert leaks["gaussian", "decoder"] < leaks["none", "decoder"]
    for name in ("taressfl", "nopeek", "bottleneck"):
        with pytest.raises(ConfigurationError, match=f"defense '{name}' works while a model trains"):
            audit(client, defense=name, **images)


def test_noise_of_the_clients_own_is_averaged_by_an_attacker_who_knows_of_it() -> None:
    images = blobs(2000, 0)
    with torch.no_grad():
        error = RepeatedMessages(Noisy(), Defense(), 8)(images) - images
    assert float(error.var()) == pytest.approx(1 / 8, rel=0.02)
    options: dict[str, Any] = {"victims": blobs(8, 0), "auxiliary": blobs(40, 1), "attacks": ["floor"]}

    def sent(**changes: Any) -> Tensor:
        torch.manual_seed(int(torch.randint(1000, (1,))))  # what the caller drew before decides nothing
        run = audit(Noisy(), **{**options, "attacks": [f"{__name__}:Taking"], **changes})
        assert run.record.info["systems"][0]["randomised_client"] is True
        return Taking.smashed

    averaged, single = sent(), sent(threat={"messages_per_victim": 1})
    noise = [float((found - blobs(8, 0)).var()) for found in (averaged, single)]
    assert noise[0] == pytest.approx(1 / 8, rel=0.1) and noise[1] == pytest.approx(1, rel=0.1)
    assert torch.equal(averaged, sent()) and not torch.equal(averaged, sent(seed=1))
    # a defense makes every message, not the mean of them: one that keeps signs leaves ninths between -1 and 1
    signs = sent(defense=f"{__name__}:Signs")
    assert set((signs * 4).round(decimals=4).unique().tolist()) == {-4, -3, -2, -1, 0, 1, 2, 3, 4}
    assert float(Taking.untrained.std()) > 0  # the untrained client makes noise, too
    flags = audit(Noisy(), **{**options, "attacks": ["floor"], "threat": {"adaptive": False}}).record.info["flags"]
    assert "randomised-evaluated-once" in {flag["name"] for flag in flags}


def test_accuracies_are_measured_on_labelled_victims() -> None:
    rng = torch.Generator().manual_seed(0)
    labels = torch.arange(100) % 4
    images = (0.2 * torch.rand(100, 3, 16, 16, generator=rng) + labels.view(-1, 1, 1, 1) / 5).clamp(0, 1)
    options: dict[str, Any] = {"victims": images, "auxiliary": blobs(20, 1), "attacks": ["floor"]}
    row = audit(Shifted(), labels=labels, **options).table().iloc[0]
    assert row["knn_accuracy"] > 0.9 and row["linear_accuracy"] > 0.9  # brightness is the class
    assert math.isnan(row["linear_untrained"]) or row["linear_untrained"] > 0.9  # it has no weights to lose
    torch.manual_seed(0)
    whole = audit(Whole(), labels=labels, cuts=["first"], **options).table().iloc[0]
    assert 0 < whole["linear_untrained"] <= 1
    blind = audit(Constant(), labels=labels, **options).table().iloc[0]
    assert blind["knn_accuracy"] < 0.4 and blind["linear_accuracy"] < 0.4
    unlabelled = audit(nn.Identity(), **options)
    assert math.isnan(unlabelled.table()["knn_accuracy"].iloc[0])
    assert "no-labels" in {flag["name"] for flag in unlabelled.record.info["flags"]}


def test_the_attackers_untrained_client_holds_no_trained_weights() -> None:
    torch.manual_seed(0)
    (split,) = own_splits(Whole(), (3, 16, 16), ["first"])
    plan = plan_model_audit(
        [split], image_set(blobs(4, 0)), image_set(blobs(9, 1)), settings={"attacks": ["floor"], "seeds": [0]}
    )
    trained = {value.data_ptr() for value in split.client.parameters()} | {
        value.data_ptr() for value in split.source.parameters()
    }
    weights = [value.detach() for value in split.client.parameters() if len(value.unique()) > 1]
    found = [thing for thing in reachable(plan.build_untrained) if isinstance(thing, Tensor)]
    assert found and not any(thing.data_ptr() in trained for thing in found)
    assert not any(torch.equal(thing, weight) for thing in found for weight in weights)


def test_a_limit_that_is_set_takes_the_place_of_the_two_minutes() -> None:
    def limits(*overrides: str, **threat: Any) -> tuple[float | None, int | None]:
        plan = plan_model_audit(
            own_splits(nn.Identity(), (3, 16, 16)), image_set(blobs(4, 0)), image_set(blobs(9, 1)),
            settings={"attacks": "floor", "seeds": [0], "threat": threat}, overrides=overrides,
        )  # fmt: skip
        return plan.config.threat.seconds, plan.config.threat.steps

    assert limits() == (120, None) and limits("threat.adaptive=false") == (120, None)
    assert limits("threat.steps=50") == limits(steps=50) == (None, 50)
    assert limits("threat.seconds=null") == (None, None) and limits(seconds=9) == (9, None)
    with pytest.raises(ConfigurationError, match=r"--set training\.epochs=7: an audit has no other settings"):
        limits("training.epochs=7")


def test_folds_keep_groups_whole_and_test_every_image_by_others() -> None:
    groups = torch.arange(60) // 3
    folds = folds_of(groups, 0)
    assert all(len(folds[groups == group].unique()) == 1 for group in groups.unique())
    assert sorted(folds.unique().tolist()) == list(range(FOLDS))
    labels = torch.arange(60) % 2
    known = nn.functional.one_hot(labels, 2).float() + 0.01
    assert cross_validated_knn(known, labels, folds, 2, 0.1).all()
    assert cross_validated_probe(known, labels, folds, [1.0]).all()
    # a feature that is unique to each image helps nobody who has not seen the image
    few = audit(
        nn.Identity(), victims=(blobs(100, 0), torch.arange(100) % 4, torch.arange(100) % 3), auxiliary=blobs(20, 1),
        attacks=["floor"],
    )  # fmt: skip
    assert math.isnan(few.table()["knn_accuracy"].iloc[0])  # three groups make no five folds
    own = torch.eye(60)
    assert cross_validated_probe(own, labels, folds, [1.0]).mean() < 0.7


def test_auxiliary_images_that_are_victims_or_of_their_group_are_left_out() -> None:
    rng = generator(0, "images")
    pixels = torch.randint(0, 256, (10, 3, 4, 4), generator=rng, dtype=torch.uint8)

    def images(pixels: Tensor, groups: list[int]) -> ImageSet:
        names = ("ann", "bob", "cid")
        return ImageSet(
            "x", pixels, torch.zeros(len(pixels), dtype=torch.long), ("all",), torch.tensor(groups), "", names
        )

    victims = images(pixels[:3], [0, 0, 1])
    roles = own_roles(victims, images(pixels[2:], [2, 1, 2, 2, 0, 2, 2, 2]))
    kept = next(found for role, found in roles.sets.items() if role == "auxiliary_source")
    assert torch.equal(kept.images, pixels[[4, 5, 7, 8, 9]]) and roles.duplicates_dropped == 3
    with pytest.raises(ConfigurationError, match="every image is also a victim"):
        own_roles(victims, victims)
    assert len(limited(victims, 2, 0)) == 2 and limited(victims, None, 0) is victims


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"auxiliary": blobs(40, 1, size=8)}, "auxiliary: images of 8 x 8 pixels .* victims have 16 x 16"),
        ({"attacks": ["shadow"], "threat": {"grants": ["auxiliary_data"]}}, "needs"),
        ({"attacks": ["fsha"]}, "fsha"),
        ({"cuts": ["third"]}, "third"),
        ({"attacks": ["decoderr"]}, "did you mean 'decoder'"),
        ({"threat": {"second": 3}}, "second"),
        ({"threat": "adaptive"}, "threat: a mapping of keys is needed"),
        ({"attacks": [3]}, "attacks: 3 is neither a name nor a mapping"),
        ({"limit": -1}, "at least one victim"),
        ({"cuts": ["first", "second"], "build_untrained": Whole}, "1 functions for 2 cuts"),
        ({"cuts": "first", "build_untrained": Whole}, "build_untrained: smashed data of shape"),
        ({"victims": torch.full((4, 3, 8, 8), math.nan)}, "nan|NaN"),
    ],
)
def test_what_does_not_fit_is_refused_before_anything_runs(change: dict[str, Any], message: str) -> None:
    options: dict[str, Any] = {"victims": blobs(8, 0), "auxiliary": blobs(40, 1), "attacks": ["floor"], **change}
    with pytest.raises((ConfigurationError, ThreatModelError), match=message):
        audit(Whole(), **options)


@pytest.fixture(scope="module")
def stored(tiny_run: RunResult, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run directory of the smallest experiment."""
    folder = tmp_path_factory.mktemp("again") / "run"
    folder.mkdir()
    write_record(tiny_run.record, folder)
    return folder


def test_the_same_attacks_on_a_stored_run_give_the_same_rows(stored: Path, tiny_run: RunResult) -> None:
    ((labels, again),) = attack_again(stored, TINY["attacks"][1:])
    then, now = tiny_run.table().drop(columns=TIMES), again.table().drop(columns=TIMES)
    assert labels == {} and not set(then.columns) ^ set(now.columns)
    for column in then.columns:
        assert then[column].equals(now[column]) or np.allclose(then[column], now[column], equal_nan=True, atol=0), (
            column
        )
    assert again.record.info["trained_in"]["config_sha256"] == tiny_run.record.info["config_sha256"]
    with Destination(stored.parent / "out") as destination:
        write_results([(labels, again)], destination)
    assert (stored.parent / "out" / "report.html").is_file()
    assert read_record(stored.parent / "out").info["systems"] == read_record(stored).info["systems"]


def test_a_model_of_a_stored_run_is_loaded_by_one_call(stored: Path, tiny_run: RunResult) -> None:
    model = load_model(stored, cut_layer=1)
    (expected,) = tiny_run.record.models.values()
    state = model.named_state()
    assert state and all(np.array_equal(value, expected[name]) for name, value in state.items())
    assert model.trunk(model.client(torch.rand(2, 3, 32, 32))).shape == (2, model.feature_dim)
    with pytest.raises(ConfigurationError, match=r"0 systems have \{'seed': 9\}; it holds none, cut 1, seed 0"):
        load_model(stored, seed=9)


def test_other_victims_and_budgets_of_a_stored_run(stored: Path) -> None:
    others = blobs(12, 5, size=40)  # brought to the size of the run's images
    ((_, again),) = attack_again(stored, [DECODER], victims=others, limit=5, overrides=["threat.steps=3"])
    assert again.table()["attack_steps"].tolist() == [0, 3]
    assert again.record.info["roles"]["victims"]["images"] == 5
    assert again.record.images[victims_key("test")].shape == (5, 3, 32, 32)
    # the judge knows the labels of the run's own victims only
    assert again.table()["recognised"].isna().all()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"overrides": ["training.epochs=2"]}, "the systems are trained already"),
        ({"overrides": ["evaluation.knn_neighbours=2"]}, "the systems are trained already"),
        ({"limit": 3}, "limit: it is about `victims`"),
        ({"attacks": ["fsha"]}, "fsha"),
        ({"victims": np.zeros((3, 40, 40), dtype=np.uint8)}, "may be one image or several grey ones"),
    ],
)
def test_what_a_stored_run_cannot_answer(stored: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises((ConfigurationError, ThreatModelError), match=message):
        attack_again(stored, **options)


def test_a_run_without_models_or_with_other_images_is_refused(
    stored: Path, tmp_path: Path, tiny: dict[str, Any]
) -> None:
    run = audit(nn.Identity(), victims=blobs(4, 0), auxiliary=blobs(8, 1), attacks=["floor"])
    write_record(run.record, tmp_path)
    with pytest.raises(ConfigurationError, match="is an audit, and holds no trained systems"):
        attack_again(tmp_path)
    text = (stored / "config.yaml").read_text()
    try:
        (stored / "config.yaml").write_text(text.replace("role_seed: 0", "role_seed: 1"))
        with pytest.raises(ConfigurationError, match="have changed since the run was made"):
            attack_again(stored)
        (stored / "config.yaml").write_text(text)
        model = next((stored / "models").iterdir())
        model.rename(stored / "gone")
        with pytest.raises(ConfigurationError, match="there is no model of"):
            attack_again(stored)
        (stored / "gone").rename(model)
        kept = model.read_bytes()
        model.write_bytes(kept[: len(kept) // 2])
        with pytest.raises(ConfigurationError, match="cannot be read"):
            attack_again(stored, ["floor"])
        model.write_bytes(kept)
    finally:
        (stored / "config.yaml").write_text(text)


def test_the_shell_audits_a_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from mocosfl_priv.cli import main

    monkeypatch.chdir(tmp_path)
    for place, seed in (("my-images", 0), ("other-images", 1)):
        for index, image in enumerate((255 * blobs(30, seed)).byte().permute(0, 2, 3, 1).numpy()):
            (tmp_path / place).mkdir(exist_ok=True)
            Image.fromarray(image).save(tmp_path / place / f"{index}.png")
    (tmp_path / "model.py").write_text(
        "from torch import nn\n\n\ndef split():\n"
        "    return nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(1024, 10))\n"
    )
    words = [
        "audit",
        "model.py:split",
        "--victims",
        "my-images",
        "--auxiliary",
        "other-images",
        "--attack",
        "floor",
        "--out",
        "out",
    ]

    def shell(*more: str) -> tuple[int, str]:
        with pytest.raises(SystemExit) as ended:
            main([*words, *more])
        said = capsys.readouterr()
        return int(ended.value.code or 0), said.out + said.err

    code, said = shell("--cut", "1", "--cut", "2", "--limit", "10")
    assert code == 0 and "my-images: 10 images" in said.replace("imagefolder:", ""), said
    page = (tmp_path / "out" / "report.html").read_text()
    assert (
        "cut 1 is after <code>1</code>" in page
        and "The audited model" in page
        and " nan" not in page.lower().split("</style>")[1]
    )
    code, said = shell("--cut", "layer9", "--overwrite")
    assert code == 2 and "layer9" in said and len([line for line in said.splitlines() if "mocosfl-priv:" in line]) == 1
    assert (tmp_path / "out" / "report.html").read_text() == page  # nothing was lost
