from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from defenses.ressfl import ResSFL
from defenses.taressfl import TAResSFL
from mocosfl_priv.config import ModelConfig, TrainingConfig
from mocosfl_priv.defending.expert import HalfTargetBatches, import_client
from mocosfl_priv.errors import ConfigurationError
from mocosfl_priv.models.split import SplitModel, build_split_model
from mocosfl_priv.plugins import CheckpointScore, DefenderContext
from mocosfl_priv.published.loader import load_published_client
from mocosfl_priv.runtime.compute import Compute
from mocosfl_priv.training.checkpoints import Checkpoints

NONE = torch.empty(0, 3, 32, 32, dtype=torch.uint8)


def test_batches_are_half_target() -> None:
    target, source = torch.zeros(3, 3, 8, 8, dtype=torch.uint8), torch.ones(50, 3, 8, 8, dtype=torch.uint8)
    batch = HalfTargetBatches(target, source, 16, torch.Generator().manual_seed(0)).next()
    assert batch.images.shape == (16, 3, 8, 8) and batch.sizes == (16,)
    assert batch.images[:, 0, 0, 0].tolist() == [1] * 8 + [0] * 8
    none = HalfTargetBatches(target[:0], source, 16, torch.Generator().manual_seed(0)).next()
    assert none.images.min() == 1


@pytest.mark.parametrize(
    ("targets", "sources", "batch", "expected", "images_per_epoch"),
    [
        (3, 50, "together", (64, 64), 53),
        (3, 50, "each", (128, 128), 50),
        (70, 50, "each", (128, 128), 70),
        (0, 50, "together", (0, 128), 50),
        (0, 50, "each", (0, 128), 50),
        (3, 0, "each", (128, 0), 3),
    ],
)
def test_batch_says_what_batch_size_counts(
    targets: int, sources: int, batch: Any, expected: tuple[int, int], images_per_epoch: int
) -> None:
    target, source = torch.full((targets, 3, 8, 8), 7, dtype=torch.uint8), torch.full((sources, 3, 8, 8), 9).byte()
    batches = HalfTargetBatches(target, source, 128, torch.Generator().manual_seed(0), batch)
    for _ in range(2):
        drawn = batches.next()
        of_target = sum(1 for image in drawn.images if int(image[0, 0, 0]) == 7)
        of_source = sum(1 for image in drawn.images if int(image[0, 0, 0]) == 9)
        assert (of_target, of_source) == expected and drawn.sizes == (sum(expected),)
    assert batches.images_per_epoch == images_per_epoch


WRITTEN_OUT: dict[str, Any] = {
    "batch": "each",
    "decoder": "ressfl_N4C64",
    "penalty_mode": "eval",
    "checkpoint": "best_knn",
}
FORMER: dict[str, Any] = {
    "batch": "together",
    "decoder": "res_normN4C64",
    "penalty_mode": "train",
    "checkpoint": "last",
}


def test_the_preset_is_its_fields_written_out() -> None:
    assert vars(TAResSFL(preset="paper")) == vars(TAResSFL(**WRITTEN_OUT))
    assert vars(TAResSFL(preset="paper", **FORMER)) == vars(TAResSFL()) == vars(TAResSFL(**FORMER))
    for name, value in FORMER.items():  # a field that is written out wins, and takes no other along
        expected = {**WRITTEN_OUT, name: value}
        assert vars(TAResSFL(preset="paper", **{name: value})) == vars(TAResSFL(**expected))


def test_the_preset_of_ressfl_is_its_fields_written_out(compute: Compute) -> None:
    def document(**options: Any) -> dict[str, Any]:
        defense = ResSFL(**options)
        found = defense.expert_document(scored_context(defense, compute, []))
        assert found is not None
        return {name: value for name, value in found.items() if name != "batch"}  # without target images it is nothing

    fields = {name: value for name, value in WRITTEN_OUT.items() if name != "batch"}
    assert document(preset="paper") == document(**fields) != document()
    assert document(preset="paper", **{name: FORMER[name] for name in fields}) == document()


def scored_context(
    defense: TAResSFL | ResSFL, compute: Compute, seen: list[dict[str, torch.Tensor]], scores: Sequence[float] = ()
) -> DefenderContext:
    """Sixteen-pixel images, and a score that keeps every state it is shown and returns `scores` in turn."""

    def of(model: SplitModel) -> float:
        seen.append({name: value.detach().clone() for name, value in model.named_state().items()})
        return scores[len(seen) - 1]

    rng = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (44, 3, 16, 16), dtype=torch.uint8, generator=rng)
    return DefenderContext(
        images[:4], images[4:], lambda: build(size=16, backbone="resnet8", width=8, bottleneck=defense.layer),
        TrainingConfig(queue_size=64), compute, seed=0, checkpoint_score=CheckpointScore(of, {"by": "hand"}),
    )  # fmt: skip


SMALL: dict[str, Any] = {"decoder": "conv_normN0C8", "batch_size": 22, "epochs": 3}  # 44 images: 2 steps an epoch


