"""The report as a PDF with the texts, tables, charts and pictures of the HTML page."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import NamedTuple

from matplotlib.backends.backend_pdf import PdfPages
from matplotlib.figure import Figure

from reports.drawing.chart import Chart
from reports.drawing.pictures import ImagePair, side_by_side

PAGE = (11.7, 8.3)  # A4, landscape, in inches
LEFT, TOP, BOTTOM = 0.05, 0.94, 0.05  # margins, as shares of the page
POINT = 1 / 72 / PAGE[1]  # a typographic point, as a share of the page's height
LEADING = 1.45  # distance from line to line, as a multiple of the font size
WIDTH, TABLE_WIDTH, CELL_WIDTH = 135, 150, 34  # characters
WORDS, NUMBERS = ("sans-serif", 9.5), ("monospace", 8.0)  # fonts of paragraphs and of tables, in points
CAPTION = 3 * LEADING * 8 * POINT
SYSTEMS_PER_PAGE = 6


class Lines(NamedTuple):
    """A table for readers. names: number of leading columns that identify a row."""

    headings: Sequence[str]
    lines: Sequence[Sequence[str]]
    names: int = 1


@dataclass(frozen=True)
class Block:
    """Lines that stay on one page. font: family and size in points. heading: whether text must follow on its page."""

    lines: Sequence[str]
    font: tuple[str, float] = WORDS
    bold: bool = False
    heading: bool = False

    @property
    def height(self) -> float:
        """Height as a share of the page's height."""
        return len(self.lines) * LEADING * self.font[1] * POINT


def write_pdf(
    path: Path,
    title: str,
    chapters: Mapping[str, Sequence[str]],
    tables: Mapping[str, Lines],
    charts: Sequence[Chart],
    sights: Mapping[str, Sequence[ImagePair]],
) -> None:
    """Write the report to `path` as a PDF.

    Args:
        path: The file to write.
        title: Title of the document.
        chapters: Paragraphs by heading; a chapter without paragraphs is left out.
        tables: Tables by title.
        charts: Charts, one per page.
        sights: Pictures of victims and reconstructions by system.

    """
    with PdfPages(path, metadata={"Title": title, "CreationDate": None}) as pages:
        _write_blocks(pages, list(_words(title, chapters)))
        _write_blocks(pages, [block for heading, table in tables.items() for block in _table(heading, table)])
        for chart in charts:
            pages.savefig(chart.figure)
        _write_sights(pages, sights)


def _words(title: str, chapters: Mapping[str, Sequence[str]]) -> Iterator[Block]:
    yield Block([title, ""], (WORDS[0], 14), bold=True, heading=True)
    for heading, paragraphs in chapters.items():
        if not paragraphs:
            continue
        yield Block([heading], bold=True, heading=True)
        for paragraph in paragraphs:
            first, *rest = textwrap.wrap(paragraph, WIDTH) or [""]
            yield Block([f"•  {first}", *(f"    {line}" for line in rest)])
        yield Block([""])


def _table(title: str, table: Lines) -> Iterator[Block]:
    """Lay out a table in a fixed-width font.

    Long cells are wrapped. Columns that do not fit the page's width follow below as a further part of the table.
    """
    headings, lines, names = table
    folded = [[textwrap.wrap(cell, CELL_WIDTH) or [""] for cell in line] for line in lines]
    # a column is as wide as its cells and the longest word of its heading, which is wrapped
    widths = [
        max([_word(headings[i]), *(len(part) for line in folded for part in line[i])]) for i in range(len(headings))
    ]
    for columns in _parts(widths, names):
        yield Block([title], bold=True, heading=True)
        named = [textwrap.wrap(headings[i], widths[i]) for i in columns]
        yield Block(_columns(named, [widths[i] for i in columns]), NUMBERS, bold=True, heading=True)
        for line in folded:
            yield Block(_columns([line[i] for i in columns], [widths[i] for i in columns]), NUMBERS)
        yield Block([""], NUMBERS)


def _word(text: str) -> int:
    """The length of the longest word of `text`."""
    return max(len(word) for word in text.split())


def _columns(cells: Sequence[Sequence[str]], widths: Sequence[int]) -> list[str]:
    """Join wrapped cells side by side into lines of text."""
    tall = max(len(cell) for cell in cells)
    padded = [[*cell, *[""] * (tall - len(cell))] for cell in cells]
    return ["  ".join(cell[i].ljust(width) for cell, width in zip(padded, widths, strict=True)) for i in range(tall)]


