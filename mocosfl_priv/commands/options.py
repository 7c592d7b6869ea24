"""Options that several commands have, and the experiment that they ask for."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from mocosfl_priv.errors import ConfigurationError, unknown_name

if TYPE_CHECKING:
    from mocosfl_priv.api import Experiment

SetOption = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY.PATH=VALUE", help="Override a configuration key; VALUE is YAML. Repeatable."),
]
DefenseOption = Annotated[
    list[str] | None,
    typer.Option("--defense", metavar="NAME|FILE.py[:CLASS]", help="Add a defense to the configuration. Repeatable."),
]
AttackOption = Annotated[
    list[str] | None,
    typer.Option("--attack", metavar="NAME|FILE.py[:CLASS]", help="Add an attack to the configuration. Repeatable."),
]
DebugOption = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")]
ScaleOption = Annotated[
    str | None,
    typer.Option(metavar="tiny", help="Shrink the configuration to minutes on two cores; --set goes on top of it."),
]
OverwriteOption = Annotated[bool, typer.Option("--overwrite", help="Replace an earlier run in --out, once done.")]


def experiment_of(
    config: str,
    overrides: Sequence[str] | None,
    defenses: Sequence[str] | None,
    attacks: Sequence[str] | None,
    scale: str | None = None,
) -> Experiment:
    """The experiment of a file or a shipped configuration, with what the options add to it."""
    from mocosfl_priv.api import Experiment
    from mocosfl_priv.config import parse_config, read_document, with_added_plugins
    from mocosfl_priv.config.scale import scaled

    path = config_path(config)
    parsed = parse_config(scaled(read_document(path), scale), overrides or [], where=str(path))
    return Experiment(with_added_plugins(parsed, defenses or [], attacks or []))


def config_path(config: str) -> Path:
    """A file, or a shipped configuration by its name; ConfigurationError if there is neither."""
    path = Path(config)
    with suppress(OSError):  # a name that no file system takes
        if path.is_file():
            return path
        if path.is_dir() and config not in shipped_configs():
            raise ConfigurationError(f"configuration {config!r} is a folder: name a YAML file")
    shipped = shipped_configs()
    if config not in shipped:
        raise unknown_name("configuration (no such file)", config, shipped)
    return shipped[config]


def shipped_configs() -> dict[str, Path]:
    """Configurations by name: inside an installed package, or beside it in a checkout."""
    package = Path(__file__).parents[1]
    folder = package / "configs" if (package / "configs").is_dir() else package.parent / "configs"
    return {path.relative_to(folder).with_suffix("").as_posix(): path for path in sorted(folder.rglob("*.yaml"))}
