"""Tables of pictures: Parquet files with image bytes, and folders that Hugging Face `datasets` has saved.

Both are read through pyarrow, without the package `datasets`: its folders are Arrow files beside JSON. Names of classes
come from the metadata that `datasets` writes into either.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from mocosfl_priv.data.examples import NAMED, WHOLE, Examples, Naming, groups_of, labels_of
from mocosfl_priv.data.image_folder import require_distinct, split_named
from mocosfl_priv.data.named_fields import GROUPS, IMAGES, LABELS, Fields, sort_fields
from mocosfl_priv.data.pixel_arrays import images_of, stacked
from mocosfl_priv.device.pictures import Reading, Size, is_litter, read_bytes
from mocosfl_priv.errors import ConfigurationError

if TYPE_CHECKING:
    import pyarrow as pa

PARQUET, ARROW = ".parquet", ".arrow"
STATE, SPLITS, INFO = "state.json", "dataset_dict.json", "dataset_info.json"  # what `datasets` writes


def is_table(path: Path) -> bool:
    """Whether `path` is a Parquet file, or a folder of Parquet files or of Hugging Face `datasets`."""
    if path.is_file():
        return path.suffix.lower() == PARQUET
    if not path.is_dir():
        return False
    return (path / SPLITS).is_file() or bool(_files(path, ARROW)) or bool(_files(path, PARQUET))


def read_table(path: Path, size: Size, naming: Naming) -> dict[str, Examples]:
    """Read a Parquet file, or a folder of Parquet files or of Hugging Face `datasets`, by split.

    Splits are told by the folder's own files, or by names of files such as ``train-00000-of-00001.parquet``.

    Raises:
        ConfigurationError: a file is missing or damaged, or a table holds no images or is ambiguous.

    """
    import pyarrow as pa  # takes a tenth of a second, and only tables need it

    try:
        return {split: _examples(_joined(files), where, size, naming) for split, where, files in _splits(path)}
    except (pa.ArrowException, OSError) as error:
        raise ConfigurationError(f"{path} cannot be read: {' '.join(str(error).split())}") from error


def _splits(path: Path) -> list[tuple[str, str, list[Path]]]:
    """The splits of a table: name, what messages call it, and its files in order."""
    if path.is_file():
        return [(WHOLE, str(path), [path])]
    if (path / SPLITS).is_file():
        names = _json(path / SPLITS).get("splits")
        if not isinstance(names, list) or not all(isinstance(name, str) and Path(name).name == name for name in names):
            raise ConfigurationError(f"{path / SPLITS} lists no splits")
        require_distinct({name: split_named(name) or name for name in names}, str(path))
        return [
            (split_named(name) or name, f"{path}/{name}", files)
            for name in names
            for _, _, files in _splits_of_files(path / name)
        ]
    return _splits_of_files(path)


def _splits_of_files(folder: Path) -> list[tuple[str, str, list[Path]]]:
    if (folder / STATE).is_file():
        state = _json(folder / STATE)
        if state.get("_indices_data_files"):
            raise ConfigurationError(f"{folder} holds a selection of rows in a form of old `datasets`: save it again")
        entries = state.get("_data_files")
        names = [entry.get("filename") for entry in entries] if isinstance(entries, list) else []
        if not names or not all(isinstance(name, str) and Path(name).name == name for name in names):
            raise ConfigurationError(f"{folder / STATE} names no files")
        return [(WHOLE, str(folder), [folder / name for name in names])]
    files = _files(folder, PARQUET) or _files(folder, ARROW)
    if not files:
        raise ConfigurationError(f"{folder} holds no tables")
    found: dict[str, list[Path]] = {}
    for file in files:
        words = [*file.relative_to(folder).parts[:-1], *file.stem.replace("_", "-").replace(".", "-").split("-")]
        said = {split for split in map(split_named, words) if split is not None}
        if len(said) > 1:
            raise ConfigurationError(f"{file}: its name says {' and '.join(sorted(said))}")
        found.setdefault(said.pop() if said else WHOLE, []).append(file)
    return [(split, f"{folder}{f' ({split})' if split else ''}", names) for split, names in found.items()]


def _files(folder: Path, suffix: str) -> list[Path]:
    return sorted(
        path for path in (*folder.glob(f"*{suffix}"), *folder.glob(f"*/*{suffix}")) if not is_litter(path.name)
    )


def _json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigurationError(f"{path} cannot be read: {' '.join(str(error).split())}") from error
    return content if isinstance(content, dict) else {}


def _joined(files: Sequence[Path]) -> pa.Table:
    import pyarrow as pa
    import pyarrow.parquet as pq

    tables = []
    for file in files:
        if file.suffix.lower() == PARQUET:
            tables.append(pq.read_table(file))
            continue
        with pa.memory_map(str(file)) as source:
            try:
                tables.append(pa.ipc.open_stream(source).read_all())
            except pa.ArrowInvalid:  # written as a file, not as a stream
                source.seek(0)
                tables.append(pa.ipc.open_file(source).read_all())
    return pa.concat_tables(tables)


def _examples(table: pa.Table, where: str, size: Size, naming: Naming) -> Examples:
    if not table.num_rows:
        raise ConfigurationError(f"{where}: there are no rows in it")
    features = _features(table)
    pictures = [name for name in table.column_names if _is_picture(table.schema.field(name).type, features.get(name))]
    # a column that holds pictures is the images whatever its name; others are told by their names
    named = sort_fields([name for name in table.column_names if name not in pictures], naming, where)
    fields = named.get(WHOLE, Fields())
    asked = [name for name in pictures if name in ("image", "img", IMAGES)] if len(pictures) > 1 else pictures
    if len(asked) > 1 or (not asked and (pictures or IMAGES not in fields.by_role)):
        has = f"several columns of pictures: {', '.join(pictures)}" if pictures else "no column of pictures"
        raise ConfigurationError(f"{where} has {has}; its columns: {', '.join(table.column_names[: 2 * NAMED])}")
    reading = Reading()
    names = None
    if asked:
        images, names = _decoded(_storage(table.column(asked[0])), where, size, reading)
    else:
        values = _storage(table.column(fields.by_role[IMAGES])).to_pylist()
        images = images_of(_rectangular(values, where), where, size, reading)
    reading.require_whole_range()
    class_names = (features.get(fields.by_role.get(LABELS, "")) or {}).get("names")
    return Examples(
        images,
        reading,
        labels=_column(table, fields, LABELS, labels_of, where),
        class_names=tuple(map(str, class_names)) if class_names else None,
        groups=_column(table, fields, GROUPS, groups_of, where),
        names=names,
        notes=(f"columns not read: {', '.join(fields.unknown[:NAMED])}",) if fields.unknown else (),
    )


def _column(table: pa.Table, fields: Fields, role: str, understood: Any, where: str) -> np.ndarray | None:
    name = fields.by_role.get(role)
    if name is None:
        return None
    values = _storage(table.column(name)).to_pylist()
    held = np.empty(len(values), object)
    held[:] = values
    plain = np.array(values) if all(isinstance(value, int | float) for value in values) else held
    return np.asarray(understood(plain, len(values), f"{where}: {name}"))


def _features(table: pa.Table) -> dict[str, dict[str, Any]]:
    """What `datasets` says of each column in the table's metadata; empty where another program wrote it."""
    try:
        said = json.loads((table.schema.metadata or {}).get(b"huggingface", b"{}"))["info"]["features"]
    except (ValueError, KeyError, TypeError):
        return {}
    return {name: feature for name, feature in said.items() if isinstance(feature, dict)} if said else {}


