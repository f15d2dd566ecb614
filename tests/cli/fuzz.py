"""Random option sets and damaged files for the command line, and what must hold for each: words, never a bare traceback."""

from __future__ import annotations

import contextlib
import dataclasses
import gzip
import importlib
import io
import json
import os
import random
import signal
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from trialist.analysis.registry import ANALYSES
from trialist.cli._entries import load_entry
from trialist.cli.main import VERBS, main
from trialist.decoding.settings import Sampling, flag_classes
from trialist.engine.contract import Cost, Outcome
from trialist.engine.options import RunOptions
from trialist.engine.records import outcome_to_json
from trialist.engine.registry import load_path, load_trial
from trialist.weights.transforms import TRANSFORMS

SECONDS = 60
"""A case that takes longer hangs"""
TRAINS = ("train", "eval", "generate", "serve", "search", "apply", "analyze")
"""Verbs whose work is done in this process and cannot be cut: only their parsing is tried"""
ENTRIES = {
    "apply": {
        name: TRANSFORMS[name] for name in ("selective-attention", "prune-context", "param-delta", "extract-delta")
    },
    "analyze": {name: ANALYSES[name] for name in ("context-memory", "param-delta")},
}
"""Of them, those that read a model first, which little of the junk is"""
GENERATE = ("generate", "serve")
MODELS = ("model", "base_new", "post", "base")
"""Options that name one"""
TRIALS = ("coins", "dice", "selective-attention", "selective-recall")
JUNK = (
    "", " ", "0", "-1", "1", "3", "2.5", "-0.5", "1e400", "-1e400", "nan", "inf", "9" * 40, "1e-320", "0x10", "1_000",
    "true", "None", "[]", "{}", "{a:1}", "--", "-", "-h", "=", "a=b", "text=body", "text=", "*", "~", "~nobody/x", "..", ".",
    "ü", "日本語", "👩‍🔬", "\u202eevil", "\udcff", "a" * 5000, "tab\there", "line\nbreak", "[bold]markup[/bold]", "[/]",
    "%s%n", "$(id)", "../../x", "folder", "folder/none/deeper.txt", "good.jsonl", "good.txt", "empty.jsonl", "loop", "pipe",
    "closed/x", "/proc/self/nowhere", "coins", "tiny", "demo", "any", "3,5,8", "heads", "heads:lower", "cpu", "cuda",
)  # fmt: skip
NO_NUL = tuple(text for text in JUNK if "\0" not in text)


@dataclass
class Result:
    code: int | None
    output: str
    error: str
    crash: str | None

    def complaint(self) -> str | None:
        """What is wrong with it; None where it is a success or an error in words."""
        if self.crash:
            return self.crash
        if self.code not in (0, 1, 2):
            return f"exit code {self.code}"
        if "Traceback (most recent call last)" in self.output + self.error:
            return "a traceback in the output"
        if self.code == 2 and not (self.error + self.output).strip():
            return "exit code 2 without a word"
        return None


class InPlace:
    """A backend that makes up outcomes where runs would be trained."""

    slots = 2

    def __init__(self, *_: Any, **__: Any) -> None:
        self._waiting: list[Any] = []

    def start(self, task: Any) -> None:
        self._waiting.append(task)

    def poll(self, timeout: float) -> list[tuple[str, tuple]]:
        tasks, self._waiting = self._waiting, []
        return [(task.run, self.end_of(task)) for task in tasks]

    def end_of(self, task: Any) -> tuple:
        trial = load_path(task.path)
        chance = random.Random(f"{task.arm} {task.setting} {task.seed}")
        names = [endpoint.name for endpoint in trial.claim.endpoints]
        names += [trial.tuning.metric.name] if trial.tuning else []
        outcome = Outcome({name: chance.gauss(5.0, 0.1) for name in names}, cost=Cost(steps=3, tokens=30))
        return ("outcome", outcome_to_json(outcome), {"wall_seconds": 1.0, "threads": 1.0}, [])

    def stop(self, run: str) -> None:
        self._waiting = [task for task in self._waiting if task.run != run]

    def resident_bytes(self, run: str) -> int:
        return 0

    def close(self) -> None:
        self._waiting.clear()


def cut(patch: Any, *, figures: bool) -> None:
    """Runs end at once with made-up outcomes; nothing is downloaded, and no tuned values are shipped with a trial.

    figures: whether reports are drawn, which takes half of the time.
    """

    def refuse(*_: Any, **__: Any) -> None:
        raise OSError("no network in this test")

    for module in ("api", "estimate"):
        patch.setattr(f"trialist.engine.{module}.open_backend", lambda *_, **__: InPlace())
    patch.setattr("trialist.engine.repeat.LocalProcesses", InPlace)
    patch.setattr("trialist.engine.tuning.ship", lambda *_: "nowhere")
    patch.setattr("trialist.data.assets.fetch", refuse)
    if not figures:
        pictures = ("forest", "seeds", "curves", "ranges")
        patch.setattr("trialist.engine.report._figures", lambda *_: dict.fromkeys(pictures))
    patch.setenv("COLUMNS", "100")


