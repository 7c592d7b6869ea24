"""Folders are understood, or refused with what was found; never believed."""

from __future__ import annotations

import errno
import os
import unicodedata
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from mocosfl_priv.api import Experiment
from mocosfl_priv.data.datasets import load_split
from mocosfl_priv.data.image_folder import load, split_named
from mocosfl_priv.data.image_set import ImageSet
from mocosfl_priv.device.client import open_data
from mocosfl_priv.device.errors import DeviceError
from mocosfl_priv.errors import ConfigurationError
from tests.awkward_inputs import APPLE_DOUBLE, CLASSES, case, picture, tree


def both(root: Path) -> tuple[ImageSet, ImageSet]:
    return load(root, "train", 32), load(root, "test", 32)


def counts(images: ImageSet) -> dict[str, int]:
    return dict(
        zip(images.class_names, images.labels.bincount(minlength=len(images.class_names)).tolist(), strict=True)
    )


def refusal(root: Path) -> str:
    with pytest.raises(ConfigurationError) as refused:
        both(root)
    said = str(refused.value)
    assert said.startswith("imagefolder: ") and "\n" not in said
    return said


@pytest.mark.parametrize(
    ("train", "test"), [("Training", "Testing"), ("Train", "Test"), ("TRAIN", "val"), ("train_images", "Test Set")]
)
def test_splits_are_splits_whatever_they_are_called(train: str, test: str, tmp_path: Path) -> None:
    found, held = both(tree(tmp_path, {train: 20, test: 12}))
    assert counts(found) == dict.fromkeys(CLASSES, 20) and counts(held) == dict.fromkeys(CLASSES, 12)
    assert not set(found.digests()) & set(held.digests())
    assert f"{train} and {test}/" in found.description


def test_a_folder_too_high_is_seen_through(tmp_path: Path) -> None:
    tree(tmp_path / "archive" / "dataset")
    found, held = both(tmp_path)
    assert counts(found) == dict.fromkeys(CLASSES, 20) and counts(held) == dict.fromkeys(CLASSES, 12)
    assert f"read from {tmp_path}/archive/dataset/train and test/" in found.description


def test_validation_and_test_are_not_mixed_and_what_is_not_read_is_said(tmp_path: Path) -> None:
    found, held = both(tree(tmp_path, {"train": 20, "valid": 6, "test": 12}))
    assert len(found) == 60 and len(held) == 36
    assert f"not read: valid/ in {tmp_path}" in found.description


@pytest.mark.parametrize(
    ("splits", "said"),
    [
        ({"train": 3}, "has train/ but none of test/"),
        ({"test": 3, "val": 2}, "has test/ but no train/"),
        ({"train": 3, "Training": 3, "test": 2}, "holds Training/, train/, which mean the same split"),
        ({"train": 3, "test": 2, "Test": 2}, "holds Test/, test/, which mean the same split"),
        ({"a/train": 3, "a/test": 2, "b/train": 3, "b/test": 2}, "holds a/, b/, which hold the splits"),
        ({"train/.": 3, "valid/.": 3, "plane/.": 3}, "splits without labels, or classes?"),
        ({"dataset": 3}, "holds one folder only, dataset/, and that holds cat/, dog/, owl/"),
    ],
)
def test_what_can_be_understood_in_two_ways_is_refused(splits: dict[str, int], said: str, tmp_path: Path) -> None:
    assert said in refusal(tree(tmp_path, splits, ("",) if "plane/." in splits else CLASSES))


def test_a_class_may_be_called_train_or_valid(make_image_folder: Callable[..., Path]) -> None:
    found, held = both(make_image_folder({"train": 30, "plane": 30, "ship": 30}))
    assert found.class_names == held.class_names == ("plane", "ship", "train")
    assert len(found) + len(held) == 90


def test_litter_is_no_class_and_no_picture(tmp_path: Path) -> None:
    clean = both(tree(tmp_path / "clean"))
    root = tree(tmp_path / "mac")
    copies = root / "train" / "cat" / ".ipynb_checkpoints"
    litter = root / "train" / "__MACOSX" / "cat"
    for folder in (copies, litter, root / "__MACOSX", root / ".git", root / "test" / ".thumbnails"):
        folder.mkdir(parents=True)
    Image.fromarray(picture(1, 77)).save(copies / "000-checkpoint.png")
    for path in (litter / "._000.png", root / "train" / "cat" / "._000.png"):
        path.write_bytes(APPLE_DOUBLE)
    (root / "train" / "cat" / ".DS_Store").write_bytes(b"\0\0\0\1Bud1")
    (root / "train" / "dog" / "Thumbs.db").write_bytes(b"\xd0\xcf\x11\xe0")
    for found, expected in zip(both(root), clean, strict=True):
        assert np.array_equal(found.digests(), expected.digests()) and found.class_names == CLASSES
    assert "skipped: 5 left by a system or editor" in both(root)[0].description


