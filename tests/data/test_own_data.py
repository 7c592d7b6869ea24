"""Whatever form data has, the same images come out of it, or it is refused in one line."""

from __future__ import annotations

import pickle
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from PIL import Image

from mocosfl_priv.data.examples import Naming
from mocosfl_priv.data.image_set import ImageSet
from mocosfl_priv.data.own_data import read_images, read_splits
from mocosfl_priv.data.pixel_arrays import channels_last, images_of, with_channels
from mocosfl_priv.device.pictures import Reading
from mocosfl_priv.errors import ConfigurationError
from tests.data.own_data_files import FILES, NAMES, OBJECTS, Forty, flat_folder, forty, png, write_csv


@pytest.fixture(scope="module")
def data() -> Forty:
    return forty()


def require_same(found: ImageSet, data: Forty) -> None:
    assert np.array_equal(found.images.permute(0, 2, 3, 1).numpy(), data.images)
    names = [found.class_names[label] for label in found.labels]
    assert names in (data.names, [str(label) for label in data.labels])
    if found.group_names:
        groups = [found.group_names[group] for group in found.groups]
        assert groups in (data.groups.tolist(), [str(int(name[1:])) for name in data.groups])


def refused(source: Any, **options: Any) -> str:
    with pytest.raises(ConfigurationError) as error:
        read_images(source, **options)
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize("form", FILES)
def test_every_kind_of_file_gives_the_same_images(form: str, data: Forty, tmp_path: Path) -> None:
    source = FILES[form](tmp_path, data)
    found, report = read_images(source)
    require_same(found, data)
    assert sorted(report.classes.values()) == [10] * 4
    assert (report.images, report.channels, report.size, report.duplicates) == (40, 3, (32, 32), 0)
    assert report.groups == (None if form in ("pt of a pair", "class folder") else 8)
    (train, _), (test, said) = read_splits(source, 32)
    assert len(train) + len(test) == 40 and said.images == len(test) > 0
    assert not set(train.digests()) & set(test.digests())
    assert not train.names_of_groups() & test.names_of_groups()
    assert "RGB" in said.text and "of 255" in said.text


@pytest.mark.parametrize("form", OBJECTS)
def test_every_python_object_gives_the_same_images(form: str, data: Forty) -> None:
    require_same(read_images(OBJECTS[form](data))[0], data)


def test_hugging_face_folders_are_read_without_their_package(data: Forty, tmp_path: Path) -> None:
    """The oracle is the package itself, which writes the folders and reads them back."""
    hf = pytest.importorskip("datasets", reason="the package datasets is not installed")
    features = hf.Features(
        {"image": hf.Image(), "label": hf.ClassLabel(names=list(NAMES)), "group": hf.Value("string")}
    )
    rows = {"image": [Image.fromarray(image) for image in data.images], "label": data.labels, "group": data.groups}
    whole = hf.Dataset.from_dict(rows, features=features)
    whole.save_to_disk(tmp_path / "whole", num_shards=3)
    whole.to_parquet(tmp_path / "whole.parquet")
    chosen = whole.shuffle(seed=1).select(range(25))
    hf.DatasetDict({"train": whole.select(range(25)), "test": whole.select(range(25, 40))}).save_to_disk(
        tmp_path / "two"
    )
    chosen.save_to_disk(tmp_path / "chosen")
    for source in (tmp_path / "whole", tmp_path / "whole.parquet", whole):
        found, report = read_images(source)
        require_same(found, data)
        assert found.class_names == NAMES and report.groups == 8
    back = hf.load_from_disk(tmp_path / "chosen")
    found, _ = read_images(tmp_path / "chosen")
    assert found.labels.tolist() == back["label"]
    for row in range(25):
        assert np.array_equal(found.images[row].permute(1, 2, 0).numpy(), np.asarray(back[row]["image"]))
    naming = Naming(label_column="group")
    (train, _), (test, _) = read_splits(tmp_path / "two", 32, naming)
    assert (len(train), len(test)) == (25, 15) and train.class_names == tuple(sorted(set(data.groups)))
    arrays = hf.Features({"image": hf.Array3D((32, 32, 3), "uint8"), "label": hf.Value("int64")})
    hf.Dataset.from_dict({"image": list(data.images), "label": data.labels}, features=arrays).save_to_disk(
        tmp_path / "a"
    )
    require_same(read_images(tmp_path / "a")[0], data)


