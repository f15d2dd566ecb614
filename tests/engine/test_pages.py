"""What was measured, written by the tool into pages about techniques."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from trialist.cli.main import main
from trialist.engine.pages import END, fill, render_pages
from trialist.engine.summary import write_evidence

from . import synthetic_trials as made

PAGE = """# A technique

<!-- measured: selective-attention nothing-yet -->
a number that somebody typed: 12.34
<!-- end of what was measured -->

Words of a person.
"""


@pytest.fixture
def folders(tmp_path: Path) -> tuple[Path, Path]:
    document = made.document()
    write_evidence(document, tmp_path / "evidence" / document["trial"], document["preset"])
    (tmp_path / "docs" / "deep").mkdir(parents=True)
    (tmp_path / "docs" / "deep" / "page.md").write_text(PAGE)
    (tmp_path / "docs" / "plain.md").write_text("# No marks\n")
    return tmp_path / "docs", tmp_path / "evidence"


def test_only_what_stands_between_the_marks_is_written_anew(folders: tuple[Path, Path]) -> None:
    ((path, text),) = render_pages(*folders).items()
    assert path.name == "page.md"
    head, rest = text.split("<!-- measured: selective-attention nothing-yet -->\n")
    body, tail = rest.split(END)
    assert head == "# A technique\n\n"
    assert tail == "\n\nWords of a person.\n"
    assert "12.34" not in body
    assert "`nothing-yet` is not measured yet" in body
    path.write_text(text)
    assert render_pages(*folders) == {path: text}


def test_verdict_effects_and_means_are_those_of_the_file(folders: tuple[Path, Path]) -> None:
    path = folders[1] / "selective-attention" / "tiny.json"
    document = json.loads(path.read_text())
    document["effects"][1] |= {"effect": 0.1234, "low": 0.1114, "high": 0.1354, "n": 17}
    for arm in document["arms"]:
        if arm["setting"] == "main" and arm["role"] == "treatment":
            arm["endpoints"][document["endpoint"]] = [4.0, 4.25, None, 4.5]
    path.write_text(json.dumps(document))
    (text,) = render_pages(*folders).values()
    assert "**`selective-attention` (tiny): ✔ supported.** Over training seeds" in text
    assert "- against standard attention, twice the heads: +0.123 [+0.111, +0.135] bits per byte, n 17" in text
    row = next(line for line in text.splitlines() if line.startswith("| selective attention (treatment)"))
    assert "| 4.25 ± 0.25 |" in row


def test_readings_of_one_arm_over_one_range_are_one_table(folders: tuple[Path, Path]) -> None:
    path = folders[1] / "selective-attention" / "tiny.json"
    document = json.loads(path.read_text())

    def curve(arm: str, metric: str, *points: tuple[float, float]) -> dict[str, object]:
        return {"setting": "main", "arm": arm, "metric": metric, "seeds": 6, "points": points}

    treatment, control = "selective attention", "standard attention"
    document["curve_means"] = [
        curve(treatment, "loss_by_depth", (1, 0.5), (2, 0.25)),
        curve(treatment, "gain_by_depth", (1, 7.0), (2, 9.0)),
        curve(treatment, "score_by_size", (10, 1.5), (20, 2.5)),
        curve(control, "score_by_size", (10, 1.0), (20, 2.0)),
        curve(treatment, "speed_by_load", (1, 1.0)),
        curve(control, "speed_by_load", (3, 2.0)),
    ]
    path.write_text(json.dumps(document))
    (text,) = render_pages(*folders).values()
    lines = text.splitlines()
    at = lines.index(f"| {treatment}, by depth | 1 | 2 |")
    assert lines[at + 2 : at + 4] == ["| loss | 0.500 | 0.250 |", "| gain | 7.00 | 9.00 |"]
    at = lines.index("| score, by size | 10 | 20 |")
    assert lines[at + 2 : at + 4] == [f"| {treatment} | 1.50 | 2.50 |", f"| {control} | 1.00 | 2.00 |"]
    at = lines.index("speed by load:")
    assert [line for line in lines[at:] if line.startswith("- ")] == [
        f"- {treatment}: 1: 1.00",
        f"- {control}: 3: 2.00",
    ]


def test_marks_that_name_nothing_or_never_end_are_refused() -> None:
    with pytest.raises(ValueError, match=r"docs/x\.md: <!-- measured:  --> names no trial"):
        fill(f"<!-- measured:  -->\n{END}\n", {}, "docs/x.md")
    with pytest.raises(ValueError, match=r"<!-- measured: a --> has no <!-- end"):
        fill("<!-- measured: a -->\n", {})
    with pytest.raises(ValueError, match=r"<!-- measured: a --> has no <!-- end"):
        fill(f"<!-- measured: a -->\n<!-- measured: b -->\n{END}\n", {})


def test_the_command_writes_pages_and_checks_them(folders: tuple[Path, Path], monkeypatch, capsys) -> None:
    docs, evidence = folders
    monkeypatch.chdir(docs.parent)
    command = ["evidence", "--folder", str(evidence), "--output", "EVIDENCE.md", "--pages", str(docs)]
    assert main([*command, "--check"]) == 1
    assert "page.md" in capsys.readouterr().out
    assert main(command) == 0
    assert main([*command, "--check"]) == 0
    assert main(["evidence", "--folder", str(evidence), "--pages", "nowhere"]) == 2