def test_every_ending_is_read_or_counted(tmp_path: Path) -> None:
    root = tree(tmp_path, suffix=".jpg")
    for number, suffix in enumerate((".jfif", ".jpe", ".jp2", "", ".JPG", ".heic", ".csv")):
        name = root / "train" / "cat" / f"extra{number}{suffix}"
        Image.fromarray(picture(0, 900 + number)).save(name, "JPEG2000" if suffix == ".jp2" else "JPEG")
    found, _ = both(root)
    assert counts(found)["cat"] == 25
    assert "skipped: 1 *.csv, 1 *.heic" in found.description


def test_linked_folders_are_read_and_a_class_that_is_linked_twice_is_refused(tmp_path: Path) -> None:
    root, store = tree(tmp_path / "tree"), tmp_path / "store"
    store.mkdir()
    for number in range(30):
        Image.fromarray(picture(1, 700 + number)).save(store / f"{number}.png")
    (root / "train" / "dog" / "patient1").symlink_to(store)
    assert counts(both(root)[0])["dog"] == 50
    for split in ("train", "test"):
        (root / split / "fox").symlink_to(root / split / "owl")
    with pytest.raises(ConfigurationError, match="every image of owl occurs under another class"):
        Experiment.from_dict(case(f"imagefolder:{root}")).plan()


def test_arrays_are_refused_with_a_hint(tmp_path: Path) -> None:
    array = tmp_path / "pathmnist.npz"
    np.savez(array, train_images=np.zeros((2, 8, 8), np.uint8))
    assert "holds arrays or tensors and is no folder: leave .npz files without imagefolder:" in refusal(array)
    for split in ("train", "test"):
        (tmp_path / "npy" / split / "a").mkdir(parents=True)
        np.save(tmp_path / "npy" / split / "a" / "0.npy", np.zeros((8, 8, 3), np.uint8))
    assert "holds no images; skipped: 1 *.npy (arrays are not read" in refusal(tmp_path / "npy")
    with pytest.raises(ConfigurationError, match=f"is a path on this disk: write imagefolder:{tmp_path}"):
        Experiment.from_dict(case(str(tmp_path))).plan()


def test_one_name_written_in_two_ways_is_one_class(tmp_path: Path) -> None:
    composed, taken_apart = (unicodedata.normalize(form, "épée") for form in ("NFC", "NFD"))
    root = tree(tmp_path, {"train": 3}, ("a", composed))
    tree(tmp_path, {"test": 2}, ("a", taken_apart))
    assert [images.class_names for images in both(root)] == [("a", composed)] * 2
    tree(tmp_path, {"train": 3}, (taken_apart,))
    assert "two class folders with the same name" in refusal(root)


@pytest.mark.parametrize("splits", [{"train": 12, "test": 8}, {"": 30}])
def test_pictures_without_an_ending_or_class_folders_are_read(splits: dict[str, int], tmp_path: Path) -> None:
    def save(pixels: np.ndarray, path: Path) -> None:
        Image.fromarray(pixels).save(path, "PNG")

    root = tree(tmp_path, splits, ("",), suffix="", save=save)
    (root / "README").write_text("no picture")
    found, held = both(root)
    assert len(found) + len(held) == sum(splits.values()) and found.class_names == ("unlabelled",)


def test_pictures_beside_class_folders_are_counted(tmp_path: Path) -> None:
    root = tree(tmp_path)
    Image.new("RGB", (8, 8)).save(root / "train" / "overview.png")
    assert "1 beside the class folders" in both(root)[0].description


def test_a_single_image_of_a_class_is_read(tmp_path: Path) -> None:
    root = tree(tmp_path)
    for split in ("train", "test"):
        (root / split / "rare").mkdir()
        Image.fromarray(picture(3, len(split))).save(root / split / "rare" / "one.png")
    assert counts(both(root)[0])["rare"] == counts(both(root)[1])["rare"] == 1
    assert Experiment.from_dict(case(f"imagefolder:{root}")).plan().context.roles.labelled


WORDS = st.text(st.characters(categories=["L", "N"], include_characters=" -_.()'&"), min_size=1, max_size=12).filter(
    lambda text: text == text.strip() and text[0] not in "." and split_named(text) is None and len(text.encode()) < 200
)


@settings(max_examples=30)
@given(
    classes=st.lists(
        WORDS, min_size=2, max_size=4, unique_by=lambda text: unicodedata.normalize("NFC", text.casefold())
    ),
    above=st.lists(WORDS, max_size=2),
    splits=st.sampled_from(
        [("train", "test"), ("Training", "Testing"), ("TRAIN", "Valid"), ("train-set", "val"), None]
    ),
    below=st.sampled_from(["", "patient 1", "ä/b"]),
    litter=st.sampled_from(["", "__MACOSX", ".git", "Thumbs.db", ".DS_Store", ".ipynb_checkpoints"]),
)
def test_every_nesting_gives_its_classes_or_one_line(
    classes: list[str], above: list[str], splits: tuple[str, str] | None, below: str, litter: str,
    tmp_path_factory: pytest.TempPathFactory,
) -> None:  # fmt: skip
    root = tmp_path_factory.mktemp("tree")
    data = root.joinpath(*above)
    for place, split in enumerate(splits or ("",)):
        for kind, name in enumerate(classes):
            folder = data / split / name / below
            folder.mkdir(parents=True)
            for number in range(12):
                Image.fromarray(picture(kind, number + 100 * place, (16, 16))).save(folder / f"{number}.png")
            if litter:
                (folder / litter).mkdir()
                (folder / litter / "x.png").write_bytes(b"no picture")
    if splits is None and above:  # classes, or a folder too high? nobody can tell
        assert "holds one folder only" in refusal(root)
        return
    found, held = both(root)
    wanted = sorted(unicodedata.normalize("NFC", name) for name in classes)
    assert list(found.class_names) == list(held.class_names) == wanted
    assert len(found) + len(held) == 12 * len(classes) * (2 if splits else 1)
    if splits:
        assert set(counts(found).values()) == set(counts(held).values()) == {12}


