"""The report as a PDF of pages: words, tables, charts and pictures, the same as on the HTML page."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path

from matplotlib.backends.backend_pdf import PdfPages
from matplotlib.figure import Figure

from reports.chart import Chart
from reports.pictures import Sight, side_by_side

PAGE = (11.7, 8.3)  # A4, landscape, in inches
LINE, LEFT, TOP, BOTTOM = 0.024, 0.05, 0.94, 0.05  # shares of the page
WIDTH, TABLE_WIDTH = 135, 170  # characters
SYSTEMS_PER_PAGE = 6


def write_pdf(
    path: Path,
    title: str,
    sections: Mapping[str, Sequence[str]],
    tables: Mapping[str, tuple[Sequence[str], Sequence[Sequence[str]]]],
    charts: Mapping[str, Chart],
    sights: Mapping[str, Sequence[Sight]],
) -> None:
    """Write the document to `path`.

    sections: paragraphs by heading. tables: headings and lines by title. sights: pictures by system.
    """
    with PdfPages(path, metadata={"Title": title, "CreationDate": None}) as pages:
        _write_words(pages, title, sections)
        for heading, (columns, lines) in tables.items():
            _write_table(pages, heading, columns, lines)
        for chart in charts.values():
            pages.savefig(chart.figure)
        _write_sights(pages, sights)


def _write_words(pages: PdfPages, title: str, sections: Mapping[str, Sequence[str]]) -> None:
    lines = [("bold", title), ("", "")]
    for heading, paragraphs in sections.items():
        lines += [("bold", heading)]
        for paragraph in paragraphs:
            first, *rest = textwrap.wrap(paragraph, WIDTH) or [""]
            lines += [("", f"•  {first}"), *(("", f"    {line}") for line in rest)]
        lines += [("", "")]
    _write_lines(pages, lines, size=9.5, family="sans-serif")


def _write_table(pages: PdfPages, title: str, columns: Sequence[str], lines: Sequence[Sequence[str]]) -> None:
    """In a fixed-width font; what is too wide for a page is cut at its columns and goes on below."""
    widths = [max(len(line[i]) for line in (columns, *lines)) for i in range(len(columns))]
    for part in _parts(widths):
        heading = "  ".join(columns[i].ljust(widths[i]) for i in part)
        rows = ["  ".join(line[i].ljust(widths[i]) for i in part) for line in lines]
        _write_lines(pages, [("bold", title), ("bold", heading), *(("", row) for row in rows)], 6.5, "monospace")


def _parts(widths: Sequence[int]) -> list[list[int]]:
    """Columns that fit side by side; the first one, which names the line, stands in every part."""
    parts = [[0]]
    for column in range(1, len(widths)):
        if sum(widths[i] + 2 for i in parts[-1]) + widths[column] > TABLE_WIDTH and len(parts[-1]) > 1:
            parts.append([0])
        parts[-1].append(column)
    return parts


def _write_lines(pages: PdfPages, lines: Sequence[tuple[str, str]], size: float, family: str) -> None:
    per_page = int((TOP - BOTTOM) / LINE)
    for start in range(0, len(lines), per_page):
        figure = Figure(figsize=PAGE)
        for place, (weight, text) in enumerate(lines[start : start + per_page]):
            figure.text(
                LEFT, TOP - place * LINE, text, size=size, family=family, weight=weight or "normal", parse_math=False
            )
        pages.savefig(figure)


def _write_sights(pages: PdfPages, sights: Mapping[str, Sequence[Sight]]) -> None:
    systems = [(system, pictures) for system, pictures in sights.items() if pictures]
    for start in range(0, len(systems), SYSTEMS_PER_PAGE):
        figure = Figure(figsize=PAGE)
        for place, (system, pictures) in enumerate(systems[start : start + SYSTEMS_PER_PAGE]):
            _place_sights(figure, system, pictures, TOP - place * (TOP - BOTTOM) / SYSTEMS_PER_PAGE)
        pages.savefig(figure)


def _place_sights(figure: Figure, system: str, pictures: Sequence[Sight], top: float) -> None:
    """A row of pictures under the system's name, and their numbers beneath."""
    figure.text(LEFT, top, system, size=8, weight="bold", va="top", parse_math=False)
    row = side_by_side([sight.picture for sight in pictures])
    tall, wide, _ = row.shape
    height = (TOP - BOTTOM) / SYSTEMS_PER_PAGE - 3 * LINE
    width = height * PAGE[1] / PAGE[0] * wide / tall
    axis = figure.add_axes((LEFT, top - LINE - height, width, height))
    axis.imshow(row, interpolation="nearest", aspect="auto")
    axis.set_axis_off()
    for place, sight in enumerate(pictures):
        figure.text(
            LEFT + place * width / len(pictures), top - LINE - height - 0.004,
            f"R {sight.leak_ratio:.2f}\nSSIM {sight.ssim:.2f}", size=5.5, va="top",
        )  # fmt: skip