def test_labels_beside_a_flat_folder(data: Forty, tmp_path: Path) -> None:
    folder = flat_folder(tmp_path / "flat", data)
    write_csv(tmp_path / "labels.csv", data)
    found, report = read_images(folder, labels="labels.csv")
    require_same(found, data)
    assert report.groups == 8 and not report.skipped
    assert read_images(str(folder), labels="labels.csv")[1] == report
    Image.fromarray(data.images[0]).save(folder / "extra.png")
    (folder / "notes.txt").write_text("")
    assert read_images(folder, labels="labels.csv")[1].skipped == {"*.txt": 1, "not in the file of labels": 1}
    by_stem = tmp_path / "stems.csv"
    by_stem.write_text((tmp_path / "labels.csv").read_text().replace(".png", "").replace("file,label", "image_id,dx"))
    require_same(read_images(folder, naming=Naming(labels=by_stem, label_column="dx"))[0], data)


@pytest.mark.parametrize(
    ("csv", "said"),
    [
        ("name,label\na.png,cat\n", "has no column 'file'"),
        ("file,kind\na.png,cat\n", "has no column 'label'"),
        ("file,label\nb.png,cat\n", "1 of 1 files in .* are not in .*, the first: 'b.png'"),
        ("file,label\na.png,cat\na.png,dog\n", "lists a.png more than once"),
        ("file,label\na.png,\n", "1 of 1 images have no label"),
        ("file,label,group\na.png,cat,\n", "1 of 1 images have no group"),
        ("file,label\n", "has no rows"),
        ("file,label\n../secret.png,cat\n", "are not in"),
        ("file,label,split\na.png,cat,holdout\n", "names splits, but also 'holdout'"),
    ],
)
def test_wrong_files_of_labels_are_refused(csv: str, said: str, tmp_path: Path) -> None:
    (tmp_path / "flat").mkdir()
    for name in ("flat/a.png", "secret.png"):
        Image.new("RGB", (8, 8)).save(tmp_path / name)
    (tmp_path / "labels.csv").write_text(csv)
    with pytest.raises(ConfigurationError, match=said):
        read_images(tmp_path / "flat", labels=tmp_path / "labels.csv")


def test_splits_are_taken_as_they_are(data: Forty, tmp_path: Path) -> None:
    order = np.random.default_rng(0).permutation(40)
    first, second = order[:30], order[30:]
    keras = (data.images[first], data.labels[first]), (data.images[second], data.labels[second])
    np.savez(tmp_path / "mnist.npz", x_train=keras[0][0], y_train=keras[0][1], x_test=keras[1][0], y_test=keras[1][1])
    with h5py.File(tmp_path / "split.hdf5", "w") as file:
        for split, (images, labels) in zip(("train", "valid"), keras, strict=True):
            file[f"{split}/images"], file[f"{split}/labels"] = images, labels
    write_csv(tmp_path / "labels.csv", data)
    folder = flat_folder(tmp_path / "flat", data)
    lines = (tmp_path / "labels.csv").read_text().splitlines()
    rows = [line + (",train" if i in first else ",test") for i, line in enumerate(lines[1:])]
    (tmp_path / "labels.csv").write_text("\n".join(["file,label,subject,split", *rows]))
    for source in (
        tmp_path / "mnist.npz",
        tmp_path / "split.hdf5",
        keras,
        {"train": keras[0], "test": keras[1]},
        folder,
    ):
        naming = Naming(labels=Path("labels.csv")) if source is folder else Naming()
        (train, _), (test, _) = read_splits(source, 32, naming)
        wanted = (np.sort(first), np.sort(second)) if source is folder else (first, second)
        for found, rows_of in zip((train, test), wanted, strict=True):
            assert np.array_equal(found.images.permute(0, 2, 3, 1).numpy(), data.images[rows_of])
            assert found.labels.tolist() == data.labels[rows_of].tolist()
    assert read_images(tmp_path / "mnist.npz", split="test")[1].images == 10
    assert read_images(tmp_path / "mnist.npz")[1].images == 40