class Hangs(BaseException):
    pass


def call(arguments: Sequence[str]) -> Result:
    """One command in this process, with streams that encode as strictly as real ones do."""
    output = io.TextIOWrapper(io.BytesIO(), "utf-8", errors="strict", write_through=True)
    error = io.TextIOWrapper(io.BytesIO(), "utf-8", errors="backslashreplace", write_through=True)

    def ring(*_: Any) -> None:
        raise Hangs(f"no end within {SECONDS} s")

    before = signal.signal(signal.SIGALRM, ring)
    signal.alarm(SECONDS)
    code: int | None = None
    crash = None
    try:
        with contextlib.redirect_stdout(output), contextlib.redirect_stderr(error):
            code = main(list(arguments))
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else 0 if end.code is None else 1
    except BaseException:
        crash = traceback.format_exc()
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)
    texts = [stream.buffer.getvalue().decode("utf-8", "replace") for stream in (output, error)]
    return Result(code, texts[0], texts[1], crash)


def furnish(folder: Path) -> None:
    """What paths among the junk point to: good files, an empty one, a link to itself, a pipe that nobody writes to, models."""
    (folder / "folder").mkdir()
    (folder / "good.txt").write_text("".join(f"Sentence number {n} of a text about nothing.\n\n" for n in range(400)))
    rows = [json.dumps({"id": n, "text": f"text {n} " * 9, "score": n % 2}) for n in range(40)]
    (folder / "good.jsonl").write_text("\n".join(rows))
    (folder / "empty.jsonl").write_text("")
    (folder / "loop").symlink_to("loop")
    os.mkfifo(folder / "pipe")
    _save_writer(folder / "writer")
    for number, name in enumerate(("base", "post")):
        (folder / name).mkdir()
        (folder / name / "config.json").write_text('{"model_type": "one-matrix"}')
        save_file({"w": torch.eye(3) + 0.01 * number}, folder / name / "model.safetensors")


def _save_writer(folder: Path) -> None:
    """A model that generates, within no time."""
    from transformers import LlamaConfig, LlamaForCausalLM

    from trialist.data.tokenizers import byte_tokenizer

    config = LlamaConfig(vocab_size=259, hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2,
                         num_key_value_heads=1, max_position_embeddings=64)  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)


def option_set(chance: random.Random) -> list[str]:
    """A command line of which some part is usually wrong."""
    verbs = [verb for verb in VERBS if verb not in TRAINS or verb in ENTRIES or verb in GENERATE]
    kind = chance.random()
    if kind < 0.04:
        return [chance.choice(NO_NUL) for _ in range(chance.randrange(4))]
    if kind < 0.08:
        return [typo(chance, chance.choice(list(VERBS))), *some(chance, NO_NUL, 2)]
    if kind < 0.12:
        return [chance.choice(list(VERBS)), *chance.sample(["--help", "--nope", "-h", "--json"], 1)]
    verb = "run" if kind < 0.5 else chance.choice(verbs)
    return [verb, *ARGUMENTS.get(verb, plain)(chance, verb)]


def of_trial(chance: random.Random, verb: str) -> list[str]:
    name = chance.choice(TRIALS)
    fields = [(field.name, field.type) for field in dataclasses.fields(load_trial(name))]
    fields += [(field.name, field.type) for field in dataclasses.fields(RunOptions)] if verb != "show" else []
    arguments = [typo(chance, name) if chance.random() < 0.05 else name]
    for field, kind in some(chance, fields, 5):
        flag = "--" + field.replace("_", "-")
        flag = typo(chance, flag) if chance.random() < 0.05 else flag
        if field == "on":
            continue  # would start a cluster
        value = fitting(chance, str(kind)) if chance.random() < 0.5 else chance.choice(NO_NUL)
        if "bool" in str(kind) and chance.random() < 0.9:
            arguments.append(flag)
        else:
            arguments += [f"{flag}={value}"] if chance.random() < 0.5 else [flag, value]
    if name == "selective-attention":  # its own text takes seconds to split
        arguments += ["--data", chance.choice(("good.txt", "good.jsonl"))]
    return arguments


