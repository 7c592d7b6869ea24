"""The images of one client on a device: a shard file, or an image folder."""

from __future__ import annotations

import hashlib
import logging
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from .container import LARGEST_HEADER, LENGTH, pack, read_header
from .errors import DeviceError
from .pictures import Reading, find, read

LOG = logging.getLogger("mocosfl-priv-client")
FORMAT = "1"
BLOCK = 2**20


@dataclass(frozen=True)
class Shard:
    """One client's private images.

    images: uint8 (n, 3, h, w), read-only; memory-mapped if they come from a file.
    ids: int64 (n,), index of each image in the data set, or in the sorted folder.
    name: data set and client, for readers.

    Raises DeviceError if shapes or types do not fit, or if there are no images.
    """

    images: np.ndarray
    ids: np.ndarray
    name: str = ""

    def __post_init__(self) -> None:
        if self.images.dtype != np.uint8 or self.images.ndim != 4 or self.images.shape[1] != 3:
            raise DeviceError(f"shard: images must be uint8 (n, 3, h, w), not {self.images.dtype} {self.images.shape}")
        if self.ids.dtype != np.int64 or self.ids.shape != self.images.shape[:1]:
            raise DeviceError(f"shard: {len(self.images)} images need as many int64 ids, not {self.ids.shape}")
        if len(self.images) == 0:
            raise DeviceError("shard: there are no images")

    def __len__(self) -> int:
        return len(self.images)

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """The shape of every image, (3, h, w)."""
        _, channels, height, width = self.images.shape
        return channels, height, width

    def take(self, positions: Sequence[int] | np.ndarray) -> np.ndarray:
        """Return a copy of the images at `positions`, uint8 (k, 3, h, w); raises DeviceError for invalid positions."""
        chosen = np.asarray(positions, dtype=np.int64)
        if chosen.ndim != 1 or (chosen.size and not (chosen.min() >= 0 and chosen.max() < len(self))):
            raise DeviceError(f"shard: positions must lie between 0 and {len(self) - 1}, not {positions}")
        taken: np.ndarray = self.images[chosen]
        return taken

    def write(self, path: Path) -> None:
        """Write a file in the safetensors format atomically, with a checksum in its metadata.

        Raises DeviceError if it cannot be written.
        """
        arrays = {"images": self.images, "ids": self.ids}
        metadata = {"shard": FORMAT, "name": self.name, "sha256": _checksum(self.ids, self.images)}
        staged = path.with_name(path.name + ".part")
        try:
            with staged.open("wb") as file:
                file.write(pack(arrays, metadata))
                file.flush()
                os.fsync(file.fileno())
            staged.replace(path)
        except OSError as error:
            raise DeviceError(f"shard {path} cannot be written: {error.strerror}") from error

    @classmethod
    def read(cls, path: Path) -> Shard:
        """Verify the checksum of the shard file at `path` and map it; raises DeviceError if it is damaged."""
        try:
            with path.open("rb") as file:
                total = os.fstat(file.fileno()).st_size
                entries, metadata, start = read_header(file.read(LENGTH.size + LARGEST_HEADER), total)
                if metadata.get("shard") != FORMAT or set(entries) != {"images", "ids"}:
                    raise DeviceError(f"not a shard of format {FORMAT}")
                file.seek(start)
                digest = hashlib.sha256()
                while block := file.read(BLOCK):
                    digest.update(block)
        except (OSError, DeviceError) as error:
            reason = error.strerror if isinstance(error, OSError) else error
            raise DeviceError(f"shard {path} cannot be read: {reason}") from error
        if digest.hexdigest() != metadata.get("sha256"):
            raise DeviceError(f"shard {path} is damaged: its checksum does not match; copy it again")
        if not all(entry.shape and entry.shape[0] for entry in entries.values()):
            raise DeviceError(f"shard {path} holds no images")
        images, ids = (
            np.memmap(path, e.dtype, "r", start + e.begin, e.shape) for e in (entries["images"], entries["ids"])
        )
        return cls(images, np.array(ids), metadata.get("name", ""))

    @classmethod
    def from_folder(cls, folder: Path, image_size: int) -> Shard:
        """Read all images below `folder`, sorted by path, resized and centre-cropped to `image_size` pixels per side.

        A summary of what was read and skipped is logged. Raises DeviceError if there are no images, or if one cannot be
        read; see :mod:`pictures`.
        """
        if not folder.is_dir():
            raise DeviceError(f"there is no image folder {folder}")
        reading = Reading()
        paths = find(folder, reading)
        if not paths:
            raise DeviceError(f"image folder {folder} holds no images" + (f"; {reading.text}" if reading.text else ""))
        images = np.empty((len(paths), 3, image_size, image_size), np.uint8)
        for position, path in enumerate(paths):
            images[position] = read(path, image_size, reading).transpose(2, 0, 1)
        reading.require_whole_range()
        LOG.info("%s: %d images; %s", folder, len(paths), reading.text)
        images.flags.writeable = False
        return cls(images, np.arange(len(paths), dtype=np.int64), str(folder))


def _checksum(ids: np.ndarray, images: np.ndarray) -> str:
    """SHA-256 of the arrays' bytes in the order of the file, which has wide types first."""
    digest = hashlib.sha256(np.ascontiguousarray(ids, "<i8").tobytes())
    digest.update(np.ascontiguousarray(images).tobytes())
    return digest.hexdigest()