def test_groups_come_from_names_of_files(data: Forty, tmp_path: Path) -> None:
    folder = flat_folder(tmp_path / "flat", data)
    naming = Naming(group_pattern=r"_(p\d+)\.")
    found, report = read_images(folder, naming=naming)
    assert [found.group_names[group] for group in found.groups] == data.groups.tolist()
    assert report.classes == {} and "no labels" in report.notes
    (train, _), (test, _) = read_splits(FILES["class folder"](tmp_path, data), 32, naming)
    assert not train.names_of_groups() & test.names_of_groups()
    assert train.names_of_groups() | test.names_of_groups() == set(data.groups)
    for pattern, said in (("(x)", "does not match 40 of 40"), ("(p00|p01)", "does not match 30 of 40")):
        assert said in refused(folder, naming=Naming(group_pattern=pattern))
    assert "has no names of files" in refused(data.images, naming=naming)
    assert "has no column 'patient'" in refused((data.images, data.labels), group="patient")
    assert "name a CSV file in data.labels" in refused(folder, group="patient")
    (train, _), _ = read_splits(data.images, 32, naming, require_groups=False)
    assert not train.group_names and "groups are not named here" in train.read


# ---- layouts and values


@given(
    n=st.integers(1, 5),
    height=st.integers(5, 12),
    width=st.integers(5, 12),
    channels=st.sampled_from([1, 3]),
    layout=st.sampled_from(["last", "first", "none"]),
    kind=st.sampled_from(["uint8", "uint16", "float32", "float64", "float16", "bfloat16"]),
    tensor=st.booleans(),
    seed=st.integers(0, 100),
)
def test_every_layout_and_type_of_numbers_gives_the_same_pixels(
    n: int, height: int, width: int, channels: int, layout: str, kind: str, tensor: bool, seed: int
) -> None:
    expected = np.random.default_rng(seed).integers(0, 256, (n, height, width, channels)).astype(np.uint8)
    expected.flat[0], expected.flat[-1] = 0, 255
    given_images: Any = expected.transpose(0, 3, 1, 2) if layout == "first" else expected
    if layout == "none":
        expected, given_images = expected[..., :1], expected[..., 0]
        expected[-1, -1, -1] = 255
        if n == 3:
            return  # (3, h, w) may be one RGB image; see below
    tolerance = 0
    if kind == "uint16":
        given_images = given_images.astype(np.uint16) * 257
    elif kind == "bfloat16":
        given_images, tolerance, tensor = torch.from_numpy(given_images / 255).bfloat16(), 1, True
    elif kind != "uint8":
        given_images = (given_images / 255).astype(kind)
    if tensor and kind != "bfloat16":
        given_images = torch.from_numpy(np.ascontiguousarray(given_images))
    found = images_of(given_images, "x", None, Reading())
    assert np.abs(found.astype(int) - expected).max() <= tolerance


@given(hnp.arrays(np.float32, (2, 6, 5), elements=st.floats(width=32, allow_nan=True, allow_infinity=True)))
def test_floats_are_images_or_refused_with_their_numbers(values: np.ndarray) -> None:
    inside = bool(np.isfinite(values).all() and values.min() >= 0 and values.max() <= 1)
    try:
        found = images_of(values, "x", None, Reading())
    except ConfigurationError as error:
        assert not inside
        assert "not finite" in str(error) or f"{values.max():g}" in str(error)
    else:
        assert inside
        assert np.abs(found[..., 0] / 255 - values).max() <= 0.5 / 255 + 1e-6