def same(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def test_the_checkpoint_with_the_best_score_is_handed_out(compute: Compute) -> None:
    """After each of three epochs a state is scored; the one with the best score is the expert, bit by bit."""
    seen: list[dict[str, torch.Tensor]] = []
    best = TAResSFL(**SMALL, checkpoint="best_knn")
    expert = best.train_expert(scored_context(best, compute, seen, (0.2, 0.9, 0.5)))
    assert len(seen) == 3 and expert.selected_step == 4
    assert same(expert.model.named_state(), seen[1]) and not same(seen[1], seen[2])

    last, unseen = TAResSFL(**SMALL), list[dict[str, torch.Tensor]]()
    expert = last.train_expert(scored_context(last, compute, unseen))
    assert unseen == [] and expert.selected_step is None
    assert same(expert.model.named_state(), seen[2])  # scoring leaves the training as it is


def test_an_interrupted_choice_of_a_checkpoint_goes_on_bit_by_bit(compute: Compute, tmp_path: Path) -> None:
    scores = (0.9, 0.2, 0.5)
    whole: list[dict[str, torch.Tensor]] = []
    defense = TAResSFL(**SMALL, checkpoint="best_knn", penalty_mode="eval", batch="each")
    expected = defense.train_expert(scored_context(defense, compute, whole, scores))
    kept = Checkpoints(tmp_path, "expert")
    first: list[dict[str, torch.Tensor]] = []
    interrupted = replace(scored_context(defense, compute, first, scores[:2]), checkpoints=kept)
    with pytest.raises(IndexError):  # there is no third score
        defense.train_expert(interrupted)
    then = list(first[:2])
    resumed = defense.train_expert(replace(scored_context(defense, compute, then, scores), checkpoints=kept))
    assert len(then) == 3 and all(same(a, b) for a, b in zip(whole, then, strict=True))
    assert resumed.selected_step == expected.selected_step == 2  # scored after steps 2, 4 and 5
    assert same(resumed.model.named_state(), expected.model.named_state())
    assert same(resumed.model.named_state(), whole[0])


@pytest.mark.parametrize("options", [{"checkpoint": "best_knn"}, {"preset": "paper"}])
def test_choosing_a_checkpoint_without_labels_is_refused(options: dict[str, Any], compute: Compute) -> None:
    defense = TAResSFL(**options)
    context = replace(scored_context(defense, compute, []), checkpoint_score=None)
    with pytest.raises(ConfigurationError, match="best_knn takes labelled images"):
        defense.check(context)
    TAResSFL(preset="paper", checkpoint="last").check(context)


def published(shared: Path) -> Path:
    path = shared / "published" / "resnet18_cifar10_C4S2_cut1_alpha2.0_ssim0.6_target0.005_cifar100.tar"
    if not path.is_file():
        pytest.skip(f"no published client {path}")
    return path


def build(cut: int = 1, size: int = 32, **model: object) -> SplitModel:
    settings = {"bottleneck": "C4S2", "projector_hidden": 8, "projector_out": 8, **model}
    torch.manual_seed(0)
    return build_split_model(ModelConfig(**settings), cut, size, [0.5] * 3, [0.25] * 3)


def test_an_imported_expert_is_the_published_client(shared: Path, compute: Compute) -> None:
    path = published(shared)
    defense = TAResSFL(expert=path)
    assert not defense.uses_target_data
    context = DefenderContext(NONE, NONE, build, TrainingConfig(), compute, seed=0)
    assert defense.planned_steps(context) == 0
    prepared = defense.prepare(context)
    assert prepared.frozen_client
    file, images = torch.load(path, weights_only=True, map_location="cpu"), torch.rand(2, 3, 32, 32)
    found = prepared.model.client.state_dict()
    assert torch.equal(found["0.conv1.weight"], file["0.conv1.weight"])
    assert torch.equal(found["cut.weight"], file["1.weight"])
    smashed = prepared.model.client(images)
    assert torch.equal(smashed, load_published_client(path)(images))  # its normalisation included
    fresh = build()
    assert all(
        torch.equal(a, b) for a, b in zip(prepared.model.trunk.parameters(), fresh.trunk.parameters(), strict=True)
    )
    assert prepared.model.trunk(smashed).shape == (2, 512)


@pytest.mark.parametrize(
    "make",
    [
        lambda: build(cut=2),
        lambda: build(size=64),
        lambda: build(width=16),
        lambda: build(norm="layer"),
        lambda: build(weight_standardisation=False),
        lambda: build(bottleneck="C8S2"),
        lambda: build(bottleneck="C4S1"),
        lambda: build(bottleneck="noReLUC4S2"),
        lambda: build(bottleneck="none"),
        lambda: build(backbone="mobilenetv2"),
    ],
)
def test_a_published_client_that_does_not_fit_is_refused(make: Callable[[], SplitModel], shared: Path) -> None:
    with pytest.raises(ConfigurationError, match=r"ResNet-18 for 32 pixels, cut after unit 1, .* does not match it"):
        import_client(make(), published(shared))


def test_a_file_that_is_no_client_is_refused_at_once(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="cannot be read: No such file"):
        TAResSFL(expert=tmp_path / "missing.tar")
