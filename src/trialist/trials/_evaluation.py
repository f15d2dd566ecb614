"""A given model on a benchmark: as a run that stands alone, and at the end of a training run."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from trialist.engine.context import Context
from trialist.engine.contract import Arm, Cost, Endpoint, Items, Outcome, Trial
from trialist.engine.hardware import resolve_device
from trialist.evaluation.registry import evaluation_sources, load_evaluation, settle_name
from trialist.evaluation.results import Evaluation

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

NAME = "eval"
PATH = "trialist.trials._evaluation:ModelEvaluation"
OPTIONS = ("data", "split", "columns", "shots", "chat", "limit", "length")
TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "merges.txt", "spiece.model")


@dataclass(frozen=True, kw_only=True)
class EvaluationOptions:
    """How a model is loaded, and what the benchmarks are told; an option that is None is left to the benchmark."""

    data: str | None = None
    """Data of `text` and `blimp`: local file or folder, Hub id or built-in name"""
    split: str | None = None
    """Split of the data of `text`"""
    columns: str | None = None
    """Column of the data that holds the text, text=NAME"""
    shots: int | None = None
    """Few-shot examples of an lm-eval benchmark; without it those of its published setting"""
    chat: bool | None = None
    """Ask through the tokenizer's chat template where the model writes its answers (gsm8k, math500)"""
    limit: int | None = None
    """Most items of each benchmark (of each paradigm of BLiMP, each subject of MMLU), the first ones"""
    length: int | None = None
    """Tokens in a window of `text`; without it the model's context, at most 1024"""
    batch: int = 16
    """Sequences in a forward pass"""
    device: str = "auto"
    """auto, cpu or cuda"""
    dtype: Literal["float32", "bfloat16", "float16", "float64", "auto"] = "float32"
    """Numbers that the model computes in; auto is the saved one"""


@dataclass(frozen=True, kw_only=True)
class ModelEvaluation(EvaluationOptions, Trial):
    """Scores of one model on one benchmark, item by item. Two of them are compared by `trialist compare RUN RUN`."""

    version = 1
    preload = ("torch", "transformers", "trialist.models.loading", "trialist.evaluation.results")
    versions = ("torch", "transformers")

    model: str
    benchmark: str
    num_steps: int | None = None
    """Steps of a model with recurrent depth; None is those of its configuration"""

    @property
    def evaluation(self) -> Evaluation:
        return load_evaluation(self.benchmark, {name: getattr(self, name) for name in OPTIONS})

    def check(self) -> None:
        if self.batch < 1:
            raise ValueError(f"--batch must be at least 1, not {self.batch}")
        if self.num_steps is not None and self.num_steps < 1:
            raise ValueError(f"--num-steps must be at least 1, not {self.num_steps}")
        self.evaluation.check()
        from trialist.models.loading import DTYPES, model_source

        if self.dtype not in DTYPES:
            raise ValueError(f"--dtype {self.dtype!r}: one of {', '.join(DTYPES)}")
        model_source(self.model)

    def digests(self) -> Mapping[str, str]:
        from trialist.models.loading import model_digest

        return {
            "model": f"{model_digest(self.model)}{_tokenizer_digest(self.model)}",
            "device": resolve_device(self.device),
            "benchmark": f"{':'.join(settle_name(self.benchmark))} {self.evaluation.digest()}",
            **({"data": "in benchmark"} if self.data else {}),
        }

    def sources(self) -> tuple[str, ...]:
        return evaluation_sources(self.benchmark)

    def endpoints(self) -> tuple[Endpoint, ...]:
        return tuple(Endpoint(m.name, unit=m.unit, better=m.better) for m in self.evaluation.metrics)

    def arms(self) -> Iterator[Arm]:
        family, argument = settle_name(self.benchmark)
        data = argument or self.data
        place = argument if family == "lm-eval" else f"{family} {Path(data).name}" if data else family
        steps = "" if self.num_steps is None else f" {self.num_steps} steps"
        yield Arm(f"{Path(self.model).name or self.model}{steps}", "reference", place)

    def run(self, arm: Arm, seed: int, context: Context) -> Outcome:
        from trialist.data.tokenizers import load_tokenizer
        from trialist.models.loading import load_model

        tokenizer = load_tokenizer(self.model)
        model = load_model(self.model, dtype=self.dtype, device=resolve_device(self.device))
        if self.num_steps is not None:
            from trialist.models.recurrent_depth.steps import set_num_steps

            set_num_steps(model, self.num_steps)
        outcome = measure(self.evaluation, model, tokenizer, context, batch=self.batch, seed=seed)
        if self.num_steps is None:
            return outcome
        from trialist.models.flops import flops_per_token
        from trialist.models.loading import model_context

        length = self.length or min(1024, model_context(self.model) or 1024)
        flops = flops_per_token(model, length) * (outcome.cost.tokens or 0.0)
        return dataclasses.replace(outcome, cost=dataclasses.replace(outcome.cost, flops=flops))


