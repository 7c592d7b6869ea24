"""Per-image values as the bootstrap wants them, and the choice of the attack that came closest."""

from __future__ import annotations

import numpy as np
import pandas as pd


def per_seed(frame: pd.DataFrame, column: str) -> list[np.ndarray]:
    """One array per seed, in image order."""
    return [group.sort_values("image")[column].to_numpy(dtype=float) for _, group in frame.groupby("seed", sort=True)]


def groups(frame: pd.DataFrame) -> np.ndarray:
    """The group of every image, in image order; the same for all seeds."""
    first = frame[frame["seed"] == frame["seed"].iloc[0]]
    return first.sort_values("image")["group"].to_numpy()


def closest_attacks(frame: pd.DataFrame) -> pd.DataFrame:
    """For every seed and image the row of the attack with the lowest MSE."""
    best = frame.sort_values("mse", kind="stable").groupby(["seed", "image"], as_index=False).first()
    return best.sort_values(["seed", "image"])
