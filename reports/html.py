"""One self-contained HTML page, beside the same as PDF, figures as PNG and SVG, and tables as CSV."""

from __future__ import annotations

import json
import math
from pathlib import Path

from mocosfl_priv.errors import RunFailedError
from mocosfl_priv.results import RunRecord, victims_key
from reports.document import write_pdf
from reports.families import Family, against_undefended
from reports.figures import draw_all
from reports.flags import explained_flags
from reports.in_short import in_short
from reports.leaderboard import (
    HEADINGS,
    leaderboard,
    leaderboard_cells,
    leaderboard_frame,
    leaderboard_markdown,
    leaderboard_notes,
)
from reports.page import data_uri, render, save_charts, save_pictures
from reports.pictures import VICTIMS, shown_victims, strips, worst_sights
from reports.summary import TAIL, VISIBLE_SSIM, as_frame, detections, headline_rows, summarise
from reports.verdict import verdicts
from reports.words import caveats, points, promises, sentences

FAMILY_HEADINGS = ["system", "difference of R", "p by itself", "p of all (Holm)", "finding", "linear probe"]


def write_training_report(record: RunRecord, folder: Path) -> Path:
    """Write report.html, report.pdf, summary.csv, figures and the leaderboard into `folder`; returns the page's path.

    Where a candidate was on trial, verdict.txt says what came of it.
    """
    rows = summarise(record)
    if not rows:
        raise RunFailedError("no attack succeeded, so there is nothing to report")
    charts = draw_all(record, rows)
    placed = save_charts(charts, folder / "figures")
    pictures = strips(record, rows)
    names = ["_".join(part for part in ("strip", p["defense"], p["attack"]) if part) for p in pictures]
    save_pictures({name: p["png"] for name, p in zip(names, pictures, strict=True)}, folder / "figures")
    for picture in pictures:
        picture["uri"] = data_uri(picture["png"])
    as_frame(rows).to_csv(folder / "summary.csv", index=False)
    board = leaderboard(record, rows)
    leaderboard_frame(board).to_csv(folder / "leaderboard.csv", index=False)
    (folder / "leaderboard.md").write_text(leaderboard_markdown(record, board), encoding="utf-8")
    verdict = [sentence for verdict in verdicts(record, rows) for sentence in verdict.sentences()]
    if verdict:
        (folder / "verdict.txt").write_text("\n".join(verdict) + "\n", encoding="utf-8")
    headlines = headline_rows(rows)
    family = against_undefended(record)
    short = in_short(record, rows, board, family)
    plain = [*sentences(rows), *promises(record, rows)]
    warnings = caveats(record, rows)
    sights = {row.system: worst_sights(record, row) for row in headlines}
    board_lines = [leaderboard_cells(entry) for entry in board]
    family_lines = _family_lines(family)
    write_pdf(
        folder / "report.pdf",
        f"{record.info['name']}: what leaks, and at what price",
        {
            "In short": [f"{question}: {answer}" for question, answer in short.items()],
            **({f"The verdict on {record.info['config']['candidate']}": verdict} if verdict else {}),
            "Before you quote a number": warnings,
            "System by system": plain,
            "How to read the tables": leaderboard_notes(record, board),
        },
        {
            "Leaderboard": (HEADINGS, board_lines),
            **({"Against no defense": (FAMILY_HEADINGS, family_lines)} if family_lines else {}),
        },
        charts,
        sights,
    )
    page = render(
        "report.html.j2",
        info=record.info,
        config=record.config_yaml,
        rows=rows,
        short=short,
        verdict=verdict,
        board_headings=HEADINGS,
        board_lines=board_lines,
        board_notes=leaderboard_notes(record, board),
        family=family,
        family_headings=FAMILY_HEADINGS,
        family_lines=family_lines,
        headlines=headlines,
        sentences=plain,
        guaranteed=any(row.guarantee for row in rows),
        caveats=warnings,
        flags=explained_flags(record),
        detections=detections(record),
        charts=placed,
        sights={system: [(sight, data_uri(sight.png)) for sight in seen] for system, seen in sights.items() if seen},
        tail=TAIL,
        visible=VISIBLE_SSIM,
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


def _family_lines(family: Family) -> list[list[str]]:
    """The comparisons under `FAMILY_HEADINGS`, for people."""
    lines = []
    for member in family.members:
        leak = member.comparison.leak
        difference = f"{leak.value:+.3f} [{leak.low:+.3f}, {leak.high:+.3f}]" if leak is not None else "–"
        lines.append(
            [
                member.system,
                difference,
                _probability(member.comparison.p_value),
                _probability(member.adjusted_p),
                member.finding,
                points(member.comparison.linear),
            ]
        )
    return lines


def _probability(p_value: float) -> str:
    if math.isnan(p_value):  # nothing was tested
        return "–"
    return "< 0.0001" if p_value < 1e-4 else f"{p_value:.4f}"
