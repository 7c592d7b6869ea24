"""Pictures of reconstructions: strips of evenly spaced victims, and the victims that leak most with their numbers."""

from __future__ import annotations

import io
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from PIL import Image

from mocosfl_priv.results import TEST_VICTIMS, RunRecord, image_key, victims_key
from reports.analysis.mosaics import Mosaic, mosaic
from reports.analysis.per_image import GROUP, closest_attacks, image_leaks, of_system
from reports.analysis.summary import SummaryRow, key_of

MOSAICS = "mosaic of the originals"
STRIP_IMAGES = 10
STRIP_SCALE = 2
STRIP_GAP = 2
WORST_SHOWN = 8


def shown_victims(count: int) -> list[int]:
    """Return the indices of the victims that strips show: evenly spaced among `count`, so not selected by content."""
    return [int(i) for i in np.unique(np.linspace(0, count - 1, min(STRIP_IMAGES, count)).round())]


def strip(images: np.ndarray, indices: list[int]) -> bytes:
    """Return a PNG of the images at `indices` side by side; images: uint8 (n, c, h, w), grey or colour."""
    return _png(side_by_side([_picture(image) for image in images[indices]]))


def mosaic_strip(images: np.ndarray, indices: list[int], tiles: int) -> bytes:
    """The same of mosaics of the images, with so many tiles along each side."""
    shown = (255 * mosaic(images[indices], tiles)).round().astype(np.uint8)
    return strip(shown, list(range(len(shown))))


def strips(record: RunRecord, rows: list[SummaryRow], scale: list[Mosaic]) -> list[dict[str, Any]]:
    """Return strips of the originals, their mosaics, and every attack on every system, for the first seed.

    Each has the keys ``defense``, ``attack`` and ``png``, and for attacks and mosaics ``leak_ratio`` over all victims.
    Of blind attacks, only the first is included, since they do not depend on the system.
    """
    victims = record.images[victims_key(TEST_VICTIMS)]
    indices = shown_victims(len(victims))
    pictures: list[dict[str, Any]] = [{"defense": "originals", "attack": "", "png": strip(victims, indices)}]
    pictures += [
        {
            "defense": MOSAICS,
            "attack": f"{step.tiles} x {step.tiles} tiles",
            "leak_ratio": step.leak_ratio,
            "png": mosaic_strip(victims, indices, step.tiles),
        }
        for step in scale
    ]
    first_blind = next((row for row in rows if row.blind), None)
    for row in rows:
        images = record.images.get(_image_key(record, row, row.attack))
        if images is None or (row.blind and row is not first_blind):
            continue
        pictures.append(
            {
                "defense": row.system if not row.blind else "any defense",
                "attack": row.attack,
                "leak_ratio": row.leak_ratio.value,
                "png": strip(images, indices),
            }
        )
    return pictures


@dataclass(frozen=True)
class ImagePair:
    """A victim above its reconstruction, with the metrics of this image alone.

    picture: uint8 (2 h + gap, w, 3).
    image: index of the victim.
    """

    picture: np.ndarray
    image: int
    attack: str
    leak_ratio: float
    ssim: float

    @property
    def png(self) -> bytes:
        """The picture as the content of a PNG file."""
        return _png(self.picture)


def worst_pairs(record: RunRecord, row: SummaryRow) -> list[ImagePair]:
    """Return victims of a system with reconstructions by the attack of `row`, for the first seed.

    Victims are sorted by their own leak ratio and picked at evenly spaced ranks from the highest to the median. If
    `row` is the worst case, each victim is shown with the attack that reached the lowest MSE on it.
    """
    seed = record.info["seeds"][0]
    values = of_system(record.per_image, key_of(row))
    values = values[values["seed"] == seed]
    if row.is_worst_case:
        blind = {plugin["label"] for plugin in record.info["plugins"]["attacks"] if plugin["blind"]}
        values = closest_attacks(values[~values["attack"].isin(blind)])
    else:
        values = values[values["attack"] == row.attack]
    ordered = values.assign(leak=image_leaks(values)).sort_values("leak", ascending=False, kind="stable")
    if ordered.empty:
        return []
    ranks = np.unique(np.linspace(0, (len(ordered) - 1) // 2, WORST_SHOWN).round().astype(int))
    sights = [_pair(record, row, one) for _, one in ordered.iloc[ranks].iterrows()]
    return [sight for sight in sights if sight is not None]


def _pair(record: RunRecord, row: SummaryRow, one: pd.Series) -> ImagePair | None:
    """A victim and its reconstruction; None if the run stored no images of the cell."""
    images = record.images.get(_image_key(record, row, str(one["attack"])))
    if images is None:
        return None
    index = int(one["image"])
    pair = [_picture(source[index]) for source in (record.images[victims_key(TEST_VICTIMS)], images)]
    gap = np.full((STRIP_GAP, pair[0].shape[1], 3), 255, dtype=np.uint8)
    return ImagePair(
        picture=np.concatenate([pair[0], gap, pair[1]]),
        image=index,
        attack=str(one["attack"]),
        leak_ratio=float(one["leak"]),
        ssim=float(one["ssim_zeropad"] if np.isnan(one["ssim"]) else one["ssim"]),
    )


def _image_key(record: RunRecord, row: SummaryRow, attack: str) -> str:
    system = {name: getattr(row, name) for name in GROUP}
    return image_key({**system, "attack": attack, "seed": record.info["seeds"][0], "victims": TEST_VICTIMS})


def _picture(image: np.ndarray) -> np.ndarray:
    """An image uint8 (c, h, w), grey or colour, as a picture (h, w, 3)."""
    height, width = image.shape[1:]
    return np.broadcast_to(image.transpose(1, 2, 0), (height, width, 3))


def side_by_side(images: list[np.ndarray]) -> np.ndarray:
    """Join pictures (h, w, 3) of equal height in a row with white gaps between them."""
    gap = np.full((images[0].shape[0], STRIP_GAP, 3), 255, dtype=np.uint8)
    return np.concatenate([part for image in images for part in (gap, image)][1:], axis=1)


def _png(canvas: np.ndarray) -> bytes:
    """A PNG of a picture (h, w, 3), enlarged without smoothing."""
    picture = Image.fromarray(canvas)
    picture = picture.resize((picture.width * STRIP_SCALE, picture.height * STRIP_SCALE), Image.Resampling.NEAREST)
    buffer = io.BytesIO()
    picture.save(buffer, format="PNG")
    return buffer.getvalue()
