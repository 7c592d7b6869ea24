"""A plugin that was created from a configuration, and where its code came from."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

PluginT = TypeVar("PluginT")


@dataclass(frozen=True)
class Loaded(Generic[PluginT]):
    """A created plugin, its label in reports, and where its code, that of its parts included, came from."""

    label: str
    plugin: PluginT
    origin: str
    code_sha256: str
    parameters: dict[str, Any] = field(default_factory=dict)
