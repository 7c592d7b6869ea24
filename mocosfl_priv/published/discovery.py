"""The checkpoints of the public MocoSFL release in a folder, and the images its attacks were scored on.

Two layouts are known, at any depth. The release's own is a folder per training, with ``checkpoint_c_best.tar`` and logs
in it, named like ``mocosflV2_ResNet18_cifar10_cut2_bnlC4S2_..._ressfl_2.0_SSIM0.6_data_proportion_0.01_aux_cifar100``.
The other is a file per checkpoint, perhaps beside a README that tells what was logged, named like
``resnet18_cifar10_C4S2_cut2_alpha2.0_ssim0.6_target0.01_cifar100.tar``.
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
from mocosfl_priv.published.loader import CIFAR_MEAN, CIFAR_STD, STRIDE, load_published_client, read_weights_only
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
    """A published client that can be loaded, what its name says of its training, and what was logged of it.

    `name` is unique among the checkpoints of a folder. `cut_layer` is read from the weights. `bottleneck` (``C4S2``,
    ``none``), `alpha` and `ssim_threshold` (of TAResSFL's expert), `target_fraction` in [0, 1] and `source` (the data
    set that the expert used besides) are None where the name does not say. `notes` tell what a reader should know about
    the logs.
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
    """Every checkpoint below `folder`, by name.

    Raises ConfigurationError when there is no such folder, no checkpoint in it, or one that cannot be loaded or is not
    what its name says.
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
    """Neither the server's half (``checkpoint_s_best.tar``) nor a client that was not kept (``checkpoint_c_9.tar``)."""
    return path.name == RELEASED_CLIENT or not path.name.startswith("checkpoint_")


def _own_name(path: Path) -> str:
    return path.parent.resolve().name if path.name == RELEASED_CLIENT else path.stem


def _name_below(path: Path, root: Path) -> str:
    """A name for one of several that are called alike: its place, which only one can have."""
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
        notes = [] if found is not None else ["nothing beside this file tells what was logged"]
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
    """Weights tell a bottleneck's channels and kernel, but not its stride and its ReLU: those are as published."""
    try:
        wanted = parse_bottleneck(named)
    except ValueError as error:
        raise ConfigurationError(f"{path}: {error}") from error
    if wanted is not None and (wanted.stride != STRIDE or not wanted.relu):
        raise ConfigurationError(f"{path}: bottleneck {named} cannot be rebuilt: only stride {STRIDE} with ReLU can")
    cut = dict(client.named_children()).get("cut")
    found = tuple(cut.weight.shape[::3]) if isinstance(cut, nn.Conv2d) else None
    if found != ((wanted.channels, wanted.kernel) if wanted is not None else None):
        have = f"K{found[1]}C{found[0]}" if found is not None else "no bottleneck"
        raise ConfigurationError(f"{path}: named after bottleneck {named}, but its weights hold {have}")


def _parts(name: str) -> dict[str, str | None]:
    """What a checkpoint's name says: parts between underscores, each as written in either layout."""
    found = {part: re.search(rf"(?:^|_){pattern}(?=_|$)", name) for part, pattern in PARTS.items()}
    return {part: match[1] if match is not None else None for part, match in found.items()}


def _float(text: str | None) -> float | None:
    return float(text) if text is not None else None


def load_attack_images(folder: Path | str) -> Tensor | None:
    """The 128 images that the logged attacks were scored on, float (128, 3, 32, 32) in [0, 1]; None if there are none.

    They are augmented CIFAR-10 training images, looked for below `folder` and, since the release keeps them in
    ``saved_tensors`` beside the folder of its experts, in that of the two folders above.

    Their contrast is four fifths of CIFAR's (0.82, 0.82, 0.77 by channel). They were saved normalised with CIFAR-10's
    own deviation (0.247, 0.243, 0.261), but the release's clients normalise with `CIFAR_STD`, and its attack
    un-normalises with `CIFAR_STD` what it compares reconstructions with. So do we, since the logged values were
    measured that way; the client's own normalisation then gives back exactly the saved numbers. A blind guess is
    better on such pale images than on real ones, and what is found on them does not hold for others. The release
    compared after a detour through JPEG files; we do not.

    Raises ConfigurationError for a file that holds something else.
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
        raise ConfigurationError(f"{places[0]}: attack images that are not finite")
    mean, deviation = (torch.tensor(values).view(3, 1, 1) for values in (CIFAR_MEAN, CIFAR_STD))
    return (stored.float() * deviation + mean).clamp(0, 1)
