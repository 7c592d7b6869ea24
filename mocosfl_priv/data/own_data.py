"""The one door for a user's own images, whatever form they have.

A source is a path, a reference or a Python object:

- ``imagefolder:PATH``, or in Python the path of a folder: a folder per class, or a flat folder with a CSV of labels;
- the path of a ``.npy``, ``.npz``, ``.pt``, HDF5 or Parquet file, or of a folder that Hugging Face `datasets` saved;
- ``torchvision:CLASS``;
- ``file.py:function`` or ``package.module:function``, which returns an object;
- an array, a tensor, a data set or a mapping of these, see :func:`mocosfl_priv.data.python_objects.from_object`.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from mocosfl_priv.data import array_files, image_folder, torchvision_sets
from mocosfl_priv.data.examples import (
    TEST,
    TRAIN,
    WHOLE,
    Examples,
    Naming,
    NoGroupsError,
    ReadingReport,
    divided,
    groups_by_pattern,
    groups_of,
    image_sets,
    joined,
    labels_of,
    report_on,
)
from mocosfl_priv.data.image_set import ImageSet
from mocosfl_priv.data.image_tables import PARQUET, is_table, read_table
from mocosfl_priv.data.label_files import read_labelled_folder
from mocosfl_priv.data.pixel_arrays import with_channels
from mocosfl_priv.data.python_objects import from_object
from mocosfl_priv.device.pictures import PictureError, Size
from mocosfl_priv.errors import ConfigurationError
from mocosfl_priv.runtime.files import user_path
from mocosfl_priv.runtime.imports import load_function, one_line, referenced_file

FOLDER_PREFIX, TORCHVISION_PREFIX = "imagefolder:", "torchvision:"
SUFFIXES = (*array_files.SUFFIXES, PARQUET)


def is_own(name: str) -> bool:
    """Whether the text `name` refers to a user's own data: a path of a kind that is read, or a reference."""
    if name.startswith((FOLDER_PREFIX, TORCHVISION_PREFIX)) or _is_function(name):
        return True
    if name.lower().endswith(SUFFIXES):
        return True
    with suppress(OSError):  # the name may not be a valid path
        return is_table(user_path(name))
    return False


def read_images(
    source: Any,
    *,
    size: Size = None,
    channels: int | None = None,
    labels: Any = None,
    group: Any = None,
    naming: Naming | None = None,
    split: str = WHOLE,
    root: Path | None = None,
) -> tuple[ImageSet, ReadingReport]:
    """Read images of any kind; nothing is resized unless `size` says so.

    Args:
        source: see the module.
        size: pixels per side, or (height, width), to which images are resized and centre-cropped; None leaves them as
            they are, and they must then all have one size.
        channels: 1 for grey, 3 for RGB; None for grey where all images are grey, else RGB.
        labels: one label per image, if the source has none; or the path of a CSV file beside a flat folder.
        group: the name of a group per image, (n,); or the column that holds it.
        naming: further names of columns, and a pattern for groups.
        split: "train" or "test"; empty for all images.
        root: torchvision's root folder.

    Returns:
        The images, uint8 (n, channels, height, width), with labels and groups; and what was read. Without labels all
        are of one class.

    Raises:
        ConfigurationError: there is no such source, or its images are damaged, ambiguous, of several sizes, or have
            values outside their range.

    """
    naming = naming or Naming()
    if isinstance(labels, str | Path):
        naming, labels = replace(naming, labels=Path(labels)), None
    if isinstance(group, str):
        naming, group = replace(naming, group_column=group), None
    if isinstance(source, ImageSet):
        return _converted(source, channels)
    if labels is not None and hasattr(source, "shape"):  # their number tells three grey images from one with colours
        source, labels = (source, labels), None
    where, found = _open(source, size, naming, root, split)
    if not split:
        part = joined(found, where)
    elif set(found) == {split}:
        part = found[split]
    else:
        train, test = divided(found, where)
        part = train if split == TRAIN else test
    n = len(part.images)
    if labels is not None:
        part = replace(part, labels=labels_of(labels, n, where))
    if group is not None:
        part = replace(part, groups=groups_of(group, n, where))
    return image_sets({split: part}, where, channels)[split]


def read_splits(
    source: Any,
    size: int,
    naming: Naming | None = None,
    root: Path | None = None,
    require_groups: bool = True,
) -> tuple[tuple[ImageSet, ReadingReport], tuple[ImageSet, ReadingReport]]:
    """Read training and test images as RGB, `size` pixels a side; a source without splits is divided.

    Args:
        source: see the module.
        size: pixels per side.
        naming: names of columns, a file of labels, a pattern for groups.
        root: torchvision's root folder.
        require_groups: whether groups that `naming` asks for must be there; otherwise their lack is remarked.

    Returns:
        The training images and the test images, each with what was read.

    Raises:
        ConfigurationError: as :func:`read_images`; or the source cannot be divided.

    """
    naming = naming or Naming()
    note = ""
    try:
        where, found = _open(source, size, naming, root, None)
    except NoGroupsError:
        if require_groups:
            raise
        where, found = _open(source, size, replace(naming, group_column=None, group_pattern=None), root, None)
        note = "groups are not named here"
    train, test = divided(found, where)
    if note:
        train = replace(train, notes=(*train.notes, note))
    sets = image_sets({TRAIN: train, TEST: test}, where)
    return sets[TRAIN], sets[TEST]


