"""Options shared by several commands, and how they make an experiment."""

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
    typer.Option(metavar="tiny", help="Shrink the configuration to run in minutes on two cores; --set applies after."),
]
OverwriteOption = Annotated[
    bool, typer.Option("--overwrite", help="Replace an earlier run in --out, once the new one is complete.")
]


def experiment_of(
    config: str,
    overrides: Sequence[str] | None,
    defenses: Sequence[str] | None,
    attacks: Sequence[str] | None,
    scale: str | None = None,
) -> Experiment:
    """Load an experiment from a YAML file or a shipped configuration, and apply the command-line options.

    Args:
        config: A path, or a name from `mocosfl-priv ls configs`.
        overrides: ``KEY.PATH=VALUE`` each, applied after `scale`.
        defenses: Names to add to the configured defenses.
        attacks: Names to add to the configured attacks.
        scale: Name of a reduced scale (``tiny``), or None.

    Raises:
        ConfigurationError: There is no such configuration, or it is invalid.

    """
    from mocosfl_priv.api import Experiment
    from mocosfl_priv.config import parse_config, read_document, with_added_plugins
    from mocosfl_priv.config.scale import scaled

    path = config_path(config)
    parsed = parse_config(scaled(read_document(path), scale), overrides or [], where=str(path))
    return Experiment(with_added_plugins(parsed, defenses or [], attacks or []))


def config_path(config: str) -> Path:
    """Return the path of a configuration file, or of a shipped configuration by its name.

    Raises ConfigurationError if `config` is neither.
    """
    path = Path(config)
    with suppress(OSError):  # such as a name that is too long for the file system
        if path.is_file():
            return path
        if path.is_dir() and config not in shipped_configs():
            raise ConfigurationError(f"configuration {config!r} is a folder: name a YAML file")
    shipped = shipped_configs()
    if config not in shipped:
        raise unknown_name("configuration (no such file)", config, shipped)
    return shipped[config]


def shipped_configs() -> dict[str, Path]:
    """Return the paths of the shipped configurations by name: in the installed package, or beside it in a checkout."""
    package = Path(__file__).parents[1]
    folder = package / "configs" if (package / "configs").is_dir() else package.parent / "configs"
    return {path.relative_to(folder).with_suffix("").as_posix(): path for path in sorted(folder.rglob("*.yaml"))}
