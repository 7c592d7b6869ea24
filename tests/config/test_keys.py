"""Every configuration key and every parameter of a plugin is explained, and the page that lists them is up to date."""

from __future__ import annotations

import pytest
import yaml

from docs.configuration_page import PAGE, page
from mocosfl_priv.config import document_keys, keys_of, parse_config, section_summaries
from mocosfl_priv.plugins import ATTACKS, DEFENSES, Registry, parameter_descriptions, parameter_model


def test_the_page_is_what_the_code_says() -> None:
    assert PAGE.read_text(encoding="utf-8") == page(), "renew it: uv run python -m docs.configuration_page"


def test_every_key_and_section_is_explained() -> None:
    assert [key.path for key in document_keys() if not key.description] == []
    assert all(section_summaries().values())


@pytest.mark.parametrize("registry", [ATTACKS, DEFENSES], ids=lambda registry: registry.package)
def test_every_parameter_of_a_plugin_is_explained(registry: Registry) -> None:  # type: ignore[type-arg]
    for name, origin in registry.origins().items():
        if origin.startswith(f"{registry.package}."):
            cls = registry.load(name)
            described = parameter_descriptions(cls)
            assert [key.path for key in keys_of(parameter_model(cls)) if not described.get(key.path)] == [], name


def test_keys_are_those_of_a_written_out_document() -> None:
    """The same paths as YAML has them, sections that are left out by default given."""
    document = yaml.safe_load(parse_config({"training": {"heterogeneity": {}, "replay": {"threshold": 1}}}).to_yaml())

    def paths(part: dict[str, object], prefix: str = "") -> set[str]:
        found = set()
        for name, value in part.items():
            inner = paths(value, f"{prefix}{name}.") if isinstance(value, dict) else {f"{prefix}{name}"}
            found |= inner
        return found

    listed = {key.path for key in document_keys()} - {"training.heterogeneity", "training.replay"}
    assert listed == paths(document)


def test_defaults_can_be_set_as_they_are_listed() -> None:
    overrides = [f"{key.path}={key.default}" for key in document_keys() if key.default is not None]
    kept = [one for one in overrides if not one.startswith(("training.heterogeneity.", "training.replay."))]
    assert parse_config({}, kept) == parse_config({})


def test_parameters_are_read_from_a_docstring() -> None:
    class Both:
        """What it is: not a parameter.

        rate, size: two numbers. kind: which
        one; rest: what is left.
        """

        def __init__(self, rate: float, size: int = 2, kind: str = "a", rest: int | None = None) -> None: ...

    assert parameter_descriptions(Both) == {
        "rate": "rate, size: two numbers.",
        "size": "rate, size: two numbers.",
        "kind": "which one",
        "rest": "what is left.",
    }
    rate, size, *_ = keys_of(parameter_model(Both))
    assert (rate.kind, rate.default, size.kind, size.default) == ("number", None, "whole number", "2")
