"""Every Python example of README and docs runs, file by file, top to bottom."""

from __future__ import annotations

import re
import sys
import types
from pathlib import Path

import pytest

from trialist.cli.main import main

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
EXAMPLE = re.compile(r"^```python\n(.*?)^```", re.MULTILINE | re.DOTALL)
WITH_EXAMPLES = [page for page in PAGES if EXAMPLE.search(page.read_text())]


@pytest.mark.parametrize("page", WITH_EXAMPLES, ids=lambda page: str(page.relative_to(ROOT)))
def test_the_examples_of_a_page_run(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    module = types.ModuleType("example")
    monkeypatch.setitem(sys.modules, "example", module)
    for source in EXAMPLE.findall(page.read_text()):
        exec(compile(source, str(page), "exec"), module.__dict__)


def test_page_picture_and_listing_say_what_the_evidence_files_say(monkeypatch):
    monkeypatch.chdir(ROOT)
    command = ["evidence", "--index", "src/trialist/trials/measured.json", "--pages", "docs"]
    assert main([*command, "--check"]) == 0


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_between_pages_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)#]+?)(?:#[^)]*)?\)", page.read_text()):
        if "://" not in target:
            assert (page.parent / target).exists(), f"{page.name} links to {target}"