@pytest.mark.parametrize(
    ("shape", "said"),
    [
        ((32, 32), "one table or one image"),
        ((32, 32, 3), "may be one image or several grey ones"),
        ((3, 32, 32), "may be one image or several grey ones"),
        ((8, 3, 32, 3), "may have its channels first or last"),
        ((8, 1, 3, 1), "may have its channels first or last"),
        ((8, 32, 32, 4), "has 4 or 32 channels"),
        ((8, 32, 32, 32), "no axis of channels"),
        ((8, 2, 3, 32, 32), "is none of"),
        ((0, 32, 32, 3), "there are no images in it"),
    ],
)
def test_ambiguous_shapes_are_refused(shape: tuple[int, ...], said: str) -> None:
    assert said in refused(np.zeros(shape, np.uint8))


def test_labels_tell_how_many_images_there_are() -> None:
    assert channels_last(np.zeros((3, 32, 32)), "x", count=3).shape == (3, 32, 32, 1)
    source, labels = np.full((3, 32, 32), 9, np.uint8), [0, 1, 0]
    assert read_images((source, labels))[1].classes == {"0": 2, "1": 1}
    assert read_images(source, labels=labels)[1].classes == {"0": 2, "1": 1}


@pytest.mark.parametrize(
    ("images", "said"),
    [
        (np.full((4, 8, 8), 200.0), "reach from 200 to 200, but images lie between 0 and 1: divide by 255"),
        (np.linspace(-2.1, 2.6, 256).reshape(4, 8, 8), "reach from -2.1 to 2.6"),
        (np.full((4, 8, 8), np.nan), "256 of 256 values are not finite"),
        (np.full((4, 8, 8), 200), "int64 values reach from 200 to 200, and their full range is unknown"),
        (np.ones((4, 8, 8), np.uint8), "all values are 0 or 1 of 255"),
        (np.full((4, 8, 8), 4095, np.uint16), "values of at most 4095 of 65535"),
        (np.full((4, 8, 8), "a"), "images are numbers, not <U1"),
        (np.full((4, 8, 8), 1j), "images are numbers, not complex128"),
        ([np.zeros((8, 8, 3), np.uint8), np.zeros((9, 8, 3), np.uint8)], "2 sizes, from 8x8 to 8x9 pixels"),
        ([], "there are no images in it"),
        ([object()], "a object is no image"),
        (7, "a int is no data set"),
        ({"a": np.zeros(3), "b": np.zeros(3)}, "nothing in it is called images; it has a, b"),
        ({"x": np.zeros((4, 8, 8)), "images": np.zeros((4, 8, 8))}, "may both be the images"),
        ((np.zeros((4, 8, 8)), [0, 1]), "4 images, but 2 labels"),
        ((np.zeros((4, 8, 8)), np.zeros((4, 40))), "labels of shape (4, 40): there must be one per image"),
        ((np.zeros((4, 8, 8)), [0.5, 1, 2, 3]), "labels are whole numbers or text"),
        ((np.zeros((4, 8, 8)), ["a", None, "b", "c"]), "1 of 4 images have no label"),
        ("nowhere.npz", "there is no file nowhere.npz"),
        ("torchvision:MNST", "did you mean"),
        ("torchvision:MNIST:letters", "MNIST has no 'letters'"),
        ("nowhere.py:load", "file nowhere.py does not exist"),
    ],
)
def test_what_is_no_data_is_refused(images: Any, said: str) -> None:
    assert said in refused(images)


def test_random_transforms_are_refused() -> None:
    class Augmented:
        def __len__(self) -> int:
            return 4

        def __getitem__(self, index: int) -> Any:
            return torch.rand(3, 8, 8), 0

    assert "gives another image each time" in refused(Augmented())


