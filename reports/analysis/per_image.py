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
    for column, value in reversed(list(zip(GROUP, key, strict=True))):  # numbers first: comparing names is slow
        frame = frame[(frame[column] == value).to_numpy()]
    return frame


def paired(ours: pd.DataFrame, theirs: pd.DataFrame) -> tuple[pd.DataFrame, pd.DataFrame]:
    """The rows of the seeds that both have: a system whose training failed with one seed has fewer than others."""
    seeds = set(ours["seed"]) & set(theirs["seed"])
    return ours[ours["seed"].isin(seeds)], theirs[theirs["seed"].isin(seeds)]


def differences(ours: pd.DataFrame, column: str, theirs: pd.DataFrame, their_column: str) -> list[np.ndarray]:
    """Per seed and image, one column minus another: paired by seed and image."""
    pairs = zip(per_seed(ours, column), per_seed(theirs, their_column), strict=True)
    return [first - second for first, second in pairs]


def per_seed(frame: pd.DataFrame, column: str) -> list[np.ndarray]:
    """One array per seed, in image order."""
    seeds = frame["seed"].to_numpy()
    order = np.lexsort((frame["image"].to_numpy(), seeds))
    values = frame[column].to_numpy(dtype=float)[order]
    return np.split(values, np.flatnonzero(np.diff(seeds[order])) + 1)


def groups(frame: pd.DataFrame) -> np.ndarray:
    """The group of every image, in image order; the same for all seeds."""
    first = frame[(frame["seed"] == frame["seed"].iloc[0]).to_numpy()]
    return first["group"].to_numpy()[np.argsort(first["image"].to_numpy(), kind="stable")]


def closest_attacks(frame: pd.DataFrame) -> pd.DataFrame:
    """For every seed and image the row of the attack with the lowest MSE."""
    ordered = frame.sort_values(["seed", "image", "mse"], kind="stable")
    return ordered[~ordered.duplicated(["seed", "image"])]


def image_leaks(frame: pd.DataFrame) -> pd.Series:
    """R of every image by itself: one minus its error over the blind guess's error on the same image.

    At most 1. An image that a blind guess nearly hits has a very negative one, so quantiles and not means are taken.
    """
    return 1 - frame["mse"] / frame["mse_floor"]
