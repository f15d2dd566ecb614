"""Items and training rows of the tests of contamination, and a call of the analysis."""

from __future__ import annotations

import json
from pathlib import Path

from trialist.analysis.contamination import ContaminationAnalysis

WORDS = [f"word{number}" for number in range(40)]
WHOLE, HALF, FREE = (
    " ".join(WORDS[:20]),
    " ".join(WORDS[20:40]),
    "quite other words stand in here and none of them is there",
)


def analysed(say=lambda _: None, **given) -> dict:
    """The report of a run, whose files replace those of the run before."""
    options = {"train": ("train.jsonl",), "benchmarks": ("items.jsonl",), "output": "contamination"} | given
    for file in Path().glob("contamination.*"):
        if file.is_file():
            file.unlink()
    ContaminationAnalysis(**options)(say=say)
    return json.loads(Path(options["output"] + ".json").read_text())
