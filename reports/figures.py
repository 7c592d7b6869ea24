"""Figures as PNG bytes: seaborn for charts, Pillow for strips of images."""

from __future__ import annotations

import io
from collections.abc import Callable
from typing import Any

import matplotlib
import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.figure import Figure
from PIL import Image

from mocosfl_priv.evaluation.statistics import Interval
from mocosfl_priv.results import RunRecord, image_key, victims_key
from reports.summary import SummaryRow, headline_rows

matplotlib.use("Agg")
sns.set_theme(style="whitegrid", context="notebook")

LOWEST_SHOWN_LEAK = -0.5  # an attack that is worse than guessing by far would squeeze all others together
VICTIMS = "test"
STRIP_IMAGES = 10
STRIP_SCALE = 2
STRIP_GAP = 2


def _palette(name: str, count: int) -> list[tuple[float, float, float]]:
    return list(sns.color_palette(name, count))


def tradeoff(rows: list[SummaryRow]) -> bytes:
    """Linear-probe accuracy against R, MSE and SSIM, with intervals both ways; one point per system and attack."""
    panels: list[tuple[str, Callable[[SummaryRow], Interval]]] = [
        ("leak ratio R\n(1: perfect reconstruction, 0: blind guess)", lambda row: row.leak_ratio),
        ("MSE of the reconstruction\n(lower leaks more)", lambda row: row.metrics["mse"]),
        (
            "SSIM of the reconstruction\n(higher leaks more)",
            lambda row: row.metrics.get("ssim", row.metrics["ssim_zeropad"]),
        ),
    ]
    figure = Figure(figsize=(15, 5.2), layout="constrained")
    axes = figure.subplots(1, 3, sharey=True)
    systems = list(dict.fromkeys(row.system for row in rows))
    attacks = list(dict.fromkeys(row.attack for row in rows))
    colours = dict(zip(systems, _palette("colorblind", len(systems)), strict=True))
    markers = dict(zip(attacks, "osD^vPX*<>ph" * (1 + len(attacks) // 12), strict=False))
    for axis, (label, pick) in zip(axes, panels, strict=True):
        points = pd.DataFrame(
            {
                "x": pick(row).value,
                "y": 100 * row.linear.value,
                "defense": row.system,
                "attack": row.attack,
            }
            for row in rows
        )
        sns.scatterplot(
            points, x="x", y="y", hue="defense", style="attack", palette=colours, markers=markers, s=110, ax=axis,
            zorder=3, legend="full" if axis is axes[-1] else False,
        )  # fmt: skip
        for row in rows:
            x, y = pick(row), row.linear
            axis.errorbar(
                x.value, 100 * y.value, xerr=whiskers(x), yerr=whiskers(y, 100),
                color=colours[row.system], linewidth=1.1, capsize=2, zorder=2,
            )  # fmt: skip
        untrained = {round(100 * row.linear_untrained, 3) for row in rows}
        for level in untrained:
            axis.axhline(level, color="0.45", linestyle="--", linewidth=1)
        axis.set_xlabel(label)
        axis.set_ylabel("linear probe accuracy (%)")
    axes[0].set_xlim(min(-0.1, max(LOWEST_SHOWN_LEAK, min(row.leak_ratio.low for row in rows) - 0.05)), 1.03)
    axes[0].axvline(0, color="0.45", linestyle=":", linewidth=1)
    axes[-1].legend(loc="center left", bbox_to_anchor=(1.02, 0.5), frameon=False)
    return png_bytes(figure)


def leak_ladder(rows: list[SummaryRow]) -> bytes:
    """R of every attack on every system, with intervals."""
    systems = list(dict.fromkeys(row.system for row in rows))
    attacks = list(dict.fromkeys(row.attack for row in rows))
    figure = Figure(figsize=(11, 1.6 + 0.34 * len(rows)), layout="constrained")
    axis = figure.subplots()
    frame = pd.DataFrame({"R": row.leak_ratio.value, "system": row.system, "attack": row.attack} for row in rows)
    palette = dict(zip(attacks, _palette("viridis", len(attacks)), strict=True))
    sns.barplot(frame, y="system", x="R", hue="attack", order=systems, hue_order=attacks, palette=palette, ax=axis)
    height = 0.8 / len(attacks)
    for row in rows:
        y = systems.index(row.system) - 0.4 + height * (attacks.index(row.attack) + 0.5)
        axis.errorbar(row.leak_ratio.value, y, xerr=whiskers(row.leak_ratio), color="0.2", linewidth=1.1, capsize=2)
    axis.axvline(0, color="0.3", linewidth=1)
    axis.set_xlim(min(-0.15, max(LOWEST_SHOWN_LEAK, float(frame["R"].min()) - 0.05)), 1.02)
    axis.set_xlabel(f"leak ratio R = 1 - MSE / MSE of a blind guess  (bars below {LOWEST_SHOWN_LEAK} are cut off)")
    axis.set_ylabel("")
    axis.legend(title="attack", loc="center left", bbox_to_anchor=(1.01, 0.5), frameon=False)
    return png_bytes(figure)


def training_curves(training: pd.DataFrame) -> bytes:
    """Loss and validation kNN over training, per system."""
    frame = training.assign(
        system=[f"{row.defense}, cut {row.cut_layer}, target {row.target_fraction:g}" for row in training.itertuples()]
    )
    figure = Figure(figsize=(11, 3.6), layout="constrained")
    left, right = figure.subplots(1, 2)
    palette = _palette("colorblind", frame["system"].nunique())
    for axis, column, label in ((left, "loss", "contrastive loss"), (right, "validation_knn", "kNN, validation")):
        sns.lineplot(
            frame, x="epoch", y=column, hue="system", units="seed", estimator=None, marker="o", ax=axis,
            palette=palette, legend=axis is right,
        )  # fmt: skip
        axis.set_ylabel(label)
    right.legend(loc="center left", bbox_to_anchor=(1.02, 0.5), frameon=False)
    return png_bytes(figure)


def leakage_curves(leakage: pd.DataFrame) -> bytes:
    """Leak ratio over training, per system and attack."""
    frame = leakage.assign(
        system=[f"{row.defense}, cut {row.cut_layer}, target {row.target_fraction:g}" for row in leakage.itertuples()]
    )
    figure = Figure(figsize=(11, 3.6), layout="constrained")
    axis = figure.subplots()
    sns.lineplot(
        frame, x="epoch", y="leak_ratio", hue="system", style="attack", units="seed", estimator=None, markers=True,
        ax=axis, palette=_palette("colorblind", frame["system"].nunique()),
    )  # fmt: skip
    axis.axhline(0, color="0.3", linewidth=1)
    axis.set_ylim(max(LOWEST_SHOWN_LEAK, min(-0.1, float(frame["leak_ratio"].min()) - 0.05)), 1.02)
    axis.set_ylabel("leak ratio R")
    axis.legend(loc="center left", bbox_to_anchor=(1.01, 0.5), frameon=False)
    return png_bytes(figure)


def shown_victims(count: int) -> list[int]:
    """Which victims the strips show: evenly spaced, so that nobody chose them."""
    return [int(i) for i in np.unique(np.linspace(0, count - 1, min(STRIP_IMAGES, count)).round())]


def strip(images: np.ndarray, indices: list[int]) -> bytes:
    """The images (n, 3, h, w) uint8 at `indices` side by side."""
    chosen = images[indices].transpose(0, 2, 3, 1)
    count, height, width, _ = chosen.shape
    canvas = np.full((height, count * (width + STRIP_GAP) - STRIP_GAP, 3), 255, dtype=np.uint8)
    for position, image in enumerate(chosen):
        left = position * (width + STRIP_GAP)
        canvas[:, left : left + width] = image
    picture = Image.fromarray(canvas)
    picture = picture.resize((picture.width * STRIP_SCALE, picture.height * STRIP_SCALE), Image.Resampling.NEAREST)
    buffer = io.BytesIO()
    picture.save(buffer, format="PNG")
    return buffer.getvalue()


def strips(record: RunRecord, rows: list[SummaryRow]) -> list[dict[str, Any]]:
    """Originals, then every attack on every system (first seed): title, R over all victims, PNG."""
    victims = record.images[victims_key(VICTIMS)]
    indices = shown_victims(len(victims))
    pictures: list[dict[str, Any]] = [{"defense": "originals", "attack": "", "png": strip(victims, indices)}]
    seed = record.info["seeds"][0]
    for row in rows:
        if row.is_worst_case or (row.blind and row is not _first_blind(rows)):
            continue
        key = image_key(
            {
                "defense": row.defense,
                "attack": row.attack,
                "cut_layer": row.cut_layer,
                "target_fraction": row.target_fraction,
                "seed": seed,
                "victims": VICTIMS,
            }
        )
        pictures.append(
            {
                "defense": row.system if not row.blind else "any defense",
                "attack": row.attack,
                "leak_ratio": row.leak_ratio,
                "png": strip(record.images[key], indices),
            }
        )
    return pictures


def _first_blind(rows: list[SummaryRow]) -> SummaryRow | None:
    return next((row for row in rows if row.blind), None)


def whiskers(interval: Interval, scale: float = 1.0) -> list[list[float]]:
    """How far an interval reaches to both sides of its estimate, as matplotlib's error bars want it."""
    return [
        [scale * max(0.0, interval.value - interval.low)],
        [scale * max(0.0, interval.high - interval.value)],
    ]


def png_bytes(figure: Figure) -> bytes:
    """The figure as a PNG file."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110)
    return buffer.getvalue()


def draw_all(record: RunRecord, rows: list[SummaryRow]) -> dict[str, bytes]:
    """Every chart by file stem."""
    informed = [row for row in rows if not row.blind] or headline_rows(rows)
    charts = {
        "tradeoff": tradeoff(informed),
        "leak_ladder": leak_ladder(rows),
        "training": training_curves(record.training),
    }
    if len(record.leakage):
        charts["leakage"] = leakage_curves(record.leakage)
    return charts
