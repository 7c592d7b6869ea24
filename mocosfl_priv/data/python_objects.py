"""Data sets as Python has them: arrays, tensors, sequences of images, and the data sets of torch and Hugging Face."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from PIL import Image

from mocosfl_priv.data.examples import (
    NAMED,
    TEST,
    TRAIN,
    WHOLE,
    Examples,
    Naming,
    groups_of,
    joined,
    labels_of,
)
from mocosfl_priv.data.image_folder import require_distinct, split_named
from mocosfl_priv.data.named_fields import CLASS_NAMES, GROUPS, IMAGES, LABELS, Fields, named_splits, sort_fields
from mocosfl_priv.data.pixel_arrays import image_of, images_of, stacked
from mocosfl_priv.device.pictures import Reading, Size, read_image
from mocosfl_priv.errors import ConfigurationError
from mocosfl_priv.runtime.imports import one_line

ACCEPTED = (
    "an array or tensor, (images, labels) or (images, labels, groups), a mapping with 'images' or with 'train' and "
    "'test', or a data set with a length"
)


def from_object(data: Any, where: str, size: Size, naming: Naming) -> dict[str, Examples]:
    """Return the images of a Python object by split; `WHOLE` where it has no splits.

    Args:
        data: an array or tensor; a tuple of images, labels and groups; a mapping of these names; a mapping of splits to
            any of these, or Keras' pair of pairs; a sequence of images; a data set of torch or Hugging Face.
        where: what messages call it.
        size: see :func:`mocosfl_priv.device.pictures.read`.
        naming: names of fields.

    Raises:
        ConfigurationError: it is none of these, or its images are refused.

    """
    if isinstance(data, Mapping):
        splits = {str(key): split_named(str(key)) for key in data}
        if splits and all(splits.values()):
            require_distinct(splits, where)
            return {
                str(splits[str(key)]): joined(from_object(part, f"{where}/{key}", size, naming), where)
                for key, part in data.items()
            }
        return from_fields(data, where, size, naming)
    if _is_array(data):
        return {WHOLE: _columns(where, size, data)}
    if isinstance(data, tuple | list) and len(data) == 2 and all(_is_pair(part) for part in data):
        return from_object({TRAIN: tuple(data[0]), TEST: tuple(data[1])}, where, size, naming)
    if isinstance(data, tuple | list) and _is_columns(data):
        return {WHOLE: _columns(where, size, *data)}
    if hasattr(data, "tensors"):  # torch's TensorDataset
        return {WHOLE: _columns(where, size, *data.tensors)}
    if hasattr(data, "__len__") and hasattr(data, "__getitem__") and not isinstance(data, str | bytes):
        return {WHOLE: from_items(data, where, size, naming)}
    raise ConfigurationError(f"{where}: a {type(data).__name__} is no data set; give {ACCEPTED}")


def from_fields(data: Mapping[str, Any], where: str, size: Size, naming: Naming) -> dict[str, Examples]:
    """The same of a mapping of names to arrays, whose names may say splits; arrays without a role are not read."""
    found = sort_fields([str(name) for name in data], naming, where)
    if len(data) == 1 and not any(IMAGES in fields.by_role for fields in found.values()):
        (name,) = data  # one array only, whatever it is called
        found = {WHOLE: Fields({IMAGES: name})}
    unknown = [name for fields in found.values() for name in fields.unknown]
    made = {}
    for split, fields in named_splits(found, where).items():
        names = fields.by_role
        held = [data[names[role]] if role in names else None for role in (IMAGES, LABELS, GROUPS)]
        examples = _columns(f"{where}: {names[IMAGES]}", size, *held)
        if CLASS_NAMES in names:
            examples = replace(examples, class_names=tuple(map(_text, np.asarray(data[names[CLASS_NAMES]]).tolist())))
        notes = (f"not read: {', '.join(unknown[:NAMED])}",) if unknown else ()
        made[split] = replace(examples, notes=notes)
    return made


def _text(value: Any) -> str:
    return value.decode("utf-8", "replace") if isinstance(value, bytes) else str(value)


def _columns(where: str, size: Size, images: Any, labels: Any = None, groups: Any = None) -> Examples:
    """Examples of all images at once, of all labels, and of all groups."""
    reading = Reading()
    count = None if labels is None else len(labels)
    if _is_array(images):
        pixels = images_of(images, where, size, reading, count)
    else:
        pixels = stacked([_pixels(image, f"{where}[{i}]", size, reading) for i, image in enumerate(images)], where)
    reading.require_whole_range()
    return Examples(
        pixels,
        reading,
        labels=None if labels is None else labels_of(labels, len(pixels), where),
        groups=None if groups is None else groups_of(groups, len(pixels), where),
    )


def from_items(data: Any, where: str, size: Size, naming: Naming) -> Examples:
    """Read a sequence or data set item by item: images, (image, label) or (image, label, group), or mappings."""
    n = len(data)
    if not n:
        raise ConfigurationError(f"{where}: there are no images in it")
    reading = Reading()
    pixels, labels, groups = [], [], []
    for index in range(n):
        try:
            item = data[index]
        except Exception as error:  # a user's data set can fail in any way
            raise ConfigurationError(f"{where}: reading image {index} failed: {one_line(error)}") from error
        image, label, group = _parts(item, f"{where}[{index}]", naming)
        pixels.append(_pixels(image, f"{where}[{index}]", size, reading))
        labels.append(label)
        groups.append(group)
        if index == 0:
            again = _pixels(_parts(data[index], where, naming)[0], where, size, Reading())
            if not np.array_equal(again, pixels[0]):
                raise ConfigurationError(
                    f"{where}: it gives another image each time it is asked for the first one: leave random transforms "
                    "away, since roles and results are of fixed images"
                )
    reading.require_whole_range()
    return Examples(
        stacked(pixels, where),
        reading,
        labels=None if all(label is None for label in labels) else labels_of(_plain(labels), n, where),
        class_names=_class_names(data, naming),
        groups=None if all(group is None for group in groups) else groups_of(_plain(groups), n, where),
    )


def _plain(values: list[Any]) -> np.ndarray:
    """A column of values; those of one number each become plain numbers."""
    held = np.empty(len(values), object)
    held[:] = [value.item() if hasattr(value, "item") and np.size(value) == 1 else value for value in values]
    whole = all(isinstance(value, int | np.integer) for value in held)
    return held.astype(np.int64) if whole else held


def _parts(item: Any, where: str, naming: Naming) -> tuple[Any, Any, Any]:
    """Image, label and group of an item; None for what it does not have."""
    if isinstance(item, Mapping):
        fields = named_splits(sort_fields(list(map(str, item)), naming, where), where)
        names = fields.get(WHOLE, Fields()).by_role
        image, label, group = (item[names[role]] if role in names else None for role in (IMAGES, LABELS, GROUPS))
        return image, label, group
    if isinstance(item, tuple | list) and 1 <= len(item) <= 3:
        label = item[1] if len(item) > 1 else None
        if label is not None and not isinstance(label, str) and np.size(label) != 1:
            raise ConfigurationError(f"{where}: {np.size(label)} labels of one image; choose one of them")
        return item[0], label, item[2] if len(item) > 2 else None
    return item, None, None


def _pixels(image: Any, where: str, size: Size, reading: Reading) -> np.ndarray:
    """A single image as uint8 (h, w, c)."""
    if isinstance(image, Image.Image):
        return read_image(image, where, size, reading)
    if _is_array(image) or isinstance(image, list):
        return image_of(image, where, size, reading)
    raise ConfigurationError(f"{where}: a {type(image).__name__} is no image; give an array, a tensor or a PIL image")


def _class_names(data: Any, naming: Naming) -> tuple[str, ...] | None:
    """The names of classes that a data set has: torchvision's, also through `Subset`, and Hugging Face's."""
    features = getattr(data, "features", None)
    if isinstance(features, Mapping):
        for name in (naming.label_column, "label", "labels"):
            names = getattr(features.get(name), "names", None) if name else None
            if names:
                return tuple(map(str, names))
    while not hasattr(data, "classes") and hasattr(data, "dataset"):
        data = data.dataset
    classes = getattr(data, "classes", None)
    return tuple(map(_class_name, classes)) if isinstance(classes, Sequence) and len(classes) else None


def _class_name(name: Any) -> str:
    return ", ".join(map(str, name)) if isinstance(name, tuple) else str(name)  # ImageNet has several words a class


def _is_array(value: Any) -> bool:
    return isinstance(value, np.ndarray) or hasattr(value, "detach")


def _is_pair(value: Any) -> bool:
    return isinstance(value, tuple | list) and len(value) == 2 and all(_is_array(part) for part in value)


def _is_columns(value: Sequence[Any]) -> bool:
    """Whether `value` is images with labels, and maybe groups, rather than a sequence of items."""
    if not 2 <= len(value) <= 3 or not (_is_array(value[0]) or isinstance(value[0], list)):
        return False
    if _is_array(value[0]) and (value[0].ndim < 3 or any(_is_array(part) and part.ndim > 2 for part in value[1:])):
        return False
    return all(part is None or hasattr(part, "__len__") for part in value[1:])
