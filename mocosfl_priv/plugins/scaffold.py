"""A file to start from, for somebody who writes an attack or a defense."""

from __future__ import annotations

import ast
import importlib.util
import keyword
from importlib.resources import files
from pathlib import Path

from mocosfl_priv.errors import ConfigurationError

EXAMPLES = {"attack": "nearest_images.py", "defense": "drop_channels.py"}  # names of files, for messages


def new_plugin(kind: str, path: Path) -> tuple[Path, Path]:
    """Write an attack or a defense that works to `path`, and its test beside it; returns both paths.

    The class is named after the file: ``drop_channels.py`` holds DropChannels. Raises ConfigurationError for a name
    that cannot be one, and where a file would be overwritten.

    kind: attack or defense.
    """
    template, template_class = f"my_{kind}", f"My{kind.capitalize()}"
    class_name = _class_name(kind, path, _template(f"{template}.py.txt"))
    places = (path, path.with_name(f"test_{path.name}"))
    for place in places:
        if place.exists():
            raise ConfigurationError(f"{place} exists already; it is not overwritten")
    if not path.parent.is_dir():
        raise ConfigurationError(f"there is no folder {path.parent}")
    for place, name in zip(places, (f"{template}.py.txt", f"test_{template}.py.txt"), strict=True):
        text = _template(name).replace(template_class, class_name).replace(template, path.stem)
        try:
            place.write_text(text, encoding="utf-8")
        except OSError as error:
            raise ConfigurationError(f"{place} cannot be written: {error.strerror}") from error
    return places


def _class_name(kind: str, path: Path, template: str) -> str:
    """CamelCase of the file's name; ConfigurationError unless file and class can be imported under their names."""
    name, article = path.stem, "an" if kind == "attack" else "a"
    class_name = "".join(part[:1].upper() + part[1:] for part in name.split("_"))
    if path.suffix != ".py" or not name.isidentifier() or not class_name.isidentifier() or keyword.iskeyword(name):
        raise ConfigurationError(f"{path.name!r} cannot be {article} {kind}'s file; name it like {EXAMPLES[kind]}")
    if name.startswith("test_"):
        raise ConfigurationError(f"{path.name!r} is the name of a test; the {kind}'s own test is written beside it")
    if importlib.util.find_spec(name) is not None and not path.exists():
        raise ConfigurationError(f"{path.name!r}: there is a module {name!r} already, and a test would import that one")
    if class_name in _imported(template):
        raise ConfigurationError(f"{path.name!r}: the file imports another {class_name}; choose another name")
    return class_name


def _imported(source: str) -> set[str]:
    """The names that a module's import statements bind."""
    statements = (node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Import | ast.ImportFrom))
    return {alias.asname or alias.name for statement in statements for alias in statement.names}


def _template(name: str) -> str:
    return files("mocosfl_priv.plugins").joinpath("templates", name).read_text(encoding="utf-8")