def test_size_and_channels_are_as_asked_for(data: Forty) -> None:
    grey = np.stack([np.asarray(Image.fromarray(image).convert("L")) for image in data.images])
    found, report = read_images(data.images, channels=1)
    assert np.array_equal(found.images[:, 0].numpy(), grey)  # Pillow's own conversion
    assert report.channels == 1 and "grey" in report.text
    assert read_images(grey)[0].images.shape == (40, 1, 32, 32)
    assert read_images([Image.fromarray(image) for image in grey])[0].images.shape == (40, 1, 32, 32)
    assert torch.equal(read_images(grey, channels=3)[0].images, torch.from_numpy(grey)[:, None].repeat(1, 3, 1, 1))
    wide, _ = read_images(data.images, size=(24, 48))
    pictures = [Image.fromarray(image) for image in data.images]
    expected = np.asarray(Image.fromarray(data.images[3]).resize((48, 48), Image.Resampling.BILINEAR))[12:36]
    assert np.array_equal(wide.images[3].permute(1, 2, 0).numpy(), expected)
    assert torch.equal(read_images(pictures, size=(24, 48))[0].images, wide.images)
    assert with_channels(data.images, 3, grey=False) is data.images
    again, said = read_images(found)
    assert torch.equal(again.images, found.images) and said.images == 40


def test_duplicates_are_counted(data: Forty) -> None:
    twice = np.concatenate([data.images, data.images[:3]])
    assert read_images(twice)[1].duplicates == 3


# ---- files that lie


class Trap:
    """Runs when it is unpickled."""

    def __init__(self, proof: Path) -> None:
        self.proof = proof

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return Path.touch, (self.proof,)


@pytest.mark.parametrize("suffix", [".npy", ".npz", ".pt"])
def test_code_in_files_is_never_run(suffix: str, tmp_path: Path) -> None:
    proof, path = tmp_path / "proof", tmp_path / f"trap{suffix}"
    trap = np.array([Trap(proof)], dtype=object)
    if suffix == ".npy":
        np.save(path, trap, allow_pickle=True)
    elif suffix == ".npz":
        np.savez(path, images=trap)
    else:
        torch.save({"images": Trap(proof)}, path)
    assert "holds Python objects, which are never loaded" in refused(path)
    (tmp_path / f"bare{suffix}").write_bytes(pickle.dumps(Trap(proof), protocol=2))
    refused(tmp_path / f"bare{suffix}")
    assert not proof.exists()
    pickle.loads(pickle.dumps(Trap(proof)))
    assert proof.exists()  # so the trap works


def test_hdf5_reads_no_other_file(data: Forty, tmp_path: Path) -> None:
    with h5py.File(tmp_path / "secret.h5", "w") as file:
        file["images"] = data.images
    with h5py.File(tmp_path / "link.h5", "w") as file:
        file["images"] = h5py.ExternalLink("secret.h5", "/images")
    assert "nothing in it is called images" in refused(tmp_path / "link.h5")
    (tmp_path / "raw").write_bytes(data.images.tobytes())
    with h5py.File(tmp_path / "raw.h5", "w") as file:
        file.create_dataset(
            "images", data.images.shape, "u1", external=[(str(tmp_path / "raw"), 0, data.images.nbytes)]
        )
    assert "lies in other files, which are not read" in refused(tmp_path / "raw.h5")


@pytest.mark.parametrize("suffix", [".npy", ".npz", ".pt", ".h5", ".parquet"])
@pytest.mark.parametrize("content", [b"", b"no data at all", b"PK\x03\x04 broken"])
def test_damaged_files_are_named(suffix: str, content: bytes, tmp_path: Path) -> None:
    path = tmp_path / f"broken{suffix}"
    path.write_bytes(content)
    assert "broken" in refused(path)


def test_tables_with_wrong_rows_are_refused(data: Forty, tmp_path: Path) -> None:
    def table(**columns: Any) -> Path:
        pq.write_table(pa.table(columns), tmp_path / "t.parquet")
        return tmp_path / "t.parquet"

    image = png(data.images[0])
    assert "row 1 cannot be read: not an image" in refused(table(image=[image, b"no image"]))
    assert "row 1 holds no image bytes" in refused(table(image=[image, None]))
    assert "several columns of pictures: left, right" in refused(table(left=[image], right=[image]))
    assert "has no column of pictures" in refused(table(a=[1, 2]))
    assert "data.label_column" in refused(table(image=[image]), naming=Naming(label_column="kind"))


# ---- a user's function


