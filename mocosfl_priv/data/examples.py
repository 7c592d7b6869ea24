"""Images as a source holds them, before they are an image set: with the user's own names of classes and groups.

Every reader of a kind of source makes :class:`Examples`, one for each split that the source has. What is the same for
all kinds follows here: the division of a source without splits, the numbering of classes and groups, and the report of
what was read.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from mocosfl_priv.config import DataConfig, one_capture_group
from mocosfl_priv.data.image_set import ImageSet
from mocosfl_priv.data.pixel_arrays import with_channels
from mocosfl_priv.device.pictures import Reading
from mocosfl_priv.errors import ConfigurationError

TRAIN, TEST, VALIDATION, WHOLE = "train", "test", "validation", ""
UNLABELLED = "unlabelled"  # name of the single class of images without labels
TEST_SHARE = 5  # one image in so many is a test image, where a source is divided
NAMED = 5  # at most so many groups, columns or files are named in a message


class NoGroupsError(ConfigurationError):
    """A source has nothing by which the configuration tells groups apart."""


@dataclass(frozen=True)
class Naming:
    """Where a source says to which class and to which group an image belongs.

    labels: a CSV file with columns file, label and optionally group and split, for a folder of images.
    label_column, group_column: the columns, arrays or fields that hold them, where they have unusual names.
    group_pattern: a regular expression with one capture group, searched in the path of each file; what it captures is
        the name of the group.
    """

    labels: Path | None = None
    label_column: str | None = None
    group_column: str | None = None
    group_pattern: str | None = None

    @classmethod
    def of_target(cls, config: DataConfig) -> Naming:
        """Return what `config` says of the target data."""
        return cls(config.labels, config.label_column, config.group_column, config.group_pattern)

    @classmethod
    def of_source(cls, config: DataConfig) -> Naming:
        """Return what `config` says of the source data: only where groups are found."""
        return cls(group_column=config.group_column, group_pattern=config.group_pattern)

    @property
    def finds_groups(self) -> bool:
        """Whether it says where groups are to be found."""
        return self.group_column is not None or self.group_pattern is not None


@dataclass(frozen=True)
class Examples:
    """The images of one split, as its source holds them.

    images: uint8 (n, h, w, c), c = 1 or 3.
    reading: sizes, kinds and skipped files.
    labels: (n,) int64 or text; None without labels.
    class_names: the names of the classes 0, 1, ... where the source has some.
    groups: (n,) text; None where no group is named.
    names: the path of each image in its source; None where images have no names.
    notes: remarks for the user.
    """

    images: np.ndarray
    reading: Reading
    labels: np.ndarray | None = None
    class_names: tuple[str, ...] | None = None
    groups: np.ndarray | None = None
    names: tuple[str, ...] | None = None
    notes: tuple[str, ...] = ()

    def select(self, kept: np.ndarray) -> Examples:
        """Return the images at the indices `kept`; the reading stays that of the whole."""
        return replace(
            self,
            images=self.images[kept],
            labels=None if self.labels is None else self.labels[kept],
            groups=None if self.groups is None else self.groups[kept],
            names=None if self.names is None else tuple(self.names[index] for index in kept),
        )


@dataclass(frozen=True)
class ReadingReport:
    """What was read from a source.

    source: its name, with the split.
    images: number of images.
    classes: number of images of each class; empty without labels.
    channels: 1 or 3. size: (height, width) of the images after reading.
    kinds: number of images by bit depth or type of numbers, and by what was done with them.
    values: the least and the largest value of the images after reading, of 255.
    skipped: number of skipped files by reason.
    duplicates: number of images whose pixels another image has, too.
    groups: number of named groups; None where none are named.
    notes: further remarks.
    text: the same in one line, without classes.
    """

    source: str
    images: int
    classes: Mapping[str, int]
    channels: int
    size: tuple[int, int]
    kinds: Mapping[str, int]
    values: tuple[int, int]
    skipped: Mapping[str, int]
    duplicates: int
    groups: int | None
    notes: tuple[str, ...]
    text: str


def joined(parts: Mapping[str, Examples], where: str) -> Examples:
    """Return the images of all splits as one.

    Raises:
        ConfigurationError: their sizes differ, or only some have labels or groups.

    """
    several = list(parts.values())
    if len(several) == 1:
        return several[0]
    _require_alike(parts, where)
    sizes = sorted({part.images.shape[1:3] for part in several})
    if len(sizes) > 1:
        raise ConfigurationError(f"{where}: its splits have images of different sizes; say the size they shall have")
    reading = Reading()
    for part in several:
        reading.skipped += part.reading.skipped
        reading.kinds += part.reading.kinds
        reading.sizes += part.reading.sizes
        reading.grey += part.reading.grey
    channels = max(part.images.shape[3] for part in several)
    return Examples(
        np.concatenate([with_channels(part.images, channels) for part in several]),
        reading,
        labels=None if several[0].labels is None else np.concatenate([part.labels for part in several]),
        class_names=next((part.class_names for part in several if part.class_names is not None), None),
        groups=None if several[0].groups is None else np.concatenate([part.groups for part in several]),
        names=tuple(f"{split}/{name}" for split, part in parts.items() for name in part.names or ()) or None,
        notes=tuple(dict.fromkeys(note for part in several for note in part.notes)),
    )


def _require_alike(parts: Mapping[str, Examples], where: str) -> None:
    """Raise ConfigurationError if only some splits have labels, or groups."""
    for what, present in (
        ("labels", [part.labels is not None for part in parts.values()]),
        ("groups", [part.groups is not None for part in parts.values()]),
    ):
        if any(present) and not all(present):
            without = next(split for split, there in zip(parts, present, strict=True) if not there)
            raise ConfigurationError(f"{where}: the split {without} has no {what}, but another split has")


def divided(found: Mapping[str, Examples], where: str) -> tuple[Examples, Examples]:
    """Return the examples of training and test.

    A source with a test split, or else a validation split, keeps its splits. Otherwise one image in five is a test
    image, chosen by a hash of its path, or of its pixels where it has none, so adding an image does not move others
    between the splits. Where groups are named, one group in five is chosen instead, so that no group is in both.

    Args:
        found: examples by split; one entry `WHOLE` for a source without splits.
        where: what messages call the source.

    Raises:
        ConfigurationError: all images fall into one split.

    """
    if TRAIN in found and (TEST in found or VALIDATION in found):
        held = TEST if TEST in found else VALIDATION
        train, test = found[TRAIN], found[held]
        unused = [f"not read: the split {split or 'without a name'}" for split in found if split not in (TRAIN, held)]
        if held == VALIDATION:
            unused.append("its validation split is the test split")
        return replace(train, notes=(*train.notes, *unused)), test
    if len(found) > 1:
        raise ConfigurationError(f"{where}: it has {', '.join(filter(None, found))} but no train split")
    split, whole = next(iter(found.items()))
    tested = _tested(whole)
    if tested.all() or not tested.any():
        of = f"{len(set(whole.groups.tolist()))} groups" if whole.groups is not None else f"{len(tested)} images"
        raise ConfigurationError(f"{where}: {of} are too few to divide them into training and test; give two splits")
    only = f"only the split {split} is there: " if split else ""
    by = " by groups" if whole.groups is not None else ""
    whole = replace(whole, notes=(*whole.notes, f"{only}{len(tested)} images divided into training and test{by}"))
    return whole.select(np.flatnonzero(~tested)), whole.select(np.flatnonzero(tested))


def _tested(whole: Examples) -> np.ndarray:
    """Which images are test images, bool (n,)."""
    if whole.groups is not None:  # few groups must be divided, too: those whose hashes are the smallest fifth
        names = sorted(set(whole.groups.tolist()), key=lambda name: hashlib.sha256(name.encode()).digest())
        chosen = names[: max(1, round(len(names) / TEST_SHARE))] if len(names) > 1 else []
        return np.isin(whole.groups, chosen)
    if whole.names is not None:
        return np.array([is_test(name) for name in whole.names])
    return np.array([_is_test(image.tobytes()) for image in whole.images])


def _is_test(key: bytes) -> bool:
    return hashlib.sha256(key).digest()[0] % TEST_SHARE == 0


def is_test(name: str) -> bool:
    """Whether the image or group with this name is a test image where a source is divided."""
    return _is_test(name.encode("utf-8", "surrogateescape"))


def image_sets(
    parts: Mapping[str, Examples], where: str, channels: int | None = 3
) -> dict[str, tuple[ImageSet, ReadingReport]]:
    """Number the classes and groups of `parts` together, and return an image set and a report for each.

    Args:
        parts: examples by the name of their split.
        where: the source; with a slash and the split it is the name of the image set.
        channels: 1 or 3; None for 1 where all images are grey, else 3.

    Raises:
        ConfigurationError: a split has labels that the training split lacks, or labels outside the named classes.

    """
    _require_alike(parts, where)
    class_names, numbers = _classes(parts, where)
    group_names = sorted({str(group) for part in parts.values() if part.groups is not None for group in part.groups})
    group_numbers = {name: number for number, name in enumerate(group_names)}
    grey = all(part.reading.grey == part.reading.sizes.total() for part in parts.values())
    made = {}
    for split, part in parts.items():
        pixels = with_channels(part.images, channels, grey)
        n = len(pixels)
        labels = np.zeros(n, np.int64) if part.labels is None else np.array([numbers[x] for x in part.labels.tolist()])
        groups = np.arange(n) if part.groups is None else np.array([group_numbers[str(x)] for x in part.groups])
        images = ImageSet(
            f"{where}/{split}" if split else where,
            torch.from_numpy(np.ascontiguousarray(pixels.transpose(0, 3, 1, 2))),
            torch.from_numpy(labels).long(),
            class_names,
            torch.from_numpy(groups).long(),
            group_names=tuple(group_names),
        )
        report = report_on(images, part)
        made[split] = (replace(images, read=report.text), report)
    return made


def _classes(parts: Mapping[str, Examples], where: str) -> tuple[tuple[str, ...], dict[Any, int]]:
    """The names of the classes of all `parts`, and the number of each label."""
    found = {split: set(part.labels.tolist()) for split, part in parts.items() if part.labels is not None}
    if not found:
        return (UNLABELLED,), {}
    given = next((part.class_names for part in parts.values() if part.class_names is not None), None)
    labels = sorted(set().union(*found.values()), key=_natural)
    if len({type(label) for label in labels}) > 1:
        raise ConfigurationError(f"{where}: labels are numbers in one split, and text in another")
    if given is not None and labels and isinstance(labels[0], int):
        if labels[0] < 0 or labels[-1] >= len(given):
            raise ConfigurationError(
                f"{where}: labels reach from {labels[0]} to {labels[-1]}, but there are {len(given)} names of classes"
            )
        return given, {number: number for number in range(len(given))}
    unknown = sorted(set(labels) - found.get(TRAIN, set(labels)), key=str)
    if unknown:
        named = ", ".join(map(str, unknown[:NAMED]))
        raise ConfigurationError(f"{where}: the test split has labels that no training image has: {named}")
    return tuple(map(str, labels)), {label: number for number, label in enumerate(labels)}


def _natural(label: Any) -> tuple[bool, int, str]:
    """Whole numbers in their order, also where they are text, as in a CSV file; other text after them."""
    text = str(label)
    number = isinstance(label, int) or (text.isdecimal() and text.isascii())
    return not number, int(text) if number else 0, text


def report_on(images: ImageSet, part: Examples | None = None) -> ReadingReport:
    """Return what was read as `images`.

    Args:
        images: the image set.
        part: what it was made of; None of an image set that was there before.

    """
    counts = torch.bincount(images.labels, minlength=len(images.class_names)).tolist()
    channels, height, width = images.images.shape[1:]
    reading = part.reading if part else Reading(sizes=Counter({(width, height): len(images)}))
    labelled = part.labels is not None if part else len(images.class_names) > 1
    notes = (*(part.notes if part else ()), *(() if labelled else ("no labels",)))
    lowest, highest = int(images.images.min()), int(images.images.max())
    groups = len(images.names_of_groups()) if images.group_names else None
    duplicates = len(images) - len(np.unique(images.digests()))
    remarks = [
        reading.text,
        "grey" if channels == 1 else f"RGB{_grey_among(reading)}",
        f"values {lowest} to {highest} of 255",
        f"{groups} groups" if groups is not None else "",
        f"{duplicates} duplicates" if duplicates else "",
        *notes,
    ]
    return ReadingReport(
        source=images.name,
        images=len(images),
        classes=dict(zip(images.class_names, counts, strict=True)) if labelled else {},
        channels=channels,
        size=(height, width),
        kinds=dict(reading.kinds),
        values=(lowest, highest),
        skipped=dict(reading.skipped),
        duplicates=duplicates,
        groups=groups,
        notes=notes,
        text="; ".join(filter(None, remarks)),
    )


def _grey_among(reading: Reading) -> str:
    if not reading.grey:
        return ""
    return " made of grey" if reading.grey == reading.sizes.total() else f", {reading.grey} of them made of grey"


def labels_of(values: Any, n: int, where: str) -> np.ndarray:
    """Return labels as int64 or text (n,).

    Args:
        values: one label per image: whole numbers, booleans or text, (n,) or (n, 1).
        n: number of images.
        where: what messages call them.

    Raises:
        ConfigurationError: there are too many or too few, several per image, or some are missing or no labels.

    """
    array = _one_per_image(values, n, where, "labels")
    if array.dtype.kind == "f":
        if not np.isfinite(array).all() or (array != np.rint(array)).any():
            raise ConfigurationError(f"{where}: labels are whole numbers or text, not such as {array[:3].tolist()}")
        return array.astype(np.int64)
    if array.dtype.kind in "bui":
        return array.astype(np.int64)
    return _texts(array, where, "label")


def groups_of(values: Any, n: int, where: str) -> np.ndarray:
    """Return the names of groups as text (n,); numbers become text. Raises ConfigurationError as for labels."""
    array = _one_per_image(values, n, where, "groups")
    if array.dtype.kind == "f" and not np.isnan(array).any() and (array == np.rint(array)).all():
        array = array.astype(np.int64)
    if array.dtype.kind == "f":
        missing = int(np.isnan(array).sum())
        raise ConfigurationError(f"{where}: {missing} of {n} images have no group" if missing else
                                 f"{where}: groups are whole numbers or text")  # fmt: skip
    return array.astype(str) if array.dtype.kind in "bui" else _texts(array, where, "group")


def _one_per_image(values: Any, n: int, where: str, what: str) -> np.ndarray:
    if hasattr(values, "detach"):
        values = values.detach().cpu().numpy()
    array = np.asarray(values)
    if array.ndim == 2 and array.shape[1] == 1:
        array = array[:, 0]
    if array.ndim != 1:
        raise ConfigurationError(f"{where}: {what} of shape {array.shape}: there must be one per image")
    if len(array) != n:
        raise ConfigurationError(f"{where}: {n} images, but {len(array)} {what}")
    return array


def _texts(array: np.ndarray, where: str, what: str) -> np.ndarray:
    values = [value.decode("utf-8", "replace") if isinstance(value, bytes) else value for value in array.tolist()]
    missing = sum(value is None or value != value or not str(value).strip() for value in values)  # noqa: PLR0124 - NaN
    if missing:
        raise ConfigurationError(f"{where}: {missing} of {len(values)} images have no {what}")
    if not all(isinstance(value, str | int | np.integer) for value in values):
        raise ConfigurationError(f"{where}: each {what} is a whole number or text, not {type(values[0]).__name__}")
    return np.array([str(value) for value in values])


def groups_by_pattern(names: Sequence[str] | None, pattern: str, where: str) -> np.ndarray:
    """Return the name of the group of each file, text (n,).

    Raises:
        ConfigurationError: there are no file names, the pattern does not match them all, or it is no regular
            expression with exactly one capture group.

    """
    try:
        compiled = one_capture_group(pattern)
    except ValueError as error:
        raise ConfigurationError(f"data.group_pattern: {error}") from error
    if names is None:
        raise NoGroupsError(f"data.group_pattern: {where} has no names of files")
    found = [match[1] if (match := compiled.search(name)) else None for name in names]
    failed = [name for name, group in zip(names, found, strict=True) if not group]
    if failed:
        kind = NoGroupsError if len(failed) == len(names) else ConfigurationError
        raise kind(
            f"data.group_pattern: {pattern!r} does not match {len(failed)} of {len(names)} files of {where}, the "
            f"first: {failed[0]}"
        )
    return np.array(found)
