"""``cifar10``, ``cifar100``, ``svhn`` and ``stl10``, read through torchvision."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from mocosfl_priv.data.image_folder import fit
from mocosfl_priv.data.image_set import ImageSet
from mocosfl_priv.errors import ConfigurationError

NAMES = ("cifar10", "cifar100", "svhn", "stl10")
DOWNLOADS = {
    "cifar10": "torchvision.datasets.CIFAR10(ROOT, download=True)",
    "cifar100": "torchvision.datasets.CIFAR100(ROOT, download=True)",
    "svhn": "[torchvision.datasets.SVHN(ROOT, split=s, download=True) for s in ('train', 'test')]",
    "stl10": "torchvision.datasets.STL10(ROOT, download=True)",
}
DEFAULT_ROOT = Path("~/.cache/mocosfl-priv/data")


def load(name: str, root: Path | None, split: str, image_size: int) -> ImageSet:
    """Read one split of the data set `name`, with images resized to `image_size` pixels a side.

    torchvision verifies the files' checksums. Raises ConfigurationError, which says how to get the files, when they are
    missing or damaged.
    """
    root = (root or DEFAULT_ROOT).expanduser()
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
