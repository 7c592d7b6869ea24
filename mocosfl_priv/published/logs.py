"""What the public MocoSFL release wrote down about a checkpoint: the outcome of its attack, its accuracy.

Beside every checkpoint of the release lie ``MIA.log``, which every run of its attack appends to, and ``output.log``,
which every training appends to. Where checkpoints were copied into one folder, a table in ``README.md`` may take their
place.
Logs are evidence, not input: what cannot be read is None with a note, never an error.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

ATTACK_STARTS = "Generating IR"
ATTACK_RESULT = re.compile(r"\b(MSE|SSIM|PSNR) Loss on ALL Image is ([-+.\deE]+)")
TRAINING_STARTS = re.compile(r"\bTrain on \S+ with cutlayer")
ACCURACY = re.compile(r"\bfinal (knn|linear-probe) evaluation accuracy is ([-+.\deE]+)")
ACCURACY_NAMES = {"knn": "knn_accuracy", "linear-probe": "linear_accuracy"}
TABLE_COLUMNS = {"MSE": "mse", "SSIM": "ssim", "PSNR": "psnr", "kNN": "knn_accuracy", "linear": "linear_accuracy"}
SHORTENED = ("...", "…")


@dataclass(frozen=True)
class LoggedValues:
    """What the authors measured; None where they did not, or where nobody can tell any more.

    mse, ssim (zero-padded), psnr (dB, mean over images): their attack on their 128 fixed images. The accuracies are
    shares in [0, 1] of CIFAR-10's test images.
    """

    mse: float | None = None
    ssim: float | None = None
    psnr: float | None = None
    knn_accuracy: float | None = None
    linear_accuracy: float | None = None


def read_logs(folder: Path) -> tuple[LoggedValues, list[str]]:
    """What ``MIA.log`` and ``output.log`` in `folder` say, and notes on what they do not."""
    notes: list[str] = []
    values = LoggedValues()
    attack_log = _text(folder / "MIA.log", notes)
    if attack_log is not None:
        values = replace(values, **_last_attack(attack_log, notes))
    elif not notes:
        notes.append("MIA.log is not there: the release never attacked this checkpoint, or its log was not kept")
    training_log = _text(folder / "output.log", notes)
    if training_log is not None:
        values = replace(values, **_accuracies(training_log))
    return values, notes


def _last_attack(text: str, notes: list[str]) -> dict[str, float]:
    """MSE, SSIM and PSNR of the last attack that ran to its end: the log is appended to, and attempts break off."""
    finished: list[dict[str, float]] = []
    started, current = 0, dict[str, float]()
    for line in text.splitlines():
        found = ATTACK_RESULT.search(line)
        if ATTACK_STARTS in line:
            started, current = started + 1, {}
        elif found is not None:
            name, value = found[1].lower(), _number(found[2])
            current = ({} if name in current else current) | ({name: value} if value is not None else {})
            if len(current) == 3:
                finished.append(current)
                current = {}
    if not finished:
        notes.append("MIA.log holds no attack that ran to its end")
        return {}
    if len(finished) > 1:
        spread = ", ".join(f"{attack['mse']:.4f}" for attack in finished)
        notes.append(f"MIA.log holds {len(finished)} finished attacks (MSE {spread}): the last one is taken")
    if started > len(finished):
        notes.append(f"MIA.log holds {started - len(finished)} attacks that broke off")
    return finished[-1]


def _accuracies(text: str) -> dict[str, float]:
    """The final accuracies of the last training: an earlier one's belong to a client that was overwritten."""
    found: dict[str, float] = {}
    for line in text.splitlines():
        if TRAINING_STARTS.search(line) is not None:
            found = {}
        result = ACCURACY.search(line)
        percent = _number(result[2]) if result is not None else None
        if result is not None and percent is not None:
            found[ACCURACY_NAMES[result[1]]] = _share(percent)
    return found


def read_table(folder: Path) -> Mapping[str, LoggedValues]:
    """The tables in ``README.md`` of `folder`, by what they call a file: its name, or its end after an ellipsis.

    A column is taken for what its heading names, several values for several names: ``attack MSE / SSIM / PSNR`` over
    ``.0386 / .4539 / 14.88``. Accuracies are in percent. An entry that is no number is None.
    """
    text = _text(folder / "README.md", [])
    tables: dict[str, LoggedValues] = {}
    headings: list[str] | None = None
    for line in (text or "").splitlines():
        if not line.lstrip().startswith("|"):
            headings = None
            continue
        cells = [cell.strip() for cell in line.strip().strip("|").split("|")]
        if headings is None:
            headings = cells
        elif not set(line) <= set("|-: "):
            tables[cells[0].strip("`")] = _table_row(headings, cells)
    return tables


def find_in_table(table: Mapping[str, LoggedValues], file: str) -> LoggedValues | None:
    """The row of `table` that is about `file`, if exactly one is."""
    rows = [values for name, values in table.items() if name and (file == name or file.endswith(_end_of(name)))]
    return rows[0] if len(rows) == 1 else None


def _end_of(name: str) -> tuple[str, ...]:
    return tuple(name.removeprefix(mark) for mark in SHORTENED if name.startswith(mark) and name != mark)


def _table_row(headings: list[str], cells: list[str]) -> LoggedValues:
    found: dict[str, float | None] = {}
    for heading, cell in zip(headings, cells, strict=False):
        words = [part.split()[-1] if part.split() else "" for part in heading.split("/")]
        values = [_number(part.strip()) for part in cell.split("/")]
        if len(words) == len(values):
            found |= {TABLE_COLUMNS[word]: value for word, value in zip(words, values, strict=True)
                      if word in TABLE_COLUMNS}  # fmt: skip
    return LoggedValues(
        **{
            name: _share(value) if name.endswith("accuracy") and value is not None else value
            for name, value in found.items()
        }
    )


def _text(path: Path, notes: list[str]) -> str | None:
    try:
        return path.read_bytes().decode("utf-8", errors="replace") if path.exists() else None
    except OSError as error:
        notes.append(f"{path.name} cannot be read: {error.strerror}")
        return None


def _number(text: str) -> float | None:
    try:
        value = float(text)
    except ValueError:
        return None
    return value if math.isfinite(value) else None


def _share(percent: float) -> float:
    return round(percent / 100, 6)  # 66.08 / 100 is not 0.6608
