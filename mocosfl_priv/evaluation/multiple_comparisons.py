"""Corrections for many comparisons at once."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np


def holm(p_values: Sequence[float]) -> list[float]:
    """Return adjusted p-values, in the order given (Holm, Scandinavian Journal of Statistics 1979).

    If only differences with an adjusted p-value of at most alpha are claimed, the probability of one or more false
    claims is at most alpha, however many comparisons there are and however they depend on each other.
    """
    if not p_values:
        return []
    order = np.argsort(p_values, kind="stable")
    remaining = np.arange(len(p_values), 0, -1)
    stepped = np.maximum.accumulate(np.asarray(p_values, dtype=float)[order] * remaining)
    adjusted = np.empty(len(p_values))
    adjusted[order] = np.minimum(stepped, 1.0)
    return [float(value) for value in adjusted]


def family_wise_statement(found: int, of: int, confidence: float) -> str:
    """Say in words what `found` differences in a family of `of` comparisons mean; `confidence` is in (0, 1)."""
    if of == 0:
        return "Nothing was compared."
    rate = f"{100 * (1 - confidence):.2g} %"
    comparisons = f"{of} comparison{'s' if of > 1 else ''}"
    if found == 0:
        return (
            f"Of {comparisons} none shows a difference. That is no proof of equality; the systems may differ by less "
            "than these seeds and images can show."
        )
    return (
        f"Of {comparisons} {found} show{'s' if found == 1 else ''} a difference. The probability that one or more "
        f"of these claims are false is at most {rate} (Holm)."
    )
