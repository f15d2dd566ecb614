"""The recipe `tulu`: the post-training of Tulu 3 and SmolTulu as a chain of recipes, each from the model before it.

arXiv 2411.15124 (Tulu 3) and 2412.08347 (SmolTulu). What the papers leave open is marked as ours.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, fields, replace
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from trialist.training.options import TrainingOptions
from trialist.training.recipe import of_first_rank
from trialist.training.recipes import RECIPES
from trialist.training.stage_options import in_words_of_the_chain, kinds_of, stage_values

if TYPE_CHECKING:
    from trialist.training.recipe import Recipe


@dataclass(frozen=True)
class Stage:
    """A recipe's place in the chain."""

    starts: tuple[str, ...]
    """The stages from whose model it starts, the first that is in the chain; else from the model given"""
    counts: str
    """What the batch is a number of"""
    package: str = "transformers"
    """What it trains with, if that is no more than an extra of ours"""


STAGES: Mapping[str, Stage] = {
    "sft": Stage((), "rows"),
    "preference": Stage(("sft",), "pairs"),
    "reward": Stage(("sft",), "prompts, each with all its pairs", "trl"),
    "rlvr": Stage(("preference", "sft"), "answers", "trl"),
}


@dataclass(frozen=True)
class StageSettings:
    """What a stage is trained with."""

    learning_rate: float
    """Peak, of all weights"""
    batch: int
    """What a step has over all devices"""
    epochs: float = 1.0
    length: int = 2048
    """Most tokens of a row"""
    warmup: float = 0.1
    """Share of the steps"""
    schedule: Literal["cosine", "linear", "constant"] = "linear"
    options: Mapping[str, Any] = field(default_factory=dict)
    """Others, of the stage's recipe alone"""

    @property
    def ratio(self) -> float:
        """Learning rate over batch."""
        return self.learning_rate / self.batch

    def with_batch(self, batch: int) -> StageSettings:
        """Another batch at the same ratio."""
        return replace(self, batch=batch, learning_rate=self.ratio * batch)


def _settings(
    sft: tuple[float, int], preference: tuple[float, int], reward: tuple[float, int], rlvr: float, beta: float = 0.05
) -> Mapping[str, StageSettings]:
    """Of a learning rate and a batch for each stage; of rlvr the batch (eight groups of eight answers), no warm-up and no
    decay are ours. beta: of rlvr."""
    return {
        "sft": StageSettings(*sft, epochs=2.0, length=4096, warmup=0.03),
        "preference": StageSettings(*preference, options={"objective": "dpo-norm", "beta": 5.0}),
        "reward": StageSettings(*reward, warmup=0.0),
        "rlvr": StageSettings(
            rlvr, 64, warmup=0.0, schedule="constant", options={"beta": beta, "accepted": 10.0, "unfinished": -10.0}
        ),
    }


# The reward model of Tulu 3 was trained with 32 pairs a step on each device; on one device that is the batch.
# SmolTulu reports no outcome of its last stage; its settings are those of Tulu 3 8B.
SETTINGS: Mapping[str, Mapping[str, StageSettings]] = {
    "tulu3": _settings((5e-6, 128), (5e-7, 128), (3e-6, 32), 3e-7),
    "tulu3-70b": _settings((2e-6, 128), (2e-7, 128), (3e-6, 32), 1e-7, beta=0.07),
    "smoltulu-1130": _settings((9e-5, 8), (8e-7, 12), (4e-5, 4), 3e-7),
    "smoltulu-1207": _settings((3.1e-6, 32), (5e-7, 32), (7.5e-7, 8), 3e-7),
}

OWN = ("model", "data", "output", "columns", "accumulate", "save", "report_to")
"""Options of recipes that the chain sets itself"""


@dataclass(frozen=True)
class TuluInputs:
    """What the chain must be given."""

    model: str
    """Hub id, local folder or asset of a causal language model"""
    output: str
    """Folder for the models, one subfolder for each stage"""


