"""The embedded data sets: patches of the photographs inside the scikit-image and scikit-learn wheels.

Nothing is downloaded. A photograph is laid out in square tiles with a margin between them; every fifth tile
(along a diagonal pattern, so that test tiles lie all over the picture) belongs to the test split, the others
to training. Patches are cut inside tiles only, so no test patch shares a pixel with a training patch or
touches one. Patches of one tile overlap each other: the tile is their group. Near-constant patches (sky,
studio background) are dropped, and every photograph, which is the label, contributes equally many.

The right view of scikit-image's motorcycle is left out: it shows the scene of the left view shifted by up to
seventy pixels, which would carry test content into training.
"""

from __future__ import annotations

from functools import cache
from importlib.resources import as_file, files

import numpy as np
import torch
from PIL import Image

from mocosfl_priv.data.image_set import ImageSet

TARGET_PHOTOGRAPHS = {
    "astronaut": ("skimage.data", "astronaut.png"),
    "chelsea": ("skimage.data", "chelsea.png"),
    "coffee": ("skimage.data", "coffee.png"),
    "ihc": ("skimage.data", "ihc.png"),
    "motorcycle": ("skimage.data", "motorcycle_left.png"),
    "rocket": ("skimage.data", "rocket.jpg"),
}
SOURCE_PHOTOGRAPHS = {
    "china": ("sklearn.datasets.images", "china.jpg"),
    "flower": ("sklearn.datasets.images", "flower.jpg"),
    "hubble": ("skimage.data", "hubble_deep_field.jpg"),
    "retina": ("skimage.data", "retina.jpg"),
}

PATCH = 32
TILE = 48
MARGIN = 4
STRIDE = 4
TEST_EVERY = 5
MINIMUM_CONTRAST = 8.0  # standard deviation of the grey values, of 255
PER_CLASS = {"train": 700, "test": 170}


def load_target(split: str) -> ImageSet:
    """``photos``: six photographs, 4,200 training or 1,020 test patches of 32x32 pixels."""
    return _load("photos", split)


def load_source(split: str) -> ImageSet:
    """``photos-source``: four other photographs, for the out-of-domain roles; 2,800 or 680 patches."""
    return _load("photos-source", split)


@cache
def _load(name: str, split: str) -> ImageSet:
    photographs = TARGET_PHOTOGRAPHS if name == "photos" else SOURCE_PHOTOGRAPHS
    images, labels, groups = [], [], []
    group_offset = 0
    for label, (package, file) in enumerate(photographs.values()):
        patches, tiles = _patches(_read(package, file), split)
        # Which patches are kept is drawn once and for all: the data set is the same in every run.
        kept = np.sort(np.random.default_rng(label).permutation(len(patches))[: PER_CLASS[split]])
        images.append(patches[kept])
        groups.append(tiles[kept] + group_offset)
        labels.append(np.full(len(kept), label))
        group_offset += int(tiles.max()) + 1
    return ImageSet(
        f"{name}/{split}",
        torch.from_numpy(np.concatenate(images)).permute(0, 3, 1, 2).contiguous(),
        torch.from_numpy(np.concatenate(labels)).long(),
        tuple(photographs),
        torch.from_numpy(np.concatenate(groups)).long(),
    )


def _read(package: str, file: str) -> np.ndarray:
    with as_file(files(package) / file) as path, Image.open(path) as photograph:
        return np.asarray(photograph.convert("RGB"))


def tile_corners(height: int, width: int, split: str) -> list[tuple[int, int]]:
    """Top-left corners of the tiles of a `height` x `width` photograph that belong to `split`."""
    step = TILE + MARGIN
    return [
        (row * step, column * step)
        for row in range((height + MARGIN) // step)
        for column in range((width + MARGIN) // step)
        if ((row * 2 + column) % TEST_EVERY == 0) == (split == "test")
    ]


def _patches(photograph: np.ndarray, split: str) -> tuple[np.ndarray, np.ndarray]:
    """All patches of `split` with enough contrast, and the tile each was cut from."""
    grey = photograph.mean(axis=2)
    patches, tiles = [], []
    for tile, (top, left) in enumerate(tile_corners(grey.shape[0], grey.shape[1], split)):
        for y in range(top, top + TILE - PATCH + 1, STRIDE):
            for x in range(left, left + TILE - PATCH + 1, STRIDE):
                if grey[y : y + PATCH, x : x + PATCH].std() >= MINIMUM_CONTRAST:
                    patches.append(photograph[y : y + PATCH, x : x + PATCH])
                    tiles.append(tile)
    return np.stack(patches), np.asarray(tiles)
