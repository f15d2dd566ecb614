from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.analysis.contamination_data import FREE, HALF, WHOLE, WORDS


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    questions = [WHOLE, HALF, FREE, "too short", ""]
    rows = [{"id": f"q{number}", "question": text} for number, text in enumerate(questions)]
    Path("items.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    train = [
        {"prompt": f"<b>Say:</b> {WHOLE.upper()} & go", "completion": "x"},
        {"prompt": " ".join(WORDS[20:30]), "completion": "x"},
        {"prompt": "that is too short, he said", "completion": FREE},
        {"prompt": None, "completion": WHOLE},
    ]
    Path("train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in train))
    return tmp_path
