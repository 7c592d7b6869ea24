"""``imagefolder:PATH``: any tree with one folder per class.

``PATH/train/<class>/*`` and ``PATH/test/<class>/*`` are taken as they are, under the names that people give them
(``Training``, ``valid``, ``test_images``; :func:`split_named`), also where they lie in the only folder below ``PATH``.
A tree without such folders, ``PATH/<class>/*``, is divided: one image in five is test, chosen by a hash of its
relative path so that adding a file moves no other. Images without class folders are read without labels. A tree that
can be understood in two ways is refused, with what was found.
"""

from __future__ import annotations

import hashlib
import re
import unicodedata
from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch

from mocosfl_priv.data.image_set import ImageSet
from mocosfl_priv.device.pictures import ARRAYS, LEFT, PictureError, Reading, find, fit, is_litter, is_picture, read
from mocosfl_priv.errors import ConfigurationError

__all__ = ["Layout", "fit", "is_class_tree", "lay_out", "load", "split_named"]

SPLIT_NAME = re.compile(r"(train|training|test|testing|val|valid|validation)[ _-]*(set|data|images?|imgs?|split)?")
TRAIN_WORDS, TEST_WORDS, VALIDATION_WORDS = ("train", "training"), ("test", "testing"), ("val", "valid", "validation")
TEST_SHARE = 5
UNLABELLED = "unlabelled"  # the class of images that lie in no class folder
DEEPEST = 4  # folders in folders, each the only one, that a tree is looked for in
NAMED = 8  # folders that a message names


@dataclass(frozen=True)
class Layout:
    """Where the splits of a tree lie.

    train, test: their folders; the same one where the tree must be divided. note: what a reader should know of it.
    """

    train: Path
    test: Path
    note: str = ""

    @property
    def divided(self) -> bool:
        """Whether one tree of classes has to serve as both splits."""
        return self.train == self.test


def split_named(name: str) -> str | None:
    """Which split a folder of this name is: "train", "test" or "validation"; None for none."""
    match = SPLIT_NAME.fullmatch(name.lower())
    if match is None:
        return None
    word = match[1]
    return "train" if word in TRAIN_WORDS else "test" if word in TEST_WORDS else "validation"


def load(root: Path, split: str, image_size: int) -> ImageSet:
    """Read one split of the tree at `root`; every image is resized and centre-cropped to `image_size`.

    Raises ConfigurationError for a missing tree, one that can be understood in two ways, an empty class folder or a
    file that cannot be read as a picture.
    """
    try:
        return _load(root, split, image_size)
    except (PictureError, OSError) as error:
        raise ConfigurationError(f"imagefolder: {error}") from error


def _load(root: Path, split: str, image_size: int) -> ImageSet:
    if not root.is_dir():
        raise ConfigurationError(f"imagefolder: {_no_folder(root)}")
    layout = lay_out(root)
    folder = layout.train if split == "train" else layout.test
    classes = _classes(folder)
    trained = _classes(layout.train)
    if classes.keys() != trained.keys():
        differing = ", ".join(sorted(classes.keys() ^ trained.keys()))
        raise ConfigurationError(f"imagefolder: {folder} and {layout.train} have different class folders: {differing}")
    reading = Reading()
    paths: list[Path] = []
    labels: list[int] = []
    for label, place in enumerate(classes.values()):
        found = find(place, reading)
        if not found:
            holds = f"; {reading.text}" if reading.text else ""
            raise ConfigurationError(f"imagefolder: the class folder {place} holds no images{holds}")
        if layout.divided:
            found = [path for path in found if _is_test(path.relative_to(folder)) == (split == "test")]
        paths += found
        labels += [label] * len(found)
    if not paths:
        raise ConfigurationError(f"imagefolder: {folder} has no images for its {split} split")
    images = np.stack([read(path, image_size, reading) for path in paths])
    reading.require_whole_range()
    if folder not in classes.values():
        reading.skipped += Counter({LEFT: _litter_in(folder), "beside the class folders": _pictures_in(folder)})
    read_set = ImageSet.ungrouped(
        f"imagefolder:{root}/{split}",
        torch.from_numpy(images).permute(0, 3, 1, 2).contiguous(),
        torch.tensor(labels, dtype=torch.long),
        tuple(classes),
    )
    return replace(read_set, read=_joined(reading.text, layout.note, _alike(list(classes))))


