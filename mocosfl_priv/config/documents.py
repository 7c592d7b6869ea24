"""From a YAML file to a checked experiment: reading, overrides, and messages that name the key."""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError

from mocosfl_priv.config.plugin_spec import PluginSpec
from mocosfl_priv.config.schema import ExperimentConfig
from mocosfl_priv.errors import ConfigurationError, did_you_mean

LOG = logging.getLogger("mocosfl-priv")
# Keys that have another name now; the former one is read for one version.
FORMER_NAMES = {"threat.observations": "threat.messages_per_victim", "checkpoints": "audit_models"}


class _Misleading(str):
    """A scalar that YAML 1.1 reads as another number than people do: octal ``010``, base sixty ``1:10``."""

    reading: object


class _UniqueKeyLoader(yaml.SafeLoader):
    """YAML in which a repeated key is an error (plain YAML silently keeps the last one), and misleading numbers are
    marked.
    """

    def construct_number(self, node: yaml.ScalarNode) -> Any:
        """An int or float, or a `_Misleading` one."""
        integer = node.tag.endswith(":int")
        value = self.construct_yaml_int(node) if integer else self.construct_yaml_float(node)
        if not (":" in node.value or OCTAL.fullmatch(node.value)):
            return value
        marked = _Misleading(node.value)
        marked.reading = value
        return marked

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        merge = "tag:yaml.org,2002:merge"  # `<<: *anchor`, whose keys may be overridden
        keys = [self.construct_object(key, deep=True) for key, _ in node.value if key.tag != merge]
        for key in keys:
            if keys.count(key) > 1:
                raise yaml.constructor.ConstructorError(None, None, f"the key {key!r} stands twice", node.start_mark)
        return super().construct_mapping(node, deep)


OCTAL = re.compile(r"[-+]?0[0-7_]+")
for _kind in ("int", "float"):
    _UniqueKeyLoader.add_constructor(f"tag:yaml.org,2002:{_kind}", _UniqueKeyLoader.construct_number)


def parse_yaml(text: str, where: str) -> Any:
    """Read YAML safely; what cannot be read so becomes one line that names `where` and the position or key.

    Refused are syntax errors, repeated keys, and numbers that YAML reads as others than people do.
    """
    try:
        document = yaml.load(text, Loader=_UniqueKeyLoader)  # noqa: S506 - a SafeLoader
        _refuse_misleading(document, where, "")
    except (yaml.YAMLError, ValueError, RecursionError) as error:  # no date; a list in itself
        raise ConfigurationError(f"{where}: not valid YAML: {' '.join(str(error).split())}") from error
    return document


def _refuse_misleading(node: object, where: str, path: str) -> None:
    if isinstance(node, _Misleading):
        place = f"{where}: {path}" if path else where
        raise ConfigurationError(
            f"{place}: {node} is {node.reading} in YAML (a leading 0 is octal, a colon base sixty): write the number "
            "that is meant, or put text in quotes"
        )
    if isinstance(node, dict):
        for key, value in node.items():
            _refuse_misleading(key, where, path)
            _refuse_misleading(value, where, f"{path}.{key}" if path else str(key))
    elif isinstance(node, list):
        for position, value in enumerate(node):
            _refuse_misleading(value, where, f"{path}.{position}" if path else str(position))


def load_config(path: Path | str, overrides: Sequence[str] | Mapping[str, Any] = ()) -> ExperimentConfig:
    """Read `path` and apply `overrides`: ``a.b=c`` strings, or a mapping of dotted paths to values.

    Raises ConfigurationError with the path of every offending key.
    """
    return parse_config(read_document(path), overrides, where=str(path))


def read_document(path: Path | str) -> dict[str, Any]:
    """The mapping in a YAML file, not yet validated; raises ConfigurationError."""
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not UTF-8 text"
        raise ConfigurationError(f"configuration {path} cannot be read: {reason}") from error
    raw = parse_yaml(text, str(path))
    if raw is None:
        raw = {}
    if not isinstance(raw, dict):
        raise ConfigurationError(f"{path}: a configuration is a mapping of keys, not a {type(raw).__name__}")
    return raw


def parse_config(
    raw: Mapping[str, Any], overrides: Sequence[str] | Mapping[str, Any] = (), where: str = "configuration"
) -> ExperimentConfig:
    """Validate an already loaded document; see :func:`load_config`."""
    document = with_overrides(raw, overrides)
    try:
        return ExperimentConfig.model_validate(document)
    except ValidationError as error:
        problems = "; ".join(_describe(problem) for problem in error.errors())
        raise ConfigurationError(f"{where}: {problems}") from error


