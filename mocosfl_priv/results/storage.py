"""What a run leaves behind, and how it is stored: the one thing that reports read.

A run directory holds
    results.csv           one row per (defense, attack, cut_layer, target_fraction, seed, victims)
    per_image.parquet     the metrics of every victim, same keys
    probe.parquet         correctness of every probe test image, per trained system
    training.csv          loss and validation score over training
    leakage.csv           what the curve's attacks got from the model while it trained; empty without a curve
    detections.csv        what detectors found out about their server, per trained system; empty without a detector
    run.json              configuration, data-role hashes, versions, seeds, floors, plugin code hashes
    config.yaml           the configuration with every default written out; runs again as it is
    images.safetensors    victims and reconstructions, uint8
    checkpoints/          client, trunk and projector of every trained system, safetensors
It appears as a whole or not at all.

The folder of a sweep holds a run directory for every variant in ``runs/``, and ``results.csv`` with the rows of all and
a column for every axis.
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
from mocosfl_priv.results.record import CELL_KEYS, SCHEMA_VERSION, RunRecord, StoredRun, variant_name
from mocosfl_priv.runtime.files import Lock, flush

SPARE_BYTES = 64 * 2**20  # that a disk must have left beyond what a run is known to write
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


def write_record(record: RunRecord, folder: Path) -> None:
    """Write all files of `record` into the existing `folder`."""
    record.cells.to_csv(folder / "results.csv", index=False)
    record.per_image.to_parquet(folder / "per_image.parquet", index=False)
    record.probe.to_parquet(folder / "probe.parquet", index=False)
    record.training.to_csv(folder / "training.csv", index=False)
    record.leakage.to_csv(folder / "leakage.csv", index=False)
    record.detections.to_csv(folder / "detections.csv", index=False)
    (folder / "run.json").write_text(json.dumps(record.info, indent=2) + "\n", encoding="utf-8")
    (folder / "config.yaml").write_text(record.config_yaml, encoding="utf-8")
    save_file(record.images, folder / "images.safetensors")
    (folder / "checkpoints").mkdir()
    for name, arrays in record.checkpoints.items():
        save_file(arrays, folder / "checkpoints" / name)


def read_record(folder: Path) -> RunRecord:
    """Read a run directory, without its checkpoints; ConfigurationError if it is none or of another version."""
    for name in RECORD_FILES:
        if not (folder / name).is_file():
            raise ConfigurationError(f"{folder} is not a run directory: {name} is missing")
    try:
        info = json.loads((folder / "run.json").read_text(encoding="utf-8"))
        if info.get("schema_version") != SCHEMA_VERSION:
            found = info.get("schema_version")
            raise ConfigurationError(
                f"{folder}: written with result schema {found}, this version reads {SCHEMA_VERSION}"
            )
        return RunRecord(
            cells=read_table(folder / "results.csv"),
            per_image=pd.read_parquet(folder / "per_image.parquet"),
            probe=pd.read_parquet(folder / "probe.parquet"),
            training=read_table(folder / "training.csv"),
            leakage=read_table(folder / "leakage.csv"),
            detections=read_table(folder / "detections.csv"),
            images=load_file(folder / "images.safetensors"),
            info=info,
            config_yaml=(folder / "config.yaml").read_text(encoding="utf-8"),
        )
    except ConfigurationError:
        raise
    except Exception as error:  # damaged files fail in as many ways as there are readers
        raise ConfigurationError(f"{folder} cannot be read: {type(error).__name__}: {error}") from error


def read_runs(folder: Path) -> list[StoredRun]:
    """Read a run directory, or all variants of a sweep's folder, in the order of its table; ConfigurationError."""
    if not _is_sweep(folder):
        return [StoredRun({}, read_record(folder))]
    columns = pd.read_csv(folder / "results.csv", nrows=0).columns.tolist()
    axes = columns[: columns.index(CELL_KEYS[0])] if CELL_KEYS[0] in columns else []
    if not axes:  # a sweep of one experiment
        found = sorted(path.parent for path in (folder / "runs").glob("*/run.json"))
        if len(found) != 1:
            raise ConfigurationError(f"{folder} is a sweep without axes, and holds {len(found)} runs: name one of them")
        return [StoredRun({}, read_record(found[0]))]
    points = pd.read_csv(folder / "results.csv", usecols=axes, dtype=str, keep_default_na=False)[axes].drop_duplicates()
    variants: list[dict[str, str]] = [dict(zip(axes, point, strict=True)) for point in points.to_numpy()]
    return [StoredRun(labels, read_record(folder / "runs" / variant_name(labels))) for labels in variants]


