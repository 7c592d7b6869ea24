"""The embedded data sets: patches of the photographs that the scikit-image and scikit-learn wheels contain.

Nothing is downloaded. The class of a patch is the photograph it was cut from. In ``photos`` the colours almost reveal
the class, which is enough for tests and attacks. In ``textures`` patches are grey, so that a model has to learn texture
and shape to tell the classes apart. (A random tint per patch would hide the colours too, but it survives augmentation,
so a contrastive loss would learn the tint. A random exposure would be removed by the first norm.)

A photograph is divided into square tiles with a margin between them. Every fifth tile belongs to the test split, the
others to training; test tiles form a diagonal pattern, so that they are spread over the picture. Patches are cut inside
tiles only, so a test patch neither overlaps nor touches a training patch. Patches of the same tile overlap and form a
group. Patches with hardly any contrast (sky, studio background) are dropped. From every photograph at most the same
number of patches is taken.

The right view of scikit-image's motorcycle is left out: it shows the scene of the left view, shifted by up to seventy
pixels, so test content would appear in the training split.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from importlib.resources import as_file, files

import numpy as np
import torch
from PIL import Image

from mocosfl_priv.data.image_set import ImageSet

PHOTOGRAPHS = {
    "astronaut": ("skimage.data", "astronaut.png"),
    "brick": ("skimage.data", "brick.png"),
    "camera": ("skimage.data", "camera.png"),
    "chelsea": ("skimage.data", "chelsea.png"),
    "china": ("sklearn.datasets.images", "china.jpg"),
    "coffee": ("skimage.data", "coffee.png"),
    "coins": ("skimage.data", "coins.png"),
    "flower": ("sklearn.datasets.images", "flower.jpg"),
    "grass": ("skimage.data", "grass.png"),
    "gravel": ("skimage.data", "gravel.png"),
    "hubble": ("skimage.data", "hubble_deep_field.jpg"),
    "ihc": ("skimage.data", "ihc.png"),
    "motorcycle": ("skimage.data", "motorcycle_left.png"),
    "page": ("skimage.data", "page.png"),
    "retina": ("skimage.data", "retina.jpg"),
    "rocket": ("skimage.data", "rocket.jpg"),
}

PATCH = 32
TILE = 48
MARGIN = 4
STRIDE = 4
TEST_EVERY = 5
MINIMUM_CONTRAST = 8.0  # standard deviation of the grey values, which are from 0 to 255


@dataclass(frozen=True)
class Patches:
    """One embedded data set.

    classes: keys of `PHOTOGRAPHS`. train, test: most patches of a class in each split; a small photograph may have
    fewer with enough contrast. grey: whether images are grey (luma in all three channels).
    """

    classes: tuple[str, ...]
    train: int = 700
    test: int = 170
    grey: bool = False


SOURCE = ("china", "flower", "hubble", "retina")
SETS = {
    "photos": Patches(("astronaut", "chelsea", "coffee", "ihc", "motorcycle", "rocket")),
    "photos-source": Patches(SOURCE),
    "textures": Patches(
        ("astronaut", "brick", "camera", "chelsea", "coins", "grass", "gravel", "ihc", "motorcycle", "page"),
        train=420, test=100, grey=True,
    ),
    "textures-source": Patches(SOURCE, grey=True),
}  # fmt: skip


@cache
def load(name: str, split: str) -> ImageSet:
    """Load a split ("train" or "test") of a data set in `SETS`, as images of 32x32 pixels.

    ``photos``: six photographs, 4,200 training and 1,020 test patches. ``textures``: ten photographs in grey, 4,144 and
    1,000 patches. ``photos-source`` and ``textures-source``: four other photographs, 2,800 and 680 patches.
    """
    chosen = SETS[name]
    images, labels, groups = [], [], []
    group_offset = 0
    for label, name_of_class in enumerate(chosen.classes):
        patches, tiles = _patches(_read(*PHOTOGRAPHS[name_of_class], chosen.grey), split)
        # The seed is fixed, so that the data set is the same in every run.
        most = chosen.test if split == "test" else chosen.train
        kept = np.sort(np.random.default_rng(label).permutation(len(patches))[:most])
        images.append(patches[kept])
        groups.append(tiles[kept] + group_offset)
        labels.append(np.full(len(kept), label))
        group_offset += int(tiles.max()) + 1
    return ImageSet(
        f"{name}/{split}",
        torch.from_numpy(np.concatenate(images)).permute(0, 3, 1, 2).contiguous(),
        torch.from_numpy(np.concatenate(labels)).long(),
        chosen.classes,
        torch.from_numpy(np.concatenate(groups)).long(),
    )


def _read(package: str, file: str, grey: bool) -> np.ndarray:
    with as_file(files(package) / file) as path, Image.open(path) as photograph:
        return np.asarray((photograph.convert("L") if grey else photograph).convert("RGB"))


def tile_corners(height: int, width: int, split: str) -> list[tuple[int, int]]:
    """Return the top-left corners (y, x) of the tiles of a `height` x `width` photograph that belong to `split`."""
    step = TILE + MARGIN
    return [
        (row * step, column * step)
        for row in range((height + MARGIN) // step)
        for column in range((width + MARGIN) // step)
        if ((row * 2 + column) % TEST_EVERY == 0) == (split == "test")
    ]


def _patches(photograph: np.ndarray, split: str) -> tuple[np.ndarray, np.ndarray]:
    """All patches of `split` with enough contrast, (n, 32, 32, 3), and the number of each patch's tile, (n,)."""
    grey = photograph.mean(axis=2)
    patches, tiles = [], []
    for tile, (top, left) in enumerate(tile_corners(grey.shape[0], grey.shape[1], split)):
        for y in range(top, top + TILE - PATCH + 1, STRIDE):
            for x in range(left, left + TILE - PATCH + 1, STRIDE):
                if grey[y : y + PATCH, x : x + PATCH].std() >= MINIMUM_CONTRAST:
                    patches.append(photograph[y : y + PATCH, x : x + PATCH])
                    tiles.append(tile)
    return np.stack(patches), np.asarray(tiles)
