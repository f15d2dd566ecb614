from __future__ import annotations

import dataclasses
import json
import re
import subprocess
import sys
from typing import Any

import pytest

from trialist.cli._entries import load_entry
from trialist.cli.main import main
from trialist.training.recipe import Recipe
from trialist.training.recipes import RECIPES

LOOKING_AROUND = """
import sys
from trialist.cli.main import main
for arguments in (["train"], ["train", "sft", "--help"], ["train", "sftt"]):
    try: main(arguments)
    except SystemExit: pass
print("loaded", *({"torch", "transformers", "datasets", "sqlalchemy", "scipy", "numpy"} & set(sys.modules)))
"""


def call(capsys, *arguments: str) -> tuple[int, str, str]:
    try:
        code = main(arguments)
    except SystemExit as stop:
        code = int(stop.code or 0)
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def test_looking_around_loads_no_heavy_library():
    result = subprocess.run([sys.executable, "-c", LOOKING_AROUND], capture_output=True, text=True, check=True)
    assert result.stdout.splitlines()[-1] == "loaded"
    assert "Did you mean 'sft'?" in result.stderr


def test_without_a_name_the_recipes_are_listed(capsys):
    code, out, _ = call(capsys, "train")
    assert code == 0
    for name in RECIPES:
        assert f"  {name} " in out
    assert call(capsys, "train", "--model", "x")[0] == 2


@pytest.mark.parametrize("name", RECIPES)
def test_help_shows_every_option_with_a_sentence_and_its_default(capsys, name):
    code, out, _ = call(capsys, "train", name, "--help")
    assert code == 0
    words = " ".join(out.replace("│", " ").split())
    for field in dataclasses.fields(load_entry(RECIPES[name])):
        option = f"--{field.name.replace('_', '-')}"
        option = option.replace("--", "--no-", 1) if field.default is True else option
        assert option in words
        if field.default is not dataclasses.MISSING and isinstance(field.default, int | float):
            assert f"default: {field.default}" in words


@pytest.mark.parametrize("name", ["sft", "preference", "reward", "rlvr"])
def test_help_shows_what_must_be_given_then_what_is_the_recipes_own_then_the_rest(capsys, name):
    _, out, _ = call(capsys, "train", name, "--help")
    shown = re.findall(r"^. --(?:no-)?([a-z-]+)", out, flags=re.MULTILINE)
    fields = dataclasses.fields(load_entry(RECIPES[name]))
    common = {field.name.replace("_", "-") for field in dataclasses.fields(Recipe)}
    assert sorted(shown) == sorted(field.name.replace("_", "-") for field in fields)
    assert shown[:3] == ["model", "data", "output"]
    own = [option for option in shown[3:] if option not in common]
    assert shown[3 : 3 + len(own)] == own
    assert own


@dataclasses.dataclass(frozen=True)
class Echo:
    """Says what it was given."""

    text: str
    """What to say"""
    times: int = 1
    """How often"""

    def __call__(self, say: Any = print) -> dict[str, Any]:
        if self.times < 0:
            raise KeyboardInterrupt
        say("working")
        return {"text": self.text * self.times, "length": len(self.text)}


def test_a_recipe_is_parsed_called_and_its_result_printed(capsys, monkeypatch):
    monkeypatch.setitem(RECIPES, "echo", f"{__name__}:Echo")
    code, out, err = call(capsys, "train", "echo", "--text", "[ab]", "--times", "2")
    assert code == 0
    assert out == "text    [ab][ab]\nlength  4\n"
    assert err == "working\n"
    assert call(capsys, "train", "echo")[0] == 2
    code, _, err = call(capsys, "train", "echo", "--text", "a", "--times=-1")
    assert code == 130
    assert "goes on from the last checkpoint" in err


def test_errors_of_sft_are_said_and_exit_with_2(capsys, tmp_path):
    missing = tmp_path / "rows.jsonl"
    missing.write_text(json.dumps({"prompt": "a", "completion": "b"}))
    required = [
        "train",
        "sft",
        "--model",
        str(tmp_path / "nowhere"),
        "--data",
        str(missing),
        "--output",
        str(tmp_path / "out"),
    ]
    code, _, err = call(capsys, *required)
    assert code == 2
    assert "does not exist" in err
    code, _, err = call(capsys, *required, "--steps", "0")
    assert code == 2
    assert "--steps must be at least 1, not 0" in err
    assert not (tmp_path / "out").exists()
