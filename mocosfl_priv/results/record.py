"""The record of a finished run: its tables, their columns, and the keys that identify a row."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pandas as pd

SCHEMA_VERSION = 4
LONGEST_NAME = 160  # bytes of a file name; file systems allow 255, and temporary names are longer
UNDEFENDED = "defenses.none:NoDefense"  # the class of the undefended control, as run.json names it
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
ANALYTIC_COSTS = ["participation_flops", "client_tensor_bytes"]  # averages over clients, in run.json
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
# of the victims' messages, by what the attacker has of their images: the same, a JPEG copy, or an augmented view
LINKAGE_RATES = [
    "linkage_same",
    "linkage_jpeg",
    "linkage_view",
    "linkage_same_tpr",
    "linkage_jpeg_tpr",
    "linkage_view_tpr",
]
LINKAGE = [*LINKAGE_RATES, "linkage_chance", "linkage_candidates", "linkage_score"]
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
    *LINKAGE,
    *ATTACK_COSTS,
    "failure",
    "knn_raw_pixels",
    "linear_untrained",
    "probe_selection",
    *COSTS,
    "flags",
]


def semi_column(fraction: float) -> str:
    """Return the name of the semi-supervised results for a fraction of the labels in (0, 1]: ``semi_10`` for 0.1."""
    return f"semi_{100 * fraction:.12g}"  # twelve digits, so that 0.07 gives semi_7 despite rounding errors


def cell_columns(label_fractions: Sequence[float]) -> list[str]:
    """Return the columns of results.csv: `COLUMNS`, with an accuracy per label fraction after the linear probe's."""
    place = COLUMNS.index("linear_accuracy") + 1
    return [*COLUMNS[:place], *(f"{semi_column(f)}_accuracy" for f in label_fractions), *COLUMNS[place:]]


TRAINING_COLUMNS = [*SYSTEM_KEYS, "step", "epoch", "loss", "validation_knn"]
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
LINKAGE_COLUMNS = [*SYSTEM_KEYS, "victims", "image", "group", *LINKAGE_RATES, "candidates", "score"]
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


@dataclass(kw_only=True)
class RunRecord:
    """A finished run in memory. Tables are listed with their columns.

    cells: one row per cell, :func:`cell_columns`. `flags` names the reliability flags about the cell, joined by
        semicolons. `guarantee` is the defense's guarantee against any attacker that saw as many messages as this one,
        as text, empty if there is none; `mse_bound` is the lower bound of the mean MSE that follows from it. The
        columns `LINKAGE` are about the system, as accuracies are: all attacks on it have the same.
    per_image: one row per cell and victim: `CELL_KEYS`, image, group, metrics, mse_floor, mse_bound. The mean of the
        latter over images is the cell's bound; NaN without a guarantee.
    probe: one row per system and probe test image: `SYSTEM_KEYS`, image, group, and whether the image was classified
        correctly: knn, linear, one :func:`semi_column` per label fraction, knn_raw_pixels, linear_untrained (booleans;
        NaN if there are no labels).
    training: one row per validation: `SYSTEM_KEYS`, step, epoch, loss, validation_knn, and client_signature (nats)
        where clients can differ. Empty where nothing was trained.
    leakage: attacks on the model during training, `LEAKAGE_COLUMNS`; empty without a leakage curve.
    detections: one row per training of a system whose defense is a detector, `DETECTION_COLUMNS`. `hijacked_by` is the
        attack that chose the gradients, empty if there was none; `failure` is why that attack stopped, if it did.
    linkage: one row per system, set of victims and victim, `LINKAGE_COLUMNS`: whether its message was matched with its
        own candidate (1 or 0; NaN where that was not measured). Empty where linkage was not measured, and for runs of
        before it was.
    images: the victims (:func:`victims_key`), and the reconstructions of each cell that did not fail
        (:func:`image_key`); uint8 (n, 3, h, w).
    info: everything else, as JSON; the content of run.json. config_yaml: the complete configuration.
    models: arrays by name, for each file name.
    """

    cells: pd.DataFrame
    per_image: pd.DataFrame
    probe: pd.DataFrame
    images: dict[str, np.ndarray]
    info: dict[str, Any]
    config_yaml: str
    models: Mapping[str, dict[str, np.ndarray]] = field(default_factory=dict)
    training: pd.DataFrame = field(default_factory=lambda: pd.DataFrame(columns=TRAINING_COLUMNS))
    leakage: pd.DataFrame = field(default_factory=lambda: pd.DataFrame(columns=LEAKAGE_COLUMNS))
    detections: pd.DataFrame = field(default_factory=lambda: pd.DataFrame(columns=DETECTION_COLUMNS))
    linkage: pd.DataFrame = field(default_factory=lambda: pd.DataFrame(columns=LINKAGE_COLUMNS))


def image_key(cell: dict[str, Any]) -> str:
    """Return the name under which a cell's reconstructions are stored."""
    return "/".join(f"{key}={cell[key]}" for key in CELL_KEYS)


def victims_key(name: str) -> str:
    """Return the name under which the original images of a set of victims are stored."""
    return f"victims={name}"


@dataclass(frozen=True)
class StoredRun:
    """A run that was read from disk. labels: its value on each axis of its sweep; empty if there are no axes."""

    labels: dict[str, str]
    record: RunRecord


def variant_name(labels: dict[str, str]) -> str:
    """Return the name of a variant of a sweep and of its run directory; see :func:`short_name` for long names."""
    return short_name("_".join(f"{axis}={label}" for axis, label in labels.items()))


def short_name(name: str, most: int = LONGEST_NAME) -> str:
    """Return `name` if it has at most `most` bytes, else its beginning followed by a digest of the whole name."""
    if len(name.encode()) <= most:
        return name
    digest = hashlib.sha256(name.encode()).hexdigest()[:12]
    return name.encode()[: most - len(digest) - 1].decode(errors="ignore") + "-" + digest