def _parts(widths: Sequence[int], names: int) -> list[list[int]]:
    """Split columns into parts that fit the page's width; the first `names` columns are repeated in every part."""
    parts = [list(range(names))]
    for column in range(names, len(widths)):
        if sum(widths[i] + 2 for i in parts[-1]) + widths[column] > TABLE_WIDTH and len(parts[-1]) > names:
            parts.append(list(range(names)))
        parts[-1].append(column)
    return parts


def _write_blocks(pages: PdfPages, blocks: Sequence[Block]) -> None:
    for page in paginate(blocks):
        figure = Figure(figsize=PAGE)
        height = TOP
        for (family, size), bold, lines in _runs(page):
            figure.text(
                LEFT, height, "\n".join(lines), size=size, family=family, verticalalignment="top",
                linespacing=LEADING, weight="bold" if bold else "normal", parse_math=False,
            )  # fmt: skip
            height -= len(lines) * LEADING * size * POINT
        pages.savefig(figure)


def _runs(page: Sequence[Block]) -> Iterator[tuple[tuple[str, float], bool, list[str]]]:
    """Group consecutive lines of equal font: one text is drawn faster than its lines one by one."""
    for (font, bold), blocks in groupby(page, key=lambda block: (block.font, block.bold)):
        yield font, bold, [line for block in blocks for line in block.lines]


def paginate(blocks: Sequence[Block]) -> list[list[Block]]:
    """Distribute blocks over pages.

    A heading is on the same page as the block that follows it. The headings of a table are repeated on each of its
    pages.
    """
    pages: list[list[Block]] = [[]]
    left = room = TOP - BOTTOM
    for place, block in enumerate(blocks):
        kept = block.height + _following(blocks, place)
        if kept > left and pages[-1]:
            again = _headings_of(blocks, place)
            pages.append(list(again))
            left = room - sum(heading.height for heading in again)
        pages[-1].append(block)
        left -= block.height
    return pages


def _following(blocks: Sequence[Block], place: int) -> float:
    """The height of what must stay with the block at `place`: if that is a heading, all up to the next other block."""
    height = 0.0
    while blocks[place].heading and place + 1 < len(blocks):
        place += 1
        height += blocks[place].height
    return height


def _headings_of(blocks: Sequence[Block], place: int) -> Sequence[Block]:
    """The headings of the table that the block at `place` is a row of; none if it is not a row of a table."""
    if blocks[place].heading or blocks[place].font != NUMBERS or not any(blocks[place].lines):
        return []
    start = max(i for i in range(place) if blocks[i].heading)
    return blocks[start - 1 : start + 1]


def _write_sights(pages: PdfPages, sights: Mapping[str, Sequence[ImagePair]]) -> None:
    systems = [(system, pictures) for system, pictures in sights.items() if pictures]
    for start in range(0, len(systems), SYSTEMS_PER_PAGE):
        figure = Figure(figsize=PAGE)
        for place, (system, pictures) in enumerate(systems[start : start + SYSTEMS_PER_PAGE]):
            _place_sights(figure, system, pictures, TOP - place * (TOP - BOTTOM) / SYSTEMS_PER_PAGE)
        pages.savefig(figure)


def _place_sights(figure: Figure, system: str, pictures: Sequence[ImagePair], top: float) -> None:
    """Draw a row of pictures below the system's name, with their numbers beneath."""
    figure.text(LEFT, top, system, size=9, weight="bold", va="top", parse_math=False)
    row = side_by_side([sight.picture for sight in pictures])
    tall, wide, _ = row.shape
    line = LEADING * 9 * POINT
    height = (TOP - BOTTOM) / SYSTEMS_PER_PAGE - line - CAPTION
    width = height * PAGE[1] / PAGE[0] * wide / tall
    axis = figure.add_axes((LEFT, top - line - height, width, height))
    axis.imshow(row, interpolation="nearest", aspect="auto")
    axis.set_axis_off()
    for place, sight in enumerate(pictures):
        figure.text(
            LEFT + place * width / len(pictures), top - line - height - 0.004,
            f"R {sight.leak_ratio:.2f}\nSSIM {sight.ssim:.2f}", size=7, va="top",
        )  # fmt: skip
