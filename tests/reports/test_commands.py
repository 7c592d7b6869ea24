"""`compare` and `export` as a user types them."""

from __future__ import annotations

from pathlib import Path

import pandas as pd
import pytest

from mocosfl_priv.cli import main
from mocosfl_priv.results import RunRecord, write_record


def run(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as ended:
        main(words)
    printed = capsys.readouterr()
    return int(ended.value.code or 0), printed.out, printed.err


@pytest.fixture(scope="module")
def folder(sweep: RunRecord, tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("stored")
    write_record(sweep, place)
    return place


def test_a_run_does_not_differ_from_itself(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = run(capsys, "compare", str(folder), str(folder))
    assert code == 0 and "no difference shown" in out and "none shows a difference" in out


def test_export_writes_what_is_asked_for(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    target = tmp_path / "t.csv"
    code, out, _ = run(capsys, "export", str(folder), "--csv", str(target), "--markdown", str(tmp_path / "t.md"))
    assert code == 0 and str(target) in out and "published" in (tmp_path / "t.md").read_text(encoding="utf-8")
    assert len(pd.read_csv(target)) == len(pd.read_csv(folder / "results.csv"))
    code, _, err = run(capsys, "export", str(folder))
    assert code == 2 and "nothing to export" in err and len(err.strip().splitlines()) == 1
    assert run(capsys, "export", str(tmp_path), "--csv", str(target))[0] == 2


def test_validate_takes_a_scale(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = run(capsys, "validate", "paper/accuracy-iid", "--scale", "tiny")
    assert code == 0 and "2 systems to train" in out
    assert run(capsys, "validate", "paper/accuracy-iid", "--scale", "huge")[0] == 2