def fitting(chance: random.Random, kind: str) -> str:
    if "int" in kind:
        return str(chance.choice((0, 1, 2, 3, 4, 8, -1, 64, 10**9, 10**30)))
    if "float" in kind:
        return str(chance.choice((0.0, 0.05, 1.0, -1.0, 30, 1e9, "1e-9")))
    return chance.choice(
        ("tiny", "demo", "x", "good.txt", "fair", "heads:higher", "sub/ledger.db", "cpu", "auto", "3,5")
    )


def of_stored(chance: random.Random, verb: str) -> list[str]:
    flags = {
        "runs": ("--trial", "--status", "--errors", "--stages", "--limit", "--ledger", "--json", "--clean"),
        "report": ("--format", "--preset", "--output", "--ledger"),
        "verify": ("--tolerance", "--ledger", "--json"),
        "export": ("--to", "--yes", "--ledger"),
        "evidence": ("--folder", "--output", "--check"),
        "compare": ("--metric", "--better", "--margin", "--cluster", "--json"),
        "assets": ("--json",),
        "list": ("--json", "--evidence"),
        "show": ("--json", "--preset"),
    }[verb]
    positional = {"verify": 1, "export": 1, "compare": 2, "report": chance.randrange(2), "assets": 2, "show": 1}.get(
        verb, 0
    )
    arguments = [chance.choice((*TRIALS, "path", *NO_NUL)) for _ in range(positional)]
    for flag in some(chance, flags, 3):
        arguments.append(typo(chance, flag) if chance.random() < 0.05 else flag)
        if flag not in ("--errors", "--stages", "--json", "--clean", "--yes", "--check"):
            arguments.append(chance.choice(("html", "md", "json", "done", "0.5", "lower", "score", *NO_NUL)))
    return arguments


def of_entry(chance: random.Random, verb: str) -> list[str]:
    name = chance.choice(list(ENTRIES[verb]))
    fields = {field.name: str(field.type) for field in dataclasses.fields(load_entry(ENTRIES[verb][name]))}
    arguments = [typo(chance, name) if chance.random() < 0.05 else name]
    wanted = [field for field in (*MODELS, "data", "output") if field in fields]
    for field in dict.fromkeys((*wanted, *some(chance, list(fields), 5))):
        if chance.random() < 0.95:
            flag = "--" + field.replace("_", "-")
            value = fitting(chance, fields[field]) if chance.random() < 0.5 else chance.choice(NO_NUL)
            value = chance.choice(("base", "post")) if field in MODELS and chance.random() < 0.8 else value
            arguments += [flag] if "bool" in fields[field] else [flag, value]
    return arguments


def of_generation(chance: random.Random, verb: str) -> list[str]:
    """A server is never given a model that it could serve."""
    own = importlib.import_module(f"trialist.cli.{verb}").Options
    classes = (own, Sampling, *flag_classes().values())
    fields = {field.name: str(field.type) for cls in classes for field in dataclasses.fields(cls)}  # type: ignore[arg-type]
    models = ("writer", "writer", "writer", "base", "folder") if verb == "generate" else ("base", "folder")
    arguments = ["--model", chance.choice(models)] if chance.random() < 0.95 else []
    if verb == "generate":
        arguments += (
            ["--prompt", "hello"] if chance.random() < 0.7 else ["--file", chance.choice(("good.txt", *NO_NUL))]
        )
    for field in some(chance, [field for field in fields if field not in ("model", "file", "device")], 4):
        flag = "--" + field.replace("_", "-")
        flag = typo(chance, flag) if chance.random() < 0.05 else flag
        value = fitting(chance, fields[field]) if chance.random() < 0.6 else chance.choice(NO_NUL)
        arguments += [flag] if "bool" in fields[field] else [f"{flag}={value}"]
    return [*arguments, "--max-new-tokens", "3"] if "--max-new-tokens" not in " ".join(arguments) else arguments


def plain(chance: random.Random, verb: str) -> list[str]:
    return list(some(chance, NO_NUL, 3))


ARGUMENTS: dict[str, Callable[[random.Random, str], list[str]]] = {
    "run": of_trial, "plan": of_trial, **dict.fromkeys(ENTRIES, of_entry), **dict.fromkeys(GENERATE, of_generation),
    **dict.fromkeys(("runs", "report", "verify", "export", "evidence", "compare", "assets", "list", "show"), of_stored),
}  # fmt: skip


def some(chance: random.Random, values: Sequence[Any], most: int) -> list[Any]:
    return chance.sample(list(values), min(len(values), chance.randrange(most + 1)))


def typo(chance: random.Random, word: str) -> str:
    at = chance.randrange(len(word))
    return word[:at] + chance.choice(("", "x", "-", word[at] * 2, "é")) + word[at + 1 :]


