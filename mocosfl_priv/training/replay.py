"""Loss-threshold replay: the server goes on learning from stored smashed data while clients are silent.

Found in MocoSFL's research code. An epoch has one of three states. **A**: everything as usual. **B**: clients send,
but get no gradient back; what they send is stored. **C**: nobody sends; the server learns from what was stored, in
another order. When an epoch improves the mean loss by less than the threshold, the next one is a state further (A to B
to C); otherwise it is A again.
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
    """The state machine and the store.

    threshold: mean loss by which an epoch must improve to be followed by a full one. warmup: epochs that always are.
    folder: where smashed data is kept, a temporary folder if None.
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
        """Decide how the next epoch runs; `epoch` counts from 1."""
        self.epochs[self.status] += 1
        gain = max(self._last_loss - loss, 0.0)
        improves = epoch <= self._warmup or gain >= self._threshold
        self._last_loss = loss
        self.status = "A" if improves else NEXT[self.status]
        if self.status == "B":
            self._stored_epoch, self._stored_steps = epoch + 1, 0
            if self._temporary is not None:  # without checkpoints nobody can go back to what was stored before
                self.forget_old()

    def store(self, parts: list[dict[str, Tensor]]) -> None:
        """Keep what the clients of one step sent, in the parts in which it was scored."""
        folder = self._epoch_folder(self._stored_epoch)
        folder.mkdir(parents=True, exist_ok=True)
        tensors = {f"{i}.{name}": value.contiguous() for i, part in enumerate(parts) for name, value in part.items()}
        try:
            save_file(tensors, folder / f"step_{self._stored_steps}.safetensors")
        except (OSError, SafetensorError) as error:
            raise StorageError(f"smashed data to replay cannot be written to {folder}: {error}") from error
        self._stored_steps += 1

    @property
    def available(self) -> bool:
        """Whether there is a stored step to replay."""
        return self._stored_steps > 0

    def order(self, generator: torch.Generator) -> list[int]:
        """A new order of the stored steps."""
        return torch.randperm(self._stored_steps, generator=generator).tolist()

    def load(self, step: int, device: torch.device) -> Iterator[dict[str, Tensor]]:
        """The parts of a stored step."""
        place = self._epoch_folder(self._stored_epoch) / f"step_{step}.safetensors"
        try:
            tensors = load_file(place, device=str(device))
        except (OSError, SafetensorError) as error:
            raise DamagedCheckpointError(f"{place}, stored to be replayed, is damaged ({error})") from error
        parts = 1 + max(int(name.split(".", 1)[0]) for name in tensors)
        for part in range(parts):
            yield {name.split(".", 1)[1]: v for name, v in tensors.items() if int(name.split(".", 1)[0]) == part}

    def forget_old(self) -> None:
        """Remove stored epochs that no later step can need; call it once a checkpoint is safe."""
        for folder in self._folder.glob("epoch_*"):
            if folder != self._epoch_folder(self._stored_epoch):
                shutil.rmtree(folder, ignore_errors=True)

    def state(self) -> dict[str, object]:
        """For a checkpoint, as JSON; the stored tensors stay where they are."""
        return {
            "status": self.status,
            "epochs": dict(self.epochs),
            "last_loss": None if self._last_loss == float("inf") else self._last_loss,
            "stored_epoch": self._stored_epoch,
            "stored_steps": self._stored_steps,
        }

    def load_state(self, state: dict[str, object]) -> None:
        """Go on where :meth:`state` was taken."""
        self.status = state["status"]  # type: ignore[assignment]
        self.epochs = dict(state["epochs"])  # type: ignore[call-overload]
        last = state["last_loss"]
        self._last_loss = float("inf") if last is None else float(last)  # type: ignore[arg-type]
        self._stored_epoch = int(state["stored_epoch"])  # type: ignore[call-overload]
        self._stored_steps = int(state["stored_steps"])  # type: ignore[call-overload]

    def _epoch_folder(self, epoch: int) -> Path:
        return self._folder / f"epoch_{epoch}"
