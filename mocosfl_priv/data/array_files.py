"""Files of arrays: ``.npy``, ``.npz``, ``.pt`` and HDF5. Nothing in them is unpickled but tensors."""

from __future__ import annotations

import pickle
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch

from mocosfl_priv.errors import ConfigurationError

NUMPY, TORCH, HDF5 = (".npy", ".npz"), (".pt", ".pth"), (".h5", ".hdf5")
SUFFIXES = (*NUMPY, *TORCH, *HDF5)


@contextmanager
def opened(path: Path) -> Iterator[Any]:
    """Open a file of arrays; gives an array, a mapping of names to arrays, or what else of tensors a ``.pt`` holds.

    Arrays of ``.npz`` and HDF5 files are read when they are asked for.

    Raises:
        ConfigurationError: the file is missing or damaged, holds Python objects, or the extra for HDF5 is missing.

    """
    suffix = path.suffix.lower()
    if not path.is_file():
        raise ConfigurationError(f"there is no file {path}")
    try:
        if suffix in HDF5:
            with _hdf5(path) as arrays:
                yield arrays
        elif suffix in TORCH:
            yield torch.load(path, map_location="cpu", weights_only=True)
        else:
            loaded = np.load(path, allow_pickle=False)
            if isinstance(loaded, np.ndarray):
                yield loaded
            else:
                with loaded:
                    yield loaded
    except (pickle.UnpicklingError, ValueError) as error:
        if "pickle" in str(error) or isinstance(error, pickle.UnpicklingError):
            raise ConfigurationError(
                f"{path} holds Python objects, which are never loaded, since they may run code: save arrays of numbers "
                "or tensors only"
            ) from error
        raise ConfigurationError(f"{path} cannot be read: {_reason(error)}") from error
    except (OSError, EOFError, RuntimeError, KeyError, zipfile.BadZipFile) as error:
        raise ConfigurationError(f"{path} cannot be read: {_reason(error)}") from error


def _reason(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__


class _Hdf5Arrays(Mapping[str, Any]):
    """The data sets of an HDF5 file by their paths, each read when it is asked for."""

    def __init__(self, by_path: Mapping[str, Any]) -> None:
        self.by_path = by_path

    def __getitem__(self, name: str) -> np.ndarray:
        import h5py

        data = self.by_path[name]
        return np.asarray(data.asstr()[()] if h5py.check_string_dtype(data.dtype) else data[()])

    def __iter__(self) -> Iterator[str]:
        return iter(self.by_path)

    def __len__(self) -> int:
        return len(self.by_path)


@contextmanager
def _hdf5(path: Path) -> Iterator[_Hdf5Arrays]:
    try:
        import h5py  # an extra, since only files of this kind need it
    except ImportError as error:
        raise ConfigurationError(f"{path}: to read HDF5, pip install 'mocosfl-priv[hdf5]'") from error
    with h5py.File(path, "r") as file:
        yield _Hdf5Arrays(dict(_data_sets(file, "", path)))


def _data_sets(group: Any, prefix: str, path: Path) -> Iterator[tuple[str, Any]]:
    """The data sets below `group` that lie in this very file: a link or storage elsewhere may be any file."""
    import h5py

    for name in group:
        if not isinstance(group.get(name, getlink=True), h5py.HardLink):
            continue
        entry = group[name]
        if isinstance(entry, h5py.Group):
            yield from _data_sets(entry, f"{prefix}{name}/", path)
        elif isinstance(entry, h5py.Dataset) and entry.ndim:
            if entry.external or entry.is_virtual:
                raise ConfigurationError(f"{path}: {prefix}{name} lies in other files, which are not read")
            yield f"{prefix}{name}", entry