# -- damaged files


def good_files(chance: random.Random) -> dict[str, bytes]:
    """A whole file of each kind, by suffix."""
    rows = [{"text": f"Row {n}: {chance.random()}" * 3, "prompt": f"p {n}", "id": n} for n in range(60)]
    lines = "\n".join(json.dumps(row) for row in rows).encode()
    text = b"".join(b"A paragraph with the number %d.\n\n" % n for n in range(300))
    found = {".jsonl": lines, ".json": json.dumps(rows).encode(), ".txt": text, ".md": text}
    found |= {".jsonl.gz": gzip.compress(lines, mtime=0), ".txt.gz": gzip.compress(text, mtime=0)}
    import pyarrow
    import pyarrow.parquet

    sink = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), sink)
    return found | {".parquet": sink.getvalue()}


def damage(chance: random.Random, content: bytes) -> bytes:
    """The content with one kind of damage."""

    def garbled(count: int) -> bytes:
        changed = bytearray(content)
        for _ in range(count):
            changed[chance.randrange(len(changed))] = chance.randrange(256)
        return bytes(changed)

    at, end = sorted((chance.randrange(len(content)), chance.randrange(len(content))))
    return chance.choice((
        lambda: content[:at], lambda: content[at:], lambda: content[:at] + content[end:], lambda: garbled(1),
        lambda: garbled(20), lambda: b"", lambda: b"\n \n\t\n", lambda: bytes(1000),
        lambda: content[:at] + bytes(40) + content[at:],
        lambda: content.decode("latin1").encode("utf-16"), lambda: b"\xff\xfe" + content, lambda: b"\xef\xbb\xbf" + content,
        lambda: b"[" * 100_000, lambda: b'{"text":' * 20_000, lambda: b'{"text": "' + b"x" * 3_000_000 + b'"}',
        lambda: b'{"text": 1}\n{"text": [1, {}]}', lambda: b'{"text": "\\ud800"}\n' * 50,
        lambda: b'{"text": ' + b"9" * 5000 + b"}",
        lambda: b'{"text": "a"}\n{"text": null}\n[]\n"x"\n', lambda: b'{"\\u0000": "a", "text": NaN}',
        lambda: b"\x1f\x8b" + content,
        lambda: chance.randbytes(2000), lambda: content.replace(b"\n", b"\r"), lambda: content + b"\x1a",
    ))()  # fmt: skip


def damaged_file(chance: random.Random, folder: Path, good: dict[str, bytes]) -> Path:
    """A path that a user may give as data: usually a damaged file, else something that is no file at all."""
    suffix = chance.choice(list(good))
    path = folder / f"data{suffix}"
    odd = chance.random()
    if odd < 0.03:
        path.mkdir()
    elif odd < 0.06:
        path.symlink_to(path.name)
    elif odd < 0.08:
        os.mkfifo(path)
    elif odd < 0.11:
        path = folder / chance.choice(
            ("none.jsonl", "n" * 300 + ".txt", "data\nbreak.txt", "data.unknown", "no/such/data.txt")
        )
    elif odd < 0.16:
        path = folder / "several"
        path.mkdir()
        for name in ("train", "test", "more"):
            kind = chance.choice(list(good))
            (path / f"{name}{kind}").write_bytes(damage(chance, good[kind]) if chance.random() < 0.6 else good[kind])
        if chance.random() < 0.3:
            (path / "state.json").write_bytes(damage(chance, good[".json"]))
    else:
        path.write_bytes(damage(chance, good[suffix]))
    return path


def damaged_model(chance: random.Random, folder: Path, whole: Path) -> Path:
    """A copy of a saved model of which some files are damaged, gone, or something else."""
    target = folder / "model"
    target.mkdir()
    files = sorted(file for file in whole.iterdir() if file.is_file())
    hit = {chance.choice(files).name for _ in range(chance.randrange(1, 3))}
    for file in files:
        copy = target / file.name
        if file.name not in hit:
            copy.write_bytes(file.read_bytes())
            continue
        way = chance.random()
        if way < 0.1:
            copy.mkdir()
        elif way < 0.15:
            copy.symlink_to(copy.name)
        elif way < 0.3 and file.suffix == ".json":
            copy.write_text(changed_json(chance, json.loads(file.read_text())))
        elif way < 0.9:
            copy.write_bytes(damage(chance, file.read_bytes()))
    return target


def changed_json(chance: random.Random, document: dict[str, Any]) -> str:
    key = chance.choice(list(document))
    document[key] = chance.choice((None, -1, "x", [], {}, 7, True, 0.5))
    return json.dumps(document)
