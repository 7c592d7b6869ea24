"""A CSV file with the label of each image, beside a folder of images without class folders.

Its columns are ``file``, ``label``, and optionally ``group`` and ``split``; other columns are not read. A file is named
by its path below the folder, by its name alone, or without its ending, as long as one picture is meant.
"""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from mocosfl_priv.data.examples import NAMED, WHOLE, Examples, Naming, groups_of, labels_of
from mocosfl_priv.data.image_folder import split_named
from mocosfl_priv.data.pixel_arrays import stacked
from mocosfl_priv.device.pictures import Reading, Size, find, read
from mocosfl_priv.errors import ConfigurationError
from mocosfl_priv.runtime.files import user_path

if TYPE_CHECKING:
    import pandas as pd

FILE, LABEL, GROUP, SPLIT = ("file", "filename", "file_name", "image", "path", "image_id"), "label", "group", "split"
UNLISTED = "not in the file of labels"


def read_labelled_folder(folder: Path, csv: Path, size: Size, naming: Naming) -> dict[str, Examples]:
    """Read the pictures below `folder` that `csv` lists, by split.

    Splits are those of the column ``split``, or else of the folders below `folder`; else there are none.

    Args:
        folder: the folder of pictures.
        csv: the file of labels, relative to the current folder, to `folder`, or to the folder above it.
        size: of the images, see :func:`mocosfl_priv.device.pictures.read`.
        naming: other columns for labels and groups.

    Raises:
        ConfigurationError: a file or column is missing, a picture is named twice, or cannot be read.

    """
    if not folder.is_dir():
        raise ConfigurationError(f"imagefolder: there is no folder {folder}")
    place = _found(folder, csv)
    table = _table(place)
    column = _column(table, FILE, place)
    label = _column(table, (naming.label_column or LABEL,), place, "data.label_column" if naming.label_column else "")
    grouped = naming.group_column or (GROUP if GROUP in table else None)
    if naming.group_column:
        _column(table, (naming.group_column,), place, "data.group_column")
    reading = Reading()
    pictures = find(folder, reading)
    paths = _matched(table[column].tolist(), [path.relative_to(folder).as_posix() for path in pictures], folder, place)
    unlisted = len(pictures) - len(paths)
    if unlisted:
        reading.skipped[UNLISTED] += unlisted
    splits = _splits(table, paths, place)
    made = {}
    for split in dict.fromkeys(splits):
        rows = np.flatnonzero(np.array(splits) == split)
        part = reading if split == splits[0] else Reading()  # what was skipped is said once
        names = tuple(paths[row] for row in rows)
        images = stacked([read(folder / name, size, part) for name in names], str(folder))
        part.require_whole_range()
        chosen = table.iloc[rows]
        groups = groups_of(chosen[grouped].to_numpy(object), len(rows), f"{place}: {grouped}") if grouped else None
        labels = labels_of(chosen[label].to_numpy(object), len(rows), f"{place}: {label}")
        made[split] = Examples(images, part, labels, groups=groups, names=names)
    return made


def _found(folder: Path, csv: Path) -> Path:
    places = [user_path(csv), folder / csv, folder.parent / csv]
    for place in places:
        if place.is_file():
            return place
    raise ConfigurationError(f"data.labels: there is no file {csv}, neither here nor in {folder} nor beside it")


def _table(place: Path) -> pd.DataFrame:
    import pandas as pd  # with pyarrow takes half a second, and only files of labels need it

    try:
        table = pd.read_csv(place, dtype=str, keep_default_na=False, skipinitialspace=True, encoding="utf-8-sig")
    except (OSError, ValueError) as error:  # pandas' errors of parsing are ValueErrors
        raise ConfigurationError(f"data.labels: {place} cannot be read: {' '.join(str(error).split())}") from error
    if not len(table):
        raise ConfigurationError(f"data.labels: {place} has no rows")
    return table


def _column(table: pd.DataFrame, names: tuple[str, ...], place: Path, key: str = "") -> str:
    found = [name for name in names if name in table]
    if found:
        return found[0]
    has = ", ".join(map(str, table.columns[: 2 * NAMED]))
    raise ConfigurationError(f"{key or 'data.labels'}: {place} has no column {names[0]!r}; it has {has}")


def _matched(listed: list[str], there: list[str], folder: Path, place: Path) -> list[str]:
    """The path of the picture that each entry of the file of labels means."""
    by_name: dict[str, list[str]] = defaultdict(list)
    for path in there:
        names = {path, Path(path).name, Path(path).stem, path.removesuffix(Path(path).suffix)}
        for name in names:
            by_name[name].append(path)
    known = set(there)
    paths, missing = [], []
    for entry in listed:
        name = Path(entry.strip()).as_posix()
        meant = [name] if name in known else by_name.get(name, [])
        if len(meant) > 1:
            raise ConfigurationError(f"data.labels: {entry!r} in {place} may be {meant[0]} or {meant[1]} in {folder}")
        if meant:
            paths.append(meant[0])
        else:
            missing.append(entry)
    if missing:
        raise ConfigurationError(
            f"data.labels: {len(missing)} of {len(listed)} files in {place} are not in {folder}, the first: "
            f"{missing[0]!r}"
        )
    if len(set(paths)) < len(paths):
        twice = next(path for path in paths if paths.count(path) > 1)
        raise ConfigurationError(f"data.labels: {place} lists {twice} more than once")
    return paths


def _splits(table: pd.DataFrame, paths: list[str], place: Path) -> list[str]:
    """The split of each row; `WHOLE` for all where none is said."""
    column = SPLIT in table
    said = table[SPLIT].str.strip().tolist() if column else [Path(path).parts[0] for path in paths]
    splits = [split_named(word) for word in said]
    if not any(splits) and not column:
        return [WHOLE] * len(paths)
    wrong = [word for word, split in zip(said, splits, strict=True) if split is None]
    if wrong:
        where = f"column split of {place}" if column else "folders"
        raise ConfigurationError(f"data.labels: the {where} names splits, but also {wrong[0]!r}")
    return [split for split in splits if split is not None]
