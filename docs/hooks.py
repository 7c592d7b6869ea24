"""What mkdocs calls while it builds the site: names of pages become links, marks of docstrings are left out."""

from __future__ import annotations

import posixpath
import re
from typing import Any

ROOT_PAGES = {"CONTRIBUTING.md": "contributing.md", "CHANGELOG.md": "changelog.md"}


def on_page_markdown(markdown: str, page: Any, files: Any, **_: Any) -> str:
    """`docs/DATA.md` in backticks, as people read it in an editor, leads to that page; links are left as they are."""

    def linked(match: re.Match[str]) -> str:
        target = ROOT_PAGES.get(match[1], match[1].removeprefix("docs/"))
        if files.get_file_from_path(target) is None or target == page.file.src_uri:
            return match[0]
        return f"[{match[0]}]({posixpath.relpath(target, posixpath.dirname(page.file.src_uri) or '.')})"

    return re.sub(r"(?<![\[`])`([\w/-]+\.md)`(?![\]`])", linked, markdown)


def on_page_content(html: str, **_: Any) -> str:
    """Docstrings name other code as :class:`Name`; pages show the name alone."""
    return re.sub(r":(?:class|meth|func|mod|attr):(<code>)~?", r"\1", html)
