"""Data sets by name.

To add a data set, write a loader in a file beside this one, call it in :func:`load_split`, and list it in `NAMES`.
"""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path
from typing import Literal

from mocosfl_priv.data import image_folder, photos, torchvision_sets
from mocosfl_priv.data.image_set import ImageSet
from mocosfl_priv.errors import ConfigurationError, unknown_name

Split = Literal["train", "test"]
FOLDER_PREFIX = "imagefolder:"

NAMES = {
    "photos": "32x32 patches of six photographs; part of the scikit-image wheel, nothing to download",
    "photos-source": "patches of four other photographs: out-of-domain source data for photos",
    "textures": "grey 32x32 patches of ten photographs, which cannot be told apart by colour",
    "textures-source": "grey patches of four other photographs: out-of-domain source data for textures",
    "cifar10": "60,000 images, 10 classes, 32x32; through torchvision",
    "cifar100": "60,000 images, 100 classes, 32x32; through torchvision",
    "svhn": "99,289 house-number digits, 32x32; through torchvision",
    "stl10": "13,000 labelled images, 10 classes, 96x96; through torchvision",
    "imagefolder:PATH": "your own images, in a folder per class",
}


def load_split(name: str, split: Split, image_size: int = 32, path: Path | None = None) -> ImageSet:
    """Load one split of the data set `name`, as square images of `image_size` pixels a side.

    path: for torchvision's data sets, their root folder, or a tree of class folders with the same images.
    Raises ConfigurationError when the name is unknown, or files are missing or unreadable.
    """
    if name.startswith(FOLDER_PREFIX):
        place = name.removeprefix(FOLDER_PREFIX)
        if not place.strip():
            raise ConfigurationError(f"{FOLDER_PREFIX} names no folder; write {FOLDER_PREFIX}PATH, with . for this one")
        return image_folder.load(_at_home(Path(place)), split, image_size)
    if name in photos.SETS:
        if image_size != photos.PATCH:
            raise ConfigurationError(f"data.image_size: {name} has images of {photos.PATCH} pixels only")
        return photos.load(name, split)
    if name in torchvision_sets.NAMES:
        if path is not None and image_folder.is_class_tree(path.expanduser()):
            return image_folder.load(path.expanduser(), split, image_size)
        return torchvision_sets.load(name, path, split, image_size)
    with suppress(OSError):  # the name may not be a valid path
        if _at_home(Path(name)).exists():
            raise ConfigurationError(f"data set {name!r} is a path on this disk: write {FOLDER_PREFIX}{name}")
    raise unknown_name("data set", name, NAMES)


def _at_home(path: Path) -> Path:
    """Replace ``~`` in `path` by the home folder; raises ConfigurationError for an unknown user (``~name``)."""
    try:
        return path.expanduser()
    except RuntimeError as error:
        raise ConfigurationError(f"{path}: {error}") from error
