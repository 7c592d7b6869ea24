"""Inputs as people have them, made small: pictures, trees, states. Used by tests, imported by nobody else."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
from PIL import Image

Save = Callable[[np.ndarray, Path], object]
CLASSES = ("cat", "dog", "owl")
APPLE_DOUBLE = bytes.fromhex("00051607000200004d6163204f532058") + bytes(100)


def picture(kind: int, seed: int, size: tuple[int, int] = (48, 48)) -> np.ndarray:
    """uint8 (h, w, 3): a gradient and a blob that is typical of the class `kind`."""
    rng = np.random.default_rng(1000 * kind + seed)
    width, height = size
    y, x = np.mgrid[0:height, 0:width] / np.array([height, width])[:, None, None]
    centre = rng.uniform(0.2, 0.8, 2)
    blob = np.exp(-((x - centre[0]) ** 2 + (y - centre[1]) ** 2) / (0.01 + 0.03 * kind))
    base = np.stack([x, y, (x + y) / 2], -1) * rng.uniform(0.2, 0.8, 3)
    colour = np.array([[1, 0.2, 0.1], [0.1, 1, 0.2], [0.2, 0.2, 1], [1, 1, 0.1]])[kind % 4]
    image = base * 0.5 + blob[..., None] * colour * 0.6 + rng.normal(0, 0.03, (height, width, 3))
    return (image.clip(0, 1) * 255).astype(np.uint8)


def plain(pixels: np.ndarray, path: Path) -> None:
    Image.fromarray(pixels).save(path)


def grey(pixels: np.ndarray) -> np.ndarray:
    """float64 (h, w) in [0, 1], from exactly 0 to 1."""
    values = pixels.astype(np.float64).mean(-1)
    return (values - values.min()) / np.ptp(values)


def tree(
    root: Path,
    splits: Mapping[str, int] = {"train": 20, "test": 12},
    classes: Sequence[str] = CLASSES,
    suffix: str = ".png",
    save: Save = plain,
    size: tuple[int, int] = (48, 48),
) -> Path:
    for place, (split, count) in enumerate(splits.items()):
        for kind, name in enumerate(classes):
            folder = root / split / name
            folder.mkdir(parents=True, exist_ok=True)
            for number in range(count):
                save(picture(kind, number + 500 * place, size), folder / f"{number:03}{suffix}")
    return root


def case(dataset: str) -> dict[str, object]:
    """A configuration that is trained and attacked in seconds."""
    return {
        "name": "case",
        "defenses": ["none"],
        "target_fractions": [0],
        "attacks": ["floor"],
        "data": {
            "dataset": dataset,
            "source": "photos-source",
            "victims": 8,
            "validation_fraction": 0.1,
            "auxiliary_target_fraction": 0.1,
        },
        "model": {"backbone": "resnet8", "width": 8, "projector_hidden": 32, "projector_out": 32},
        "training": {"clients": 4, "epochs": 1, "server_batch": 16, "queue_size": 64, "monitor_every": 1},
        "evaluation": {
            "recognition_epochs": 0,
            "label_fractions": [],
            "bootstrap_samples": 100,
            "linear_probe_penalties": [0.1],
        },
        "compute": {"threads": 1, "device": "cpu"},
    }
