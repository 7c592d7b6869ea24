"""The command `ls`, which lists plugins, data sets, models, configurations and results."""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from mocosfl_priv.commands.options import DebugOption, shipped_configs
from mocosfl_priv.errors import unknown_name

app = typer.Typer()


@app.command("ls")
def list_(
    kind: Annotated[
        str, typer.Argument(metavar="{attacks|defenses|datasets|models|configs|keys|capabilities|results}")
    ],
    folder: Annotated[Path, typer.Option("--in", help="Of results: all run directories below.")] = Path("runs"),
    sql: Annotated[
        str | None, typer.Option(help="With results: a DuckDB query on the tables `cells` and `per_image`.")
    ] = None,
    debug: DebugOption = False,
) -> None:
    """List the names that a configuration can use, or the results of earlier runs."""
    listings: dict[str, Callable[[], Listing]] = {
        "attacks": _list_attacks,
        "defenses": _list_defenses,
        "datasets": _list_datasets,
        "models": _list_models,
        "configs": _list_configs,
        "keys": _list_keys,
        "capabilities": _list_capabilities,
        "results": partial(_list_results, folder, sql),
    }
    if kind not in listings:
        raise unknown_name("kind", kind, listings)
    table = Table(box=None, pad_edge=False)
    header, rows = listings[kind]()
    for column in header:
        table.add_column(column, no_wrap=column == header[0])
    for row in rows:
        table.add_row(*map(escape, row))  # what stands in brackets is no markup
    Console(width=None if sys.stdout.isatty() else 150).print(table)


Listing = tuple[list[str], list[list[str]]]


def _list_attacks() -> Listing:
    from mocosfl_priv.plugins import ATTACKS, summary

    rows = []
    for name, origin in ATTACKS.origins().items():
        cls = ATTACKS.load(name)
        rows.append([name, ", ".join(sorted(cls.needs)) or "nothing", summary(cls), origin])
    return ["name", "needs", "what it does", "from"], rows


def _list_defenses() -> Listing:
    from mocosfl_priv.plugins import DEFENSES, summary

    return ["name", "what it does", "from"], [
        [name, summary(DEFENSES.load(name)), origin] for name, origin in DEFENSES.origins().items()
    ]


def _list_datasets() -> Listing:
    from mocosfl_priv.data.datasets import NAMES

    return ["name", "what it is"], [[name, text] for name, text in NAMES.items()]


def _list_models() -> Listing:
    from mocosfl_priv.models.backbones import BACKBONES

    listed = [[name, f"1 to {backbone.units}", backbone.summary] for name, backbone in BACKBONES.items()]
    own = [
        "FILE.py:FUNCTION",
        "1 to its number of units",
        "a function of your own that returns a list of torch modules",
    ]
    return ["name", "cut layers", "what it is"], [*listed, own]


def _list_configs() -> Listing:
    from mocosfl_priv.config import read_document

    return ["name", "what it shows"], [
        [name, str(read_document(path).get("description", ""))] for name, path in shipped_configs().items()
    ]


def _list_keys() -> Listing:
    from mocosfl_priv.config import document_keys

    rows = [
        [
            key.path,
            key.kind if key.kind != "choice" else key.allowed.replace("`", ""),
            key.default or "",
            key.description,
        ]
        for key in document_keys()
    ]
    return ["key", "value", "default", "what it is"], rows


def _list_results(folder: Path, sql: str | None) -> Listing:
    from mocosfl_priv.results.catalogue import OVERVIEW, query

    found = query(folder, sql or OVERVIEW)
    return list(found.columns), [[_shown(value) for value in row] for row in found.itertuples(index=False)]


def _shown(value: object) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _list_capabilities() -> Listing:
    from mocosfl_priv.plugins import DESCRIPTIONS

    return ["name", "what it grants an attacker"], [
        [capability.value, text] for capability, text in DESCRIPTIONS.items()
    ]
