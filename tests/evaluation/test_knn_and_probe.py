from __future__ import annotations

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st
from sklearn.neighbors import KNeighborsClassifier

from mocosfl_priv.evaluation.knn import weighted_knn
from mocosfl_priv.evaluation.linear_probe import linear_probe


@given(neighbours=st.integers(1, 60), temperature=st.sampled_from([0.07, 0.1, 1.0]), seed=st.integers(0, 20))
def test_knn_equals_scikit_learn(neighbours: int, temperature: float, seed: int) -> None:
    rng = np.random.default_rng(seed)
    bank, queries = rng.normal(size=(50, 6)), rng.normal(size=(20, 6))
    labels = rng.integers(0, 4, 50)
    reference = KNeighborsClassifier(
        min(neighbours, 50), metric="cosine", algorithm="brute", weights=lambda d: np.exp((1 - d) / temperature)
    ).fit(bank, labels)
    ours = weighted_knn(
        torch.tensor(bank), torch.tensor(labels), torch.tensor(queries), classes=4,
        neighbours=neighbours, temperature=temperature,
    )  # fmt: skip
    assert (ours.numpy() == reference.predict(queries)).mean() >= 0.95  # exact up to ties in floating point


def data(n: int, seed: int, separation: float) -> tuple[torch.Tensor, torch.Tensor]:
    rng = torch.Generator().manual_seed(seed)
    labels = torch.randint(0, 3, (n,), generator=rng)
    return separation * torch.eye(3)[labels] + torch.randn((n, 3), generator=rng), labels


def test_probe_separates_what_is_separable_and_only_that() -> None:
    easy = linear_probe(data(300, 0, 8.0), data(100, 1, 8.0), data(200, 2, 8.0), [0.1, 1.0])
    assert easy.correct.mean() > 0.98
    chance = linear_probe(data(300, 0, 0.0), data(100, 1, 0.0), data(200, 2, 0.0), [0.1, 1.0])
    assert 0.2 < chance.correct.mean() < 0.47


def test_probe_selects_on_validation_and_never_sees_test_labels() -> None:
    train, validation, test = data(60, 0, 1.5), data(80, 1, 1.5), data(50, 2, 1.5)
    penalties = [1e-4, 1e-2, 1.0, 100.0]
    chosen = linear_probe(train, validation, test, penalties)
    single = {p: linear_probe(train, validation, test, [p]) for p in penalties}
    assert chosen.selection_accuracy == max(result.selection_accuracy for result in single.values())
    np.testing.assert_array_equal(chosen.correct, single[chosen.penalty].correct)
    shuffled = (test[0], test[1].flip(0))
    assert linear_probe(train, validation, shuffled, penalties).penalty == chosen.penalty


def test_one_class_is_no_crash() -> None:
    x, y = torch.randn(10, 3), torch.zeros(10, dtype=torch.long)
    assert linear_probe((x, y), (x, y), (x, y), [1.0]).correct.all()
