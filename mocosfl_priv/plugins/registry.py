"""The registry that finds implementations of the two contracts, Attack and Defense.

A plugin is addressed as
- a built-in by its file name in ``attacks/`` or ``defenses/``: ``decoder``;
- a class that an installed package lists under the entry-point group ``mocosfl_priv.attacks`` or
  ``mocosfl_priv.defenses``, by the entry point's name;
- ``package.module:Class`` or ``path/to/file.py:Class``, or ``path/to/file.py`` where that holds a single one.
"""

from __future__ import annotations

import hashlib
import inspect
import pkgutil
from collections.abc import Iterator, Mapping
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any, Generic, TypeVar

from pydantic import ValidationError

from mocosfl_priv.config import PluginSpec, plain_types
from mocosfl_priv.errors import ConfigurationError, did_you_mean, unknown_name
from mocosfl_priv.plugins.attack import Attack
from mocosfl_priv.plugins.defense import Defense
from mocosfl_priv.plugins.loaded import Loaded
from mocosfl_priv.plugins.parameters import parameter_model
from mocosfl_priv.runtime.imports import import_place, own_package, referenced_file, source_files

PluginT = TypeVar("PluginT", Attack, Defense)


class Registry(Generic[PluginT]):
    """Finds, checks and creates the plugins of one kind: `ATTACKS` and `DEFENSES` are the two.

    Args:
        kind: what messages call such a plugin.
        base: the class that all of them extend.
        package: where the built-in ones lie.

    >>> DEFENSES.create(PluginSpec(name="gaussian", sigma=0.25)).plugin.sigma
    0.25
    """

    def __init__(self, kind: str, base: type[PluginT], package: str) -> None:
        self.kind = kind
        self.base: type[PluginT] = base
        self.package = package
        self.group = f"mocosfl_priv.{package}"

    def origins(self) -> dict[str, str]:
        """Every known name and where it comes from, without importing anything.

        Raises ConfigurationError where two sources claim one name, and where another package hides the built-ins.
        """
        found: dict[str, str] = {}
        for module in pkgutil.iter_modules(own_package(self.package).submodule_search_locations):
            if not module.name.startswith("_"):
                found[module.name] = f"{self.package}.{module.name}"
        for entry in entry_points(group=self.group):
            if entry.name in found and found[entry.name] != entry.value:
                raise ConfigurationError(
                    f"two {self.package} are called {entry.name!r}: {found[entry.name]} and {entry.value}"
                )
            found[entry.name] = entry.value
        return dict(sorted(found.items()))

    def load(self, reference: str) -> type[PluginT]:
        """The class of a plugin.

        Args:
            reference: a name, ``module:Class``, ``file.py:Class``, or ``file.py`` that holds a single one.

        Returns:
            The class, which extends `base`.

        Raises:
            ConfigurationError: there is no such plugin, or its code cannot be imported.
        """
        if ":" in reference:
            place, class_name = reference.rsplit(":", 1)
            return self._class_in(import_place(place, reference), class_name, reference)
        if reference.endswith(".py"):
            return self._only_class_in(import_place(reference, reference), reference)
        origins = self.origins()
        if reference not in origins:
            raise unknown_name(self.kind, reference, origins)
        origin = origins[reference]
        if ":" in origin:
            return self.load(origin)
        return self._only_class_in(import_place(origin, reference), origin)

    def create(self, spec: PluginSpec) -> Loaded[PluginT]:
        """A plugin with its parameters, which are checked against the annotations of its constructor.

        Args:
            spec: the name or reference, with the parameters.

        Returns:
            The plugin, with its label and the hash of its code.

        Raises:
            ConfigurationError: there is no such plugin, or a parameter is unknown or has a wrong value.
        """
        cls = self.load(spec.name)
        try:
            plugin = cls(**_checked_parameters(cls, spec.parameters, f"{self.kind} {spec.short_name!r}"))
        except ValueError as error:
            raise ConfigurationError(f"{self.kind} {spec.short_name!r}: {error}") from error
        own = cls.__mro__[: cls.__mro__.index(self.base)]
        files = [file for ancestor in own for file in source_files(Path(inspect.getfile(ancestor)))]
        for reference in _texts(spec.parameters):
            if (file := referenced_file(reference)) is not None:
                files += source_files(file)
        code = [file.read_bytes() for file in files]
        origins = [f"{cls.__module__}:{cls.__qualname__}"]
        code += [Path(file).read_bytes() for file in vars(plugin).values() if isinstance(file, Path) and file.is_file()]
        code += [part.code_sha256.encode() for part in plugin.parts]
        if isinstance(plugin, Defense) and plugin.parts:
            origins = [part.origin for part in plugin.parts]
        return Loaded(
            label=spec.label or spec.short_name,
            plugin=plugin,
            origin="+".join(origins),
            code_sha256=hashlib.sha256(b"".join(code)).hexdigest(),
            parameters=spec.parameters,
        )

    def _class_in(self, module: Any, name: str, reference: str) -> type[PluginT]:
        candidate = getattr(module, name, None)
        if candidate is None:
            known = [n for n, value in vars(module).items() if self._is_implementation(value)]
            raise ConfigurationError(f"{reference}: there is no class {name!r}; {did_you_mean(name, known)}")
        if not self._is_implementation(candidate):
            raise ConfigurationError(f"{reference}: {name} is not a {self.base.__name__}")
        implementation: type[PluginT] = candidate
        return implementation

    def _only_class_in(self, module: Any, where: str) -> type[PluginT]:
        own = [
            value
            for value in vars(module).values()
            if self._is_implementation(value)
            and value.__module__ == module.__name__
            and not value.__name__.startswith("_")
        ]
        if len(own) != 1:
            names = f" ({', '.join(cls.__name__ for cls in own)}); name one as {where}:{own[0].__name__}" if own else ""
            raise ConfigurationError(f"{where} must define exactly one {self.base.__name__}, found {len(own)}{names}")
        implementation: type[PluginT] = own[0]
        return implementation

    def _is_implementation(self, value: object) -> bool:
        return isinstance(value, type) and issubclass(value, self.base) and value is not self.base


