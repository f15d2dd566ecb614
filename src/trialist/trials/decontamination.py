"""Does removing rows by n-grams take away what a model gains on test items that were planted in its training text?"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trialist.engine.context import Context
from trialist.engine.contract import Arm, Budget, Claim, Endpoint, Outcome, Trial
from trialist.engine.hardware import resolve_device
from trialist.trials._language_model import PRELOAD, VERSIONS, new_decoder, train
from trialist.trials._text import Text, bits_per_byte, take

if TYPE_CHECKING:
    import numpy as np

EXACT = 0.999
"""A longest run above this share of an item is the whole item, word for word"""
PIECE = 1_000
"""Characters of a training row, about"""


@dataclass(frozen=True)
class DecontaminationTrial(Trial):
    """Does removing rows by n-grams take away what a model gains on test items planted in its training text?"""

    claim = Claim(
        statement="Trained on text that holds lightly edited copies of test items, a model predicts those items better than it "
        "should; removing the rows that 8-grams cover by half takes most of that away, removing exact copies does not.",
        source="arXiv:2411.15124",
        reported="the rule (n-grams of 8, more than half of an item, more than 2 % of the items) by which training sets were "
        "decontaminated; its effect on scores is not reported",
        endpoint=Endpoint("inflation", unit="bits per byte", better="lower", margin=0.05),
        secondary=(
            Endpoint("planted_rows_left", unit="share of planted rows", better="lower"),
            Endpoint("clean_rows_lost", unit="share of other rows", better="lower"),
        ),
    )
    budget = Budget("steps")
    presets = {
        "tiny": dict(seeds=3, about="about 10 minutes a setting on 2 cores"),
        "gpu": dict(
            data="enwik8", layers=8, width=512, heads=8, length=1024, batch=32, steps=3_000, train_bytes=20_000_000,
            items=512, seeds=6, about="minutes on one GPU",
        ),
    }  # fmt: skip
    preload = (
        *PRELOAD,
        "trialist.data.packing",
        "trialist.data.order",
        "trialist.data.tokenizers",
        "trialist.data.scan",
    )
    versions = VERSIONS
    usage = (
        "from trialist.data.decontaminate import Decontaminate\n"
        'Decontaminate(data="rows.jsonl", benchmarks=("gsm8k", "mmlu"), output="clean.jsonl")()'
    )

    data: str = "python-stdlib"
    """Text: Hub id, local .txt, .jsonl or .parquet file or folder, or a built-in name; items come from its test split"""
    items: int = 64
    """Planted test items, and as many that are not planted"""
    item_words: int = 50
    """Words in an item"""
    copies: int = 6
    """Copies of each planted item, each edited in its own way and put into a row of its own"""
    replaced: float = 0.08
    """Share of the words of a copy that are replaced by others"""
    n: int = 8
    """Words in an n-gram"""
    coverage: float = 0.5
    """Share of an item that a row must cover to be removed; 1 removes nothing"""
    train_bytes: int = 250_000
    """Bytes of training text beside the planted rows"""
    layers: int = 3
    """Layers of the decoder"""
    width: int = 96
    """Width of the decoder"""
    heads: int = 4
    """Attention heads of the decoder"""
    length: int = 256
    """Tokens (bytes) in a training sequence"""
    batch: int = 8
    """Sequences in a step"""
    steps: int = 500
    """Training steps"""
    learning_rate: float = 4e-3
    """Peak learning rate, the same for all arms: they differ in their data only"""
    split: str | None = None
    """Split of the data to read: `train` is cut 80/10/10, another name is the test set; without it as the data come"""
    columns: str = ""
    """Column that holds the text, text=NAME"""
    max_examples: int | None = None
    """Most documents to read"""
    device: str = "auto"
    """`auto`, `cpu` or `cuda`"""
    dtype: str = "float32"
    """float32, or bfloat16 for autocast"""

    def check(self) -> None:
        for name in (
            "items",
            "item_words",
            "copies",
            "n",
            "train_bytes",
            "layers",
            "width",
            "heads",
            "length",
            "batch",
            "steps",
        ):
            if getattr(self, name) < 1:
                raise ValueError(f"--{name.replace('_', '-')} must be at least 1, not {getattr(self, name)}")
        for name in ("replaced", "coverage"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"--{name} is a share from 0 to 1, not {getattr(self, name)}")
        if self.item_words < self.n:
            raise ValueError(
                f"--item-words {self.item_words} must be at least --n {self.n}: shorter items have no n-gram"
            )
        if self.width % self.heads:
            raise ValueError(f"--width {self.width} must be a multiple of --heads {self.heads}")
        self.text.check()
        if self.data not in ("python-stdlib", "enwik8"):
            passages(self.text.splits().test.texts, 3 * self.items, self.item_words, self.data)

    @property
    def text(self) -> Text:
        return Text(
            data=self.data, tokenizer="bytes", split=self.split, columns=self.columns, max_examples=self.max_examples,
            length=self.length, train_tokens=self.train_bytes, test_bytes=0,
        )  # fmt: skip

    def digests(self) -> Mapping[str, str]:
        return {"device": resolve_device(self.device), "data": self.text.digest()}

    def remarks(self) -> tuple[str, ...]:
        return self.text.remarks()

    def arms(self) -> Iterator[Arm]:
        for setting, null in (("edited copies", False), ("copies of other items", True)):
            for name, role, about in (
                ("planted", "control", "nothing is removed"),
                ("exact copies removed", "control", "rows that hold an item word for word are removed"),
                ("n-grams removed", "treatment", "rows that cover more than half of an item by n-grams are removed"),
                ("clean", "reference", "nothing was planted"),
            ):
                yield Arm(name, role, setting, null, about=about)  # type: ignore[arg-type]

    def run(self, arm: Arm, seed: int, context: Context) -> Outcome:
        import numpy as np

        from trialist.data.order import PackedBatches
        from trialist.data.packing import pack
        from trialist.data.tokenizers import byte_tokenizer, document_start, encode_documents

        folder = context.stage(
            "passages",
            (*dataclasses.astuple(self.text), self.digests()["data"], self.items, self.item_words),
            self.build,
        )
        stored = json.loads((folder / "texts.json").read_text(encoding="utf-8"))
        draw = np.random.default_rng(context.stream("planting"))
        order = draw.permutation(3 * self.items)
        planted, kept_out, others = (
            [stored["passages"][at] for at in order[start : start + self.items]]
            for start in range(0, 3 * self.items, self.items)
        )
        copied = planted if arm.setting == "edited copies" else others
        rows, is_planted = self.plant(stored["rows"], copied, draw)
        keep = self.kept(arm.name, rows, is_planted, planted + kept_out if copied is planted else others + kept_out)
        texts = [row for row, kept in zip(rows, keep) if kept]

        tokenizer = byte_tokenizer()
        start = document_start(tokenizer)
        packed = pack(encode_documents(tokenizer, texts), self.length, bos_id=start)
        batches = PackedBatches(packed, self.batch, context.stream("data_order"))
        tests = {
            name: (
                pack(encode_documents(tokenizer, part), self.length, bos_id=start),
                sum(len(t.encode()) for t in part),
            )
            for name, part in (("planted", planted), ("kept out", kept_out))
        }
        device = resolve_device(self.device)
        model = new_decoder(
            context, device=device, vocab_size=len(tokenizer), hidden_size=self.width, num_hidden_layers=self.layers,
            num_attention_heads=self.heads, max_position_embeddings=self.length,
        )  # fmt: skip

        def evaluate(trained: Any) -> dict[str, float]:
            bits = {name: bits_per_byte(trained, *part, batch=self.batch) for name, part in tests.items()}
            return {"inflation": bits["kept out"] - bits["planted"], "test_bits_per_byte": bits["kept out"]}

        outcome, last = train(
            model,
            lambda step: {name: tensor.to(device) for name, tensor in batches(step).items()},
            context,
            steps=self.steps,
            learning_rate=self.learning_rate,
            dtype=self.dtype,
            evaluate=evaluate,
            evaluations=5,
            tokenizer=tokenizer,
        )
        if outcome.diverged is not None:
            return outcome
        lost = {
            "planted_rows_left": float(keep[is_planted].mean()),
            "clean_rows_lost": float(1 - keep[~is_planted].mean()),
        }
        return dataclasses.replace(outcome, metrics={**last, **lost})

    def build(self, folder: Path) -> None:
        """Fills a stage: training rows, and passages of test documents."""
        from trialist.data.files import cut_text

        splits = self.text.splits()
        rows = [piece for text in take(splits.train, self.train_bytes, longest=None) for piece in cut_text(text, PIECE)]
        stored = {"rows": rows, "passages": passages(splits.test.texts, 3 * self.items, self.item_words, self.data)}
        (folder / "texts.json").write_text(json.dumps(stored), encoding="utf-8")

    def plant(
        self, rows: Sequence[str], items: Sequence[str], draw: np.random.Generator
    ) -> tuple[list[str], np.ndarray]:
        """The rows and `copies` of each item among them, edited; and which rows are planted."""
        import numpy as np

        words = [word for row in rows for word in row.split()]
        made = []
        for item in items:
            for _ in range(self.copies):
                copy = item.split(" ")
                for at in np.flatnonzero(draw.random(len(copy)) < self.replaced):
                    copy[at] = words[draw.integers(len(words))]
                made.append(" ".join(copy))
        return [*rows, *made], np.arange(len(rows) + len(made)) >= len(rows)

    def kept(self, arm: str, rows: Sequence[str], is_planted: np.ndarray, items: Sequence[str]) -> np.ndarray:
        """(rows,) bool: what the arm trains on. items: what is looked for in the rows."""
        import numpy as np

        from trialist.data.benchmark_items import Items
        from trialist.data.overlap import OverlapIndex
        from trialist.data.scan import Rule, Scan
        from trialist.data.streams import Place

        if arm == "clean":
            return ~is_planted
        rule = {
            "planted": Rule(coverage=1.0),
            "exact copies removed": Rule("longest", EXACT),
            "n-grams removed": Rule("tulu3", self.coverage),
        }[arm]
        wanted = Items("test", ("text",), tuple(map(str, range(len(items)))), tuple((text,) for text in items))
        scan = Scan(OverlapIndex([wanted], self.n), rule, list_rows=True)
        scan.add([Place("rows", number) for number in range(len(rows))], [[row] for row in rows])
        keep = np.ones(len(rows), bool)
        keep[[row.place.number for row in scan.found]] = False
        return keep


def passages(texts: Sequence[str], count: int, words: int, name: str) -> list[str]:
    """Passages of so many words from texts, words joined by single spaces, that do not overlap: the same for every seed.

    Raises ValueError when the texts hold fewer.
    """
    found = []
    for text in texts:
        split = text.split()
        found += [" ".join(split[at : at + words]) for at in range(0, len(split) - words + 1, 2 * words)]
    distinct = list(dict.fromkeys(found))
    if len(distinct) < count:
        raise ValueError(
            f"{name}: its test split holds {len(distinct)} passages of {words} words, {count} are needed; lower --items"
        )
    step = len(distinct) // count
    return distinct[: count * step : step]
