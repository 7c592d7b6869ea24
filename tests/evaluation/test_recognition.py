from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor

from mocosfl_priv.data.image_set import ImageSet
from mocosfl_priv.evaluation import recognition
from mocosfl_priv.evaluation.recognition import RecognitionJudge, build_judge, nearest_is_own, train_classifier

CLASSES = ("rows", "columns", "checks")


def patterns(per_class: int, seed: int) -> ImageSet:
    """Stripes across, stripes along or checks in random colours at a random place, 16 pixels a side."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:16, :16]
    images, labels = [], []
    for label in range(3):
        for _ in range(per_class):
            r, c = rng.integers(4, size=2)
            across, along = (y + r) // 2, (x + c) // 2
            stripe = (across, along, across + along)[label][None] % 2
            low, high = rng.integers(0, 256, (2, 3, 1, 1))
            images.append(np.where(stripe == 1, low, high).astype(np.uint8))
            labels.append(label)
    return ImageSet.ungrouped("patterns", torch.from_numpy(np.stack(images)), torch.tensor(labels), CLASSES)


def judge(candidates: int, epochs: int = 8) -> tuple[RecognitionJudge, Tensor]:
    victims = patterns(20, seed=1)
    others = patterns(-(-candidates // 3), seed=2)
    built = build_judge(
        [patterns(120, seed=0)], victims, [others], epochs=epochs, device=torch.device("cpu"), seed=0
    )  # fmt: skip
    return built, victims.images.float() / 255


@pytest.fixture(scope="module")
def trained() -> tuple[RecognitionJudge, Tensor]:
    return judge(candidates=1000)


def test_the_victims_themselves_are_recognised_and_found(trained: tuple[RecognitionJudge, Tensor]) -> None:
    judging, victims = trained
    values = judging(victims)
    assert (
        values["recognised"].mean() == pytest.approx(judging.recognition_ceiling) and judging.recognition_ceiling > 0.8
    )
    assert values["reidentified"].mean() == 1
    assert 0.5 < judging.reidentification_ceiling <= 1
    assert set(values["recognised"].tolist()) <= {0.0, 1.0} and values["recognised"].shape == (len(victims),)


def test_what_tells_nothing_stays_at_chance(trained: tuple[RecognitionJudge, Tensor]) -> None:
    judging, victims = trained
    assert judging.recognition_chance == pytest.approx(1 / 3)
    assert judging.reidentification_chance == 1 / 1000
    grey = judging(torch.full_like(victims, 0.5))
    assert grey["recognised"].mean() == pytest.approx(1 / 3)  # one answer for all, in three balanced classes
    assert grey["reidentified"].sum() <= 1
    swapped = judging(victims.roll(20, 0))  # every victim's image stands in another one's place, of another class
    assert swapped["reidentified"].sum() == 0
    assert swapped["recognised"].mean() < 0.2


def test_the_worse_the_image_the_less_is_found(trained: tuple[RecognitionJudge, Tensor]) -> None:
    judging, victims = trained
    noise = torch.randn(victims.shape, generator=torch.Generator().manual_seed(0))
    found = [judging((victims + level * noise).clamp(0, 1))["reidentified"].mean() for level in (0.0, 0.05, 0.4)]
    assert found[0] > found[1] > found[2]


def test_too_few_candidates_leave_reidentification_out() -> None:
    judging, victims = judge(candidates=300, epochs=1)
    assert bool(judging(victims)["reidentified"].isnan().all())
    assert not bool(judging(victims)["recognised"].isnan().any())
    assert math.isnan(judging.reidentification_chance) and math.isnan(judging.reidentification_ceiling)
    assert "Re-identification not measured: 360 candidates, at least 1000" in judging.note


def test_equal_seeds_judge_alike_and_leave_the_global_generator_alone() -> None:
    torch.manual_seed(5)
    before = torch.get_rng_state()
    first, victims = judge(candidates=1000, epochs=1)
    second, _ = judge(candidates=1000, epochs=1)
    assert torch.equal(torch.get_rng_state(), before)
    assert first.levels == second.levels and first.candidates is not None and second.candidates is not None
    assert torch.equal(first.candidates, second.candidates)
    assert replace(first, classifier=second.classifier)(victims).keys() == {"recognised", "reidentified"}


def test_candidates_are_drawn_from_all_classes() -> None:
    """Bystanders stored class by class: the first ones would be of one class only."""
    drawn: list[Tensor] = []
    look = recognition._look

    def spy(classifier: recognition.Classifier, images: Tensor) -> tuple[Tensor, Tensor]:
        drawn.append(images)
        return look(classifier, images)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(recognition, "_look", spy)
        judge(candidates=3000, epochs=1)
    candidates = next(images for images in drawn if len(images) == 1000)
    rows = (candidates == candidates[:, :, :, :1]).flatten(1).all(1)  # images of the first class are constant along x
    assert 0.2 < rows.float().mean() < 0.45


def test_ties_are_no_reidentification() -> None:
    same = torch.nn.functional.normalize(torch.ones(4, 3), dim=1)
    assert nearest_is_own(same[:2], same).tolist() == [False, False]
    assert nearest_is_own(torch.eye(3)[:2], torch.eye(3)).tolist() == [True, True]


@pytest.mark.parametrize(("size", "count"), [(8, 2), (9, 65), (96, 3)])
def test_any_image_size_and_few_images_train(size: int, count: int) -> None:
    images = torch.randint(0, 256, (count, 3, size, size), dtype=torch.uint8)
    network = train_classifier(
        images, torch.arange(count) % 2, 2, epochs=1, device=torch.device("cpu"), seed=0
    )  # fmt: skip
    assert torch.isfinite(network(images.float() / 255)).all()
