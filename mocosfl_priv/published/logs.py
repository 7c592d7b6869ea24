"""Values that the public MocoSFL release logged for a checkpoint: the result of its attack, and its accuracy.

The folder of each checkpoint of the release also holds ``MIA.log``, to which every run of the attack appends, and
``output.log``, to which every training appends. If checkpoints were copied into a single folder, a table in
``README.md`` may hold these values instead. Values that cannot be read are None, with a note; this is never an error,
since nothing depends on them.
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
    """What the release's authors measured; None where a value was not measured or cannot be read.

    mse, ssim (zero-padded), psnr (dB, mean over images): of their attack on their 128 fixed images.
    knn_accuracy, linear_accuracy: in [0, 1], on CIFAR-10's test images.
    """

    mse: float | None = None
    ssim: float | None = None
    psnr: float | None = None
    knn_accuracy: float | None = None
    linear_accuracy: float | None = None


def read_logs(folder: Path) -> tuple[LoggedValues, list[str]]:
    """Read ``MIA.log`` and ``output.log`` in `folder`; also return notes on what is missing or ambiguous."""
    notes: list[str] = []
    values = LoggedValues()
    attack_log = _text(folder / "MIA.log", notes)
    if attack_log is not None:
        values = replace(values, **_last_attack(attack_log, notes))
    elif not notes:
        notes.append("MIA.log is missing: this checkpoint was not attacked for the release, or its log was not kept")
    training_log = _text(folder / "output.log", notes)
    if training_log is not None:
        values = replace(values, **_accuracies(training_log))
    return values, notes


def _last_attack(text: str, notes: list[str]) -> dict[str, float]:
    """MSE, SSIM and PSNR of the last finished attack in a log, which may hold several, some of them unfinished."""
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
        notes.append("MIA.log holds no finished attack")
        return {}
    if len(finished) > 1:
        spread = ", ".join(f"{attack['mse']:.4f}" for attack in finished)
        notes.append(f"MIA.log holds {len(finished)} finished attacks (MSE {spread}); the last one is used")
    if started > len(finished):
        notes.append(f"MIA.log holds {started - len(finished)} unfinished attacks")
    return finished[-1]


def _accuracies(text: str) -> dict[str, float]:
    """The final accuracies of the last training in a log; the clients of earlier ones were overwritten."""
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
    """Read the tables in ``README.md`` of `folder`; the keys are the first column: a file name, or its end after "...".

    Columns are recognised by their headings. A column may hold several values, like ``.0386 / .4539 / 14.88`` under
    ``attack MSE / SSIM / PSNR``. Accuracies are in percent. An entry that is not a number becomes None.
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
    """Return the row of `table` for the file name `file`; None if there is none, or more than one."""
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
    return round(percent / 100, 6)  # rounded, since 66.08 / 100 is not exactly 0.6608
