from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import load_file

from mocosfl_priv.data import image_folder
from mocosfl_priv.device.container import pack
from mocosfl_priv.device.errors import DeviceError
from mocosfl_priv.device.shard import Shard


@pytest.fixture
def shard() -> Shard:
    pixels = np.random.default_rng(0).integers(0, 256, (5, 3, 8, 6), dtype=np.uint8)
    return Shard(pixels, np.array([7, 3, 11, 0, 4]), "photos/client 2")


def test_a_shard_comes_back_from_its_file(shard: Shard, tmp_path: Path) -> None:
    shard.write(tmp_path / "two.shard")
    again = Shard.read(tmp_path / "two.shard")
    assert np.array_equal(again.images, shard.images) and np.array_equal(again.ids, shard.ids)
    assert again.name == shard.name and again.image_shape == (3, 8, 6) and len(again) == 5
    assert np.array_equal(again.take([4, 0, 4]), shard.images[[4, 0, 4]])
    assert not again.images.flags.writeable
    assert np.array_equal(load_file(tmp_path / "two.shard")["images"], shard.images)
    assert [path.name for path in tmp_path.iterdir()] == ["two.shard"]


def test_every_damaged_byte_is_noticed(shard: Shard, tmp_path: Path) -> None:
    path = tmp_path / "one.shard"
    shard.write(path)
    whole = path.read_bytes()
    for position in range(0, len(whole), 7):
        damaged = bytearray(whole)
        damaged[position] ^= 1
        path.write_bytes(damaged)
        try:
            again = Shard.read(path)
        except DeviceError:
            continue
        # the header's name, and nothing else, may differ unnoticed
        assert np.array_equal(again.images, shard.images) and np.array_equal(again.ids, shard.ids)
    path.write_bytes(whole[:-1])
    with pytest.raises(DeviceError, match="cannot be read"):
        Shard.read(path)


def test_what_is_no_shard_is_refused(shard: Shard, tmp_path: Path) -> None:
    path = tmp_path / "bad"
    with pytest.raises(DeviceError, match="cannot be read"):
        Shard.read(path)
    path.write_bytes(pack({"images": shard.images}, {"shard": "1"}))
    with pytest.raises(DeviceError, match="not a shard"):
        Shard.read(path)
    with pytest.raises(DeviceError, match="cannot be written"):
        shard.write(tmp_path / "missing" / "file")
    for images, ids in (
        (shard.images.astype(np.float32), shard.ids),
        (shard.images[:, :1], shard.ids),
        (shard.images, shard.ids[:2]),
        (shard.images, shard.ids.astype(np.int32)),
        (shard.images[:0], shard.ids[:0]),
    ):
        with pytest.raises(DeviceError):
            Shard(images, ids)
    for positions in ([5], [-1], [[0]]):
        with pytest.raises(DeviceError, match="positions"):
            shard.take(positions)  # type: ignore[arg-type]


def test_a_folder_gives_the_pixels_that_the_server_would_read(make_image_folder: Callable[..., Path]) -> None:
    root = make_image_folder({"train/cat": 3, "train/dog": 2, "test/cat": 1, "test/dog": 1}, size=40)
    Image.new("RGB", (90, 33), (10, 200, 30)).save(root / "train" / "dog" / "wide.jpg")
    Image.new("L", (20, 50), 90).save(root / "train" / "dog" / "tall.png")
    expected = image_folder.load(root, "train", 32)
    found = Shard.from_folder(root / "train", 32)
    assert np.array_equal(found.images, expected.images.numpy())
    assert found.ids.tolist() == list(range(7))


def test_a_folder_without_readable_images_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DeviceError, match="no image folder"):
        Shard.from_folder(tmp_path / "none", 8)
    with pytest.raises(DeviceError, match="holds no images"):
        Shard.from_folder(tmp_path, 8)
    (tmp_path / "a.png").write_bytes(b"text")
    with pytest.raises(DeviceError, match="not an image"):
        Shard.from_folder(tmp_path, 8)
