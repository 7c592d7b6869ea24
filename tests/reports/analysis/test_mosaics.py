"""The scale of mosaics, against slow loops, and against CIFAR-10."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from mocosfl_priv.results import RunRecord
from reports.analysis.mosaics import Mosaic, comparison, mosaic, mosaic_scale, rung_of

SCALE = [Mosaic(1, 0.28), Mosaic(2, 0.46), Mosaic(4, 0.68)]


@given(st.integers(1, 12), st.integers(1, 12), st.integers(1, 12), st.integers(0, 10**6))
def test_every_tile_has_the_mean_of_its_pixels(height: int, width: int, tiles: int, seed: int) -> None:
    images = np.random.default_rng(seed).integers(0, 256, (2, 3, height, width), dtype=np.uint8)
    if tiles > min(height, width):
        with pytest.raises(ValueError, match="tiles on images"):
            mosaic(images, tiles)
        return
    shown = mosaic(images, tiles)
    assert shown.shape == images.shape
    for row in range(tiles):
        for column in range(tiles):
            here = (
                slice(None),
                slice(None),
                slice(row * height // tiles, (row + 1) * height // tiles),
                slice(column * width // tiles, (column + 1) * width // tiles),
            )
            mean = images[here].mean((2, 3), keepdims=True) / 255
            np.testing.assert_allclose(shown[here], np.broadcast_to(mean, shown[here].shape), atol=1e-12)


def test_a_finer_mosaic_never_shows_less_where_tiles_are_divided() -> None:
    images = np.random.default_rng(0).integers(0, 256, (5, 3, 32, 32), dtype=np.uint8)
    errors = [np.square(mosaic(images, tiles) - images / 255).mean() for tiles in (1, 2, 4, 8, 16, 32)]
    assert errors == sorted(errors, reverse=True) and errors[-1] == pytest.approx(0, abs=1e-30)


def record_of(images: np.ndarray, floor: float) -> RunRecord:
    per_image = pd.DataFrame({"victims": "test", "mse_floor": [floor] * len(images)})
    return RunRecord(
        info={}, config_yaml="", cells=pd.DataFrame(), per_image=per_image, probe=pd.DataFrame(),
        training=pd.DataFrame(), images={"victims=test": images},
    )  # fmt: skip


def test_mosaics_of_single_pixels_are_no_mosaics() -> None:
    images = np.zeros((2, 1, 8, 12), dtype=np.uint8)
    assert [step.tiles for step in mosaic_scale(record_of(images, 0.1))] == [1, 2, 4]


@pytest.mark.parametrize(
    ("leak_ratio", "reached", "missed", "text"),
    [
        (-0.1, None, 1, " (less than mosaics of 1 × 1 tiles)"),
        (0.28, 1, 2, " (as much as mosaics of 1 × 1 to 2 × 2 tiles)"),
        (0.5, 2, 4, " (as much as mosaics of 2 × 2 to 4 × 4 tiles)"),
        (0.9, 4, None, " (more than mosaics of 4 × 4 tiles)"),
    ],
)
def test_a_leak_ratio_stands_between_two_rungs(
    leak_ratio: float, reached: int | None, missed: int | None, text: str
) -> None:
    rung = rung_of(leak_ratio, SCALE)
    assert (rung.reached.tiles if rung.reached else None, rung.missed.tiles if rung.missed else None) == (
        reached,
        missed,
    )
    assert comparison(leak_ratio, SCALE) == text
    assert comparison(leak_ratio, []) == ""


def test_the_scale_of_cifar10_is_as_measured_elsewhere(shared: Path) -> None:
    """R .28, .46, .68, .84, .94: measured by somebody else, on test images."""
    folder = shared / "data" / "cifar10" / "test"
    paths = sorted(folder.rglob("*.png"))
    images = np.stack([np.asarray(Image.open(path).convert("RGB")).transpose(2, 0, 1) for path in paths])
    floor = np.square(images / 255 - images.mean(0) / 255).mean()
    found = [step.leak_ratio for step in mosaic_scale(record_of(images, float(floor)))]
    np.testing.assert_allclose(found, [0.28, 0.46, 0.68, 0.84, 0.94], atol=0.03)
