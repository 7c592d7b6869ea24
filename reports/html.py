"""One self-contained HTML page, beside the same figures as PNG and the summary as CSV."""

from __future__ import annotations

import json
from pathlib import Path

from mocosfl_priv.errors import RunFailedError
from mocosfl_priv.results import RunRecord, victims_key
from reports.figures import VICTIMS, draw_all, shown_victims, strips
from reports.leaderboard import (
    HEADINGS,
    leaderboard,
    leaderboard_cells,
    leaderboard_frame,
    leaderboard_markdown,
    leaderboard_notes,
)
from reports.page import data_uri, render, save_pictures
from reports.summary import as_frame, caveats, detections, headline_rows, promises, sentences, summarise
from reports.verdict import verdicts


def write_training_report(record: RunRecord, folder: Path) -> Path:
    """Write report.html, summary.csv, figures/*.png and the leaderboard into `folder`; returns the page's path.

    Where a candidate was on trial, verdict.txt says what came of it.
    """
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
    board = leaderboard(record, rows)
    leaderboard_frame(board).to_csv(folder / "leaderboard.csv", index=False)
    (folder / "leaderboard.md").write_text(leaderboard_markdown(record, board), encoding="utf-8")
    verdict = [sentence for verdict in verdicts(record, rows) for sentence in verdict.sentences()]
    if verdict:
        (folder / "verdict.txt").write_text("\n".join(verdict) + "\n", encoding="utf-8")
    page = render(
        "report.html.j2",
        info=record.info,
        config=record.config_yaml,
        rows=rows,
        verdict=verdict,
        board_headings=HEADINGS,
        board_lines=[leaderboard_cells(entry) for entry in board],
        board_notes=leaderboard_notes(record, board),
        headlines=headline_rows(rows),
        sentences=[*sentences(rows), *promises(record, rows)],
        guaranteed=any(row.guarantee for row in rows),
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
