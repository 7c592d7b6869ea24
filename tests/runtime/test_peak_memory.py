from __future__ import annotations

import threading
from pathlib import Path

import numpy as np
import pytest
import torch

from mocosfl_priv.runtime import peak_memory as module
from mocosfl_priv.runtime.compute import Compute
from mocosfl_priv.runtime.peak_memory import peak_memory

SIZE = 200  # MiB

linux = pytest.mark.skipif(not module.STATUS.exists(), reason="no /proc")


def allocate_and_free() -> None:
    block = np.ones(SIZE * 2**20, dtype=np.uint8)
    del block


@linux
def test_a_block_is_charged_with_what_it_takes_every_time(compute: Compute) -> None:  # which tunes the allocator
    for _ in range(2):
        with peak_memory() as measured:
            allocate_and_free()
        assert measured.resident_added == pytest.approx(SIZE, abs=10)
        assert measured.resident_peak == measured.resident_before + measured.resident_added
        assert measured.device_added == 0


@linux
def test_what_came_before_is_not_counted() -> None:
    allocate_and_free()
    kept = torch.rand(100 * 2**18)  # 100 MiB that stay
    with peak_memory() as measured:
        torch.rand(10 * 2**18)
    assert measured.resident_added < 30 < 100 < measured.resident_before
    assert len(kept)


@linux
def test_where_the_peak_cannot_be_reset_it_is_sampled(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(module, "CLEAR_REFS", tmp_path)  # a folder cannot be written to
    with peak_memory() as measured:
        block = np.ones(SIZE * 2**20, dtype=np.uint8)
        threading.Event().wait(0.1)
        del block
    assert measured.resident_added == pytest.approx(SIZE, abs=15)


def test_a_failing_block_is_measured_too(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(module, "STATUS", tmp_path / "missing")
    with pytest.raises(KeyError), peak_memory() as measured:
        raise KeyError
    assert np.isnan(measured.resident_peak)
