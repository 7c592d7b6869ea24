"""Discovery of the public MocoSFL release's checkpoints in a folder, and of the images its attacks were scored on.

Two layouts are recognised, at any depth. In the release's own layout, each training has a folder with
``checkpoint_c_best.tar`` and logs, which is named like
``mocosflV2_ResNet18_cifar10_cut2_bnlC4S2_..._ressfl_2.0_SSIM0.6_data_proportion_0.01_aux_cifar100``. In the other
layout, each checkpoint is a file like ``resnet18_cifar10_C4S2_cut2_alpha2.0_ssim0.6_target0.01_cifar100.tar``, and a
README beside it may list the logged values.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from mocosfl_priv.config import parse_bottleneck
from mocosfl_priv.errors import ConfigurationError
from mocosfl_priv.models.weights import read_weights_only
from mocosfl_priv.published.loader import CIFAR_MEAN, CIFAR_STD, STRIDE, load_published_client
from mocosfl_priv.published.logs import LoggedValues, find_in_table, read_logs, read_table

RELEASED_CLIENT = "checkpoint_c_best.tar"
ENDINGS = (".tar", ".pth")
ATTACK_IMAGES = ("cifar10_attack_images_128.pt", "saved_tensors/test_cifar10_image.pt")
ATTACK_IMAGES_SHAPE = (128, 3, 32, 32)
NUMBER = r"\d+(?:\.\d+)?"
PARTS = {
    "cut_layer": r"cut(\d+)",
    "bottleneck": r"(?:bnl)?((?:noReLU)?(?:K\d+)?C\d+S\d+|(?<=bnl)None)",
    "alpha": rf"(?:alpha|ressfl_)({NUMBER})",
    "ssim_threshold": rf"(?:ssim|SSIM)({NUMBER})",
    "target_fraction": rf"(?:target|data_proportion_)({NUMBER})",
    "source": rf"(?:aux|target{NUMBER})_([A-Za-z][A-Za-z0-9]*)",
}


@dataclass(frozen=True)
class PublishedCheckpoint:
    """A published client that can be loaded, how it was trained according to its name, and what was logged of it.

    name: unique among the checkpoints of a folder.
    cut_layer: inferred from the weights.
    bottleneck (``C4S2``, ``none``), alpha and ssim_threshold (of TAResSFL's expert), target_fraction (in [0, 1]) and
        source (the expert's source data set): None where the name does not say.
    logged: values from the release's logs. notes: remarks for the user about these logs.
    """

    name: str
    path: Path
    cut_layer: int
    bottleneck: str | None
    alpha: float | None
    ssim_threshold: float | None
    target_fraction: float | None
    source: str | None
    logged: LoggedValues
    notes: tuple[str, ...]


def find_published(folder: Path | str) -> list[PublishedCheckpoint]:
    """Find all checkpoints below `folder`, sorted by name.

    Raises ConfigurationError if the folder does not exist or holds no checkpoint, or if a checkpoint cannot be loaded
    or contradicts its name.
    """
    root = Path(folder)
    if not root.is_dir():
        raise ConfigurationError(f"folder of published checkpoints {root} does not exist")
    files = [path for path in sorted(root.rglob("*")) if path.is_file() and not path.name.startswith(".")]
    paths = [path for path in files if path.suffix in ENDINGS and _is_client(path)]
    if not paths:
        there = ", ".join(path.name for path in files[:3]) + (" ..." if len(files) > 3 else "")
        raise ConfigurationError(
            f"no published checkpoint below {root}: neither {RELEASED_CLIENT} nor another *.tar or *.pth"
            + (f"; it holds {there}" if files else "")
        )
    count = Counter(_own_name(path) for path in paths)
    tables = {parent: read_table(parent) for parent in {path.parent for path in paths}}
    names = {path: _own_name(path) if count[_own_name(path)] == 1 else _name_below(path, root) for path in paths}
    return sorted((_describe(path, names[path], tables[path.parent]) for path in paths), key=lambda c: c.name)


def _is_client(path: Path) -> bool:
    """Whether `path` is a final client, not a server (``checkpoint_s_best.tar``) or an earlier client.

    An earlier client is called, for example, ``checkpoint_c_9.tar``.
    """
    return path.name == RELEASED_CLIENT or not path.name.startswith("checkpoint_")


def _own_name(path: Path) -> str:
    return path.parent.resolve().name if path.name == RELEASED_CLIENT else path.stem


def _name_below(path: Path, root: Path) -> str:
    """A unique name for a checkpoint whose own name is not unique: its path, from the name of `root` on."""
    place = root.resolve().name / path.relative_to(root)
    return (place.parent if path.name == RELEASED_CLIENT else place).as_posix()


def _describe(path: Path, name: str, table: Mapping[str, LoggedValues]) -> PublishedCheckpoint:
    said = _parts(_own_name(path))
    named_cut = said["cut_layer"]
    bottleneck = "none" if said["bottleneck"] == "None" else said["bottleneck"]
    client = load_published_client(path, int(named_cut) if named_cut is not None else None)
    if bottleneck is not None:
        _require_bottleneck(client, bottleneck, path)
    if path.name == RELEASED_CLIENT:
        logged, notes = read_logs(path.parent)
    else:
        found = find_in_table(table, path.name)
        logged = found or LoggedValues()
        notes = [] if found is not None else ["there are no logged values for this file"]
    return PublishedCheckpoint(
        name=name,
        path=path,
        cut_layer=sum(unit.isdecimal() for unit, _ in client.named_children()),
        bottleneck=bottleneck,
        alpha=_float(said["alpha"]),
        ssim_threshold=_float(said["ssim_threshold"]),
        target_fraction=_float(said["target_fraction"]),
        source=said["source"],
        logged=logged,
        notes=tuple(notes),
    )


def _require_bottleneck(client: nn.Module, named: str, path: Path) -> None:
    """Raise ConfigurationError unless the weights have the bottleneck `named`.

    Channels and kernel are compared. Stride and ReLU cannot be inferred from weights, so only the published ones are
    accepted.
    """
    try:
        wanted = parse_bottleneck(named)
    except ValueError as error:
        raise ConfigurationError(f"{path}: {error}") from error
    if wanted is not None and (wanted.stride != STRIDE or not wanted.relu):
        raise ConfigurationError(
            f"{path}: bottleneck {named} cannot be rebuilt; only stride {STRIDE} with ReLU is supported"
        )
    cut = dict(client.named_children()).get("cut")
    found = tuple(cut.weight.shape[::3]) if isinstance(cut, nn.Conv2d) else None
    if found != ((wanted.channels, wanted.kernel) if wanted is not None else None):
        have = f"K{found[1]}C{found[0]}" if found is not None else "no bottleneck"
        raise ConfigurationError(f"{path}: the name says bottleneck {named}, but the weights have {have}")


def _parts(name: str) -> dict[str, str | None]:
    """Parse a checkpoint's name in either layout; its parts are separated by underscores. None for a missing part."""
    found = {part: re.search(rf"(?:^|_){pattern}(?=_|$)", name) for part, pattern in PARTS.items()}
    return {part: match[1] if match is not None else None for part, match in found.items()}


def _float(text: str | None) -> float | None:
    return float(text) if text is not None else None


def load_attack_images(folder: Path | str) -> Tensor | None:
    """Load the 128 images on which the logged attacks were scored: float (128, 3, 32, 32) in [0, 1]; None if missing.

    They are augmented CIFAR-10 training images. They are looked for below `folder`, and in the folder ``saved_tensors``
    of the two folders above it, where the release keeps them.

    The images were saved normalised with CIFAR-10's own standard deviation (0.247, 0.243, 0.261). But the release's
    clients normalise with `CIFAR_STD`, and its attack un-normalises the images with `CIFAR_STD` before comparing
    reconstructions with them. This function does the same, since the logged values were measured that way; after the
    client's normalisation, the images are exactly the saved ones. As a result, their contrast is only 0.82, 0.82 and
    0.77 (by channel) of CIFAR-10's. A blind guess is therefore better on them than on real images, and results on them
    do not hold for other images. Unlike the release, this package does not convert images to JPEG before comparing.

    Raises ConfigurationError for a file with other content.
    """
    root = Path(folder)
    places = [path for name in ATTACK_IMAGES for path in sorted(root.rglob(name))]
    places += [above / ATTACK_IMAGES[1] for above in root.resolve().parents[:2] if (above / ATTACK_IMAGES[1]).is_file()]
    if not places:
        return None
    stored = read_weights_only(places[0])
    if not isinstance(stored, Tensor) or tuple(stored.shape) != ATTACK_IMAGES_SHAPE or not stored.is_floating_point():
        what = tuple(stored.shape) if isinstance(stored, Tensor) else type(stored).__name__
        raise ConfigurationError(f"{places[0]}: not the release's attack images of shape {ATTACK_IMAGES_SHAPE}: {what}")
    if not bool(stored.isfinite().all()):
        raise ConfigurationError(f"{places[0]}: the attack images have values that are not finite")
    mean, deviation = (torch.tensor(values).view(3, 1, 1) for values in (CIFAR_MEAN, CIFAR_STD))
    return (stored.float() * deviation + mean).clamp(0, 1)
