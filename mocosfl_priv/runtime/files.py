"""Paths of users, checksums, flushing to disk, and locks between processes."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
from collections.abc import Iterable
from pathlib import Path
from types import TracebackType

from mocosfl_priv.errors import ConfigurationError

ATTEMPTS = 100  # to make a file in a folder that others may remove


def user_path(text: str | Path) -> Path:
    """Replace ``~`` in a path by the home folder; raises ConfigurationError for an unknown user (``~name``)."""
    try:
        return Path(text).expanduser()
    except RuntimeError as error:
        raise ConfigurationError(f"{text}: {error}") from error


def checksum(path: Path) -> str:
    """Return the SHA-256 of the file's content, as hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def flush(path: Path) -> None:
    """Wait until the file's content is on the disk; raises OSError for a write error that was delayed until now."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def remove_empty(folder: Path) -> None:
    """Remove every folder below `folder` that holds nothing."""
    for path in sorted(folder.rglob("*"), reverse=True):  # what lies in a folder comes before it
        if path.is_dir() and not path.is_symlink():
            with contextlib.suppress(OSError):
                path.rmdir()


def is_file_at(path: Path, descriptor: int) -> bool:
    """Whether the open file `descriptor` is the one at `path`, which may have been removed or made anew since."""
    try:
        return os.path.samestat(os.fstat(descriptor), path.stat())
    except FileNotFoundError:
        return False


def remove_folders(folders: Iterable[Path]) -> None:
    """Remove those of `folders` that are empty, in this order."""
    for folder in folders:
        with contextlib.suppress(OSError):  # it is not empty, or gone
            folder.rmdir()


class Lock:
    """A lock between processes, as a context manager; the system releases it even if the holder is killed.

    path: a file that is made for it, with the folders above it; in the end it is removed, and so are those folders
    that were made for it and are still empty. Use as a context manager; raises BlockingIOError with the holder's
    process as its text where another one has it. Where a file system has no locks, nothing is held.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._descriptor: int | None = None
        self._made: list[Path] = []

    def __enter__(self) -> Lock:
        try:
            return self._hold()
        except BaseException:
            self._remove_made()
            raise

    def _hold(self) -> Lock:
        while True:
            descriptor = self._open()
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                holder = os.read(descriptor, 20).decode(errors="replace").strip() or "unknown"
                os.close(descriptor)
                raise BlockingIOError(error.errno, f"process {holder}") from error
            except OSError:  # a network file system without locks
                os.close(descriptor)
                self._unlink()
                return self
            if is_file_at(self.path, descriptor):
                break
            os.close(descriptor)  # the previous holder removed the file after this process had opened it: try again
        os.ftruncate(descriptor, 0)
        os.write(descriptor, f"{os.getpid()}\n".encode())
        self._descriptor = descriptor
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._descriptor is not None:
            self._unlink()
            os.close(self._descriptor)
            self._descriptor = None
        self._remove_made()

    def _open(self) -> int:
        """The file, made with its folders where they are missing; an earlier holder may remove its own meanwhile."""
        for _ in range(ATTEMPTS):
            self._made += [folder for folder in self.path.parents if not folder.exists()]  # the deepest first
            with contextlib.suppress(FileNotFoundError):
                self.path.parent.mkdir(parents=True, exist_ok=True)
                return os.open(self.path, os.O_RDWR | os.O_CREAT, 0o644)
        return os.open(self.path, os.O_RDWR | os.O_CREAT, 0o644)

    def _unlink(self) -> None:
        with contextlib.suppress(OSError):
            self.path.unlink()

    def _remove_made(self) -> None:
        remove_folders(self._made)
        self._made.clear()
