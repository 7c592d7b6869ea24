from __future__ import annotations

from itertools import combinations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mocosfl_priv.evaluation.multiple_comparisons import family_wise_statement, holm

P_VALUES = st.lists(st.floats(0, 1), min_size=1, max_size=6)


def closed_testing(p_values: list[float], index: int) -> float:
    """The largest Bonferroni p-value of all intersections that contain the hypothesis: what Holm's steps stand for."""
    others = [i for i in range(len(p_values)) if i != index]
    families = [{index, *more} for size in range(len(others) + 1) for more in combinations(others, size)]
    return max(min(1.0, len(family) * min(p_values[i] for i in family)) for family in families)


@given(P_VALUES)
def test_holm_is_the_closed_test_of_bonferroni(p_values: list[float]) -> None:
    assert holm(p_values) == pytest.approx([closed_testing(p_values, i) for i in range(len(p_values))])


def test_holm_by_hand() -> None:
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert holm([]) == []


def test_the_family_wise_error_is_controlled() -> None:
    draws = np.random.default_rng(0).uniform(size=(2000, 12))
    wrong = np.mean([min(holm(list(draw))) <= 0.05 for draw in draws])
    assert 0.035 <= wrong <= 0.065  # independent and all true: Holm is as sharp as it can be


def test_the_statement_says_how_many_and_at_what_risk() -> None:
    assert "Of 12 comparisons 3 show a difference" in family_wise_statement(3, 12, 0.95)
    assert "at most 5 %" in family_wise_statement(3, 12, 0.95)
    assert "none shows a difference" in family_wise_statement(0, 4, 0.95) and "no proof" in family_wise_statement(
        0, 4, 0.9
    )
    assert "Of 1 comparison 1 shows" in family_wise_statement(1, 1, 0.95)
    assert family_wise_statement(0, 0, 0.95) == "Nothing was compared."
