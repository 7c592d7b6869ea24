"""The page as a browser sees it: nothing asked for from outside, no error, nothing wider than a phone."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest

CHROMIUM = next(
    (found for name in ("chromium", "chromium-browser", "google-chrome") if (found := shutil.which(name))), ""
)
LISTENER = """<script>
addEventListener("error", e => document.title += " ERROR " + (e.message || e.target.src));
addEventListener("load", () => {
  const root = document.documentElement;
  document.title += ` WIDTH ${root.scrollWidth} OF ${innerWidth} ASKED ${performance.getEntriesByType("resource")
    .map(e => e.name).filter(n => !n.startsWith("data:")).join(" ")} BROKEN ${
    [...document.images].filter(i => !i.naturalWidth).length}`;
});
</script>"""


def browse(page: Path, folder: Path, width: int) -> tuple[str, str]:
    """The title after loading, which our listener wrote to, and what the browser logged."""
    watched = folder / "watched.html"
    watched.write_text(page.read_text(encoding="utf-8").replace("<head>", f"<head>{LISTENER}", 1), encoding="utf-8")
    done = subprocess.run(
        [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={folder / 'profile'}",
         "--enable-logging=stderr", "--v=0", f"--window-size={width},900", "--virtual-time-budget=5000", "--dump-dom",
         watched.as_uri()],
        capture_output=True, text=True, timeout=120, check=True,
    )  # fmt: skip
    title = re.search(r"<title>(.*?)</title>", done.stdout, flags=re.DOTALL)
    assert title is not None
    return title[1], done.stderr


@pytest.mark.skipif(not CHROMIUM, reason="no Chromium on the path")
def test_the_page_asks_for_nothing_and_logs_no_error(sweep_page: Path, tmp_path: Path) -> None:
    assert_quiet_and_narrow(sweep_page, tmp_path)


def assert_quiet_and_narrow(page: Path, folder: Path) -> None:
    title, log = browse(page, folder, width=500)  # headless windows are no narrower
    found = re.search(r"WIDTH (\d+) OF (\d+) ASKED (.*?) BROKEN (\d+)", title)
    assert found is not None and "ERROR" not in title
    assert found[3].strip() == "" and found[4] == "0"
    assert int(found[1]) <= int(found[2])  # only tables and charts scroll sideways, not the page
    assert "CONSOLE" not in log


@pytest.mark.skipif(not CHROMIUM, reason="no Chromium on the path")
def test_a_page_that_asks_and_fails_is_noticed(tmp_path: Path) -> None:
    bad = tmp_path / "bad.html"
    bad.write_text(
        "<html><head><title>t</title></head><body><img src='http://127.0.0.1:9/x.png'><script>missing()</script></body>"
    )
    title, log = browse(bad, tmp_path, 800)
    assert "ERROR" in title and "BROKEN 1" in title and "CONSOLE" in log
