"""Charts of a run: accuracy against leakage, heat maps of the grid, leakage per attack, and curves over training."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import cycle
from math import isnan
from typing import Any, Literal

import matplotlib
import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from mocosfl_priv.evaluation.statistics import Interval
from mocosfl_priv.results import RunRecord
from reports.analysis.findings_text import tenths
from reports.analysis.mosaics import Mosaic
from reports.analysis.per_image import GROUP
from reports.analysis.side_by_side import Line
from reports.analysis.summary import SummaryRow, headline_rows
from reports.drawing.chart import Chart, Mark

matplotlib.use("Agg")
sns.set_theme(style="whitegrid", context="notebook")
matplotlib.rcParams |= {
    "svg.fonttype": "none",
    "svg.hashsalt": "mocosfl-priv",
}  # keep text as text; equal charts give equal files

LOWEST_SHOWN_LEAK = -0.5  # axes end here, since an attack far worse than guessing would squeeze all other marks
MARKERS = "osD^vPX*<>ph"
LineStyle = Literal["-", "--", ":", "-."]
LINES: tuple[LineStyle, ...] = ("-", "--", ":", "-.")
COLOURS_TOLD_APART = 10  # with more colours, marks are numbered too
LEGEND_COLUMNS, LONG_LEGEND_COLUMNS = 6, 3  # columns of the legend under a figure, for short and for long names
LEGEND_LINE = 0.25  # height of a line of a legend, in inches
LEAK_LABEL = "leak ratio R  (1: perfect reconstruction, 0: blind guess)"


MOSAIC_NOTE = "Grey marks along R, 1×1 to 16×16: mosaics of the victims with so many tiles have this R."


def draw_all(record: RunRecord, rows: list[SummaryRow], scale: list[Mosaic]) -> dict[str, Chart]:
    """Draw all charts of a run; returns them by file stem.

    ``tradeoff`` is drawn only if accuracies were measured, ``heat_maps`` only if a defense has several cut layers or
    target fractions, ``leakage`` only if leakage was measured during training. scale: mosaics of the victims.
    """
    informed = [row for row in rows if not row.blind]
    headlines = headline_rows(informed or rows)
    charts = {}
    if not all(isnan(row.linear.value) for row in headlines):  # without labels there is no accuracy to draw
        charts["tradeoff"] = tradeoff(headlines, scale)
    if _has_grid(headlines):
        charts["heat_maps"] = heat_maps(headlines)
    charts["leak_ladder"] = leak_ladder(rows, scale)
    charts["training"] = training_curves(record.training)
    if len(record.leakage):
        charts["leakage"] = leakage_curves(record.leakage)
    return charts


def tradeoff(rows: list[SummaryRow], scale: list[Mosaic]) -> Chart:
    """Draw linear-probe accuracy against R and SSIM, a row of panels per cut layer, with intervals and Pareto front.

    rows: one per system, under its headline attack. scale: mosaics of the victims, marked along R.
    """
    cuts = sorted({row.cut_layer for row in rows})
    colours, markers = _colours(row.defense for row in rows), _markers(row.target_fraction for row in rows)
    # readers cannot tell so many colours apart, so a number beside each mark identifies its defense
    numbers = {name: str(place) for place, name in enumerate(colours, 1)} if len(colours) > COLOURS_TOLD_APART else {}
    named = {f"{numbers[name]}  {name}" if numbers else name: colour for name, colour in colours.items()}
    handles = [*_colour_handles(named), *_marker_handles(markers, "{:.3g} % target data", 100)]
    lines = -(-len(handles) // LEGEND_COLUMNS)
    figure = Figure(figsize=(12.5, 0.7 + LEGEND_LINE * lines + 4.1 * len(cuts)), layout="constrained")
    axes = figure.subplots(len(cuts), 2, squeeze=False, sharey="row")
    marks: list[Mark] = []
    panels: list[tuple[str, Callable[[SummaryRow], Interval]]] = [
        (LEAK_LABEL, lambda row: row.leak_ratio),
        ("mean SSIM of the reconstructions  (higher leaks more)", lambda row: row.similarity),
    ]
    for cut, line in zip(cuts, axes, strict=True):
        mine = [row for row in rows if row.cut_layer == cut]
        for axis, (label, pick) in zip(line, panels, strict=True):
            _pareto_line(axis, mine, pick)
            for row in mine:
                x, y = pick(row), row.linear
                axis.errorbar(
                    x.value, 100 * y.value, xerr=whiskers(x), yerr=whiskers(y, 100), color=colours[row.defense],
                    marker=markers[row.target_fraction], markersize=9, markeredgecolor="white", linewidth=1.1, zorder=3,
                )  # fmt: skip
                marks.append(Mark(axis, x.value, 100 * y.value, _numbers(row)))
                if numbers:
                    axis.annotate(numbers[row.defense], (x.value, 100 * y.value), (5, 5), textcoords="offset points",
                                  fontsize=9, annotation_clip=True, zorder=4)  # fmt: skip
            untrained = [100 * row.linear_untrained for row in mine]
            axis.axhspan(min(untrained), max(untrained), facecolor="0.85", edgecolor="0.45", linestyle="--", zorder=0)
            axis.set_xlabel(label if cut == cuts[-1] else "")
            axis.set_title(f"cut layer {cut}", loc="left", fontsize="medium")
        _mark_mosaics(line[0], scale)
        line[0].set_ylabel("linear probe accuracy (%)")
        low = min(row.leak_ratio.low for row in mine)
        line[0].set_xlim(min(-0.1, max(LOWEST_SHOWN_LEAK, low - 0.05)), 1.03)
        line[0].axvline(0, color="0.45", linestyle=":", linewidth=1)
    figure.legend(handles=handles, loc="outside lower center", ncols=LEGEND_COLUMNS, frameon=False, fontsize="small")
    return Chart(
        figure,
        "Linear-probe accuracy against leak ratio and SSIM, per cut layer",
        "Higher is more accurate, further left is more private. Each point is a system under its headline attack; bars "
        "are intervals. The grey steps are the Pareto front: by the estimates, no system with this cut is both more "
        "accurate and more private than a system on the front; overlapping bars mean that this is uncertain. Dashed "
        f"band: a linear probe on the untrained networks. {MOSAIC_NOTE} MSE is not shown, since it is R on another "
        "scale.",
        marks,
    )


def pareto_front(points: Sequence[tuple[float, float]]) -> list[int]:
    """Return the indices of the Pareto-optimal points (leak, accuracy), in order of leak.

    A point is Pareto-optimal if no other is at least as good in both and better in one (lower leak, higher accuracy).
    """
    best, front = -np.inf, []
    for index in sorted(range(len(points)), key=lambda i: (points[i][0], -points[i][1])):
        if points[index][1] > best:
            best = points[index][1]
            front.append(index)
    return front


def _pareto_line(axis: Axes, rows: list[SummaryRow], pick: Callable[[SummaryRow], Interval]) -> None:
    points = [(pick(row).value, 100 * row.linear.value) for row in rows]
    front = [points[index] for index in pareto_front(points)]
    if len(front) > 1:
        axis.step(*zip(*front, strict=True), where="post", color="0.6", linewidth=2.5, zorder=1)


def _has_grid(rows: list[SummaryRow]) -> bool:
    """Whether some defense was run with more than one cut layer or target fraction."""
    places = pd.DataFrame([(row.defense, row.cut_layer, row.target_fraction) for row in rows], columns=GROUP)
    return bool((places.groupby("defense").nunique() > 1).to_numpy().any())


def heat_maps(rows: list[SummaryRow]) -> Chart:
    """Draw R, MSE, SSIM and accuracy by cut layer and target fraction; a row of cells per defense and cut layer."""
    table = pd.DataFrame(
        {"defense": row.defense, "cut": row.cut_layer, "target": f"{100 * row.target_fraction:.3g}",
         "R": row.leak_ratio.value, "MSE": row.metrics["mse"].value, "SSIM": row.similarity.value,
         "linear probe (%)": 100 * row.linear.value}
        for row in rows
    )  # fmt: skip
    table["place"] = [f"{row.defense}, cut {row.cut}" for row in table.itertuples()]
    ordered = table.sort_values(["defense", "cut"], kind="stable", key=lambda c: _first_seen(c, table["defense"]))
    places = list(dict.fromkeys(ordered["place"]))
    targets = sorted(set(table["target"]), key=float)
    metrics = {"R": (".2f", "rocket_r"), "MSE": (".4f", "rocket"), "SSIM": (".2f", "rocket_r"),
               "linear probe (%)": (".1f", "viridis")}  # fmt: skip
    metrics = {name: look for name, look in metrics.items() if table[name].notna().any()}  # accuracy needs labels
    figure = Figure(figsize=(3 + 2.6 * len(metrics), 1.3 + 0.34 * len(places)), layout="constrained")
    axes = figure.subplots(1, len(metrics), sharey=True)
    for axis, (name, (form, colours)) in zip(axes, metrics.items(), strict=True):
        grid = table.pivot_table(index="place", columns="target", values=name).reindex(index=places, columns=targets)
        sns.heatmap(grid, annot=True, fmt=form, cmap=colours, cbar=False, ax=axis, linewidths=1, annot_kws={"size": 9})
        axis.grid(visible=False)
        axis.set_title(name, fontsize="medium")
        axis.set_xlabel("target data (%)")
        axis.set_ylabel("")
        axis.tick_params(axis="y", rotation=0)
    return Chart(
        figure,
        "Heat maps of leak ratio, MSE, SSIM and accuracy by cut layer and target data",
        "Headline attack of each system. Dark cells leak more, or are less accurate. Empty cells were not run: a "
        "defense that uses no target data is run at 0 only.",
    )


def _first_seen(column: pd.Series, defenses: pd.Series) -> pd.Series:
    """Sort key: defenses by their first place in the results, numbers by value."""
    order = {name: place for place, name in enumerate(dict.fromkeys(defenses))}
    return column.map(order) if column.name == "defense" else column


def leak_ladder(rows: list[SummaryRow], scale: list[Mosaic]) -> Chart:
    """Draw R of every attack on every system, with intervals; a line of marks per system, mosaics along R."""
    systems = list(dict.fromkeys(row.system for row in rows))
    attacks = list(dict.fromkeys(row.attack for row in rows))
    colours, markers = _colours(attacks), dict(zip(attacks, cycle(MARKERS), strict=False))
    figure = Figure(figsize=(11, 1.5 + (0.34 + 0.05 * len(attacks)) * len(systems)), layout="constrained")
    axis = figure.subplots()
    marks = []
    for place, attack in enumerate(attacks):
        mine = [row for row in rows if row.attack == attack]
        x = np.array([row.leak_ratio.value for row in mine])
        y = np.array([systems.index(row.system) for row in mine]) + 0.7 * ((place + 0.5) / len(attacks) - 0.5)
        reach = np.hstack([whiskers(row.leak_ratio) for row in mine])
        axis.errorbar(x, y, xerr=reach, fmt=markers[attack], color=colours[attack], markersize=6, linewidth=1.2,
                      label=attack)  # fmt: skip
        marks += [Mark(axis, x[i], y[i], _numbers(row)) for i, row in enumerate(mine)]
    for boundary in range(1, len(systems)):
        axis.axhline(boundary - 0.5, color="0.88", linewidth=1)
    axis.axvline(0, color="0.3", linewidth=1)
    _mark_mosaics(axis, scale)
    axis.set_yticks(range(len(systems)), systems)
    axis.set_ylim(len(systems) - 0.5, -0.5)
    axis.grid(visible=False, axis="y")
    lowest = min(row.leak_ratio.value for row in rows)
    axis.set_xlim(min(-0.15, max(LOWEST_SHOWN_LEAK, lowest - 0.05)), 1.02)
    axis.set_xlabel(LEAK_LABEL)
    axis.legend(title="attack", loc="center left", bbox_to_anchor=(1.01, 0.5), frameon=False)
    return Chart(
        figure,
        "Leak ratio of every attack on every system",
        f"Marks further right leak more. Bars are intervals; marks below {LOWEST_SHOWN_LEAK} are outside the chart. "
        f"{MOSAIC_NOTE}",
        marks,
    )


def along_axes(lines: Sequence[Line]) -> Chart:
    """Draw R, accuracy and training traffic of every system in every variant of a sweep, a mark per variant."""
    systems = list(dict.fromkeys(line.row.system for line in lines))
    variants = list(dict.fromkeys(line.section.name for line in lines))
    colours, markers = _colours(variants), dict(zip(variants, cycle(MARKERS), strict=False))
    height = 1.3 + (0.25 + 0.2 * len(variants)) * len(systems) + LEGEND_LINE * -(-len(variants) // LONG_LEGEND_COLUMNS)
    figure = Figure(figsize=(12.5, height), layout="constrained")
    axes = figure.subplots(1, 3, sharey=True)
    marks: list[Mark] = []
    for line in lines:
        row, name = line.row, line.section.name
        y = systems.index(row.system) + 0.8 * ((variants.index(name) + 0.5) / len(variants) - 0.5)
        for axis, interval, scale in ((axes[0], row.leak_ratio, 1.0), (axes[1], row.linear, 100.0)):
            axis.errorbar(scale * interval.value, y, xerr=whiskers(interval, scale), fmt=markers[name],
                          color=colours[name], markersize=7, linewidth=1.2)  # fmt: skip
            marks.append(Mark(axis, scale * interval.value, y, f"{name}: {_numbers(row)}"))
        traffic = row.cost["training_megabytes"]
        axes[2].plot(traffic, y, markers[name], color=colours[name], markersize=7)
        marks.append(Mark(axes[2], traffic, y, f"{name}: {row.system}, {traffic:,.1f} MB"))
    for axis, label in zip(axes, ("leak ratio R", "linear probe accuracy (%)", "training traffic (MB)"), strict=True):
        axis.set_xlabel(label)
        axis.grid(visible=False, axis="y")
        for boundary in range(1, len(systems)):
            axis.axhline(boundary - 0.5, color="0.88", linewidth=1)
    axes[0].set_yticks(range(len(systems)), systems)
    axes[0].set_ylim(len(systems) - 0.5, -0.5)
    lowest = min(line.row.leak_ratio.value for line in lines)
    axes[0].set_xlim(min(-0.15, max(LOWEST_SHOWN_LEAK, lowest - 0.05)), 1.02)
    axes[2].set_xlim(left=0)
    handles = [Line2D([], [], color=colours[name], marker=markers[name], linestyle="", label=name) for name in variants]
    figure.legend(handles=handles, loc="outside lower center", ncols=LONG_LEGEND_COLUMNS, frameon=False,
                  fontsize="small")  # fmt: skip
    return Chart(
        figure,
        "Leak ratio, accuracy and traffic of every system in every variant",
        "Each system under its headline attack; bars are intervals. From left to right: leak ratio, linear-probe "
        "accuracy, and the traffic of all clients in training.",
        marks,
    )


def _mark_mosaics(axis: Axes, scale: list[Mosaic]) -> None:
    """Mark the R of mosaics above an axis whose x is R, at two heights, since fine ones stand close together."""
    for place, step in enumerate(scale):
        axis.axvline(step.leak_ratio, color="0.85", linewidth=1, zorder=0)
        axis.annotate(
            f"{step.tiles}×{step.tiles}", (step.leak_ratio, 1), (0, 2 + 7 * (place % 2)),
            xycoords=("data", "axes fraction"), textcoords="offset points", ha="center", va="bottom", fontsize=7,
            color="0.45", annotation_clip=True,
        )  # fmt: skip


def training_curves(training: pd.DataFrame) -> Chart:
    """Draw loss and validation kNN accuracy over epochs, a line per seed.

    training: columns ``epoch``, ``loss``, ``validation_knn``, and those that identify a system and its seed.
    """
    figure = Figure(figsize=(11, 3.6), layout="constrained")
    left, right = figure.subplots(1, 2)
    colours = _colours(training["defense"])
    lines = dict(zip(sorted(training["cut_layer"].unique()), cycle(LINES), strict=False))
    for axis, column, label in ((left, "loss", "contrastive loss"), (right, "validation_knn", "kNN, validation")):
        for _, curve in training.groupby([*GROUP, "seed"], sort=False):
            first = curve.iloc[0]
            axis.plot(curve["epoch"], curve[column], color=colours[first["defense"]],
                      linestyle=lines[first["cut_layer"]], linewidth=1.1, marker="o", markersize=3)  # fmt: skip
        axis.set_xlabel("epoch")
        axis.set_ylabel(label)
    handles = [*_colour_handles(colours), *_line_handles(lines, "cut {}")]
    figure.legend(handles=handles, loc="outside right upper", frameon=False, fontsize="small")
    return Chart(figure, "Loss and validation accuracy over training", "A line per seed and amount of target data.")


def leakage_curves(leakage: pd.DataFrame) -> Chart:
    """Draw the leak ratio over epochs, a panel per cut layer, a line per seed.

    leakage: columns ``epoch``, ``leak_ratio``, ``attack``, and those that identify a system and its seed.
    """
    cuts = sorted(leakage["cut_layer"].unique())
    figure = Figure(figsize=(11, 3.6), layout="constrained")
    axes = figure.subplots(1, len(cuts), squeeze=False, sharey=True)[0]
    colours = _colours(leakage["defense"])
    lines = dict(zip(dict.fromkeys(leakage["attack"]), cycle(LINES), strict=False))
    for axis, cut in zip(axes, cuts, strict=True):
        mine = leakage[leakage["cut_layer"] == cut]
        for _, curve in mine.groupby([*GROUP, "attack", "seed"], sort=False):
            first = curve.iloc[0]
            axis.plot(curve["epoch"], curve["leak_ratio"], color=colours[first["defense"]],
                      linestyle=lines[first["attack"]], linewidth=1.2, marker="o", markersize=3)  # fmt: skip
        axis.axhline(0, color="0.3", linewidth=1)
        axis.set_title(f"cut layer {cut}", loc="left", fontsize="medium")
        axis.set_xlabel("epoch")
    axes[0].set_ylim(max(LOWEST_SHOWN_LEAK, min(-0.1, float(leakage["leak_ratio"].min()) - 0.05)), 1.02)
    axes[0].set_ylabel("leak ratio R")
    handles = [*_colour_handles(colours), *_line_handles(lines, "{}")]
    figure.legend(handles=handles, loc="outside right upper", frameon=False, fontsize="small")
    return Chart(
        figure,
        "Leak ratio over training",
        "At each point the attacks are run from the start on the model of that epoch. They do not influence training.",
    )


def whiskers(interval: Interval, scale: float = 1.0) -> list[list[float]]:
    """Return how far an interval reaches below and above its estimate, times `scale`, as `xerr` of matplotlib."""
    return [
        [scale * max(0.0, interval.value - interval.low)],
        [scale * max(0.0, interval.high - interval.value)],
    ]


def _numbers(row: SummaryRow) -> str:
    """The tooltip of a mark."""
    leak = row.leak_ratio
    return (
        f"{row.system}, {row.attack}: R {leak.value:.3f} [{leak.low:.3f}, {leak.high:.3f}], "
        f"SSIM {row.similarity.value:.3f}, linear probe {tenths(row.linear.value)}"
    )


def _colours(names: Iterator[str] | Sequence[str] | pd.Series) -> dict[str, Any]:
    """A colour per name, from a palette for colour-blind readers if it has enough colours."""
    distinct = list(dict.fromkeys(names))
    palette = "colorblind" if len(distinct) <= COLOURS_TOLD_APART else "husl"
    return dict(zip(distinct, sns.color_palette(palette, len(distinct)), strict=True))


def _markers(values: Iterator[float]) -> dict[float, str]:
    return dict(zip(sorted(set(values)), cycle(MARKERS), strict=False))


def _colour_handles(colours: dict[str, Any]) -> list[Line2D]:
    return [Line2D([], [], color=colour, linewidth=4, label=name) for name, colour in colours.items()]


def _marker_handles(markers: dict[float, str], label: str, scale: float) -> list[Line2D]:
    """Legend entries of the markers; none if there is only one marker."""
    return [
        Line2D([], [], color="0.4", marker=marker, linestyle="", label=label.format(scale * value))
        for value, marker in markers.items()
        if len(markers) > 1
    ]


def _line_handles(lines: dict[Any, LineStyle], label: str) -> list[Line2D]:
    """Legend entries of the line styles; none if there is only one style."""
    return [
        Line2D([], [], color="0.4", linestyle=style, label=label.format(value))
        for value, style in lines.items()
        if len(lines) > 1
    ]
