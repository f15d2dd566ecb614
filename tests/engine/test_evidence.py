from __future__ import annotations

import json
import re
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest

from tests.engine import synthetic_trials as made
from trialist.engine.evidence import load_evidence, render_evidence
from trialist.engine.summary import write_evidence


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for document in (made.document(), made.contradicted(), made.inconclusive(), made.non_inferior()):
        write_evidence(document, tmp_path / "evidence" / document["trial"], document["preset"])
    return tmp_path / "evidence"


def test_what_is_contradicted_comes_first_and_nothing_is_hidden(folder: Path) -> None:
    page, picture = render_evidence(folder)
    words = [entry["verdict"] for entry in load_evidence(folder)]
    assert words == ["contradicted", "inconclusive", "supported", "supported"]
    headings = re.findall(r"^## (\S+) \((\w+)\): (.+)$", page, flags=re.MULTILINE)
    assert [word for _, _, word in headings] == words
    for trial, _, word in headings:
        assert f"{word}</text>" in picture
        assert trial[:20] in picture


def test_every_number_comes_from_the_files(folder: Path) -> None:
    path = folder / "selective-attention" / "tiny.json"
    document = json.loads(path.read_text())
    document["effects"][1] |= {"effect": 0.1234, "low": 0.1114, "high": 0.1354, "n": 17}
    document["cost_ratio"] = {"wall_seconds": 3.25}
    path.write_text(json.dumps(document))
    page, _ = render_evidence(folder)
    row = next(line for line in page.splitlines() if line.startswith("| [selective-attention]("))
    for entry in (
        "+0.123 [+0.111, +0.135] bits per byte",
        "| 0.02 |",
        "| 17 |",
        "3.25× wall time",
        "18.07 against 18.61",
    ):
        assert entry in row


def test_references_and_other_settings_are_told_after_the_controls(folder: Path) -> None:
    path = folder / "selective-attention" / "tiny.json"
    document = json.loads(path.read_text())
    entry = document["effects"][0] | {"low": 0.1, "high": 0.3, "n": 7}
    document["references"] = [entry | {"control": "direct", "effect": 0.21}]
    document["settings"] = [entry | {"control": "short", "setting": "far", "effect": 0.22}]
    path.write_text(json.dumps(document))
    page, _ = render_evidence(folder)
    lines = [line for line in page.splitlines() if line.startswith(("- against", "- reference", "- setting"))]
    place = lines.index("- reference direct: +0.21 [+0.10, +0.30] bits per byte, n 7")
    assert lines[place + 1] == "- setting far, against short: +0.22 [+0.10, +0.30] bits per byte, n 7"
    assert lines[place - 1].startswith("- against ")


def test_the_same_files_give_the_same_text(folder: Path) -> None:
    assert render_evidence(folder) == render_evidence(folder)


def test_the_picture_is_one_svg_with_both_grounds_and_no_reference_outside(folder: Path) -> None:
    _, picture = render_evidence(folder)
    root = ElementTree.fromstring(picture)
    assert root.tag.endswith("svg")
    assert root.get("role") == "img"
    assert "contradicted" in (root.get("aria-label") or "")
    assert "prefers-color-scheme: dark" in picture
    assert not re.search(r"url\((?!#)|<image|<script|@import", picture)


def test_the_effect_is_drawn_in_units_of_the_margin_between_its_bounds(folder: Path) -> None:
    from trialist.engine.evidence import row_of

    document = next(entry for entry in load_evidence(folder) if entry["verdict"] == "contradicted")
    scaled = row_of(document)["scaled"]
    assert scaled["effect"] == pytest.approx(-0.05 / 0.02)
    assert scaled["low"] == pytest.approx(-0.071 / 0.02)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", r"bad\.json: not JSON"),
        ("[]", r"bad\.json: schema None, this version reads 1"),
        ('{"schema": 2}', r"bad\.json: schema 2, this version reads 1"),
        ('{"schema": 1, "trial": "x"}', r"bad\.json: lacks preset, claim"),
    ],
)
def test_a_broken_file_is_named(folder: Path, text: str, message: str) -> None:
    (folder / "key-norm" / "bad.json").write_text(text)
    with pytest.raises(ValueError, match=message):
        load_evidence(folder)


def test_a_missing_folder_says_how_to_make_it(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="--save-evidence"):
        load_evidence(tmp_path / "none")


def test_a_folder_without_results_says_so(tmp_path: Path) -> None:
    page, picture = render_evidence(tmp_path)
    assert "Nothing was measured yet" in page
    ElementTree.fromstring(picture)
