"""Does the ratio of learning rate to batch size decide which tasks fine-tuning is good for, beyond how hard it trains?"""

from __future__ import annotations

import dataclasses
import functools
import json
import math
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from trialist.engine.context import Context
from trialist.engine.contract import Arm, Budget, Claim, Cost, Endpoint, Outcome, Trial
from trialist.trials import _lr_batch_effects as effects
from trialist.trials._language_model import BUILT_IN, PRELOAD, VERSIONS, check_inputs, model_inputs
from trialist.trials._lr_batch_cells import build_base, build_cell
from trialist.trials._lr_batch_grid import BEFORE, PASSES, SPREAD, Point, grid
from trialist.trials._lr_batch_tasks import UNEQUAL_TWINS, check_data, files, task_names

MAIN, NULL = "grid", "unequal-twins"


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
        endpoint=Endpoint(
            "score", unit="probability of an answer's token", better="higher", margin=0.05, scale="logit"
        ),
        secondary=(
            Endpoint("validation_score", unit="probability of an answer's token", better="higher", scale="logit"),
            Endpoint("greedy", unit="share of answers", better="higher"),
            Endpoint("sampled", unit="share of sampled answers", better="higher"),
        ),
    )
    budget = Budget("steps")
    effect = effects.CONTROLLED
    presets = {
        "tiny": dict(seeds=3, about="about 8 CPU minutes a seed, the longest run about 15 seconds"),
        "real": dict(model="smollm2-135m-instruct", batch=4, steps=12, length=128, test_items=64, seeds=3,
                     about="a given model and --data of your own, a day or two on 2 cores, resumable"),
        "gpu": dict(layers=6, width=256, heads=8, pretraining=6_000, digits=10, hops=4, letters=26, batch=32, steps=192,
                    test_items=2_048, seeds=6, about="hours on one GPU"),
    }  # fmt: skip
    preload = (*PRELOAD, "trialist.data.instruction_tasks", "trialist.models.loading", "peft")
    versions = VERSIONS
    usage = (
        "from trialist.training.tulu import Tulu\n"
        'Tulu("my-base", "out", stages="sft", settings="smoltulu-1130", sft_data="chats.jsonl")()'
    )

    model: str = BUILT_IN
    """Hub id, local folder or asset of a model to fine-tune on --data; `decoder` trains a small one on generated tasks"""
    data: str = ""
    """For a given model: two or three kinds of rows as `train sft` reads them, with commas; the one that should gain first"""
    columns: str = ""
    """Columns under other names: prompt=question,completion=answer; one list for all data, or one for each with `;` between"""
    split: str | None = None
    """Split of the data to read; it is cut 80/10/10 by what is asked"""
    max_examples: int | None = None
    """Most rows to read of each kind"""
    length: int = 512
    """Most tokens of a row of your own; longer ones are cut off at the end"""
    chat: bool = False
    """Put your string prompts and completions through the chat template"""
    layers: int = 2
    """Layers of the built-in decoder"""
    width: int = 96
    """Width of the built-in decoder"""
    heads: int = 4
    """Attention heads of the built-in decoder"""
    digits: int = 16
    """Digits of the arithmetic, and its modulus"""
    hops: int = 2
    """Operations in a chain, each written out with its result"""
    letters: int = 20
    """Letters of the alphabet; each pair of them has its successor"""
    pretraining: int = 2_000
    """Steps of 64 rows of mixed text by which the built-in decoder learns before fine-tuning; once a seed"""
    pretraining_rate: float = 3e-3
    """Peak learning rate of these steps"""
    learning_rate: float | None = None
    """Peak learning rate in the middle of the grid; without it 2e-3, for a given model 2e-5, with LoRA 2e-4"""
    batch: int | None = None
    """Rows in a step in the middle of the grid, a quarter and four times as many at its sides; without it 32, for a given
    model 8"""
    steps: int | None = None
    """Steps in the middle of the grid; without it 48, for a given model 32"""
    factor: float = 2.0
    """Each of the five learning rates is so many times the one before"""
    test_items: int = 512
    """Most rows of each task for validation, and for the test"""
    device: str = "auto"
    """`auto`, `cpu` or `cuda`"""
    dtype: str = "float32"
    """float32, or bfloat16 for autocast"""
    lora: int = 0
    """Rank of LoRA adapters for a given model; 0 trains all weights"""

    @property
    def middle(self) -> Point:
        """The cell in the middle of the grid."""
        given = self.model != BUILT_IN
        rate, batch, steps = (2e-4 if self.lora else 2e-5, 8, 32) if given else (2e-3, 32, 48)
        return Point(
            rate if self.learning_rate is None else self.learning_rate,
            batch if self.batch is None else self.batch,
            steps if self.steps is None else self.steps,
        )

    @property
    def counts(self) -> Mapping[str, int]:
        """Rows of each task: to train on as many as the largest cell passes at most twice; at most, in the other parts."""
        largest = max(point.rows for point in grid(self.middle, self.factor))
        return {"train": math.ceil(largest / PASSES), "validation": self.test_items, "test": self.test_items}

    def check(self) -> None:
        middle = self.middle
        check_inputs(
            self.model, self.dtype, self.lora, layers=self.layers, width=self.width, heads=self.heads, length=self.length,
            pretraining=self.pretraining, batch=middle.batch, steps=middle.steps, test_items=self.test_items,
        )  # fmt: skip
        if middle.batch % SPREAD:
            raise ValueError(
                f"--batch must be a multiple of {SPREAD}: the grid has a quarter of it; not {middle.batch}"
            )
        if not 1 < self.factor <= 16:
            raise ValueError(f"--factor must be above 1 and at most 16, not {self.factor}")
        for name, rate in (("learning-rate", middle.learning_rate), ("pretraining-rate", self.pretraining_rate)):
            if not rate > 0:
                raise ValueError(f"--{name} must be > 0, not {rate}")
        if middle.steps < max(SPREAD, self.factor**2):
            raise ValueError(
                f"--steps {middle.steps} leaves no step where the rules make runs {SPREAD} or {self.factor**2:g} times shorter"
            )
        if self.model == BUILT_IN and self.width % self.heads:
            raise ValueError(f"--width {self.width} must be a multiple of --heads {self.heads}")
        check_data(self)

    def digests(self) -> Mapping[str, str]:
        found = model_inputs(self.model, self.device)
        if self.data:
            from trialist.data.corpora import data_digest

            found["data"] = " ".join(data_digest(name) for name in files(self.data))
        return found

    def remarks(self) -> tuple[str, ...]:
        shared = "cells are trained once for all settings, so the wall time of a run may be that of reading a result"
        if self.model == BUILT_IN:
            return (shared,)
        return (
            shared,
            f"the claim is read as: a higher ratio favours {task_names(self)[0]} over {' and '.join(task_names(self)[1:])}",
            f"the null setting is left out: no two tasks of your data are known to gain alike from the ratio; {NULL} is for the "
            "built-in decoder",
        )

    def readings(self) -> tuple[Any, ...]:
        return effects.readings(task_names(self))

    def arms(self) -> Iterator[Arm]:
        settings = [(MAIN, task_names(self))] + ([(NULL, UNEQUAL_TWINS)] if self.model == BUILT_IN else [])
        for setting, tasks in settings:
            for task in tasks:
                shared = {"task": task, "favoured": task == tasks[0]}
                yield Arm(
                    f"{task} before", "factor", setting, setting == NULL,
                    options={**shared, **dataclasses.asdict(BEFORE), "rules": ""}, about="before fine-tuning",
                )  # fmt: skip
                for point, rules in grid(self.middle, self.factor).items():
                    yield Arm(
                        f"{task} lr {point.learning_rate:.3g} batch {point.batch} steps {point.steps}", "factor", setting,
                        setting == NULL, options={**shared, **dataclasses.asdict(point), "rules": " ".join(rules)},
                        about=", ".join(rules),
                    )  # fmt: skip

    def run(self, arm: Arm, seed: int, context: Context) -> Outcome:
        point = Point(arm["learning_rate"], arm["batch"], arm["steps"])
        base = None
        if self.model == BUILT_IN:
            base = context.stage("lr-batch-base", self._base_inputs(seed), functools.partial(build_base, self, context))
        build = functools.partial(build_cell, self, context, base, arm["task"], point)
        if context.keep_model:
            place = context.folder
            shutil.rmtree(place / "checkpoint", ignore_errors=True)  # whose steps would be missing in what is summed up
            place.mkdir(parents=True, exist_ok=True)
            build(place)
        else:
            inputs = (*self._cell_inputs(seed), arm["task"], *dataclasses.astuple(point))
            place = context.stage("lr-batch-cell", inputs, build)
        found = json.loads((place / "cell.json").read_text())
        covariates = {}
        if point.steps:
            time = math.log2(found["lr_time"])
            covariates = {
                "log_lr": math.log2(point.learning_rate),
                "log_batch": math.log2(point.batch),
                "log_ratio": math.log2(point.learning_rate / point.batch),
                "log_lr_time": time,
                "log_lr_time_squared": time**2,
                "lr_time": found["lr_time"],
            }
        return Outcome(
            metrics=found["metrics"], cost=Cost(**found["cost"]), diverged=found["diverged"], covariates=covariates
        )

    def _base_inputs(self, seed: int) -> tuple[Any, ...]:
        """All that the built-in decoder before fine-tuning depends on."""
        shape = (self.layers, self.width, self.heads, self.digits, self.hops, self.letters)
        return (seed, *model_inputs(self.model, self.device).values(), *shape, self.pretraining, self.pretraining_rate,
                self.dtype)  # fmt: skip

    def _cell_inputs(self, seed: int) -> tuple[Any, ...]:
        """All that a trained cell depends on apart from its task and its place, models and data by content."""
        left = {"model", "data", "device", "batch", "steps", "learning_rate", "factor"}
        fields = sorted(field.name for field in dataclasses.fields(self) if field.name not in left)
        return (seed, *self.digests().values(), *(getattr(self, name) for name in fields), *self.counts.values())
