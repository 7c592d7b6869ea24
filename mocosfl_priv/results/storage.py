"""Storage of results on disk. Reports read nothing else.

A run directory holds
    results.csv           one row per (defense, attack, cut_layer, target_fraction, seed, victims)
    per_image.parquet     the metrics of every victim, same keys
    probe.parquet         whether probes classified each probe test image correctly, per trained system
    training.csv          loss and validation score over training
    leakage.csv           results of attacks on the model during training; empty without the setting `leakage`
    linkage.parquet       whether each victim's message was matched with its image; earlier versions wrote none
    detections.csv        findings of detectors about their server, per trained system; empty without a detector
    run.json              configuration, data-role hashes, versions, seeds, floors, plugin code hashes
    config.yaml           the configuration with every default written out; can be run again
    images.safetensors    victims and reconstructions, uint8
    models/               client, trunk and projector of every trained system, safetensors
It is written under a temporary name and then renamed, so that it is always complete.

The folder of a sweep holds a run directory for every variant in ``runs/``, and a ``results.csv`` with the rows of all
variants and a column for every axis.
"""

from __future__ import annotations

import json
import shutil
import uuid
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

import pandas as pd
from safetensors.numpy import load_file, save_file

from mocosfl_priv.errors import ConfigurationError, RunFailedError
from mocosfl_priv.results.record import (
    CELL_KEYS,
    LINKAGE_COLUMNS,
    SCHEMA_VERSION,
    RunRecord,
    StoredRun,
    variant_name,
)
from mocosfl_priv.runtime.files import Lock, flush

SPARE_BYTES = 64 * 2**20  # free space that is required in addition to what a run will write
RECORD_FILES = (
    "run.json",
    "results.csv",
    "per_image.parquet",
    "probe.parquet",
    "training.csv",
    "leakage.csv",
    "detections.csv",
    "config.yaml",
    "images.safetensors",
)


LINKAGE_FILE = "linkage.parquet"  # not among them: earlier versions wrote none


def write_record(record: RunRecord, folder: Path) -> None:
    """Write all files of `record` into the existing `folder`."""
    record.cells.to_csv(folder / "results.csv", index=False)
    record.per_image.to_parquet(folder / "per_image.parquet", index=False)
    record.probe.to_parquet(folder / "probe.parquet", index=False)
    record.training.to_csv(folder / "training.csv", index=False)
    record.leakage.to_csv(folder / "leakage.csv", index=False)
    record.detections.to_csv(folder / "detections.csv", index=False)
    record.linkage.to_parquet(folder / LINKAGE_FILE, index=False)
    (folder / "run.json").write_text(json.dumps(record.info, indent=2) + "\n", encoding="utf-8")
    (folder / "config.yaml").write_text(record.config_yaml, encoding="utf-8")
    save_file(record.images, folder / "images.safetensors")
    (folder / "models").mkdir()
    for name, arrays in record.models.items():
        save_file(arrays, folder / "models" / name)


def read_record(folder: Path) -> RunRecord:
    """Read a run directory, without its models.

    Raises ConfigurationError if `folder` is not a run directory, is damaged, or has another schema version.
    """
    for name in RECORD_FILES:
        if not (folder / name).is_file():
            raise ConfigurationError(f"{folder} is not a run directory: {name} is missing")
    try:
        info = json.loads((folder / "run.json").read_text(encoding="utf-8"))
        if info.get("schema_version") != SCHEMA_VERSION:
            found = info.get("schema_version")
            raise ConfigurationError(
                f"{folder}: written with result schema {found}, but this version reads schema {SCHEMA_VERSION}"
            )
        return RunRecord(
            cells=read_table(folder / "results.csv"),
            per_image=pd.read_parquet(folder / "per_image.parquet"),
            probe=pd.read_parquet(folder / "probe.parquet"),
            training=read_table(folder / "training.csv"),
            leakage=read_table(folder / "leakage.csv"),
            detections=read_table(folder / "detections.csv"),
            linkage=_read_linkage(folder / LINKAGE_FILE),
            images=load_file(folder / "images.safetensors"),
            info=info,
            config_yaml=(folder / "config.yaml").read_text(encoding="utf-8"),
        )
    except ConfigurationError:
        raise
    except Exception as error:  # each reader raises errors of its own for a damaged file
        raise ConfigurationError(f"{folder} cannot be read: {type(error).__name__}: {error}") from error


def _read_linkage(path: Path) -> pd.DataFrame:
    return pd.read_parquet(path) if path.is_file() else pd.DataFrame(columns=LINKAGE_COLUMNS)


