"""Training rows and test items of a trial on contamination, and how well a model predicts the items.

Items are passages of test documents, or questions of a benchmark with their answers; the rows are pieces of training
documents, or questions with answers as well.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trialist.engine.context import Context
from trialist.trials._edited_copies import WORD, Texts
from trialist.trials._text import BUILT_IN_DATA, ORDER, Text, take

if TYPE_CHECKING:
    import numpy as np

    from trialist.data.benchmark_items import Items
    from trialist.data.corpora import Documents

PARTS = ("planted", "kept out", "others")
"""Items that are planted and tested, that are tested alone, and that are planted alone, in the negative control"""
COLUMNS = ("question", "answer")
PIECE = 1_000
"""Characters of a piece of a document, about"""


@dataclass(frozen=True)
class Item:
    """A test item. Only the first of its texts is looked for in training rows, only the last is scored."""

    name: str
    group: str
    """Items of one group, such as passages of one document, are not independent"""
    texts: Texts


@dataclass(frozen=True)
class PlantedText:
    """Where rows and items come from, and how many are needed."""

    text: Text
    benchmark: str
    """Whose items are planted; empty for passages of the test split"""
    items: int
    """In each part"""
    item_words: int

    @property
    def columns(self) -> tuple[str, ...]:
        """Of a benchmark's question and answer, and of a row's."""
        from trialist.data.corpora import parse_columns

        named = parse_columns(self.text.columns)
        if unknown := sorted(set(named) - set(COLUMNS)):
            raise ValueError(f"--columns names {unknown[0]!r}; rows of a benchmark have question=NAME,answer=NAME")
        return tuple(named.get(column, column) for column in COLUMNS)

    def check(self) -> None:
        """Raises ValueError or FileNotFoundError for data that cannot serve; reads the user's own data."""
        if self.benchmark:
            self.text.check_tokenizer()
            self.drawn(self.questions(), lambda texts: True)
            self.rows()
            return
        self.text.check()
        if self.text.data not in BUILT_IN_DATA:
            self.drawn(self.passages(self.text.splits().test), lambda texts: True)

    def digests(self) -> dict[str, str]:
        found = {"data": self.text.digest()}
        if self.benchmark:
            loaded = self._benchmark()
            content = json.dumps([loaded.ids, loaded.texts])
            found["benchmark"] = f"sha256:{hashlib.sha256(content.encode()).hexdigest()}"
        return found

    def remarks(self) -> tuple[str, ...]:
        return () if self.benchmark else self.text.remarks()

    def stage(self, context: Context) -> Path:
        """The folder with rows, items and tokenizer; the same for every seed."""
        text = dataclasses.replace(self.text, data="")  # what it holds is among the digests
        inputs = (*dataclasses.astuple(text), self.items, self.item_words, *sorted(self.digests().items()))
        return context.stage("planted-text", inputs, functools.partial(build, self))

    def rows(self) -> list[Texts]:
        """The training rows, in a fixed random order, until they hold `train_tokens` bytes."""
        from trialist.data.files import cut_text

        text = self.text
        if not self.benchmark:
            documents = take(text.splits().train, text.train_tokens, longest=None)
            return [(piece,) for document in documents for piece in cut_text(document, PIECE)]
        import numpy as np

        from trialist.data.columns import listed
        from trialist.data.streams import stream_rows

        found: list[Texts] = []
        columns = self.columns
        for place, row in stream_rows(text.data, split=text.split, wanted=columns, max_examples=text.max_examples):
            values = tuple(row.get(column) for column in columns)
            if not all(isinstance(value, str) for value in values):
                raise ValueError(
                    f"{place}: expected text in {listed(columns)}, the row has {listed(row)}; name the columns of question "
                    "and answer with --columns question=NAME,answer=NAME"
                )
            found.append(values)  # type: ignore[arg-type]
        taken: list[Texts] = []
        size = 0
        for index in np.random.default_rng(ORDER).permutation(len(found)):
            taken.append(found[index])
            size += sum(len(value.encode()) for value in found[index])
            if size >= text.train_tokens:
                break
        return taken

    def questions(self) -> list[Item]:
        loaded = self._benchmark()
        return [Item(name, name, texts) for name, texts in zip(loaded.ids, loaded.texts) if all(texts)]

    def _benchmark(self) -> Items:
        from trialist.data.benchmark_items import load_items

        return load_items(self.benchmark, fields=self.columns)

    def passages(self, documents: Documents) -> list[Item]:
        """Passages of so many words, with the white space between them, that neither overlap nor touch."""
        found: dict[str, Item] = {}
        for name, document in zip(documents.ids, documents.texts):
            words = list(WORD.finditer(document))
            for at in range(0, len(words) - self.item_words + 1, 2 * self.item_words):
                passage = document[words[at].start() : words[at + self.item_words - 1].end()].rstrip()
                found.setdefault(passage, Item(f"{name} word {at + 1}", name, (passage,)))
        return list(found.values())

    def drawn(self, items: Sequence[Item], fits: Callable[[Texts], bool]) -> dict[str, list[Item]]:
        """As many items for each part, those of one group in one part, the same for every seed.

        Raises ValueError when there are not so many that fit.
        """
        import numpy as np

        groups: dict[str, list[Item]] = {}
        for item in items:
            if fits(item.texts):
                groups.setdefault(item.group, []).append(item)
        parts: dict[str, list[Item]] = {part: [] for part in PARTS}
        names = list(groups)
        for index in np.random.default_rng(ORDER).permutation(len(names)):
            min(parts.values(), key=len).extend(groups[names[index]])
        least = min(map(len, parts.values()))
        if least < self.items:
            what = "items" if self.benchmark else f"passages of {self.item_words} words in its test split"
            raise ValueError(
                f"{self.benchmark or self.text.data}: {sum(map(len, parts.values()))} {what} fit into --length "
                f"{self.text.length} tokens, and {least} of them are left for the smallest of three parts where "
                f"{self.items} are needed; lower --items"
            )
        return {part: list(np.random.default_rng(ORDER).permutation(np.array(found, object))[: self.items])
                for part, found in parts.items()}  # fmt: skip


