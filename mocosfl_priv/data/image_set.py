"""A data set split held in memory: the one form in which images travel through the house."""

from __future__ import annotations

import hashlib
from collections import Counter
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

MOST_NAMED = 12  # classes that a description names


@dataclass(frozen=True)
class ImageSet:
    """Images of one split.

    name: identifies data set and split, for example ``photos/train``.
    images: uint8, shape (n, 3, height, width).
    labels: int64, shape (n,), indices into `class_names`.
    groups: int64, shape (n,). Images of one group share pixels (overlapping patches of one photograph), so
        a group never straddles two roles that must be disjoint. For ordinary data sets every image is its own.
    read: what a reader should know of how the files became these images; of the whole split only.
    """

    name: str
    images: Tensor
    labels: Tensor
    class_names: tuple[str, ...]
    groups: Tensor
    read: str = ""

    def __post_init__(self) -> None:
        n = len(self.images)
        if self.images.dtype != torch.uint8 or self.images.dim() != 4 or self.images.shape[1] != 3:
            raise ValueError(f"{self.name}: images must be uint8 (n, 3, h, w), got {self.images.shape}")
        if len(self.labels) != n or len(self.groups) != n:
            raise ValueError(f"{self.name}: {n} images but {len(self.labels)} labels, {len(self.groups)} groups")

    @classmethod
    def ungrouped(cls, name: str, images: Tensor, labels: Tensor, class_names: tuple[str, ...]) -> ImageSet:
        """An image set in which no two images share pixels."""
        return cls(name, images, labels, class_names, torch.arange(len(images)))

    def __len__(self) -> int:
        return len(self.images)

    def select(self, indices: Tensor) -> ImageSet:
        """The images at `indices`, in that order."""
        return ImageSet(self.name, self.images[indices], self.labels[indices], self.class_names, self.groups[indices])

    @property
    def description(self) -> str:
        """For people: how many images of which classes, and how they were read."""
        counts = torch.bincount(self.labels, minlength=len(self.class_names)).tolist()
        named = [f"{name} {count}" for name, count in zip(self.class_names, counts, strict=True)]
        rest = f", and {len(named) - MOST_NAMED} more" if len(named) > MOST_NAMED else ""
        classes = f"{len(named)} classes" if len(named) != 1 else "1 class"
        text = f"{self.name}: {len(self)} images, {classes} ({', '.join(named[:MOST_NAMED])}{rest})"
        return f"{text}; {self.read}" if self.read else text

    def digests(self) -> np.ndarray:
        """One 16-byte content hash per image: equal exactly when the pixels are equal."""
        return np.array(
            [hashlib.blake2b(image.tobytes(), digest_size=16).digest() for image in self.images.numpy()],
            dtype="S16",
        )

    def balanced(self, limit: int, seed_generator: torch.Generator) -> ImageSet:
        """At most `limit` images, as evenly over the classes as the classes allow; order is kept."""
        return self if limit >= len(self) else self.select(balanced_subset(self.labels, limit, seed_generator))


def balanced_subset(labels: Tensor, limit: int, generator: torch.Generator) -> Tensor:
    """At most `limit` indices into labels int64 (n,), as evenly over the classes as the classes allow, ascending.

    For equal generators a smaller subset is part of a larger one.
    """
    rank = torch.empty(len(labels), dtype=torch.long)
    order = torch.randperm(len(labels), generator=generator)
    seen: Counter[int] = Counter()
    for index, label in zip(order.tolist(), labels[order].tolist(), strict=True):
        rank[index] = seen[label]  # the r-th drawn image of its class has rank r
        seen[label] += 1
    return order[torch.argsort(rank[order], stable=True)][:limit].sort().values
