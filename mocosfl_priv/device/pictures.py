"""Find image files in a folder, and read them as upright, square 8-bit RGB images, or refuse them with the reason.

Server and devices use the same reader, so that the same folder gives the same pixels on both. All changes (rotation,
scaling, white background for transparency) and all skipped files are counted in a :class:`Reading`, to be shown.
"""

from __future__ import annotations

import io
import os
import re
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import numpy as np

from .errors import DeviceError

if TYPE_CHECKING:
    from PIL import Image  # imported where it is used, since it takes 4 MB of memory and shard files do not need it

Size = int | tuple[int, int] | None  # pixels per side, or (height, width); None for as large as it is

SUFFIXES = frozenset({
    ".apng", ".avif", ".bmp", ".dib", ".gif", ".j2k", ".jfif", ".jp2", ".jpe", ".jpeg", ".jpf", ".jpg", ".jpx", ".mpo",
    ".pbm", ".pgm", ".png", ".pnm", ".ppm", ".tga", ".tif", ".tiff", ".webp",
})  # fmt: skip
ARRAYS = frozenset({".h5", ".hdf5", ".mat", ".npy", ".npz", ".pkl", ".pt", ".pth"})
# files and folders that systems, archives and editors create; so do names that begin with a dot count
LITTER = frozenset({
    "__macosx", "__pycache__", "$recycle.bin", "system volume information", "lost+found", "@eadir", "#recycle",
    "thumbs.db", "ehthumbs.db", "desktop.ini", "icon\r",
})  # fmt: skip
LEFT = "left by a system or editor"
ORIENTATION = 0x0112  # EXIF's tag, and TIFF's
BITS_PER_SAMPLE, PHOTOMETRIC, LARGEST_SAMPLE, SAMPLE_FORMAT = 258, 262, 281, 339  # TIFF's
PNG = b"\x89PNG\r\n\x1a\n"  # how such a file begins
SIGNED = 2  # a sample's format
FULL_16 = 2**16 - 1
PROGRAMS = ("EPS",)
GREY = frozenset({"1", "L", "LA", "La", "F", "I"})  # Pillow's modes without colours, those of 16 bits aside
LONGEST_SHAPE = 16  # times a picture's shorter side that its longer side may have before its ends are cut off
DEEP_COLOUR = re.compile(r";16[BLN]")  # in Pillow's raw modes: 16 bits a colour, of which it keeps the upper 8
LEAST_SHARE = 1 / 4  # of their range that deep pictures must reach: 12 and 14 bits in 16 are no dark pictures


class PictureError(DeviceError):
    """A file or folder cannot be read as pictures without guessing; the message names it in one line."""


@dataclass
class Reading:
    """Counts of what was found in a folder, and what was done with it.

    skipped: number of skipped files and folders by kind.
    kinds: number of pictures by kind, such as bit depth or "turned upright by their EXIF".
    sizes: number of pictures by (width, height).
    grey: number of pictures without colours.
    brightest: of the picture with more than 8 bits that reaches the largest share of its value range: this share, the
        file, its largest value and the end of the range; None without such pictures.
    """

    skipped: Counter[str] = field(default_factory=Counter)
    kinds: Counter[str] = field(default_factory=Counter)
    sizes: Counter[tuple[int, int]] = field(default_factory=Counter)
    grey: int = 0
    brightest: tuple[float, Path, int, int] | None = None

    @property
    def text(self) -> str:
        """A line with sizes, kinds and skipped files; empty if nothing was found."""
        parts = []
        if self.sizes:
            (least, most) = (extreme(self.sizes, key=lambda size: size[0] * size[1]) for extreme in (min, max))
            parts.append(f"{least[0]}x{least[1]}" + (f" to {most[0]}x{most[1]}" if least != most else "") + " pixels")
        if self.kinds:
            parts.append(", ".join(f"{count} {kind}" for kind, count in sorted(self.kinds.items())))
        if self.skipped:
            parts.append("skipped: " + ", ".join(f"{count} {what}" for what, count in sorted(self.skipped.items())))
        return "; ".join(parts)

    def deep(self, path: Path, largest: int, full: int) -> None:
        """Record a picture with more than 8 bits, whose largest value is `largest` in a range up to `full`."""
        if self.brightest is None or largest / full > self.brightest[0]:
            self.brightest = (largest / full, path, largest, full)

    def require_whole_range(self) -> None:
        """Raise PictureError if all pictures with more than 8 bits together leave most of their value range unused.

        12-bit values in a 16-bit file look like a dark picture. One picture does not show which of the two it is.
        """
        if self.brightest is not None and self.brightest[0] < LEAST_SHARE:
            _, path, largest, full = self.brightest
            raise PictureError(
                f"{path} and all pictures like it have values of at most {largest} of {full}: they seem to hold fewer "
                "bits than their files state; scale their values to the whole range"
            )


