"""Pages made from templates: what all of them share in looks, filters and pictures."""

from __future__ import annotations

import base64
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path

from jinja2 import Environment, FunctionLoader, StrictUndefined

from reports.analysis.findings_text import compact, tenths
from reports.drawing.chart import Chart, Spot


def render(template: str, **context: object) -> str:
    """The page that `template`, a path below ``reports/``, makes of `context`; everything from outside is escaped."""
    environment = Environment(
        autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True, loader=FunctionLoader(_source)
    )
    environment.filters["percent"] = tenths
    environment.filters["compact"] = compact
    return environment.get_template(template).render(**context)


def data_uri(png: bytes) -> str:
    """A picture as an address that needs nothing from outside the page."""
    return "data:image/png;base64," + base64.b64encode(png).decode("ascii")


@dataclass(frozen=True)
class PlacedChart:
    """A chart as a template wants it."""

    title: str
    caption: str
    uri: str
    spots: list[Spot]


def save_charts(charts: Mapping[str, Chart], folder: Path, *, vectors: bool = True) -> dict[str, PlacedChart]:
    """Write each chart as PNG, and with `vectors` as SVG, into the new or existing `folder`.

    Returns them for the page.
    """
    folder.mkdir(exist_ok=True)
    placed = {}
    for stem, chart in charts.items():
        png = chart.png()
        (folder / f"{stem}.png").write_bytes(png)
        if vectors:
            (folder / f"{stem}.svg").write_bytes(chart.svg())
        placed[stem] = PlacedChart(chart.title, chart.caption, data_uri(png), chart.spots())
    return placed


def save_pictures(pictures: Mapping[str, bytes], folder: Path) -> None:
    """Write each PNG into the new or existing `folder`, under a file name made from its own."""
    folder.mkdir(exist_ok=True)
    for name, png in pictures.items():
        (folder / f"{file_name(name)}.png").write_bytes(png)


def file_name(name: str) -> str:
    """A name that every file system takes."""
    return "".join(c if c.isalnum() else "_" for c in name)


def _source(template: str) -> str:
    return files("reports").joinpath(template).read_text(encoding="utf-8")
