"""Anything that is not an upright 8-bit RGB picture: it comes out as its owner sees it, or it is refused by name."""

from __future__ import annotations

import io
import os
import struct
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from PIL import Image

from mocosfl_priv.data import image_folder
from mocosfl_priv.device.pictures import PictureError, Reading, find, read
from mocosfl_priv.device.shard import Shard
from tests.awkward_inputs import grey, picture, tree

SIZE = 48
ORIENTATION = 0x0112
# how a camera that is held so stores the scene, by the tag that says how to turn it back
STORED_AS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_90,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_270,
}


def as_read(path: Path, size: int = SIZE) -> np.ndarray:
    return read(path, size, Reading()).astype(int)


def saved(image: Image.Image, path: Path, **options: Any) -> Path:
    image.save(path, **options)
    return path


def test_sixteen_bits_are_scaled_by_their_depth(tmp_path: Path) -> None:
    shown = grey(picture(1, 1))
    path = saved(Image.fromarray((shown * 65535).astype(np.uint16)), tmp_path / "scan.png")
    reading = Reading()
    found = read(path, SIZE, reading).astype(int)
    assert np.abs(found - (shown * 255)[..., None]).max() <= 1
    assert reading.text == "48x48 pixels; 1 16-bit"


def test_a_float_tiff_is_scaled_from_zero_to_one_and_refused_beyond(tmp_path: Path) -> None:
    shown = grey(picture(1, 1)).astype(np.float32)
    path = saved(Image.fromarray(shown), tmp_path / "scan.tif")
    assert np.abs(as_read(path) - (shown * 255)[..., None]).max() <= 1
    saved(Image.fromarray(shown * 4000 - 1000), path)
    with pytest.raises(PictureError, match=r"scan\.tif cannot be read: its values reach from -1000 to 3000"):
        as_read(path)
    shown[3, 3] = np.nan
    with pytest.raises(PictureError, match="not finite"):
        as_read(saved(Image.fromarray(shown), path))


def test_twelve_bits_in_sixteen_are_refused_with_their_range(tmp_path: Path) -> None:
    def save(pixels: np.ndarray, path: Path) -> None:
        Image.fromarray((grey(pixels) * 4095).astype(np.uint16)).save(path)

    root = tree(tmp_path / "twelve", save=save)
    with pytest.raises(Exception, match=r"\.png and all pictures like it have values of at most 4095 of 65535"):
        image_folder.load(root, "train", 32)
    with pytest.raises(Exception, match=r"\.png and all pictures like it have values of at most 4095 of 65535"):
        Shard.from_folder(root / "train", 32)
    # one bright picture shows that the range is used: the others are dark
    Image.fromarray((grey(picture(0, 9)) * 65535).astype(np.uint16)).save(root / "train" / "cat" / "bright.png")
    assert len(image_folder.load(root, "train", 32)) == 61


def test_sixteen_bits_a_colour_that_use_twelve_are_refused_too(tmp_path: Path) -> None:
    rows = b"".join(b"\0" + struct.pack(">24H", *range(100, 4100, 167)[:24]) for _ in range(8))
    header = struct.pack(">IIBBBBB", 8, 8, 16, 2, 0, 0, 0)

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    (tmp_path / "a.png").write_bytes(
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    )
    reading = Reading()
    read(tmp_path / "a.png", 8, reading)
    with pytest.raises(PictureError, match="fewer bits"):
        reading.require_whole_range()


@pytest.mark.parametrize("orientation", STORED_AS)
@pytest.mark.parametrize("suffix", [".jpg", ".png", ".tif", ".webp"])
def test_photographs_stand_upright(orientation: int, suffix: str, tmp_path: Path) -> None:
    scene = Image.fromarray(picture(2, 3, (60, 40)))
    exif = Image.Exif()
    exif[ORIENTATION] = orientation
    kept: dict[str, dict[str, Any]] = {".jpg": {"quality": 100, "subsampling": 0}, ".webp": {"lossless": True}}
    lossless = kept.get(suffix, {})
    path = saved(scene.transpose(STORED_AS[orientation]), tmp_path / f"phone{suffix}", exif=exif, **lossless)
    upright = saved(scene, tmp_path / f"camera{suffix}", **lossless)
    assert np.abs(as_read(path, 40) - as_read(upright, 40)).mean() < (2 if suffix == ".jpg" else 0.01)


