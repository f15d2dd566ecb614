"""Standard benchmarks through lm-eval, on local data and offline.

The task file that lm-eval publishes is taken as it stands; data set, splits and the judge of mathematical answers are
replaced. lm-eval's index of all its tasks is not built (it costs seconds and nothing here needs it).
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import io
import json
import logging
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from trialist.data import assets
from trialist.evaluation.published import Published, published
from trialist.evaluation.results import Evaluated, Evaluation, Metric, Progress, item_id, silent, too_long

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

EXTRA = ("lm_eval", "math_verify", "antlr4")
TO_GENERATE = 256
"""Tokens that lm-eval lets a model generate where a task does not say"""


@dataclass(frozen=True)
class Harness(Evaluation):
    """A benchmark that lm-eval publishes, with the prompts, few-shot format and metrics of its task file."""

    about: ClassVar[str] = "standard benchmarks through lm-eval"

    task: str
    """Name of the benchmark"""
    shots: int | None = None
    """Few-shot examples; without it those of the published setting"""
    limit: int | None = None
    """Most items of each task (MMLU: of each subject), the first ones of the data"""
    chat: bool | None = None
    """Ask through the tokenizer's chat template, each few-shot example as a turn of its own"""

    @property
    def metrics(self) -> tuple[Metric, ...]:
        if self.task.startswith("mmlu"):
            return (Metric("acc", "higher", "share of items"),)
        names = published(self.task)[self.task].metrics
        return tuple(Metric(n, "higher", "nats" if n == "log_likelihood" else "share of items") for n in names)

    def check(self) -> None:
        missing = [module for module in EXTRA if importlib.util.find_spec(module) is None]
        if missing:
            raise ImportError(
                f"{self.task} runs through lm-eval, and {', '.join(missing)} is not installed: pip install 'trialist[eval]'"
            )
        for name, value, least in (("shots", self.shots, 0), ("limit", self.limit, 1)):
            if value is not None and value < least:
                raise ValueError(f"--{name} must be at least {least}, not {value}")
        assets.path("benchmarks")
        for name, task in published(self.task).items():
            if self.shots and self.shots > (most := _examples(name, task)):
                raise ValueError(f"--shots {self.shots}: {name} has {most} examples, {task.shots_from}")

        if self.chat and not self.generates:
            raise ValueError(
                f"--chat goes with benchmarks whose answers are written (gsm8k, math500); {self.task} compares the "
                "log-probabilities of given texts, which a chat template would move apart from its published scores"
            )

    @property
    def generates(self) -> bool:
        """Whether the model writes its answers, which are then judged."""
        return all(task.judged for task in published(self.task).values())

    def digest(self) -> str:
        import importlib.metadata

        return f"benchmarks:{assets.ASSETS['benchmarks'].sha256[:16]}:lm-eval-{importlib.metadata.version('lm_eval')}"

    def check_fit(self, tokenizer: PreTrainedTokenizerBase, context: int | None) -> None:
        if context is not None:
            with quiet():
                check_lengths(self.requests(), tokenizer, context)

    def requests(self) -> list[Any]:
        """What lm-eval asks of a model: its `Instance`s, prompts built with the seed 0."""
        found = []
        for task in self.tasks().values():
            task.build_all_requests(limit=self.limit, rank=0, world_size=1)
            found.extend(task.instances)
        return found

    def tasks(self, seed: int = 0, judge: Any = None) -> dict[str, Any]:
        """lm-eval's task objects over local data."""
        from lm_eval.tasks import TaskManager

        built = TaskManager(include_defaults=False).load(
            [self._configuration(name, task, judge) for name, task in published(self.task).items()]
        )["tasks"]
        for task in built.values():
            task.set_fewshot_seed(seed)
        return built

    def _configuration(self, name: str, task: Published, judge: Any) -> dict[str, Any]:
        import lm_eval.tasks
        from datasets import Dataset, DatasetDict
        from lm_eval.tasks._yaml_loader import load_yaml

        configuration = load_yaml(Path(str(lm_eval.tasks.__file__)).parent / task.file)
        rows = task.rows()
        for split, given in (("training", "train"), ("validation", "validation"), ("test", "test")):
            configuration[f"{split}_split"] = given if given in rows else None
        configuration.pop("tag", None)
        configuration["task"] = name
        configuration["num_fewshot"] = task.shots if self.shots is None else self.shots
        configuration["custom_dataset"] = lambda **_: DatasetDict(
            {split: Dataset.from_list(list(of_split)) for split, of_split in rows.items()}
        )
        if "process_results" in configuration and task.judged:
            configuration["process_results"] = lambda doc, results: judge.minerva(doc, results[0])
        return configuration

    def __call__(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, *, batch: int = 16, seed: int = 0,
        progress: Progress = silent,
    ) -> Evaluated:  # fmt: skip
        from trialist.data.answers import Judge

        if self.chat and not tokenizer.chat_template:
            raise ValueError("--chat: the tokenizer of this model has no chat template")
        with quiet(), Judge() as judge:
            from lm_eval.evaluator import evaluate

            from trialist.evaluation.harness_model import HarnessModel

            scorer = HarnessModel(model, tokenizer, batch=batch, progress=progress)
            tasks = self.tasks(seed, judge)
            results: Any = evaluate(
                scorer, {"tasks": tasks, "groups": {}, "group_map": {}}, limit=self.limit, bootstrap_iters=0,
                log_samples=True, apply_chat_template=bool(self.chat), fewshot_as_multiturn=bool(self.chat),
            )  # fmt: skip
            parts = {
                name: _scores(task, results["samples"][name], judge) for name, task in published(self.task).items()
            }
        return _joined(self.metrics, parts, {name: results["results"][name] for name in parts}, scorer.tokens,
                       (*self._notes(), *judge.notes()))  # fmt: skip

    def _notes(self) -> tuple[str, ...]:
        task = next(iter(published(self.task).values()))
        shots = task.shots if self.shots is None else self.shots
        setting = f"lm-eval's task file {task.file}, {shots} shots"
        if shots:
            setting += f" from {task.shots_from}"
        return (setting + (", through the chat template" if self.chat else ""),)


