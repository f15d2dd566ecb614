"""`trialist generate --model M --prompt ...`: text of a model under any generation options, streamed, or a file of it."""

from __future__ import annotations

import dataclasses
import re
import secrets
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trialist.cli._arguments import print_json
from trialist.cli._generation import load, parse_generation, require_model
from trialist.decoding.settings import Settings

CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")
"""Characters with which a text could steer the terminal"""


@dataclass(frozen=True)
class Options:
    """Generate text with a model that you have, under any decoding techniques, freely combined: streamed for one prompt, in
    batches for several or for a file. Without a prompt it reads standard input; on a terminal it is a chat."""

    model: str | None = None
    """Hub id, local folder or asset of a causal language model"""
    prompt: tuple[str, ...] = ()
    """What to answer, or with --raw to go on with; may be given several times; - reads standard input"""
    file: str | None = None
    """File of prompts: a line each (.txt), or rows with a column `prompt` or `messages` (.jsonl, .json, .parquet)"""
    output: str | None = None
    """JSONL file for the continuations of --file; the same command goes on where it was ended"""
    system: str | None = None
    """Instruction before the conversation"""
    raw: bool = False
    """Go on with the text as it is, also where the model has a chat template"""
    batch: int = 8
    """Prompts generated together, of similar lengths"""
    dtype: str = "float32"
    """float32, bfloat16, float16, float64, or auto: the saved one"""
    device: str = "auto"
    """auto, cpu, cuda, cuda:1, ..."""
    json: bool = False
    """Print JSON: texts, why each ended, numbers of tokens, what options report"""


def main(arguments: Sequence[str]) -> int:
    options, settings = parse_generation(Options, "generate", arguments)
    try:
        return work(options, settings)
    except KeyboardInterrupt:
        note("interrupted")
        return 130


def work(options: Options, settings: Settings) -> int:
    name = require_model(options.model, "generate")
    if options.batch < 1:
        raise ValueError(f"--batch must be at least 1, not {options.batch}")
    if options.file is not None and options.prompt:
        raise ValueError("--file and --prompt both say what to generate from; give one of them")
    if options.output is not None and options.file is None:
        raise ValueError("--output is for the continuations of --file; redirect standard output for those of --prompt")
    if options.json and options.output is not None:
        raise ValueError("--output holds JSON already; leave out --json")
    chats = options.file is None and not options.prompt and sys.stdin.isatty()
    said = None if chats or options.file is not None else given(options)
    if options.file is not None:
        from trialist.decoding.prompt_files import read_prompts

        rows = read_prompts(options.file)
    model, tokenizer = load(name, options.dtype, options.device)
    settings.sampling.arguments(model)
    from trialist.decoding.prompt_files import Writing, encode_all

    writing = Writing(tokenizer, options.raw, options.system)
    if options.file is not None:
        return of_file(model, name, options, settings, writing, encode_all(writing, rows, options.file))
    if said is None:
        if options.json:
            raise ValueError("--json needs a prompt: --prompt, --file, or text on standard input")
        return chat(model, settings, writing)
    prompts = [writing.prompt(text) for text in said]
    if len(prompts) == 1 and settings.sampling.num_sequences == 1 and not options.json:
        return 130 if streamed(model, settings, writing, prompts[0])[1] else 0
    return of_several(model, options, settings, writing, prompts)


def given(options: Options) -> list[str]:
    """The prompts of the command line, or of standard input."""
    said = list(options.prompt) or ["-"]
    if said.count("-") > 1:
        raise ValueError("--prompt - reads standard input, which is there once")
    said = [sys.stdin.read().removesuffix("\n") if text == "-" else text for text in said]
    for number, text in enumerate(said, start=1):
        if not text.strip():
            where = "on standard input" if not options.prompt else f"(the {number}. --prompt)"
            raise ValueError(f"the prompt is empty {where}; give one with --prompt, --file, or on standard input")
    return said


