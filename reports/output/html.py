"""Write the report of trained systems: a self-contained HTML page, a PDF, figures as PNG and SVG, and CSV tables."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pandas as pd

from mocosfl_priv.results import TEST_VICTIMS, RunRecord, victims_key
from reports.analysis import side_by_side as beside
from reports.analysis.client_costs import HEADINGS as CLIENT_HEADINGS
from reports.analysis.client_costs import client_costs, cost_columns, methods_of
from reports.analysis.families import Family, against_undefended
from reports.analysis.findings_text import caveats, compact, number, points, promises, sentences
from reports.analysis.flags import explained_flags
from reports.analysis.key_findings import QUESTIONS, key_findings
from reports.analysis.leaderboard import (
    HEADINGS,
    leaderboard_cells,
    leaderboard_frame,
    leaderboard_notes,
)
from reports.analysis.linkage import LOOK_HEADINGS, WHOSE, WHOSE_HEADINGS, beside_looks
from reports.analysis.per_image import GROUP
from reports.analysis.run_section import Section, axes_of, flags_of, lines_of, said_of, stacked
from reports.analysis.summary import TAIL, VISIBLE_SSIM, as_frame, detections, key_of
from reports.analysis.verdict import verdicts
from reports.drawing.chart import Chart, titled
from reports.drawing.figures import along_axes, draw_all
from reports.drawing.pictures import shown_victims, strips, worst_pairs
from reports.output.document import Lines, write_pdf
from reports.output.markup import leaderboard_markdown
from reports.output.page import PlacedChart, data_uri, file_name, render, save_charts, save_pictures

FAMILY_HEADINGS = ["system", "difference of R", "p by itself", "p of all (Holm)", "finding", "linear probe"]
COST_HEADINGS = [
    "system",
    "client parameters",
    "client FLOPs per image",
    "smashed bytes per image",
    "traffic of training, all clients (MB)",
    "paper's accounting, one client (MB)",
    "training s",
    "attacks s",
]
LEADERBOARD, FAMILY, BESIDE = "Leaderboard", "Against no defense", "Side by side"
COSTS, CLIENT_COSTS = "What it costs", "What a client costs"


def write_training_report(sections: Sequence[Section], folder: Path, missing: Sequence[str] = ()) -> Path:
    """Write report.html, report.pdf, summary.csv, figures and the leaderboard into `folder`; returns the page's path.

    If the configuration has a candidate defense, verdict.txt holds the verdict on it.

    Args:
        sections: A run, or the variants of a sweep.
        folder: Where to write.
        missing: Names of variants without a successful attack, which are listed as missing.

    """
    swept = beside.side_by_side(sections) if axes_of(sections) else None
    family = against_undefended(*(section.record for section in sections))
    verdict = said_of(sections, lambda s: [line for each in verdicts(s.record, s.rows) for line in each.sentences()])
    words = {
        "short": _short(sections, family),
        "verdict": verdict,
        "caveats": [
            *(f"{name}: no attack succeeded, so this variant is missing from the report." for name in missing),
            *said_of(sections, lambda s: caveats(s.record, s.rows)),
        ],
        "sentences": said_of(sections, lambda s: [*sentences(s.rows, s.scale), *promises(s.record, s.rows)]),
        "board_notes": said_of(sections, lambda s: leaderboard_notes(s.record, s.board)),
    }
    tables = _tables(sections, family, swept)
    charts, placed, overview = _charts(sections, swept, folder / "figures")
    sights = [{row.system: worst_pairs(s.record, row) for row in s.headlines} for s in sections]
    _write_tables(sections, folder)
    if verdict:
        (folder / "verdict.txt").write_text("\n".join(verdict) + "\n", encoding="utf-8")
    info = sections[0].record.info
    write_pdf(
        folder / "report.pdf",
        f"{info['name']}: leakage, accuracy and cost",
        _chapters(words, str(info["config"].get("candidate"))),
        tables,
        charts,
        {s.inside(system): seen for s, mine in zip(sections, sights, strict=True) for system, seen in mine.items()},
    )
    page = render(
        "output/templates/report.html.j2",
        axes=axes_of(sections),
        sections=sections,
        info=info,
        created=max(section.record.info["created"] for section in sections),
        seconds=sum(section.record.info["seconds"] for section in sections),
        **words,
        tables=tables,
        look=LOOK_HEADINGS,
        whose=WHOSE_HEADINGS,
        photos=tables[WHOSE].lines,
        swept=swept,
        overview=overview,
        family=family,
        floors=said_of(sections, lambda s: [_floor(s.record)]),
        judges=said_of(sections, lambda s: _judge(s.record)),
        few_labels=said_of(sections, lambda s: _few_labels(s.record)),
        guaranteed=any(row.guarantee for section in sections for row in section.rows),
        flags=explained_flags(flags_of(sections)),
        detections=[(section, row) for section in sections for row in detections(section.record)],
        charts=placed,
        sights=[{system: [(sight, data_uri(sight.png)) for sight in seen] for system, seen in mine.items() if seen}
                for mine in sights],
        tail=TAIL,
        visible=VISIBLE_SSIM,
        strips=[] if axes_of(sections) else _strips(sections[0], folder / "figures"),
        victims=len(sections[0].record.images[victims_key(TEST_VICTIMS)]),
        shown=shown_victims(len(sections[0].record.images[victims_key(TEST_VICTIMS)])),
        cost_methods=methods_of([client_costs(s.record, key_of(row)) for s in sections for row in s.headlines]),
        plugins=[json.dumps(section.record.info["plugins"], indent=2) for section in sections],
    )  # fmt: skip
    path = folder / "report.html"
    path.write_text(page, encoding="utf-8")
    return path


def _short(sections: Sequence[Section], family: Family) -> dict[str, list[str]]:
    """The answers by question: one for all variants that agree, and one for each variant that differs."""
    compared = family if not axes_of(sections) else Family([], "")
    answers = {s.name: key_findings(s.record, s.rows, s.board, compared, s.scale) for s in sections}
    short = {question: said_of(sections, partial(_answer, answers, question)) for question in QUESTIONS}
    if axes_of(sections) and family.members:
        short["How sure"].append(f"Against no defense, all variants together: {family.statement}")
    return short


def _answer(answers: dict[str, dict[str, str]], question: str, section: Section) -> list[str]:
    return [answers[section.name][question]]


def _chapters(words: dict[str, Any], candidate: str) -> dict[str, list[str]]:
    """The paragraphs of the PDF by heading."""
    short = [f"{question}: {answer}" for question, answers in words["short"].items() for answer in answers]
    return {
        "Summary": short,
        **({f"The verdict on {candidate}": words["verdict"]} if words["verdict"] else {}),
        "Before you quote a number": words["caveats"],
        "System by system": words["sentences"],
        "How to read the tables": words["board_notes"],
    }


def _tables(sections: Sequence[Section], family: Family, swept: beside.SideBySide | None) -> dict[str, Lines]:
    """The tables of both the HTML page and the PDF, by title."""
    axes = axes_of(sections)
    one, two = len(axes) + 1, len(axes) + 2  # number of columns that identify a system: its name, or defense and cut
    tables: dict[str, Lines] = {}
    if swept is not None:
        tables[BESIDE] = Lines([*axes, *beside.HEADINGS], [line.cells() for line in swept.lines], two + 1)
    board = lines_of(sections, lambda s: [leaderboard_cells(entry) for entry in s.board])
    tables[LEADERBOARD] = Lines([*axes, *HEADINGS], board, two)
    if family.members:
        tables[FAMILY] = Lines([*axes, *FAMILY_HEADINGS], _family_lines(sections, family), one)
    photos = lines_of(sections, _photo_lines)
    tables[WHOSE] = Lines([*axes, "system", *LOOK_HEADINGS, *WHOSE_HEADINGS], photos, one)
    tables[COSTS] = Lines([*axes, *COST_HEADINGS], lines_of(sections, _cost_lines), one)
    tables[CLIENT_COSTS] = Lines([*axes, "system", *CLIENT_HEADINGS], lines_of(sections, _client_lines), one)
    return tables


def _write_tables(sections: Sequence[Section], folder: Path) -> None:
    stacked(sections, _summary).to_csv(folder / "summary.csv", index=False)
    stacked(sections, lambda s: leaderboard_frame(s.board)).to_csv(folder / "leaderboard.csv", index=False)
    boards = [f"## {s.name}\n\n" * bool(s.labels) + leaderboard_markdown(s.record, s.board) for s in sections]
    (folder / "leaderboard.md").write_text("\n".join(boards), encoding="utf-8")


def _summary(section: Section) -> pd.DataFrame:
    frame = as_frame(section.rows)
    return pd.concat([frame, cost_columns(section.record, frame[GROUP])], axis=1)


def _charts(
    sections: Sequence[Section], swept: beside.SideBySide | None, folder: Path
) -> tuple[list[Chart], list[dict[str, PlacedChart]], PlacedChart | None]:
    """Draw all charts and save them as files.

    Returns all charts in order; the charts of each section for the page, by file stem; and the chart that compares the
    variants, if any. The report of a sweep leaves out curves of training and SVG files, which the reports of its
    variants have.
    """
    drawn, placed, overview = [], [], None
    if swept is not None:
        drawn.append(along_axes(swept.lines))
        overview = save_charts({"side_by_side": drawn[0]}, folder)["side_by_side"]
    for section in sections:
        charts = draw_all(section.record, section.rows, section.scale)
        if section.labels:
            charts = {stem: titled(chart, section.name) for stem, chart in charts.items() if stem != "training"}
        suffix = f"_{file_name(section.name)}" if section.labels else ""
        saved = save_charts(
            {f"{stem}{suffix}": chart for stem, chart in charts.items()}, folder, vectors=not section.labels
        )
        placed.append({stem: saved[f"{stem}{suffix}"] for stem in charts})
        drawn += charts.values()
    return drawn, placed, overview


def _strips(section: Section, folder: Path) -> list[dict[str, Any]]:
    """Save strips of the same victims under every attack, and return them for the page."""
    pictures = strips(section.record, section.rows, section.scale)
    names = ["_".join(part for part in ("strip", p["defense"], p["attack"]) if part) for p in pictures]
    save_pictures({name: p["png"] for name, p in zip(names, pictures, strict=True)}, folder)
    return [{**picture, "uri": data_uri(picture["png"])} for picture in pictures]


def _photo_lines(section: Section) -> list[list[str]]:
    """The rows of the table on whose photo it is, which start with the system."""
    return [
        [row.system, *beside_looks(row.leak_ratio, row.similarity, row.metrics["mse"], row.linkage)]
        for row in section.headlines
    ]


def _cost_lines(section: Section) -> list[list[str]]:
    """The rows of the table with `COST_HEADINGS`."""
    return [
        [
            row.system,
            *(compact(row.cost[name]) for name in ("client_parameters", "client_flops", "smashed_bytes_per_image")),
            *(number(row.cost[name], ".1f") for name in ("training_megabytes", "paper_megabytes_per_client")),
            *(number(row.cost[name], ".0f") for name in ("training_seconds", "attack_seconds")),
        ]
        for row in section.headlines
    ]


def _client_lines(section: Section) -> list[list[str]]:
    """The rows of the table of a client's costs, which start with the system."""
    return [
        [row.system, *(cost.text for cost in client_costs(section.record, key_of(row)).values())]
        for row in section.headlines
    ]


