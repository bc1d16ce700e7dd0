"""The examples of the site and of the README run, in the order of their page; every stem has its page."""

import re
from pathlib import Path

import pytest
import torch
import yaml

ROOT = Path(__file__).resolve().parents[1]
PAGES = sorted([*(ROOT / "docs").rglob("*.md"), ROOT / "README.md"])
BLOCK = re.compile(r"^```python\n(.*?)^```", re.MULTILINE | re.DOTALL)


@pytest.mark.parametrize("page", PAGES, ids=lambda p: str(p.relative_to(ROOT)))
def test_examples_run(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    names = {"__name__": "example"}
    for block in BLOCK.findall(page.read_text(encoding="utf-8")):
        exec(compile(block, str(page), "exec"), names)


def test_every_stem_has_a_page_with_walk_and_figures():
    named = (
        (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8").split("The stems are", 1)[1].split(".\n", 1)[0]
    )
    stems = re.findall(r"`(\w+)`", named)
    assert len(stems) == 9
    for stem in stems:
        text = (ROOT / "docs" / "stems" / f"{stem}.md").read_text(encoding="utf-8")
        assert "::: lomacs_fast." in text
        assert BLOCK.search(text)
        assert "## How the kernel walks the data" in text
        assert f"<!-- measured: {stem} -->" in text


def test_the_site_lists_every_page():
    class Loader(yaml.SafeLoader):
        pass

    nav = yaml.load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"), Loader)["nav"]

    def leaves(node):
        if isinstance(node, str):
            yield node
        else:
            for value in node.values() if isinstance(node, dict) else node:
                yield from leaves(value)

    there = {p.relative_to(ROOT / "docs").as_posix() for p in PAGES if "docs" in p.parts}
    assert set(leaves(nav)) == there