def _examples(name: str, task: Published) -> int:
    """How many few-shot examples there are."""
    if task.judged:
        return task.shots
    rows = task.rows()
    if name.startswith("mmlu"):
        return len(rows["dev"])
    return len(rows["validation"]) - (task.split == "validation") if "validation" in rows else len(rows[task.split]) - 1


@dataclass(frozen=True)
class _Part:
    """Scores of one task: item ids, metric -> scores, clusters."""

    ids: list[str]
    scores: dict[str, list[float]]
    clusters: list[str] | None


def _scores(task: Published, samples: Sequence[Mapping[str, Any]], judge: Any) -> _Part:
    """Item scores from lm-eval's log of samples: one row for each item and filter."""
    filters = list(dict.fromkeys(str(sample["filter"]) for sample in samples))
    part = _Part([], {}, None if task.cluster is None else [])
    for sample in samples:
        first = sample["filter"] == filters[0]
        if first:
            name = item_id(sample["doc_id"], json.dumps(sample["doc"], sort_keys=True, default=str))
            part.ids.append(name)
            if part.clusters is not None:
                shared = str(sample["doc"][task.cluster])
                part.clusters.append(hashlib.blake2b(shared.encode(), digest_size=6).hexdigest() if shared else name)
        for metric in sample["metrics"]:
            value = sample[metric]
            key = "log_likelihood" if metric == "perplexity" else metric
            if isinstance(value, (bool, int, float)):
                part.scores.setdefault(key if len(filters) == 1 else f"{key},{sample['filter']}", []).append(
                    float(value)
                )
        if first and task.judged and "math_verify" not in sample["metrics"]:
            gold = str(sample["target"])
            part.scores.setdefault("math_verify", []).append(judge.verify(gold, str(sample["resps"][0][0])))
    return part


def _joined(
    metrics: Sequence[Metric], parts: Mapping[str, _Part], results: Mapping[str, Mapping[str, Any]], tokens: int,
    notes: tuple[str, ...],
) -> Evaluated:  # fmt: skip
    several = len(parts) > 1
    ids = [
        f"{name.removeprefix('mmlu_')} {entry}" if several else entry
        for name, part in parts.items()
        for entry in part.ids
    ]
    scores = {m.name: tuple(score for part in parts.values() for score in part.scores[m.name]) for m in metrics}
    values = {name: math.fsum(column) / len(column) for name, column in scores.items()}
    if several:
        for name, part in parts.items():
            for metric in metrics:
                column = part.scores[metric.name]
                values[f"{metric.name}/{name.removeprefix('mmlu_')}"] = math.fsum(column) / len(column)
    else:
        (found,) = results.values()
        perplexity = found.get("perplexity,none")
        if perplexity is not None and math.isfinite(perplexity):
            values["perplexity"] = float(perplexity)
    clusters = [entry for part in parts.values() for entry in part.clusters or ()]
    return Evaluated(tuple(ids), scores, values, tuple(clusters) or None, tokens, notes)


def check_lengths(instances: Sequence[Any], tokenizer: PreTrainedTokenizerBase, context: int) -> None:
    """Raises ValueError, naming the item, where a prompt with its continuation does not fit into `context` tokens."""
    texts, room = [], []
    for instance in instances:
        prompt, more = instance.args
        generates = isinstance(more, dict)
        texts.append(prompt if generates else prompt + more)
        # the last token of a continuation is predicted, not read; an empty prompt is replaced by one token
        room.append((more.get("max_gen_toks") or TO_GENERATE) if generates else (0 if prompt == "" else -1))
    sizes = [len(ids) for ids in tokenizer(texts, verbose=False)["input_ids"]] if texts else []
    longest = max(range(len(sizes)), key=lambda at: sizes[at] + room[at], default=None)
    if longest is not None and (tokens := sizes[longest] + room[longest]) > context:
        over = len({instance.doc_id for instance, s, r in zip(instances, sizes, room) if s + r > context})
        where = f"{instances[longest].task_name} item {instances[longest].doc_id}"
        raise too_long(f"{where} (and {over - 1:,} more)" if over > 1 else where, tokens, context)


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keeps lm-eval's and datasets' bars, and remarks on settings chosen here, off the terminal."""
    import datasets

    loggers = [logging.getLogger(name) for name in ("lm_eval", "lm_eval.api.task", "lm_eval.models.huggingface")]
    levels = [logger.level for logger in loggers]
    shown = datasets.is_progress_bar_enabled()
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    datasets.disable_progress_bars()
    try:
        with contextlib.redirect_stderr(io.StringIO()):
            yield
    finally:
        for logger, level in zip(loggers, levels):
            logger.setLevel(level)
        if shown:
            datasets.enable_progress_bars()