def _family_lines(sections: Sequence[Section], family: Family) -> list[list[str]]:
    """The rows of the table of comparisons with no defense, under the axes and `FAMILY_HEADINGS`."""
    lines = []
    for member in family.members:
        leak = member.comparison.leak
        difference = f"{leak.value:+.3f} [{leak.low:+.3f}, {leak.high:+.3f}]" if leak is not None else "–"
        lines.append(
            [
                *sections[member.run].labels.values(),
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
    if math.isnan(p_value):  # not tested
        return "–"
    return "< 0.0001" if p_value < 1e-4 else f"{p_value:.4f}"


def _floor(record: RunRecord) -> str:
    floor = record.info["floor"]
    known = "the attacker's own images" if record.info.get("own_model") else "the private images"
    return f"{floor['kind']} of {known}, MSE {floor['mse']:.4f} on these victims"


def _judge(record: RunRecord) -> list[str]:
    """How the two recognition metrics are defined, if they were measured."""
    judge = record.info["recognition"]
    if judge["recognition_chance"] is None:
        return []
    said = (
        "“recognised”: an independent classifier, trained on the training split with labels, names the victim’s class "
        f"from the reconstruction (chance {100 * judge['recognition_chance']:.1f} %, on the victims’ own images "
        f"{100 * judge['recognition_ceiling']:.1f} %)."
    )
    if judge["reidentification_chance"] is not None:
        said += (
            " “re-identified”: in that classifier’s features the victim is the nearest of "
            f"{round(1 / judge['reidentification_chance'])} candidates (chance "
            f"{100 * judge['reidentification_chance']:.2g} %, for the victims’ own images under slight noise "
            f"{100 * judge['reidentification_ceiling']:.1f} %)."
        )
    return [said]


def _few_labels(record: RunRecord) -> list[str]:
    """How the semi-supervised evaluation was done, if it was."""
    if not record.info["config"]["evaluation"]["label_fractions"]:
        return []
    counts = [
        str(used["labels"]) for used in record.info["systems"][0]["semi_supervised"].values()
    ]  # the same for all systems
    return [
        "Semi-supervised evaluation: a head with one hidden layer on frozen features, trained with that share of the "
        f"probe training labels ({', '.join(counts)} of {record.info['roles']['probe_train']['images']}), drawn evenly "
        f"over the classes; its epoch is chosen on the {record.info['config']['evaluation']['probe_selection']} role."
    ]
