"""Arrays and columns with names, as files and mappings hold them: which are images, labels and groups, of which split.

Names are understood as people write them: ``images`` and ``labels``, ``x_train`` and ``y_test`` (Keras),
``train_images`` (MedMNIST), ``test/labels`` (HDF5).
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, field

from mocosfl_priv.data.examples import NAMED, WHOLE, Naming, NoGroupsError
from mocosfl_priv.data.image_folder import split_named
from mocosfl_priv.errors import ConfigurationError

IMAGES, LABELS, GROUPS, CLASS_NAMES = "images", "labels", "groups", "class_names"
KNOWN = {
    IMAGES: ("images", "image", "imgs", "img", "x", "data", "pixels", "pixel_values", "pictures", "picture", "arr_0"),
    LABELS: ("labels", "label", "y", "targets", "target", "class", "classes", "class_id", "arr_1"),
    GROUPS: ("groups", "group"),
    CLASS_NAMES: ("class_names", "label_names"),
}
ROLE_OF = {name: role for role, names in KNOWN.items() for name in names}


@dataclass
class Fields:
    """The names of the fields of one split, by their role; `unknown` are those without one."""

    by_role: dict[str, str] = field(default_factory=dict)
    unknown: list[str] = field(default_factory=list)


def sort_fields(names: Iterable[str], naming: Naming, where: str) -> dict[str, Fields]:
    """Return which field holds what, by split; `WHOLE` holds the fields whose names say no split.

    Raises:
        ConfigurationError: two fields of a split have one role, or a column that `naming` asks for is not there.

    """
    found: dict[str, Fields] = {}
    names = list(names)
    columns = {LABELS: naming.label_column, GROUPS: naming.group_column}
    asked = {wanted: column for wanted, column in columns.items() if column is not None}
    met = set()
    for name in names:
        split, rest = _split_and_rest(name)
        role = ROLE_OF.get(rest, IMAGES if split and not rest else "")
        for wanted, column in asked.items():
            if column == name or column.lower() == rest:
                role = wanted
                met.add(wanted)
            elif role == wanted:  # another column takes its place
                role = ""
        fields = found.setdefault(split, Fields())
        if not role:
            fields.unknown.append(name)
        elif role in fields.by_role:
            raise ConfigurationError(f"{where}: {fields.by_role[role]!r} and {name!r} may both be the {role}; keep one")
        else:
            fields.by_role[role] = name
    for wanted, column in asked.items():
        if wanted not in met:
            if wanted == GROUPS:
                raise NoGroupsError(f"data.group_column: {where} has no {column!r}; it has {_some(names)}")
            raise ConfigurationError(f"data.label_column: {where} has no {column!r}; it has {_some(names)}")
    return found


def named_splits(found: dict[str, Fields], where: str) -> dict[str, Fields]:
    """Return the splits of `found` that hold images.

    Raises:
        ConfigurationError: there is none.

    """
    splits = {split: fields for split, fields in found.items() if IMAGES in fields.by_role}
    if not splits:
        names = [name for fields in found.values() for name in (*fields.by_role.values(), *fields.unknown)]
        raise ConfigurationError(f"{where}: nothing in it is called images; it has {_some(names)}")
    shared = found.get(WHOLE, Fields()).by_role.get(CLASS_NAMES)
    for fields in splits.values():
        if shared is not None:
            fields.by_role.setdefault(CLASS_NAMES, shared)
    return splits


def _split_and_rest(name: str) -> tuple[str, str]:
    """The split that a name says, and what else it says: ``xTrain`` is ("train", "x")."""
    apart = re.sub(r"(?<=[a-z])(?=[A-Z])", "_", name)
    words = [word for word in re.split(r"[^a-z0-9]+", apart.lower()) if word]
    splits = [split_named(word) for word in words]
    said = {split for split in splits if split is not None}
    rest = "_".join(word for word, split in zip(words, splits, strict=True) if split is None)
    return (said.pop(), rest) if len(said) == 1 else (WHOLE, "_".join(words))


def _some(names: list[str]) -> str:
    more = f" and {len(names) - 2 * NAMED} more" if len(names) > 2 * NAMED else ""
    return ", ".join(names[: 2 * NAMED]) + more if names else "nothing"
