"""Export of finished runs to TensorBoard and MLflow, to view them beside other experiments.

Reports read only the run directory, never these copies. Optional: ``pip install mocosfl-priv[tensorboard]`` or
``[mlflow]``.
"""

from __future__ import annotations

import math
import os
import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import pandas as pd
from PIL import Image

from mocosfl_priv.errors import ConfigurationError, RunFailedError
from mocosfl_priv.results.record import CELL_KEYS, SYSTEM_KEYS, RunRecord

if TYPE_CHECKING:
    from mlflow import MlflowClient

MLFLOW_RETRIES = "1"  # of a request; by default, MLflow retries for minutes if a server does not answer
MLFLOW_BATCH = 100  # most values that a server accepts in one request


class Mirror(Protocol):
    """An experiment tracker to which a run can be exported."""

    def show(self, record: RunRecord, folder: Path) -> None:
        """Export `record`, which was read from `folder`; raises RunFailedError if it cannot be written."""


@dataclass(frozen=True)
class Curve:
    """The course of training of one system.

    keys: values of `SYSTEM_KEYS`. points: one row per validation, with the columns step, loss and validation_knn; no
    rows for a system that was not trained in this run.
    """

    keys: dict[str, Any]
    points: pd.DataFrame

    def values(self) -> Iterator[tuple[str, int, float]]:
        """Yield name, step and value of every finite number."""
        for _, point in self.points.iterrows():
            for name in ("loss", "validation_knn"):
                if math.isfinite(point[name]):
                    yield name, int(point["step"]), float(point[name])


@dataclass(frozen=True)
class Outcome:
    """A row of results.csv.

    keys: values of `CELL_KEYS`, without missing ones. metrics: its finite numbers, by column.
    """

    keys: dict[str, Any]
    metrics: dict[str, float]

    @property
    def system(self) -> dict[str, Any]:
        """The keys of the system that the row is about."""
        return {key: value for key, value in self.keys.items() if key in SYSTEM_KEYS}


def outcomes(record: RunRecord) -> list[Outcome]:
    """Return all rows of `record`, in the same order."""
    numbers = [c for c in record.cells.select_dtypes(["number", "bool"]) if c not in CELL_KEYS]
    return [
        Outcome(
            _present({key: row[key] for key in CELL_KEYS}),
            {str(name): float(row[name]) for name in numbers if math.isfinite(row[name])},
        )
        for row in record.cells.to_dict("records")
    ]


def curves(record: RunRecord) -> list[Curve]:
    """Return the courses of training of all systems of `record`, in the same order."""
    systems = record.cells[SYSTEM_KEYS].drop_duplicates().to_dict("records")
    return [Curve(_present(keys), record.training[_rows_of(record.training, keys)]) for keys in systems]


def _rows_of(table: pd.DataFrame, keys: Mapping[Any, Any]) -> pd.Series:
    return (table[SYSTEM_KEYS] == pd.Series(keys)).all(axis=1)


def _present(keys: Mapping[Any, Any]) -> dict[str, Any]:
    """Drop keys whose value is NaN; for example, a published client has no target fraction."""
    return {str(key): value for key, value in keys.items() if not pd.isna(value)}


def name_of(keys: Mapping[str, Any]) -> str:
    """Return a name that can serve as a folder name, for example ``none_cut_layer1_target_fraction0_seed0``."""
    parts = [value if isinstance(value, str) else f"{key}{value:g}" for key, value in keys.items()]
    return "".join(c if c.isalnum() or c in "-_." else "_" for c in "_".join(parts))


class TensorBoard:
    """Export to TensorBoard event files in a new folder below `logs`, named after the run.

    The folder holds the report's figures and a folder per system with the scalars of its training. Within the latter,
    there is a folder per cell, with the row of results.csv as hyperparameters and metrics. Raises ConfigurationError if
    TensorBoard is not installed, or if the run's folder exists.
    """

    def __init__(self, logs: Path) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter  # takes seconds to import
        except ImportError as missing:
            raise ConfigurationError("--tensorboard needs TensorBoard: install mocosfl-priv[tensorboard]") from missing
        self._open = SummaryWriter
        self._logs = logs

    def show(self, record: RunRecord, folder: Path) -> None:
        """See :class:`Mirror`."""
        place = self._logs / folder.resolve().name
        if place.exists():
            raise ConfigurationError(
                f"{place} exists, and TensorBoard would show both runs in it; remove it or choose another folder"
            )
        try:
            place.mkdir(parents=True)
            self._write(record, folder, place)
        except OSError as error:
            raise RunFailedError(f"{place} could not be written: {error.strerror or error}") from error

    def _write(self, record: RunRecord, folder: Path, place: Path) -> None:
        for curve in curves(record):
            with self._open(str(place / name_of(curve.keys))) as writer:
                for name, step, value in curve.values():
                    writer.add_scalar(name, value, step)
        for outcome in outcomes(record):
            with self._open(str(place / name_of(outcome.system) / name_of(_rest(outcome)))) as writer:
                writer.add_hparams(outcome.keys, outcome.metrics, run_name=".")
        with self._open(str(place)) as writer:
            for path in figures(folder):
                with Image.open(path) as image:
                    pixels = np.asarray(image.convert("RGB"))
                writer.add_image(f"figures/{path.stem}", pixels, dataformats="HWC")


