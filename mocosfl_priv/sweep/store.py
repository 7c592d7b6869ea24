"""Content-addressed store of artefacts, which are written atomically and verified on every read.

An artefact is a folder ``<kind>/<address>`` of files, with an ``artefact.json`` that holds the checksum of each file.
It is written to a temporary folder, flushed and renamed, so that a process that dies at any moment leaves no partial
artefact. A damaged artefact is removed when it is read, so that it is computed again.
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

FORMAT = 2  # format 1 had no experts, and stored attacks together with their scores
MANIFEST, JOURNAL = "artefact.json", "journal.jsonl"
Write = Callable[[Path], None]


def address(determined_by: Mapping[str, Any]) -> str:
    """Return the SHA-256 of everything that determines an artefact, a JSON document with sorted keys."""
    text = json.dumps(determined_by, sort_keys=True, separators=(",", ":"), default=str)
    return hashlib.sha256(text.encode()).hexdigest()


@dataclass(frozen=True)
class Artefact:
    """A complete artefact: the folder of its files, and the facts stored with it."""

    folder: Path
    facts: dict[str, Any]


class Store:
    """The artefacts below `folder`. Several processes may use one store at once.

    Args:
        folder: The store's folder.
        make: Whether to make the store if there is none. Workers pass False, since they must find the sweep's store.

    Raises:
        ConfigurationError: The folder cannot be used, holds other files, or a store of another format.
        StorageError: There is no store, and `make` is False.

    """

    def __init__(self, folder: Path, make: bool = True) -> None:
        self.folder = folder
        mark = folder / "store.json"
        try:
            if not mark.is_file():
                if not make:
                    raise StorageError(
                        f"there is no store {folder} on {platform.node()}; all machines of a sweep must share it"
                    )
                if folder.is_dir() and any(p.name != mark.name and not _is_staged(p) for p in folder.iterdir()):
                    raise ConfigurationError(f"{folder} is not empty and holds no store; choose another folder")
                folder.mkdir(parents=True, exist_ok=True)
                _write_whole(mark, json.dumps({"format": FORMAT}))
            found = json.loads(mark.read_text(encoding="utf-8"))["format"]
        except OSError as error:
            raise ConfigurationError(f"store {folder} cannot be used: {error.strerror}") from error
        except (ValueError, KeyError, TypeError) as error:
            raise ConfigurationError(f"{mark} is damaged; remove {folder} to start over") from error
        if found != FORMAT:
            raise ConfigurationError(
                f"store {folder} has format {found}, but this version reads format {FORMAT} and cannot use its "
                "artefacts; choose another folder for --out (the results in the old one stay readable)"
            )

    def has(self, kind: str, key: str) -> bool:
        """Whether the artefact exists. Its files are not verified: :meth:`get` may still find it damaged."""
        return (self._place(kind, key) / MANIFEST).is_file()

    def get(self, kind: str, key: str) -> Artefact | None:
        """Return the artefact after verifying its checksums, or None if it is absent or damaged.

        A damaged artefact is removed. Raises StorageError if the disk cannot be read; nothing is removed then.
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
        """Store an artefact atomically. If it exists already, it is kept, since its content is the same.

        Args:
            kind: Kind of the artefact.
            key: Its address.
            write: Writes the artefact's files into the folder that it is given.
            facts: Stored with the artefact, as JSON.
            determined_by: The document whose hash is `key`, stored for information.

        Raises:
            StorageError: The disk cannot be written.
            RunFailedError: `write` failed otherwise, such as for content that cannot be serialised.

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
        except (OSError, SafetensorError, ArrowException) as error:  # the writers' own errors for a full disk
            reason = getattr(error, "strerror", None) or error
            raise StorageError(f"{place} cannot be written: {reason}") from error
        except Exception as error:  # a user's plugin may return objects of any type
            raise RunFailedError(f"the result cannot be stored on disk: {one_line(error)}") from error
        finally:
            shutil.rmtree(staging, ignore_errors=True)

    def discard(self, kind: str, key: str) -> None:
        """Remove an artefact from the store, if it is there."""
        aside = self.folder / f".partial-{uuid.uuid4().hex[:12]}"
        with contextlib.suppress(FileNotFoundError):
            self._place(kind, key).rename(aside)
            self._note("discarded", kind, key)
        shutil.rmtree(aside, ignore_errors=True)

    def clean(self) -> None:
        """Remove partial files of processes that died. No other process may be using the store."""
        for path in self.folder.iterdir():
            if _is_staged(path):
                shutil.rmtree(path, ignore_errors=True)

    def scratch(self, key: str) -> Path:
        """Return the folder for checkpoints of unfinished work on `key`, which the caller removes in the end."""
        return self.folder / "unfinished" / key

    def journal(self) -> list[dict[str, str]]:
        """Return the store's events in order, with the keys event, kind and key.

        Events: ``done``; ``twice`` (a second process computed the same artefact); ``discarded``.
        """
        path = self.folder / JOURNAL
        return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.is_file() else []

    def _note(self, event: str, kind: str, key: str) -> None:
        """Append a line to the journal in a single write, so that lines of several processes do not mix."""
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
