"""Data sets by name.

To add a data set, write a loader in a file beside this one, call it in :func:`load_split`, and list it in `NAMES`.
"""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path
from typing import Literal

from mocosfl_priv.config import DataConfig
from mocosfl_priv.data import image_folder, own_data, photos, torchvision_sets
from mocosfl_priv.data.examples import Naming
from mocosfl_priv.data.given import GIVEN_PREFIX
from mocosfl_priv.data.image_set import ImageSet
from mocosfl_priv.data.own_data import FOLDER_PREFIX
from mocosfl_priv.errors import ConfigurationError, unknown_name
from mocosfl_priv.runtime.files import user_path

Split = Literal["train", "test"]

BUILT_IN = (*photos.SETS, *torchvision_sets.NAMES)
NAMES = {
    "photos": "32x32 patches of six photographs; part of the scikit-image wheel, nothing to download",
    "photos-source": "patches of four other photographs: out-of-domain source data for photos",
    "textures": "grey 32x32 patches of ten photographs, which cannot be told apart by colour",
    "textures-source": "grey patches of four other photographs: out-of-domain source data for textures",
    "cifar10": "60,000 images, 10 classes, 32x32; through torchvision",
    "cifar100": "60,000 images, 100 classes, 32x32; through torchvision",
    "svhn": "99,289 house-number digits, 32x32; through torchvision",
    "stl10": "13,000 labelled images, 10 classes, 96x96; through torchvision",
    "torchvision:CLASS": "image sets of torchvision by their class, such as MNIST, Flowers102, CelebA:Smiling",
    "imagefolder:PATH": "your own images, in a folder per class, or with data.labels in one folder",
    "FILE": "your own arrays, tensors or image bytes: .npz, .npy, .pt, .h5, .parquet",
    "FOLDER": "what Hugging Face datasets saved on disk, or a folder of Parquet files",
    "FILE.py:FUNCTION": "a function of your own that returns arrays, tensors or a data set",
}


def load_split(name: str, split: Split, image_size: int = 32, path: Path | None = None) -> ImageSet:
    """Load one split of the data set `name`, as square RGB images of `image_size` pixels a side.

    path: for torchvision's data sets, their root folder, or a tree of class folders with the same images.
    Raises ConfigurationError when the name is unknown, or files are missing or unreadable.
    """
    if name.startswith(FOLDER_PREFIX):
        place = name.removeprefix(FOLDER_PREFIX)
        if not place.strip():
            raise ConfigurationError(f"{FOLDER_PREFIX} names no folder; write {FOLDER_PREFIX}PATH, with . for this one")
        return image_folder.load(user_path(place), split, image_size)
    if name in photos.SETS:
        if image_size != photos.PATCH:
            raise ConfigurationError(f"data.image_size: {name} has images of {photos.PATCH} pixels only")
        return photos.load(name, split)
    if name in torchvision_sets.NAMES:
        if path is not None and image_folder.is_class_tree(user_path(path)):
            return image_folder.load(user_path(path), split, image_size)
        return torchvision_sets.load(name, path, split, image_size)
    if _is_own(name):
        train, test = own_data.read_splits(name, image_size, root=path)
        return (train if split == "train" else test)[0]
    if name.startswith(GIVEN_PREFIX):
        raise ConfigurationError(
            f"data set {name[:24]}... was an object in Python: give it to Experiment.run(data=...)"
        )
    with suppress(OSError):  # the name may not be a valid path
        if user_path(name).exists():
            raise ConfigurationError(f"data set {name!r} is a path on this disk: write {FOLDER_PREFIX}{name}")
    raise unknown_name("data set", name, NAMES)


def _is_own(name: str) -> bool:
    """Whether `name` refers to a user's own data; a name of ours comes first, whatever lies in the current folder."""
    return name not in BUILT_IN and not name.startswith(GIVEN_PREFIX) and own_data.is_own(name)


def load_target(config: DataConfig) -> tuple[ImageSet, ImageSet]:
    """Load the training and the test images of the target data, with the labels and groups that `config` names.

    Raises ConfigurationError as :func:`load_split`; or when labels or groups that it names are not there.
    """
    if _is_own(config.dataset):
        naming = Naming.of_target(config)
        (train, _), (test, _) = own_data.read_splits(config.dataset, config.image_size, naming, config.path)
        return train, test
    for key in ("labels", "label_column", "group_column", "group_pattern"):
        if config.dataset in BUILT_IN and getattr(config, key) is not None:
            raise ConfigurationError(f"data.{key} is for data of one's own; {config.dataset} has its labels and groups")
    return (
        load_split(config.dataset, "train", config.image_size, config.path),
        load_split(config.dataset, "test", config.image_size, config.path),
    )


def load_source(config: DataConfig) -> ImageSet:
    """Load the training images of the source data; its groups are told as those of the target data if it has them.

    Raises ConfigurationError as :func:`load_split`.
    """
    naming = Naming.of_source(config)
    # a folder without groups has its classes and its division from its tree, so one split is read without the other
    if _is_own(config.source) and (naming.finds_groups or not config.source.startswith(FOLDER_PREFIX)):
        (train, _), _ = own_data.read_splits(
            config.source, config.image_size, naming, config.source_path, require_groups=False
        )
        return train
    return load_split(config.source, "train", config.image_size, config.source_path)