@pytest.mark.parametrize("layout", ["flat", "flat splits", "one class"])
def test_without_labels_no_accuracy_is_claimed(layout: str, tmp_path: Path) -> None:
    splits = {"flat": {"": 90}, "flat splits": {"train": 40, "test": 20}, "one class": {"train": 40, "test": 20}}[
        layout
    ]
    root = tree(tmp_path / "data", splits, ("all",) if layout == "one class" else ("",))
    (root / "labels.csv").write_text("image,label\n")
    document = case(f"imagefolder:{root}")
    document["evaluation"] |= {"recognition_epochs": 1, "label_fractions": [0.5]}  # type: ignore[operator]
    experiment = Experiment.from_dict(document)
    assert "no labels: utility not measurable (all images are of one class)" in experiment.plan().context.roles.reading
    result = experiment.run()
    row = result.table().iloc[0]
    measures = [
        "knn_accuracy",
        "linear_accuracy",
        "semi_50_accuracy",
        "knn_raw_pixels",
        "linear_untrained",
        "recognised",
    ]
    assert row[measures].isna().all() and row["mse"] > 0
    assert "no-labels" in row["flags"].split(";")
    assert result.record.probe[["knn", "linear", "linear_untrained", "knn_raw_pixels"]].isna().all().all()
    assert result.record.training["validation_knn"].isna().all()
    if layout == "one class":
        page = result.report(tmp_path / "out").read_text(encoding="utf-8")
        assert "No labels: utility not measurable" in page and "nan" not in page.split("<svg")[0].lower().split()


def test_class_names_that_differ_by_case_only_are_two_classes_and_that_is_said(tmp_path: Path) -> None:
    found, _ = both(tree(tmp_path, {"train": 6, "test": 3}, ("a", "A", "b")))
    assert found.class_names == ("A", "a", "b")
    assert "names of classes differ by upper and lower case only: A, a" in found.description


def test_names_that_are_no_text_are_read(tmp_path: Path) -> None:
    root = tree(tmp_path, {"train": 6, "test": 3})
    for split in ("train", "test"):
        (root / split / "cat" / "000.png").rename(root / split / "cat" / os.fsdecode(b"\xff\xfe.png"))
        (root / split / "dog").rename(root / split / os.fsdecode(b"d\xffg"))
    found, held = both(root)
    assert (len(found), len(held)) == (18, 9) and len(found.class_names) == 3


@pytest.mark.parametrize(
    ("name", "said"),
    [("", "names no folder"), ("~nobody-at-all/x", "Could not determine"), ("$HOME/x", "there is no folder $HOME/x"),
     ("C:\\data", "there is no folder C:\\data"), ("a\0b", "there is no folder"), ("x" * 300, "")],
)  # fmt: skip
def test_a_place_that_is_none_is_one_line(name: str, said: str) -> None:
    with pytest.raises(ConfigurationError) as refused:
        load_split(f"imagefolder:{name}", "train")
    assert said in str(refused.value) and "\n" not in str(refused.value)


def test_links_that_lead_back_end_the_reading(tmp_path: Path) -> None:
    root = tree(tmp_path, {"train": 6, "test": 3})
    (root / "train" / "cat" / "self").symlink_to(root / "train" / "cat")
    (root / "train" / "cat" / "loop").symlink_to("loop")
    (root / "train" / "cat" / "folder.png").mkdir()
    found, _ = both(root)
    assert counts(found)["cat"] == 6
    assert "1 broken link, 1 link back to a folder above it" in found.description


def test_a_device_says_what_it_may_not_look_into(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def denied(path: Path) -> bool:
        raise PermissionError(errno.EACCES, "Permission denied", str(path))

    monkeypatch.setattr(Path, "is_dir", denied)  # as where a folder above it may not be looked into; root may
    with pytest.raises(DeviceError, match=r"pictures cannot be opened: Permission denied"):
        open_data(tmp_path / "pictures", 16)


def test_what_may_not_be_opened_is_one_line(tmp_path: Path) -> None:
    if os.geteuid() == 0:
        pytest.skip("root may open everything")
    root = tree(tmp_path, {"train": 6, "test": 3})
    for place, said in ((root / "train" / "cat", "cannot be opened"), (root / "train" / "dog" / "000.png", "denied")):
        mode = place.stat().st_mode
        place.chmod(0)
        assert said in refusal(root)
        place.chmod(mode)
