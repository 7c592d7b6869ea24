"""Artefacts by the address of what determines them: complete or absent, and checked whenever they are read.

An artefact is a folder ``<kind>/<address>`` of files with an ``artefact.json`` that holds the checksum of each. It is
written beside its place, flushed, and renamed, so a process that dies at any moment leaves no half of one. What is
found damaged is removed, so that it is computed again.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import platform
import shutil
import uuid
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pyarrow.lib import ArrowException
from safetensors import SafetensorError

from mocosfl_priv.errors import ConfigurationError, RunFailedError, StorageError
from mocosfl_priv.runtime.files import checksum, flush
from mocosfl_priv.runtime.imports import one_line

FORMAT = 2  # 1 had no experts, and attacks together with their scores
MANIFEST, JOURNAL = "artefact.json", "journal.jsonl"
Write = Callable[[Path], None]


def address(determined_by: Mapping[str, Any]) -> str:
    """SHA-256 of a JSON document: equal exactly when everything that determines an artefact is equal."""
    text = json.dumps(determined_by, sort_keys=True, separators=(",", ":"), default=str)
    return hashlib.sha256(text.encode()).hexdigest()


@dataclass(frozen=True)
class Artefact:
    """A complete artefact: where its files lie, and what was noted of it."""

    folder: Path
    facts: dict[str, Any]


class Store:
    """The artefacts below `folder`. Several processes may use one store at once.

    Opening an existing one raises ConfigurationError if it was written in another format. make: whether it may be
    made here; who computes for others must find theirs.
    """

    def __init__(self, folder: Path, make: bool = True) -> None:
        self.folder = folder
        mark = folder / "store.json"
        try:
            if not mark.is_file():
                if not make:
                    raise StorageError(
                        f"there is no store {folder} on {platform.node()}; all machines must see the same"
                    )
                if folder.is_dir() and any(p.name != mark.name and not _is_staged(p) for p in folder.iterdir()):
                    raise ConfigurationError(f"{folder} holds other files than a store; choose another folder")
                folder.mkdir(parents=True, exist_ok=True)
                _write_whole(mark, json.dumps({"format": FORMAT}))
            found = json.loads(mark.read_text(encoding="utf-8"))["format"]
        except OSError as error:
            raise ConfigurationError(f"store {folder} cannot be used: {error.strerror}") from error
        except (ValueError, KeyError, TypeError) as error:
            raise ConfigurationError(f"{mark} is damaged; remove {folder} to begin afresh") from error
        if found != FORMAT:
            raise ConfigurationError(
                f"store {folder} is of format {found}, this version reads {FORMAT}: its artefacts were determined "
                "otherwise and cannot be used; give --out another folder, and keep this one for its results"
            )

    def has(self, kind: str, key: str) -> bool:
        """Whether the artefact is there, by its name alone: it may still turn out to be damaged."""
        return (self._place(kind, key) / MANIFEST).is_file()

    def get(self, kind: str, key: str) -> Artefact | None:
        """The artefact, checked; None if it is absent, or was damaged and is now removed.

        Raises StorageError when the disk does not let itself be read: that is no damage.
        """
        place = self._place(kind, key)
        if not place.is_dir():
            return None
        try:
            manifest = json.loads((place / MANIFEST).read_text(encoding="utf-8"))
            intact = manifest["address"] == key and all(
                checksum(place / name) == expected for name, expected in manifest["files"].items()
            )
            facts = manifest["facts"]
        except (FileNotFoundError, NotADirectoryError, ValueError, KeyError, TypeError, AttributeError):
            intact, facts = False, {}
        except OSError as error:
            raise StorageError(f"{place} cannot be read: {error.strerror}") from error
        if intact:
            return Artefact(place, facts)
        self.discard(kind, key)
        return None

    def put(
        self, kind: str, key: str, write: Write, facts: Mapping[str, Any], determined_by: Mapping[str, Any]
    ) -> None:
        """Let `write` fill a folder and give it its name. What is there already stays: it is the same.

        Raises StorageError when it cannot be written, RunFailedError for content that has no form on disk.
        """
        place = self._place(kind, key)
        staging = self.folder / f".partial-{uuid.uuid4().hex[:12]}"
        try:
            staging.mkdir(parents=True)
            write(staging)
            files = {
                path.relative_to(staging).as_posix(): path for path in sorted(staging.rglob("*")) if path.is_file()
            }
            manifest = {
                "address": key,
                "files": {name: checksum(path) for name, path in files.items()},
                "facts": dict(facts),
                "determined_by": determined_by,
            }
            _write_whole(staging / MANIFEST, json.dumps(manifest, indent=1, default=str))
            for path in files.values():
                flush(path)
            place.parent.mkdir(exist_ok=True)
            try:
                staging.rename(place)
            except OSError:
                if not self.has(kind, key):
                    raise
                self._note("twice", kind, key)
            else:
                self._note("done", kind, key)
        except (OSError, SafetensorError, ArrowException) as error:  # a full disk has names of its own for the writers
            reason = getattr(error, "strerror", None) or error
            raise StorageError(f"{place} cannot be written: {reason}") from error
        except Exception as error:  # what a user's plugin hands out may be anything
            raise RunFailedError(f"what came out has no form on disk: {one_line(error)}") from error
        finally:
            shutil.rmtree(staging, ignore_errors=True)

    def discard(self, kind: str, key: str) -> None:
        """Take an artefact out of the store; nothing if it is absent."""
        aside = self.folder / f".partial-{uuid.uuid4().hex[:12]}"
        with contextlib.suppress(FileNotFoundError):
            self._place(kind, key).rename(aside)
            self._note("discarded", kind, key)
        shutil.rmtree(aside, ignore_errors=True)

    def clean(self) -> None:
        """Remove what processes that died have left; only for who knows that no other is at work here."""
        for path in self.folder.iterdir():
            if _is_staged(path):
                shutil.rmtree(path, ignore_errors=True)

    def scratch(self, key: str) -> Path:
        """A folder for the state of unfinished work on `key`, which whoever finishes it removes."""
        return self.folder / "unfinished" / key

    def journal(self) -> list[dict[str, str]]:
        """What was completed, in order: event (done, twice: by two processes, discarded), kind, key."""
        path = self.folder / JOURNAL
        return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.is_file() else []

    def _note(self, event: str, kind: str, key: str) -> None:
        """One write, so that the lines of several processes do not mix."""
        line = json.dumps({"event": event, "kind": kind, "key": key}) + "\n"
        descriptor = os.open(self.folder / JOURNAL, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
        try:
            os.write(descriptor, line.encode())
        finally:
            os.close(descriptor)

    def _place(self, kind: str, key: str) -> Path:
        return self.folder / kind / key


def _is_staged(path: Path) -> bool:
    return path.name.startswith(".partial-")


def _write_whole(path: Path, text: str) -> None:
    """Write `text` so that `path` holds all of it or does not exist."""
    staging = path.with_name(f".partial-{uuid.uuid4().hex[:12]}")
    staging.write_text(text, encoding="utf-8")
    flush(staging)
    staging.replace(path)