def streamed(model: Any, settings: Settings, writing: Any, prompt: Any) -> tuple[str, bool]:
    """Prints the continuation as it comes, then statistics; returns it, and whether it was interrupted."""
    from trialist.decoding.running import run

    pieces: list[str] = []

    def show(row: int, text: str, logprobs: Any) -> None:
        pieces.append(text)
        sys.stdout.write(visible(text))
        sys.stdout.flush()

    interrupted, batch = False, None
    try:
        batch = run(model, writing.tokenizer, settings, [prompt], tell=show)
    except KeyboardInterrupt:
        interrupted = True
    sys.stdout.write("\n")
    sys.stdout.flush()
    if batch is None:
        note("interrupted")
    else:
        note(statistics(model, settings, [prompt], [batch]))
    return "".join(pieces), interrupted


def of_several(model: Any, options: Options, settings: Settings, writing: Any, prompts: list[Any]) -> int:
    """Several prompts or continuations, or one as JSON."""
    from trialist.decoding.prompt_files import describe_row, rows_of, run_all

    settings = with_seed(model, settings)
    found: list[tuple[int, int, Any]] = []
    batches = []
    with Bar(len(prompts)) as bar:
        for numbers, batch in run_all(model, writing.tokenizer, settings, prompts, options.batch):
            found += rows_of(numbers, batch)
            batches.append(batch)
            bar.advance(len(numbers))
    found.sort(key=lambda entry: entry[:2])
    if options.json:
        results = [
            {"row": number, "sample": sample} | describe_row(prompts[number], row) for number, sample, row in found
        ]
        print_json({
            "model": options.model, "decoding": settings.sampling.describe(model), "seed": batches[0].seed,
            "options": settings.asked(), "results": results, "statistics": measured(prompts, batches),
        })  # fmt: skip
        return 0
    several = settings.sampling.num_sequences > 1
    for number, sample, row in found:
        sys.stdout.write(f"[{number + 1}{f'.{sample + 1}' if several else ''}] {visible(row.text)}\n")
    note(statistics(model, settings, prompts, batches))
    return 0


def of_file(model: Any, name: str, options: Options, settings: Settings, writing: Any, prompts: list[Any]) -> int:
    """Continuations of a file, to another one that is resumed, or as lines of JSON."""
    import json

    from trialist.decoding.prompt_files import (
        ResultFile,
        describe_row,
        generate_file,
        rows_of,
        run_all,
        settings_digest,
    )  # fmt: skip

    asked, batches = settings, []
    settings = with_seed(model, settings)
    if options.output is None:
        with Bar(len(prompts)) as bar:
            for numbers, batch in run_all(model, writing.tokenizer, settings, prompts, options.batch):
                for number, sample, row in sorted(rows_of(numbers, batch), key=lambda entry: entry[:2]):
                    record = {"row": number, "sample": sample} | describe_row(prompts[number], row)
                    sys.stdout.write(json.dumps(record, ensure_ascii=False) + "\n")
                sys.stdout.flush()
                batches.append(batch)
                bar.advance(len(numbers))
        note(statistics(model, settings, prompts, batches))
        return 0
    from trialist.models.loading import model_digest

    digest = settings_digest(model_digest(name), options.dtype, options.batch, writing.chats, asked)
    results = ResultFile(Path(options.output).expanduser(), digest, prompts, settings.sampling.num_sequences)
    with Bar(len(prompts), len(results.done)) as bar:

        def progress(done: int, batch: Any) -> None:
            batches.append(batch)
            bar.advance(done - bar.done)

        try:
            held = generate_file(model, writing.tokenizer, settings, prompts, options.batch, results, progress)
        except KeyboardInterrupt:
            note("interrupted; the same command goes on from the last batch")
            return 130
    if held:
        note(f"{held} of {len(prompts)} prompts were in {options.output} already")
    note(f"{options.output}: {len(prompts)} prompts; {statistics(model, settings, prompts, batches)}")
    return 0


