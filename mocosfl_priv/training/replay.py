"""Loss-threshold replay: when the loss stops improving, the server learns from stored smashed data without clients.

This is a feature of MocoSFL's research code. Every epoch has one of three states:

- **A**: normal training.
- **B**: clients send smashed data, which is stored, but receive no gradient; only the server learns.
- **C**: clients do not take part; the server learns from the stored smashed data, in random order.

If the mean loss of an epoch is lower than that of the previous one by at least the threshold, the next epoch has state
A. Otherwise it has the next state: B after A, C after B or C.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Literal

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from mocosfl_priv.errors import StorageError
from mocosfl_priv.training.checkpoints import DamagedCheckpointError

Status = Literal["A", "B", "C"]
NEXT: dict[Status, Status] = {"A": "B", "B": "C", "C": "C"}


class Replay:
    """The state machine of replay, and the stored smashed data.

    threshold: an epoch must lower the mean loss by at least this to be followed by state A.
    warmup: number of first epochs that are always followed by state A.
    folder: where smashed data is stored; a temporary folder if None.
    """

    def __init__(self, threshold: float, warmup: int, folder: Path | None) -> None:
        self._threshold = threshold
        self._warmup = warmup
        self._temporary = TemporaryDirectory() if folder is None else None
        self._folder = folder if folder is not None else Path(str(self._temporary and self._temporary.name))
        self.status: Status = "A"
        self.epochs: dict[Status, int] = {"A": 0, "B": 0, "C": 0}
        self._last_loss = float("inf")
        self._stored_epoch = 0
        self._stored_steps = 0

    def end_epoch(self, epoch: int, loss: float) -> None:
        """Choose the state of the next epoch; `epoch` (from 1) has ended with the mean loss `loss`."""
        self.epochs[self.status] += 1
        gain = max(self._last_loss - loss, 0.0)
        improves = epoch <= self._warmup or gain >= self._threshold
        self._last_loss = loss
        self.status = "A" if improves else NEXT[self.status]
        if self.status == "B":
            self._stored_epoch, self._stored_steps = epoch + 1, 0
            if self._temporary is not None:  # without checkpoints, earlier epochs cannot be needed again
                self.forget_old()

    def store(self, parts: list[dict[str, Tensor]]) -> None:
        """Write what the clients sent in one step, in the parts in which the server processed it.

        Raises StorageError when that fails.
        """
        folder = self._epoch_folder(self._stored_epoch)
        folder.mkdir(parents=True, exist_ok=True)
        tensors = {f"{i}.{name}": value.contiguous() for i, part in enumerate(parts) for name, value in part.items()}
        try:
            save_file(tensors, folder / f"step_{self._stored_steps}.safetensors")
        except (OSError, SafetensorError) as error:
            raise StorageError(f"smashed data for replay cannot be written to {folder}: {error}") from error
        self._stored_steps += 1

    @property
    def available(self) -> bool:
        """Whether there is a stored step to replay."""
        return self._stored_steps > 0

    def order(self, generator: torch.Generator) -> list[int]:
        """Return the stored steps in a new random order."""
        return torch.randperm(self._stored_steps, generator=generator).tolist()

    def load(self, step: int, device: torch.device) -> Iterator[dict[str, Tensor]]:
        """Read the parts of a stored step onto `device`; raises DamagedCheckpointError if the file is damaged."""
        place = self._epoch_folder(self._stored_epoch) / f"step_{step}.safetensors"
        try:
            tensors = load_file(place, device=str(device))
        except (OSError, SafetensorError) as error:
            raise DamagedCheckpointError(f"{place}, smashed data stored for replay, is damaged ({error})") from error
        parts = 1 + max(int(name.split(".", 1)[0]) for name in tensors)
        for part in range(parts):
            yield {name.split(".", 1)[1]: v for name, v in tensors.items() if int(name.split(".", 1)[0]) == part}

    def forget_old(self) -> None:
        """Remove all stored epochs but the newest; call it only after a checkpoint is written."""
        for folder in self._folder.glob("epoch_*"):
            if folder != self._epoch_folder(self._stored_epoch):
                shutil.rmtree(folder, ignore_errors=True)

    def state(self) -> dict[str, object]:
        """Return the state for a checkpoint, as JSON; it does not include the stored tensors, which stay on disk."""
        return {
            "status": self.status,
            "epochs": dict(self.epochs),
            "last_loss": None if self._last_loss == float("inf") else self._last_loss,
            "stored_epoch": self._stored_epoch,
            "stored_steps": self._stored_steps,
        }

    def load_state(self, state: dict[str, object]) -> None:
        """Restore what :meth:`state` returned."""
        self.status = state["status"]  # type: ignore[assignment]
        self.epochs = dict(state["epochs"])  # type: ignore[call-overload]
        last = state["last_loss"]
        self._last_loss = float("inf") if last is None else float(last)  # type: ignore[arg-type]
        self._stored_epoch = int(state["stored_epoch"])  # type: ignore[call-overload]
        self._stored_steps = int(state["stored_steps"])  # type: ignore[call-overload]

    def _epoch_folder(self, epoch: int) -> Path:
        return self._folder / f"epoch_{epoch}"
