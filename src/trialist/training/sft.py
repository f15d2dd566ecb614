"""The recipe `sft`: supervised fine-tuning of a causal language model on rows of the user's own."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from trialist.training.recipe import Recipe, Work

if TYPE_CHECKING:
    from trialist.data.conversations import Examples


@dataclass(frozen=True)
class SupervisedFineTuning(Recipe):
    """Supervised fine-tuning: a causal language model learns the answers in your rows.

    Rows hold `messages`, or `prompt` and `completion` (strings or lists of messages), or `text`. Only what the assistant
    wrote counts; examples are packed without padding and without seeing each other. The same command goes on after an
    interruption, to the bit on the CPU. Under torchrun every rank takes its share of the examples.
    """

    data: str
    """Rows: Hub id, local .jsonl, .json or .parquet file or folder (or text: .txt, python-stdlib)"""
    columns: str = ""
    """Columns under other names, ours first: prompt=question,completion=answer"""
    validation: float = 0.05
    """Share of the rows held out, by content; 0 for none; unused where the data bring a validation split or you name one"""
    length: int | None = None
    """Most tokens of an example, longer ones are cut off at the end; without it 1024, or the model's context if shorter"""
    batch: int = 8
    """Examples in a micro-batch, per device"""
    accumulate: int = 1
    """Micro-batches in a step; every token of a step weighs the same"""
    learning_rate: float | None = None
    """Peak learning rate; without it 2e-5, with LoRA 2e-4"""
    seed: int = 0
    """Of the order of the data, of adapters and of dropout"""
    train_on: Literal["completions", "last", "all"] = "completions"
    """Tokens that count: completions and all turns of the assistant, its last turn only, or all tokens"""
    drop_long: bool = False
    """Leave longer examples out instead"""
    packing: bool = True
    """Several examples in a row, apart from each other; padding otherwise. The training is the same, only slower"""
    memory_price: float = 0.0
    """Price of remembering the whole context, in nats a token: makes selective attention forget what it can do without"""

    RATES: ClassVar = (2e-5, 2e-4)
    SHOWN: ClassVar = {"memory": "share of context kept", "eval_memory": "validation share of context kept"}

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require_not_negative("memory_price")

    def train(self, work: Work) -> Mapping[str, Any]:
        import torch

        from trialist.data.collation import pack_rows
        from trialist.models.documents import keeps_documents_apart
        from trialist.models.loading import load_model
        from trialist.models.selective_attention.memory import selective_modules
        from trialist.objectives.memory_loss import MemoryLoss
        from trialist.training.trainer import ObjectiveTrainer

        train, validation = self._examples(work)
        work.say(
            f"{len(train):,} examples, {train.tokens:,} tokens, {train.counted:,} of them count; held out: {len(validation):,}"
        )
        for note in dict.fromkeys((*train.notes, *validation.notes)):
            work.say(f"note: {note}")
        model = load_model(self.model, dtype=self.weights_dtype)
        self.check_vocabulary(model, max(int(row["input_ids"].max()) for row in train.rows))
        if self.memory_price and not selective_modules(model):
            raise ValueError(
                f"--memory-price {self.memory_price}: {self.model} has no selective attention, so nothing of its context is ever "
                "forgotten; give it some with `trialist apply selective-attention`, or leave the price 0"
            )
        packing = self.packing
        if packing:
            with torch.no_grad():
                packing = keeps_documents_apart(model, int(train.rows[0]["input_ids"][0]), model.device)
            if not packing:
                work.say(
                    f"note: {type(model).__name__} lets packed examples see each other, so each is padded in a row of its own"
                )
        trained = self.prepared(model)
        trainer = ObjectiveTrainer(
            trained,
            self.arguments(work, self.total_steps(len(train)), bool(len(validation))),
            objective=MemoryLoss(epsilon=self.memory_price),
            data_collator=pack_rows if packing else None,
            train_dataset=train.rows,
            eval_dataset=validation.rows if len(validation) else None,
            processing_class=work.tokenizer,
            optimizers=self.optimizers(trained),
        )
        validated = {"eval_loss": "loss", **({"eval_memory": "share of context kept"} if self.memory_price else {})}
        return self.run(work, trainer, {"examples": len(train), "tokens": train.tokens}, validated)

    def _examples(self, work: Work) -> tuple[Examples, Examples]:
        """What is trained on and what is held out."""
        from trialist.data.conversations import Examples, encode_rows
        from trialist.data.corpora import parse_columns, split_names
        from trialist.data.formats import lead, read_rows

        mapping = parse_columns(self.columns)
        choices: Any = {
            "length": work.length,
            "train_on": self.train_on,
            "chat": self.chat,
            "drop_long": self.drop_long,
        }
        columns, rows = read_rows(self.data, split=self.split, columns=mapping, max_examples=self.max_examples)
        train = encode_rows(rows, columns, work.tokenizer, source=self.data, **choices)
        brought = self.split in (None, "train") and "validation" in split_names(self.data)
        if self.validation_data is not None or brought:
            if self.validation_data is None:
                work.say(f"validation: the split of that name that {self.data} brings")
            other, split = (self.validation_data, None) if self.validation_data else (self.data, "validation")
            columns, rows = read_rows(other, split=split, columns=mapping)
            return train, encode_rows(rows, columns, work.tokenizer, source=other, **choices)
        if self.validation == 0:
            return train, Examples([], ())
        kept, held_out = self.hold_out([lead(rows[number - 1], columns) for number in train.numbers])
        return train.select(kept), train.select(held_out)
