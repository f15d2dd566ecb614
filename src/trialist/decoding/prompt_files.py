"""A file of prompts to a file of continuations: batches of similar lengths, resumed after any end.

Batches depend on the prompts and settings alone, and each draws from a seed of its own, so a resumed file holds what an
uninterrupted one would.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import secrets
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from trialist.data.files import ROW_SUFFIXES, TEXT_SUFFIXES, json_rows, read_parquet, read_text, suffix_of
from trialist.decoding.prompts import Messages, Prompt, chat_prompt, text_prompt, token_limit
from trialist.decoding.running import Batch, Continuation, run
from trialist.decoding.settings import Settings

HEAD = '{"settings": "'
"""How every line of a file of ours begins"""


@dataclass(frozen=True)
class Writing:
    """How prompts become tokens. raw: as text to go on with, also where the model has a chat template."""

    tokenizer: PreTrainedTokenizerBase
    raw: bool = False
    system: str | None = None
    """Instruction before every conversation that has none"""

    def __post_init__(self) -> None:
        if self.system is not None and not self.chats:
            why = "--raw leaves out" if self.raw else "the model lacks"
            raise ValueError(f"--system is an instruction of the chat template, which {why}; leave it out")

    @property
    def chats(self) -> bool:
        return not self.raw and self.tokenizer.chat_template is not None

    def prompt(self, said: str | Messages) -> Prompt:
        """Raises ValueError for a prompt that is empty, or a conversation where text is wanted."""
        if isinstance(said, str) and not said.strip():
            raise ValueError("the prompt is empty")
        if not self.chats:
            if not isinstance(said, str):
                raise ValueError("the prompt is a conversation, which needs a chat template; give text")
            return text_prompt(self.tokenizer, said)
        messages = [{"role": "user", "content": said}] if isinstance(said, str) else list(said)
        if self.system is not None and messages and messages[0]["role"] != "system":
            messages = [{"role": "system", "content": self.system}, *messages]
        return chat_prompt(self.tokenizer, messages)


def read_prompts(file: str) -> list[tuple[str, str | Messages]]:
    """(place, prompt) of every line of a text file, or of rows with a column `prompt` (text or messages) or `messages`.

    Raises FileNotFoundError, or ValueError with the line or row that is wrong.
    """
    path = Path(file).expanduser()
    if not path.is_file():
        raise FileNotFoundError(f"no such file: {file}")
    suffix = suffix_of(path)
    if suffix in TEXT_SUFFIXES:
        lines = read_text(path).split("\n")
        found: list[tuple[str, str | Messages]] = [
            (f"line {number}", line.rstrip("\r")) for number, line in enumerate(lines, start=1) if line.strip()
        ]
    elif suffix in ROW_SUFFIXES:
        rows = (
            [(f"row {number}", dict(row)) for number, row in enumerate(read_parquet(path), start=1)]
            if suffix == ".parquet"
            else json_rows(path)
        )
        found = [(place, _said(row, f"{file} {place}")) for place, row in rows]
    else:
        raise ValueError(f"{file}: a text file (a prompt a line), JSONL, JSON or Parquet is expected")
    if not found:
        raise ValueError(f"{file} holds no prompts")
    return found


def _said(row: Mapping[str, Any], where: str) -> str | Messages:
    said = row.get("prompt") if row.get("prompt") is not None else row.get("messages")
    if isinstance(said, str):
        return said
    if said is None:
        raise ValueError(f"{where}: a column `prompt` or `messages` is expected; found {', '.join(row) or 'nothing'}")
    if not isinstance(said, list) or not all(
        isinstance(turn, dict) and isinstance(turn.get("role"), str) and isinstance(turn.get("content"), str)
        for turn in said
    ):
        raise ValueError(f"{where}: the prompt must be text, or messages with `role` and `content` each")
    return [{"role": turn["role"], "content": turn["content"]} for turn in said]


def encode_all(writing: Writing, said: Sequence[tuple[str, str | Messages]], name: str) -> list[Prompt]:
    """Raises ValueError that names the place of a prompt that cannot be used."""
    prompts = []
    for place, text in said:
        try:
            prompts.append(writing.prompt(text))
        except ValueError as error:
            raise ValueError(f"{name} {place}: {error}") from error
    return prompts


def run_all(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    settings: Settings,
    prompts: Sequence[Prompt],
    batch_size: int,
    done: frozenset[int] = frozenset(),
) -> Iterator[tuple[list[int], Batch]]:
    """(numbers of the prompts, batch) of all batches that are not `done` already, the longest prompts first.

    Raises ValueError before the first batch for a prompt that does not fit into the context.
    """
    for number, prompt in enumerate(prompts):
        try:
            token_limit(model, prompt, settings.sampling.max_new_tokens)
        except ValueError as error:
            raise ValueError(f"prompt {number + 1}: {error}") from error
    order = sorted(range(len(prompts)), key=lambda number: (-len(prompts[number].token_ids), number))
    seed = settings.sampling.seed
    if seed is None:
        seed = secrets.randbits(32)
    for start in range(0, len(order), batch_size):
        numbers = order[start : start + batch_size]
        if done.issuperset(numbers):
            continue
        shifted = (seed + start + 2**63) % 2**64 - 2**63  # stays within 64 bits
        sampling = dataclasses.replace(settings.sampling, seed=shifted)
        own = dataclasses.replace(settings, sampling=sampling)
        yield numbers, run(model, tokenizer, own, [prompts[number] for number in numbers])


def rows_of(numbers: Sequence[int], batch: Batch) -> list[tuple[int, int, Continuation]]:
    """(number of the prompt, number of the sample, continuation)."""
    samples = len(batch.rows) // len(numbers)
    return [(numbers[at // samples], at % samples, row) for at, row in enumerate(batch.rows)]


def settings_digest(*parts: Any) -> str:
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:16]


def describe_row(prompt: Prompt, row: Continuation) -> dict[str, Any]:
    """What is stored and printed of a continuation."""
    return {
        "prompt": prompt.content,
        "text": row.text,
        "finish_reason": row.finish,
        "prompt_tokens": len(prompt.token_ids),
        "tokens": len(row.tokens),
        **row.report,
    }


class ResultFile:
    """JSON lines, one a continuation, in the order in which they were finished until all are there; then in that of the prompts.

    Raises ValueError where the file holds something else, or results of other settings or prompts.
    """

    def __init__(self, path: Path, digest: str, prompts: Sequence[Prompt], samples: int) -> None:
        self.path, self.digest, self.prompts, self.samples = path, digest, prompts, samples
        self.lines: dict[tuple[int, int], str] = {}
        if not path.parent.is_dir():
            raise FileNotFoundError(f"--output {path}: its folder does not exist")
        if path.exists():
            self._read()

    @property
    def done(self) -> frozenset[int]:
        """Prompts of which all continuations are there."""
        return frozenset(
            number
            for number in range(len(self.prompts))
            if all((number, sample) in self.lines for sample in range(self.samples))
        )

    def add(self, results: Sequence[tuple[int, int, Continuation]]) -> None:
        """Appends what is not there yet, so that it outlives a kill."""
        with self.path.open("a", encoding="utf-8") as out:
            for number, sample, row in results:
                if (number, sample) not in self.lines:
                    record = {"settings": self.digest, "row": number, "sample": sample}
                    line = json.dumps(record | describe_row(self.prompts[number], row), ensure_ascii=False)
                    self.lines[number, sample] = line
                    out.write(line + "\n")
            out.flush()
            os.fsync(out.fileno())

    def finish(self) -> None:
        """Puts the lines into the order of the prompts, in one step."""
        whole = self.path.with_name(self.path.name + ".unfinished")
        whole.write_text("".join(self.lines[key] + "\n" for key in sorted(self.lines)), encoding="utf-8")
        os.replace(whole, self.path)

    def _read(self) -> None:
        if not self.path.is_file():
            raise ValueError(f"--output {self.path} is no file")
        other = f"--output {self.path} exists and holds"
        content = self.path.read_bytes()
        whole = content[: content.rfind(b"\n") + 1]
        torn = content[len(whole) :].decode("utf-8", "replace")
        if not torn.startswith(HEAD[: len(torn)]):
            raise ValueError(f"{other} something else than results; give another file")
        for number, line in enumerate(whole.decode("utf-8", "replace").split("\n")[:-1], start=1):
            try:
                record = json.loads(line)
                key = (record["row"], record["sample"])
                digest, prompt = record["settings"], record["prompt"]
            except (ValueError, KeyError, TypeError) as error:
                raise ValueError(f"{other} something else than results (line {number}); give another file") from error
            if digest != self.digest:
                raise ValueError(f"{other} results of another model or other settings; give another file, or delete it")
            if not (0 <= key[0] < len(self.prompts)) or self.prompts[key[0]].content != prompt:
                raise ValueError(f"{other} results of other prompts (line {number}); give another file, or delete it")
            self.lines[key] = line
        if torn:  # the last line of a run that was killed while it wrote
            os.truncate(self.path, len(whole))


Progress = Callable[[int, Batch], None]


def generate_file(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    settings: Settings,
    prompts: Sequence[Prompt],
    batch_size: int,
    results: ResultFile,
    progress: Progress = lambda done, batch: None,
) -> int:
    """Writes the continuations of all prompts that `results` lacks; returns how many prompts it held already."""
    held = results.done
    for numbers, batch in run_all(model, tokenizer, settings, prompts, batch_size, held):
        results.add(rows_of(numbers, batch))
        progress(len(results.done), batch)
    results.finish()
    return len(held)