def test_a_damaged_exif_block_costs_no_picture(tmp_path: Path) -> None:
    pixels = picture(0, 0)
    path = saved(Image.fromarray(pixels), tmp_path / "a.png", exif=b"Exif\0\0II*\0\xff\xff\xff\xff")
    assert np.array_equal(as_read(path), pixels)


def test_what_can_be_seen_through_lies_on_white(tmp_path: Path) -> None:
    pixels = np.dstack([picture(0, 0), np.zeros((48, 48), np.uint8)])
    pixels[:24, :, 3] = 255
    path, reading = saved(Image.fromarray(pixels), tmp_path / "logo.png"), Reading()
    found = read(path, SIZE, reading)
    assert np.array_equal(found[:24], pixels[:24, :, :3]) and (found[24:] == 255).all()
    assert "1 with transparency (laid on white)" in reading.text


def test_of_several_frames_the_first_is_read_and_that_is_said(tmp_path: Path) -> None:
    frames = [Image.new("RGB", (20, 20), colour) for colour in ("red", "blue", "lime")]
    path = saved(frames[0], tmp_path / "film.gif", save_all=True, append_images=frames[1:])
    reading = Reading()
    assert (read(path, 20, reading) == [255, 0, 0]).all()
    assert "1 with several frames (the first is read)" in reading.text


def test_white_may_be_zero(tmp_path: Path) -> None:
    shown = (grey(picture(1, 1)) * 65535).astype(np.uint16)
    buffer = io.BytesIO()
    Image.fromarray(shown).save(buffer, "TIFF")
    inverted = Image.fromarray(65535 - shown)
    path = saved(inverted, tmp_path / "xray.tif", tiffinfo={262: 0})
    (tmp_path / "plain.tif").write_bytes(buffer.getvalue())
    assert np.abs(as_read(path) - as_read(tmp_path / "plain.tif")).max() <= 1


@pytest.mark.parametrize("dtype", [np.int32])
def test_whole_numbers_of_unknown_range_are_refused(dtype: type, tmp_path: Path) -> None:
    path = saved(Image.fromarray(np.arange(64, dtype=dtype).reshape(8, 8) * 1000), tmp_path / "counts.tif")
    with pytest.raises(PictureError, match=r"counts\.tif cannot be read: its values reach from 0 to 63000"):
        as_read(path, 8)


