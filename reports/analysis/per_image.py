"""Arrange per-image values for the bootstrap, and choose the attack with the lowest MSE per image."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd

from mocosfl_priv.results import RunRecord

GROUP = ["defense", "cut_layer", "target_fraction"]
Key = tuple[Any, ...]  # the values of GROUP, which identify a system (over all seeds)


def bootstrap_options(record: RunRecord) -> dict[str, Any]:
    """Return the settings of all intervals of a run: ``samples`` of the bootstrap, and ``confidence``."""
    settings = record.info["config"]["evaluation"]
    return {"samples": settings["bootstrap_samples"], "confidence": settings["confidence"]}


def of_system(frame: pd.DataFrame, key: Key) -> pd.DataFrame:
    """Return the rows of one system."""
    for column, value in reversed(list(zip(GROUP, key, strict=True))):  # numbers first, since comparing names is slow
        frame = frame[(frame[column] == value).to_numpy()]
    return frame


def paired(ours: pd.DataFrame, theirs: pd.DataFrame) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Return the rows of the seeds that both tables have; a failed training leaves a system with fewer seeds."""
    seeds = set(ours["seed"]) & set(theirs["seed"])
    return ours[ours["seed"].isin(seeds)], theirs[theirs["seed"].isin(seeds)]


def differences(ours: pd.DataFrame, column: str, theirs: pd.DataFrame, their_column: str) -> list[np.ndarray]:
    """Return `column` of `ours` minus `their_column` of `theirs`, one array of shape (images,) per seed."""
    pairs = zip(per_seed(ours, column), per_seed(theirs, their_column), strict=True)
    return [first - second for first, second in pairs]


def per_seed(frame: pd.DataFrame, column: str) -> list[np.ndarray]:
    """Return `column` as one array of shape (images,) per seed, in the order of the images' indices."""
    seeds = frame["seed"].to_numpy()
    order = np.lexsort((frame["image"].to_numpy(), seeds))
    values = frame[column].to_numpy(dtype=float)[order]
    return np.split(values, np.flatnonzero(np.diff(seeds[order])) + 1)


def groups(frame: pd.DataFrame) -> np.ndarray:
    """Return the group of every image, in the order of the images' indices.

    Images of one group share pixels and are resampled together. Groups are the same for all seeds.
    """
    first = frame[(frame["seed"] == frame["seed"].iloc[0]).to_numpy()]
    return first["group"].to_numpy()[np.argsort(first["image"].to_numpy(), kind="stable")]


def closest_attacks(frame: pd.DataFrame) -> pd.DataFrame:
    """Return for every seed and image the row of the attack with the lowest MSE."""
    ordered = frame.sort_values(["seed", "image", "mse"], kind="stable")
    return ordered[~ordered.duplicated(["seed", "image"])]


def image_leaks(frame: pd.DataFrame) -> pd.Series:
    """Return R of single images: one minus the MSE divided by the blind guess's MSE on the same image.

    It is at most 1, and very negative for an image that a blind guess nearly matches. Therefore use its quantiles, not
    its mean.
    """
    return 1 - frame["mse"] / frame["mse_floor"]