def build(source: PlantedText, folder: Path) -> None:
    """Fills a stage: `texts.json` with rows and items, tokenizer files."""
    from trialist.data.tokenizers import bpe_tokenizer, load_tokenizer

    rows, name = source.rows(), source.text.tokenizer
    if name.startswith("bpe-"):
        tokenizer: Any = bpe_tokenizer(["\n".join(row) for row in rows], int(name[4:]))
    else:
        tokenizer = load_tokenizer(name)
    candidates = source.questions() if source.benchmark else source.passages(source.text.splits().test)
    items = source.drawn(candidates, lambda texts: len(scored_tokens(tokenizer, texts)[0]) <= source.text.length)
    stored = {
        "rows": rows,
        "items": {part: [[i.name, i.group, i.texts] for i in found] for part, found in items.items()},
    }
    (folder / "texts.json").write_text(json.dumps(stored), encoding="utf-8")
    tokenizer.save_pretrained(folder)


def load_texts(folder: Path) -> tuple[list[Texts], dict[str, list[Item]]]:
    """Rows and items of a stage."""
    stored = json.loads((folder / "texts.json").read_text(encoding="utf-8"))
    items = {
        part: [Item(name, group, tuple(texts)) for name, group, texts in found]
        for part, found in stored["items"].items()
    }
    return [tuple(row) for row in stored["rows"]], items


def scored_tokens(tokenizer: Any, texts: Texts) -> tuple[list[int], list[bool]]:
    """The tokens of an item as a training row has them, and which of them count: those of its last text."""
    from trialist.data.tokenizers import document_start, encode_documents

    start = document_start(tokenizer)
    before = [] if start is None else [start]
    if len(texts) > 1:
        before += encode_documents(tokenizer, ["\n".join(texts[:-1]) + "\n"])[0].tolist()
    last = encode_documents(tokenizer, [texts[-1]])[0].tolist()
    return before + last, [False] * len(before) + [True] * len(last)


def bits_per_byte_of(model: Any, tokenizer: Any, items: Sequence[Item], *, length: int, batch: int) -> np.ndarray:
    """(items,) bits of surprise at the last text of each item, per byte of it, given those before it."""
    import numpy as np

    from trialist.data.packing import pack_whole
    from trialist.evaluation.bits_per_byte import bits_of_pieces

    tokens, counted = zip(*(scored_tokens(tokenizer, item.texts) for item in items))
    packed = pack_whole(tokens, length, counted=counted)
    bits = np.zeros(len(items))
    bits[packed.pieces[:, 0]] = bits_of_pieces(model, packed, batch_size=batch)
    return bits / [len(item.texts[-1].encode()) for item in items]