def read_runs(folder: Path) -> list[StoredRun]:
    """Read a run directory, or all variants in the folder of a sweep, in the order of its results.csv.

    Raises ConfigurationError as :func:`read_record` does.
    """
    return [StoredRun(labels, read_record(place)) for place, labels in run_folders(folder)]


def run_folders(folder: Path) -> list[tuple[Path, dict[str, str]]]:
    """The run directories of a run or of all variants of a sweep, each with its label on every axis.

    Raises ConfigurationError for a sweep without axes that does not hold exactly one run.
    """
    if not _is_sweep(folder):
        return [(folder, {})]
    columns = pd.read_csv(folder / "results.csv", nrows=0).columns.tolist()
    axes = columns[: columns.index(CELL_KEYS[0])] if CELL_KEYS[0] in columns else []
    if not axes:  # a sweep of one experiment
        found = sorted(path.parent for path in (folder / "runs").glob("*/run.json"))
        if len(found) != 1:
            raise ConfigurationError(
                f"{folder} is a sweep without axes, and holds {len(found)} runs: give the path of one of them"
            )
        return [(found[0], {})]
    points = pd.read_csv(folder / "results.csv", usecols=axes, dtype=str, keep_default_na=False)[axes].drop_duplicates()
    variants: list[dict[str, str]] = [dict(zip(axes, point, strict=True)) for point in points.to_numpy()]
    return [(folder / "runs" / variant_name(labels), labels) for labels in variants]


def _is_sweep(folder: Path) -> bool:
    return not (folder / "run.json").exists() and (folder / "results.csv").is_file() and (folder / "runs").is_dir()


def read_table(path: Path) -> pd.DataFrame:
    """Read a table of numbers and texts from CSV.

    An empty field is NaN, except in the text columns (failure, flags, guarantee, hijacked_by, linkage_score), where it
    is "".
    """
    texts = ("failure", "flags", "guarantee", "hijacked_by", "linkage_score")
    table = pd.read_csv(path, keep_default_na=False, na_values=[""], dtype=dict.fromkeys(texts, str))
    return table.fillna({name: "" for name in texts if name in table})


def require_room(folder: Path, needed: int, what: str) -> None:
    """Raise ConfigurationError unless the disk of `folder` has `needed` plus `SPARE_BYTES` bytes left.

    what: the beginning of the message.
    """
    left = shutil.disk_usage(folder).free
    if left < needed + SPARE_BYTES:
        wanted = (needed + SPARE_BYTES) / 2**20
        raise ConfigurationError(f"{what}: the disk has {left / 2**20:.0f} MB left, and {wanted:.0f} MB may be needed")


def require_no_tilde(folder: Path, what: str) -> None:
    """Raise ConfigurationError where a shell left ``~`` as it is, as in ``--out=~/runs``: nobody means that name."""
    if folder.parts[:1] == ("~",):
        raise ConfigurationError(f"{what} {folder}: the shell has left ~ as it is; write out the whole path")


