"""BLiMP: of two sentences that differ in one point, does the model give the grammatical one more probability?

Source: Warstadt et al. 2020 (arXiv:1912.00582): full-sentence log-probabilities, accuracy over minimal pairs.
"""

from __future__ import annotations

import hashlib
import json
import math
import zipfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from trialist.data.files import decode, json_lines, json_rows
from trialist.evaluation.results import (
    Evaluated,
    Evaluation,
    Metric,
    Progress,
    context_length,
    item_id,
    silent,
    too_long,
)

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

HUB = "nyu-mll/blimp"
ROW = 512
"""Tokens in a packed row, more where a sentence is longer"""


@dataclass(frozen=True)
class Pair:
    phenomenon: str
    paradigm: str
    name: str
    good: str
    bad: str


@dataclass(frozen=True)
class Blimp(Evaluation):
    """Accuracy over grammatical minimal pairs, by log-probability of the whole sentence; equal sentences count as wrong."""

    about: ClassVar[str] = "grammatical minimal pairs"

    data: str = HUB
    """Hub id, or a local folder, .zip or .jsonl file with rows `sentence_good`, `sentence_bad`"""
    limit: int | None = None
    """Most pairs of each paradigm (file), the first ones"""

    @property
    def metrics(self) -> tuple[Metric, ...]:
        return (Metric("accuracy", "higher", "share of pairs"), Metric("difference", "higher", "nats"))

    def check(self) -> None:
        if self.limit is not None and self.limit < 1:
            raise ValueError(f"--limit must be at least 1, not {self.limit}")
        self.pairs()

    def digest(self) -> str:
        if _is_local(self.data):
            from trialist.data.corpora import data_digest

            path = Path(self.data).expanduser()
            if path.suffix == ".zip":
                from trialist.data.assets import sha256_of

                return f"sha256:{sha256_of(path)}"
            return data_digest(str(path))
        content = hashlib.sha256(json.dumps([pair.__dict__ for pair in self.pairs()]).encode())
        return f"hub:{self.data}:{content.hexdigest()}"

    def pairs(self) -> list[Pair]:
        """The minimal pairs, `limit` of each paradigm. Raises ValueError for rows without two sentences."""
        found: list[Pair] = []
        taken: dict[str, int] = {}
        rows = _local_rows(Path(self.data).expanduser()) if _is_local(self.data) else _hub_rows(self.data)
        for place, stem, row in rows:
            good, bad = row.get("sentence_good"), row.get("sentence_bad")
            if not isinstance(good, str) or not isinstance(bad, str) or not good or not bad:
                raise ValueError(
                    f"{place}: a minimal pair has the texts 'sentence_good' and 'sentence_bad'; the row has "
                    f"{', '.join(row) or 'nothing'}"
                )
            paradigm = str(row.get("UID") or stem)
            number = taken[paradigm] = taken.get(paradigm, 0) + 1
            if self.limit is None or number <= self.limit:
                name = f"{paradigm} {row.get('pairID', row.get('pair_id', number - 1))}"
                found.append(Pair(str(row.get("linguistics_term") or paradigm), paradigm, name, good, bad))
        if not found:
            raise ValueError(f"{self.data} holds no minimal pair")
        return found

    def check_fit(self, tokenizer: PreTrainedTokenizerBase, context: int | None) -> None:
        pairs = self.pairs()
        sentences = [text for pair in pairs for text in (pair.good, pair.bad)]
        sizes = [len(ids) for ids in tokenizer(sentences, add_special_tokens=False)["input_ids"]]
        longest = max(range(len(sizes)), key=lambda at: sizes[at])
        if context is not None and sizes[longest] + 1 > context:
            raise too_long(f"the longest sentence ({pairs[longest // 2].name})", sizes[longest] + 1, context)

    def __call__(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, *, batch: int = 16, seed: int = 0,
        progress: Progress = silent,
    ) -> Evaluated:  # fmt: skip
        pairs = self.pairs()
        sentences = [text for pair in pairs for text in (pair.good, pair.bad)]
        nats, tokens = sentence_logprobs(model, tokenizer, sentences, batch=batch, progress=progress)
        differences = tuple(good - bad for good, bad in zip(nats[::2], nats[1::2]))
        right = tuple(float(difference > 0) for difference in differences)
        parts: dict[str, list[float]] = {}
        for pair, score in zip(pairs, right):
            parts.setdefault(pair.phenomenon, []).append(score)
        metrics = {"accuracy": math.fsum(right) / len(right), "difference": math.fsum(differences) / len(differences)}
        if len(parts) > 1:
            metrics |= {f"accuracy/{name}": math.fsum(column) / len(column) for name, column in sorted(parts.items())}
        ids = tuple(item_id(pair.name, f"{pair.good}\0{pair.bad}") for pair in pairs)
        return Evaluated(
            ids, {"accuracy": right, "difference": differences}, metrics, tokens=tokens,
            notes=("log-probability of the whole sentence behind one start token; a pair of equal probability is wrong",),
        )  # fmt: skip


