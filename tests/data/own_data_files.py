"""The same forty real images, written in every form that users have. Used by tests, imported by nobody else."""

from __future__ import annotations

import io
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from PIL import Image

from mocosfl_priv.data import photos

NAMES = ("astronaut", "chelsea", "coffee", "ihc")


@dataclass(frozen=True)
class Forty:
    """images: uint8 (40, 32, 32, 3). labels: int64 (40,), 0 to 3. groups: text (40,), eight of five images each."""

    images: np.ndarray
    labels: np.ndarray
    groups: np.ndarray

    @property
    def names(self) -> list[str]:
        return [NAMES[label] for label in self.labels]


def forty() -> Forty:
    train = photos.load("photos", "train")
    chosen = [int(index) for label in range(4) for index in torch.nonzero(train.labels == label)[:600:60, 0]]
    images = train.images[chosen].permute(0, 2, 3, 1).contiguous().numpy()
    return Forty(images, train.labels[chosen].numpy(), np.array([f"p{i % 8:02}" for i in range(40)]))


def png(image: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "PNG")
    return buffer.getvalue()


def flat_folder(folder: Path, data: Forty) -> Path:
    folder.mkdir(parents=True)
    for index, image in enumerate(data.images):
        Image.fromarray(image).save(folder / f"{index:02}_{data.groups[index]}.png")
    return folder


def write_csv(path: Path, data: Forty) -> None:
    rows = [f"{i:02}_{data.groups[i]}.png,{data.names[i]},{data.groups[i]}" for i in range(40)]
    path.write_text("\n".join(["file,label,group", *rows]), encoding="utf-8")


def _npz(path: Path, data: Forty) -> str:
    np.savez(path / "mine.npz", images=data.images, labels=data.labels, group=data.groups)
    return str(path / "mine.npz")


def _npz_medmnist(path: Path, data: Forty) -> str:
    np.savez(path / "med.npz", train_images=data.images, train_labels=data.labels[:, None], train_group=data.groups)
    return str(path / "med.npz")


def _npz_floats_channels_first(path: Path, data: Forty) -> str:
    floats = (data.images / 255).astype(np.float32).transpose(0, 3, 1, 2)
    np.savez(path / "floats.npz", x=floats, y=data.labels.astype(float), groups=data.groups)
    return str(path / "floats.npz")


def _npz_sixteen_bits(path: Path, data: Forty) -> str:
    np.savez(path / "deep.npz", data=data.images.astype(np.uint16) * 257, targets=data.labels, group=data.groups)
    return str(path / "deep.npz")


def _pt(path: Path, data: Forty) -> str:
    numbers = torch.tensor([int(name[1:]) for name in data.groups])
    torch.save({"images": torch.from_numpy(data.images), "labels": torch.from_numpy(data.labels), "group": numbers},
               path / "mine.pt")  # fmt: skip
    return str(path / "mine.pt")


def _pt_tuple(path: Path, data: Forty) -> str:
    images = torch.from_numpy(data.images).permute(0, 3, 1, 2) / 255
    torch.save((images, torch.from_numpy(data.labels)), path / "pair.pt")
    return str(path / "pair.pt")


def _h5(path: Path, data: Forty) -> str:
    with h5py.File(path / "mine.h5", "w") as file:
        file["images"] = data.images
        file["labels"] = [name.encode() for name in data.names]
        file["group"] = [name.encode() for name in data.groups]
    return str(path / "mine.h5")


def _parquet(path: Path, data: Forty) -> str:
    columns = {"image": [png(image) for image in data.images], "label": data.names, "group": list(data.groups)}
    pq.write_table(pa.table(columns), path / "mine.parquet")
    return str(path / "mine.parquet")


def _parquet_shards(path: Path, data: Forty) -> str:
    """As on Hugging Face's hub: a folder `data` with shards, and images as structs of bytes and path."""
    (path / "hub" / "data").mkdir(parents=True)
    for shard in range(2):
        rows = range(20 * shard, 20 * shard + 20)
        images = [{"bytes": png(data.images[i]), "path": f"{i}.png"} for i in rows]
        columns = {
            "image": images,
            "label": [int(data.labels[i]) for i in rows],
            "group": data.groups[20 * shard :][:20],
        }
        pq.write_table(pa.table(columns), path / "hub" / "data" / f"train-{shard:05}-of-00002.parquet")
    return str(path / "hub")


def _class_folder(path: Path, data: Forty) -> str:
    for index, image in enumerate(data.images):
        folder = path / "tree" / data.names[index]
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(folder / f"{index:02}_{data.groups[index]}.png")
    return f"imagefolder:{path / 'tree'}"


def _function(path: Path, data: Forty) -> str:
    source = _npz(path, data)
    (path / "my_data.py").write_text(
        f"import numpy as np\n\n\ndef load():\n    data = np.load({source!r})\n"
        "    return list(data['images']), data['labels'].tolist(), data['group'].tolist()\n",
        encoding="utf-8",
    )
    return f"{path / 'my_data.py'}:load"


FILES: dict[str, Callable[[Path, Forty], str]] = {
    "npz": _npz,
    "npz as MedMNIST": _npz_medmnist,
    "npz of floats, channels first": _npz_floats_channels_first,
    "npz of 16 bits": _npz_sixteen_bits,
    "pt": _pt,
    "pt of a pair": _pt_tuple,
    "h5": _h5,
    "parquet": _parquet,
    "parquet in shards": _parquet_shards,
    "class folder": _class_folder,
    "function": _function,
}


class Items:
    """A data set as torch users write it."""

    def __init__(self, data: Forty) -> None:
        self.data = data

    def __len__(self) -> int:
        return len(self.data.images)

    def __getitem__(self, index: int) -> Any:
        return torch.from_numpy(self.data.images[index]).permute(2, 0, 1) / 255, int(self.data.labels[index])


OBJECTS: dict[str, Callable[[Forty], Any]] = {
    "pair of arrays": lambda data: (data.images, data.labels),
    "mapping": lambda data: {"images": torch.from_numpy(data.images), "labels": data.names, "group": data.groups},
    "tensor data set": lambda data: torch.utils.data.TensorDataset(
        torch.from_numpy(data.images).permute(0, 3, 1, 2), torch.from_numpy(data.labels)
    ),
    "data set": Items,
    "subset of a data set": lambda data: torch.utils.data.Subset(Items(data), range(40)),  # type: ignore[arg-type]
    "list of pictures with labels": lambda data: [
        (Image.fromarray(image), label) for image, label in zip(data.images, data.labels, strict=True)
    ],
    "list of mappings": lambda data: [
        {"img": image, "label": name, "group": group}
        for image, name, group in zip(data.images, data.names, data.groups, strict=True)
    ],
}
