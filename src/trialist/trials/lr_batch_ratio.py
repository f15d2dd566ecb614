"""Does the ratio of learning rate to batch size decide which tasks fine-tuning is good for, beyond how hard it trains?"""

from __future__ import annotations

import dataclasses
import functools
import json
import math
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trialist.engine.context import Context
from trialist.engine.contract import Arm, Budget, Claim, Cost, Endpoint, Outcome, Trial
from trialist.engine.hardware import resolve_device
from trialist.trials._language_model import (
    BUILT_IN,
    PRELOAD,
    VERSIONS,
    check_inputs,
    check_length,
    given_model,
    model_inputs,
    new_decoder,
    save,
    train,
)
from trialist.trials._lr_batch_grid import GIVEN, LAW, NULL, PUBLISHED, RULES, TASKS, TWINS, Point, RatioEffect, points

if TYPE_CHECKING:
    from trialist.data.instruction_tasks import Symbols

LEARNING_RATES, SPREAD = 5, 4


@dataclass(frozen=True)
class LearningRateBatchTrial(Trial):
    """Does reasoning gain more from a high ratio of learning rate to batch than other tasks, given learning-rate time?"""

    claim = Claim(
        statement="In supervised fine-tuning a higher ratio of learning rate to batch size favours reasoning over pattern "
        "completion and format following, also at the same total learning-rate time.",
        source="arXiv:2412.08347",
        reported="with SmolLM2 1.7B, ratio 11.25e-6 against 0.097e-6: GSM8K 51.6 against 44.7 and HellaSwag 61.1 against 64.2 "
        "after preference training, but ARC 51.5 against 57.1 and IFEval 67.7 against 56.6, which go the other way; one seed, "
        "equal epochs, so that the ratio is learning-rate time",
        endpoint=Endpoint("score", unit="share of sampled answers per doubling", better="higher", margin=0.01),
        secondary=(
            Endpoint("greedy", unit="share of answers", better="higher"),
            Endpoint("validation_score", unit="share of sampled answers", better="higher"),
        ),
    )
    budget = Budget("steps", settings={PUBLISHED: "tokens"})
    effect = RatioEffect()
    presets = {
        "tiny": dict(seeds=3, about="three rules, about 10 minutes each on 2 cores"),
        "real": dict(model="smollm2-135m-instruct", pretraining=100, pretraining_rate=1e-4, examples=512, batch=8, steps=32,
                     learning_rate=1e-4, test_items=256, seeds=3, about="a given model, many hours on 2 cores"),
        "gpu": dict(layers=6, width=256, heads=8, pretraining=6_000, digits=10, hops=3, letters=26, examples=8_192, batch=32,
                    steps=512, test_items=2_048, seeds=6, about="hours on one GPU"),
    }  # fmt: skip
    preload = (*PRELOAD, "trialist.data.instruction_tasks", "trialist.models.loading", "peft")
    versions = VERSIONS
    usage = (
        "from trialist.training.tulu import Tulu\n"
        'Tulu("my-base", "out", stages="sft", settings="smoltulu-1130", sft_data="chats.jsonl")()'
    )

    model: str = BUILT_IN
    """Hub id, local folder or asset of a model to start from; `decoder` trains a small one from scratch"""
    layers: int = 2
    """Layers of the built-in decoder"""
    width: int = 64
    """Width of the built-in decoder"""
    heads: int = 4
    """Attention heads of the built-in decoder"""
    digits: int = 5
    """Digits of the arithmetic, and its modulus"""
    hops: int = 2
    """Operations in a chain, each written out with its result"""
    letters: int = 12
    """Letters of the alphabet; each pair of them has its successor"""
    pretraining: int = 1_500
    """Steps of mixed text before fine-tuning, with 64 rows each; once a seed"""
    pretraining_rate: float = 3e-3
    """Peak learning rate of these steps"""
    examples: int = 1_024
    """Rows to fine-tune on, of each task; passed again and again"""
    batch: int = 16
    """Rows in a step in the middle of the grid; a quarter and four times as many at its sides"""
    steps: int = 96
    """Steps in the middle of the grid"""
    learning_rate: float = 4e-3
    """Peak learning rate in the middle of the grid"""
    factor: float = 2.0
    """Each of the five learning rates is so many times the one before"""
    test_items: int = 512
    """Test rows of each task"""
    device: str = "auto"
    """`auto`, `cpu` or `cuda`"""
    dtype: str = "float32"
    """float32, or bfloat16 for autocast"""

    def check(self) -> None:
        from trialist.data.instruction_tasks import Symbols

        check_inputs(
            self.model, self.dtype, 0, layers=self.layers, width=self.width, heads=self.heads, pretraining=self.pretraining,
            examples=self.examples, steps=self.steps, test_items=self.test_items,
        )  # fmt: skip
        symbols = Symbols(0, digits=self.digits, letters=self.letters, hops=self.hops)
        if self.batch < SPREAD or self.batch % SPREAD:
            raise ValueError(f"--batch must be a multiple of {SPREAD}: the grid has a quarter of it; not {self.batch}")
        if not 1 < self.factor <= 16:
            raise ValueError(f"--factor must be above 1 and at most 16, not {self.factor}")
        for name in ("learning_rate", "pretraining_rate"):
            if not getattr(self, name) > 0:
                raise ValueError(f"--{name.replace('_', '-')} must be > 0, not {getattr(self, name)}")
        if self.steps < max(SPREAD, self.factor ** (LEARNING_RATES // 2)):
            raise ValueError(
                f"--steps {self.steps} leaves no step where the rules make runs {SPREAD} or {self.factor**2:g} times shorter"
            )
        if self.model != BUILT_IN:
            check_length(self.model, symbols.longest)
        elif self.width % self.heads:
            raise ValueError(f"--width {self.width} must be a multiple of --heads {self.heads}")

    def digests(self) -> Mapping[str, str]:
        return model_inputs(self.model, self.device)

    def remarks(self) -> tuple[str, ...]:
        return (
            f"setting {PUBLISHED} is the published comparison, without control for learning-rate time",
            f"settings {', '.join(LAW)} show the slopes over log2(lr) and log2(batch) added up, at equal steps: 0 if only the "
            "ratio counts; they show no interaction",
            "settings share the training of equal cells, so the wall time of a run may be that of reading a result",
        )

    def arms(self) -> Iterator[Arm]:
        grid = {rule: self._points(rule) for rule in RULES}
        together = list(dict.fromkeys(point for rule in RULES for point in grid[rule]))
        for setting, tasks, chosen in (
            (GIVEN, TASKS, together),
            (PUBLISHED, TASKS, grid["equal-epochs"]),
            ("equal-steps", TASKS, grid["equal-steps"]),
            ("equal-lr-time", TASKS, grid["equal-lr-time"]),
            *((law, (task,), grid["equal-steps"]) for law, task in LAW.items()),
            (NULL, TWINS, grid["equal-steps"]),
        ):
            for task in tasks:
                for point in chosen:
                    yield Arm(
                        f"{task} lr {point.learning_rate:.3g} batch {point.batch} steps {point.steps}", "factor", setting,
                        null=setting == NULL, options={"task": task, **dataclasses.asdict(point)},
                    )  # fmt: skip

    def _points(self, rule: str) -> list[Point]:
        return list(
            points(
                rule, learning_rate=self.learning_rate, batch=self.batch, steps=self.steps, learning_rates=LEARNING_RATES,
                factor=self.factor, spread=SPREAD,
            )
        )  # fmt: skip

    def run(self, arm: Arm, seed: int, context: Context) -> Outcome:
        point = Point(arm["learning_rate"], arm["batch"], arm["steps"])
        inputs = self._inputs(seed)
        base = context.stage("lr-batch-base", inputs, functools.partial(build_base, self, context))
        build = functools.partial(build_cell, self, context, base, arm["task"], point)
        if context.keep_model:
            place = context.folder
            shutil.rmtree(place / "checkpoint", ignore_errors=True)  # whose steps would be missing in what is summed up
            place.mkdir(parents=True, exist_ok=True)
            build(place)
        else:
            place = context.stage("lr-batch-cell", (*inputs, arm["task"], *dataclasses.astuple(point)), build)
        found = json.loads((place / "cell.json").read_text())
        time = math.log2(found["lr_time"])
        return Outcome(
            metrics=found["metrics"],
            cost=Cost(**found["cost"]),
            diverged=found["diverged"],
            covariates={
                "log_lr": math.log2(point.learning_rate),
                "log_batch": math.log2(point.batch),
                "log_ratio": math.log2(point.learning_rate / point.batch),
                "log_lr_time": time,
                "log_lr_time_squared": time**2,
                "lr_time": found["lr_time"],
            },
        )

    def _inputs(self, seed: int) -> tuple[Any, ...]:
        """All inputs that a trained cell depends on apart from its place, models by content."""
        left = {field.name for field in dataclasses.fields(self)} - {
            "model", "device", "batch", "steps", "learning_rate", "factor",
        }  # fmt: skip
        return (
            seed,
            *model_inputs(self.model, self.device).values(),
            *(getattr(self, name) for name in sorted(left)),
        )

    def symbols(self, context: Context) -> Symbols:
        from trialist.data.instruction_tasks import Symbols

        return Symbols(context.stream("tasks"), digits=self.digits, letters=self.letters, hops=self.hops)


def build_base(trial: LearningRateBatchTrial, context: Context, folder: Path) -> None:
    """Mixed text for a fresh decoder, or for the given model. Raises ValueError where that diverges."""
    from trialist.data.instruction_tasks import MixedText

    symbols = trial.symbols(context)
    if trial.model == BUILT_IN:
        model = new_decoder(
            context, device=trial.device, hidden_size=trial.width, vocab_size=symbols.size, num_hidden_layers=trial.layers,
            num_attention_heads=trial.heads, head_dim=trial.width // trial.heads,
            layer_types=["full_attention"] * trial.layers, max_position_embeddings=symbols.longest,
        )  # fmt: skip
    else:
        model = given_model(context, trial.model, device=trial.device, lora=0)
    named, text = _ids(trial, model, symbols), MixedText(symbols, 64, symbols.longest)
    here = dataclasses.replace(context, folder=folder, keep_model=False)
    outcome, _ = train(
        model.train(), lambda step: named(text(step)), here, steps=trial.pretraining, learning_rate=trial.pretraining_rate,
        dtype=trial.dtype, evaluate=lambda _: {}, evaluations=1,
    )  # fmt: skip
    if outcome.diverged is not None:
        raise ValueError(f"the base has diverged ({outcome.diverged}); lower --pretraining-rate")
    shutil.rmtree(folder / "checkpoint", ignore_errors=True)
    save(model, None, folder / "model")


def build_cell(
    trial: LearningRateBatchTrial, context: Context, base: Path, task: str, point: Point, folder: Path
) -> None:
    """Fine-tunes the base at a place of the grid; `cell.json` says what came of it."""
    from trialist.data.instruction_tasks import Epochs
    from trialist.models.loading import load_model
    from trialist.optimizers import adamw

    symbols = trial.symbols(context)
    model = load_model(str(base / "model"), device=resolve_device(trial.device))
    named, kind, draw = _ids(trial, model, symbols), task.removesuffix("-twin"), int(task.endswith("-twin"))
    rows = symbols.rows(kind, trial.examples, "train", draw)  # type: ignore[arg-type]
    batches = Epochs(rows, point.batch, context.stream("data_order"))
    optimizer = adamw(model, point.learning_rate)
    spent: list[float] = []
    optimizer.register_step_pre_hook(lambda opt, *_: spent.append(opt.param_groups[0]["lr"]))
    here = dataclasses.replace(context, folder=folder)
    outcome, _ = train(
        model.train(), lambda step: named(batches(step)), here, steps=point.steps, learning_rate=point.learning_rate,
        dtype=trial.dtype, evaluate=lambda _: {}, evaluations=1, optimizer=optimizer,
    )  # fmt: skip
    shutil.rmtree(folder / "checkpoint", ignore_errors=True)
    metrics: dict[str, float] = {}
    if outcome.diverged is None:
        model.eval()
        test, validation = (
            answered(model, named(symbols.rows(kind, trial.test_items, part, draw)))  # type: ignore[arg-type]
            for part in ("test", "validation")
        )
        metrics = {"score": test[1], "greedy": test[0], "validation_score": validation[1]}
    found = {
        "metrics": metrics,
        "cost": outcome.cost.as_dict(),
        "diverged": outcome.diverged,
        # a run that diverged before its first step has spent nothing, and a logarithm needs something
        "lr_time": math.fsum(spent) or point.learning_rate,
    }
    (folder / "cell.json").write_text(json.dumps(found))


def answered(model: Any, rows: Mapping[str, Any], at_once: int = 256) -> tuple[float, float]:
    """Share of rows of whose answer every token is the most probable one, and the mean probability of the whole answer.

    The first is what greedy generation gets right, the second what sampling gets right on average.
    """
    import torch

    length = int((rows["labels"][0] >= 0).sum())
    right: list[Any] = []
    chance: list[Any] = []
    with torch.no_grad():
        for start in range(0, len(rows["labels"]), at_once):
            ids, labels = rows["input_ids"][start : start + at_once], rows["labels"][start : start + at_once, -length:]
            logits = (
                model(input_ids=ids, logits_to_keep=length + 1, use_cache=False).logits[:, :-1].float()
            )  # (B, n, V)
            right.append((logits.argmax(-1) == labels).all(1))
            chance.append(logits.log_softmax(-1).gather(-1, labels[..., None]).squeeze(-1).sum(1).exp())
    return float(torch.cat(right).float().mean()), float(torch.cat(chance).mean())


def _ids(trial: LearningRateBatchTrial, model: Any, symbols: Symbols) -> Any:
    """Turns rows into the model's token ids, on its device; those of a given model are spread over its vocabulary."""
    import torch

    from trialist.trials._symbols import symbol_ids

    size = symbols.size
    ids = torch.arange(size) if trial.model == BUILT_IN else symbol_ids(model.config.vocab_size, size)

    def named(rows: Mapping[str, Any]) -> dict[str, Any]:
        found = {"input_ids": ids[rows["input_ids"]]}
        labels = rows.get("labels", rows["input_ids"])  # of text every token counts
        found["labels"] = ids[labels.clamp(min=0)].where(labels >= 0, labels)
        return {name: tensor.to(model.device) for name, tensor in found.items()}

    return named