def sentence_logprobs(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, sentences: list[str], *, batch: int = 16,
    progress: Progress = silent,
) -> tuple[list[float], int]:  # fmt: skip
    """log p of each whole sentence in nats, behind the tokenizer's start token, and the number of tokens scored.

    Sentences are packed into rows, none of them cut, so that next to nothing is padding. Raises ValueError for a tokenizer
    without a start token, for a sentence without tokens, or one longer than the model's context.
    """
    import numpy as np

    from trialist.data.packing import pack_whole
    from trialist.data.tokenizers import document_start, encode_documents
    from trialist.evaluation.bits_per_byte import bits_of_pieces

    start = document_start(tokenizer)
    if start is None:
        raise ValueError(
            "the tokenizer has neither BOS nor EOS, so a sentence's first token cannot be predicted; set one"
        )
    tokens = encode_documents(tokenizer, sentences)
    empty = next((at for at, ids in enumerate(tokens) if len(ids) == 0), None)
    if empty is not None:
        raise ValueError(f"sentence {sentences[empty]!r} has no tokens")
    longest = max(map(len, tokens)) + 1
    context = context_length(model)
    if context is not None and longest > context:
        raise too_long(f"a sentence of {longest} tokens", longest, context)
    length = max(longest, min(ROW, context or ROW, sum(map(len, tokens)) + len(tokens)))
    rows = pack_whole([np.concatenate(([start], ids)) for ids in tokens], length)
    bits = bits_of_pieces(model, rows, batch_size=max(1, batch * longest // length), progress=progress)
    nats = np.empty(len(sentences))
    nats[rows.pieces[:, 0]] = -bits * math.log(2)
    return nats.tolist(), sum(map(len, tokens))


def _is_local(data: str) -> bool:
    path = Path(data).expanduser()
    if path.exists():
        return True
    if data.startswith((".", "/", "~")) or data.count("/") > 1 or path.suffix in (".zip", ".jsonl"):
        raise FileNotFoundError(f"no file or folder {data}; pass a folder, .zip or .jsonl file, or the Hub id {HUB}")
    return False


def _local_rows(path: Path) -> Iterator[tuple[str, str, dict[str, Any]]]:
    """(place, file stem, row) of every .jsonl file, also inside .zip archives, in the order of their names."""
    if path.is_file() and path.suffix not in (".jsonl", ".zip"):
        raise ValueError(f"{path}: minimal pairs come as .jsonl or as .zip of .jsonl files")
    files = [path] if path.is_file() else sorted(f for f in path.rglob("*") if f.suffix in (".jsonl", ".zip"))
    if not files:
        raise ValueError(f"{path} holds neither a .jsonl nor a .zip file")
    for file in files:
        if file.suffix == ".jsonl":
            yield from ((f"{file} {place}", file.stem, row) for place, row in json_rows(file))
            continue
        try:
            with zipfile.ZipFile(file) as archive:
                for name in sorted(archive.namelist()):
                    if name.endswith(".jsonl") and not name.startswith("__MACOSX"):
                        inside = f"{file}:{name}"
                        rows = json_lines(decode(archive.read(name), inside), inside)
                        yield from ((f"{inside} {place}", Path(name).stem, row) for place, row in rows)
        except (zipfile.BadZipFile, zlib.error, EOFError, RuntimeError, NotImplementedError) as error:
            raise ValueError(f"{file} is not a whole zip archive that can be read: {error}") from error


def _hub_rows(data: str) -> Iterator[tuple[str, str, dict[str, Any]]]:
    import datasets

    name, _, only = data.partition(":")
    try:
        configurations = [only] if only else sorted(datasets.get_dataset_config_names(name))
        for configuration in configurations:
            splits = datasets.load_dataset(name, configuration)
            for split, rows in splits.items():
                for number, row in enumerate(rows, 1):
                    yield f"{name} {configuration} {split} row {number}", configuration, dict(row)
    except OSError as error:
        raise FileNotFoundError(
            f"{data!r} is no local path, and as a Hub id it could not be loaded ({type(error).__name__}: {error}); "
            "download BLiMP and pass its folder with --data"
        ) from error
