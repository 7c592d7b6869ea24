"""A chart as PNG, as SVG, and on a page, where its marks show their numbers as tooltips."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from matplotlib.axes import Axes
from matplotlib.figure import Figure

DPI = 110


@dataclass(frozen=True)
class Spot:
    """A tooltip on a drawn chart: its place in percent of width and height from the top left, and its text."""

    left: float
    top: float
    text: str


@dataclass(frozen=True)
class Mark:
    """A tooltip in the data coordinates of an axis, and its text."""

    axis: Axes
    x: float
    y: float
    text: str


@dataclass(frozen=True)
class Chart:
    """A figure with its title (the alternative text of the image), its caption, and the marks that have tooltips."""

    figure: Figure
    title: str
    caption: str = ""
    marks: Sequence[Mark] = field(default_factory=tuple)

    def png(self) -> bytes:
        """Return the content of a PNG file."""
        return self._saved("png")

    def svg(self) -> bytes:
        """Return the content of an SVG file, in which text stays text."""
        return self._saved("svg")

    def _saved(self, form: str) -> bytes:
        buffer = io.BytesIO()
        # without a date, equal charts give equal files
        self.figure.savefig(buffer, format=form, dpi=DPI, metadata={"Date": None} if form == "svg" else None)
        self.figure.set_layout_engine(
            "none"
        )  # the layout is computed by now; computing it again is slower than drawing
        return buffer.getvalue()

    def spots(self) -> list[Spot]:
        """Return the places of the marks on the picture. The chart must have been drawn before."""
        width, height = self.figure.bbox.width, self.figure.bbox.height
        spots = []
        for mark in self.marks:
            x, y = mark.axis.transData.transform((mark.x, mark.y))
            if mark.axis.bbox.contains(x, y):
                spots.append(Spot(100 * x / width, 100 * (1 - y / height), mark.text))
        return spots


def titled(chart: Chart, name: str) -> Chart:
    """Return `chart` with `name` above it, to tell it from similar charts on the same page."""
    chart.figure.suptitle(name, x=0.005, horizontalalignment="left", size="medium", weight="bold")
    return replace(chart, title=f"{name}: {chart.title}")
