"""Linear probe: multinomial logistic regression on frozen features (scikit-learn's)."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from threadpoolctl import threadpool_limits
from torch import Tensor

MAXIMUM_ITERATIONS = 300


@dataclass(frozen=True)
class ProbeResult:
    """correct: bool (m,) per test image; penalty: the inverse L2 strength chosen on the selection data."""

    correct: np.ndarray
    penalty: float
    selection_accuracy: float


def linear_probe(
    train: tuple[Tensor, Tensor],
    selection: tuple[Tensor, Tensor],
    test: tuple[Tensor, Tensor],
    penalties: Sequence[float],
) -> ProbeResult:
    """Fit a probe per penalty on `train`, keep the best on `selection`, score it once on `test`.

    Each argument is (features float (n, d), labels int64 (n,)). Features are standardised by the training mean and
    deviation. Test data plays no part in any choice, unless a caller passes it as `selection`, too.
    """
    # scikit-learn takes seconds to import, and `validate` and `ls` have no use for it
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    (train_x, train_y), (select_x, select_y), (test_x, test_y) = (
        (features.double().cpu().numpy(), labels.cpu().numpy()) for features, labels in (train, selection, test)
    )
    if len(np.unique(train_y)) < 2:  # nothing to separate: every probe predicts the one class there is
        return ProbeResult(test_y == train_y[0], float(penalties[0]), float(np.mean(select_y == train_y[0])))
    best, best_accuracy, best_penalty = None, -1.0, 0.0
    for penalty in penalties:
        model = make_pipeline(StandardScaler(), LogisticRegression(C=penalty, max_iter=MAXIMUM_ITERATIONS))
        # One BLAS thread: at these sizes several spend their time waiting for each other (measured: ten times slower).
        with threadpool_limits(1), warnings.catch_warnings():
            # an unfinished fit still is a probe; selection decides whether it is the best one
            warnings.simplefilter("ignore", ConvergenceWarning)
            model.fit(train_x, train_y)
        accuracy = float(model.score(select_x, select_y))
        if accuracy > best_accuracy:
            best, best_accuracy, best_penalty = model, accuracy, float(penalty)
    assert best is not None
    return ProbeResult(best.predict(test_x) == test_y, best_penalty, best_accuracy)
