"""``imagefolder:PATH``: a tree with one folder per class.

``PATH/train/<class>/*`` and ``PATH/test/<class>/*`` are the splits. Other common names of split folders, such as
``Training``, ``valid`` or ``test_images``, are recognised too (:func:`split_named`). Split folders may also lie in the
only folder below ``PATH``. A tree without split folders, ``PATH/<class>/*``, is divided: about one image in five is a
test image, chosen by a hash of its relative path, so that adding a file does not move others between the splits. Images
without class folders are read without labels. A tree whose layout is ambiguous is refused, with a message that says
what was found.
"""

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from mocosfl_priv.data.examples import TRAIN, UNLABELLED, WHOLE, Examples, image_sets, is_test
from mocosfl_priv.data.image_set import ImageSet
from mocosfl_priv.data.pixel_arrays import stacked
from mocosfl_priv.device.pictures import (
    ARRAYS,
    LEFT,
    PictureError,
    Reading,
    Size,
    find,
    fit,
    is_litter,
    is_picture,
    read,
)
from mocosfl_priv.errors import ConfigurationError

__all__ = ["Layout", "examples", "fit", "is_class_tree", "lay_out", "load", "require_distinct", "split_named"]

UNREAD = (".mat", ".pkl")  # arrays in files that may run code, or that need another library
SPLIT_NAME = re.compile(r"(train|training|test|testing|val|valid|validation)[ _-]*(set|data|images?|imgs?|split)?")
TRAIN_WORDS, TEST_WORDS, VALIDATION_WORDS = ("train", "training"), ("test", "testing"), ("val", "valid", "validation")
DEEPEST = 4  # at most so many nested folders, each the only one in its parent, are searched for a tree
NAMED = 8  # at most so many folders are named in a message


@dataclass(frozen=True)
class Layout:
    """The folders of the splits of a tree.

    train, test: the folders of class folders; the same folder if the tree has no splits and must be divided.
    note: a remark about the layout for the user; may be empty.
    """

    train: Path
    test: Path
    note: str = ""

    @property
    def divided(self) -> bool:
        """Whether the tree has no splits, so that its images are divided between training and test."""
        return self.train == self.test


def split_named(name: str) -> str | None:
    """Return the split that a folder name stands for: "train", "test" or "validation"; None if it stands for none."""
    match = SPLIT_NAME.fullmatch(name.lower())
    if match is None:
        return None
    word = match[1]
    return "train" if word in TRAIN_WORDS else "test" if word in TEST_WORDS else "validation"


def require_distinct(splits: Mapping[str, str | None], where: str) -> None:
    """Raise ConfigurationError where two names stand for the same split, of which one would be lost."""
    for split in set(splits.values()):
        names = [name for name, other in splits.items() if other == split]
        if len(names) > 1:
            raise ConfigurationError(f"{where}: {' and '.join(names)} name the same split, {split}; join them")


def load(root: Path, split: str, image_size: int) -> ImageSet:
    """Read one split ("train" or "test") of the tree at `root`.

    Every image is resized and centre-cropped to `image_size` pixels a side. Raises ConfigurationError for a missing
    tree, an ambiguous layout, an empty class folder, or a file that cannot be read as a picture.
    """
    return image_sets(examples(root, (split,), image_size), f"imagefolder:{root}")[split][0]


def examples(root: Path, splits: Sequence[str], size: Size, whole: bool = False) -> dict[str, Examples]:
    """Read `splits`, of "train" and "test", of the tree at `root`.

    Args:
        root: the tree.
        splits: which images; a tree without splits is divided.
        size: pixels per side, (height, width), or None for as large as they are.
        whole: read all images of a tree without splits as one (`WHOLE`) instead.

    Raises:
        ConfigurationError: see :func:`load`.

    """
    try:
        if not root.is_dir():
            raise ConfigurationError(f"imagefolder: {_no_folder(root)}")
        layout = lay_out(root)
        wanted = (WHOLE,) if whole and layout.divided else splits
        return {split: _read(root, layout, split, size) for split in wanted}
    except (PictureError, OSError) as error:
        raise ConfigurationError(f"imagefolder: {error}") from error


def _read(root: Path, layout: Layout, split: str, size: Size) -> Examples:
    folder = layout.train if split == TRAIN else layout.test
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
        if layout.divided and split != WHOLE:
            found = [path for path in found if is_test(path.relative_to(folder).as_posix()) == (split != TRAIN)]
        paths += found
        labels += [label] * len(found)
    if not paths:
        raise ConfigurationError(f"imagefolder: {folder} has no images for its {split} split")
    images = stacked([read(path, size, reading) for path in paths], f"imagefolder:{root}")
    reading.require_whole_range()
    labelled = folder not in classes.values()
    if labelled:
        reading.skipped += Counter(
            {LEFT: _litter_in(folder), "beside the class folders": sum(1 for _ in _pictures(folder))}
        )
    names = tuple(path.relative_to(root).as_posix() for path in paths)
    return Examples(
        images,
        reading,
        labels=np.array(labels) if labelled else None,
        class_names=tuple(classes) if labelled else None,
        names=names,
        notes=tuple(filter(None, (layout.note, _alike(list(classes))))),
    )


