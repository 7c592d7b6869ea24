"""Files that a plugin imports from beside it count into its address; others do not."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mocosfl_priv.config import PluginSpec
from mocosfl_priv.errors import ConfigurationError
from mocosfl_priv.models.custom_backbone import backbone_code
from mocosfl_priv.plugins import DEFENSES
from mocosfl_priv.runtime.imports import code_sha256, source_files

STATEMENTS = ("import {0}", "from {0} import thing", "def later():\n    import {0}", "import {0} as other")
NAMES = ("plugin", "near_a", "near_b", "near_c", "near_d")


@given(
    edges=st.sets(st.tuples(st.integers(0, 4), st.integers(1, 4))),
    statement=st.sampled_from(STATEMENTS),
    changed=st.integers(1, 4),
)
def test_the_hash_follows_the_imports(
    tmp_path_factory: pytest.TempPathFactory, edges: set[tuple[int, int]], statement: str, changed: int
) -> None:
    folder = tmp_path_factory.mktemp("plugins")
    for place, name in enumerate(NAMES):
        lines = [statement.format(NAMES[to]) for start, to in sorted(edges) if start == place]
        (folder / f"{name}.py").write_text("\n".join(["import os", *lines, ""]))
    reached, waiting = {0}, [0]
    while waiting:
        start = waiting.pop()
        fresh = {to for begin, to in edges if begin == start} - reached
        reached |= fresh
        waiting += fresh
    assert {file.stem for file in source_files(folder / "plugin.py")} == {NAMES[place] for place in reached}
    before = code_sha256(folder / "plugin.py")
    (folder / f"{NAMES[changed]}.py").write_text("changed = True\n")
    assert (code_sha256(folder / "plugin.py") != before) == (changed in reached)


def test_packages_and_relative_imports_beside_it(tmp_path: Path) -> None:
    (tmp_path / "inner" / "deep").mkdir(parents=True)
    for name, text in {
        "plugin.py": "from inner import part\nimport inner.deep.end\nfrom . import near\n",
        "near.py": "",
        "inner/__init__.py": "",
        "inner/part.py": "from .other import thing\nfrom ..outside import more\n",
        "inner/other.py": "thing = 1\n",
        "inner/unused.py": "",
        "inner/deep/__init__.py": "",
        "inner/deep/end.py": "from .. import part\n",
        "outside.py": "more = 1\n",
    }.items():
        (tmp_path / name).write_text(text)
    found = {file.relative_to(tmp_path.resolve()).as_posix() for file in source_files(tmp_path / "plugin.py")}
    unused = {"inner/unused.py"}
    assert found == {file.relative_to(tmp_path).as_posix() for file in tmp_path.rglob("*.py")} - unused


DEFENSE = """
from mocosfl_priv import Defense
import {helper}

class Mine(Defense):
    def filter_gradient(self, gradient, rng):
        return {helper}.FACTOR * gradient
"""


def test_a_plugin_imports_from_beside_it_and_counts_that(tmp_path: Path) -> None:
    helper, other = tmp_path / "factor_of_mine.py", tmp_path / "unrelated_to_mine.py"
    helper.write_text("FACTOR = 2.0\n")
    other.write_text("FACTOR = 3.0\n")
    path = tmp_path / "mine_beside.py"
    path.write_text(DEFENSE.format(helper="factor_of_mine"))
    first = DEFENSES.create(PluginSpec(name=str(path)))
    other.write_text("FACTOR = 4.0\n")
    assert DEFENSES.create(PluginSpec(name=str(path))).code_sha256 == first.code_sha256
    helper.write_text("FACTOR = 2.5\n")
    assert DEFENSES.create(PluginSpec(name=str(path))).code_sha256 != first.code_sha256


def test_two_helpers_of_one_name_are_refused(tmp_path: Path) -> None:
    for folder in ("one", "two"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "shared_helper_name.py").write_text("FACTOR = 1.0\n")
        (tmp_path / folder / f"mine_{folder}.py").write_text(DEFENSE.format(helper="shared_helper_name"))
    DEFENSES.load(str(tmp_path / "one" / "mine_one.py"))
    with pytest.raises(ConfigurationError, match="by that name: rename one"):
        DEFENSES.load(str(tmp_path / "two" / "mine_two.py"))


def test_a_file_named_like_a_module_of_python_is_refused(tmp_path: Path) -> None:
    (tmp_path / "fractions.py").write_text("FACTOR = 1.0\n")
    (tmp_path / "mine_shadowed.py").write_text(DEFENSE.format(helper="fractions"))
    with pytest.raises(ConfigurationError, match=r"imports 'fractions' from beside it, but Python finds .*rename one"):
        DEFENSES.load(str(tmp_path / "mine_shadowed.py"))


def test_linked_files_and_a_package_s_own_init_count(tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "linked_factor.py").write_text("FACTOR = 1.0\n")
    (tmp_path / "pk").mkdir()
    (tmp_path / "pk" / "linked_factor.py").symlink_to(tmp_path / "elsewhere" / "linked_factor.py")
    (tmp_path / "pk" / "__init__.py").write_text("C = 1\n")
    (tmp_path / "pk" / "a.py").write_text("from . import C\nfrom .... import far\n")
    (tmp_path / "pk" / "b.py").write_text(DEFENSE.format(helper="linked_factor"))
    assert [file.name for file in source_files(tmp_path / "pk" / "a.py")] == ["a.py", "__init__.py"]
    before = code_sha256(tmp_path / "pk" / "b.py")
    assert DEFENSES.load(str(tmp_path / "pk" / "b.py")).__name__ == "Mine"
    (tmp_path / "elsewhere" / "linked_factor.py").write_text("FACTOR = 2.0\n")
    assert code_sha256(tmp_path / "pk" / "b.py") != before


def test_our_own_packages_do_not_count_where_a_plugin_lies_beside_them(monkeypatch: pytest.MonkeyPatch) -> None:
    root = Path(__file__).parents[2]
    text = b"from mocosfl_priv import Defense\nfrom attacks.rmle import RmleAttack\nimport defenses.none\n"
    monkeypatch.setattr(Path, "read_bytes", lambda _self: text)  # of a file that is not written into the checkout
    assert source_files(root / "my_defense.py") == (root / "my_defense.py",)


def test_a_backbone_counts_what_it_imports(tmp_path: Path) -> None:
    (tmp_path / "layers_of_net.py").write_text("WIDTH = 4\n")
    net = tmp_path / "net_beside.py"
    net.write_text("import layers_of_net\ndef net(width, image_size):\n    return []\n")
    before = backbone_code(f"{net}:net")
    (tmp_path / "layers_of_net.py").write_text("WIDTH = 5\n")
    assert backbone_code(f"{net}:net") != before
