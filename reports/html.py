"""One self-contained HTML page, beside the same figures as PNG and the summary as CSV."""

from __future__ import annotations

import base64
import json
from importlib.resources import files
from pathlib import Path

from jinja2 import Environment, StrictUndefined, Template

from mocosfl_priv.errors import RunFailedError
from mocosfl_priv.results import RunRecord, victims_key
from reports.figures import VICTIMS, draw_all, shown_victims, strips
from reports.summary import as_frame, caveats, headline_rows, sentences, summarise


def write_report(record: RunRecord, folder: Path) -> Path:
    """Write report.html, summary.csv and figures/*.png into `folder`; returns the page's path."""
    rows = summarise(record)
    if not rows:
        raise RunFailedError("no attack succeeded, so there is nothing to report")
    figures = draw_all(record, rows)
    (folder / "figures").mkdir(exist_ok=True)
    for stem, png in figures.items():
        (folder / "figures" / f"{stem}.png").write_bytes(png)
    pictures = strips(record, rows)
    for picture in pictures:
        name = "_".join(part for part in (picture["defense"], picture["attack"]) if part)
        safe = "".join(c if c.isalnum() else "_" for c in name)
        (folder / "figures" / f"strip_{safe}.png").write_bytes(picture["png"])
        picture["uri"] = _data_uri(picture["png"])
    as_frame(rows).to_csv(folder / "summary.csv", index=False)
    page = _template().render(
        info=record.info,
        config=record.config_yaml,
        rows=rows,
        headlines=headline_rows(rows),
        sentences=sentences(rows),
        caveats=caveats(record, rows),
        figures={stem: _data_uri(png) for stem, png in figures.items()},
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


def _template() -> Template:
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters["percent"] = lambda value: f"{100 * value:.1f} %"
    environment.filters["compact"] = _compact
    return environment.from_string(files("reports").joinpath("report.html.j2").read_text(encoding="utf-8"))


def _compact(value: float) -> str:
    """1234567 as 1.23 M."""
    for limit, unit in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= limit:
            return f"{value / limit:.3g} {unit}"
    return f"{value:.3g}"


def _data_uri(png: bytes) -> str:
    return "data:image/png;base64," + base64.b64encode(png).decode("ascii")
