from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from mocosfl_priv.data import photos
from mocosfl_priv.data.datasets import load_split
from mocosfl_priv.data.image_folder import fit
from mocosfl_priv.errors import ConfigurationError

MakeFolder = Callable[..., Path]


@pytest.mark.parametrize(
    ("name", "classes"), [("photos", 6), ("photos-source", 4), ("textures", 10), ("textures-source", 4)]
)
def test_patches_are_balanced_textured_and_deterministic(name: str, classes: int) -> None:
    train, test = load_split(name, "train"), load_split(name, "test")
    photos.load.cache_clear()
    again = load_split(name, "train")
    assert torch.equal(train.images, again.images)
    assert len(train.class_names) == classes
    chosen = photos.SETS[name]
    for most, images in ((chosen.train, train), (chosen.test, test)):
        counts = images.labels.bincount()
        assert int(counts.max()) == most and int(counts.min()) >= (0.8 if chosen.grey else 1) * most
    deviation = train.images.float().mean(1).flatten(1).std(1, correction=0)
    assert float(deviation.min()) >= photos.MINIMUM_CONTRAST - 1e-3
    if not name.endswith("source"):
        assert len(train) >= 4000 and len(test) >= 1000


def test_colour_says_nothing_and_brightness_little_about_a_texture() -> None:
    """Textures are grey, and their mean grey value alone tells their class not much better than chance."""
    train, test = load_split("textures", "train"), load_split("textures", "test")
    assert torch.equal(train.images[:, 0], train.images[:, 1]) and torch.equal(train.images[:, 0], train.images[:, 2])
    means, held_out = (split.images.float().mean((1, 2, 3)) for split in (train, test))
    nearest = (held_out[:, None] - means[None]).abs().topk(50, largest=False).indices
    guess = train.labels[nearest].mode(1).values
    assert float((guess == test.labels).float().mean()) < 0.35


def test_target_and_source_are_different_photographs() -> None:
    for target in ("photos", "textures"):
        ours, theirs = (photos.SETS[name].classes for name in (target, f"{target}-source"))
        assert not set(ours) & set(theirs)
        assert not {photos.PHOTOGRAPHS[name] for name in ours} & {photos.PHOTOGRAPHS[name] for name in theirs}


@pytest.mark.parametrize("shape", [(300, 451), (512, 512), (427, 640)])
def test_train_and_test_tiles_keep_the_margin(shape: tuple[int, int]) -> None:
    def cover(split: str, grow: int) -> np.ndarray:
        covered = np.zeros(shape, dtype=bool)
        for top, left in photos.tile_corners(*shape, split):
            assert top + photos.TILE <= shape[0] and left + photos.TILE <= shape[1]
            covered[max(0, top - grow) : top + photos.TILE + grow, max(0, left - grow) : left + photos.TILE + grow] = 1
        return covered

    assert not (cover("train", 0) & cover("test", photos.MARGIN)).any()
    assert cover("train", 0).any() and cover("test", 0).any()


def test_patches_of_one_group_come_from_one_tile() -> None:
    train = load_split("photos", "train")
    for group in train.groups.unique()[:20]:
        assert len(train.labels[train.groups == group].unique()) == 1
    assert train.groups.bincount().max() <= ((photos.TILE - photos.PATCH) // photos.STRIDE + 1) ** 2


def test_image_folder_with_splits(make_image_folder: MakeFolder) -> None:
    root = make_image_folder({"train/b": 3, "train/a": 2, "val/a": 1, "val/b": 1})
    train = load_split(f"imagefolder:{root}", "train", 32)
    assert train.class_names == ("a", "b")
    assert train.labels.tolist() == [0, 0, 1, 1, 1]
    expected = np.asarray(Image.open(root / "train/a/0001.png"))
    assert np.array_equal(train.images[1].permute(1, 2, 0).numpy(), expected)
    assert len(load_split(f"imagefolder:{root}", "test", 32)) == 2


def test_image_folder_without_splits_is_divided_stably(make_image_folder: MakeFolder) -> None:
    root = make_image_folder({"a": 40, "b": 40})
    train, test = (load_split(f"imagefolder:{root}", split, 32) for split in ("train", "test"))
    assert len(train) + len(test) == 80
    assert 4 <= len(test) <= 32
    assert not set(train.digests()) & set(test.digests())
    (root / "a" / "9999.png").write_bytes((root / "b" / "0000.png").read_bytes())
    assert set(test.digests()) <= set(load_split(f"imagefolder:{root}", "test", 32).digests())


def test_path_may_hold_a_class_tree_of_a_known_set(make_image_folder: MakeFolder) -> None:
    root = make_image_folder({"train/a": 2, "train/b": 2, "test/a": 1, "test/b": 1})
    assert len(load_split("cifar10", "train", 32, root)) == 4


@pytest.mark.parametrize(
    ("counts", "message"),
    [
        ({"train/a": 2, "train/b": 0, "test/a": 1, "test/b": 1}, "holds no images"),
        ({"train/a": 2}, "none of test/"),
        ({"train/a": 2, "train/b": 2, "train/c": 2, "test/a": 1, "test/c": 1}, "different class folders: b"),
    ],
)
def test_incomplete_trees_are_named(counts: dict[str, int], message: str, make_image_folder: MakeFolder) -> None:
    root = make_image_folder(counts)
    with pytest.raises(ConfigurationError, match=message):
        load_split(f"imagefolder:{root}", "train", 32)
        load_split(f"imagefolder:{root}", "test", 32)


@pytest.mark.parametrize("damage", [b"not an image", b""])
def test_corrupt_image_is_named(damage: bytes, make_image_folder: MakeFolder) -> None:
    root = make_image_folder({"train/a": 2, "test/a": 1})
    (root / "train/a/0001.png").write_bytes(damage)
    with pytest.raises(ConfigurationError, match=r"0001\.png cannot be read"):
        load_split(f"imagefolder:{root}", "train", 32)


def test_truncated_image_is_named(make_image_folder: MakeFolder) -> None:
    root = make_image_folder({"train/a": 1, "test/a": 1})
    path = root / "train/a/0000.png"
    path.write_bytes(path.read_bytes()[:200])
    with pytest.raises(ConfigurationError, match=r"0000\.png cannot be read"):
        load_split(f"imagefolder:{root}", "train", 32)


@pytest.mark.parametrize("name", ["cifar10", "cifar100", "svhn", "stl10"])
def test_missing_download_says_the_remedy(name: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match=r"download=True.*data\.path"):
        load_split(name, "train", 32, tmp_path)


@pytest.mark.parametrize("name", ["cifar11", "imagefolder:/does/not/exist"])
def test_unknown_sets(name: str) -> None:
    with pytest.raises(ConfigurationError, match=r"did you mean 'cifar10'|there is no folder"):
        load_split(name, "train")


@pytest.mark.parametrize("shape", [(48, 32), (20, 50), (32, 32), (33, 64)])
def test_fit_gives_squares(shape: tuple[int, int]) -> None:
    assert fit(Image.new("RGB", shape), 32).shape == (32, 32, 3)


def test_real_cifar_subset(shared: Path) -> None:
    train = load_split(f"imagefolder:{shared / 'data' / 'cifar10'}", "train", 32)
    assert len(train.class_names) == 10
    assert len(train) == 5438
