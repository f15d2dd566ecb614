"""What recipes share: the options of a training, their checks, and the way from a model and rows to a model folder."""

from __future__ import annotations

import math
import os
import sys
import time
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from trialist.training.options import TrainingOptions

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedTokenizerBase, Trainer, TrainingArguments

    from trialist.training.output import ModelOutput

DEFAULT_LENGTH = 1024
NOT_SETTINGS = ("output", "save", "report_to", "log_every", "checkpoint_every", "evaluate_every")
"""Options that may change between an interrupted run and its continuation"""
Say = Callable[[str], None]


@dataclass(frozen=True)
class Work:
    """What a recipe has in hand when it begins: all that can be refused early is checked."""

    tokenizer: PreTrainedTokenizerBase
    context: int | None
    """Most tokens that the model takes, None where its configuration does not say"""
    length: int
    """Most tokens of a row"""
    output: ModelOutput
    say: Say


@dataclass(frozen=True)
class RecipeInputs:
    """What every recipe must be given."""

    model: str
    """Hub id, local folder or asset of a causal language model"""
    data: str
    """Rows: Hub id, local .jsonl, .json or .parquet file or folder"""
    output: str
    """Folder for the trained model; until then its subfolder `checkpoint` holds what a continuation needs"""


@dataclass(frozen=True)
class Recipe(TrainingOptions, RecipeInputs, ABC):
    """A way to train a model on rows. The same command goes on after an interruption.

    A subclass gives other defaults and words to these options, adds its own, reads its rows in `_examples`, and does its work
    in `train`.
    """

    columns: str = ""
    """Columns under other names, ours first: prompt=question"""
    split: str | None = None
    """Split of the data to train on; without it `train`, or all there is"""
    validation_data: str | None = None
    """Rows to validate on, in the format of the data"""
    chat: bool = False
    """Put strings through the chat template: the prompt as a turn of the user, an answer as one of the assistant"""
    length: int | None = None
    """Most tokens of a prompt with an answer, longer answers lose their end; without it 1024, or the model's context if
    shorter"""
    save: Literal["merged", "adapter"] = "merged"
    """With --lora: a whole model, or the adapter alone"""
    epochs: float = 1.0
    """Passes over the data"""
    batch: int = 4
    """Rows in a micro-batch, per device"""
    accumulate: int = 4
    """Micro-batches in a step; every row of a step weighs the same"""
    learning_rate: float | None = None
    """Peak learning rate"""
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    """Course of the learning rate after warm-up; cosine and linear end at 0"""
    warmup: float = 0.03
    """Share of the steps over which the learning rate rises from 0"""
    weight_decay: float = 0.0
    """Decay of matrices in AdamW"""
    clip: float = 1.0
    """Largest norm of the gradient; 0 for no clipping"""
    evaluate_every: int | None = None
    """Steps between validations; without it before and after training"""
    log_every: int = 10
    """Steps between lines of progress"""

    RATES: ClassVar[tuple[float, float]]
    """Default peak learning rates: of all weights, and of adapters"""
    SHOWN: ClassVar[Mapping[str, str]] = {}
    """Further names that the Trainer logs, and their words in a line of progress"""
    COMPARES_PASSES: ClassVar[bool] = False
    """Whether log-probabilities of several passes are compared, so that each must compute what a pass in evaluation does"""

    @abstractmethod
    def train(self, work: Work) -> Mapping[str, Any]:
        """Trains, writes the model folder (`run` does both) and returns what to show, label by label."""

    @abstractmethod
    def _examples(self, work: Work) -> Any:
        """What is trained on and what is held out. Raises the errors of rows."""

    def __post_init__(self) -> None:
        self.require(
            max_examples=1, length=2, steps=1, batch=1, accumulate=1, lora=0, evaluate_every=1, checkpoint_every=1,
            log_every=1, seed=0,
        )  # fmt: skip
        for name in ("validation", "warmup"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"--{name} is a share from 0 to below 1, not {getattr(self, name)}")
        self.require_above_zero("epochs", "learning_rate")
        self.require_not_negative("clip", "weight_decay")
        if self.save == "adapter" and not self.lora:
            raise ValueError("--save adapter needs --lora RANK: without it there is no adapter")

    def __call__(self, say: Say = print) -> Mapping[str, Any]:
        """Trains, writes the model folder and returns what to show: sizes, numbers before and after, seconds."""
        from transformers.utils import logging

        say = of_first_rank(say)
        shown = logging.is_progress_bar_enabled()
        logging.disable_progress_bar()  # a bar for each file that is read or written
        try:
            with warnings.catch_warnings():  # PEFT and TRL use names that transformers has changed
                warnings.filterwarnings("ignore", ".*gradient_checkpointing", FutureWarning)
                return self._begin(say)
        finally:
            if shown:
                logging.enable_progress_bar()

    def check(self) -> None:
        """Raises what is wrong with the options, the tokenizer or the rows, and trains nothing."""
        from trialist.training.output import ModelOutput

        context, length = self.limits()
        output = ModelOutput(Path(self.output).expanduser(), {})
        self._examples(Work(self.tokenizer(), context, length, output, _silent))

    def _begin(self, say: Say) -> Mapping[str, Any]:
        from trialist.models.loading import model_source
        from trialist.training.output import ModelOutput

        _check_loggers(self.report_to)
        model_source(self.model)
        tokenizer = self.tokenizer()
        context, length = self.limits()
        output = ModelOutput(Path(self.output).expanduser(), self._settings(length))
        if (finished := output.finished()) is not None:
            say(f"{self.output} holds the finished model of this very run; remove it to train again")
            return finished
        return self.train(Work(tokenizer, context, length, output, say))

    def tokenizer(self) -> PreTrainedTokenizerBase:
        from trialist.data.tokenizers import load_tokenizer

        tokenizer = load_tokenizer(self.model)
        if self.chat_template is not None:
            tokenizer.chat_template = Path(self.chat_template).read_text(encoding="utf-8")
        return tokenizer

    def limits(self) -> tuple[int | None, int]:
        """Tokens that the model takes (None where its configuration does not say), and most tokens of a row: `length`, or
        1024, or the context if that is shorter. Raises ValueError for a length beyond the context, and a lone adapter."""
        from trialist.models.loading import model_context, model_source

        source = Path(model_source(self.model))
        if (source / "adapter_config.json").is_file() and not (source / "config.json").is_file():
            raise ValueError(f"model {self.model!r} is an adapter; merge it into its model first, or train that model")
        context = model_context(self.model)
        if self.length is not None and context is not None and self.length > context:
            raise ValueError(f"--length {self.length} is longer than {self.model} takes, {context} tokens")
        return context, self.length or min(DEFAULT_LENGTH, context or DEFAULT_LENGTH)

    def contents(self) -> dict[str, str]:
        """Digests of the files that options name."""
        from trialist.data.corpora import data_digest
        from trialist.models.loading import model_digest

        digests = {"data content": data_digest(self.data_files()), "model content": model_digest(self.model)}
        if self.validation_data is not None:
            digests["validation content"] = data_digest(self.validation_data)
        return digests

    def data_files(self) -> str:
        """What makes the rows."""
        return self.data

    def _settings(self, length: int) -> dict[str, Any]:
        """What a run that goes on must share with the one that was interrupted, in JSON types."""
        chosen = {name: value for name, value in asdict(self).items() if name not in NOT_SETTINGS}
        if self.chat_template is not None:
            chosen["chat_template"] = Path(self.chat_template).read_text(encoding="utf-8")
        ranks = int(os.environ.get("WORLD_SIZE", "1"))
        return {**chosen, **self.contents(), "length": length, "ranks": ranks}

    def hold_out(self, texts: Sequence[str]) -> tuple[list[int], list[int]]:
        """Indices of the rows to train on, and of the share `validation` held out; near-duplicates stay together."""
        from trialist.data.corpora import Documents
        from trialist.data.splits import hold_out

        documents = Documents(tuple(map(str, range(len(texts)))), tuple(texts), self.data)
        try:
            return hold_out(documents, self.validation)
        except ValueError as error:
            raise ValueError(f"{error}; or pass --validation 0 to hold out nothing") from error

    @property
    def weights_dtype(self) -> str:
        """Type of the weights to load: what is trained stays float32."""
        return self.dtype if self.lora else "float32"

    @property
    def on_cpu(self) -> bool:
        import torch

        return self.device == "cpu" or not torch.accelerator.is_available()

    @property
    def compute_device(self) -> torch.device:
        """The CPU, or the accelerator of this rank."""
        import torch

        if self.on_cpu:
            return torch.device("cpu")
        accelerator = torch.accelerator.current_accelerator()
        assert accelerator is not None, "not on the CPU"
        return torch.device(accelerator.type, int(os.environ.get("LOCAL_RANK", "0")))

    @property
    def rate(self) -> float:
        """Peak learning rate."""
        return self.learning_rate or self.RATES[bool(self.lora)]

    def check_vocabulary(self, model: Any, largest: int, role: str = "model") -> None:
        """Raises ValueError where the tokenizer gives a token id that the model does not know. role: what errors call it."""
        size = model.get_input_embeddings().weight.shape[0]
        if largest >= size:
            raise ValueError(
                f"the tokenizer of {self.model} gives token {largest}, beyond the {role}'s vocabulary of {size}; they do not "
                "belong together"
            )

    def prepared(self, model: Any) -> Any:
        """The model as it is trained: with checkpointing of activations and adapters where they are asked for."""
        import torch

        if self.gradient_checkpointing:
            enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
            enable()
        torch.manual_seed(self.seed)
        return self.with_adapters(model) if self.lora else model

    def with_adapters(self, model: Any) -> Any:
        from peft import LoraConfig, get_peft_model

        lora = LoraConfig(r=self.lora, lora_alpha=2 * self.lora, target_modules="all-linear", task_type="CAUSAL_LM")
        return get_peft_model(model, lora)

    def total_steps(self, examples: int) -> int:
        """Optimizer steps: `steps`, or as many as `epochs` over the examples take on all ranks."""
        if self.steps is not None:
            return self.steps
        ranks = int(os.environ.get("WORLD_SIZE", "1"))
        micro_batches = math.ceil(examples / (self.batch * ranks))
        return math.ceil(self.epochs * math.ceil(micro_batches / self.accumulate))

    def arguments(
        self, work: Work, total: int, validates: bool, kind: Callable[..., Any] | None = None, **further: Any
    ) -> TrainingArguments:
        """The Trainer's arguments: checkpoints into the output; validation before, after and in between.

        kind: a class of arguments other than `TrainingArguments`, which `further` are for.
        """
        from transformers import TrainingArguments

        values: dict[str, Any] = {
            "output_dir": str(work.output.checkpoints),
            "max_steps": total,
            "per_device_train_batch_size": self.batch,
            "per_device_eval_batch_size": self.batch,
            "gradient_accumulation_steps": self.accumulate,
            "learning_rate": self.rate,
            "lr_scheduler_type": "constant_with_warmup" if self.schedule == "constant" else self.schedule,
            "warmup_steps": math.ceil(self.warmup * total),
            "max_grad_norm": self.clip,
            "bf16": self.dtype == "bfloat16",
            "use_cpu": self.on_cpu,
            "dataloader_pin_memory": not self.on_cpu,
            "logging_steps": self.log_every,
            "eval_strategy": "steps" if validates else "no",
            "eval_steps": self.evaluate_every or total,
            "eval_on_start": validates,
            "save_strategy": "steps",
            "save_steps": self.checkpoint_every or max(1, math.ceil(total / 10)),
            "save_total_limit": 2,
            "seed": self.seed,
            "report_to": list(self.report_to) or "none",
            "disable_tqdm": not sys.stderr.isatty(),
        }
        return (kind or TrainingArguments)(**{**values, **further})

    def optimizers(self, trained: Any) -> tuple[Any, None]:
        from trialist.optimizers.adamw import adamw

        return adamw(trained, self.rate, weight_decay=self.weight_decay, betas=(0.9, 0.999)), None

    def run(
        self,
        work: Work,
        trainer: Trainer,
        sizes: Mapping[str, Any],
        validated: Mapping[str, str],
        found: Callable[[Trainer], Mapping[str, Any]] = lambda _: {},
    ) -> dict[str, Any]:
        """Trains from the newest checkpoint on, writes the model folder, and returns the result.

        sizes: what the result begins with. validated: numbers that a validation logs, and their words in the result.
        found: what else the trained trainer has to tell.
        """
        from trialist.training.progress import require_finite
        from trialist.training.recurrence import alike_passes

        self._tell(work, trainer)
        began = time.perf_counter()
        with alike_passes(trainer, compared=self.COMPARES_PASSES):
            trainer.train(resume_from_checkpoint=work.output.start(work.say))
            result = {
                "model": self.output,
                **sizes,
                "steps": trainer.state.global_step,
                "seconds": round(time.perf_counter() - began, 1),
                **found(trainer),
            }
            if trainer.eval_dataset is not None:
                for name, words in validated.items():
                    before, after = _first_and_last(trainer, name)
                    result |= {
                        f"validation {words} before": round(before, 4), f"validation {words} after": round(after, 4)
                    }  # fmt: skip
        trained = trainer.accelerator.unwrap_model(trainer.model)
        require_finite(trained, trainer.state.global_step)
        if trainer.is_world_process_zero():
            work.output.write(trained, work.tokenizer, result, merge=self.save == "merged")
        trainer.accelerator.wait_for_everyone()  # whoever reads the model next, on any rank, finds it whole
        return result

    def _tell(self, work: Work, trainer: Trainer) -> None:
        """Has the Trainer log in lines and into the output, and end when it diverges."""
        from transformers import PrinterCallback
        from transformers.integrations import TensorBoardCallback

        from trialist.training.progress import NAMES, Divergence, Lines

        names = {**NAMES, **self.SHOWN}
        trainer.remove_callback(PrinterCallback)
        trainer.add_callback(Divergence(names))
        trainer.add_callback(Lines(work.say, trainer.args.max_steps, names))
        for callback in trainer.callback_handler.callbacks:
            if isinstance(callback, TensorBoardCallback) and callback.logging_dir is None:
                callback.logging_dir = str(work.output.folder / "logs")


def _check_loggers(report_to: Sequence[str]) -> None:
    """Raises ValueError for a logger that is not installed."""
    if not report_to:
        return
    from transformers.integrations import get_available_reporting_integrations

    there = get_available_reporting_integrations()
    missing = [name for name in report_to if name not in there]
    if missing:
        raise ValueError(
            f"--report-to {missing[0]}: not installed here (there is {', '.join(sorted(there)) or 'none'}); "
            f"`pip install {missing[0]}`, or leave it out"
        )


def _first_and_last(trainer: Trainer, name: str) -> tuple[float, float]:
    """A number of the validations before and after training; the last one is made where the Trainer's own came earlier."""

    def found() -> list[tuple[int, float]]:
        return [(entry["step"], entry[name]) for entry in trainer.state.log_history if name in entry]

    if not found() or found()[-1][0] != trainer.state.global_step:
        trainer.evaluate()
    return found()[0][1], found()[-1][1]


def of_first_rank(say: Say) -> Say:
    """`say` on the first rank, nothing on the others."""
    return say if os.environ.get("RANK", "0") == "0" else _silent


def _silent(text: str) -> None:
    """The word of all ranks but the first."""
