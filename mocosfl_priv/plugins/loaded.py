"""A plugin that was created from a configuration, and where its code came from."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

PluginT = TypeVar("PluginT")


@dataclass(frozen=True)
class Loaded(Generic[PluginT]):
    """A plugin that was created from a configuration.

    Args:
        label: its name in reports.
        plugin: the attack or the defense.
        origin: ``module:Class``, joined by ``+`` for a defense of several parts.
        code_sha256: of its code, with that of its parts and of the files beside it that it imports.
        parameters: as they were configured.

    >>> Loaded("mine", plugin=object(), origin="mine:Mine", code_sha256="").label
    'mine'
    """

    label: str
    plugin: PluginT
    origin: str
    code_sha256: str
    parameters: dict[str, Any] = field(default_factory=dict)
