"""Does removing rows by n-grams take away what a model gains on test items that were planted in its training text?"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from trialist.engine.context import Context
from trialist.engine.contract import Arm, Budget, Claim, Endpoint, Items, Outcome, Trial
from trialist.trials._language_model import BUILT_IN, PRELOAD, VERSIONS, check_inputs, check_length, model_inputs
from trialist.trials._planted_models import CLEAN, MIXED, NOTHING, OTHERS, SETTINGS, PlantedModels, inflations
from trialist.trials._planted_text import PlantedText
from trialist.trials._text import Text


@dataclass(frozen=True)
class DecontaminationTrial(Trial):
    """Does removing rows by n-grams take away what a model gains on test items planted in its training text?"""

    claim = Claim(
        statement="Trained on text that holds copies of test items, verbatim and edited, a model predicts those items better "
        "than it should; removing the rows that cover more than half of an item by 8-grams leaves less of that gain than "
        "removing verbatim copies, rows that share 8 or 13 words in a row with an item, or as many rows at random.",
        source="arXiv:2411.15124",
        reported="the rule (n-grams of 8, more than half of an item, more than 2 % of the items) by which training sets were "
        "decontaminated; its effect on scores is not reported",
        endpoint=Endpoint("inflation_left", unit="share of the gain from planting", better="lower", margin=0.1),
        guards=(Endpoint("test_bits_per_byte", unit="bits per byte", better="lower", margin=0.05, floor=4.0),),
        secondary=(
            # no guard: rules that lose no row in any seed have no interval, and would never be inside a margin
            Endpoint("clean_rows_lost", unit="share of other rows", better="lower"),
            Endpoint("inflation", unit="bits per byte", better="lower"),
            Endpoint("planted_rows_left", unit="share of planted rows", better="lower"),
            Endpoint("recall_of_restyled", unit="share of copies", better="higher"),
            Endpoint("recall_of_numbers_swapped", unit="share of copies", better="higher"),
            Endpoint("recall_of_reworded", unit="share of copies", better="higher"),
        ),
    )
    replicate = "seed x item"
    budget = Budget("steps")
    presets = {
        "tiny": dict(seeds=3, about="about 5 minutes a setting on 2 cores"),
        "real": dict(
            model="smollm2-135m-instruct", benchmark="gsm8k", lora=16, items=24, batch=4, steps=75, train_bytes=40_000, seeds=3,
            about="a given model and --data of your own, such as the training split of GSM8K, 2 to 3 hours on 2 cores",
        ),
        "gpu": dict(
            data="enwik8", tokenizer="bpe-8192", layers=8, width=512, heads=8, length=1024, batch=32, steps=3_000,
            train_bytes=40_000_000, items=512, seeds=6, about="an hour on one GPU",
        ),
    }  # fmt: skip
    preload = (
        *PRELOAD,
        "trialist.data.packing",
        "trialist.data.order",
        "trialist.data.tokenizers",
        "trialist.data.matching",
        "trialist.data.scan",
        "trialist.evaluation.bits_per_byte",
    )
    versions = VERSIONS
    usage = (
        "from trialist.data.decontaminate import Decontaminate\n"
        'Decontaminate(data="rows.jsonl", benchmarks=("gsm8k", "mmlu"), output="clean.jsonl")()'
    )

    model: str = BUILT_IN
    """Hub id, local folder or asset of a model whose training is continued; `decoder` trains a small one from scratch"""
    data: str = "python-stdlib"
    """Training text: Hub id, local .txt, .jsonl or .parquet file or folder, or a built-in name"""
    benchmark: str = ""
    """Benchmark whose questions are planted, as `analyze contamination` takes them; without it passages of the test split"""
    items: int = 48
    """Planted test items, and as many that are not planted"""
    item_words: int = 50
    """Words in a passage"""
    copies: int = 7
    """Copies of each planted item, each edited in its own way and a row of its own"""
    n: int = 8
    """Words in an n-gram of the treatment"""
    coverage: float = 0.5
    """Share of an item that a row must cover for the treatment to remove it; 1 removes nothing"""
    train_bytes: int = 900_000
    """Bytes of training text beside the planted rows"""
    tokenizer: str = "bpe-1024"
    """Tokenizer of the built-in decoder: `bytes`, `bpe-N` for N tokens trained on the training text, or a model's"""
    layers: int = 2
    """Layers of the built-in decoder"""
    width: int = 96
    """Width of the built-in decoder"""
    heads: int = 4
    """Attention heads of the built-in decoder"""
    length: int = 256
    """Tokens in a training sequence"""
    batch: int = 8
    """Sequences in a step"""
    steps: int = 200
    """Training steps"""
    learning_rate: float | None = None
    """Peak learning rate, the same for all arms: they differ in their data only. Without it 4e-3 for the built-in decoder, 1e-3
    for adapters of a given model, 5e-5 for all of its weights"""
    split: str | None = None
    """Split of the data to read: `train` is cut 80/10/10, another name is the test set; without it as the data come"""
    columns: str = ""
    """Column that holds the text, text=NAME; with a benchmark, in it and in the data, question=NAME,answer=NAME"""
    max_examples: int | None = None
    """Most documents to read"""
    device: str = "auto"
    """`auto`, `cpu` or `cuda`"""
    dtype: str = "float32"
    """float32, or bfloat16 for autocast"""
    lora: int = 0
    """Rank of LoRA adapters for a given model; 0 trains all weights"""

    def check(self) -> None:
        check_inputs(
            self.model, self.dtype, self.lora, items=self.items, item_words=self.item_words, copies=self.copies, n=self.n,
            train_bytes=self.train_bytes, layers=self.layers, width=self.width, heads=self.heads, length=self.length,
            batch=self.batch, steps=self.steps,
        )  # fmt: skip
        if not 0 <= self.coverage <= 1:
            raise ValueError(f"--coverage is a share from 0 to 1, not {self.coverage}")
        if self.item_words < self.n and not self.benchmark:
            raise ValueError(
                f"--item-words {self.item_words} must be at least --n {self.n}: shorter items have no n-gram"
            )
        if self.model != BUILT_IN:
            check_length(self.model, self.length)
        elif self.width % (2 * self.heads):
            raise ValueError(f"--width {self.width} must be an even multiple of --heads {self.heads}")
        if self.benchmark and self.data == type(self).data:
            raise ValueError(
                f"--benchmark {self.benchmark} needs --data with rows of question and answer, such as its training split"
            )
        self.source.check()

    @property
    def source(self) -> PlantedText:
        text = Text(
            data=self.data, tokenizer=self.tokenizer if self.model == BUILT_IN else self.model, split=self.split,
            columns=self.columns, max_examples=self.max_examples, length=self.length, train_tokens=self.train_bytes,
            test_bytes=0,
        )  # fmt: skip
        return PlantedText(text, self.benchmark, self.items, self.item_words)

    def digests(self) -> Mapping[str, str]:
        return {**model_inputs(self.model, self.device), **self.source.digests()}

    def remarks(self) -> tuple[str, ...]:
        left_out = (
            "the settings of one edit alone and two references are left out: every run of a given model takes long"
        )
        return (*self.source.remarks(), *([] if self.model == BUILT_IN else [left_out]))

    def arms(self) -> Iterator[Arm]:
        half = f"more than {self.coverage:.0%} of an item by {self.n}-grams"
        for setting in SETTINGS if self.model == BUILT_IN else (MIXED, OTHERS):
            null = setting == OTHERS
            yield Arm(NOTHING, "control", setting, null, about="no row is removed")
            if not null:
                yield Arm("full-string", "control", setting, about="without rows that hold an item word for word")
                yield Arm("gpt3", "control", setting, about="without rows that share 13 words in a row with an item")
                yield Arm("open-r1", "control", setting, about="without rows that share 8 words in a row with an item")
            if setting in (MIXED, OTHERS):
                as_many = "without as many rows as `tulu3` removes, drawn at random"
                yield Arm("random", "control", setting, null, about=as_many)
            yield Arm("tulu3", "treatment", setting, null, about=f"without rows that cover {half}")
            if setting == MIXED:
                if self.model == BUILT_IN:
                    numbers = "without rows that share 12 words in a row with an item, all numbers alike"
                    yield Arm("datatrove", "reference", setting, about=numbers)
                    run = "without rows that cover more than half of an item in one run"
                    yield Arm("longest", "reference", setting, about=run)
                yield Arm(CLEAN, "reference", setting, about="nothing was planted")

    def run(self, arm: Arm, seed: int, context: Context) -> Outcome:
        models = PlantedModels(self, context)
        rows, planted = models.rows(arm.setting)
        keep = models.kept(arm.name, rows, planted)
        clean, most = models.end(CLEAN), models.end(MIXED if arm.setting == OTHERS else arm.setting)
        if context.keep_model or arm.setting == OTHERS or arm.name not in (NOTHING, CLEAN):
            outcome = models.trained([row for row, stays in zip(rows, keep) if stays])
        else:
            outcome = clean if arm.name == CLEAN else most
        if outcome.diverged is not None:
            return outcome
        scores, undefined = inflations(outcome, clean, most)
        items: dict[str, Items] = {"test_bits_per_byte": outcome.items["test_bits_per_byte"], **scores}
        metrics = {name: sum(of.scores) / len(of.scores) for name, of in items.items()}
        metrics |= {
            "planted_rows_left": float(keep[planted].mean()),
            "clean_rows_lost": float(1 - keep[~planted].mean()),
        }
        curves = dict(outcome.curves)
        if arm.setting == MIXED and arm.name != CLEAN:
            found, curves["recall_by_share_of_words_dropped"] = models.recalls(arm.name, 1 - float(keep.mean()))
            metrics |= {f"recall_of_{edit.replace(' ', '_')}": share for edit, share in found.items()}
        notes = (
            f"in setting {arm.setting} {planted.mean():.0%} of the rows are planted",
            "wall and CPU time include the two shared trainings between which the gain from planting lies",
        )
        return dataclasses.replace(
            outcome, metrics=metrics, items=items, undefined=undefined, curves=curves, notes=notes
        )
