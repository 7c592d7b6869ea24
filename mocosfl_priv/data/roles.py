"""Data roles: who may see which image.

Every image of an experiment has a role, and roles that must not meet are disjoint by construction and checked
by content. The only pair that may share images is (client private, probe train): the linear probe of the
self-supervised literature is trained with labels on the very images the encoder was trained on.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from itertools import combinations, zip_longest

import numpy as np
import torch
from torch import Tensor

from mocosfl_priv.config import DataConfig
from mocosfl_priv.data.datasets import load_split
from mocosfl_priv.data.image_set import ImageSet
from mocosfl_priv.errors import ConfigurationError
from mocosfl_priv.runtime.seeding import generator


class Role(StrEnum):
    """Who an image belongs to."""

    CLIENT_PRIVATE = "client_private"
    DEFENDER_TARGET = "defender_target"
    DEFENDER_SOURCE = "defender_source"
    AUXILIARY_TARGET = "auxiliary_target"
    AUXILIARY_SOURCE = "auxiliary_source"
    VICTIMS = "victims"
    PROBE_TRAIN = "probe_train"
    PROBE_VALIDATION = "probe_validation"
    PROBE_TEST = "probe_test"


MAY_OVERLAP = {frozenset({Role.CLIENT_PRIVATE, Role.PROBE_TRAIN})}


@dataclass(frozen=True)
class RoleRecord:
    """What a result keeps of a role: its size, and SHA-256 hashes of its indices, its pixels, its labels and groups."""

    images: int
    source: str
    index_sha256: str
    content_sha256: str
    label_sha256: str


@dataclass(frozen=True)
class DataRoles:
    """All images of an experiment, by role.

    sets: the images of each role.
    records: what a result keeps of them.
    training_size: images in the whole target training set, the base of every target fraction.
    duplicates_dropped: images left out of the target data because the same pixels stood there before; test
        images win over training images.
    reading: for people, a line each: what was read of target and source data, and what of it is left out or missing.
    """

    sets: Mapping[Role, ImageSet]
    records: Mapping[Role, RoleRecord]
    training_size: int
    duplicates_dropped: int
    reading: tuple[str, ...] = ()

    @property
    def labelled(self) -> bool:
        """Whether labels tell anything apart; without that, no accuracy means anything."""
        return len(self.sets[Role.PROBE_TRAIN].labels.unique()) > 1

    def __getitem__(self, role: Role) -> ImageSet:
        return self.sets[role]

    def defender_target(self, fraction: float) -> ImageSet:
        """The first `fraction` of the target training set's size; larger fractions contain smaller ones."""
        return self.sets[Role.DEFENDER_TARGET].select(torch.arange(_share(fraction, self.training_size)))


def assign_roles(config: DataConfig, largest_target_fraction: float) -> DataRoles:
    """Load target and source data and give every image its role.

    Raises ConfigurationError where the wishes do not fit the data, or where roles that must be disjoint meet.
    """
    rng = generator(config.role_seed, "roles")
    train = load_split(config.dataset, "train", config.image_size, config.path)
    test = load_split(config.dataset, "test", config.image_size, config.path)
    source = load_split(config.source, "train", config.image_size, config.source_path)
    described = [images.description for images in (train, test, source)]
    if config.train_limit:
        train = train.balanced(config.train_limit, rng)
    if config.test_limit:
        test = test.balanced(config.test_limit, rng)
    before = len(train) + len(test)
    seen: set[bytes] = set()
    contradicting = _under_two_labels(train, test)
    test = _without_duplicates(test, seen)
    train = _without_duplicates(train, seen, require_classes=True)
    source = _without_duplicates(source, set())
    dropped = before - len(train) - len(test)

    n = len(train)
    wanted = {
        Role.PROBE_VALIDATION: max(1, _share(config.validation_fraction, n)),
        Role.AUXILIARY_TARGET: _share(config.auxiliary_target_fraction, n),
        Role.DEFENDER_TARGET: _share(largest_target_fraction, n),
    }
    if sum(wanted.values()) >= n:
        parts = ", ".join(f"{role} {count}" for role, count in wanted.items())
        raise ConfigurationError(
            f"data: the roles {parts} overlap: together they ask for {sum(wanted.values())} of {n} training images "
            "and leave none private; lower validation_fraction, auxiliary_target_fraction or target_fractions"
        )
    from_train, private = _deal_groups(train, wanted, rng)
    if len(private) == 0:
        raise ConfigurationError("data: no private training image is left; the training set has too few groups")
    if config.victims >= len(test):
        raise ConfigurationError(
            f"data.victims: {config.victims} victims leave no probe test image; there are {len(test)} test images"
        )
    test_order = torch.randperm(len(test), generator=rng)
    from_source, defender_source = _deal_groups(
        source, {Role.AUXILIARY_SOURCE: _share(config.auxiliary_source_fraction, len(source))}, rng
    )
    chosen: dict[Role, tuple[ImageSet, Tensor]] = {
        **{role: (train, index) for role, index in from_train.items()},
        **{role: (source, index) for role, index in from_source.items()},
        Role.CLIENT_PRIVATE: (train, private),
        Role.PROBE_TRAIN: (train, private),
        Role.DEFENDER_SOURCE: (source, defender_source),
        Role.VICTIMS: (test, test_order[: config.victims].sort().values),
        Role.PROBE_TEST: (test, test_order[config.victims :].sort().values),
    }
    sets = {role: images.select(index) for role, (images, index) in chosen.items()}
    digests = {role: image_set.digests() for role, image_set in sets.items()}
    check_disjoint(digests)
    return DataRoles(
        sets=sets,
        records={role: _record(sets[role], chosen[role][1], digests[role]) for role in Role},
        training_size=n,
        duplicates_dropped=dropped,
        reading=(*described, *_remarks(train, dropped, contradicting)),
    )