def _is_picture(kind: pa.DataType, feature: dict[str, Any] | None) -> bool:
    import pyarrow as pa

    if feature is not None and feature.get("_type") == "Image":
        return True
    if pa.types.is_struct(kind):
        return "bytes" in {kind.field(index).name for index in range(kind.num_fields)}
    return bool(pa.types.is_binary(kind) or pa.types.is_large_binary(kind))


def _storage(column: pa.ChunkedArray) -> pa.ChunkedArray:
    """A column without the types that `datasets` registers for arrays once it is imported."""
    import pyarrow as pa

    if isinstance(column.type, pa.BaseExtensionType):
        return pa.chunked_array([chunk.storage for chunk in column.chunks])
    return column


def _decoded(
    column: pa.ChunkedArray, where: str, size: Size, reading: Reading
) -> tuple[np.ndarray, tuple[str, ...] | None]:
    """The pictures of a column, and the names of their files where it has them all."""
    images: list[np.ndarray] = []
    names: list[str] = []
    for row, value in enumerate(column):
        entry = value.as_py()
        content, name = (entry.get("bytes"), entry.get("path")) if isinstance(entry, dict) else (entry, None)
        called = f"{where}: row {row}" + (f" ({name})" if name else "")
        if content is None:
            raise ConfigurationError(f"{called} holds no image bytes; embed the files into the table")
        images.append(read_bytes(content, called, size, reading))
        names.append(name or "")
    return stacked(images, where), tuple(names) if all(names) else None


def _rectangular(values: list[Any], where: str) -> np.ndarray:
    try:
        array = np.array(values)
    except ValueError as error:
        raise ConfigurationError(f"{where}: images have different sizes; save them as image bytes") from error
    # nested lists carry no type: whole numbers up to 255 are 8 bits
    whole = array.dtype.kind in "iu" and array.size and array.min() >= 0 and array.max() <= 255
    return array.astype(np.uint8) if whole else array
