"""The recipe `tulu`: the post-training of Tulu 3 and SmolTulu as a chain of recipes, each from the model before it.

arXiv 2411.15124 (Tulu 3) and 2412.08347 (SmolTulu). What the papers leave open is marked as ours.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from trialist.training.preference import PreferenceTraining
    from trialist.training.recipe import Recipe
    from trialist.training.reward import RewardModelling
    from trialist.training.rlvr import VerifiableRewards
    from trialist.training.sft import SupervisedFineTuning

STAGES = ("sft", "preference", "reward", "rlvr")
STARTS = {"sft": (), "preference": ("sft",), "reward": ("sft",), "rlvr": ("preference", "sft")}
"""Stage -> the stages from whose model it starts, the first that is in the chain; else from the model given"""


@dataclass(frozen=True)
class StageSettings:
    """Peak learning rate, rows in a step (over all devices), passes, tokens of a row, share of warm-up."""

    learning_rate: float
    batch: int
    epochs: float = 1.0
    length: int = 2048
    warmup: float = 0.1
    schedule: Literal["linear", "constant"] = "linear"

    @property
    def ratio(self) -> float:
        """Learning rate over batch."""
        return self.learning_rate / self.batch

    def with_batch(self, batch: int) -> StageSettings:
        """Another batch at the same ratio."""
        return replace(self, batch=batch, learning_rate=self.ratio * batch)


@dataclass(frozen=True)
class RecipeSettings:
    """What each stage is trained with, and the strength of the two that hold on to a reference."""

    sft: StageSettings
    preference: StageSettings
    reward: StageSettings
    rlvr: StageSettings
    preference_beta: float = 5.0
    """Of length-normalised DPO"""
    rlvr_beta: float = 0.05
    accepted: float = 10.0
    unfinished: float = -10.0


def _sft(learning_rate: float, batch: int) -> StageSettings:
    return StageSettings(learning_rate, batch, epochs=2.0, length=4096, warmup=0.03)


def _rlvr(learning_rate: float) -> StageSettings:
    """Batch, warm-up and schedule are ours: eight groups of eight answers, and no decay."""
    return StageSettings(learning_rate, batch=64, warmup=0.0, schedule="constant")


# The reward model of Tulu 3 was trained with 32 pairs a step on each device; on one device that is the batch.
# SmolTulu reports no outcome of its last stage; its settings are those of Tulu 3 8B.
SETTINGS: Mapping[str, RecipeSettings] = {
    "tulu3": RecipeSettings(
        _sft(5e-6, 128), StageSettings(5e-7, 128), StageSettings(3e-6, 32, warmup=0.0), _rlvr(3e-7)
    ),
    "tulu3-70b": RecipeSettings(
        _sft(2e-6, 128), StageSettings(2e-7, 128), StageSettings(3e-6, 32, warmup=0.0), _rlvr(1e-7), rlvr_beta=0.07
    ),
    "smoltulu-1130": RecipeSettings(
        _sft(9e-5, 8), StageSettings(8e-7, 12), StageSettings(4e-5, 4, warmup=0.0), _rlvr(3e-7)
    ),
    "smoltulu-1207": RecipeSettings(
        _sft(3.1e-6, 32), StageSettings(5e-7, 32), StageSettings(7.5e-7, 8, warmup=0.0), _rlvr(3e-7)
    ),
}

CHECKED = 100
"""Rows of each stage that are looked at before the first one starts"""


@dataclass(frozen=True)
class Tulu:
    """The Tulu 3 recipe: fine-tuning, length-normalised DPO, a reward model, and reinforcement from verified answers.

    Each stage is a recipe of its own (`sft`, `preference`, `reward`, `rlvr`) and writes a model folder, OUTPUT/STAGE. The same
    command goes on after an interruption: finished stages are not run again, and within a stage the last checkpoint counts.
    Preference and reward training start from the fine-tuned model, reinforcement from the preference-trained one; where
    that stage is not named, from what comes before it.
    """

    model: str
    """Hub id, local folder or asset of a causal language model"""
    output: str
    """Folder for the models, one subfolder for each stage"""
    stages: str = ",".join(STAGES)
    """Stages to run, in this order: sft, preference, reward, rlvr"""
    settings: Literal["tulu3", "tulu3-70b", "smoltulu-1130", "smoltulu-1207"] = "tulu3"
    """Learning rates, batches, passes and lengths: of Tulu 3 8B or 70B, or one of the two of SmolTulu 1.7B"""
    sft_data: str | None = None
    """Rows to fine-tune on, as `train sft` reads them"""
    sft_columns: str = ""
    """Their columns under other names: prompt=question,completion=answer"""
    preference_data: str | None = None
    """Rows with prompt, chosen and rejected, as `train preference` reads them"""
    preference_columns: str = ""
    """Their columns under other names: chosen=better,rejected=worse"""
    reward_data: str | None = None
    """Rows of preferences for the reward model; without it those of the preference stage"""
    reward_columns: str | None = None
    """Their columns under other names; without it those of the preference stage"""
    rlvr_data: str | None = None
    """Rows with prompt and answer, as `train rlvr` reads them; `arithmetic` makes sums and differences"""
    rlvr_columns: str = ""
    """Their columns under other names: prompt=question"""
    max_examples: int | None = None
    """Most rows to read for a stage"""
    batch: int | None = None
    """Rows in a step of every stage, at the ratio of learning rate to batch that the settings have; without it theirs"""
    micro_batch: int = 4
    """Most rows in a forward pass, per device; micro-batches are added up to the batch"""
    steps: int | None = None
    """Optimizer steps of each stage, instead of the passes of the settings"""
    length: int | None = None
    """Most tokens of a row; without it that of the settings, or the model's context where that is shorter"""
    chat: bool = True
    """Put string prompts and completions through the chat template in sft and rlvr"""
    group: int = 8
    """Answers to each prompt in rlvr"""
    answer_length: int = 256
    """Most tokens of an answer in rlvr"""
    reward_weight: float = 0.0
    """Weight of the reward model's score in rlvr; the recipe has 0"""
    validation: float = 0.05
    """Share of the rows of sft, preference and reward held out"""
    lora: int = 0
    """Rank of LoRA adapters, merged at the end of each stage; 0 trains all weights"""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """bfloat16 computes in bfloat16; trained weights stay float32, with LoRA the frozen ones are stored in bfloat16"""
    device: Literal["auto", "cpu"] = "auto"
    """The accelerator if there is one, or the CPU"""
    gradient_checkpointing: bool = False
    """Less memory for about a third more time"""
    checkpoint_every: int | None = None
    """Steps between checkpoints; without it ten in a stage"""
    log_every: int = 1
    """Steps between lines of progress"""
    seed: int = 0
    """Of everything that is drawn"""

    def __post_init__(self) -> None:
        self._chain()
        for name in ("max_examples", "batch", "micro_batch", "steps"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"--{name.replace('_', '-')} must be at least 1, not {value}")
        lacking = [stage for stage in self._chain() if self._data(stage) is None]
        if lacking:
            options = ", ".join(f"--{stage}-data ROWS" for stage in lacking)
            raise ValueError(
                f"stage{'s' if len(lacking) > 1 else ''} {', '.join(lacking)} without data: give {options}"
            )
        if self.reward_weight and not {"reward", "rlvr"} <= set(self._chain()):
            raise ValueError("--reward-weight weighs the reward model in rlvr, so --stages must have reward and rlvr")

    def __call__(self, say: Callable[[str], None] = print) -> Mapping[str, Any]:
        """Runs the stages that are not finished and returns what each has found, label by label."""
        from trialist.models.loading import model_source

        chain = self._chain()
        model_source(self.model)
        for stage in chain:  # what cannot work is said before hours of training, not after
            self._check_rows(stage)
            self.recipe(stage)
        results: dict[str, Any] = {}
        for number, stage in enumerate(chain, start=1):
            used = self.stage_settings(stage)
            say(
                f"stage {number} of {len(chain)}: {stage}, from {self.start(stage)}; learning rate {used.learning_rate:.3g}, "
                f"batch {used.batch}, ratio {used.ratio:.3g}"
            )
            results |= {f"{stage}: {name}": value for name, value in self.recipe(stage)(say).items()}
        return results

    def recipe(self, stage: str) -> Recipe:
        """The recipe of a stage with all its options."""
        builders: Mapping[str, Callable[[], Recipe]] = {
            "sft": self._sft, "preference": self._preference, "reward": self._reward, "rlvr": self._rlvr,
        }  # fmt: skip
        return builders[stage]()

    def start(self, stage: str) -> str:
        """The model from which a stage starts."""
        before = next((name for name in STARTS[stage] if name in self._chain()), None)
        return self.model if before is None else self.folder(before)

    def folder(self, stage: str) -> str:
        return str(Path(self.output).expanduser() / stage)

    def stage_settings(self, stage: str) -> StageSettings:
        """Those of the named settings, with another batch at the same ratio where that is asked for."""
        found: StageSettings = getattr(SETTINGS[self.settings], stage)
        return found if self.batch is None else found.with_batch(self.batch)

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

    def _data(self, stage: str) -> str | None:
        if stage == "reward" and self.reward_data is None:
            return self.preference_data
        return getattr(self, f"{stage}_data")

    def _columns(self, stage: str) -> str:
        columns = getattr(self, f"{stage}_columns")
        return self.preference_columns if columns is None else columns

    def _check_rows(self, stage: str) -> None:
        """Reads the first rows of a stage. Raises the errors of its reader."""
        from trialist.data.corpora import parse_columns
        from trialist.data.formats import read_rows
        from trialist.data.preferences import read_preferences
        from trialist.data.verifiable import read_verifiable

        data, most = self._data(stage), min(self.max_examples or CHECKED, CHECKED)
        assert data is not None, "checked at the start"
        if stage == "sft":
            read_rows(data, columns=parse_columns(self._columns(stage)), max_examples=most)
        elif stage == "rlvr":
            read_verifiable(data, columns=self._columns(stage), max_examples=most)
        else:
            read_preferences(data, columns=self._columns(stage), max_examples=most)

    def _shared(self, stage: str) -> dict[str, Any]:
        """Options that all recipes have."""
        used, ranks = self.stage_settings(stage), int(os.environ.get("WORLD_SIZE", "1"))
        if used.batch % ranks:
            raise ValueError(f"stage {stage}: a batch of {used.batch} cannot be shared by {ranks} ranks; pass --batch")
        own = used.batch // ranks
        micro = max(size for size in range(1, min(self.micro_batch, own) + 1) if own % size == 0)
        return {
            "model": self.start(stage),
            "data": self._data(stage),
            "output": self.folder(stage),
            "columns": self._columns(stage),
            "max_examples": self.max_examples,
            "learning_rate": used.learning_rate,
            "batch": micro,
            "accumulate": own // micro,
            "epochs": used.epochs,
            "steps": self.steps,
            "length": self._length(used),
            "warmup": used.warmup,
            "schedule": used.schedule,
            "lora": self.lora,
            "dtype": self.dtype,
            "device": self.device,
            "gradient_checkpointing": self.gradient_checkpointing,
            "checkpoint_every": self.checkpoint_every,
            "log_every": self.log_every,
            "seed": self.seed,
        }

    def _length(self, used: StageSettings) -> int:
        """Asked for, or that of the settings if the model takes so much."""
        from trialist.models.loading import model_context

        return self.length or min(used.length, model_context(self.model) or used.length)

    def _sft(self) -> SupervisedFineTuning:
        from trialist.training.sft import SupervisedFineTuning

        return SupervisedFineTuning(**self._shared("sft"), chat=self.chat, validation=self.validation)

    def _preference(self) -> PreferenceTraining:
        from trialist.training.preference import PreferenceTraining

        beta = SETTINGS[self.settings].preference_beta
        return PreferenceTraining(
            **self._shared("preference"), objective="dpo-norm", beta=beta, validation=self.validation
        )

    def _reward(self) -> RewardModelling:
        from trialist.training.reward import RewardModelling

        return RewardModelling(**self._shared("reward"), validation=self.validation)

    def _rlvr(self) -> VerifiableRewards:
        from trialist.training.rlvr import VerifiableRewards

        chosen = SETTINGS[self.settings]
        return VerifiableRewards(
            **self._shared("rlvr"),
            chat=self.chat,
            group=self.group,
            answer_length=self.answer_length,
            beta=chosen.rlvr_beta,
            accepted=chosen.accepted,
            unfinished=chosen.unfinished,
            reward_model=self.folder("reward") if self.reward_weight else None,
            reward_weight=self.reward_weight,
        )
