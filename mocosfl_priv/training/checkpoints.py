"""Checkpoints of a running training, as safetensors and JSON, from which it resumes exactly.

A checkpoint is a folder ``step_<n>`` with ``state.safetensors`` and ``state.json``. It is written under a temporary
name, flushed to disk, and renamed, so that the previous checkpoint stays intact if the process dies. The two newest
checkpoints are kept.
"""

from __future__ import annotations

import json
import os
import shutil
import uuid
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from mocosfl_priv.errors import ConfigurationError, StorageError
from mocosfl_priv.runtime.files import checksum, flush

FORMAT = 4
KEPT = 2
MOST_SAID, LONGEST_SAID = 4, 40  # most differences in an error message, and most characters of a value in it


class DamagedCheckpointError(ConfigurationError):
    """A checkpoint is damaged.

    place: the checkpoint's folder; if it is removed, training resumes from the previous checkpoint. None if more than
        one checkpoint is affected, so that training can only start anew.
    """

    def __init__(self, message: str, place: Path | None = None) -> None:
        super().__init__(message)
        self.place = place


@dataclass(frozen=True)
class Checkpoints:
    """The checkpoints of one training in `folder`.

    identity: a digest of configuration, data and seed; a checkpoint with another identity is refused.
    document: the values behind `identity`, as JSON, so that the error message can say which differ; None if not known.
    """

    folder: Path
    identity: str
    document: Mapping[str, Any] | None = None

    def below(self, name: str) -> Checkpoints:
        """Return the checkpoints of a part of the same training, such as a defense's expert, in a subfolder."""
        return Checkpoints(self.folder / name, f"{self.identity}/{name}", self.document)

    def save(self, step: int, tensors: dict[str, Tensor], facts: dict[str, Any]) -> None:
        """Write the checkpoint of `step`; raises StorageError when that fails."""
        place = self.folder / f"step_{step:09d}"
        staging = self.folder / f".partial-{uuid.uuid4().hex[:8]}"
        try:
            staging.mkdir(parents=True)
            save_file(
                {name: value.detach().cpu().contiguous().clone() for name, value in tensors.items()},
                staging / "state.safetensors",
            )
            document = {
                "format": FORMAT,
                "identity": self.identity,
                "document": self.document,
                "step": step,
                "state_sha256": checksum(staging / "state.safetensors"),
                "facts": facts,
            }
            (staging / "state.json").write_text(json.dumps(document), encoding="utf-8")
            for name in ("state.safetensors", "state.json"):
                flush(staging / name)
            shutil.rmtree(place, ignore_errors=True)
            staging.replace(place)
            for old in self._steps()[:-KEPT]:
                shutil.rmtree(old, ignore_errors=True)
        except (OSError, SafetensorError) as error:
            reason = getattr(error, "strerror", None) or error
            raise StorageError(f"checkpoint {place} cannot be written: {reason}") from error
        finally:
            shutil.rmtree(staging, ignore_errors=True)

    def verify(self) -> None:
        """Check that checkpoints can be written and that training can resume from the newest one.

        Raises ConfigurationError if the folder cannot be created or written to, or if the newest checkpoint belongs to
        another training; raises DamagedCheckpointError if that checkpoint is damaged.
        """
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ConfigurationError(f"--resume-dir: {self.folder} cannot be created: {error.strerror}") from error
        if not os.access(self.folder, os.W_OK):
            raise ConfigurationError(f"--resume-dir: {self.folder} is not writable")
        if steps := self._steps():
            self._document(steps[-1])

    def latest(self) -> tuple[int, dict[str, Tensor], dict[str, Any]] | None:
        """Read step, tensors and facts of the newest checkpoint; None if there is none.

        Raises ConfigurationError or DamagedCheckpointError, as :meth:`verify` does.
        """
        steps = self._steps()
        if not steps:
            return None
        document = self._document(steps[-1])
        try:
            tensors = load_file(steps[-1] / "state.safetensors")
        except (OSError, SafetensorError) as error:
            raise _damaged(steps[-1], error) from error
        return int(document["step"]), tensors, document["facts"]

    def _document(self, place: Path) -> dict[str, Any]:
        try:
            document: dict[str, Any] = json.loads((place / "state.json").read_text(encoding="utf-8"))
            known, identity = document["format"] == FORMAT, document["identity"]
            intact = not known or document["state_sha256"] == checksum(place / "state.safetensors")
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise _damaged(place, error) from error
        if not known:
            raise ConfigurationError(
                f"checkpoint {place} is of format {document['format']}; this version reads {FORMAT}"
            )
        if identity != self.identity:
            raise ConfigurationError(
                f"checkpoint {place} belongs to another configuration, data or seed"
                f"{_difference(document.get('document'), self.document)}; choose another folder or remove it"
            )
        if not intact:
            raise _damaged(place, ValueError("its checksum does not match"))
        return document

    def _steps(self) -> list[Path]:
        return sorted(self.folder.glob("step_*")) if self.folder.is_dir() else []


def _difference(there: object, here: Mapping[str, Any] | None) -> str:
    """Say which values differ between the documents of a checkpoint and of this training; empty if not known."""
    if not isinstance(there, Mapping) or here is None:
        return ""
    kept, wanted = _flat(there), _flat(json.loads(json.dumps(here, default=str)))
    names = [name for name in sorted(kept.keys() | wanted.keys()) if kept.get(name) != wanted.get(name)]
    said = [
        f"{name} is {_short(kept.get(name))} in the checkpoint and {_short(wanted.get(name))} here"
        for name in names[:MOST_SAID]
    ]
    if len(names) > MOST_SAID:
        said.append(f"and {len(names) - MOST_SAID} more differ")
    if "training.epochs" in names:
        said.append("learning rates depend on training.epochs from the start, so a longer training must begin anew")
    return ": " + "; ".join(said) if said else ""


def _flat(node: object, path: str = "") -> dict[str, object]:
    """Flatten nested mappings to one, with dotted names."""
    if not isinstance(node, Mapping):
        return {path: node}
    return {
        key: value
        for name, below in node.items()
        for key, value in _flat(below, f"{path}.{name}" if path else name).items()
    }


def _short(value: object) -> str:
    text = "not set" if value is None else str(value)
    return text if len(text) <= LONGEST_SAID else text[: LONGEST_SAID - 3] + "..."


def _damaged(place: Path, error: Exception) -> DamagedCheckpointError:
    return DamagedCheckpointError(f"checkpoint {place} is damaged ({error}); remove it to continue without it", place)