@dataclass(frozen=True)
class Tulu(TrainingOptions, TuluInputs):
    """The Tulu 3 recipe: fine-tuning, length-normalised DPO, a reward model, and reinforcement from verified answers.

    Each stage is a recipe of its own (`sft`, `preference`, `reward`, `rlvr`) and writes a model folder, OUTPUT/STAGE. The same
    command goes on after an interruption: finished stages are not run again, and within a stage the last checkpoint counts.
    Preference and reward training start from the fine-tuned model, reinforcement from the preference-trained one; where
    that stage is not named, from what comes before it. Any option of a stage's recipe can be given to that stage alone:
    `--rlvr-options group=16 temperature=0.8`.
    """

    stages: str = ",".join(STAGES)
    """Stages to run, in this order: sft, preference, reward, rlvr"""
    settings: Literal["tulu3", "tulu3-70b", "smoltulu-1130", "smoltulu-1207"] = "tulu3"
    """Learning rates, batches, passes and lengths: of Tulu 3 8B or 70B, or one of the two of SmolTulu 1.7B; with --lora ten
    times these learning rates"""
    sft_data: str | None = None
    """Rows to fine-tune on, as `train sft` reads them"""
    sft_columns: str = ""
    """Their columns under other names: prompt=question,completion=answer"""
    sft_options: tuple[str, ...] = ()
    """Options of `train sft` for this stage, as NAME=VALUE: batch=16 ratio=1e-7 drop_long=true"""
    preference_data: str | None = None
    """Rows with prompt, chosen and rejected, as `train preference` reads them"""
    preference_columns: str = ""
    """Their columns under other names: chosen=better,rejected=worse"""
    preference_options: tuple[str, ...] = ()
    """Options of `train preference` for this stage, as NAME=VALUE: beta=2 drop_long=true"""
    reward_data: str | None = None
    """Rows of preferences for the reward model; without it those of the preference stage"""
    reward_columns: str | None = None
    """Their columns under other names; without it those of the preference stage"""
    reward_options: tuple[str, ...] = ()
    """Options of `train reward` for this stage, as NAME=VALUE: learning_rate=1e-5 donors=2"""
    rlvr_data: str | None = None
    """Rows with prompt and answer, as `train rlvr` reads them; `arithmetic` makes sums and differences"""
    rlvr_columns: str = ""
    """Their columns under other names: prompt=question"""
    rlvr_options: tuple[str, ...] = ()
    """Options of `train rlvr` for this stage, as NAME=VALUE: group=16 answer_length=512; reward_weight=0.1 gives the stage's
    own reward model a say"""
    batch: int | None = None
    """What a step of every stage has, at the ratio of learning rate to batch of the settings, which else say how many: rows,
    pairs, in reward prompts with all their pairs, in rlvr answers"""
    micro_batch: int = 4
    """Most of them in a forward pass, per device; micro-batches are added up to the batch"""
    length: int | None = None
    """Most tokens of a row; without it that of the settings, or the model's context where that is shorter"""
    chat: bool = True
    """Put strings through the chat template in all stages: the prompt as a turn of the user, an answer as one of the assistant"""
    log_every: int = 1
    """Steps between lines of progress"""

    def __post_init__(self) -> None:
        chain = self._chain()
        self.require(max_examples=1, batch=1, micro_batch=1, steps=1, length=2)
        lacking = [stage for stage in chain if self._data(stage) is None]
        if lacking:
            options = ", ".join(f"--{stage}-data ROWS" for stage in lacking)
            raise ValueError(
                f"stage{'s' if len(lacking) > 1 else ''} {', '.join(lacking)} without data: give {options}"
            )
        for stage in STAGES:
            if self._asked(stage) and stage not in chain:
                raise ValueError(f"--{stage}-options: --stages {self.stages} has no {stage}")

    def __call__(self, say: Callable[[str], None] = print) -> Mapping[str, Any]:
        """Runs the stages that are not finished and returns what each has found, label by label."""
        from trialist.models.loading import model_source

        chain, say = self._chain(), of_first_rank(say)
        model_source(self.model)
        self._check(say)
        results: dict[str, Any] = {}
        for number, stage in enumerate(chain, start=1):
            used = self.stage_settings(stage)
            say(
                f"stage {number} of {len(chain)}: {stage}, from {self.start(stage)}; learning rate {used.learning_rate:.3g}, "
                f"batch {used.batch} ({STAGES[stage].counts}), ratio {used.ratio:.3g}"
            )
            with self._named(stage):
                results |= {f"{stage}: {name}": value for name, value in self.recipe(stage)(say).items()}
        return results

    def recipe(self, stage: str) -> Recipe:
        """The recipe of a stage with all its options. Raises ValueError for options that cannot work, naming the stage."""
        used, asked = self.stage_settings(stage), self._asked(stage)
        batch, accumulate = self._micro_batches(stage, used.batch, asked.pop("micro_batch", self.micro_batch))
        shared = {option.name: getattr(self, option.name) for option in fields(TrainingOptions)}
        own = {**used.options, **{name: value for name, value in asked.items() if name not in ("batch", "ratio")}}
        if own.get("reward_weight") and own.get("reward_model") is None:
            if "reward" not in self._chain():
                raise ValueError(
                    "--rlvr-options reward_weight weighs a reward model, so --stages must have reward, or reward_model=FOLDER "
                    "must name one"
                )
            own["reward_model"] = self.folder("reward")
        values = {
            **shared,
            "model": self.start(stage),
            "data": self._data(stage),
            "output": self.folder(stage),
            "columns": self._columns(stage),
            "epochs": used.epochs,
            "warmup": used.warmup,
            "schedule": used.schedule,
            "length": self._length(used),
            "chat": self.chat,
            "log_every": self.log_every,
            **own,
            "learning_rate": used.learning_rate,
            "batch": batch,
            "accumulate": accumulate,
        }
        with self._named(stage):
            return self._kind(stage)(**values)

    def start(self, stage: str) -> str:
        """The model from which a stage starts."""
        before = next((name for name in STAGES[stage].starts if name in self._chain()), None)
        return self.model if before is None else self.folder(before)

    def folder(self, stage: str) -> str:
        return str(Path(self.output).expanduser() / stage)

    def stage_settings(self, stage: str) -> StageSettings:
        """Those of the named settings, with what is asked for: another batch at the same ratio, a ratio or a rate."""
        used, asked = SETTINGS[self.settings][stage], self._asked(stage)
        if self.lora:  # adapters take higher rates than all weights, by as much as the recipe's defaults differ
            full, adapters = self._kind(stage).RATES
            used = replace(used, learning_rate=used.learning_rate * adapters / full)
        batch = asked.get("batch", self.batch)
        if batch is not None:
            if batch < 1:
                raise ValueError(f"--{stage}-options batch={batch}: must be at least 1")
            used = used.with_batch(batch)
        if "ratio" in asked and "learning_rate" in asked:
            raise ValueError(f"--{stage}-options: give ratio or learning_rate, not both")
        if "ratio" in asked:
            used = replace(used, learning_rate=asked["ratio"] * used.batch)
        return replace(used, learning_rate=asked.get("learning_rate") or used.learning_rate)

    def _chain(self) -> list[str]:
        named = [name.strip() for name in self.stages.split(",") if name.strip()]
        unknown = [name for name in named if name not in STAGES]
        if unknown:
            raise ValueError(f"--stages {self.stages}: no stage {unknown[0]!r}; there are {', '.join(STAGES)}")
        if not named:
            raise ValueError(f"--stages is empty; name some of {', '.join(STAGES)}")
        if named != [name for name in STAGES if name in named]:
            raise ValueError(f"--stages {self.stages}: name each stage once, in the order {', '.join(STAGES)}")
        return named

    def _kind(self, stage: str) -> type[Recipe]:
        module, _, name = RECIPES[stage].partition(":")
        return getattr(import_module(module), name)

    def _kinds(self, stage: str) -> dict[str, Any]:
        """The types of what a stage can be asked for: options of its recipe, but for those that the chain sets, and its own."""
        return {**kinds_of(self._kind(stage), OWN), "batch": int, "micro_batch": int, "ratio": float}

    def _asked(self, stage: str) -> dict[str, Any]:
        """What the user gives to this stage alone."""
        given = getattr(self, f"{stage}_options")
        return stage_values(given, self._kinds(stage), f"{stage}-options") if given else {}

    def _data(self, stage: str) -> str | None:
        if stage == "reward" and self.reward_data is None:
            return self.preference_data
        return getattr(self, f"{stage}_data")

    def _columns(self, stage: str) -> str:
        columns = getattr(self, f"{stage}_columns")
        return self.preference_columns if columns is None else columns

    def _check(self, say: Callable[[str], None]) -> None:
        """Raises what would end a stage, before hours of training and not after: the options of all, and the rows of those that
        do not begin at once. They are read with the tokenizer of the model given, which the stages hand on."""
        chain = self._chain()
        recipes = {stage: self.recipe(stage) for stage in chain}
        waiting = [stage for stage in chain if not (Path(self.folder(stage)) / "training.json").is_file()][1:]
        for stage in chain:
            if find_spec(package := STAGES[stage].package) is None:
                raise ImportError(
                    f"stage {stage} needs {package}: `pip install trialist[{package}]`, or leave it out of --stages"
                )
        if waiting:
            say(f"looks at the rows of {', '.join(waiting)} first")
        for stage in waiting:
            with self._named(stage):
                replace(recipes[stage], model=self.model).check()

    @contextlib.contextmanager
    def _named(self, stage: str) -> Iterator[None]:
        """Errors that a user can act on name the stage, and its options as they are given here."""
        try:
            yield
        except (ValueError, FileNotFoundError, ImportError) as error:
            kind = next(kind for kind in (FileNotFoundError, ImportError, ValueError) if isinstance(error, kind))
            own = [option.name for option in fields(self)]
            text = in_words_of_the_chain(str(error), stage, own, self._kinds(stage))
            raise kind(f"stage {stage}: {text}") from error

    def _micro_batches(self, stage: str, batch: int, most: int) -> tuple[int, int]:
        """Size and number of the micro-batches of a step on each rank."""
        ranks, group = int(os.environ.get("WORLD_SIZE", "1")), 1
        if stage == "rlvr":
            group = self._asked(stage).get("group", self._kind(stage).__dataclass_fields__["group"].default)
        if batch % ranks:
            raise ValueError(
                f"stage {stage}: a batch of {batch} cannot be shared by {ranks} ranks; pass --{stage}-options batch=..."
            )
        if batch % group:
            raise ValueError(
                f"stage {stage}: {batch} answers are no whole groups of {group}; pass --{stage}-options batch=... or group=..."
            )
        own = batch // ranks
        if most < 1:
            raise ValueError(f"--{stage}-options micro_batch={most}: must be at least 1")
        micro = max(size for size in range(1, min(most, own) + 1) if own % size == 0)
        return micro, own // micro

    def _length(self, used: StageSettings) -> int:
        """Asked for, or that of the settings if the model takes so much."""
        from trialist.models.loading import model_context

        return self.length or min(used.length, model_context(self.model) or used.length)
