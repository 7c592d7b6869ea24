"""Every key of a document, or every parameter of a plugin, with what may stand there: for listings and the reference.

Read from the JSON schema that pydantic makes of a model, so that nothing is written twice.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from pydantic import BaseModel

from mocosfl_priv.config.schema import ExperimentConfig

LIST_OF_PLUGINS = "plugins"
_PLAIN = {"integer": "whole number", "number": "number", "string": "text", "boolean": "true or false", "object": "keys"}
_PLURAL = {"whole number": "whole numbers", "number": "numbers", "text": "texts", "keys": "groups of keys"}
_BOUNDS = {"minimum": ">= {}", "exclusiveMinimum": "> {}", "maximum": "<= {}", "exclusiveMaximum": "< {}",
           "multipleOf": "a multiple of {}"}  # fmt: skip


@dataclass(frozen=True)
class Key:
    """What may stand at one place.

    path: dotted, as after `--set`. kind: the type in words. allowed: choices or limits, empty for none.
    default: in YAML's words; None where the key must be given.
    """

    path: str
    kind: str
    allowed: str
    default: str | None
    description: str

    @property
    def section(self) -> str:
        """The path without its last part; empty for a key of the document itself."""
        return self.path.rpartition(".")[0]


def document_keys() -> list[Key]:
    """The keys of an experiment in the order of the schema, those of sections under their dotted paths."""
    return list(keys_of(ExperimentConfig))


def section_summaries() -> dict[str, str]:
    """What each section is for, by its dotted path: the first line of its class."""
    schema = ExperimentConfig.model_json_schema()
    return dict(_summaries(schema, "", schema["$defs"]))


def keys_of(model: type[BaseModel]) -> Iterator[Key]:
    """The keys of any model, sections included."""
    schema = model.model_json_schema()
    yield from _keys(schema, "", schema.get("$defs", {}))


def _keys(schema: Mapping[str, Any], prefix: str, definitions: Mapping[str, Any]) -> Iterator[Key]:
    required = schema.get("required", ())
    for name, part in schema["properties"].items():
        path = f"{prefix}{name}"
        section, optional = _section(part, definitions)
        description = part.get("description", "")
        if section is None:
            kind, allowed = _words(part, definitions)
            default = None if name in required else _default(part.get("default"))
            yield Key(path, kind, allowed, default, description)
            continue
        if optional:
            yield Key(path, "section or null", "", _default(part.get("default")), description)
        yield from _keys(section, f"{path}.", definitions)


def _summaries(schema: Mapping[str, Any], prefix: str, definitions: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    for name, part in schema["properties"].items():
        section, _ = _section(part, definitions)
        if section is not None:
            yield f"{prefix}{name}", " ".join(section.get("description", "").split("\n\n")[0].split())
            yield from _summaries(section, f"{prefix}{name}.", definitions)


def _section(part: Mapping[str, Any], definitions: Mapping[str, Any]) -> tuple[Mapping[str, Any] | None, bool]:
    """The section that stands there, if one does, and whether it may be left out."""
    choices = part.get("anyOf", [part])
    for choice in choices:
        if "$ref" in choice:
            found = definitions[choice["$ref"].rpartition("/")[2]]
            if found.get("type") == "object" and not _is_plugin(choice):
                return found, {"type": "null"} in choices
    return None, False


def _is_plugin(part: Mapping[str, Any]) -> bool:
    return str(part.get("$ref", "")).endswith("/PluginSpec")


def _words(part: Mapping[str, Any], definitions: Mapping[str, Any]) -> tuple[str, str]:
    """Type and limits of a value that is no section."""
    if _is_plugin(part):
        return "plugin", ""
    if "$ref" in part:
        return _words(definitions[part["$ref"].rpartition("/")[2]], definitions)
    if "anyOf" in part:
        all_words = [_words(choice, definitions) for choice in part["anyOf"]]
        limits = [allowed for _, allowed in all_words if allowed]
        return " or ".join(dict.fromkeys(kind for kind, _ in all_words)), "; ".join(dict.fromkeys(limits))
    if "enum" in part or "const" in part:
        return "choice", ", ".join(f"`{value}`" for value in part.get("enum", [part.get("const")]))
    kind = part.get("type")
    if kind == "array":
        inner, allowed = _words(part.get("items") or (part.get("prefixItems") or [{}])[0], definitions)
        least = part.get("minItems", 0)
        some = {0: "", 1: "at least one"}.get(least, f"at least {least}")
        each = f"each {allowed}" if allowed else ""
        named = LIST_OF_PLUGINS if inner == "plugin" else _PLURAL.get(inner, inner)
        return f"list of {named}", "; ".join(filter(None, (some, each)))
    if kind == "null":
        return "null", ""
    if kind == "string" and part.get("format") in {"path", "file-path"}:
        return "path", ""
    limits = [words.format(f"{part[bound]:g}") for bound, words in _BOUNDS.items() if bound in part]
    if "pattern" in part:
        limits.append(f"matches `{part['pattern']}`")
    return _PLAIN.get(str(kind), "anything"), ", ".join(limits)


def _default(value: Any) -> str:
    if value is None:
        return "null"
    if isinstance(value, str):
        return value or '""'
    if isinstance(value, list):
        return f"[{', '.join(_default(item) for item in value)}]"
    if isinstance(value, Mapping):  # a plugin
        name = value.get("name")
        return str(name) if name is not None else json.dumps(value)
    return f"{value:g}" if isinstance(value, float) else json.dumps(value)