ATTACKS: Registry[Attack] = Registry("attack", Attack, "attacks")  # type: ignore[type-abstract]
DEFENSES: Registry[Defense] = Registry("defense", Defense, "defenses")


def summary(cls: type) -> str:
    """The first line of a plugin's docstring.

    Args:
        cls: an attack or a defense.

    Returns:
        The line, empty if there is none.

    >>> summary(Attack)
    "Reconstructs the victims' images from their smashed data."
    """
    return (inspect.getdoc(cls) or "").split("\n", 1)[0]


def _texts(value: object) -> Iterator[str]:
    """Every text in a parameter's value."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for part in value.values():
            yield from _texts(part)
    elif isinstance(value, list | tuple):
        for part in value:
            yield from _texts(part)


def _checked_parameters(cls: type, given: dict[str, Any], who: str) -> dict[str, Any]:
    """`given` converted and checked by the constructor's annotations; ConfigurationError names the parameter."""
    try:
        checker = parameter_model(cls)
    except (NameError, TypeError) as error:
        raise ConfigurationError(f"{who}: the constructor's annotations cannot be read: {error}") from error
    fields = checker.model_fields
    unknown = sorted(set(given) - set(fields))
    if unknown:
        raise ConfigurationError(f"{who}: unknown parameter {unknown[0]!r}; {did_you_mean(unknown[0], fields)}")
    for name, value in given.items():
        wanted = plain_types(fields[name].annotation)
        if isinstance(value, bool) and wanted & {int, float} and bool not in wanted:
            raise ConfigurationError(f"{who}: {name}: {str(value).lower()} is no number")
    try:
        checked = checker(**given)
    except ValidationError as error:
        problems = "; ".join(
            f"{'.'.join(str(part) for part in problem['loc'])}: {problem['msg']} (got {problem.get('input')!r})"
            for problem in error.errors()
        )
        raise ConfigurationError(f"{who}: {problems}") from error
    return {name: getattr(checked, name) for name in given}