@pytest.mark.parametrize(
    ("code", "said"),
    [
        ("def load(): raise ValueError('no\\ndisk')", "load failed: ValueError: no disk"),
        ("def load(folder): return None", "asks for 'folder'; it may only ask for split and image_size"),
        ("def load(): return None", "a NoneType is no data set"),
        ("load = 3", "load is a int, not a function"),
        ("def loads(): pass", "there is no function 'load'; did you mean 'loads'"),
    ],
)
def test_wrong_functions_are_refused(code: str, said: str, tmp_path: Path) -> None:
    (tmp_path / "my_data.py").write_text(code)
    assert said in refused(f"{tmp_path / 'my_data.py'}:load")


def test_a_function_may_ask_for_split_and_size(tmp_path: Path) -> None:
    (tmp_path / "by_split.py").write_text(
        "import numpy as np\n"
        "def load(split, image_size):\n"
        "    n = {'train': 6, 'test': 4}[split]\n"
        "    return np.full((n, image_size, image_size), 10 * n, np.uint8), [0, 1] * (n // 2)\n"
    )
    (train, _), (test, _) = read_splits(f"{tmp_path / 'by_split.py'}:load", 16)
    assert train.images.shape == (6, 3, 16, 16) and test.images.shape == (4, 3, 16, 16)
    assert int(test.images[0, 0, 0, 0]) == 40


# ---- torchvision by class


def write_mnist(root: Path, name: str, images: np.ndarray, labels: np.ndarray) -> None:
    """Files as http://yann.lecun.com/exdb/mnist describes them."""
    folder = root / name / "raw"
    folder.mkdir(parents=True)
    for split, part in (("train", slice(0, 30)), ("t10k", slice(30, 40))):
        chosen, their = images[part], labels[part].astype(np.uint8)
        (folder / f"{split}-images-idx3-ubyte").write_bytes(struct.pack(">4i", 2051, *chosen.shape) + chosen.tobytes())
        (folder / f"{split}-labels-idx1-ubyte").write_bytes(struct.pack(">2i", 2049, len(their)) + their.tobytes())


@pytest.mark.parametrize("name", ["MNIST", "FashionMNIST"])
def test_mnist_by_its_class(name: str, data: Forty, tmp_path: Path) -> None:
    grey, labels = data.images[..., 0], np.arange(40) % 10
    write_mnist(tmp_path, name, grey, labels)
    (train, _), (test, _) = read_splits(f"torchvision:{name}", 32, root=tmp_path)
    assert np.array_equal(train.images[:, 1].numpy(), grey[:30]) and np.array_equal(
        test.images[:, 2].numpy(), grey[30:]
    )
    assert test.labels.tolist() == labels[30:].tolist() and len(train.class_names) == 10
    found, report = read_images(f"torchvision:{name}", root=tmp_path, split="test")
    assert found.images.shape == (10, 1, 32, 32) and report.channels == 1
    assert "download=True" in refused(f"torchvision:{name}", root=tmp_path / "nowhere")


def test_sets_with_a_split_and_sets_without(data: Forty, tmp_path: Path) -> None:
    for index, image in enumerate(data.images):
        kind = data.names[index]
        for folder in (tmp_path / "imagenette2" / ("train" if index % 2 else "val") / f"n{data.labels[index]}",
                       tmp_path / "eurosat" / "2750" / kind):  # fmt: skip
            folder.mkdir(parents=True, exist_ok=True)
            Image.fromarray(image).save(folder / f"{index:02}.png")
    whole, _ = read_images("torchvision:EuroSAT", root=tmp_path)
    assert np.array_equal(whole.images.permute(0, 2, 3, 1).numpy(), data.images)
    (train, _), (test, _) = read_splits("torchvision:EuroSAT", 32, root=tmp_path)
    assert len(train) + len(test) == 40 and whole.class_names == NAMES
    with pytest.raises(ConfigurationError, match=r"data\.path to where the files are"):
        read_splits("torchvision:Food101", 32, root=tmp_path)


