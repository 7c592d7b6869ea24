from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from sklearn.linear_model import LogisticRegression
from torch import Tensor

from mocosfl_priv.evaluation.semi_supervised import EPOCHS, label_subset, semi_supervised

CLASSES = 5


def blobs(n: int, seed: int, separation: float) -> tuple[Tensor, Tensor]:
    rng = torch.Generator().manual_seed(seed)
    labels = torch.randint(0, CLASSES, (n,), generator=rng)
    return separation * torch.eye(12)[labels] + torch.randn((n, 12), generator=rng), labels


def test_the_separable_is_separated_as_scikit_learn_does_it() -> None:
    train, validation, test = blobs(1000, 0, 7.0), blobs(100, 1, 7.0), blobs(400, 2, 7.0)
    result = semi_supervised(train, validation, test, classes=CLASSES, fraction=0.05, seed=0)
    subset = label_subset(train[1], 0.05, 0)
    oracle = LogisticRegression().fit(train[0][subset].numpy(), train[1][subset].numpy())
    correct = oracle.predict(test[0].numpy()) == test[1].numpy()
    assert correct.mean() > 0.97 and result.correct.mean() > 0.97
    assert (result.correct == correct).mean() > 0.95
    assert result.labels == 50 and 1 <= result.epoch <= EPOCHS


def test_nothing_is_found_where_nothing_is() -> None:
    result = semi_supervised(
        blobs(600, 0, 0.0), blobs(200, 1, 0.0), blobs(600, 2, 0.0), classes=CLASSES, fraction=0.2, seed=0
    )
    assert 0.1 < result.correct.mean() < 0.3


@pytest.fixture(scope="module")
def two_classes() -> list[tuple[Tensor, Tensor]]:
    """Two overlapping classes, so that an image's prediction follows from whether it is correct."""
    rng = torch.Generator().manual_seed(3)
    sets = []
    for n in (400, 80, 300):
        labels = torch.randint(0, 2, (n,), generator=rng)
        sets.append((torch.eye(6)[labels] + torch.randn((n, 6), generator=rng), labels))
    return sets


def test_labels_of_test_images_play_no_part(two_classes: list[tuple[Tensor, Tensor]]) -> None:
    train, validation, test = two_classes
    shuffled = test[1][torch.randperm(len(test[1]), generator=torch.Generator().manual_seed(0))]
    ours = semi_supervised(train, validation, test, classes=2, fraction=0.1, seed=0)
    other = semi_supervised(train, validation, (test[0], shuffled), classes=2, fraction=0.1, seed=0)
    predicted = np.where(ours.correct, test[1], 1 - test[1])
    assert np.array_equal(predicted, np.where(other.correct, shuffled, 1 - shuffled))
    assert ours.epoch == other.epoch
    # selecting on the test role, as the research code does, cannot look worse: that is why it is not done
    assert semi_supervised(train, test, test, classes=2, fraction=0.1, seed=0).correct.mean() >= ours.correct.mean()


def test_equal_seeds_give_equal_heads(two_classes: list[tuple[Tensor, Tensor]]) -> None:
    torch.manual_seed(1)
    first = semi_supervised(*two_classes, classes=2, fraction=0.1, seed=4)
    torch.manual_seed(2)
    again = semi_supervised(*two_classes, classes=2, fraction=0.1, seed=4)
    assert np.array_equal(first.correct, again.correct) and first.epoch == again.epoch
    other = semi_supervised(*two_classes, classes=2, fraction=0.1, seed=5)
    assert not np.array_equal(first.correct, other.correct)


@given(
    counts=st.lists(st.integers(1, 80), min_size=1, max_size=8),
    fraction=st.floats(0.001, 1.0),
    seed=st.integers(0, 3),
)
def test_the_label_subset_is_balanced_seeded_and_of_the_asked_size(
    counts: list[int], fraction: float, seed: int
) -> None:
    labels = torch.arange(len(counts)).repeat_interleave(torch.tensor(counts))
    subset = label_subset(labels, fraction, seed)
    assert len(subset) == len(subset.unique()) == max(len(counts), round(fraction * len(labels)))
    assert torch.equal(subset, label_subset(labels, fraction, seed))
    drawn = torch.bincount(labels[subset], minlength=len(counts)).tolist()
    assert min(drawn) >= 1
    most = max(drawn)  # a class has fewer than another only where it has no more, up to one image
    assert all(have >= most - 1 or have == count for have, count in zip(drawn, counts, strict=True))
    assert set(label_subset(labels, fraction / 2, seed).tolist()) <= set(subset.tolist())


def test_another_seed_draws_other_labels() -> None:
    labels = torch.arange(10).repeat(50)
    assert not torch.equal(label_subset(labels, 0.1, 0), label_subset(labels, 0.1, 1))


@pytest.mark.parametrize("count", [2, 129])
def test_any_number_of_labels_can_be_batched(count: int) -> None:
    x, y = torch.randn(count, 4), torch.arange(count) % 2
    assert len(semi_supervised((x, y), (x, y), (x, y), classes=2, fraction=1.0, seed=0).correct) == count


def test_one_class_is_no_crash() -> None:
    x, y = torch.randn(10, 3), torch.zeros(10, dtype=torch.long)
    result = semi_supervised((x, y), (x, y), (x, y), classes=4, fraction=0.1, seed=0)
    assert result.correct.all() and result.labels == 1
