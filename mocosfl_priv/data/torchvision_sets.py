"""``cifar10``, ``cifar100``, ``svhn`` and ``stl10``, read through torchvision, and its other sets by their class."""

from __future__ import annotations

import inspect
import pickle
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from mocosfl_priv.data.examples import TEST, TRAIN, WHOLE, Examples, Naming
from mocosfl_priv.data.image_set import ImageSet
from mocosfl_priv.data.pixel_arrays import image_of
from mocosfl_priv.data.python_objects import from_items, from_object
from mocosfl_priv.device.pictures import Reading, Size, fit
from mocosfl_priv.errors import ConfigurationError, unknown_name
from mocosfl_priv.runtime.files import user_path

NAMES = ("cifar10", "cifar100", "svhn", "stl10")
DOWNLOADS = {
    "cifar10": "torchvision.datasets.CIFAR10(ROOT, download=True)",
    "cifar100": "torchvision.datasets.CIFAR100(ROOT, download=True)",
    "svhn": "[torchvision.datasets.SVHN(ROOT, split=s, download=True) for s in ('train', 'test')]",
    "stl10": "torchvision.datasets.STL10(ROOT, download=True)",
}
DEFAULT_ROOT = Path("~/.cache/mocosfl-priv/data")
TRAIN_WORDS = ("train", "trainval", "train-standard")  # what constructors call the splits, the first that they know
TEST_WORDS = ("test", "val", "valid")
OPTIONS = ("EMNIST", "CelebA")
NO_FILES = ("VisionDataset", "DatasetFolder", "ImageFolder", "FakeData")  # no data sets with files of their own


def load(name: str, root: Path | None, split: str, image_size: int) -> ImageSet:
    """Read one split of the data set `name`, with images resized to `image_size` pixels a side.

    torchvision verifies the files' checksums. Raises ConfigurationError, which says how to get the files, when they are
    missing or damaged.
    """
    root = user_path(root or DEFAULT_ROOT)
    try:
        data = _open(name, root, split)
    except (RuntimeError, OSError, EOFError, pickle.UnpicklingError) as error:
        remedy = DOWNLOADS[name].replace("ROOT", repr(str(root)))
        raise ConfigurationError(
            f"{name}: no usable files in {root}. On a machine with internet access run: "
            f'python -c "import torchvision; {remedy}" and copy the folder to this machine, or set data.path'
        ) from error
    images = np.asarray(data.data)
    if images.shape[1] == 3:  # SVHN and STL-10 keep channels first
        images = images.transpose(0, 2, 3, 1)
    if images.shape[1:3] != (image_size, image_size):
        images = np.stack([fit(Image.fromarray(image), image_size) for image in images])
    labels = torch.as_tensor(np.asarray(data.targets if hasattr(data, "targets") else data.labels)).long()
    names = tuple(getattr(data, "classes", None) or [str(i) for i in range(int(labels.max()) + 1)])
    return ImageSet.ungrouped(
        f"{name}/{split}",
        torch.from_numpy(np.ascontiguousarray(images)).permute(0, 3, 1, 2).contiguous(),
        labels,
        names,
    )


def _open(name: str, root: Path, split: str) -> Any:
    from torchvision import datasets  # takes seconds to import, and only these sets need it

    if name == "svhn":
        return datasets.SVHN(root, split=split)
    if name == "stl10":
        return datasets.STL10(root, split=split)
    return {"cifar10": datasets.CIFAR10, "cifar100": datasets.CIFAR100}[name](root, train=split == "train")


class _CelebA:
    """CelebA as items (image, attribute or None, identity), so that no person is in two roles."""

    def __init__(self, data: Any, attribute: str) -> None:
        names = [name for name in data.attr_names if name]
        if attribute and attribute not in names:
            raise unknown_name("CelebA attribute", attribute, names)
        self.data, self.column = data, names.index(attribute) if attribute else None
        self.classes = [f"not {attribute}", attribute] if attribute else []

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, index: int) -> tuple[Any, int | None, int]:
        image, (attributes, identity) = self.data[index]
        return image, None if self.column is None else int(attributes[self.column]), int(identity)