def test_flowers_and_faces_are_read_as_published(data: Forty, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Small files in the published formats; only torchvision's comparison of checksums is left out."""
    from scipy.io import savemat
    from torchvision import datasets

    monkeypatch.setattr(datasets.Flowers102, "_check_integrity", lambda self: True)
    monkeypatch.setattr(datasets.CelebA, "_check_integrity", lambda self: True)
    flowers, faces = tmp_path / "flowers-102", tmp_path / "celeba"
    (flowers / "jpg").mkdir(parents=True)
    (faces / "img_align_celeba").mkdir(parents=True)
    for index, image in enumerate(data.images, start=1):
        Image.fromarray(image).save(flowers / "jpg" / f"image_{index:05}.jpg", quality=95)
        Image.fromarray(image).save(faces / "img_align_celeba" / f"{index:06}.jpg", quality=95)
    savemat(flowers / "imagelabels.mat", {"labels": data.labels[None] + 1})
    savemat(flowers / "setid.mat", {"trnid": [range(1, 26)], "valid": [range(26, 31)], "tstid": [range(31, 41)]})
    names = [f"{index:06}.jpg" for index in range(1, 41)]
    split_of = [0] * 25 + [1] * 5 + [2] * 10
    tables = {
        "list_eval_partition.txt": [f"{name} {split}" for name, split in zip(names, split_of, strict=True)],
        "identity_CelebA.txt": [f"{name} {index // 5}" for index, name in enumerate(names)],
        "list_bbox_celeba.txt": ["40", "image_id x y", *(f"{name} 0 0" for name in names)],
        "list_landmarks_align_celeba.txt": ["40", "x y", *(f"{name} 0 0" for name in names)],
        "list_attr_celeba.txt": [
            "40",
            "Male Smiling",
            *(f"{name} 1 {1 if i % 2 else -1}" for i, name in enumerate(names)),
        ],
    }
    for name, lines in tables.items():
        (faces / name).write_text("\n".join(lines) + "\n")
    (train, _), (test, _) = read_splits("torchvision:Flowers102", 32, root=tmp_path)
    assert (len(train), len(test)) == (25, 10) and test.labels.tolist() == data.labels[30:].tolist()
    (train, _), (test, said) = read_splits("torchvision:CelebA:Smiling", 32, root=tmp_path)
    assert (len(train), len(test)) == (25, 10) and test.class_names == ("not Smiling", "Smiling")
    assert test.labels.tolist() == [i % 2 for i in range(30, 40)] and said.groups == 2
    assert read_images("torchvision:CelebA", root=tmp_path, split="train")[1].classes == {}
    assert "did you mean 'Smiling'" in refused("torchvision:CelebA:Smilling", root=tmp_path)


@pytest.mark.parametrize(
    ("source", "naming", "root"),
    [
        ("~nobody-at-all/flat", Naming(), None),
        ("~nobody-at-all/mine.py:images", Naming(), None),
        ("imagefolder:{flat}", Naming(labels=Path("~nobody-at-all/labels.csv")), None),
        ("torchvision:MNIST", Naming(), Path("~nobody-at-all")),
    ],
)
def test_the_home_of_an_unknown_user(
    source: str, naming: Naming, root: Path | None, data: Forty, tmp_path: Path
) -> None:
    folder = flat_folder(tmp_path / "flat", data)
    with pytest.raises(ConfigurationError, match=r"nobody-at-all.*Could not determine home"):
        read_images(source.format(flat=folder), naming=naming, root=root)


def test_two_names_of_one_split_are_refused_instead_of_losing_one(data: Forty) -> None:
    images = {"train": data.images[:20], "val": data.images[20:30], "valid": data.images[30:]}
    with pytest.raises(ConfigurationError, match="val and valid name the same split, validation"):
        read_images(images)


@pytest.mark.parametrize("suffix", [".mat", ".pkl"])
def test_files_of_arrays_that_are_not_read_say_so(suffix: str, tmp_path: Path) -> None:
    file = tmp_path / f"images{suffix}"
    file.write_bytes(b"anything")
    with pytest.raises(ConfigurationError, match=rf"{suffix} files are not read: save the arrays as \.npz"):
        read_images(f"imagefolder:{file}")