def _remarks(train: ImageSet, dropped: int, contradicting: int) -> list[str]:
    """What a reader should know beside the counts."""
    remarks = []
    if dropped:
        remarks.append(f"duplicates: {dropped} images are left out because the same pixels stand there already")
    if contradicting:
        remarks.append(f"duplicates: {contradicting} pictures stand under two labels; the first one counts")
    if len(train.labels.unique()) < 2:
        remarks.append("no labels: utility not measurable (all images are of one class)")
    return remarks


def _under_two_labels(*sets: ImageSet) -> int:
    """How many pictures of `sets` stand under more than one label."""
    labels: dict[bytes, set[int]] = {}
    for images in sets:
        for digest, label in zip(images.digests(), images.labels.tolist(), strict=True):
            labels.setdefault(digest, set()).add(label)
    return sum(len(found) > 1 for found in labels.values())


def check_disjoint(digests: Mapping[Role, np.ndarray]) -> None:
    """Raise ConfigurationError that names every pair of roles that share an image and must not."""
    problems = []
    for first, second in combinations(digests, 2):
        if frozenset({first, second}) in MAY_OVERLAP:
            continue
        shared = len(np.intersect1d(digests[first], digests[second]))
        if shared:
            problems.append(f"{first} and {second} share {shared} images")
    if problems:
        raise ConfigurationError(f"data roles overlap: {'; '.join(problems)}; choose other source or target data")


def _share(fraction: float, n: int) -> int:
    """`fraction` of `n`, rounded, but at least one image for a fraction above zero."""
    return max(1, round(fraction * n)) if fraction > 0 else 0


def _without_duplicates(images: ImageSet, seen: set[bytes], require_classes: bool = False) -> ImageSet:
    """Drop images whose pixels are in `seen`; add the others to it.

    require_classes: raise ConfigurationError where that leaves a class without any image.
    """
    kept = []
    for index, digest in enumerate(images.digests()):
        if digest not in seen:
            seen.add(digest)
            kept.append(index)
    lost = set(images.labels.tolist()) - set(images.labels[kept].tolist())
    if lost and require_classes:
        raise ConfigurationError(
            f"{images.name}: every image of {', '.join(images.class_names[label] for label in sorted(lost))} stands "
            "under another class or in the test split, too: a folder was linked or copied twice"
        )
    return images if len(kept) == len(images) else images.select(torch.tensor(kept, dtype=torch.long))


def _deal_groups(
    images: ImageSet, wanted: Mapping[Role, int], rng: torch.Generator
) -> tuple[dict[Role, Tensor], Tensor]:
    """Give each role groups, always of the class it has least of, at random within a class; the rest comes second.

    No group is shared. A role takes from one group at most its share of a class, so that a small role still sees
    every class it has images for; what is left of the group belongs to nobody, since it shares pixels with the role.
    """
    names, inverse = torch.unique(images.groups, return_inverse=True)
    shuffled = torch.randperm(len(names), generator=rng)
    members = [torch.empty(0, dtype=torch.long)] * len(names)
    for part in torch.argsort(inverse, stable=True).split(torch.bincount(inverse, minlength=len(names)).tolist()):
        members[int(inverse[part[0]])] = part
    queues: dict[int, list[int]] = {}
    for group in shuffled.tolist():
        queues.setdefault(int(images.labels[members[group][0]]), []).append(group)
    dealt: dict[Role, Tensor] = {}
    for role, count in wanted.items():
        most = -(-count // max(1, len(queues)))
        taken: list[Tensor] = []
        given = dict.fromkeys(queues, 0)
        missing = count
        while missing > 0:
            waiting = [label for label, queue in queues.items() if queue]
            if not waiting:
                raise ConfigurationError(f"data: role {role} asks for {count} images, but too few groups are left")
            label = min(waiting, key=lambda name: given[name])
            taken.append(members[queues[label].pop()][: min(most, missing)])
            given[label] += len(taken[-1])
            missing -= len(taken[-1])
        # one image of each group in turn, so that the first images of a role are as varied as it is
        turns = [int(image) for images_in_turn in zip_longest(*taken) for image in images_in_turn if image is not None]
        dealt[role] = torch.tensor(turns, dtype=torch.long)
    rest = [members[group] for queue in queues.values() for group in queue]
    return dealt, torch.cat(rest).sort().values if rest else torch.empty(0, dtype=torch.long)


def _record(images: ImageSet, indices: Tensor, digests: np.ndarray) -> RoleRecord:
    index_text = images.name + ":" + ",".join(str(i) for i in indices.tolist())
    return RoleRecord(
        images=len(images),
        source=images.name,
        index_sha256=hashlib.sha256(index_text.encode()).hexdigest(),
        content_sha256=hashlib.sha256(b"".join(digests.tolist())).hexdigest(),
        label_sha256=hashlib.sha256(torch.stack([images.labels, images.groups]).numpy().tobytes()).hexdigest(),
    )
