"""The YAML document of a sweep: an experiment, plus axes along which any of its settings vary.

```yaml
name: two-worlds
defenses: [none, bottleneck]          # and, as in any experiment: cut_layers, target_fractions, attacks, seeds, ...
axes:
  data:                               # the name of an axis becomes a column of the results
    photos: {data.dataset: photos}    # label: {KEY.PATH: VALUE}, as for --set
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
# Keys of `compute` that must be equal for all variants, because one process works on several variants.
SAME_FOR_ALL = ("device", "threads")


@dataclass(frozen=True)
class Variant:
    """One experiment of a sweep.

    labels: its label on every axis, by axis; empty without axes.
    """

    name: str
    labels: dict[str, str]
    config: ExperimentConfig


@dataclass(frozen=True)
class SweepDocument:
    """A validated sweep: one experiment (variant) for every combination of labels of its axes."""

    name: str
    variants: tuple[Variant, ...]

    @property
    def compute(self) -> ComputeConfig:
        """The compute settings for an engine: device and threads per task are the same for all variants."""
        return self.variants[0].config.compute


def load_sweep(
    path: Path | str,
    overrides: Sequence[str] | Mapping[str, Any] = (),
    defenses: Sequence[str] = (),
    attacks: Sequence[str] = (),
    scale: str | None = None,
) -> SweepDocument:
    """Read a sweep from YAML; a plain experiment is a sweep without axes.

    If the document does not set ``compute.threads``, it is 1: parallel processes are faster than threads, and results
    do not depend on the number of processes.

    Args:
        path: The YAML file.
        overrides: Settings for all variants, as for an experiment. An axis that sets the same key takes precedence.
        defenses: Names to add to the defenses of all variants.
        attacks: Names to add to the attacks of all variants.
        scale: Name of a reduced scale (``tiny``), or None.

    Raises:
        ConfigurationError: The document is invalid.

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
        if parsed.audit_models is not None:
            raise ConfigurationError(
                f"{path}: audit_models: an audit of published clients cannot be swept; use `mocosfl-priv run`"
            )
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
                "share the same processes, so it must be the same for all: run separate sweeps"
            )


def _axes(raw: object, where: str) -> dict[str, dict[str, dict[str, Any]]]:
    """Check `axes` of the document, and return it as axis -> label -> settings."""
    if raw is None:
        return {}
    if not isinstance(raw, dict):
        raise ConfigurationError(f"{where}: {AXES}: expected a mapping of axes, not a {type(raw).__name__}")
    for axis, points in raw.items():
        place = f"{where}: {AXES}.{axis}"
        if not isinstance(axis, str) or not WORD.fullmatch(axis) or axis in COLUMNS:
            raise ConfigurationError(
                f"{place}: the name of an axis uses letters, digits, '_', '.' and '-', and differs from all columns of "
                "the results"
            )
        if not isinstance(points, dict) or not points:
            raise ConfigurationError(f"{place}: expected a mapping of labels to settings")
        for label, settings in points.items():
            if not isinstance(label, str) or not WORD.fullmatch(label):
                raise ConfigurationError(f"{place}: invalid label {label!r}: use letters, digits, '_', '.' and '-'")
            if not isinstance(settings, dict | None):
                raise ConfigurationError(
                    f"{place}.{label}: expected a mapping of keys to values, such as data.dataset: photos"
                )
    return {axis: {label: dict(settings or {}) for label, settings in points.items()} for axis, points in raw.items()}
