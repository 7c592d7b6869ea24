"""Import of a user's own code, which a configuration names as ``package.module:name`` or ``path/to/file.py:name``."""

from __future__ import annotations

import ast
import hashlib
import importlib
import importlib.util
import sys
from collections.abc import Callable, Iterator
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType
from typing import Any

from mocosfl_priv.errors import ConfigurationError, MocosflPrivError, did_you_mean
from mocosfl_priv.runtime.files import user_path

DISTRIBUTION = Path(__file__).resolve().parents[2]  # the folder that has this package, and the three below beside it
OWN = ("mocosfl_priv", "attacks", "defenses", "reports")


def import_place(place: str, reference: str) -> ModuleType:
    """Import the module at `place`, the part of `reference` before its colon: a dotted name or a ``.py`` file.

    Paths are relative to the current folder. Raises ConfigurationError, with a message of one line, on any failure.
    """
    return _import_file(Path(place)) if place.endswith(".py") else _import_module(place, reference)


def load_function(reference: str) -> Callable[..., Any]:
    """Import the function that `reference` names; raises ConfigurationError when that fails."""
    place, name = reference.rsplit(":", 1)
    module = import_place(place, reference)
    function = getattr(module, name, None)
    if function is None:
        known = [n for n, value in vars(module).items() if callable(value) and not n.startswith("_")]
        raise ConfigurationError(f"{reference}: there is no function {name!r}; {did_you_mean(name, known)}")
    if not callable(function):
        raise ConfigurationError(f"{reference}: {name} is a {type(function).__name__}, not a function")
    loaded: Callable[..., Any] = function
    return loaded


def own_package(name: str) -> ModuleSpec:
    """Find this distribution's package `name` (``attacks``, ``defenses`` or ``reports``) without importing it.

    These names are common. Raises ConfigurationError if another package of that name comes first on the module path,
    for example a folder beside the user's script, since the built-in plugins would otherwise silently be missing.
    """
    spec = importlib.util.find_spec(name)
    places = [Path(place).resolve() for place in (spec.submodule_search_locations if spec else None) or ()]
    expected = DISTRIBUTION / name
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


def source_files(path: Path) -> tuple[Path, ...]:
    """`path` and the files that it imports from beside it: from its folder, or below, and so on from these.

    They are found in the source, so imports within functions count, too. What is installed does not count, nor do
    mocosfl-priv's own packages, which also lie beside a plugin in the root of a checkout.
    """
    root = path.resolve().parent
    found, waiting = [path.resolve()], [path.resolve()]
    while waiting:
        for file in _imported(waiting.pop(), root):
            if file not in found:
                found.append(file)
                waiting.append(file)
    return (path.resolve(), *sorted(found[1:]))


def code_sha256(path: Path) -> str:
    """SHA-256 of :func:`source_files`; for a file that imports nothing from beside it, that of the file itself."""
    return hashlib.sha256(b"".join(file.read_bytes() for file in source_files(path))).hexdigest()


def referenced_file(reference: str) -> Path | None:
    """The file behind ``file.py:name`` or ``package.module:name``; None for any other text, and where none is there."""
    place, colon, name = reference.rpartition(":")
    if not colon or not name.isidentifier():
        return None
    if place.endswith(".py"):
        file = user_path(place)
        return file if file.is_file() else None
    if not all(part.isidentifier() for part in place.split(".")):
        return None
    try:
        spec = importlib.util.find_spec(place)
    except (ImportError, ValueError):
        return None
    return Path(spec.origin) if spec is not None and spec.has_location and spec.origin is not None else None


def _imported(file: Path, root: Path) -> Iterator[Path]:
    """The files below `root` that `file` imports."""
    try:
        tree = ast.parse(file.read_bytes())
    except SyntaxError:  # its import fails with a better message
        return
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for name in node.names:
                yield from _beside(root, name.name.split("."))
        elif isinstance(node, ast.ImportFrom) and node.level <= len(file.parents):
            folder = file.parents[node.level - 1] if node.level else root
            if not folder.is_relative_to(root):
                continue
            parts = node.module.split(".") if node.module else []
            if node.level and (folder / "__init__.py").is_file():
                yield folder / "__init__.py"
            yield from _beside(folder, parts)
            for name in node.names:
                yield from _beside(folder, [*parts, name.name])


def _beside(folder: Path, parts: list[str]) -> Iterator[Path]:
    """The files in `folder` that importing the dotted name `parts` runs; none where it is not found there."""
    if folder == DISTRIBUTION and parts and parts[0] in OWN:
        return
    if parts[:1] == [folder.name] and (folder / "__init__.py").is_file():  # a package that imports itself by its name
        yield folder / "__init__.py"
        parts = parts[1:]
    for length in range(1, len(parts) + 1):
        place = folder.joinpath(*parts[:length])
        for file in (place.with_name(f"{place.name}.py"), place / "__init__.py"):
            if file.is_file():
                yield file


def _make_importable(file: Path) -> None:
    """Let `file` import what lies beside it. Raises ConfigurationError where Python finds another file by that name."""
    folder = file.parent
    if str(folder) not in sys.path:
        sys.path.append(str(folder))
    for name in sorted({other.relative_to(folder).with_suffix("").parts[0] for other in source_files(file)[1:]}):
        try:
            spec = importlib.util.find_spec(name)
        except ValueError:  # a loaded module that says nothing of where it is from
            continue
        if name == "__init__" or spec is None or spec.origin is None:
            continue
        place = Path(spec.origin).resolve()
        if place not in ((folder / f"{name}.py").resolve(), (folder / name / "__init__.py").resolve()):
            raise ConfigurationError(
                f"file {file.name} imports {name!r} from beside it, but Python finds {place} by that name: rename one"
            )


def _import_file(path: Path) -> ModuleType:
    """Import a file as a module with a unique name, only once per path."""
    resolved = user_path(path).resolve()
    if not resolved.is_file():
        raise ConfigurationError(f"file {path} does not exist (paths are relative to the current folder)")
    name = f"mocosfl_priv_user_{resolved.stem}_{hashlib.sha256(str(resolved).encode()).hexdigest()[:12]}"
    if name in sys.modules:
        return sys.modules[name]
    _make_importable(resolved)
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
