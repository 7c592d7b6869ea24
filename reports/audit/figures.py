"""Figures of an audit: logged, reproduced and worst-case error per checkpoint, and strips of reconstructions."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.figure import Figure

from mocosfl_priv.evaluation.statistics import Interval
from mocosfl_priv.results import RunRecord, image_key, victims_key
from reports.audit.summary import AuditedCheckpoint, AuditRow
from reports.drawing.chart import Chart
from reports.drawing.figures import whiskers
from reports.drawing.pictures import mosaic_strip, shown_victims, strip

LOGGED, REPRODUCED, WORST, FLOOR = "logged", "paper's attack, run by us", "worst case", "floor (blind guess)"
MARKERS = {LOGGED: "D", REPRODUCED: "o", WORST: "s"}


def mse_ladder(found: dict[str, list[AuditedCheckpoint]]) -> Chart:
    """Draw the MSE per checkpoint, a panel per set of victims.

    The marks are: logged by the authors, the same attack run by us, our worst case, and the floor.
    """
    tallest = max(len(checkpoints) for checkpoints in found.values())
    figure = Figure(figsize=(4.5 + 4.5 * len(found), 1.7 + 0.75 * tallest), layout="constrained")
    axes = figure.subplots(1, len(found), squeeze=False)[0]
    colours = dict(zip(MARKERS, sns.color_palette("colorblind", len(MARKERS)), strict=True))
    handles: dict[str, Any] = {}
    for axis, checkpoints in zip(axes, found.values(), strict=True):
        points = [point for row, checkpoint in enumerate(checkpoints) for point in _points(checkpoint, row)]
        frame = pd.DataFrame([{"mse": mse.value, "y": y, "kind": kind} for kind, y, mse in points])
        if points:  # if only blind attacks ran, there are floors and no points
            sns.scatterplot(
                frame,
                x="mse",
                y="y",
                hue="kind",
                style="kind",
                palette=colours,
                markers=MARKERS,
                s=80,
                ax=axis,
                zorder=3,
            )
        for kind, y, mse in points:
            axis.errorbar(mse.value, y, xerr=whiskers(mse), color=colours[kind], linewidth=1.3, capsize=3, zorder=2)
        heights = np.arange(len(checkpoints))
        floors = [checkpoint.mse_floor for checkpoint in checkpoints]
        axis.vlines(floors, heights - 0.4, heights + 0.4, color="0.2", linewidth=2, label=FLOOR)
        handles |= {label: handle for handle, label in zip(*axis.get_legend_handles_labels(), strict=True)}
        axis.legend_ = None
        axis.set_yticks(heights, [checkpoint.label for checkpoint in checkpoints])
        axis.set_ylim(len(checkpoints) - 0.5, -0.5)
        axis.set_xlim(left=0)
        axis.locator_params(axis="x", nbins=6)
        axis.set_title(f"on {checkpoints[0].where}")
        axis.set_xlabel("MSE of the reconstruction (lower leaks more)")
        axis.set_ylabel("")
    order = [kind for kind in (*MARKERS, FLOOR) if kind in handles]
    figure.legend([handles[kind] for kind in order], order, loc="outside lower center", ncols=len(order), frameon=False)
    return Chart(
        figure,
        "MSE per checkpoint: logged, reproduced, worst case and floor",
        "Marks further left leak more. A mark on the floor’s line means that the attack did no better than a blind "
        "guess. Logged values are shown only for the images that they were measured on.",
    )


def _points(checkpoint: AuditedCheckpoint, row: int) -> list[tuple[str, float, Interval]]:
    """Kind, height and MSE of every mark of a checkpoint. A logged value belongs to the published images only."""
    logged = checkpoint.logged["mse"] if checkpoint.on_released else None
    marks = {
        LOGGED: Interval(logged, logged, logged, 1) if logged is not None else None,
        REPRODUCED: checkpoint.paper.metrics["mse"] if checkpoint.paper is not None else None,
        WORST: checkpoint.worst.metrics["mse"] if checkpoint.worst is not None else None,
    }
    heights = zip((-0.2, 0.0, 0.2), marks.items(), strict=True)
    return [(kind, row + height, mse) for height, (kind, mse) in heights if mse is not None]


def audit_strips(record: RunRecord, found: dict[str, list[AuditedCheckpoint]]) -> dict[str, list[dict[str, Any]]]:
    """Return strips of pictures by set of victims, for the first seed, each with keys ``title``, ``row`` and ``png``.

    The first strips of a set show the originals and mosaics of them. Then each checkpoint has one under the paper's
    attack and one under the single attack with the lowest mean MSE.
    """
    pictures: dict[str, list[dict[str, Any]]] = {}
    for victims, checkpoints in found.items():
        originals = true_images(record, victims)
        indices = shown_victims(len(originals))
        pictures[victims] = [
            {"title": "originals", "row": None, "png": strip(originals, indices)},
            *(
                {
                    "title": f"mosaic of {step.tiles} × {step.tiles} tiles, R {step.leak_ratio:.3f}",
                    "row": None,
                    "png": mosaic_strip(originals, indices, step.tiles),
                }
                for step in checkpoints[0].scale
            ),
        ]
        for checkpoint in checkpoints:
            for row in _shown_rows(checkpoint):
                images = reconstructions(record, checkpoint, row.attack)
                pictures[victims].append({"title": checkpoint.label, "row": row, "png": strip(images, indices)})
    return pictures


def _shown_rows(checkpoint: AuditedCheckpoint) -> list[AuditRow]:
    worst = min(
        (row for row in checkpoint.rows if not row.blind), key=lambda row: row.metrics["mse"].value, default=None
    )
    chosen = {row.attack: row for row in (checkpoint.paper, worst) if row is not None}
    return list(chosen.values())


def true_images(record: RunRecord, victims: str) -> np.ndarray:
    """Return the victims of a set, uint8 (n, 3, h, w)."""
    return record.images[victims_key(victims)]


def reconstructions(record: RunRecord, checkpoint: AuditedCheckpoint, attack: str) -> np.ndarray:
    """Return the reconstructions of a checkpoint's victims by `attack` with the first seed, uint8 (n, 3, h, w)."""
    cells = record.cells
    cell = cells[
        (cells["defense"] == checkpoint.name)
        & (cells["victims"] == checkpoint.victims)
        & (cells["attack"] == attack)
        & (cells["seed"] == record.info["seeds"][0])
    ].iloc[0]
    return record.images[image_key(cell.to_dict())]
