"""The files in examples/ run as they are shown: from a folder of images to a report."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import nn

from examples import audit_splitfed
from tests.test_audits import blobs

EXAMPLES = Path(__file__).parents[1] / "examples"


@pytest.mark.parametrize("name", sorted(path.stem for path in EXAMPLES.glob("audit_*.py")))
def test_an_example_audits_a_folder(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for place, seed in (("victims", 0), ("auxiliary", 1)):
        (tmp_path / place).mkdir()
        for index, image in enumerate((255 * blobs(24, seed)).byte().permute(0, 2, 3, 1).numpy()):
            Image.fromarray(image).save(tmp_path / place / f"{index}.png")
    parts = {"client": audit_splitfed.client(), "server": audit_splitfed.server()}
    torch.save(
        {part: nn.DataParallel(network).state_dict() for part, network in parts.items()}, tmp_path / "splitfed.pth"
    )
    monkeypatch.chdir(tmp_path)
    module: Any = importlib.import_module(f"examples.{name}")
    quick: Any = {"name": "decoder", "steps": 4}
    table = module.main("victims", "auxiliary", "out", quick).table()
    assert (table["failure"] == "").all() and set(table["attack"]) == {"floor", "decoder"}
    assert (tmp_path / "out" / "report.html").is_file()