def is_litter(name: str) -> bool:
    """Whether `name` is that of a file or folder which a system, archive or editor has created."""
    return name.startswith(".") or name.lower() in LITTER


def is_picture(path: Path) -> bool:
    """Whether the file `path` is one by its ending, or without an ending by its content."""
    return path.suffix.lower() in SUFFIXES or (not path.suffix and _opens(path))


def find(folder: Path, reading: Reading) -> list[Path]:
    """Return the paths of all pictures below `folder`, sorted; links to folders are followed.

    A file is a picture if its ending is in `SUFFIXES`, or if it has no ending and opens as a picture. Other files are
    counted in `reading`. Raises PictureError if a folder cannot be opened.
    """
    return sorted(_walk(folder, reading, ()))


def _walk(folder: Path, reading: Reading, above: tuple[str, ...]) -> Iterable[Path]:
    real = os.path.realpath(folder)
    if real in above:
        reading.skipped["link back to a folder above it"] += 1
        return
    try:
        with os.scandir(folder) as entries:
            names = [entry.name for entry in entries]
    except OSError as error:
        raise PictureError(f"{folder} cannot be opened: {error.strerror}") from error
    for name in names:
        path = folder / name
        if is_litter(name):
            reading.skipped[LEFT] += 1
        elif path.is_dir():
            yield from _walk(path, reading, (*above, real))
        elif not path.is_file():
            reading.skipped["broken link" if path.is_symlink() else "not a regular file"] += 1
        elif is_picture(path):
            yield path
        else:
            reading.skipped[_what(path)] += 1


def _what(path: Path) -> str:
    suffix = path.suffix.lower()
    if suffix in ARRAYS:
        return f"*{suffix} (arrays are not read: write each picture to a file)"
    return f"*{suffix}" if suffix else "not a picture, without an ending"


def _opens(path: Path) -> bool:
    from PIL import Image

    try:
        with Image.open(path):
            return True
    except Exception:  # not a picture, in one of many ways
        return False


def read(path: Path, size: Size, reading: Reading) -> np.ndarray:
    """Read the picture in `path`, turn it upright, and fit it by :func:`fit`; returns uint8 (height, width, 3), RGB.

    16-bit pictures are scaled by their bit depth, and float pictures must lie in [0, 1]. Transparent pixels get a white
    background. Of several frames the first is read. What was done is counted in `reading`. Raises PictureError if the
    file is damaged, or its value range is unknown.

    Args:
        path: the file.
        size: pixels per side, or (height, width); None leaves the picture as large as it is.
        reading: counts what was done.
    """
    with _refusing(path), path.open("rb") as file:  # as a file: what Pillow maps by its path it misreads where a TIFF
        return _decoded(file, path, size, reading)  # says that it is turned


def read_bytes(content: bytes, name: str, size: Size, reading: Reading) -> np.ndarray:
    """The same of the bytes of a picture file, which messages call `name`."""
    with _refusing(Path(name), content):
        return _decoded(io.BytesIO(content), Path(name), size, reading)


def read_image(image: Image.Image, name: str, size: Size, reading: Reading) -> np.ndarray:
    """The same of an open Pillow image, which messages call `name`."""
    with _refusing(Path(name)):
        return _converted(image, Path(name), size, reading)


