"""A chart as files and as part of a page: PNG, SVG, and places that say their numbers when pointed at."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from matplotlib.axes import Axes
from matplotlib.figure import Figure

DPI = 110


@dataclass(frozen=True)
class Spot:
    """A place of a chart in percent of its width and height from the top left, and what it says."""

    left: float
    top: float
    text: str


@dataclass(frozen=True)
class Mark:
    """A point in the coordinates of an axis, and what it says."""

    axis: Axes
    x: float
    y: float
    text: str


@dataclass(frozen=True)
class Chart:
    """A figure with its alternative text, the caption under it, and the marks that say something when pointed at."""

    figure: Figure
    title: str
    caption: str = ""
    marks: Sequence[Mark] = field(default_factory=tuple)

    def png(self) -> bytes:
        """As a PNG file."""
        return self._saved("png")

    def svg(self) -> bytes:
        """As an SVG file, texts as texts."""
        return self._saved("svg")

    def _saved(self, form: str) -> bytes:
        buffer = io.BytesIO()
        # the date and random identifiers would make every file another
        self.figure.savefig(buffer, format=form, dpi=DPI, metadata={"Date": None} if form == "svg" else None)
        self.figure.set_layout_engine("none")  # found by now; finding it again takes longer than drawing
        return buffer.getvalue()

    def spots(self) -> list[Spot]:
        """Where the marks are on the picture; after it was drawn."""
        width, height = self.figure.bbox.width, self.figure.bbox.height
        spots = []
        for mark in self.marks:
            x, y = mark.axis.transData.transform((mark.x, mark.y))
            if mark.axis.bbox.contains(x, y):
                spots.append(Spot(100 * x / width, 100 * (1 - y / height), mark.text))
        return spots


def titled(chart: Chart, name: str) -> Chart:
    """The same with a name above it, for a chart that stands among others like it."""
    chart.figure.suptitle(name, x=0.005, horizontalalignment="left", size="medium", weight="bold")
    return replace(chart, title=f"{name}: {chart.title}")
