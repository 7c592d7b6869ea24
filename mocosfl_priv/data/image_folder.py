"""``imagefolder:PATH``: any tree with one folder per class.

``PATH/train/<class>/*`` and ``PATH/test/<class>/*`` (or ``val``, ``valid``, ``validation``) are taken as they are.
A tree without such folders, ``PATH/<class>/*``, is divided: one image in five is test, chosen by a hash of its
relative path so that adding a file moves no other.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError

from mocosfl_priv.data.image_set import ImageSet
from mocosfl_priv.errors import ConfigurationError

TEST_FOLDERS = ("test", "val", "valid", "validation")
TEST_SHARE = 5
IMAGE_SUFFIXES = frozenset({".bmp", ".gif", ".jpeg", ".jpg", ".png", ".ppm", ".tif", ".tiff", ".webp"})


def load(root: Path, split: str, image_size: int) -> ImageSet:
    """Read one split of the tree at `root`; every image is resized and centre-cropped to `image_size`.

    Raises ConfigurationError for a missing tree, an empty class folder or a file that is no image.
    """
    if not root.is_dir():
        raise ConfigurationError(f"imagefolder: there is no folder {root}")
    folder, divide = _split_folder(root, split)
    classes = _class_folders(folder)
    if not classes:
        raise ConfigurationError(f"imagefolder: {folder} has no class folders")
    if folder != root and (root / "train").is_dir() and classes != (trained := _class_folders(root / "train")):
        differing = ", ".join(sorted(set(classes) ^ set(trained)))
        raise ConfigurationError(
            f"imagefolder: {folder} and {root / 'train'} have different class folders: {differing}"
        )
    paths: list[Path] = []
    labels: list[int] = []
    for label, class_name in enumerate(classes):
        found = sorted(path for path in (folder / class_name).rglob("*") if path.suffix.lower() in IMAGE_SUFFIXES)
        if not found:
            raise ConfigurationError(f"imagefolder: the class folder {folder / class_name} holds no images")
        if divide:
            found = [path for path in found if _is_test(path.relative_to(root)) == (split == "test")]
        paths += found
        labels += [label] * len(found)
    if not paths:
        raise ConfigurationError(f"imagefolder: {folder} has no images for its {split} split")
    images = np.stack([_read(path, image_size) for path in paths])
    return ImageSet.ungrouped(
        f"imagefolder:{root}/{split}",
        torch.from_numpy(images).permute(0, 3, 1, 2).contiguous(),
        torch.tensor(labels, dtype=torch.long),
        tuple(classes),
    )


def is_class_tree(path: Path) -> bool:
    """True if `path` looks like the tree that :func:`load` reads with its splits laid out."""
    train = path / "train"
    return train.is_dir() and any(entry.is_dir() for entry in train.iterdir())


def _class_folders(folder: Path) -> list[str]:
    return sorted(entry.name for entry in folder.iterdir() if entry.is_dir() and not entry.name.startswith("."))


def _split_folder(root: Path, split: str) -> tuple[Path, bool]:
    """Where `split` lies, and whether the tree must be divided to get it."""
    train = root / "train"
    if not train.is_dir():
        return root, True
    if split == "train":
        return train, False
    for name in TEST_FOLDERS:
        if (root / name).is_dir():
            return root / name, False
    raise ConfigurationError(f"imagefolder: {root} has train/ but none of {', '.join(t + '/' for t in TEST_FOLDERS)}")


def _is_test(relative: Path) -> bool:
    return hashlib.sha256(relative.as_posix().encode()).digest()[0] % TEST_SHARE == 0


def _read(path: Path, image_size: int) -> np.ndarray:
    try:
        with Image.open(path) as image:
            return fit(image.convert("RGB"), image_size)
    except (UnidentifiedImageError, OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        reason = "not an image" if isinstance(error, UnidentifiedImageError) else str(error)
        raise ConfigurationError(f"imagefolder: {path} cannot be read: {reason}") from error


def fit(image: Image.Image, size: int) -> np.ndarray:
    """Resize the shorter side to `size` and crop the centre: uint8 (size, size, 3)."""
    width, height = image.size
    if (width, height) != (size, size):
        scale = size / min(width, height)
        image = image.resize(
            (max(size, round(width * scale)), max(size, round(height * scale))), Image.Resampling.BILINEAR
        )
        left, top = (image.width - size) // 2, (image.height - size) // 2
        image = image.crop((left, top, left + size, top + size))
    return np.asarray(image)
