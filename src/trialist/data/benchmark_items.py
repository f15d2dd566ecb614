"""Items of benchmarks as texts to look for: which fields of which rows, by name.

Names are those of this table, names of `benchmark_names()`, and local files or Hub ids. What the table says of Hub data sets
is the list of evaluations of open-instruct (arXiv 2411.15124, and its later additions), question fields only.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from trialist.data.benchmarks import benchmark_names, documents
from trialist.data.columns import listed
from trialist.data.corpora import split_names
from trialist.data.files import ROW_SUFFIXES, TEXT_SUFFIXES, read_text, suffix_of
from trialist.data.streams import Row, stream_rows

FIELDS = (
    "question", "problem", "prompt", "query", "instruction", "goal", "ctx", "sentence", "question_stem", "premise", "passage",
    "text", "input",
)  # fmt: skip
"""The first of these that a row has is its question, where no field is named"""
IDS = ("id", "task_id", "question_id", "query_id", "key", "idx", "ind", "index")
LEFT_OUT = ("minerva_math_500/gold_bpb_0shot",)
"""Matches a pattern and is a part of the others"""
WRAPPINGS = (("Question: ", "\nAnswer:"), ("Problem:\n", "\nSolution:"), ("Goal: ", "\nAnswer:"))
"""What the asset's prompts put around a question: no part of it"""


@dataclass(frozen=True)
class Items:
    """Questions of a benchmark, each in one or several fields."""

    name: str
    fields: tuple[str, ...]
    ids: tuple[str, ...]
    texts: tuple[tuple[str, ...], ...]
    """(items, fields); an empty string where a row has nothing in the field"""

    def __len__(self) -> int:
        return len(self.ids)


@dataclass(frozen=True)
class Source:
    """Where the items of a benchmark come from."""

    asset: str
    """Name of rows in the asset `benchmarks`, or a pattern with one `*` for several; empty for a Hub data set"""
    fields: tuple[str, ...]
    hub: str = ""
    split: str = "test"


SOURCES: dict[str, Source] = {
    "gsm8k": Source("gsm8k/gold_bpb_5shot", ("question",)),
    "math": Source("minerva_math_*/gold_bpb_0shot", ("problem",)),
    "math500": Source("minerva_math_500/gold_bpb_0shot", ("problem",)),
    "mmlu": Source("hails/mmlu_no_train/*/test", ("question",)),
    "humaneval": Source("codex_humaneval/gold_bpb_0shot", ("prompt",)),
    "mbpp": Source("codex_mbpp/gold_bpb_0shot", ("text",)),
    "drop": Source("drop/bpb_5shot", ("passage", "question")),
    "hellaswag": Source("hellaswag/none/validation", ("ctx",)),
    "arc_easy": Source("arc_easy/test_rc_5shot", ("query",)),
    "arc_challenge": Source("arc_challenge/test_rc_5shot", ("query",)),
    "boolq": Source("boolq/none/validation", ("passage", "question")),
    "piqa": Source("piqa/plain_text/validation", ("goal",)),
    "winogrande": Source("winogrande/winogrande_xl/validation", ("sentence",)),
    "openbookqa": Source("openbookqa/test_rc_5shot", ("query",)),
    "sciq": Source("sciq/none/validation", ("question",)),
    "commonsense_qa": Source("tau/commonsense_qa/none/validation", ("question",)),
    "social_iqa": Source("social_i_qa/none/validation", ("context", "question")),
    "copa": Source("super_glue/copa/validation", ("premise",)),
    "lambada": Source("lambada/bpb_0shot", ("query",)),
    "triviaqa": Source("trivia_qa/rc.wikipedia.nocontext/validation", ("question",)),
    "nq_open": Source("nq_open/none/validation", ("question",)),
    "medmcqa": Source("medmcqa/rc_5shot", ("question",)),
    "medqa": Source("medqa_en/rc_5shot", ("question",)),
    "jeopardy": Source("jeopardy/bpb_5shot", ("query",)),
    "squad": Source("squad/bpb_5shot", ("query",)),
    "coqa": Source("coqa/bpb_0shot", ("story", "question")),
    "popqa": Source("", ("subj", "prop", "obj"), "akariasai/PopQA"),
    "ifeval": Source("", ("prompt",), "google/IFEval", "train"),
    "alpaca_eval": Source("", ("instruction",), "tatsu-lab/alpaca_eval", "eval"),
    "bbh": Source("", ("input",), "lukaemon/bbh"),
    "truthfulqa": Source("", ("question",), "truthfulqa/truthful_qa:generation", "validation"),
    "mmlu_pro": Source("", ("question",), "TIGER-Lab/MMLU-Pro"),
    "gpqa": Source("", ("Question",), "Idavidrein/gpqa:gpqa_extended", "train"),
    "agi_eval": Source("", ("passage", "question"), "lighteval/agi_eval_en", "train"),
    "bigcodebench": Source("", ("instruct_prompt",), "bigcode/bigcodebench", "v0.1.2"),
    "deepmind_math": Source("", ("question",), "deepmind/math_dataset"),
    "aime_2024": Source("", ("problem",), "HuggingFaceH4/aime_2024", "train"),
    "aime_2025": Source("", ("problem",), "yentinglin/aime_2025", "train"),
    "simpleqa": Source("", ("problem",), "basicv8vc/SimpleQA"),
    "toxigen": Source("", ("prompt",), "hamishivi/toxigen-prompts", "train"),
    "xstest": Source("", ("prompt",), "walledai/XSTest"),
    "wildguard": Source("", ("prompt",), "allenai/wildguardmix:wildguardtest"),
    "harmbench": Source("", ("Behavior",), "allenai/tulu-3-harmbench-eval"),
    "do_anything_now": Source("", ("prompt",), "allenai/tulu-3-do-anything-now-eval"),
}


