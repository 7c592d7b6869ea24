"""Per-image values as the bootstrap wants them, and the choice of the attack that came closest."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd

from mocosfl_priv.results import RunRecord

GROUP = ["defense", "cut_layer", "target_fraction"]
Key = tuple[Any, ...]  # the values of GROUP: a system over all seeds


def bootstrap_options(record: RunRecord) -> dict[str, Any]:
    """What every interval of a run is made with."""
    settings = record.info["config"]["evaluation"]
    return {"samples": settings["bootstrap_samples"], "confidence": settings["confidence"]}


def of_system(frame: pd.DataFrame, key: Key) -> pd.DataFrame:
    """The rows of one system."""
    mask = np.ones(len(frame), dtype=bool)
    for column, value in zip(GROUP, key, strict=True):
        mask &= (frame[column] == value).to_numpy()
    return frame[mask]


def differences(ours: pd.DataFrame, column: str, theirs: pd.DataFrame, their_column: str) -> list[np.ndarray]:
    """Per seed and image, one column minus another: paired by seed and image."""
    pairs = zip(per_seed(ours, column), per_seed(theirs, their_column), strict=True)
    return [first - second for first, second in pairs]


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
