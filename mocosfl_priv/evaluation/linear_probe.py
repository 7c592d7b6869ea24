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
    """The result of a linear probe.

    correct: bool (m,), per test image. penalty: the chosen inverse L2 strength (scikit-learn's C).
    selection_accuracy: the accuracy on the selection data, in [0, 1], by which it was chosen.
    """

    correct: np.ndarray
    penalty: float
    selection_accuracy: float


def linear_probe(
    train: tuple[Tensor, Tensor],
    selection: tuple[Tensor, Tensor],
    test: tuple[Tensor, Tensor],
    penalties: Sequence[float],
) -> ProbeResult:
    """Fit a probe on `train` for each penalty, choose the best on `selection`, and score it on `test`.

    train, selection, test: (features float (n, d), labels int64 (n,)). Features are standardised by the training mean
        and standard deviation. Test data affects no choice, unless a caller passes it as `selection` too.
    penalties: inverse L2 strengths (scikit-learn's C).
    """
    # imported here, since scikit-learn takes seconds to import and the commands `validate` and `ls` do not need it
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    (train_x, train_y), (select_x, select_y), (test_x, test_y) = (
        (features.double().cpu().numpy(), labels.cpu().numpy()) for features, labels in (train, selection, test)
    )
    if len(np.unique(train_y)) < 2:  # logistic regression needs two classes; with one, that one is predicted
        return ProbeResult(test_y == train_y[0], float(penalties[0]), float(np.mean(select_y == train_y[0])))
    best, best_accuracy, best_penalty = None, -1.0, 0.0
    for penalty in penalties:
        model = make_pipeline(StandardScaler(), LogisticRegression(C=penalty, max_iter=MAXIMUM_ITERATIONS))
        # One BLAS thread: at these sizes several threads were measured to be ten times slower.
        with threadpool_limits(1), warnings.catch_warnings():
            # a fit that has not converged is still a valid probe, which may or may not be selected
            warnings.simplefilter("ignore", ConvergenceWarning)
            model.fit(train_x, train_y)
        accuracy = float(model.score(select_x, select_y))
        if accuracy > best_accuracy:
            best, best_accuracy, best_penalty = model, accuracy, float(penalty)
    assert best is not None
    return ProbeResult(best.predict(test_x) == test_y, best_penalty, best_accuracy)