class MLflow:
    """Export to the MLflow tracking server `uri`, as a run in the experiment named in the configuration.

    The run's parameters are the configuration, and its artefacts are report and figures. Nested in it is a run per
    system, with the curves of its training, and nested in that is a run per attack, with the row of results.csv. Raises
    ConfigurationError if MLflow is not installed or does not accept `uri`.
    """

    def __init__(self, uri: str) -> None:
        # MLflow reads these when it is imported: send no telemetry, and fail soon if the server does not answer.
        os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", MLFLOW_RETRIES)
        try:
            from mlflow import MlflowClient  # takes seconds to import
            from mlflow.exceptions import MlflowException
        except ImportError as missing:
            raise ConfigurationError("--mlflow needs MLflow: install mocosfl-priv[mlflow]") from missing
        self._failures = (MlflowException, OSError)
        self._uri = uri
        try:
            self._client = MlflowClient(uri)
        except MlflowException as error:
            raise ConfigurationError(f"--mlflow {uri}: {error}") from error

    def show(self, record: RunRecord, folder: Path) -> None:
        """See :class:`Mirror`. After a failure, the runs written so far remain on the server, marked as failed."""
        config = record.info["config"]
        started: list[str] = []
        try:
            found = self._client.get_experiment_by_name(config["name"])
            experiment = found.experiment_id if found else self._client.create_experiment(config["name"])
            run = _Run.start(self._client, experiment, folder.resolve().name, started)
            run.parameters(flattened(config))
            for path in [folder / "report.html", *figures(folder)]:
                if path.is_file():
                    self._client.log_artifact(run.id, str(path))
            self._write_cells(record, run)
            for identity in reversed(started):
                self._client.set_terminated(identity)
        except self._failures as error:
            self._give_up(started)
            raise RunFailedError(f"MLflow at {self._uri}: {error}") from error

    def _write_cells(self, record: RunRecord, run: _Run) -> None:
        systems: dict[str, _Run] = {}
        for curve in curves(record):
            systems[name_of(curve.keys)] = system = run.inner(name_of(curve.keys))
            system.parameters(curve.keys)
            system.metrics(curve.values())
        for outcome in outcomes(record):
            cell = systems[name_of(outcome.system)].inner(name_of(_rest(outcome)))
            cell.parameters(outcome.keys)
            cell.metrics((name, 0, value) for name, value in outcome.metrics.items())

    def _give_up(self, started: list[str]) -> None:
        try:
            for identity in reversed(started):
                self._client.set_terminated(identity, "FAILED")
        except self._failures:  # the server is not reachable
            return


@dataclass(frozen=True)
class _Run:
    """A run in MLflow. started: the identities of all runs started so far, extended here."""

    client: MlflowClient
    experiment: str
    id: str
    started: list[str]

    @classmethod
    def start(
        cls, client: MlflowClient, experiment: str, name: str, started: list[str], parent: str | None = None
    ) -> _Run:
        """Start a run, nested in the run `parent` if that is given."""
        tags = {} if parent is None else {"mlflow.parentRunId": parent}
        identity = client.create_run(experiment, run_name=name, tags=tags).info.run_id
        started.append(identity)
        return cls(client, experiment, identity, started)

    def inner(self, name: str) -> _Run:
        """Start a run nested in this one."""
        return self.start(self.client, self.experiment, name, self.started, self.id)

    def parameters(self, values: Mapping[str, Any]) -> None:
        """Log parameters, as text."""
        from mlflow.entities import Param

        every = [Param(key, str(value)) for key, value in values.items()]
        for first in range(0, len(every), MLFLOW_BATCH):
            self.client.log_batch(self.id, params=every[first : first + MLFLOW_BATCH])

    def metrics(self, values: Iterable[tuple[str, int, float]]) -> None:
        """Log metrics, given as name, step and value."""
        from mlflow.entities import Metric

        now = round(1000 * time.time())
        every = [Metric(name, value, now, step) for name, step, value in values]
        for first in range(0, len(every), MLFLOW_BATCH):
            self.client.log_batch(self.id, metrics=every[first : first + MLFLOW_BATCH])


def _rest(outcome: Outcome) -> dict[str, Any]:
    """The keys that distinguish a cell from others of the same system."""
    return {key: value for key, value in outcome.keys.items() if key not in SYSTEM_KEYS}


def flattened(document: Mapping[str, Any], above: str = "") -> dict[str, Any]:
    """Return the values of a configuration by dotted path; lists are kept as values."""
    flat: dict[str, Any] = {}
    for key, value in document.items():
        flat |= flattened(value, f"{above}{key}.") if isinstance(value, Mapping) else {f"{above}{key}": value}
    return flat


def figures(folder: Path) -> list[Path]:
    """Return the PNG figures in a run directory; empty if no report was written."""
    return sorted((folder / "figures").glob("*.png"))
