"""A scale for the leak ratio: how much of each victim a mosaic of k x k mean colours shows.

R alone says little to somebody who has not seen many reconstructions. A mosaic of the victim itself has an R that can
be computed, and everybody knows what a mosaic shows: R .68 says as much as 4 x 4 coloured tiles.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from mocosfl_priv.results import TEST_VICTIMS, RunRecord, victims_key

TILES = (1, 2, 4, 8, 16)  # along each side


@dataclass(frozen=True)
class Mosaic:
    """Victims as k x k tiles, and how much of a blind guess's error that removes.

    tiles: k. leak_ratio: R of the mosaics, over all victims.
    """

    tiles: int
    leak_ratio: float


class Rung(NamedTuple):
    """Where a leak ratio stands on the scale: the finest mosaic that it reaches, and the next finer one."""

    reached: Mosaic | None
    missed: Mosaic | None


def mosaic(images: np.ndarray, tiles: int) -> np.ndarray:
    """Replace each tile of a regular grid by its mean colour.

    Args:
        images: uint8 (n, c, h, w).
        tiles: along each side; at least 1, at most the shorter side.

    Returns:
        Float64 (n, c, h, w) in [0, 1]. Where a side is no multiple of `tiles`, tiles differ by one pixel.

    Raises:
        ValueError: `tiles` is out of range.

    >>> mosaic(np.array([0, 255, 255, 255], dtype=np.uint8).reshape(1, 1, 2, 2), tiles=1).tolist()
    [[[[0.75, 0.75], [0.75, 0.75]]]]
    """
    if not 1 <= tiles <= min(images.shape[-2:]):
        raise ValueError(f"{tiles} tiles on images of {images.shape[-2]} x {images.shape[-1]} pixels")
    shown = images.astype(np.float64) / 255
    for axis in (2, 3):
        edges = np.arange(tiles + 1) * shown.shape[axis] // tiles
        widths = np.diff(edges)
        sums = np.add.reduceat(shown, edges[:-1], axis=axis)
        means = sums / widths.reshape([-1 if place == axis else 1 for place in range(4)])
        shown = np.repeat(means, widths, axis=axis)
    return shown


def mosaic_scale(record: RunRecord, victims: str = TEST_VICTIMS) -> list[Mosaic]:
    """The scale for one set of victims, coarsest first; mosaics of single pixels are left out.

    Args:
        record: with the victims' images, and the floor's error on each of them.
        victims: name of the set.
    """
    images = record.images[victims_key(victims)]
    floors = record.per_image
    if "victims" in floors:
        floors = floors[floors["victims"] == victims]
    floor = float(floors["mse_floor"].mean())
    true = images.astype(np.float64) / 255
    return [
        Mosaic(tiles, 1 - float(np.square(mosaic(images, tiles) - true).mean()) / floor)
        for tiles in TILES
        if tiles < min(images.shape[-2:])
    ]


def rung_of(leak_ratio: float, scale: list[Mosaic]) -> Rung:
    """Where `leak_ratio` stands on the scale."""
    reached = [step for step in scale if step.leak_ratio <= leak_ratio]
    missed = [step for step in scale if step.leak_ratio > leak_ratio]
    return Rung(max(reached, key=lambda s: s.tiles, default=None), min(missed, key=lambda s: s.tiles, default=None))


def comparison(leak_ratio: float, scale: list[Mosaic]) -> str:
    """`leak_ratio` in words in brackets, to follow it in a sentence; empty without a scale.

    >>> comparison(0.7, [Mosaic(2, 0.46), Mosaic(4, 0.68), Mosaic(8, 0.84)])
    ' (as much as mosaics of 4 × 4 to 8 × 8 tiles)'
    """
    reached, missed = rung_of(leak_ratio, scale)
    if reached is None and missed is None:
        return ""
    if reached is None:
        assert missed is not None
        return f" (less than mosaics of {missed.tiles} × {missed.tiles} tiles)"
    if missed is None:
        return f" (more than mosaics of {reached.tiles} × {reached.tiles} tiles)"
    return f" (as much as mosaics of {reached.tiles} × {reached.tiles} to {missed.tiles} × {missed.tiles} tiles)"
