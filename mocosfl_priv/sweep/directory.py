"""The folder of a sweep, locked by the process that works in it.

Contents:
    lock            file lock; it holds the id of the process that works here
    store/          artefacts by their address
    runs/NAME/      an ordinary run directory for every variant, written from the store
    results.csv     the rows of all variants, with a column for every axis
"""

from __future__ import annotations

import fcntl
import os
import shutil
from pathlib import Path
from types import TracebackType
from typing import IO

from mocosfl_priv.errors import ConfigurationError
from mocosfl_priv.results import require_no_tilde, require_room
from mocosfl_priv.runtime.files import is_file_at, remove_folders
from mocosfl_priv.sweep.store import Store

LOCK = "lock"


class SweepDirectory:
    """Opens and locks the folder of a sweep for one process. Use as a context manager.

    Args:
        folder: The folder; it is made if it does not exist.
        resume: Whether it may already hold a sweep.

    Raises:
        ConfigurationError: The folder holds a sweep and `resume` is not set, holds other files, cannot be written, is
            locked by another process, or its store has another format.

    """

    def __init__(self, folder: Path, resume: bool) -> None:
        require_no_tilde(Path(folder), "--out")
        self.folder = Path(folder).resolve()
        try:
            there = self.folder.is_dir() and any(self.folder.iterdir())
        except OSError as error:  # such as a name too long for the file system, or a folder without read permission
            raise ConfigurationError(f"--out {self.folder} cannot be written: {error.strerror}") from error
        if self.folder.exists() and not self.folder.is_dir():
            raise ConfigurationError(f"--out {folder} is a file")
        if there and not (self.folder / LOCK).is_file():
            raise ConfigurationError(f"--out {folder} is not empty and holds no sweep; choose another folder")
        if there and not resume:
            raise ConfigurationError(
                f"--out {folder} already holds a sweep; add --resume to continue it, or choose another folder"
            )
        self._lock: IO[str] | None = None
        self._fresh = [] if there else [path for path in (self.folder, *self.folder.parents) if not path.exists()]
        self._was_there = there

    @property
    def runs(self) -> Path:
        """The folder that holds the run directories of the variants."""
        return self.folder / "runs"

    def __enter__(self) -> SweepDirectory:
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._lock = (self.folder / LOCK).open("a+", encoding="utf-8")
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if not is_file_at(
                self.folder / LOCK, self._lock.fileno()
            ):  # its holder has just removed it, or it has been made anew since
                raise BlockingIOError
        except BlockingIOError as error:
            raise ConfigurationError(
                f"--out {self.folder} is in use by another sweep (process {self._owner()}); wait for it or stop it"
            ) from error
        except OSError as error:
            raise ConfigurationError(f"--out {self.folder} cannot be written: {error.strerror}") from error
        try:
            self.store = Store(self.folder / "store")  # raises before anything is changed if its format differs
            require_room(self.folder, 0, f"--out {self.folder}")
            self._lock.truncate(0)
            self._lock.write(f"{os.getpid()}\n")
            self._lock.flush()
            self.store.clean()
            for left in self.runs.glob(".*"):  # partial files of a process that was killed while writing
                shutil.rmtree(left, ignore_errors=True)
        except BaseException:
            self._leave()
            raise
        return self

    def _leave(self) -> None:
        """Let go of the lock; where nothing was computed, nothing stays of what was made."""
        assert self._lock is not None
        if not self._was_there and not self._has_results():
            shutil.rmtree(self.folder / "store", ignore_errors=True)
            (self.folder / LOCK).unlink(missing_ok=True)
            remove_folders(self._fresh)
        self._lock.close()

    def _has_results(self) -> bool:
        return self.runs.exists() or any(path.is_file() for path in (self.folder / "store").glob("*/**/*"))

    def _owner(self) -> str:
        assert self._lock is not None
        self._lock.seek(0)
        return self._lock.read().strip() or "unknown"

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._lock is not None:
            self._leave()  # releases the lock; the system also releases it when a process is killed