def with_overrides(
    raw: Mapping[str, Any], overrides: Sequence[str] | Mapping[str, Any], where: str = "--set"
) -> dict[str, Any]:
    """A copy of the document `raw` with `overrides`: ``a.b=c`` strings, or a mapping of dotted paths to values."""
    document = _with_present_names(raw)
    pairs = overrides.items() if isinstance(overrides, Mapping) else [_split_override(text) for text in overrides]
    for key, value in pairs:
        document = _with_value(document, _present_name(key).split("."), value, f"{where} {key}")
    return document


def _with_present_names(raw: Mapping[str, Any]) -> dict[str, Any]:
    """A copy of `raw` without the keys of `FORMER_NAMES`; ConfigurationError where a key has both its names."""
    document = dict(raw)
    for former, present in FORMER_NAMES.items():
        section, _, old = former.rpartition(".")
        new = present.rpartition(".")[2]
        keys = document.get(section) if section else document
        if isinstance(keys, Mapping) and old in keys:
            if new in keys:
                raise ConfigurationError(f"{former} is the former name of {present}: give one of them")
            renamed = {new if key == old else key: value for key, value in keys.items()}
            document = {**document, section: renamed} if section else renamed
            if keys[old] is not None:  # as the configuration of a finished run has it, which nobody wrote
                _present_name(former)
    return document


def _present_name(key: str) -> str:
    """`key`, or what it is called now; a line on the log says so."""
    if key not in FORMER_NAMES:
        return key
    LOG.warning("%s is now called %s; its former name is read for the last time", key, FORMER_NAMES[key])
    return FORMER_NAMES[key]


def _split_override(text: str) -> tuple[str, Any]:
    key, equals, value = text.partition("=")
    if not equals or not key.strip():
        raise ConfigurationError(f"--set {text!r}: write it as key.path=value")
    return key.strip(), parse_yaml(value, f"--set {key}")


def _with_value(node: Any, keys: list[str], value: Any, path: str) -> Any:
    """A copy of `node` in which the place `keys` holds `value`."""
    if not keys:
        return value
    head, *rest = keys
    if isinstance(node, list | tuple):
        if not head.isdecimal() or int(head) >= len(node):
            raise ConfigurationError(f"{path}: {head!r} is not a position in a list of {len(node)}")
        copy = list(node)
        copy[int(head)] = _with_value(copy[int(head)], rest, value, path)
        return copy
    if node is not None and not isinstance(node, Mapping):
        if isinstance(node, str):  # `defenses.0.sigma=1` where the entry is a bare name
            node = {"name": node}
        else:
            raise ConfigurationError(f"{path}: {head!r} lies below a plain value")
    mapping = dict(node or {})
    mapping[head] = _with_value(mapping.get(head), rest, value, path)
    return mapping


def _describe(problem: Any) -> str:
    """One pydantic problem as `path: what is wrong`."""
    location = [part for part in problem["loc"] if not str(part).startswith("function-")]
    path = ".".join(str(part) for part in location) or "document"
    if problem["type"] == "extra_forbidden":
        known = _known_keys(location[:-1])
        return f"{path}: unknown key; {did_you_mean(str(location[-1]), known)}"
    message = problem["msg"].removeprefix("Value error, ")
    value = problem.get("input")
    if isinstance(value, str | int | float | bool):
        return f"{path}: {message} (got {value!r})"
    return f"{path}: {message}"


def _known_keys(location: Sequence[Any]) -> list[str]:
    model: type[BaseModel] = ExperimentConfig
    for part in location:
        annotation = model.model_fields[part].annotation if part in model.model_fields else None
        if not (isinstance(annotation, type) and issubclass(annotation, BaseModel)):
            return []
        model = annotation
    return list(model.model_fields)


def with_added_plugins(config: ExperimentConfig, defenses: Sequence[str], attacks: Sequence[str]) -> ExperimentConfig:
    """`config` with more defenses and attacks, each by name or reference, after its own."""
    if not defenses and not attacks:
        return config
    document = config.model_dump(mode="json")
    document["defenses"] += defenses
    document["attacks"] += attacks
    return parse_config(document, where="--defense/--attack")


def with_candidate(config: ExperimentConfig, reference: str) -> ExperimentConfig:
    """`config` with one more defense, by name or reference, which is on trial."""
    candidate = PluginSpec(name=reference).short_name
    if candidate in [spec.label for spec in config.defenses]:
        raise ConfigurationError(f"{candidate} takes part in every trial: name another defense")
    document = config.model_dump(mode="json")
    document["defenses"].insert(0, {"name": reference})  # its faults show before others are trained
    document["candidate"] = candidate
    return parse_config(document, where=reference)