def examples(reference: str, root: Path | None, size: Size, naming: Naming) -> dict[str, Examples]:
    """Read a data set of torchvision by the name of its class, from files that are there; nothing is downloaded.

    Args:
        reference: the class, such as ``MNIST``. ``EMNIST:letters`` says the part of a set that has parts, and
            ``CelebA:Smiling`` the attribute that is the label, without which CelebA has no labels.
        root: the folder that torchvision calls root.
        size: of the images, see :func:`mocosfl_priv.device.pictures.read`.
        naming: names of fields.

    Returns:
        The splits that the set has; one of the whole where it has none. People of CelebA are groups.

    Raises:
        ConfigurationError: there is no such class, it holds no labelled images, or its files are not there.

    """
    from torchvision import datasets

    name, _, option = reference.partition(":")
    known = [
        known
        for known, value in vars(datasets).items()
        if inspect.isclass(value) and issubclass(value, datasets.VisionDataset) and known not in NO_FILES
    ]
    if name not in known:
        raise unknown_name("torchvision data set", name, known)
    if option and name not in OPTIONS:
        raise ConfigurationError(f"torchvision:{reference}: {name} has no {option!r}; write torchvision:{name}")
    folder = user_path(root or DEFAULT_ROOT)
    found = {}
    for split, data in _splits(getattr(datasets, name), name, option, folder):
        where = f"torchvision:{reference}/{split}" if split else f"torchvision:{reference}"
        found[split] = _from_arrays(data, where, size, naming) or from_items(data, where, size, naming)
    return found


def _splits(cls: Any, name: str, option: str, root: Path) -> Iterator[tuple[str, Any]]:
    """The splits of a set, opened. Constructors say which one in different ways, found from their signatures."""
    parameters = inspect.signature(cls).parameters
    extra: dict[str, Any] = {"download": False} if "download" in parameters else {}
    if name == "CelebA":
        extra["target_type"] = ["attr", "identity"]
    if name == "EMNIST":
        extra["split"] = option or "balanced"
    for split, words in ((TRAIN, TRAIN_WORDS), (TEST, TEST_WORDS)):
        if "train" in parameters or name == "EMNIST":
            data = _opened(cls, name, root, {**extra, "train": split == TRAIN})
        elif "split" in parameters:
            data = next(filter(None, (_opened(cls, name, root, {**extra, "split": word}) for word in words)), None)
        else:
            yield WHOLE, _opened(cls, name, root, extra)
            return
        if data is None:
            raise ConfigurationError(f"torchvision:{name} has no {split} split")
        yield split, _CelebA(data, option) if name == "CelebA" else data


def _opened(cls: Any, name: str, root: Path, arguments: dict[str, Any]) -> Any:
    """A data set; None where it has no split of that name."""
    try:
        return cls(root, **arguments)
    except (ValueError, RuntimeError, OSError, EOFError, pickle.UnpicklingError, ImportError, TypeError) as error:
        reason = " ".join(str(error).split())
        if isinstance(error, ValueError) and "Unknown value" in reason:
            return None
        called = ", ".join(f"{key}={value!r}" for key, value in arguments.items() if key != "download")
        raise ConfigurationError(
            f"torchvision:{name}: no usable files in {root} ({reason}). Put there what torchvision.datasets.{name}"
            f"({str(root)!r}{', ' if called else ''}{called}) expects, by download=True where it has that, or set "
            "data.path to where the files are"
        ) from error


def _from_arrays(data: Any, where: str, size: Size, naming: Naming) -> Examples | None:
    """All images at once, of a set that holds them as an array; None of others, which are read one by one."""
    images = getattr(data, "data", None)
    labels = getattr(data, "targets", getattr(data, "labels", None))
    if not isinstance(images, np.ndarray | torch.Tensor) or not str(images.dtype).endswith("uint8"):
        return None
    if labels is None or np.ndim(labels) != 1 or not len(labels) == len(images) == len(data) > 0:
        return None
    read = from_object((images, labels), where, size, naming)[WHOLE]
    first = image_of(np.asarray(data[0][0]), where, size, Reading())
    if not np.array_equal(first, read.images[0]):
        return None
    return replace(read, class_names=tuple(map(str, getattr(data, "classes", ()))) or None)
