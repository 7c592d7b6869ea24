"""Write the report of an audit: new attacks on published checkpoints, compared with what their authors logged."""

from __future__ import annotations

import json
from pathlib import Path

from mocosfl_priv.errors import RunFailedError
from mocosfl_priv.results import RunRecord
from reports.analysis.linkage import LOOK_HEADINGS, WHOSE_HEADINGS
from reports.audit.figures import audit_strips, mse_ladder, true_images
from reports.audit.summary import (
    audit_caveats,
    audit_frame,
    audit_sentences,
    summarise_audit,
)
from reports.drawing.pictures import shown_victims
from reports.output.page import data_uri, render, save_charts, save_pictures


def write_audit_report(record: RunRecord, folder: Path) -> Path:
    """Write report.html, summary.csv and figures into `folder`; returns the page's path.

    In the cells of `record`, the column "defense" holds the name of the checkpoint; ``info["audit"]`` has an entry per
    checkpoint. Raises RunFailedError if no attack succeeded.
    """
    found = summarise_audit(record)
    if not found:
        raise RunFailedError("no attack succeeded, so there is nothing to report")
    strips = audit_strips(record, found)
    charts = {"mse_ladder": mse_ladder(found)}
    figures: dict[str, bytes] = {}
    for victims, pictures in strips.items():
        for picture in pictures:
            attack = f"_{picture['row'].attack}" if picture["row"] is not None else ""
            figures[f"strip_{victims}_{picture['title']}{attack}"] = picture["png"]
            picture["uri"] = data_uri(picture["png"])
    save_pictures(figures, folder / "figures")
    placed = save_charts(charts, folder / "figures")
    audit_frame(found).to_csv(folder / "summary.csv", index=False)
    page = render(
        "audit/audit.html.j2",
        info=record.info,
        config=record.config_yaml,
        sets=found,
        titles={victims: checkpoints[0].where for victims, checkpoints in found.items()},
        sentences=audit_sentences(found),
        caveats=audit_caveats(record, found),
        look=LOOK_HEADINGS,
        whose=WHOSE_HEADINGS,
        ladder=placed["mse_ladder"],
        strips=strips,
        shown={victims: shown_victims(len(true_images(record, victims))) for victims in found},
        plugins=json.dumps(record.info["plugins"], indent=2),
    )
    path = folder / "report.html"
    path.write_text(page, encoding="utf-8")
    return path
