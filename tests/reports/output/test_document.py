"""Pages of the PDF: nothing lost, nothing overfull, no heading alone."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from reports.output.document import BOTTOM, NUMBERS, TABLE_WIDTH, TOP, Block, Lines, paginate
from reports.output.document import _table as table

WORDS = st.builds(lambda n: Block([f"line {i}" for i in range(n)]), st.integers(1, 6))
HEADING = st.just(Block(["heading"], bold=True, heading=True))
CELLS = st.lists(st.text("abc 0", min_size=1, max_size=50), min_size=3, max_size=3)
TABLES = st.lists(CELLS, min_size=1, max_size=60).map(
    lambda lines: list(table("t", Lines(["name", "a b", "c"], lines)))
)
BLOCKS = st.lists(st.one_of(WORDS.map(lambda b: [b]), HEADING.map(lambda b: [b]), TABLES), min_size=1, max_size=12).map(
    lambda parts: [block for part in parts for block in part]
)


@given(BLOCKS)
def test_pages_hold_every_line_in_order_and_end_with_no_heading(blocks: list[Block]) -> None:
    pages = paginate(blocks)
    kept = [id(block) for page in pages for block in page if not block.heading]
    assert kept == [id(block) for block in blocks if not block.heading]
    assert all(sum(block.height for block in page) <= TOP - BOTTOM + 1e-9 for page in pages)
    last = [page[-1] for page in pages[:-1]]
    assert not any(block.heading for block in last)


def test_a_table_that_goes_on_repeats_its_headings() -> None:
    blocks = list(table("Costs", Lines(["system", "bytes"], [[f"system {i}", str(i)] for i in range(100)])))
    pages = paginate(blocks)
    assert len(pages) > 2
    for page in pages:
        assert page[0].lines == ["Costs"] and page[1].lines == ["system     bytes"]


@pytest.mark.parametrize("columns", [3, 12, 30])
def test_a_wide_table_goes_on_below_with_the_names_of_its_lines(columns: int) -> None:
    headings = ["codec", "system", *(f"column {i}" for i in range(columns))]
    blocks = list(table("t", Lines(headings, [["fp16", "mine", *(f"value of {i}" for i in range(columns))]], 2)))
    lines = [block.lines[0] for block in blocks if block.font == NUMBERS and not block.heading and any(block.lines)]
    assert all(len(line) <= TABLE_WIDTH and line.split()[:2] == ["fp16", "mine"] for line in lines)
    assert all(any(f"value of {i}" in line for line in lines) for i in range(columns))
