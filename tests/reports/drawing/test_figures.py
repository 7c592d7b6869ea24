from __future__ import annotations

import xml.etree.ElementTree as ET
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from matplotlib.text import Annotation

from mocosfl_priv.results import RunRecord
from reports.analysis.mosaics import Mosaic, mosaic_scale
from reports.analysis.per_image import image_leaks
from reports.analysis.summary import WORST_CASE, SummaryRow, headline_rows
from reports.drawing.figures import draw_all, leak_ladder, pareto_front, tradeoff
from reports.drawing.pictures import worst_pairs

POINTS = st.lists(st.tuples(st.integers(0, 5).map(float), st.integers(0, 5).map(float)), min_size=1, max_size=12)

SCALE = [Mosaic(2, 0.46), Mosaic(8, 0.84)]


@given(POINTS)
def test_the_front_holds_all_points_that_none_beats(points: list[tuple[float, float]]) -> None:
    def beaten(leak: float, accuracy: float) -> bool:
        return any(other != (leak, accuracy) and other[0] <= leak and other[1] >= accuracy for other in points)

    front = [points[index] for index in pareto_front(points)]
    assert front == sorted({point for point in points if not beaten(*point)})


def test_charts_are_kept_as_png_and_as_repeatable_svg(
    sweep: RunRecord, sweep_rows: list[SummaryRow], sweep_page: Path
) -> None:
    folder = sweep_page.parent / "figures"
    stems = {"tradeoff", "heat_maps", "leak_ladder", "training", "leakage"}
    assert {path.stem for path in folder.glob("*.svg")} == stems <= {path.stem for path in folder.glob("*.png")}
    assert ET.parse(folder / "tradeoff.svg").getroot().tag.endswith("svg")
    chart = tradeoff(headline_rows(sweep_rows), mosaic_scale(sweep))
    chart.png()
    assert chart.svg() == (folder / "tradeoff.svg").read_bytes()


def test_marks_lie_where_the_points_are(sweep_rows: list[SummaryRow]) -> None:
    rows = headline_rows(sweep_rows)
    chart = tradeoff(rows, [])
    chart.png()
    spots = chart.spots()
    assert len(spots) == 2 * len(rows) and all(0 < spot.left < 100 and 0 < spot.top < 100 for spot in spots)
    ordered = sorted((row for row in rows if row.cut_layer == 1), key=lambda row: row.leak_ratio.value)
    first_panel = spots[: len(ordered)]
    places = [next(s.left for s in first_panel if s.text.startswith(f"{row.system}, {row.attack}:")) for row in ordered]
    assert places == sorted(places)


def test_mosaics_are_marked_along_r_in_their_order(sweep_rows: list[SummaryRow]) -> None:
    drawn = {text: leak_ladder(sweep_rows, scale).svg().decode() for text, scale in (("with", SCALE), ("without", []))}
    assert "2×2" in drawn["with"] and "8×8" in drawn["with"] and "2×2" not in drawn["without"]
    axis = tradeoff(headline_rows(sweep_rows), SCALE).figure.axes[0]
    marks = {text.get_text(): text.xy[0] for text in axis.texts if isinstance(text, Annotation)}
    assert marks == {"2×2": 0.46, "8×8": 0.84}


def test_heat_maps_only_where_there_is_a_grid(sweep: RunRecord, sweep_rows: list[SummaryRow]) -> None:
    rows = sweep_rows
    assert "heat_maps" in draw_all(sweep, rows, [])
    single = [row for row in rows if row.cut_layer == 1 and row.target_fraction == 0]
    assert "heat_maps" not in draw_all(replace(sweep, leakage=sweep.leakage.iloc[:0]), single, [])


def test_sights_go_from_the_worst_leak_to_the_median(sweep: RunRecord, sweep_rows: list[SummaryRow]) -> None:
    row = next(row for row in headline_rows(sweep_rows) if row.defense == "taressfl")
    assert row.attack == WORST_CASE
    sights = worst_pairs(sweep, row)
    leaks = [sight.leak_ratio for sight in sights]
    mine = sweep.per_image.query(
        "defense == 'taressfl' and cut_layer == 1 and target_fraction == 0 and seed == 0 and attack != 'floor'"
    )
    best = mine.assign(leak=image_leaks(mine)).groupby("image")["leak"].max()
    assert leaks == sorted(leaks, reverse=True)
    assert leaks[0] == pytest.approx(best.max())
    assert leaks[-1] == pytest.approx(np.sort(best)[len(best) // 2])
    assert sights[0].picture.shape[0] > 2 * 16 and sights[0].picture.dtype == np.uint8


def test_cells_without_pictures_are_left_out(sweep: RunRecord, sweep_rows: list[SummaryRow]) -> None:
    row = headline_rows(sweep_rows)[0]
    without = replace(sweep, images={key: images for key, images in sweep.images.items() if key.startswith("victims=")})
    assert worst_pairs(without, row) == []