class Destination:
    """A run directory to be written, as a context manager.

    Files are written to a staging folder beside it, which :meth:`commit` moves into place; without a commit it is
    removed. Entering the context checks, before hours of computation, that the folder can be written to and has room,
    and locks it, so that a second run into the same folder is refused. Raises ConfigurationError if a check fails.

    overwrite: whether an existing run directory may be replaced.
    """

    def __init__(self, folder: Path, overwrite: bool = False) -> None:
        self.shown = Path(folder)
        require_no_tilde(self.shown, "--out")
        self.folder = self.shown.resolve()
        self._overwrite = overwrite
        try:
            self._check()
        except OSError as error:  # for example an invalid name, or a folder without read permission
            raise ConfigurationError(f"--out {self.folder} cannot be written: {error.strerror}") from error
        unique = uuid.uuid4().hex[:8]
        self._staging = self.folder.parent / f".{self.folder.name}.partial-{unique}"
        self._retired = self.folder.parent / f".{self.folder.name}.replaced-{unique}"
        self._held = ExitStack()

    def _check(self) -> None:
        overwrite = self._overwrite
        if self.folder.exists() and not self.folder.is_dir():
            raise ConfigurationError(f"--out {self.folder} is a file")
        if not overwrite and self.folder.exists() and any(self.folder.iterdir()):
            raise ConfigurationError(f"--out {self.folder} is not empty; choose another folder or add --overwrite")
        if overwrite and self.folder.exists() and any(self.folder.iterdir()) and not self._is_run():
            raise ConfigurationError(f"--out {self.folder} holds files that are not a run's; it is not overwritten")

    def _is_run(self) -> bool:
        return (self.folder / "run.json").is_file() or (
            _is_sweep(self.folder) and any((self.folder / "runs").glob("*/run.json"))
        )

    def __enter__(self) -> Destination:
        try:
            self._held.enter_context(Lock(self.folder.parent / f".{self.folder.name}.lock"))
        except BlockingIOError as error:
            raise ConfigurationError(
                f"--out {self.folder}: another run is at work for this folder ({error.strerror}); wait for it, or "
                "choose another folder"
            ) from error
        except OSError as error:
            raise ConfigurationError(f"--out {self.folder} cannot be written: {error.strerror}") from error
        try:
            require_room(self.folder.parent, 0, f"--out {self.folder}")
            self._open()
        except BaseException:
            self._held.close()
            raise
        return self

    def require_apart(self, folder: Path, what: str) -> None:
        """Raise ConfigurationError where `folder`, which is `what`, is this place or lies in it: it would be filled."""
        require_no_tilde(folder, what)
        place = folder.resolve()
        if place == self.folder or self.folder in place.parents:
            raise ConfigurationError(
                f"{what} {folder} lies in --out {self.shown}, where results are to stand alone: choose another folder"
            )

    def require_room(self, needed: int) -> None:
        """Raise ConfigurationError unless the disk has room for `needed` bytes of results, and `SPARE_BYTES` more."""
        require_room(self.folder.parent, needed, f"--out {self.folder}")

    def _open(self) -> None:
        try:
            self._staging.mkdir(parents=True)
        except OSError as error:
            raise ConfigurationError(f"--out {self.folder} cannot be written: {error.strerror}") from error
        if self.folder.exists():
            try:  # find out before training whether the folder can be replaced; a mount point cannot
                self.folder.rename(self._retired)
                self._retired.rename(self.folder)
            except OSError as error:
                shutil.rmtree(self._staging, ignore_errors=True)
                raise ConfigurationError(
                    f"--out {self.folder} cannot be replaced ({error.strerror}); choose a new folder below it"
                ) from error

    def __exit__(self, *_: object) -> None:
        shutil.rmtree(self._staging, ignore_errors=True)
        self._held.close()

    def commit(self, write: Callable[[Path], object]) -> Path:
        """Let `write` fill the staging folder, then move it into place; raises RunFailedError if that fails.

        Returns the run directory, as it was given.
        """
        try:
            write(self._staging)
            self._flush()
            self._replace()
        except RunFailedError:
            raise
        except Exception as error:  # libraries that write files raise errors of their own, for example on a full disk
            reason = getattr(error, "strerror", None) or error
            raise RunFailedError(
                f"results could not be written to {self.folder}: {reason}; no results were kept"
            ) from error
        return self.shown

    def _flush(self) -> None:
        """Wait until all files are on the disk, before they are renamed; delayed write errors are raised here."""
        for path in self._staging.rglob("*"):
            if path.is_file():
                flush(path)

    def _replace(self) -> None:
        if not self._overwrite and self.folder.is_dir() and any(self.folder.iterdir()):
            kept = self.folder.with_name(f"{self.folder.name}-{uuid.uuid4().hex[:8]}")
            self._staging.rename(kept)
            raise RunFailedError(
                f"--out {self.folder} was written to by another process; the results of this run are in {kept}"
            )
        if self.folder.exists():
            self.folder.rename(self._retired)
        try:
            self._staging.rename(self.folder)
        except BaseException:  # after any failure or interruption, give the old run its name back
            if self._retired.exists() and not self.folder.exists():
                self._retired.rename(self.folder)
            raise
        shutil.rmtree(self._retired, ignore_errors=True)


def replace_files(folder: Path, write: Callable[[Path], object]) -> None:
    """Let `write` fill a temporary folder, then move its files into `folder` one by one.

    Raises RunFailedError if writing fails; `folder` is then unchanged.
    """
    staging = folder.parent / f".{folder.resolve().name}.partial-{uuid.uuid4().hex[:8]}"
    try:
        staging.mkdir()
        write(staging)
        for path in sorted(staging.rglob("*")):
            if path.is_file():
                place = folder / path.relative_to(staging)
                place.parent.mkdir(exist_ok=True)
                path.replace(place)
    except OSError as error:
        raise RunFailedError(f"the report could not be written to {folder}: {error.strerror or error}") from error
    finally:
        shutil.rmtree(staging, ignore_errors=True)
