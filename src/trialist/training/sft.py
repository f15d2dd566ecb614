"""The recipe `sft`: supervised fine-tuning of a causal language model on rows of the user's own."""

from __future__ import annotations

import math
import os
import sys
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from trialist.data.conversations import Examples
    from trialist.training.trainer import ObjectiveTrainer

DEFAULT_LENGTH = 1024
FULL_RATE, LORA_RATE = 2e-5, 2e-4
NOT_SETTINGS = ("output", "save", "report_to", "log_every", "checkpoint_every", "evaluate_every")
"""Options that may change between an interrupted run and its continuation"""


@dataclass(frozen=True)
class SupervisedFineTuning:
    """Supervised fine-tuning: a causal language model learns the answers in your rows.

    Rows hold `messages`, or `prompt` and `completion` (strings or lists of messages), or `text`. Only what the assistant
    wrote counts; examples are packed without padding and without seeing each other. The same command goes on after an
    interruption, to the bit on the CPU. Under torchrun every rank takes its share of the examples.
    """

    model: str
    """Hub id, local folder or asset of a causal language model"""
    data: str
    """Rows: Hub id, local .jsonl, .json or .parquet file or folder (or text: .txt, python-stdlib)"""
    output: str
    """Folder for the trained model; until then its subfolder `checkpoint` holds what a continuation needs"""
    columns: str = ""
    """Columns under other names, ours first: prompt=question,completion=answer"""
    split: str | None = None
    """Split of the data to train on; without it `train`, or all there is"""
    max_examples: int | None = None
    """Most rows to read"""
    validation: float = 0.05
    """Share of the rows held out, by content; 0 for none; unused where the data bring a validation split or you name one"""
    validation_data: str | None = None
    """Rows to validate on, in the format of the data"""
    train_on: Literal["completions", "last", "all"] = "completions"
    """Tokens that count: completions and all turns of the assistant, its last turn only, or all tokens"""
    chat: bool = False
    """Put string prompts and completions through the chat template, as a turn of the user and one of the assistant"""
    chat_template: str | None = None
    """File with a Jinja chat template instead of the tokenizer's own; saved with the model"""
    length: int | None = None
    """Most tokens of an example, longer ones are cut off at the end; without it 1024, or the model's context if shorter"""
    drop_long: bool = False
    """Leave longer examples out instead"""
    lora: int = 0
    """Rank of LoRA adapters on all linear layers (alpha is twice the rank); 0 trains all weights"""
    save: Literal["merged", "adapter"] = "merged"
    """With --lora: a whole model, or the adapter alone"""
    epochs: float = 1.0
    """Passes over the data"""
    steps: int | None = None
    """Optimizer steps, instead of epochs"""
    batch: int = 8
    """Examples in a micro-batch, per device"""
    accumulate: int = 1
    """Micro-batches in a step; every token of a step weighs the same"""
    learning_rate: float | None = None
    """Peak learning rate; without it 2e-5, with LoRA 2e-4"""
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    """Course of the learning rate after warm-up; cosine and linear end at 0"""
    warmup: float = 0.03
    """Share of the steps over which the learning rate rises from 0"""
    weight_decay: float = 0.0
    """Decay of matrices in AdamW"""
    clip: float = 1.0
    """Largest norm of the gradient; 0 for no clipping"""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """bfloat16 computes in bfloat16; trained weights stay float32, with LoRA the frozen ones are stored in bfloat16"""
    device: Literal["auto", "cpu"] = "auto"
    """The accelerator if there is one, or the CPU"""
    packing: bool = True
    """Several examples in a row, apart from each other; padding otherwise. The training is the same, only slower"""
    gradient_checkpointing: bool = False
    """Less memory for about a third more time"""
    evaluate_every: int | None = None
    """Steps between validations; without it before and after training"""
    checkpoint_every: int | None = None
    """Steps between checkpoints; without it ten in a run"""
    log_every: int = 10
    """Steps between lines of progress"""
    report_to: tuple[str, ...] = ()
    """Loggers of the Trainer, for example tensorboard (into OUTPUT/logs), wandb, trackio"""
    seed: int = 0
    """Of the order of the data, of adapters and of dropout"""

    def __post_init__(self) -> None:
        for name, least in (("max_examples", 1), ("length", 2), ("steps", 1), ("batch", 1), ("accumulate", 1), ("lora", 0),
                            ("evaluate_every", 1), ("checkpoint_every", 1), ("log_every", 1), ("seed", 0)):  # fmt: skip
            value = getattr(self, name)
            if value is not None and value < least:
                raise ValueError(f"--{name.replace('_', '-')} must be at least {least}, not {value}")
        for name, low, high in (("validation", 0, 1), ("warmup", 0, 1)):
            if not low <= getattr(self, name) < high:
                raise ValueError(f"--{name} is a share from 0 to below 1, not {getattr(self, name)}")
        if not 0 < self.epochs < math.inf:
            raise ValueError(f"--epochs must be > 0, not {self.epochs}")
        if self.learning_rate is not None and not 0 < self.learning_rate < math.inf:
            raise ValueError(f"--learning-rate must be > 0, not {self.learning_rate}")
        if not self.clip >= 0 or not self.weight_decay >= 0:
            raise ValueError(f"--clip and --weight-decay must be at least 0, not {self.clip} and {self.weight_decay}")
        if self.save == "adapter" and not self.lora:
            raise ValueError("--save adapter needs --lora RANK: without it there is no adapter")

    def __call__(self, say: Callable[[str], None] = print) -> Mapping[str, Any]:
        """Trains, writes the model folder and returns what to show: sizes, losses before and after, seconds."""
        from transformers.utils import logging

        say = say if os.environ.get("RANK", "0") == "0" else _silent
        shown = logging.is_progress_bar_enabled()
        logging.disable_progress_bar()  # a bar for each file that is read or written
        try:
            return self._train(say)
        finally:
            if shown:
                logging.enable_progress_bar()

    def _train(self, say: Callable[[str], None]) -> Mapping[str, Any]:
        from trialist.data.tokenizers import load_tokenizer
        from trialist.models.loading import load_model, model_source
        from trialist.training.output import ModelOutput

        self._check_loggers()
        model_source(self.model)
        tokenizer = load_tokenizer(self.model)
        if self.chat_template is not None:
            tokenizer.chat_template = Path(self.chat_template).read_text(encoding="utf-8")
        length = self._length()
        output = ModelOutput(Path(self.output).expanduser(), self._settings(length))
        if (finished := output.finished()) is not None:
            say(f"{self.output} holds the finished model of this very run; remove it to train again")
            return finished
        train, validation = self._examples(tokenizer, length, say)
        say(
            f"{len(train):,} examples, {train.tokens:,} tokens, {train.counted:,} of them count; held out: {len(validation):,}"
        )
        for note in dict.fromkeys((*train.notes, *validation.notes)):
            say(f"note: {note}")

        dtype = self.dtype if self.lora else "float32"
        model = load_model(self.model, dtype=dtype)
        _check_vocabulary(model, train, self.model)
        trainer = self._trainer(model, tokenizer, train, validation, output, say)
        began = time.perf_counter()
        checkpoint = output.start(say)
        trainer.train(resume_from_checkpoint=checkpoint)
        losses = self._validation_losses(trainer) if len(validation) else ()
        result: dict[str, Any] = {
            "model": self.output,
            "examples": len(train),
            "tokens": train.tokens,
            "steps": trainer.state.global_step,
            "seconds": round(time.perf_counter() - began, 1),
        }
        if losses:
            result |= {"validation loss before": round(losses[0], 4), "validation loss after": round(losses[-1], 4)}
        if trainer.is_world_process_zero():
            output.write(trainer.model, tokenizer, result, merge=self.save == "merged")
        return result

    def _settings(self, length: int) -> dict[str, Any]:
        """What a run that goes on must share with the one that was interrupted, in JSON types."""
        from trialist.data.corpora import data_digest
        from trialist.models.loading import model_digest

        chosen = {name: value for name, value in asdict(self).items() if name not in NOT_SETTINGS}
        if self.chat_template is not None:
            chosen["chat_template"] = Path(self.chat_template).read_text(encoding="utf-8")
        digests = {"data content": data_digest(self.data), "model content": model_digest(self.model)}
        if self.validation_data is not None:
            digests["validation content"] = data_digest(self.validation_data)
        return {**chosen, **digests, "length": length, "ranks": int(os.environ.get("WORLD_SIZE", "1"))}

    def _length(self) -> int:
        from transformers import AutoConfig

        from trialist.models.loading import model_source

        source = Path(model_source(self.model))
        if (source / "adapter_config.json").is_file() and not (source / "config.json").is_file():
            raise ValueError(f"model {self.model!r} is an adapter; merge it into its model first, or train that model")
        config = AutoConfig.from_pretrained(str(source)).get_text_config()
        names = ("max_position_embeddings", "n_positions")
        context = next((size for name in names if (size := getattr(config, name, None))), None)
        if self.length is not None and context is not None and self.length > context:
            raise ValueError(f"--length {self.length} is longer than {self.model} takes, {context} tokens")
        return self.length or min(DEFAULT_LENGTH, context or DEFAULT_LENGTH)

    def _check_loggers(self) -> None:
        if not self.report_to:
            return
        from transformers.integrations import get_available_reporting_integrations

        there = get_available_reporting_integrations()
        missing = [name for name in self.report_to if name not in there]
        if missing:
            raise ValueError(
                f"--report-to {missing[0]}: not installed here (there is {', '.join(sorted(there)) or 'none'}); "
                f"`pip install {missing[0]}`, or leave it out"
            )

    def _examples(
        self, tokenizer: PreTrainedTokenizerBase, length: int, say: Callable[[str], None]
    ) -> tuple[Examples, Examples]:
        """What is trained on and what is held out."""
        from trialist.data.conversations import Examples, encode_rows
        from trialist.data.corpora import Documents, parse_columns, split_names
        from trialist.data.formats import lead, read_rows
        from trialist.data.splits import hold_out

        mapping = parse_columns(self.columns)
        choices: Any = {"length": length, "train_on": self.train_on, "chat": self.chat, "drop_long": self.drop_long}
        columns, rows = read_rows(self.data, split=self.split, columns=mapping, max_examples=self.max_examples)
        train = encode_rows(rows, columns, tokenizer, source=self.data, **choices)
        brought = self.split in (None, "train") and "validation" in split_names(self.data)
        if self.validation_data is not None or brought:
            if self.validation_data is None:
                say(f"validation: the split of that name that {self.data} brings")
            other, split = (self.validation_data, None) if self.validation_data else (self.data, "validation")
            columns, rows = read_rows(other, split=split, columns=mapping)
            return train, encode_rows(rows, columns, tokenizer, source=other, **choices)
        if self.validation == 0:
            return train, Examples([], ())
        ids = tuple(map(str, train.numbers))
        leads = Documents(ids, tuple(lead(rows[number - 1], columns) for number in train.numbers), self.data)
        try:
            kept, held_out = hold_out(leads, self.validation)
        except ValueError as error:
            raise ValueError(f"{error}; or pass --validation 0 to hold out nothing") from error
        return train.select(kept), train.select(held_out)

    def _trainer(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        train: Examples,
        validation: Examples,
        output: Any,
        say: Callable[[str], None],
    ) -> ObjectiveTrainer:
        import torch
        from transformers import PrinterCallback, TrainingArguments
        from transformers.integrations import TensorBoardCallback

        from trialist.data.collation import pack_rows
        from trialist.models.documents import keeps_documents_apart
        from trialist.objectives.cross_entropy import CrossEntropy
        from trialist.optimizers.adamw import adamw
        from trialist.training.progress import Lines
        from trialist.training.trainer import ObjectiveTrainer

        packing = self.packing
        if packing:
            with torch.no_grad():
                packing = keeps_documents_apart(model, int(train.rows[0]["input_ids"][0]), model.device)
            if not packing:
                say(
                    f"note: {type(model).__name__} lets packed examples see each other, so each is padded in a row of its own"
                )
        if self.gradient_checkpointing:
            enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
            enable()
        torch.manual_seed(self.seed)
        trained: Any = model
        if self.lora:
            from peft import LoraConfig, get_peft_model

            lora = LoraConfig(r=self.lora, lora_alpha=2 * self.lora, target_modules="all-linear", task_type="CAUSAL_LM")
            with warnings.catch_warnings():  # PEFT reads an attribute that transformers has renamed
                warnings.filterwarnings("ignore", ".*is_gradient_checkpointing", FutureWarning)
                trained = get_peft_model(model, lora)
        total = self._total_steps(len(train))
        rate = self.learning_rate or (LORA_RATE if self.lora else FULL_RATE)
        cpu = self.device == "cpu" or not torch.accelerator.is_available()
        arguments = TrainingArguments(
            output_dir=str(output.checkpoints),
            max_steps=total,
            per_device_train_batch_size=self.batch,
            per_device_eval_batch_size=self.batch,
            gradient_accumulation_steps=self.accumulate,
            learning_rate=rate,
            lr_scheduler_type="constant_with_warmup" if self.schedule == "constant" else self.schedule,
            warmup_steps=math.ceil(self.warmup * total),
            max_grad_norm=self.clip,
            bf16=self.dtype == "bfloat16",
            use_cpu=cpu,
            dataloader_pin_memory=not cpu,
            logging_steps=self.log_every,
            eval_strategy="steps" if len(validation) else "no",
            eval_steps=self.evaluate_every or total,
            eval_on_start=bool(len(validation)),
            save_strategy="steps",
            save_steps=self.checkpoint_every or max(1, math.ceil(total / 10)),
            save_total_limit=2,
            seed=self.seed,
            report_to=list(self.report_to) or "none",
            disable_tqdm=not sys.stderr.isatty(),
        )
        trainer = ObjectiveTrainer(
            trained,
            arguments,
            objective=CrossEntropy(),
            data_collator=pack_rows if packing else None,
            train_dataset=train.rows,
            eval_dataset=validation.rows if len(validation) else None,
            processing_class=tokenizer,
            optimizers=(adamw(trained, rate, weight_decay=self.weight_decay, betas=(0.9, 0.999)), None),
        )
        trainer.remove_callback(PrinterCallback)
        trainer.add_callback(Lines(say, total))
        for callback in trainer.callback_handler.callbacks:
            if isinstance(callback, TensorBoardCallback) and callback.logging_dir is None:
                callback.logging_dir = str(output.folder / "logs")
        return trainer

    def _total_steps(self, examples: int) -> int:
        if self.steps is not None:
            return self.steps
        ranks = int(os.environ.get("WORLD_SIZE", "1"))
        micro_batches = math.ceil(examples / (self.batch * ranks))
        return math.ceil(self.epochs * math.ceil(micro_batches / self.accumulate))

    def _validation_losses(self, trainer: ObjectiveTrainer) -> Sequence[float]:
        history = trainer.state.log_history
        evaluations = [(entry["step"], entry["eval_loss"]) for entry in history if "eval_loss" in entry]
        if not evaluations or evaluations[-1][0] != trainer.state.global_step:
            evaluations.append((trainer.state.global_step, trainer.evaluate()["eval_loss"]))
        return [loss for _, loss in evaluations]


def _check_vocabulary(model: PreTrainedModel, examples: Examples, name: str) -> None:
    largest = max(int(row["input_ids"].max()) for row in examples.rows)
    size = model.get_input_embeddings().weight.shape[0]
    if largest >= size:
        raise ValueError(
            f"the tokenizer of {name} gives token {largest}, beyond the model's vocabulary of {size}; they do not belong "
            "together"
        )


def _silent(text: str) -> None:
    """The word of all ranks but the first."""
