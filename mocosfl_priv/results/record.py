"""What a run leaves behind: its tables, the columns of each, and the keys that name a row."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pandas as pd

SCHEMA_VERSION = 4
LONGEST_NAME = 160  # bytes of a file name that we make; a file system takes 255, and staging adds to it
UNDEFENDED = "defenses.none:NoDefense"  # the class behind the control, as run.json names it
SYSTEM_KEYS = ["defense", "cut_layer", "target_fraction", "seed"]
TEST_VICTIMS = "test"  # the victims that the data roles name
RELEASE, ROLES = "release", "roles"  # origins of victims: the public release, or the data roles of the run
PUBLISHED_VICTIMS = "published128"  # the images of the public release on which its logged values were measured
CELL_KEYS = ["defense", "attack", "cut_layer", "target_fraction", "seed", "victims"]
COSTS = [
    "client_parameters",
    "client_flops",
    "smashed_bytes_per_image",
    "training_megabytes",
    "paper_megabytes_per_client",
    "training_seconds",
]
ANALYTIC_COSTS = ["participation_flops", "client_tensor_bytes"]  # of an average client, in run.json
ATTACK_COSTS = [
    "attack_seconds",
    "attack_peak_megabytes",
    "attack_steps",
    "attack_queries",
    "attack_out_of_time",
]
METRICS = ["mse", "psnr", "ssim", "ssim_zeropad", "lpips", "recognised", "reidentified"]
GUARANTEE = ["guarantee", "guarantee_epsilon", "guarantee_delta", "mse_bound"]
RECOGNITION_LEVELS = [
    "recognition_chance",
    "recognition_ceiling",
    "reidentification_chance",
    "reidentification_ceiling",
]
COLUMNS = [
    *CELL_KEYS,
    "checkpoint",
    "knn_accuracy",
    "linear_accuracy",
    *METRICS,
    "mse_floor",
    "leak_ratio",
    *GUARANTEE,
    *RECOGNITION_LEVELS,
    *ATTACK_COSTS,
    "failure",
    "knn_raw_pixels",
    "linear_untrained",
    "probe_selection",
    *COSTS,
    "flags",
]


def semi_column(fraction: float) -> str:
    """The name of the semi-supervised results with this fraction of the labels, in (0, 1]: ``semi_10`` for 0.1."""
    return f"semi_{100 * fraction:.12g}"  # 0.07 is semi_7, whatever the last bits of the product say


def cell_columns(label_fractions: Sequence[float]) -> list[str]:
    """The columns of results.csv: `COLUMNS` with one accuracy per label fraction after the linear probe's."""
    place = COLUMNS.index("linear_accuracy") + 1
    return [*COLUMNS[:place], *(f"{semi_column(f)}_accuracy" for f in label_fractions), *COLUMNS[place:]]


LEAKAGE_COLUMNS = [
    *CELL_KEYS,
    "step",
    "epoch",
    *METRICS,
    "mse_floor",
    "leak_ratio",
    "attack_seconds",
    "failure",
]
DETECTION_COLUMNS = [
    *SYSTEM_KEYS,
    "hijacked_by",
    "alarm",
    "first_alarm_step",
    "clients_judging",
    "clients_alarmed",
    "fakes_judged",
    "score",
    "failure",
]


@dataclass
class RunRecord:
    """A finished run in memory.

    cells: one row per cell, :func:`cell_columns`; `flags` names the flags that concern it, joined by semicolons.
        `guarantee` is what the defense promises of any attacker that saw as many messages as this one, empty if
        nothing; `mse_bound` the mean MSE that follows.
    per_image: `CELL_KEYS`, image, group, metrics, mse_floor, mse_bound (terms of the mean; NaN if nothing is promised).
    probe: `SYSTEM_KEYS`, image, group, knn, linear, one :func:`semi_column` per label fraction, knn_raw_pixels,
        linear_untrained (booleans; NaN where there are no labels).
    training: `SYSTEM_KEYS`, step, epoch, loss, validation_knn, and client_signature (nats) where clients can differ.
    leakage: `LEAKAGE_COLUMNS`.
    detections: `DETECTION_COLUMNS`, one row per training of a system whose defense detects; `hijacked_by` is the attack
        that chose the gradients, empty for none, `failure` why that attack stopped doing so, empty if it did not.
    images: the victims (:func:`victims_key`) and an array per cell that did not fail (:func:`image_key`);
        uint8 (n, 3, h, w).
    checkpoints: file name to named arrays. info: everything else, as JSON.
    """

    cells: pd.DataFrame
    per_image: pd.DataFrame
    probe: pd.DataFrame
    training: pd.DataFrame
    leakage: pd.DataFrame
    images: dict[str, np.ndarray]
    info: dict[str, Any]
    config_yaml: str
    checkpoints: Mapping[str, dict[str, np.ndarray]] = field(default_factory=dict)
    detections: pd.DataFrame = field(default_factory=lambda: pd.DataFrame(columns=DETECTION_COLUMNS))


def image_key(cell: dict[str, Any]) -> str:
    """The name under which a cell's reconstructions are stored."""
    return "/".join(f"{key}={cell[key]}" for key in CELL_KEYS)


def victims_key(name: str) -> str:
    """The name under which the true images of a set of victims are stored."""
    return f"victims={name}"


@dataclass(frozen=True)
class StoredRun:
    """A run as it lies on the disk. labels: where it stands on every axis of its sweep; empty without axes."""

    labels: dict[str, str]
    record: RunRecord


def variant_name(labels: dict[str, str]) -> str:
    """What a variant of a sweep, and its run directory, is called; the end of a long name is a digest of all of it."""
    return short_name("_".join(f"{axis}={label}" for axis, label in labels.items()))


def short_name(name: str, most: int = LONGEST_NAME) -> str:
    """`name` if it has at most `most` bytes, else its beginning and a digest; as distinct as `name` is."""
    if len(name.encode()) <= most:
        return name
    digest = hashlib.sha256(name.encode()).hexdigest()[:12]
    return name.encode()[: most - len(digest) - 1].decode(errors="ignore") + "-" + digest
