"""Import of a user's own code, which a configuration names as ``package.module:name`` or ``path/to/file.py:name``."""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import sys
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType

from mocosfl_priv.errors import ConfigurationError, MocosflPrivError


def import_place(place: str, reference: str) -> ModuleType:
    """Import the module at `place`, the part of `reference` before its colon: a dotted name or a ``.py`` file.

    Paths are relative to the current folder. Raises ConfigurationError, with a message of one line, on any failure.
    """
    return _import_file(Path(place)) if place.endswith(".py") else _import_module(place, reference)


def own_package(name: str) -> ModuleSpec:
    """Find this distribution's package `name` (``attacks``, ``defenses`` or ``reports``) without importing it.

    These names are common. Raises ConfigurationError if another package of that name comes first on the module path,
    for example a folder beside the user's script, since the built-in plugins would otherwise silently be missing.
    """
    spec = importlib.util.find_spec(name)
    places = [Path(place).resolve() for place in (spec.submodule_search_locations if spec else None) or ()]
    expected = Path(__file__).resolve().parents[2] / name
    if spec is not None and expected in places:
        return spec
    if spec is None:
        raise ConfigurationError(f"the package {name!r} of mocosfl-priv is missing; it should be in {expected.parent}")
    found = places[0] if places else spec.origin
    raise ConfigurationError(
        f"another package {name!r}, {found}, hides the one of mocosfl-priv, {expected}: rename it, or move it out of "
        "the folder of the script that you run"
    )


def cause(error: BaseException) -> str:
    """Describe `error` in one line for a result: this package's own errors by their message, others with their type."""
    return " ".join(str(error).split()) if isinstance(error, MocosflPrivError) else one_line(error)


def one_line(error: BaseException) -> str:
    """Return type and message of `error`, without line breaks."""
    return f"{type(error).__name__}: {' '.join(str(error).split())}"


def _import_module(module: str, reference: str) -> ModuleType:
    try:
        return importlib.import_module(module)
    except Exception as error:  # a user's module can fail in any way while it is imported
        raise ConfigurationError(f"{reference}: importing {module} failed: {one_line(error)}") from error


def _import_file(path: Path) -> ModuleType:
    """Import a file as a module with a unique name, only once per path."""
    resolved = path.expanduser().resolve()
    if not resolved.is_file():
        raise ConfigurationError(f"file {path} does not exist (paths are relative to the current folder)")
    name = f"mocosfl_priv_user_{resolved.stem}_{hashlib.sha256(str(resolved).encode()).hexdigest()[:12]}"
    if name in sys.modules:
        return sys.modules[name]
    spec = importlib.util.spec_from_file_location(name, resolved)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses and typing look the module up while its code runs
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        del sys.modules[name]
        raise ConfigurationError(f"file {path} cannot be imported: {one_line(error)}") from error
    return module
