"""A split of a data set, held in memory; all modules of the package pass images in this form."""

from __future__ import annotations

import hashlib
from collections import Counter
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

MOST_NAMED = 12  # at most so many classes are named in a description


@dataclass(frozen=True)
class ImageSet:
    """Images of one split.

    name: identifies data set and split, for example ``photos/train``.
    images: uint8, shape (n, channels, height, width), with 3 channels (RGB) or 1 (grey). Experiments have 3.
    labels: int64, shape (n,), indices into `class_names`.
    groups: int64, shape (n,). Images with the same number may share pixels (overlapping patches of a photograph), so a
        group is never divided between two roles that must be disjoint. Otherwise every image is a group of its own.
    group_names: what the user calls each group, such as a patient; empty where nobody named any.
    read: remarks for the user on how the files were read, for example which were skipped; empty for a selection.
    """

    name: str
    images: Tensor
    labels: Tensor
    class_names: tuple[str, ...]
    groups: Tensor
    read: str = ""
    group_names: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        n = len(self.images)
        if self.images.dtype != torch.uint8 or self.images.dim() != 4 or self.images.shape[1] not in (1, 3):
            raise ValueError(f"{self.name}: images must be uint8 (n, 3 or 1, h, w), got {self.images.shape}")
        if len(self.labels) != n or len(self.groups) != n:
            raise ValueError(f"{self.name}: {n} images but {len(self.labels)} labels, {len(self.groups)} groups")

    @classmethod
    def ungrouped(cls, name: str, images: Tensor, labels: Tensor, class_names: tuple[str, ...]) -> ImageSet:
        """Make an image set in which every image is a group of its own."""
        return cls(name, images, labels, class_names, torch.arange(len(images)))

    def __len__(self) -> int:
        return len(self.images)

    def select(self, indices: Tensor) -> ImageSet:
        """Return the images at `indices`, int64 (m,), in that order."""
        return replace(
            self, images=self.images[indices], labels=self.labels[indices], groups=self.groups[indices], read=""
        )

    def names_of_groups(self) -> frozenset[str]:
        """Return the names of the groups that have an image here; empty where nobody named any."""
        numbers = self.groups.unique().tolist() if self.group_names else []
        return frozenset(self.group_names[number] for number in numbers)

    @property
    def description(self) -> str:
        """A line of text for the user: how many images of which classes there are, and how they were read."""
        counts = torch.bincount(self.labels, minlength=len(self.class_names)).tolist()
        named = [f"{name} {count}" for name, count in zip(self.class_names, counts, strict=True)]
        rest = f", and {len(named) - MOST_NAMED} more" if len(named) > MOST_NAMED else ""
        classes = f"{len(named)} classes" if len(named) != 1 else "1 class"
        text = f"{self.name}: {len(self)} images, {classes} ({', '.join(named[:MOST_NAMED])}{rest})"
        return f"{text}; {self.read}" if self.read else text

    def digests(self) -> np.ndarray:
        """Return a 16-byte hash of each image's pixels, dtype S16 (n,)."""
        return np.array(
            [hashlib.blake2b(image.tobytes(), digest_size=16).digest() for image in self.images.numpy()],
            dtype="S16",
        )

    def balanced(self, limit: int, seed_generator: torch.Generator) -> ImageSet:
        """Return at most `limit` images, as evenly spread over the classes as possible, in their original order."""
        return self if limit >= len(self) else self.select(balanced_subset(self.labels, limit, seed_generator))


def balanced_subset(labels: Tensor, limit: int, generator: torch.Generator) -> Tensor:
    """Return at most `limit` indices into labels int64 (n,), as evenly spread over the classes as possible, ascending.

    With generators in the same state, a smaller subset is contained in a larger one.
    """
    rank = torch.empty(len(labels), dtype=torch.long)
    order = torch.randperm(len(labels), generator=generator)
    seen: Counter[int] = Counter()
    for index, label in zip(order.tolist(), labels[order].tolist(), strict=True):
        rank[index] = seen[label]  # an image's position among the images of its class, in the random order
        seen[label] += 1
    return order[torch.argsort(rank[order], stable=True)][:limit].sort().values