def measure(
    evaluation: Evaluation, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, context: Context, *, batch: int,
    seed: int = 0, prefix: str = "",
) -> Outcome:  # fmt: skip
    """The evaluation of a model as an outcome: metrics, item scores, tokens, notes."""
    result = evaluation(
        model, tokenizer, batch=batch, seed=seed, progress=lambda done, total: context.progress(done, total)
    )
    return Outcome(
        metrics={f"{prefix}{name}": value for name, value in result.metrics.items()},
        items={f"{prefix}{name}": Items(result.ids, scores, result.clusters) for name, scores in result.scores.items()},
        cost=Cost(tokens=float(result.tokens)),
        notes=result.notes,
    )


@dataclass(frozen=True)
class TrainedModelTrial(Trial):
    """A trial whose runs train a language model, and can hand it to a benchmark."""

    benchmark: str = ""
    """Benchmark of the trained model, such as lm-eval:hellaswag or blimp:FOLDER, measured at the end of every run"""
    benchmark_limit: int | None = None
    """Most items of each part of the benchmark"""

    def with_benchmark(self, name: str) -> tuple[Trial, Endpoint]:
        if self.benchmark not in ("", name):
            raise ValueError(
                f"--endpoint {name} and --benchmark {self.benchmark} name two benchmarks; give one of them"
            )
        trial = dataclasses.replace(self, benchmark=name)
        metric = trial.evaluation.metrics[0]
        return trial, Endpoint(f"{trial.prefix}{metric.name}", unit=metric.unit, better=metric.better)

    @property
    def evaluation(self) -> Evaluation:
        return load_evaluation(self.benchmark, {"limit": self.benchmark_limit})

    @property
    def prefix(self) -> str:
        family, argument = settle_name(self.benchmark)
        return f"{argument if family == 'lm-eval' else family} "

    def sources(self) -> tuple[str, ...]:
        return evaluation_sources(self.benchmark) if self.benchmark else ()

    def replicates_over(self) -> Any:
        return "seed x item" if self.benchmark else self.replicate

    def check_benchmark(self, tokenizer: str | None, context: int | None) -> None:
        """Raises ValueError for a benchmark that cannot be measured. tokenizer: None where it is not known yet."""
        if not self.benchmark:
            if self.benchmark_limit is not None:
                raise ValueError("--benchmark-limit limits a benchmark; name it with --endpoint or --benchmark")
            return
        self.evaluation.check()
        if tokenizer is not None:
            from trialist.data.tokenizers import load_tokenizer

            self.evaluation.check_fit(load_tokenizer(tokenizer), context)

    def benchmark_digests(self) -> dict[str, str]:
        if not self.benchmark:
            return {}
        return {"benchmark": f"{':'.join(settle_name(self.benchmark))} {self.evaluation.digest()}"}

    def hand_over(self, outcome: Outcome, model: Any, tokenizer: Any, context: Context, *, batch: int) -> Outcome:
        """The outcome with what the benchmark says about the trained model; tuning runs are not measured on it."""
        if not self.benchmark or (self.tuning is not None and context.seed in self.tuning.seeds):
            return outcome
        measured = measure(self.evaluation, model, tokenizer, context, batch=batch, prefix=self.prefix)
        return dataclasses.replace(
            outcome,
            metrics={**outcome.metrics, **measured.metrics},
            items={**outcome.items, **measured.items},
            notes=(*outcome.notes, *measured.notes),
        )


def _tokenizer_digest(model: str) -> str:
    """Digest of the tokenizer files of a local folder; a Hub commit and an asset's digest cover theirs."""
    folder = Path(model).expanduser()
    if not folder.is_dir():
        return ""
    files = [folder / name for name in TOKENIZER_FILES if (folder / name).is_file()]
    total = hashlib.sha256(b"".join(hashlib.sha256(file.read_bytes()).digest() for file in files))
    return f" tokenizer:{total.hexdigest()[:16]}" if files else ""
