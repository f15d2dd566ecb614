"""The recipe `precision-schedule`: how long a nested model needs its higher precision, for a task or prompt by prompt."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

Say = Callable[[str], None]


@dataclass(frozen=True)
class PrecisionScheduleTraining:
    """A schedule of precisions for a nested model: its bits fall while it writes, as late as your prompts need.

    `static` finds the fewest steps at high precision that lose no more than a tolerance on your prompts; `learned` trains a small
    classifier that chooses them prompt by prompt. Give prompts on which nothing is reported afterwards. The folder is for
    `--bits-schedule` of `trialist generate` and `trialist serve`.
    """

    model: str
    """Local folder or Hub id of a nested model, made by `trialist apply quantize`"""
    data: str
    """Prompts: a line each (.txt), or rows with a column `prompt` or `messages` (.jsonl, .json, .parquet)"""
    output: str
    """New folder for the schedule"""
    kind: Literal["static", "learned"] = "static"
    """One number of high steps for all prompts, or a classifier that reads the prompt"""
    metric: Literal["kl", "rouge"] = "kl"
    """What must not be lost: divergence from the reference on its own texts, in nats a token, or ROUGE-L between the texts, which
    rewards early precision whatever it is worth"""
    tolerance: float = 0.02
    """Loss that is accepted against high precision throughout, in the unit of the metric"""
    high: int | None = None
    """Bits of the first steps; without it the most that the model has"""
    low: int | None = None
    """Bits of the later steps; without it the next lower precision"""
    prefill_bits: int | None = None
    """Bits at which prompts are read; without it the most that the model has"""
    steps: int = 256
    """Tokens of a continuation at most"""
    shares: tuple[float, ...] = (0.0, 1 / 3, 2 / 3, 1.0)
    """Numbers of high steps that are tried, as shares of --steps; 1 is always tried"""
    reference: str | None = None
    """Model that was quantised, as the reference; without it the nested model at its highest precision"""
    epochs: int = 60
    """Passes over the training prompts, of `learned`"""
    learning_rate: float = 1e-3
    """Of `learned`"""
    raw: bool = False
    """Take prompts as text to go on with, also where the model has a chat template"""
    max_examples: int | None = None
    """Most prompts to read"""
    batch: int = 8
    """Prompts in a forward pass"""
    dtype: Literal["float32", "bfloat16", "float16", "auto"] = "float32"
    """Numbers that the model computes in; auto is the saved one"""
    device: str = "auto"
    """auto, cpu or cuda"""
    seed: int = 0
    """Of the split of prompts and of the classifier's training"""

    resumes: ClassVar[bool] = False

    def __post_init__(self) -> None:
        for name in ("steps", "epochs", "batch", "max_examples"):
            if (number := getattr(self, name)) is not None and number < 1:
                raise ValueError(f"--{name.replace('_', '-')} must be at least 1, not {number}")
        if not self.learning_rate > 0:
            raise ValueError(f"--learning-rate must be above 0, not {self.learning_rate}")
        if not self.tolerance >= 0:
            raise ValueError(f"--tolerance must be at least 0, not {self.tolerance}")
        if wrong := [share for share in self.shares if not 0 <= share <= 1]:
            raise ValueError(f"--shares {wrong[0]}: shares of --steps, from 0 to 1")

    def __call__(self, say: Say = print) -> Mapping[str, Any]:
        """Writes `schedule.json` with `tuning.json` beside it, and returns what to show: every candidate, or the report."""
        from trialist.data.tokenizers import load_tokenizer
        from trialist.decoding.precision.schedules import save_schedule
        from trialist.decoding.precision.tuning import train_scheduler, tune_static
        from trialist.decoding.prompt_files import Writing, encode_all, read_prompts
        from trialist.models.loading import load_model
        from trialist.models.nested.precision import precision_dials
        from trialist.weights.writing import folder_written_whole

        said = read_prompts(self.data)[: self.max_examples]
        place = _device(self.device)
        model = load_model(self.model, dtype=self.dtype, device=place)
        precision_dials(model)  # a model that is not nested is refused before anything is computed
        tokenizer = load_tokenizer(self.model)
        reference = None
        if self.reference is not None:
            reference = load_model(self.reference, dtype=self.dtype, device=place)
        prompts = [list(prompt.token_ids) for prompt in encode_all(Writing(tokenizer, self.raw), said, self.data)]
        say(f"{len(prompts)} prompts of {min(map(len, prompts))} to {max(map(len, prompts))} tokens")
        options: dict[str, Any] = dict(
            metric=self.metric, grid=self.shares, tolerance=self.tolerance, high=self.high, low=self.low,
            prefill_bits=self.prefill_bits, steps=self.steps, reference=reference, batch=self.batch, progress=_tenths(say),
        )  # fmt: skip
        with folder_written_whole(Path(self.output), 0) as folder:
            if self.kind == "static":
                tuning = tune_static(model, prompts, **options)
                schedule: Any = tuning.schedule
                record: dict[str, Any] = asdict(tuning)
                shown = {f"{row.high_steps} high steps": line for row, line in zip(tuning.candidates, tuning.lines())}
                shown["chosen"] = f"{schedule.high} bits for {schedule.high_steps} steps, then {schedule.low}"
            else:
                training: dict[str, Any] = dict(
                    seed=self.seed, epochs=self.epochs, learning_rate=self.learning_rate, say=say
                )
                schedule, report = train_scheduler(model, prompts, **options, **training)
                record = {**asdict(report), "better_than_prior": report.better_than_prior}
                steps = ", ".join(map(str, schedule.high_steps))
                shown = {
                    "classes": f"{steps} high steps: {', '.join(map(str, report.counts))} prompts",
                    "test": report.words(),
                }
                if not report.better_than_prior:
                    shown["advice"] = "it tells nothing that the frequencies do not; take --kind static"
            save_schedule(schedule, folder)
            options = {name: getattr(self, name) for name in self.__dataclass_fields__ if name != "output"}
            (folder / "tuning.json").write_text(json.dumps({"options": options, "result": record}, indent=2) + "\n")
        return {
            **shown,
            "schedule": f"{self.output}; trialist generate --model {self.model} --bits-schedule {self.output}",
        }


def _device(said: str) -> str:
    import torch

    if said not in ("auto", "cpu", "cuda"):
        raise ValueError(f"--device {said!r}: auto, cpu or cuda")
    return ("cuda" if torch.cuda.is_available() else "cpu") if said == "auto" else said


def _tenths(say: Say) -> Callable[[int, int], None]:
    told = [0]

    def report(done: int, total: int) -> None:
        if int(10 * done / total) > told[0]:
            told[0] = int(10 * done / total)
            say(f"{done} of {total} prompts")

    return report
