"""A sweep as a document: an experiment, which is a grid already, and axes along which anything else varies.

```yaml
name: two-worlds
defenses: [none, bottleneck]          # as in any experiment: cut_layers, target_fractions, attacks, seeds, ...
axes:
  data:                               # the name of an axis becomes a column
    photos: {data.dataset: photos}    # label: settings by their paths, as after --set
    digits: {data.dataset: digits}
  partition:
    iid: {}
    two-classes: {training.partition: classes_per_client, training.classes_per_client: 2}
```
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mocosfl_priv.config import (
    ComputeConfig,
    ExperimentConfig,
    parse_config,
    read_document,
    with_added_plugins,
    with_overrides,
)
from mocosfl_priv.config.scale import scaled
from mocosfl_priv.errors import ConfigurationError
from mocosfl_priv.results import COLUMNS, short_name, variant_name

AXES = "axes"
WORD = re.compile(r"[\w.-]+")
SAME_FOR_ALL = ("device", "threads")  # of `compute`: a process has them, and works on one variant after the other


@dataclass(frozen=True)
class Variant:
    """One experiment of a sweep.

    labels: where it stands on every axis, empty without axes.
    """

    name: str
    labels: dict[str, str]
    config: ExperimentConfig


@dataclass(frozen=True)
class SweepDocument:
    """A validated sweep: the product of its axes, as experiments."""

    name: str
    variants: tuple[Variant, ...]

    @property
    def compute(self) -> ComputeConfig:
        """What an engine needs to know of all variants: their device, and threads per task."""
        return self.variants[0].config.compute


def load_sweep(
    path: Path | str,
    overrides: Sequence[str] | Mapping[str, Any] = (),
    defenses: Sequence[str] = (),
    attacks: Sequence[str] = (),
    scale: str | None = None,
) -> SweepDocument:
    """Read a sweep from YAML; a plain experiment is a sweep without axes.

    overrides, defenses, attacks, scale: as for an experiment, for all its variants; an axis wins over an override.
    Torch gets one thread where the document does not say: processes side by side are faster than threads, and results
    then do not depend on their number. Raises ConfigurationError.
    """
    document = with_overrides(scaled(read_document(path), scale), overrides)
    axes = _axes(document.pop(AXES, None), str(path))
    compute = document.get("compute") or {}
    if isinstance(compute, dict):
        document["compute"] = {"threads": 1, **compute}
    variants = []
    for point in itertools.product(*(settings.items() for settings in axes.values())):
        labels = {axis: label for axis, (label, _) in zip(axes, point, strict=True)}
        name = variant_name(labels)
        config = document
        for axis, (label, settings) in zip(axes, point, strict=True):
            config = with_overrides(config, settings, f"{AXES}.{axis}.{label}")
        parsed = with_added_plugins(
            parse_config(config, where=f"{path}, {name}" if name else str(path)), defenses, attacks
        )
        if parsed.checkpoints is not None:
            raise ConfigurationError(f"{path}: checkpoints: an audit of published clients is run, not swept")
        variants.append(Variant(name or short_name(parsed.name), labels, parsed))
    for setting in SAME_FOR_ALL:
        _require_same(variants, setting, str(path))
    return SweepDocument(variants[0].config.name, tuple(variants))


def _require_same(variants: Sequence[Variant], setting: str, where: str) -> None:
    first = variants[0]
    for other in variants[1:]:
        found, expected = (getattr(variant.config.compute, setting) for variant in (other, first))
        if found != expected:
            raise ConfigurationError(
                f"{where}: compute.{setting} is {expected} for {first.name} and {found} for {other.name}; all variants "
                "share the same processes, so it must be the same for all: sweep them apart"
            )


def _axes(raw: object, where: str) -> dict[str, dict[str, dict[str, Any]]]:
    """Checked: axis to label to settings."""
    if raw is None:
        return {}
    if not isinstance(raw, dict):
        raise ConfigurationError(f"{where}: {AXES}: a mapping of axes is expected, not a {type(raw).__name__}")
    for axis, points in raw.items():
        place = f"{where}: {AXES}.{axis}"
        if not isinstance(axis, str) or not WORD.fullmatch(axis) or axis in COLUMNS:
            raise ConfigurationError(f"{place}: an axis is called by a word that is no column of the results")
        if not isinstance(points, dict) or not points:
            raise ConfigurationError(f"{place}: a mapping of labels to settings is expected")
        for label, settings in points.items():
            if not isinstance(label, str) or not WORD.fullmatch(label):
                raise ConfigurationError(f"{place}: {label!r} is no label: use letters, digits, '_', '.' and '-'")
            if not isinstance(settings, dict | None):
                raise ConfigurationError(
                    f"{place}.{label}: settings by their paths are expected, as in data.dataset: photos"
                )
    return {axis: {label: dict(settings or {}) for label, settings in points.items()} for axis, points in raw.items()}