def chat(model: Any, settings: Settings, writing: Any) -> int:
    """A conversation on the terminal; Ctrl-C ends an answer, Ctrl-D the conversation."""
    if not writing.chats:
        raise ValueError("which prompt? --prompt, --file, or text on standard input; a chat needs a chat template")
    note(f"chat ({settings.sampling.describe(model)}); Ctrl-C ends an answer, Ctrl-D the chat")
    messages: list[dict[str, str]] = []
    while True:
        try:
            said = input("> ")
        except EOFError:
            sys.stdout.write("\n")
            return 0
        if said.strip():
            try:
                answer, _ = streamed(
                    model, settings, writing, writing.prompt([*messages, {"role": "user", "content": said}])
                )
            except ValueError as error:
                note(f"error: {error}")
                continue
            messages += [{"role": "user", "content": said}, {"role": "assistant", "content": answer}]


def with_seed(model: Any, settings: Settings) -> Settings:
    """The settings with a seed to tell, where one is drawn."""
    if settings.sampling.seed is not None or not settings.sampling.samples(model):
        return settings
    return dataclasses.replace(settings, sampling=dataclasses.replace(settings.sampling, seed=secrets.randbits(32)))


def measured(prompts: Sequence[Any], batches: Sequence[Any]) -> dict[str, Any]:
    """Totals over batches; the largest cache; means over rows of what options report as numbers."""
    rows = [row for batch in batches for row in batch.rows]
    seconds, tokens = sum(batch.seconds for batch in batches), sum(batch.tokens for batch in batches)
    found: dict[str, Any] = {
        "prompt_tokens": sum(len(prompt.token_ids) for prompt in prompts), "tokens": tokens, "seconds": round(seconds, 3),
        "tokens_per_second": round(tokens / seconds, 2) if seconds else None,
        "cache_bytes": max((batch.report.get("cache_bytes", 0) for batch in batches), default=0) or None,
    }  # fmt: skip
    for name in sorted({name for row in rows for name in row.report}):
        values = [row.report[name] for row in rows if isinstance(row.report.get(name), int | float)]
        if values:
            found[name] = sum(values) / len(values)
    return found


def statistics(model: Any, settings: Settings, prompts: Sequence[Any], batches: Sequence[Any]) -> str:
    """One line: tokens, pace, how tokens were chosen, why it ended, what options report."""
    found = measured(prompts, batches)
    if not batches:
        return settings.sampling.describe(model)
    rows = [row for batch in batches for row in batch.rows]
    parts = [f"{found['prompt_tokens']:,} prompt tokens, {found['tokens']:,} new in {found['seconds']:.1f} s"]
    parts[0] += f" ({found['tokens_per_second']} tokens/s)"
    parts.append(settings.sampling.describe(model))
    seed = settings.sampling.seed if settings.sampling.seed is not None else batches[0].seed
    parts += [f"seed {seed}"] if settings.sampling.samples(model) else []
    reasons = {reason: sum(row.finish == reason for row in rows) for reason in ("stop", "length")}
    if len(rows) == 1:
        parts.append(f"ended by {rows[0].finish}")
    else:
        parts.append(", ".join(f"{count} ended by {reason}" for reason, count in reasons.items() if count))
    if found["cache_bytes"]:
        parts.append(f"cache {found['cache_bytes'] / 1e6:.1f} MB")
    known = ("prompt_tokens", "tokens", "seconds", "tokens_per_second", "cache_bytes")
    return "; ".join(
        parts + [f"{name.replace('_', ' ')} {value:.4g}" for name, value in found.items() if name not in known]
    )


def visible(text: str) -> str:
    """Text that is safe to show on a terminal; unchanged elsewhere."""
    return CONTROL.sub("", text) if sys.stdout.isatty() else text


def note(text: str) -> None:
    print(text, file=sys.stderr)


class Bar:
    """A progress bar on stderr for several prompts; nothing where stderr is no terminal."""

    def __init__(self, total: int, done: int = 0) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        self.done = done
        columns = (TextColumn("prompts"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        console = Console(stderr=True)
        self._progress = Progress(*columns, console=console, disable=total < 2 or not console.is_terminal)
        self._task = self._progress.add_task("prompts", total=total, completed=done)

    def __enter__(self) -> Bar:
        self._progress.start()
        return self

    def __exit__(self, *_: Any) -> None:
        self._progress.stop()

    def advance(self, count: int) -> None:
        self.done += count
        self._progress.advance(self._task, count)