def test_a_huge_picture_is_read_without_a_word_of_its_library(
    tmp_path: Path, recwarn: pytest.WarningsRecorder, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = saved(Image.new("L", (200, 100), 7), tmp_path / "map.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 15_000)
    assert (as_read(path, 10) == 7).all() and not recwarn.list
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 5_000)
    with pytest.raises(PictureError, match=r"map\.png cannot be read: .*exceeds limit"):
        as_read(path, 10)


def test_every_way_of_damage_is_one_line_with_the_name(tmp_path: Path) -> None:
    whole = {}
    for suffix in (".png", ".jpg", ".gif", ".tif", ".webp", ".jp2", ".bmp"):
        options = {"compression": "tiff_lzw"} if suffix == ".tif" else {}
        whole[suffix] = saved(Image.fromarray(picture(0, 0)), tmp_path / f"x{suffix}", **options).read_bytes()
    for suffix, content in whole.items():
        path = tmp_path / f"x{suffix}"
        for length in (0, 1, 10, len(content) // 3):
            path.write_bytes(content[:length])
            with pytest.raises(PictureError) as refused:
                as_read(path)
            said = str(refused.value)
            assert said.startswith(f"{path} cannot be read: ") and "\n" not in said
            assert ("empty" in said) == (length == 0)


@st.composite
def stored_pictures(draw: st.DrawFn) -> tuple[Image.Image, np.ndarray, str, dict[str, Any]]:
    """A picture in some mode, depth, format and orientation, and what its owner sees: float (h, w, 3) in [0, 255]."""
    width, height = draw(st.integers(2, 40)), draw(st.integers(2, 40))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    colour = rng.integers(0, 256, (height, width, 3), dtype=np.uint8)
    colour[0, 0], colour[-1, -1] = 0, 255
    light = colour[..., 0]
    opaque = np.full((height, width), 255, np.uint8)
    clear = np.where(rng.random((height, width)) < 0.5, 255, 0).astype(np.uint8)
    grey_seen = np.repeat(light[..., None], 3, 2).astype(float)
    on_white = np.where(clear[..., None] == 255, colour, 255).astype(float)
    grey_on_white = np.where(clear[..., None] == 255, grey_seen, 255.0)
    exact: dict[str, dict[str, Any]] = {".webp": {"lossless": True, "exact": True}}
    makers: dict[str, tuple[Callable[[], Image.Image], np.ndarray, tuple[str, ...]]] = {
        "RGB": (lambda: Image.fromarray(colour), colour.astype(float), (".png", ".tif", ".webp", ".bmp", ".ppm")),
        "L": (lambda: Image.fromarray(light), grey_seen, (".png", ".tif", ".pgm", ".bmp", ".gif")),
        "1": (lambda: Image.fromarray(light > 127), np.where(grey_seen > 127, 255.0, 0.0), (".png", ".tif", ".pbm")),
        "P": (lambda: Image.fromarray(light).convert("P"), grey_seen, (".png", ".tif", ".gif")),
        "RGBA": (lambda: Image.fromarray(np.dstack([colour, clear])), on_white, (".png", ".tif", ".webp")),
        "RGBA, opaque": (lambda: Image.fromarray(np.dstack([colour, opaque])), colour.astype(float), (".png", ".tif")),
        "LA": (lambda: Image.fromarray(np.dstack([light, clear])), grey_on_white, (".png", ".tif")),
        "CMYK": (lambda: Image.fromarray(colour).convert("CMYK"), colour.astype(float), (".tif",)),
        "I;16": (lambda: Image.fromarray(light.astype(np.uint16) * 257), grey_seen, (".png", ".tif", ".pgm")),
        "I;16B": (lambda: Image.fromarray((light.astype(np.uint16) * 257).astype(">u2")), grey_seen, (".tif",)),
        "F": (lambda: Image.fromarray(light.astype(np.float32) / 255), grey_seen, (".tif", ".TIFF")),
    }  # fmt: skip
    make, seen, suffixes = makers[draw(st.sampled_from(sorted(makers)))]
    suffix = draw(st.sampled_from(suffixes))
    image, options = make(), dict(exact.get(suffix, {}))
    orientation = draw(st.sampled_from([None, 1, *STORED_AS])) if suffix in (".png", ".tif", ".webp") else None
    if orientation is not None:
        assume(not image.mode.startswith("I;16B"))
        options["exif"] = exif = Image.Exif()
        exif[ORIENTATION] = orientation
        image = image.transpose(STORED_AS[orientation]) if orientation in STORED_AS else image
    return image, seen, suffix, options


@settings(max_examples=200)
@given(stored=stored_pictures())
def test_every_picture_is_read_as_it_is_seen(stored: tuple[Image.Image, np.ndarray, str, dict[str, Any]],
                                             tmp_path_factory: pytest.TempPathFactory) -> None:  # fmt: skip
    image, seen, suffix, options = stored
    folder = tmp_path_factory.mktemp("picture")
    path = folder / f"ä picture{suffix}"
    try:
        image.save(path, **options)
    except (OSError, KeyError):  # a mode that the format does not have
        assume(False)
    side = min(seen.shape[:2])
    top, left = ((length - side) // 2 for length in seen.shape[:2])
    found = read(path, side, Reading()).astype(float)
    assert np.abs(found - seen[top : top + side, left : left + side]).max() <= 2
    assert np.array_equal(Shard.from_folder(folder, side).images[0].transpose(1, 2, 0), found)


def test_folders_are_followed_and_everything_else_is_counted(tmp_path: Path) -> None:
    folder, store = tmp_path / "in", tmp_path / "store"
    for place in (
        folder / "deep er" / "日本",
        store,
        folder / "__MACOSX",
        folder / ".ipynb_checkpoints",
        folder / "x.png",
    ):
        place.mkdir(parents=True)
    pixels = Image.fromarray(picture(0, 0))
    for name in ("a.PNG", "deep er/日本/b.jpg", "c.jfif", "d.jpe", "e", "__MACOSX/._a.png", ".ipynb_checkpoints/a.png"):
        pixels.save(folder / name, "PNG" if name.lower().endswith("png") else "JPEG")
    (folder / "f.jp2").write_bytes(b"")
    pixels.save(folder / "f.jp2", "JPEG2000")
    pixels.save(store / "g.png")
    (folder / "linked").symlink_to(store)
    (folder / "loop").symlink_to(folder)
    (folder / "gone.png").symlink_to(tmp_path / "nowhere")
    os.mkfifo(folder / "pipe.png")
    for name in ("notes.txt", "more.txt", "._a.PNG", "Thumbs.db", "LICENSE", "a.npy"):
        (folder / name).write_bytes(b"text")
    reading = Reading()
    found = find(folder, reading)
    assert [str(path.relative_to(folder)) for path in found] == [
        "a.PNG", "c.jfif", "d.jpe", "deep er/日本/b.jpg", "e", "f.jp2", "linked/g.png"
    ]  # fmt: skip
    assert reading.skipped == {
        "left by a system or editor": 4, "link back to a folder above it": 1, "broken link": 1, "not a regular file": 1,
        "*.txt": 2, "not a picture, without an ending": 1,
        "*.npy (arrays are not read: write each picture to a file)": 1,
    }  # fmt: skip


def test_devices_ignore_a_macs_litter(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for number in range(5):
        Image.fromarray(picture(0, number)).save(tmp_path / f"{number}.png")
    (tmp_path / "._0.png").write_bytes(b"\0\5\x16\7")
    with caplog.at_level("INFO"):
        assert len(Shard.from_folder(tmp_path, 32)) == 5
    assert "5 images; 48x48 pixels; 5 8-bit; skipped: 1 left by a system or editor" in caplog.text


def test_a_strip_is_cut_before_it_is_enlarged(tmp_path: Path) -> None:
    for number, size in enumerate([(1, 60_000), (60_000, 1), (1, 1), (3, 900)]):
        path = saved(Image.new("RGB", size, (10, 20, 30)), tmp_path / f"{number}.png")
        assert (read(path, 512, Reading()) == [10, 20, 30]).all()
    middle = np.zeros((900, 3, 3), np.uint8)
    middle[440:460] = 255
    assert (read(saved(Image.fromarray(middle), tmp_path / "middle.png"), 3, Reading()) == 255).all()


def test_a_png_whose_data_are_damaged_is_refused_although_most_of_it_can_be_read(tmp_path: Path) -> None:
    path = saved(Image.fromarray(picture(1, 1)), tmp_path / "a.png")
    whole = path.read_bytes()
    for place in range(len(whole) - 24, len(whole) - 16, 2):  # the end of the compressed data, and its checksum
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 255]) + whole[place + 1 :])
        with pytest.raises(PictureError, match=r"a\.png cannot be read"):
            as_read(path)


def test_inks_are_read_where_it_is_known_which_way_round_they_are(tmp_path: Path) -> None:
    pixels = picture(1, 1)
    path = saved(Image.fromarray(pixels).convert("CMYK"), tmp_path / "inks.jpg", quality=100)
    assert np.abs(as_read(path) - pixels).mean() < 1
    content = path.read_bytes()
    marker = content.index(b"\xff\xee")  # what Adobe's programs say of their inks
    length = struct.unpack(">H", content[marker + 2 : marker + 4])[0]
    path.write_bytes(content[:marker] + content[marker + 2 + length :])
    with pytest.raises(PictureError, match="does not say whether its inks are inverted"):
        as_read(path)


def test_a_picture_that_is_a_program_is_not_run(tmp_path: Path) -> None:
    path = saved(Image.fromarray(picture(1, 1)), tmp_path / "a.eps").rename(tmp_path / "a.png")
    with pytest.raises(PictureError, match=r"a\.png cannot be read: EPS files are programs"):
        as_read(path)


@pytest.mark.parametrize("largest", [4095, 65535])
def test_colours_of_a_ppm_are_scaled_by_the_depth_that_it_says(largest: int, tmp_path: Path) -> None:
    pixels, path, reading = picture(1, 1), tmp_path / "a.ppm", Reading()
    values = np.rint(pixels * (largest / 255)).astype(">u2")
    path.write_bytes(f"P6 48 48 {largest}\n".encode() + values.tobytes())
    assert np.abs(read(path, SIZE, reading).astype(int) - pixels).max() <= 1
    assert "1 16-bit" in reading.text
    dark, reading = np.rint(pixels * (4095 / 255)).astype(">u2"), Reading()
    path.write_bytes(b"P6 48 48 65535\n" + dark.tobytes())
    read(path, SIZE, reading)
    with pytest.raises(PictureError, match="fewer bits"):
        reading.require_whole_range()


def test_numbers_with_a_sign_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "signed.tif"
    entries = [(256, 4, 48), (257, 4, 48), (258, 3, 8), (259, 3, 1), (262, 3, 1), (273, 4, 8), (277, 3, 1),
               (278, 4, 48), (279, 4, 2304), (339, 3, 2)]  # fmt: skip
    path.write_bytes(
        b"II*\0" + struct.pack("<I", 8 + 2304) + bytes(range(256)) * 9 + struct.pack("<H", len(entries))
        + b"".join(struct.pack("<HHII", tag, kind, 1, value) for tag, kind, value in entries) + bytes(4)
    )  # fmt: skip
    with pytest.raises(PictureError, match=r"signed\.tif cannot be read: its numbers may be negative"):
        as_read(path)


@pytest.mark.parametrize("suffix", [".gif", ".png", ".tif", ".webp"])
def test_a_film_is_its_first_frame_in_every_format(suffix: str, tmp_path: Path) -> None:
    frames = [Image.new("RGB", (20, 20), colour) for colour in ("red", "blue", "lime")]
    lossless = {"lossless": True} if suffix == ".webp" else {}
    path = saved(frames[0], tmp_path / f"film{suffix}", save_all=True, append_images=frames[1:], **lossless)
    reading = Reading()
    assert (read(path, 20, reading) == [255, 0, 0]).all()
    assert "1 with several frames (the first is read)" in reading.text


@settings(max_examples=40)
@given(
    suffix=st.sampled_from([".png", ".jpg", ".gif", ".bmp", ".tif", ".webp", ".ppm"]),
    cut=st.floats(0, 1, exclude_max=True),
    flips=st.lists(st.tuples(st.floats(0, 1, exclude_max=True), st.integers(1, 255)), max_size=3),
)
def test_a_damaged_file_is_a_picture_or_one_line(
    suffix: str, cut: float, flips: list[tuple[float, int]], tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = saved(Image.fromarray(picture(1, 1)), tmp_path_factory.mktemp("damaged") / f"a{suffix}")
    content = bytearray(path.read_bytes())
    for place, change in flips:
        content[int(place * len(content))] ^= change
    path.write_bytes(content if flips else content[: int(cut * len(content))])
    try:
        assert read(path, SIZE, Reading()).shape == (SIZE, SIZE, 3)
    except PictureError as error:
        assert str(error).startswith(f"{path} cannot be read: ") and "\n" not in str(error)
