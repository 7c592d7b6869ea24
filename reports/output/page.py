"""Render HTML pages from templates, and save charts and pictures for them."""

from __future__ import annotations

import base64
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from pathlib import Path

from jinja2 import Environment, FunctionLoader, StrictUndefined

from reports.analysis.findings_text import compact, tenths
from reports.drawing.chart import Chart, Spot


def render(template: str, **context: object) -> str:
    """Render `template`, a path below ``reports/``, with the variables `context`; their values are HTML-escaped."""
    return _environment().get_template(template).render(**context)


@cache
def _environment() -> Environment:
    """With the templates that were compiled, which takes longer than most pages."""
    environment = Environment(
        autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True, loader=FunctionLoader(_source)
    )
    environment.filters["percent"] = tenths
    environment.filters["compact"] = compact
    return environment


def data_uri(png: bytes) -> str:
    """Return a PNG as a data URI, which embeds it in a page."""
    return "data:image/png;base64," + base64.b64encode(png).decode("ascii")


@dataclass(frozen=True)
class PlacedChart:
    """A chart as templates use it, with the picture as a data URI."""

    title: str
    caption: str
    uri: str
    spots: list[Spot]


def save_charts(charts: Mapping[str, Chart], folder: Path, *, vectors: bool = True) -> dict[str, PlacedChart]:
    """Write each chart as PNG, and with `vectors` also as SVG, into `folder`, which is made if needed.

    Returns the charts for templates, by the file stems of `charts`.
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
    """Write each PNG into `folder`, which is made if needed, under a file name made from its name."""
    folder.mkdir(exist_ok=True)
    for name, png in pictures.items():
        (folder / f"{file_name(name)}.png").write_bytes(png)


def file_name(name: str) -> str:
    """Return `name` with all characters but letters and digits replaced by underscores, valid on any file system."""
    return "".join(c if c.isalnum() else "_" for c in name)


def _source(template: str) -> str:
    return files("reports").joinpath(template).read_text(encoding="utf-8")