def _is_sweep(folder: Path) -> bool:
    return not (folder / "run.json").exists() and (folder / "results.csv").is_file() and (folder / "runs").is_dir()


def read_table(path: Path) -> pd.DataFrame:
    """A table as it was written: an empty field is a missing number, but no cause of failure, no flag, no
    promise, no hijacker.
    """
    texts = ("failure", "flags", "guarantee", "hijacked_by")
    table = pd.read_csv(path, keep_default_na=False, na_values=[""], dtype=dict.fromkeys(texts, str))
    return table.fillna({name: "" for name in texts if name in table})


def require_room(folder: Path, needed: int, what: str) -> None:
    """Raise ConfigurationError that begins with `what` where the disk of `folder` has not `needed` bytes, and more."""
    left = shutil.disk_usage(folder).free
    if left < needed + SPARE_BYTES:
        wanted = (needed + SPARE_BYTES) / 2**20
        raise ConfigurationError(f"{what}: the disk has {left / 2**20:.0f} MB left, and {wanted:.0f} MB may be needed")


def require_no_tilde(folder: Path, what: str) -> None:
    """Raise ConfigurationError where a shell left ``~`` as it is, as in ``--out=~/runs``: nobody means that name."""
    if folder.parts[:1] == ("~",):
        raise ConfigurationError(f"{what} {folder}: the shell has left ~ as it is; write out the whole path")


class Destination:
    """A run directory to be: files are staged beside it and moved into place as a whole.

    Opening it checks that the place can be written to and has room, before hours of computation, and holds it until
    the end: a second run into the same folder is refused. Use as a context manager; a staging folder that was not
    committed is removed.
    """

    def __init__(self, folder: Path, overwrite: bool = False) -> None:
        self.shown = Path(folder)
        require_no_tilde(self.shown, "--out")
        self.folder = self.shown.resolve()
        self._overwrite = overwrite
        try:
            self._check()
        except OSError as error:  # a name that no file system takes, a folder that may not be looked into
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
            raise ConfigurationError(f"--out {self.folder} holds other files than a run; it is not overwritten")

    def _is_run(self) -> bool:
        return (self.folder / "run.json").is_file()

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
        """Raise ConfigurationError where the disk has no room for `needed` bytes of results, and some to spare."""
        require_room(self.folder.parent, needed, f"--out {self.folder}")

    def _open(self) -> None:
        try:
            self._staging.mkdir(parents=True)
        except OSError as error:
            raise ConfigurationError(f"--out {self.folder} cannot be written: {error.strerror}") from error
        if self.folder.exists():
            try:  # a mount point cannot be replaced; better to know now than after training
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
        """Let `write` fill the staging folder, then put it in place. RunFailedError if that cannot be done."""
        try:
            write(self._staging)
            self._flush()
            self._replace()
        except RunFailedError:
            raise
        except Exception as error:  # a full disk is an OSError to Python, but an error of their own to the writers
            reason = getattr(error, "strerror", None) or error
            raise RunFailedError(
                f"results could not be written to {self.folder}: {reason}; nothing was kept"
            ) from error
        return self.shown

    def _flush(self) -> None:
        """Have the files on the disk before they get their name; a delayed write error surfaces here."""
        for path in self._staging.rglob("*"):
            if path.is_file():
                flush(path)

    def _replace(self) -> None:
        if not self._overwrite and self.folder.is_dir() and any(self.folder.iterdir()):
            kept = self.folder.with_name(f"{self.folder.name}-{uuid.uuid4().hex[:8]}")
            self._staging.rename(kept)
            raise RunFailedError(
                f"--out {self.folder} was filled by somebody else meanwhile; results are kept in {kept}"
            )
        if self.folder.exists():
            self.folder.rename(self._retired)
        try:
            self._staging.rename(self.folder)
        except BaseException:  # an interruption, too, must not leave the old run under a hidden name
            if self._retired.exists() and not self.folder.exists():
                self._retired.rename(self.folder)
            raise
        shutil.rmtree(self._retired, ignore_errors=True)


def replace_files(folder: Path, write: Callable[[Path], object]) -> None:
    """Let `write` fill a folder beside `folder`, then move what it wrote into `folder`, file by file.

    Raises RunFailedError when it cannot be written; `folder` then holds what it held.
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