def lay_out(root: Path, depth: int = 0) -> Layout:
    """Find the split folders or class folders of the tree at `root`.

    depth: how many folders above `root` have been searched. Raises ConfigurationError, which says what was found, for
    an ambiguous or incomplete layout.
    """
    folders = _folders(root)
    train, test, validation = (
        [path for path in folders if split_named(path.name) == split] for split in ("train", "test", "validation")
    )
    others = [path for path in folders if split_named(path.name) is None]
    evaluated = test or validation
    if len(train) > 1 or len(evaluated) > 1:
        twice = train if len(train) > 1 else evaluated
        raise ConfigurationError(f"imagefolder: {root} holds {_names(twice)}, which mean the same split; keep one")
    if train and evaluated:
        if others and all(_is_plain(path) for path in folders):
            raise ConfigurationError(
                f"imagefolder: {root} holds {_names(folders)}, all with pictures and no folders. Are these splits "
                "without labels, or classes? If splits, move the other folders away; if classes, put them into a "
                "folder per split"
            )
        unused = [*others, *(validation if test else [])]
        note = f"not read: {_names(unused)} in {root}" if unused else ""
        return Layout(train[0], evaluated[0], _joined(_where(train[0], evaluated[0], depth), note))
    # folders that all hold only pictures are classes, even if one has the name of a split
    if (train or evaluated) and not (others and all(_is_plain(path) for path in folders)):
        missing = "none of test/, val/, valid/, validation/" if train else "no train/"
        raise ConfigurationError(f"imagefolder: {root} has {_names(train or evaluated)} but {missing}")
    inner = [path for path in folders if {"train"} < {split_named(below.name) for below in _folders(path)} - {None}]
    if len(folders) == 1 and not any(_pictures(root)) and not _is_plain(folders[0]) and depth < DEEPEST:
        below = lay_out(folders[0], depth + 1)
        if not below.divided:
            return below
        raise ConfigurationError(
            f"imagefolder: {root} holds one folder only, {folders[0].name}/, and that holds "
            f"{_names(_folders(folders[0]))}. If these are the classes, use the path {folders[0]}; if "
            f"{folders[0].name} is the only class, move its images directly into it"
        )
    if inner:
        raise ConfigurationError(
            f"imagefolder: {root} holds {_names(inner)}, which hold the splits; use the path of a single folder that "
            "holds train/ and test/, with class folders in each"
        )
    return Layout(root, root, "" if folders else "no class folders")


def is_class_tree(path: Path) -> bool:
    """Whether `path` holds a training split with class folders, so that :func:`load` can read it."""
    train = [entry for entry in _folders(path) if split_named(entry.name) == "train"] if path.is_dir() else []
    return any(_folders(folder) for folder in train)


def _no_folder(root: Path) -> str:
    if root.is_file() and root.suffix.lower() in UNREAD:
        return f"{root} is no folder, and {root.suffix} files are not read: save the arrays as .npz"
    if root.is_file() and root.suffix.lower() in ARRAYS:
        return f"{root} holds arrays or tensors and is no folder: leave {root.suffix} files without imagefolder:"
    return f"{root} is a file, not a folder" if root.exists() else f"there is no folder {root}"


def _classes(folder: Path) -> dict[str, Path]:
    """Class folders by name, in the order of names; the folder itself if it holds pictures but no folders."""
    folders = _folders(folder)
    # macOS stores some letters as two code points, other systems as one; NFC makes them equal
    classes = {unicodedata.normalize("NFC", path.name): path for path in folders}
    if len(classes) < len(folders):
        raise ConfigurationError(f"imagefolder: {folder} holds two class folders with the same name: {_names(folders)}")
    if not classes and not any(_pictures(folder)):
        raise ConfigurationError(f"imagefolder: {folder} has no class folders, and {_holds(folder)}")
    return dict(sorted(classes.items())) or {UNLABELLED: folder}


def _folders(folder: Path) -> list[Path]:
    try:
        return sorted(entry for entry in folder.iterdir() if entry.is_dir() and not is_litter(entry.name))
    except OSError as error:
        raise PictureError(f"{folder} cannot be opened: {error.strerror}") from error


def _pictures(folder: Path) -> Iterator[Path]:
    """The pictures in `folder` itself, not in its subfolders, each looked for only when it is asked for."""
    return (path for path in folder.iterdir() if not is_litter(path.name) and path.is_file() and is_picture(path))


def _litter_in(folder: Path) -> int:
    return sum(is_litter(path.name) for path in folder.iterdir())


def _alike(names: list[str]) -> str:
    """What to say of classes that another system would take for one; letters of a script may be meant so."""
    lower = Counter(name.casefold() for name in names)
    alike = [name for name in names if lower[name.casefold()] > 1]
    return f"names of classes differ by upper and lower case only: {', '.join(alike[:NAMED])}" if alike else ""


def _is_plain(folder: Path) -> bool:
    """Whether `folder` holds pictures and no folders, and so can only be a class folder."""
    return not _folders(folder) and any(_pictures(folder))


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