def _open(
    source: Any, size: Size, naming: Naming, root: Path | None, split: str | None
) -> tuple[str, dict[str, Examples]]:
    """The name of a source, and its examples by split.

    split: which images of a folder are wanted; None for training and test, divided if need be.
    """
    with _refusing():
        source = _named(source)
        where = source if isinstance(source, str) else "given"
        if where.startswith(FOLDER_PREFIX):
            where = f"{FOLDER_PREFIX}{user_path(where.removeprefix(FOLDER_PREFIX))}"
        if isinstance(source, str):
            found = _found(source, where, size, naming, root, split)
        else:
            found = from_object(source, where, size, naming)
    if naming.labels is not None and not where.startswith(FOLDER_PREFIX):
        raise ConfigurationError(f"data.labels: a file of labels belongs to imagefolder:PATH, not to {where}")
    if naming.group_pattern is not None:
        found = {
            name: replace(part, groups=groups_by_pattern(part.names, naming.group_pattern, where))
            for name, part in found.items()
        }
    if naming.group_column is not None and any(part.groups is None for part in found.values()):
        raise NoGroupsError(f"data.group_column: {where} has no column {naming.group_column!r}")
    if naming.label_column is not None and any(part.labels is None for part in found.values()):
        raise ConfigurationError(f"data.label_column: {where} has no column {naming.label_column!r}")
    return where, found


def _named(source: Any) -> Any:
    """A path as text, that of a folder of pictures with its prefix; any other source as it is."""
    if not isinstance(source, str | Path) or str(source).startswith((FOLDER_PREFIX, TORCHVISION_PREFIX)):
        return source
    path = user_path(source)
    return f"{FOLDER_PREFIX}{source}" if path.is_dir() and not is_table(path) else str(source)


def _found(
    source: str, where: str, size: Size, naming: Naming, root: Path | None, split: str | None
) -> dict[str, Examples]:
    if source.startswith(FOLDER_PREFIX):
        return _folder(source, size, naming, split)
    if source.startswith(TORCHVISION_PREFIX):
        return torchvision_sets.examples(source.removeprefix(TORCHVISION_PREFIX), root, size, naming)
    if _is_function(source):
        return _called(source, size, naming)
    path = user_path(source)
    if path.suffix.lower() in array_files.SUFFIXES:
        with array_files.opened(path) as data:
            return from_object(data, where, size, naming)
    if is_table(path):
        return read_table(path, size, naming)
    if not path.exists():
        raise ConfigurationError(f"there is no file {path}")
    raise ConfigurationError(f"{path} is of no kind that is read: {', '.join(SUFFIXES)}, or a folder")


def _folder(source: str, size: Size, naming: Naming, split: str | None) -> dict[str, Examples]:
    place = source.removeprefix(FOLDER_PREFIX)
    if not place.strip():
        raise ConfigurationError(f"{FOLDER_PREFIX} names no folder; write {FOLDER_PREFIX}PATH, with . for this one")
    folder = user_path(place)
    if naming.labels is not None:
        return read_labelled_folder(folder, naming.labels, size, naming)
    if naming.group_column is not None or naming.label_column is not None:
        key = "group_column" if naming.group_column is not None else "label_column"
        raise NoGroupsError(f"data.{key}: {source} has no columns; name a CSV file in data.labels")
    whole = split == WHOLE or naming.group_pattern is not None  # whoever asked for one split divides it by groups
    return image_folder.examples(folder, (split,) if split else (TRAIN, TEST), size, whole)


def _is_function(name: str) -> bool:
    """Whether `name` refers to a function of a file, whether or not it is there, or of a module that is there."""
    place, _, function = name.rpartition(":")
    return (place.endswith(".py") and function.isidentifier()) or referenced_file(name) is not None


def _called(reference: str, size: Size, naming: Naming) -> dict[str, Examples]:
    """What a user's function returns: called once, or once per split where it has a parameter `split`."""
    function = load_function(reference)
    try:
        parameters = inspect.signature(function).parameters
    except (TypeError, ValueError) as error:
        raise ConfigurationError(f"{reference}: it cannot be called: {one_line(error)}") from error
    demanded = [
        name
        for name, parameter in parameters.items()
        if parameter.default is parameter.empty
        and parameter.kind not in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD)
    ]
    unknown = [name for name in demanded if name not in ("split", "image_size")]
    if unknown:
        raise ConfigurationError(f"{reference} asks for {unknown[0]!r}; it may only ask for split and image_size")
    passed = {"image_size": size} if "image_size" in parameters else {}

    def call(**more: Any) -> dict[str, Examples]:
        try:
            data = function(**passed, **more)
        except Exception as error:  # a user's function can fail in any way
            raise ConfigurationError(f"{reference} failed: {one_line(error)}") from error
        return from_object(data, reference, size, naming)

    if "split" not in parameters:
        return call()
    return {split: joined(call(split=split), reference) for split in (TRAIN, TEST)}


@contextmanager
def _refusing() -> Iterator[None]:
    """Turn what is wrong with a picture, or a file that cannot be opened, into a ConfigurationError."""
    try:
        yield
    except (PictureError, OSError) as error:
        raise ConfigurationError(str(error)) from error


def _converted(images: ImageSet, channels: int | None) -> tuple[ImageSet, ReadingReport]:
    """An image set with another number of channels."""
    if channels not in (None, images.images.shape[1]):
        pixels = with_channels(images.images.numpy().transpose(0, 2, 3, 1), channels)
        images = replace(images, images=torch.from_numpy(np.ascontiguousarray(pixels.transpose(0, 3, 1, 2))))
    return images, report_on(images)