def lay_out(root: Path, depth: int = 0) -> Layout:
    """Find the splits or classes of the tree at `root`; raises ConfigurationError with what was found instead."""
    folders = _folders(root)
    train, test, validation = (
        [path for path in folders if split_named(path.name) == split] for split in ("train", "test", "validation")
    )
    others = [path for path in folders if split_named(path.name) is None]
    evaluated = test or validation
    if len(train) > 1 or len(evaluated) > 1:
        twice = train if len(train) > 1 else evaluated
        raise ConfigurationError(f"imagefolder: {root} holds {_names(twice)}, which mean the same split: keep one")
    if train and evaluated:
        if others and all(_is_plain(path) for path in folders):
            raise ConfigurationError(
                f"imagefolder: {root} holds {_names(folders)}, all with pictures and no folders: splits without "
                "labels, or classes? Move the others away, or put all into a folder per split"
            )
        unused = [*others, *(validation if test else [])]
        note = f"not read: {_names(unused)} in {root}" if unused else ""
        return Layout(train[0], evaluated[0], _joined(_where(train[0], evaluated[0], depth), note))
    if (train or evaluated) and not (others and all(_is_plain(path) for path in folders)):  # else a class of this name
        missing = "none of test/, val/, valid/, validation/" if train else "no train/"
        raise ConfigurationError(f"imagefolder: {root} has {_names(train or evaluated)} but {missing}")
    inner = [path for path in folders if {"train"} < {split_named(below.name) for below in _folders(path)} - {None}]
    if len(folders) == 1 and not _pictures_in(root) and not _is_plain(folders[0]) and depth < DEEPEST:
        below = lay_out(folders[0], depth + 1)
        if not below.divided:
            return below
        raise ConfigurationError(
            f"imagefolder: {root} holds one folder only, {folders[0].name}/, and that holds "
            f"{_names(_folders(folders[0]))}: if these are the classes, name {folders[0]}; if {folders[0].name} is the "
            "only class, put its images straight into it"
        )
    if inner:
        raise ConfigurationError(
            f"imagefolder: {root} holds {_names(inner)}, and the splits lie in there: name the folder that holds "
            "train/ and test/, with class folders in each"
        )
    return Layout(root, root, "" if folders else "no class folders")


def is_class_tree(path: Path) -> bool:
    """True if `path` looks like the tree that :func:`load` reads with its splits laid out."""
    train = [entry for entry in _folders(path) if split_named(entry.name) == "train"] if path.is_dir() else []
    return any(_folders(folder) for folder in train)


def _no_folder(root: Path) -> str:
    if root.is_file() and root.suffix.lower() in ARRAYS:
        return f"{root} is no folder: arrays and tensors are not read; write each picture to a file in a class folder"
    return f"{root} is a file, and no folder" if root.exists() else f"there is no folder {root}"


def _classes(folder: Path) -> dict[str, Path]:
    """Class folders by name, in the order of names; the folder itself where it holds pictures and no folders."""
    folders = _folders(folder)
    # a Mac writes some letters as two, other systems as one
    classes = {unicodedata.normalize("NFC", path.name): path for path in folders}
    if len(classes) < len(folders):
        raise ConfigurationError(f"imagefolder: {folder} holds two class folders of one name: {_names(folders)}")
    if not classes and not _pictures_in(folder):
        raise ConfigurationError(f"imagefolder: {folder} has no class folders, and {_holds(folder)}")
    return dict(sorted(classes.items())) or {UNLABELLED: folder}


def _folders(folder: Path) -> list[Path]:
    try:
        return sorted(entry for entry in folder.iterdir() if entry.is_dir() and not is_litter(entry.name))
    except OSError as error:
        raise PictureError(f"{folder} cannot be opened: {error.strerror}") from error


def _pictures_in(folder: Path) -> int:
    """How many pictures lie in `folder` itself."""
    return sum(not is_litter(path.name) and path.is_file() and is_picture(path) for path in folder.iterdir())


def _litter_in(folder: Path) -> int:
    return sum(is_litter(path.name) for path in folder.iterdir())


def _alike(names: list[str]) -> str:
    """What to say of classes that another system would take for one; letters of a script may be meant so."""
    lower = Counter(name.casefold() for name in names)
    alike = [name for name in names if lower[name.casefold()] > 1]
    return f"names of classes differ by upper and lower case only: {', '.join(alike[:NAMED])}" if alike else ""


def _is_plain(folder: Path) -> bool:
    """Whether it holds pictures and no folders: a class, and nothing else."""
    return not _folders(folder) and _pictures_in(folder) > 0


def _holds(folder: Path) -> str:
    reading = Reading()
    find(folder, reading)
    return f"no images; {reading.text}" if reading.text else "no images"


def _where(train: Path, test: Path, depth: int) -> str:
    if depth == 0 and train.name == "train":
        return ""
    return f"read from {train} and {test.name}/"


def _joined(*parts: str) -> str:
    return "; ".join(part for part in parts if part)


def _names(folders: list[Path]) -> str:
    more = f" and {len(folders) - NAMED} more" if len(folders) > NAMED else ""
    return ", ".join(f"{path.name}/" for path in folders[:NAMED]) + more


def _is_test(relative: Path) -> bool:
    return hashlib.sha256(relative.as_posix().encode("utf-8", "surrogateescape")).digest()[0] % TEST_SHARE == 0
