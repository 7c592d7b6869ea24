"""Write docs/reference/configuration.md: every configuration key, and every parameter of a plugin, from the code.

uv run python -m docs.configuration_page
"""

from __future__ import annotations

import re
import textwrap
from collections.abc import Iterable
from pathlib import Path

from mocosfl_priv.config import Key, document_keys, keys_of, section_summaries
from mocosfl_priv.plugins import ATTACKS, DEFENSES, Registry, parameter_descriptions, parameter_model, summary

PAGE = Path(__file__).parent / "reference" / "configuration.md"
HEAD = """\
<!-- Made from the code by `uv run python -m docs.configuration_page`; a test compares. -->

# Configuration keys

Every key that a configuration may have, with its type, its default, and its limits. A key that is
left out has its default. An unknown key is an error, and the message suggests the nearest one.

- On the command line a key is set by its dotted path: `--set training.epochs=10`.
- `mocosfl-priv ls keys` prints the same list without limits. `mocosfl-priv validate FILE.yaml`
  checks a file against it.
- `protocol: paper` changes some of these defaults; [Training](../TRAINING.md#protocols) lists them.
- A sweep has one more key, `axes`; see [Sweeps](../SWEEPS.md#the-grid).
- `null` as a default means that nothing is set.
- A plugin is an attack or a defense. It stands in a list by its name, or with parameters beside the
  name: `{name: gaussian, sigma: 0.3, label: mild}`. The label is what reports call it.
"""
PLUGINS = """\
## Parameters of {kind}s

Each stands beside the name of the {kind} in the list `{where}`. `mocosfl-priv ls {where}` lists
the {kind}s, and [{title}](../{page}) compares them.
"""


def page() -> str:
    """The whole page, as it should stand in the repository."""
    parts = [HEAD]
    summaries = section_summaries()
    sections: dict[str, list[Key]] = {}
    for key in document_keys():
        sections.setdefault(key.section, []).append(key)
    for section, keys in sections.items():
        if not section:
            parts.append(f"## The document\n\n{_table(keys)}")
        else:
            level = "#" * (2 + section.count("."))
            parts.append(f"{level} `{section}`\n\n{_prose(summaries[section])}\n\n{_table(keys)}")
    parts.append(_plugins(ATTACKS, "The attack suite", "ATTACKS.md"))
    parts.append(_plugins(DEFENSES, "The defense suite", "DEFENSES.md"))
    return "\n".join(parts)


def _plugins(registry: Registry, title: str, target: str) -> str:  # type: ignore[type-arg]
    parts = [PLUGINS.format(kind=registry.kind, where=registry.package, title=title, page=target)]
    for name, origin in registry.origins().items():
        if not origin.startswith(registry.package + "."):
            continue  # of another package that is installed here
        cls = registry.load(name)
        described = parameter_descriptions(cls)
        keys = [
            Key(key.path, key.kind, key.allowed, key.default, described.get(key.path, ""))
            for key in keys_of(parameter_model(cls))
        ]
        table = _table(keys) if keys else "No parameters.\n"
        parts.append(f"### {registry.kind} `{name}`\n\n{_prose(summary(cls))}\n\n{table}")
    return "\n".join(parts)


def _table(keys: Iterable[Key]) -> str:
    lines = ["| key | value | default | limits or choices | meaning |", "|---|---|---|---|---|"]
    for key in keys:
        default = "must be given" if key.default is None else f"`{key.default}`"
        cells = (f"`{key.path}`", key.kind, default, _text(key.allowed), _text(key.description))
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def _prose(words: str) -> str:
    return textwrap.fill(_text(words), 100, break_long_words=False, break_on_hyphens=False)


def _text(words: str) -> str:
    """Plain words as Markdown: what stands in backticks is left as it is, signs elsewhere mean themselves."""
    pieces = re.split(r"(`+[^`]*`+)", words)
    signs = str.maketrans({"*": r"\*", "<": "&lt;", "|": "&#124;"})
    return "".join(piece if piece.startswith("`") else piece.translate(signs) for piece in pieces)


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
    print(PAGE)
