"""Many comparisons at once: what may be claimed of all of them together."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np


def holm(p_values: Sequence[float]) -> list[float]:
    """Adjusted p-values, in the order given (Holm, Scandinavian Journal of Statistics 1979).

    Claiming only the differences whose adjusted p-value is at most alpha makes any false claim with probability alpha
    or less, however many comparisons there are and however they depend on each other.
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
    """What `found` differences in a family of `of` comparisons say together, in words."""
    if of == 0:
        return "Nothing was compared."
    rate = f"{100 * (1 - confidence):.2g} %"
    comparisons = f"{of} comparison{'s' if of > 1 else ''}"
    if found == 0:
        return (
            f"Of {comparisons} none shows a difference. That is no proof of equality: it says that these seeds and "
            "images do not tell the systems apart."
        )
    return (
        f"Of {comparisons} {found} show{'s' if found == 1 else ''} a difference: the probability that any of these "
        f"claims is false is at most {rate} over all together (Holm)."
    )
