"""The folder a recipe writes: checkpoints while it runs, then a model folder that is there whole or not at all."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

CHECKPOINT = re.compile(r"checkpoint-(\d+)")
LAST = ("adapter_config.json", "config.json")
"""Files without which no model is found in a folder: they come last"""


@dataclass(frozen=True)
class ModelOutput:
    """`folder/checkpoint/` until `write` has put the model into `folder`, with `training.json` beside it.

    settings: what made the model, in JSON types. A folder of other settings, or with foreign files, is refused with
    ValueError.
    """

    folder: Path
    settings: Mapping[str, Any]

    @property
    def checkpoints(self) -> Path:
        return self.folder / "checkpoint"

    def finished(self) -> dict[str, Any] | None:
        """What an earlier run of the same settings returned, if it came to its end."""
        if self.folder.exists() and not self.folder.is_dir():
            raise ValueError(f"--output {self.folder} is a file; give a folder")
        record = self.folder / "training.json"
        if record.is_file():
            stored = json.loads(record.read_text(encoding="utf-8"))
            self._compare(stored["settings"], "holds a finished model")
            return stored["result"]
        settings = self.checkpoints / "settings.json"
        if settings.is_file():
            self._compare(json.loads(settings.read_text(encoding="utf-8")), "holds an interrupted run")
        elif self.folder.is_dir() and (
            found := sorted(path.name for path in self.folder.iterdir() if _has_content(path))
        ):
            raise ValueError(
                f"--output {self.folder} is not empty (it holds {', '.join(found[:4])}); give a new folder, so that nothing "
                "is overwritten"
            )
        return None

    def start(self, say: Callable[[str], None]) -> str | None:
        """Makes the folder and returns the newest whole checkpoint, if there is one. Torn ones are removed."""
        self.checkpoints.mkdir(parents=True, exist_ok=True)
        newest: Path | None = None
        for path in sorted(self.checkpoints.iterdir(), key=_step):
            if _step(path) < 0:
                continue
            if _is_whole(path):
                newest = path
            else:
                say(f"note: {path} was being written when the run ended, so it is left out")
                shutil.rmtree(path, ignore_errors=True)  # other ranks may be at it too
        if newest is None:
            _write_json(self.checkpoints / "settings.json", self.settings)
            return None
        say(f"goes on from step {_step(newest)}")
        return str(newest)

    def write(self, model: Any, tokenizer: Any, result: Mapping[str, Any], *, merge: bool) -> None:
        """Model and tokenizer as a Hugging Face folder, adapters merged or alone; removes the checkpoints."""
        staging = self.checkpoints / "model"
        shutil.rmtree(staging, ignore_errors=True)
        model.config.use_cache = True  # the Trainer switches it off, and generation would be slow
        saved = model.merge_and_unload() if merge and hasattr(model, "merge_and_unload") else model
        saved.save_pretrained(staging)
        tokenizer.save_pretrained(staging)
        for path in sorted(staging.iterdir(), key=lambda path: (path.name in LAST, path.name)):
            os.replace(path, self.folder / path.name)
        _write_json(self.folder / "training.json", {"settings": self.settings, "result": result})
        shutil.rmtree(self.checkpoints)

    def _compare(self, stored: Mapping[str, Any], what: str) -> None:
        given = json.loads(json.dumps(self.settings))
        differing = [key for key in {**stored, **given} if stored.get(key) != given.get(key)]
        if differing:
            words = "; ".join(f"{key}: {stored.get(key)!r} there, {given.get(key)!r} now" for key in differing)
            raise ValueError(
                f"--output {self.folder} {what} of other settings ({words}); take up the old settings, or give another folder"
            )


def _step(path: Path) -> int:
    match = CHECKPOINT.fullmatch(path.name)
    return int(match[1]) if match else -1


def _has_content(path: Path) -> bool:
    return not path.is_dir() or any(path.iterdir())


def _is_whole(checkpoint: Path) -> bool:
    """The Trainer writes its state last."""
    try:
        return json.loads((checkpoint / "trainer_state.json").read_text(encoding="utf-8"))["global_step"] == _step(
            checkpoint
        )
    except (OSError, ValueError, KeyError):
        return False


def _write_json(path: Path, content: Any) -> None:
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    os.replace(temporary, path)
