"""Data roles: who may use which image.

Every image of an experiment has a role. Roles are disjoint by construction, and their contents are compared as a check.
Only client private and probe train may share images, since the linear probe in the self-supervised literature is
trained, with labels, on the images on which the encoder was trained.
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
from mocosfl_priv.data.datasets import load_source, load_target
from mocosfl_priv.data.given import GivenData
from mocosfl_priv.data.image_set import ImageSet
from mocosfl_priv.errors import ConfigurationError
from mocosfl_priv.runtime.seeding import generator


class Role(StrEnum):
    """Who may use an image, and for what."""

    CLIENT_PRIVATE = "client_private"
    DEFENDER_TARGET = "defender_target"
    DEFENDER_SOURCE = "defender_source"
    AUXILIARY_TARGET = "auxiliary_target"
    AUXILIARY_SOURCE = "auxiliary_source"
    VICTIMS = "victims"
    PROBE_TRAIN = "probe_train"
    PROBE_VALIDATION = "probe_validation"
    PROBE_TEST = "probe_test"


MOST_NAMED = 5  # at most so many groups are named in a message
MAY_OVERLAP = {frozenset({Role.CLIENT_PRIVATE, Role.PROBE_TRAIN})}


@dataclass(frozen=True)
class RoleRecord:
    """What a result records of a role: its size, its data set, and SHA-256 hashes of its images.

    index_sha256: of the indices in the data set. content_sha256: of the pixels. label_sha256: of labels and groups.
    """

    images: int
    source: str
    index_sha256: str
    content_sha256: str
    label_sha256: str


@dataclass(frozen=True)
class DataRoles:
    """All images of an experiment, by role.

    sets: the images of each role.
    records: what a result records of each role.
    training_size: number of images in the whole target training set, of which target fractions are fractions.
    duplicates_dropped: number of images left out of the target data because another one has the same pixels; of a
        training image and an equal test image, the test image is kept.
    reading: lines of text for the user: what was read as target and source data, and what is left out or missing.
    """

    sets: Mapping[Role, ImageSet]
    records: Mapping[Role, RoleRecord]
    training_size: int
    duplicates_dropped: int
    reading: tuple[str, ...] = ()

    @property
    def labelled(self) -> bool:
        """Whether there is more than one class; otherwise accuracy has no meaning."""
        tested = self.sets.get(Role.PROBE_TRAIN, self.sets[Role.VICTIMS])  # an audit has no images for probes
        return len(tested.labels.unique()) > 1

    def __getitem__(self, role: Role) -> ImageSet:
        return self.sets[role]

    def count(self, role: Role) -> int:
        """Number of images of a role, 0 for one that is not there."""
        return len(self.sets[role]) if role in self.sets else 0

    def defender_target(self, fraction: float) -> ImageSet:
        """Return the defender's target images for a fraction of the target training set.

        A larger fraction contains the images of a smaller one. `fraction` must not exceed the one given to
        :func:`assign_roles`.
        """
        return self.sets[Role.DEFENDER_TARGET].select(torch.arange(_share(fraction, self.training_size)))


def assign_roles(config: DataConfig, largest_target_fraction: float, given: GivenData | None = None) -> DataRoles:
    """Load target and source data and give every image its role.

    largest_target_fraction: of the target training set, for the defender. given: images that were read before.
    Raises ConfigurationError when the data has too few images for the configured roles, or when roles that must be
    disjoint share an image.
    """
    rng = generator(config.role_seed, "roles")
    train, test = (given and given.target) or load_target(config)
    source = (given and given.source) or load_source(config)
    _require_own_groups(train, test, source)
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
            f"data: the roles {parts} together ask for {sum(wanted.values())} of {n} training images and leave none "
            "for the clients; lower validation_fraction, auxiliary_target_fraction or target_fractions"
        )
    from_train, private = _deal_groups(train, wanted, rng)
    if len(private) == 0:
        raise ConfigurationError(
            "data: no training image is left for the clients; the training set has too few groups of images that "
            + ("belong together" if train.group_names else "share no pixels")
        )
    if config.victims >= len(test):
        raise ConfigurationError(
            f"data.victims: {config.victims} victims leave no image to test probes; there are {len(test)} test images"
        )
    victims, probed = _deal_victims(test, config.victims, rng)
    from_source, defender_source = _deal_groups(
        source, {Role.AUXILIARY_SOURCE: _share(config.auxiliary_source_fraction, len(source))}, rng
    )
    chosen: dict[Role, tuple[ImageSet, Tensor]] = {
        **{role: (train, index) for role, index in from_train.items()},
        **{role: (source, index) for role, index in from_source.items()},
        Role.CLIENT_PRIVATE: (train, private),
        Role.PROBE_TRAIN: (train, private),
        Role.DEFENDER_SOURCE: (source, defender_source),
        Role.VICTIMS: (test, victims),
        Role.PROBE_TEST: (test, probed),
    }
    sets = {role: images.select(index) for role, (images, index) in chosen.items()}
    digests = {role: image_set.digests() for role, image_set in sets.items()}
    check_disjoint(digests)
    check_groups(sets)
    unused = len(train) + len(test) - sum(len(index) for index in (*from_train.values(), private, victims, probed))
    return DataRoles(
        sets=sets,
        records={role: role_record(sets[role], chosen[role][1], digests[role]) for role in Role},
        training_size=n,
        duplicates_dropped=dropped,
        reading=(*described, *_remarks(train, dropped, contradicting), *_group_remarks(train, test, unused)),
    )


def _remarks(train: ImageSet, dropped: int, contradicting: int) -> list[str]:
    """Lines of text for the user: dropped duplicates, images with several labels, missing labels."""
    remarks = []
    if dropped:
        remarks.append(f"duplicates: {dropped} images are left out because another image has the same pixels")
    if contradicting:
        remarks.append(f"duplicates: {contradicting} pictures occur under more than one label; the first one is kept")
    if len(train.labels.unique()) < 2:
        remarks.append("no labels: utility not measurable (all images are of one class)")
    return remarks


def _group_remarks(train: ImageSet, test: ImageSet, unused: int) -> list[str]:
    """A line of text for the user where groups are named: how many there are, and how many images they cost."""
    if not train.group_names:
        return []
    named = len(train.names_of_groups() | test.names_of_groups())
    left = f"; {unused} images are left out because their group has another role" if unused else ""
    return [f"groups: no two of the roles that must be disjoint share one of the {named} groups{left}"]


def _require_own_groups(train: ImageSet, test: ImageSet, source: ImageSet) -> None:
    """Raise ConfigurationError if a named group is in both splits, or in target and source data."""
    trained, tested = train.names_of_groups(), test.names_of_groups()
    for shared, where in (
        (
            trained & tested,
            "in the training and in the test split; give the images without splits, and they are divided by groups",
        ),
        (
            (trained | tested) & source.names_of_groups(),
            "in the target and in the source data; if they differ, rename them",
        ),
    ):
        if shared:
            named = ", ".join(sorted(shared)[:MOST_NAMED])
            more = f" and {len(shared) - MOST_NAMED} more" if len(shared) > MOST_NAMED else ""
            raise ConfigurationError(f"data: the groups {named}{more} are {where}")


def _deal_victims(test: ImageSet, victims: int, rng: torch.Generator) -> tuple[Tensor, Tensor]:
    """The indices of the victims and of the images that test probes, ascending.

    Images are dealt one by one where nobody named groups: neither role is trained on, so patches that overlap reveal
    nothing. Named groups are never divided.
    """
    if not test.group_names:
        order = torch.randperm(len(test), generator=rng)
        return order[:victims].sort().values, order[victims:].sort().values
    dealt, rest = _deal_groups(test, {Role.VICTIMS: victims}, rng)
    if not len(rest):
        raise ConfigurationError(
            f"data.victims: {victims} victims leave no group to test probes; the test images are of "
            f"{len(test.names_of_groups())} groups"
        )
    return dealt[Role.VICTIMS].sort().values, rest


def _under_two_labels(*sets: ImageSet) -> int:
    """Number of distinct pictures in `sets` that occur under more than one label."""
    labels: dict[bytes, set[int]] = {}
    for images in sets:
        for digest, label in zip(images.digests(), images.labels.tolist(), strict=True):
            labels.setdefault(digest, set()).add(label)
    return sum(len(found) > 1 for found in labels.values())


def check_disjoint(digests: Mapping[Role, np.ndarray]) -> None:
    """Raise ConfigurationError, which names the pairs, if roles share an image that must be disjoint.

    digests: the hashes of each role's images, as :meth:`ImageSet.digests` returns them.
    """
    problems = []
    for first, second in combinations(digests, 2):
        if frozenset({first, second}) in MAY_OVERLAP:
            continue
        shared = len(np.intersect1d(digests[first], digests[second]))
        if shared:
            problems.append(f"{first} and {second} share {shared} images")
    if problems:
        raise ConfigurationError(f"data roles overlap: {'; '.join(problems)}; choose other source or target data")


def check_groups(sets: Mapping[Role, ImageSet]) -> None:
    """Raise ConfigurationError, which names the pair, if roles share a named group that must be disjoint."""
    names = {role: images.names_of_groups() for role, images in sets.items()}
    for first, second in combinations(names, 2):
        if frozenset({first, second}) not in MAY_OVERLAP and names[first] & names[second]:
            shared = ", ".join(sorted(names[first] & names[second])[:MOST_NAMED])
            raise ConfigurationError(f"data roles overlap: {first} and {second} share the groups {shared}")


def _share(fraction: float, n: int) -> int:
    """`fraction` of `n`, rounded, but at least one image for a fraction above zero."""
    return max(1, round(fraction * n)) if fraction > 0 else 0


def _without_duplicates(images: ImageSet, seen: set[bytes], require_classes: bool = False) -> ImageSet:
    """Drop images whose hash is in `seen`, and add the hashes of the others to it.

    require_classes: raise ConfigurationError if a class loses all its images.
    """
    kept = []
    for index, digest in enumerate(images.digests()):
        if digest not in seen:
            seen.add(digest)
            kept.append(index)
    lost = set(images.labels.tolist()) - set(images.labels[kept].tolist())
    if lost and require_classes:
        raise ConfigurationError(
            f"{images.name}: every image of {', '.join(images.class_names[label] for label in sorted(lost))} occurs "
            "under another class or in the test split, too; was a folder linked or copied twice?"
        )
    return images if len(kept) == len(images) else images.select(torch.tensor(kept, dtype=torch.long))


def _deal_groups(
    images: ImageSet, wanted: Mapping[Role, int], rng: torch.Generator
) -> tuple[dict[Role, Tensor], Tensor]:
    """Deal groups of images to the roles in `wanted`; return each role's indices, and the indices of all other groups.

    Each role takes random groups, always of the class of which it has the fewest images. From a group it takes at most
    as many images as it needs per class, so that even a small role has images of every class. The remaining images of
    that group are not used, since they share pixels with those taken.
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
        # take one image of each group in turn, so that the first images of a role come from many groups and classes
        turns = [int(image) for images_in_turn in zip_longest(*taken) for image in images_in_turn if image is not None]
        dealt[role] = torch.tensor(turns, dtype=torch.long)
    rest = [members[group] for queue in queues.values() for group in queue]
    return dealt, torch.cat(rest).sort().values if rest else torch.empty(0, dtype=torch.long)


def role_record(images: ImageSet, indices: Tensor, digests: np.ndarray) -> RoleRecord:
    """What a result records of `images`, which have the `indices`, int64 (n,), in their data set, and the `digests`."""
    index_text = images.name + ":" + ",".join(str(i) for i in indices.tolist())
    return RoleRecord(
        images=len(images),
        source=images.name,
        index_sha256=hashlib.sha256(index_text.encode()).hexdigest(),
        content_sha256=hashlib.sha256(b"".join(digests.tolist())).hexdigest(),
        label_sha256=hashlib.sha256(torch.stack([images.labels, images.groups]).numpy().tobytes()).hexdigest(),
    )