@contextmanager
def _refusing(path: Path, content: bytes | None = None) -> Iterator[None]:
    """Turn whatever a damaged picture raises into a PictureError that names `path`."""
    from PIL import UnidentifiedImageError

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of large pictures, odd tags: what matters is an error or counted
            yield
    except PictureError:
        raise
    except UnidentifiedImageError as error:
        raise PictureError(f"{path} cannot be read: {_no_picture(path, content)}") from error
    except Exception as error:  # a damaged file fails in as many ways as there are formats
        raise PictureError(f"{path} cannot be read: {' '.join(str(error).split()) or type(error).__name__}") from error


def _decoded(file: BinaryIO, path: Path, size: Size, reading: Reading) -> np.ndarray:
    from PIL import Image

    _verify(file)
    with Image.open(file) as image:
        return _converted(image, path, size, reading)


def _converted(image: Image.Image, path: Path, size: Size, reading: Reading) -> np.ndarray:
    grey = image.mode in GREY or image.mode.startswith("I;16")
    picture = _upright(image, path, reading)
    reading.sizes[picture.size] += 1
    reading.grey += grey
    return np.asarray(picture) if size is None else fit(picture, size)


def _verify(file: BinaryIO) -> None:
    """Compare the checksums that a PNG has of its parts; Pillow decodes without that, and damage may go unnoticed."""
    from PIL import Image

    if file.read(len(PNG)) == PNG:
        file.seek(0)
        with Image.open(file) as image:
            image.verify()
    file.seek(0)


def _no_picture(path: Path, content: bytes | None = None) -> str:
    try:
        size = path.stat().st_size if content is None else len(content)
        return "the file is empty" if size == 0 else "not an image"
    except OSError as error:
        return str(error.strerror)


def _upright(image: Image.Image, path: Path, reading: Reading) -> Image.Image:
    """`image` as RGB, rotated as its EXIF orientation says."""
    from PIL import ImageOps

    arguments = [tile[3] for tile in getattr(image, "tile", ())]
    raw_modes = " ".join(str(argument) for argument in arguments)
    deep_ppm = image.format == "PPM" and any(isinstance(said, tuple) and said[-1] > 255 for said in arguments)
    if image.format != "MPO" and getattr(image, "n_frames", 1) > 1:
        reading.kinds["with several frames (the first is read)"] += 1
    kind, tags = image.format, getattr(image, "tag_v2", {})
    if kind in PROGRAMS:
        raise PictureError(f"{path} cannot be read: {kind} files are programs, which are not run: save it as PNG")
    if kind != "TIFF":  # of which Pillow forgets how it was turned; asked for it first, a PNG hides that it is damaged
        image.load()
    turned = _orientation(image) in range(2, 9)
    image.load()
    upright = ImageOps.exif_transpose(image) if turned else image
    if turned:
        reading.kinds["turned upright by their EXIF"] += 1
    if kind == "JPEG" and upright.mode == "CMYK" and "adobe" not in image.info:
        raise PictureError(
            f"{path} cannot be read: a CMYK JPEG without Adobe's marker does not say whether its inks are inverted: "
            "save it as RGB"
        )
    if upright.mode == "F":
        return _scaled(_floats(upright, path), 1.0, tags, reading, "float")
    if upright.mode == "I" or upright.mode.startswith("I;16"):
        return _scaled(*_whole_numbers(upright, kind, tags, path, reading), tags, reading, "16-bit")
    if SIGNED in _numbers(tags.get(SAMPLE_FORMAT)):
        raise PictureError(
            f"{path} cannot be read: its numbers may be negative, and the range that they can have is not known: save "
            "them as unsigned ones"
        )
    if DEEP_COLOUR.search(raw_modes) or deep_ppm:
        colours = np.asarray(upright.convert("RGB"))
        reading.deep(path, 257 * int(colours.max()), FULL_16)
        reading.kinds["16-bit"] += 1
    else:
        reading.kinds["8-bit" if upright.mode != "1" else "1-bit"] += 1
    return _opaque(upright, reading)


