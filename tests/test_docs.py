"""The code that the guides show is run as it stands there, links lead somewhere, and no public name is left out."""

from __future__ import annotations

import itertools
import re
import subprocess
import sys
from pathlib import Path
from urllib.parse import unquote

import pytest
import torch
from markdown_it import MarkdownIt

import mocosfl_priv
from mocosfl_priv.config import PAPER_PROTOCOL, ExperimentConfig, ModelConfig, PluginSpec
from mocosfl_priv.models.split import build_split_model
from mocosfl_priv.plugins import ATTACKS, Budget
from mocosfl_priv.runtime.compute import Compute
from tests.attacks.closed_form import ColourMixClient, attend, make_view, photo_patches

ROOT = Path(__file__).parents[1]
ROOMS = ("plugins", "inversion", "defending")  # public rooms, whose members are listed below them
PAGES = [
    path.relative_to(ROOT).as_posix() for path in sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md")])
]  # all Markdown that people read


def python_blocks(name: str) -> list[str]:
    return re.findall(r"```python\n(.*?)```", (ROOT / name).read_text(encoding="utf-8"), flags=re.DOTALL)


@pytest.mark.parametrize("name", [page for page in PAGES if python_blocks(page)])
def test_shown_code_passes_the_linter(name: str, tmp_path: Path) -> None:
    for index, block in enumerate(python_blocks(name)):
        path = tmp_path / "attacks" / f"block{index}.py"
        path.parent.mkdir(exist_ok=True)
        path.write_text(block)
        command = [sys.executable, "-m", "ruff", "check", "--config", str(ROOT / "pyproject.toml")]
        result = subprocess.run(
            [*command, "--ignore", "D100,D102,ARG002,D104,INP", str(path)], capture_output=True, text=True, check=False
        )
        assert result.returncode == 0, result.stdout


def test_the_attack_of_the_contributing_guide_works(tmp_path: Path, compute: Compute) -> None:
    block = next(block for block in python_blocks("CONTRIBUTING.md") if "(Attack)" in block)
    path = tmp_path / "nearest.py"
    path.write_text(block)
    attack = ATTACKS.create(PluginSpec(name=f"{path}:NearestNeighbours")).plugin
    victims = photo_patches(6, "test")
    view = make_view(ColourMixClient(), victims, photo_patches(300), compute, visible=attack.needs)
    images = attack.reconstruct(view, Budget(), 0)
    assert images.shape == victims.shape
    guess = photo_patches(300).mean(0).expand_as(victims)
    assert torch.nn.functional.mse_loss(images, victims) < torch.nn.functional.mse_loss(guess, victims)


def test_the_listener_of_the_contributing_guide_works(tmp_path: Path, compute: Compute) -> None:
    block = next(block for block in python_blocks("CONTRIBUTING.md") if "def attend(" in block)
    path = tmp_path / "typical.py"
    path.write_text(block)
    attack = ATTACKS.create(PluginSpec(name=f"{path}:TypicalChannel")).plugin
    client, victims = ColourMixClient(), photo_patches(6, "test")
    listener = attend(attack, client, photo_patches(20), photo_patches(10), compute, attack.needs)
    assert listener is not None and float(listener.state()["heard"]) == 3
    view = make_view(client, victims, photo_patches(10), compute, visible=attack.needs, listener=listener)
    assert attack.reconstruct(view, Budget(), 0).shape == victims.shape


def test_the_backbone_of_the_guide_cuts_anywhere(tmp_path: Path) -> None:
    block = next(block for block in python_blocks("docs/tasks/own-model.md") if "def net(" in block)
    path = tmp_path / "my_net.py"
    path.write_text(block)
    for cut, shape in ((1, (8, 16, 16)), (2, (8, 8, 8)), (3, (16, 8, 8))):
        model = build_split_model(ModelConfig(backbone=f"{path}:net", width=8), cut, 16, [0.5] * 3, [0.25] * 3)
        assert model.smashed_shape == shape


def expanded(path: Path) -> str:
    """The text of a page, with the file that it includes in its place, as mkdocs does it."""
    text = path.read_text(encoding="utf-8")
    return re.sub(r'^--8<-- "(.+)"$', lambda match: (ROOT / match[1]).read_text("utf-8"), text, flags=re.MULTILINE)


def anchors(path: Path) -> set[str]:
    """Of the headings, as mkdocs and code hosts make them where a heading has words, blanks and full stops only."""
    tokens = MarkdownIt().parse(expanded(path))
    titles = [inline.children or [] for mark, inline in itertools.pairwise(tokens) if mark.type == "heading_open"]
    words = ["".join(part.content for part in parts).lower() for parts in titles]
    return {re.sub(r"[^\w\- ]", "", title).strip().replace(" ", "-") for title in words}


@pytest.mark.parametrize("name", PAGES)
def test_relative_links_lead_to_a_file_and_a_heading(name: str) -> None:
    page = ROOT / name
    inlines = [token.children or [] for token in MarkdownIt().enable("table").parse(page.read_text("utf-8"))]
    for part in itertools.chain.from_iterable(inlines):
        target = str(part.attrs.get("href") or part.attrs.get("src") or "")
        if not target or re.match(r"[a-z]+:", target):
            continue
        place, _, anchor = unquote(target).partition("#")
        goal = (page.parent / place).resolve() if place else page
        assert goal.is_file() and goal.is_relative_to(ROOT), f"{name}: {target}"
        assert not anchor or anchor in anchors(goal), f"{name}: {target}"


def test_every_public_name_is_in_the_reference() -> None:
    pages = "".join(path.read_text(encoding="utf-8") for path in (ROOT / "docs/reference/api").glob("*.md"))
    assert (
        sorted(
            name for name in re.findall(r"^::: mocosfl_priv\.(\w+)$", pages, flags=re.MULTILINE) if name not in ROOMS
        )
        == mocosfl_priv.__all__
    )


def test_every_choice_of_the_paper_protocol_is_documented() -> None:
    guide = (ROOT / "docs/TRAINING.md").read_text(encoding="utf-8")
    for section, choices in PAPER_PROTOCOL.items():
        for name, value in choices.items():
            field = ExperimentConfig.model_fields[section].annotation.model_fields[name]  # type: ignore[union-attr]
            key = name if section == "training" else f"{section}.{name}"
            assert f"| `{key}` | `{field.default}` | `{value}` |" in guide
