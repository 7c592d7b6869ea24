"""The embedded data sets: patches of the photographs inside the scikit-image and scikit-learn wheels.

Nothing is downloaded. The class of a patch is the photograph it was cut from. Colour and brightness would give that
away, so patches are grey, and each has an exposure of its own, drawn at random: what tells photographs apart is texture
and shape, which self-supervised training has to learn. (A random tint would hide colours as well. But it differs
from patch to patch and survives augmentation, so a contrastive loss would learn the tint.)

A photograph is laid out in square tiles with a margin between them; every fifth tile
(along a diagonal pattern, so that test tiles lie all over the picture) belongs to the test split, the others
to training. Patches are cut inside tiles only, so no test patch shares a pixel with a training patch or
touches one. Patches of one tile overlap each other: the tile is their group. Near-constant patches (sky,
studio background) are dropped, and every photograph, which is the label, contributes about equally many.

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
    "brick": ("skimage.data", "brick.png"),
    "camera": ("skimage.data", "camera.png"),
    "chelsea": ("skimage.data", "chelsea.png"),
    "coins": ("skimage.data", "coins.png"),
    "grass": ("skimage.data", "grass.png"),
    "gravel": ("skimage.data", "gravel.png"),
    "ihc": ("skimage.data", "ihc.png"),
    "motorcycle": ("skimage.data", "motorcycle_left.png"),
    "page": ("skimage.data", "page.png"),
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
PER_CLASS = {  # at most: a small photograph has fewer patches with enough contrast
    "photos": {"train": 420, "test": 100},
    "photos-source": {"train": 700, "test": 170},
}
LARGEST_EXPOSURE = 1.4  # factor by which a patch is at most brighter, or darker, than in its photograph


def load_target(split: str) -> ImageSet:
    """``photos``: ten photographs, 4,144 training or 1,000 test patches of 32x32 pixels."""
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
        rng = np.random.default_rng([label, split == "test"])
        kept = np.sort(rng.permutation(len(patches))[: PER_CLASS[name][split]])
        images.append(_exposed_at_random(patches[kept], rng))
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


def _exposed_at_random(patches: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Grey uint8 (n, h, w) as grey colours uint8 (n, h, w, 3), every patch with an exposure of its own.

    No patch becomes lighter than white allows: what is cut off would be lost.
    """
    lightest = np.maximum(patches.max(axis=(1, 2), keepdims=True), 1)
    exposure = np.minimum(LARGEST_EXPOSURE ** rng.uniform(-1, 1, (len(patches), 1, 1)), 255 / lightest)
    grey = (patches * exposure).round().astype(np.uint8)
    return np.repeat(grey[..., None], 3, axis=3)


def _read(package: str, file: str) -> np.ndarray:
    with as_file(files(package) / file) as path, Image.open(path) as photograph:
        return np.asarray(photograph.convert("L"))


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
    """All patches uint8 (n, h, w) of `split` with enough contrast, and the tile each was cut from."""
    patches, tiles = [], []
    for tile, (top, left) in enumerate(tile_corners(photograph.shape[0], photograph.shape[1], split)):
        for y in range(top, top + TILE - PATCH + 1, STRIDE):
            for x in range(left, left + TILE - PATCH + 1, STRIDE):
                if photograph[y : y + PATCH, x : x + PATCH].std() >= MINIMUM_CONTRAST:
                    patches.append(photograph[y : y + PATCH, x : x + PATCH])
                    tiles.append(tile)
    return np.stack(patches), np.asarray(tiles)