def _numbers(tag: Any) -> tuple[Any, ...]:
    return tag if isinstance(tag, tuple) else (tag,)


def _orientation(image: Image.Image) -> int:
    try:
        return int(image.getexif().get(ORIENTATION, 1))
    except Exception:  # a damaged EXIF block is ignored
        return 1


def _floats(image: Image.Image, path: Path) -> np.ndarray:
    values = np.asarray(image, np.float64)
    if not np.isfinite(values).all():
        raise PictureError(f"{path} cannot be read: it holds numbers that are not finite")
    if values.min() < 0 or values.max() > 1:
        raise PictureError(
            f"{path} cannot be read: its values reach from {values.min():g} to {values.max():g}, but float pictures "
            "must lie between 0 and 1: scale them, or save them with 8 or 16 bits"
        )
    return values


def _whole_numbers(
    image: Image.Image, kind: str | None, tags: Any, path: Path, reading: Reading
) -> tuple[np.ndarray, float]:
    """The values of a grey picture with more than 8 bits, and the end of their range."""
    values = np.asarray(image).astype(np.int64)
    if kind == "TIFF":
        bits = tags.get(BITS_PER_SAMPLE, (0,))[0]
        said = tags.get(LARGEST_SAMPLE, 0)
        full = (2**bits - 1) if image.mode.startswith("I;16") else 0
        said = int(_numbers(said)[0])
        full = said if 255 < said < full else full
    else:  # Pillow scales what these formats hold to 16 bits
        full = FULL_16 if image.mode.startswith("I;16") or kind in ("PNG", "PPM") else 0
    if not full or values.min() < 0 or values.max() > full:
        raise PictureError(
            f"{path} cannot be read: its values reach from {values.min()} to {values.max()}, and their full range is "
            "unknown: save them with 8 or 16 bits"
        )
    reading.deep(path, int(values.max()), full)
    return values, full


def _scaled(values: np.ndarray, full: float, tags: Any, reading: Reading, kind: str) -> Image.Image:
    """Grey values (h, w) in [0, `full`] as RGB."""
    from PIL import Image

    reading.kinds[kind] += 1
    if tags.get(PHOTOMETRIC) == 0:  # zero means white; Pillow inverts 8-bit pictures only
        values = full - values
    return Image.fromarray(np.rint(values * (255 / full)).astype(np.uint8)).convert("RGB")


def _opaque(image: Image.Image, reading: Reading) -> Image.Image:
    """`image` as RGB, with a white background for transparent pixels."""
    from PIL import Image

    if not image.has_transparency_data and image.mode != "La":
        return image.convert("RGB")
    seen = image.convert("LA").convert("RGBA") if image.mode == "La" else image.convert("RGBA")
    if seen.getchannel("A").getextrema()[0] == 255:
        return seen.convert("RGB")
    reading.kinds["with transparency (laid on white)"] += 1
    return Image.alpha_composite(Image.new("RGBA", seen.size, "white"), seen).convert("RGB")


def fit(image: Image.Image, size: int | tuple[int, int]) -> np.ndarray:
    """Resize and crop the centre, so that as much as possible of the image remains.

    Args:
        image: RGB or grey, 8 bits.
        size: pixels per side, or (height, width).

    Returns:
        uint8 (height, width, 3), or (height, width) of a grey image.
    """
    from PIL import Image

    tall, wide = (size, size) if isinstance(size, int) else size
    longest = LONGEST_SHAPE * min(image.size)
    if max(image.size) > longest:  # enlarged as a whole, a strip would fill the memory
        left, top = (max(0, (side - longest) // 2) for side in image.size)
        image = image.crop((left, top, left + min(image.width, longest), top + min(image.height, longest)))
    width, height = image.size
    if (width, height) != (wide, tall):
        scale = max(wide / width, tall / height)
        wanted = (max(wide, round(width * scale)), max(tall, round(height * scale)))
        image = image.resize(wanted, Image.Resampling.BILINEAR)
        left, top = (image.width - wide) // 2, (image.height - tall) // 2
        image = image.crop((left, top, left + wide, top + tall))
    return np.asarray(image)
