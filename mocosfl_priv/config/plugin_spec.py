"""How a document names an attack or a defense, and the labels that results call them by."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

COMPOSITION = "composition"  # the defense that a list of defenses stands for


class PluginSpec(BaseModel):
    """An attack or a defense, by name or reference, with its parameters beside it."""

    model_config = ConfigDict(extra="allow", frozen=True)

    name: Annotated[str, Field(min_length=1)]
    label: str | None = None

    @property
    def parameters(self) -> dict[str, Any]:
        """What goes to the plugin's constructor."""
        return dict(self.model_extra or {})

    @property
    def short_name(self) -> str:
        """The name without a file or module in front of it; of a file alone, its own without folder and ending."""
        name = self.name.rsplit(":", 1)[-1]
        return Path(name).stem if name.endswith(".py") else name


def _plugin_from_text(value: object) -> object:
    """A bare name, or a list of defenses that work together (in short ``one+other``), called by their names."""
    if isinstance(value, str):
        if "+" not in value or any(sign in value for sign in (":", "/", ".py")):  # a path may have a plus sign
            return {"name": value}
        value = value.split("+")
    if isinstance(value, list | tuple):
        names = [part.get("name", "?") if isinstance(part, Mapping) else str(part) for part in value]
        label = "+".join(PluginSpec(name=name).short_name for name in names)
        return {"name": COMPOSITION, "label": label, "parts": value}
    return value


PluginEntry = Annotated[PluginSpec, BeforeValidator(_plugin_from_text)]


def with_labels(specs: Sequence[PluginSpec], where: str) -> tuple[PluginSpec, ...]:
    """Give every entry the label it is reported under: its name, with parameters where names repeat."""
    names = [spec.short_name for spec in specs]
    labelled = []
    for spec in specs:
        label = spec.label
        if label is None:
            label = spec.short_name
            if names.count(label) > 1 and spec.parameters:
                label += "(" + ", ".join(f"{k}={v}" for k, v in sorted(spec.parameters.items())) + ")"
        labelled.append(spec.model_copy(update={"label": label}))
    labels = [spec.label for spec in labelled]
    for label in labels:
        if labels.count(label) > 1:
            raise ValueError(f"{where}: two entries are called {label!r}; give one of them a label")
    return tuple(labelled)
