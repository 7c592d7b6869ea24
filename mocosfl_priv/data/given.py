"""Data that a user hands over in Python: read once, and named in the configuration by what is in it.

A configuration must say which data it is of, and an object has no name that could be trusted. So `data.dataset` becomes
``python:`` and the SHA-256 of pixels, labels and groups as they were read.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, replace
from typing import Any

from mocosfl_priv.config import DataConfig
from mocosfl_priv.data.examples import Naming
from mocosfl_priv.data.image_set import ImageSet
from mocosfl_priv.data.own_data import read_splits
from mocosfl_priv.errors import ConfigurationError

GIVEN_PREFIX = "python:"


@dataclass(frozen=True)
class GivenData:
    """Images that were given as objects; None where the configuration names the data.

    target: training and test images. source: images of the source data.
    """

    target: tuple[ImageSet, ImageSet] | None = None
    source: ImageSet | None = None


def read_given(config: DataConfig, data: Any = None, source: Any = None) -> tuple[DataConfig, GivenData]:
    """Read data that is given as objects.

    Args:
        config: the section `data`; size of the images and names of fields are taken from it.
        data: target data, see :func:`mocosfl_priv.data.own_data.read_splits`; None where `config` names it.
        source: source data, likewise; all its training images are used.

    Returns:
        The section with names made of the content, and the images.

    Raises:
        ConfigurationError: the data is refused, or `config` was made for other data.

    """
    if config.labels is not None and data is not None:
        raise ConfigurationError("data.labels: a file of labels belongs to imagefolder:PATH, not to data in Python")
    changes: dict[str, str] = {}
    target = source_images = None
    if data is not None:
        (train, _), (test, _) = read_splits(data, config.image_size, Naming.of_target(config))
        name = _name("data.dataset", config.dataset, train, test)
        changes["dataset"] = name
        target = replace(train, name=f"{name}/train"), replace(test, name=f"{name}/test")
    if source is not None:
        (read, _), _ = read_splits(source, config.image_size, Naming.of_source(config), require_groups=False)
        name = _name("data.source", config.source, read)
        changes["source"] = name
        source_images = replace(read, name=f"{name}/train")
    return config.model_copy(update=changes), GivenData(target, source_images)


def _name(key: str, present: str, *sets: ImageSet) -> str:
    name = GIVEN_PREFIX + content_sha256(*sets)
    if present.startswith(GIVEN_PREFIX) and present != name:
        raise ConfigurationError(
            f"{key}: the configuration was made for data {present[:24]}..., but {name[:24]}... was given"
        )
    return name


def content_sha256(*sets: ImageSet) -> str:
    """Return the SHA-256 of pixels, shapes, labels, groups, and names of classes and groups."""
    digest = hashlib.sha256()
    for images in sets:
        for tensor in (images.images, images.labels, images.groups):
            digest.update(repr(tuple(tensor.shape)).encode() + tensor.contiguous().numpy().tobytes())
        digest.update(repr((images.class_names, images.group_names)).encode())
    return digest.hexdigest()
