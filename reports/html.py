"""One self-contained HTML page, beside the same figures as PNG and the summary as CSV."""

from __future__ import annotations

import json
from pathlib import Path

from mocosfl_priv.errors import RunFailedError
from mocosfl_priv.results import RunRecord, victims_key
from reports.figures import VICTIMS, draw_all, shown_victims, strips
from reports.page import data_uri, render, save_pictures
from reports.summary import as_frame, caveats, detections, headline_rows, sentences, summarise


def write_training_report(record: RunRecord, folder: Path) -> Path:
    """Write report.html, summary.csv and figures/*.png into `folder`; returns the page's path."""
    rows = summarise(record)
    if not rows:
        raise RunFailedError("no attack succeeded, so there is nothing to report")
    figures = draw_all(record, rows)
    pictures = strips(record, rows)
    names = ["_".join(part for part in ("strip", p["defense"], p["attack"]) if part) for p in pictures]
    save_pictures(figures | {name: p["png"] for name, p in zip(names, pictures, strict=True)}, folder / "figures")
    for picture in pictures:
        picture["uri"] = data_uri(picture["png"])
    as_frame(rows).to_csv(folder / "summary.csv", index=False)
    page = render(
        "report.html.j2",
        info=record.info,
        config=record.config_yaml,
        rows=rows,
        headlines=headline_rows(rows),
        sentences=sentences(rows),
        caveats=caveats(record, rows),
        detections=detections(record),
        figures={stem: data_uri(png) for stem, png in figures.items()},
        strips=pictures,
        shown=shown_victims(len(record.images[victims_key(VICTIMS)])),
        victims=len(record.images[victims_key(VICTIMS)]),
        plugins=json.dumps(record.info["plugins"], indent=2),
        systems=record.info["systems"],
        # all systems use equally many
        few_label_counts=[used["labels"] for used in record.info["systems"][0]["semi_supervised"].values()],
    )
    path = folder / "report.html"
    path.write_text(page, encoding="utf-8")
    return path
