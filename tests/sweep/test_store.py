from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mocosfl_priv.api import Sweep
from mocosfl_priv.errors import ConfigurationError, StorageError
from mocosfl_priv.sweep.schedule import ThisProcess
from mocosfl_priv.sweep.store import FORMAT, Store, address

json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=8,
)
documents = st.dictionaries(st.text(max_size=3), json_values, max_size=4)


def put(store: Store, key: str = "k", text: str = "content") -> None:
    store.put("thing", key, lambda folder: _fill(folder, text), {"note": 1}, {"from": text})


def _fill(folder: Path, text: str) -> None:
    (folder / "below").mkdir()
    (folder / "below" / "file.txt").write_text(text)
    (folder / "other.bin").write_bytes(b"\0" * 100)


@given(documents, documents)
def test_addresses_are_equal_exactly_when_documents_are(one: dict[str, object], other: dict[str, object]) -> None:
    def spelled(document: object) -> str:  # Python's == takes True for 1
        return json.dumps(document, sort_keys=True)

    assert (address(one) == address(other)) == (spelled(one) == spelled(other))
    assert address(one) == address(dict(reversed(one.items())))


def test_an_artefact_comes_back_with_what_was_noted(tmp_path: Path) -> None:
    store = Store(tmp_path / "store")
    assert store.get("thing", "k") is None and not store.has("thing", "k")
    put(store)
    found = Store(tmp_path / "store").get("thing", "k")
    assert found is not None and found.facts == {"note": 1}
    assert (found.folder / "below" / "file.txt").read_text() == "content"
    put(store, text="another process was here too")
    again = store.get("thing", "k")
    assert again is not None and (again.folder / "below" / "file.txt").read_text() == "content"
    assert [entry["event"] for entry in store.journal()] == ["done", "twice"]


@pytest.mark.parametrize("damage", ["bit", "truncated", "gone", "manifest", "no manifest", "foreign"])
def test_a_damaged_artefact_is_absent_and_can_be_made_again(damage: str, tmp_path: Path) -> None:
    store = Store(tmp_path / "store")
    put(store)
    place = store.folder / "thing" / "k"
    file = place / "below" / "file.txt"
    if damage == "bit":
        file.write_text("cOntent")
    elif damage == "truncated":
        file.write_text("cont")
    elif damage == "gone":
        file.unlink()
    elif damage == "manifest":
        (place / "artefact.json").write_text("{")
    elif damage == "no manifest":
        (place / "artefact.json").unlink()
    else:  # moved here by hand
        place.rename(store.folder / "thing" / "j")
        assert store.get("thing", "j") is None
    assert store.get("thing", "k") is None
    put(store, text="again")
    found = store.get("thing", "k")
    assert found is not None and (found.folder / "below" / "file.txt").read_text() == "again"


def test_a_writer_that_fails_leaves_nothing(tmp_path: Path) -> None:
    store = Store(tmp_path / "store")

    def write(folder: Path) -> None:
        (folder / "half").write_text("half")
        raise OSError(28, os.strerror(28))

    with pytest.raises(StorageError, match="cannot be written: No space left on device"):
        store.put("thing", "k", write, {}, {})
    assert store.get("thing", "k") is None
    assert sorted(path.name for path in store.folder.iterdir()) == ["store.json"]


def test_what_dead_processes_left_is_cleaned_and_never_read(tmp_path: Path) -> None:
    store = Store(tmp_path / "store")
    left = store.folder / ".partial-0123"
    left.mkdir()
    (left / "half").write_text("half")
    put(store)
    store.clean()
    assert not left.exists() and store.has("thing", "k")


@pytest.mark.parametrize(
    ("mark", "message"),
    [
        ('{"format": 0}', f"has format 0, but this version reads format {FORMAT}"),
        ("{", "is damaged"),
        ("[]", "is damaged"),
    ],
)
def test_a_store_of_another_version_is_refused_with_the_reason(mark: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "store").mkdir()
    (tmp_path / "store" / "store.json").write_text(mark)
    with pytest.raises(ConfigurationError, match=message):
        Store(tmp_path / "store")


EARLIER = (
    Path(__file__).parent / "format_1"
)  # a sweep's folder as version 0.1 at commit 89b3e18 left it, without its runs


def contents(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_sweep_of_an_earlier_version_is_refused_and_left_as_it_is(tmp_path: Path) -> None:
    folder = shutil.copytree(EARLIER, tmp_path / "earlier")
    before = contents(folder)
    assert len(before) == 11 and sum(name.endswith("artefact.json") for name in before) == 2
    with pytest.raises(
        ConfigurationError, match=r"has format 1, but this version reads format 2 .* another"
    ) as refused:
        Sweep.from_yaml(Path("configs/sweep/tiny.yaml")).run(folder, ThisProcess(), resume=True)
    assert refused.value.exit_code == 2 and "\n" not in str(refused.value)
    assert contents(folder) == before


def test_a_folder_of_other_files_is_no_store(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("ten years of work")
    with pytest.raises(ConfigurationError, match="is not empty and holds no store"):
        Store(tmp_path)