def load_items(
    name: str, *, fields: tuple[str, ...] = (), split: str | None = None, max_items: int | None = None
) -> Items:
    """The items of a benchmark.

    name: of `SOURCES`, `mmlu_SUBJECT`, a name of `benchmark_names()`, a local file or folder (a text file holds an item a
    line), or a Hub id. fields: which columns make up an item; without them those of the table, else the first of `FIELDS`.
    split: of local or Hub data; without it `test` where there is one.
    Raises ValueError for an unknown name, missing fields and values that are no text, FileNotFoundError for a missing asset.
    """
    if max_items is not None and max_items < 1:
        raise ValueError(f"max_items must be at least 1, not {max_items}")
    rows, known = _rows(name, split)
    chosen = fields or known
    ids: list[str] = []
    texts: list[tuple[str, ...]] = []
    for number, row in enumerate(islice(rows, max_items), start=1):
        chosen = chosen or _guess(name, row)
        ids.append(next((str(row[key]) for key in IDS if isinstance(row.get(key), str | int)), str(number)))
        texts.append(tuple(_text(name, number, field, row) for field in chosen))
    if not ids:
        raise ValueError(f"benchmark {name!r} holds no items")
    if len(set(ids)) < len(ids):
        ids = [str(number) for number in range(1, len(ids) + 1)]
    return Items(name, chosen, tuple(ids), tuple(texts))


def _rows(name: str, split: str | None) -> tuple[Iterable[Row], tuple[str, ...]]:
    """Rows, and their fields where these are known."""
    source = SOURCES.get(name)
    if source is None and name.startswith("mmlu_"):
        source = Source(f"hails/mmlu_no_train/{name[5:]}/test", ("question",))
    if source is None and Path(name).expanduser().exists():
        return _local_rows(Path(name).expanduser(), split), ()
    if source is None and _is_hub_id(name):
        source = Source("", (), name, split or "test")
    if source is None:
        source = Source(name, ())
    if source.asset:
        return _asset_rows(name, source.asset), source.fields
    return (row for _, row in stream_rows(source.hub, split=split or source.split)), source.fields


def _asset_rows(name: str, asset: str) -> Iterator[Row]:
    known = benchmark_names()
    if "*" not in asset:
        tasks = {path.split("/")[0] for path in known}
        if asset not in known and (asset not in tasks or name.startswith("mmlu_")):
            near = difflib.get_close_matches(name, [*SOURCES, *known, *tasks], n=3, cutoff=0.5)
            hint = f"Did you mean {' or '.join(map(repr, near))}?" if near else f"There is {', '.join(SOURCES)}"
            raise ValueError(f"no benchmark {name!r}, and no such file. {hint}")
        yield from documents(asset)
        return
    before, after = asset.split("*")
    for part in known:
        if part.startswith(before) and part.endswith(after) and part not in LEFT_OUT:
            short = part.removeprefix(before).removesuffix(after)
            for number, row in enumerate(documents(part), start=1):
                yield {**row, "id": f"{short} {number}"}


def _is_hub_id(name: str) -> bool:
    if (
        name.count("/") != 1
        or name.startswith((".", "~", "/"))
        or suffix_of(Path(name)) in (*TEXT_SUFFIXES, *ROW_SUFFIXES)
    ):
        return False
    try:
        return name not in benchmark_names()
    except FileNotFoundError:  # without the asset nothing has such a name
        return True


def _local_rows(path: Path, split: str | None) -> Iterator[Row]:
    if path.is_file() and suffix_of(path) in TEXT_SUFFIXES:
        for number, line in enumerate(read_text(path).splitlines(), start=1):
            if line.strip():
                yield {"id": f"line {number}", "text": line}
        return
    chosen = split or ("test" if "test" in split_names(str(path)) else None)
    yield from (row for _, row in stream_rows(str(path), split=chosen))


def _guess(name: str, row: Row) -> tuple[str, ...]:
    for field in FIELDS:
        if field in row:
            return (field,)
    raise ValueError(
        f"benchmark {name!r}: expected a column such as {listed(FIELDS[:4])}, found {listed(row)}; "
        "name the columns of an item with --benchmark-fields"
    )


def _text(name: str, number: int, field: str, row: Row) -> str:
    if field not in row:
        raise ValueError(
            f"benchmark {name!r} row {number}: expected the column {field!r}, found {listed(row)}; "
            "name the columns of an item with --benchmark-fields"
        )
    value = row[field]
    if value is None:
        return ""
    if not isinstance(value, str):
        raise ValueError(f"benchmark {name!r} row {number}: {field!r} must be text, not {type(value).__name__}")
    for before, after in WRAPPINGS:
        if value.startswith(before) and value.endswith(after):
            return value.removeprefix(before).removesuffix(after)
    return value
