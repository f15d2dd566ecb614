"""The transforms `param-delta` and `extract-delta`: options, progress, and what is shown at the end."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal


@dataclass(frozen=True)
class ParamDelta:
    """The weight difference that post-training made in one base, added to another: no training.

    theta = base_new + sum_i alpha_i (post_i - base_i). The output is a Hugging Face folder, there whole or not at all, with
    the post-trained model's tokenizer, chat template and generation settings and a record in param_delta.json.
    """

    base_new: str
    """Hub id, local folder or asset of the base that is to get the delta; config, dtypes and file layout are its own"""
    post: tuple[str, ...]
    """Post-trained model, or several, one for each delta"""
    base: tuple[str, ...]
    """Base that each was trained from, or one for all of them"""
    output: str
    """New folder for the model"""
    alpha: tuple[float, ...] = (1.0,)
    """Factor of each delta, or one for all; 0 leaves the new base as it is, bit for bit"""
    dtype: Literal["auto", "float32", "bfloat16", "float16", "float64"] = "auto"
    """Numbers of the output; auto is those of each tensor of the new base"""
    precision: Literal["float32", "float64"] = "float32"
    """Numbers that the sum is computed in, before it is rounded once"""
    rounding: Literal["nearest", "stochastic"] = "nearest"
    """Rounding to the output's numbers; stochastic keeps deltas below half an ulp on average instead of erasing them"""
    seed: int = 0
    """Of stochastic rounding"""
    include: tuple[str, ...] = ()
    """Patterns such as *.mlp.* of the tensors that get the delta; without them all"""
    exclude: tuple[str, ...] = ()
    """Patterns of tensors that stay those of the new base"""
    on_mismatch: Literal["error", "skip", "by-token", "by-row"] = "error"
    """Where names, shapes or vocabularies differ: stop and list them, leave such tensors, or match embedding rows by token, or by
    number where tokens were only renamed"""
    tokenizer: Literal["post", "base-new"] = "post"
    """Whose tokenizer the output gets; chat template and generation settings are those of the post-trained model either way"""
    force: bool = False
    """Go on where lineage, settings or dtypes speak against it; the record says so"""

    def __call__(self, say: Callable[[str], None] = print) -> Mapping[str, Any]:
        """Writes the folder and returns what to show: likeness of the bases, size of the delta, what rounding erased."""
        from trialist.weights.arithmetic import apply_param_delta

        deltas = list(
            zip(self.post, _each("base", self.base, len(self.post)), _each("alpha", self.alpha, len(self.post)))
        )
        with progress_bar("param-delta") as progress:
            report = apply_param_delta(
                self.base_new, deltas, self.output, dtype=self.dtype, precision=self.precision, rounding=self.rounding,
                seed=self.seed, include=self.include, exclude=self.exclude, on_mismatch=self.on_mismatch,
                tokenizer=self.tokenizer, force=self.force, progress=progress,
            )  # fmt: skip
        for note in (*report.notes, *(f"left as in the new base: {entry}" for entry in report.skipped)):
            say(f"note: {note}")
        return {"model": self.output, **report.summary()}


@dataclass(frozen=True)
class ExtractDelta:
    """The weight difference that post-training made, as a LoRA adapter of low rank that PEFT loads.

    Linear layers are decomposed by singular values; how much of the difference the adapter keeps is shown and recorded.
    """

    post: str
    """Hub id, local folder or asset of the post-trained model"""
    base: str
    """Base that it was trained from"""
    output: str
    """New folder for the adapter"""
    rank: int | None = None
    """Rank in every layer; without it the smallest in each that keeps --energy"""
    energy: float = 0.9
    """Share of a layer's squared difference that is kept, above 0, at most 1 (full rank)"""
    rest: Literal["leave", "save"] = "leave"
    """Embeddings and norms, which no adapter of linear layers holds: leave them out, or store them whole beside it"""
    seed: int = 0
    """Of the randomised decomposition, taken where the rank is far below the full one"""
    device: Literal["auto", "cpu"] = "auto"
    """Where matrices are decomposed: the accelerator if there is one, or the CPU"""
    force: bool = False
    """Go on where lineage or settings speak against it; the record says so"""

    def __call__(self, say: Callable[[str], None] = print) -> Mapping[str, Any]:
        """Writes the adapter folder and returns what to show."""
        import torch

        from trialist.weights.low_rank import extract_delta

        device = "cpu"
        if self.device == "auto" and (accelerator := torch.accelerator.current_accelerator()) is not None:
            device = accelerator.type
        with progress_bar("extract-delta") as progress:
            record = extract_delta(
                self.post, self.base, self.output, rank=self.rank, energy=self.energy, rest=self.rest, force=self.force,
                seed=self.seed, device=device, progress=progress,
            )  # fmt: skip
        ranks = [layer["rank"] for layer in record["layers"]]
        if record["left_out"]:
            say(
                f"note: {len(record['left_out'])} tensors are left out, {record['share_left_out']:.2%} of the squared difference"
            )
        if record["not_compared"]:
            say(
                f"note: left out, as rows stand for other tokens and cannot be compared: {', '.join(record['not_compared'])}"
            )
        for note in record["notes"]:
            say(f"note: {note}")
        return {
            "adapter": self.output,
            "layers": f"{len(ranks)}, ranks {min(ranks)} to {max(ranks)}",
            "kept of linear layers": f"{record['kept_of_linear_layers']:.2%} of the squared difference",
            "left out": f"{record['share_left_out']:.2%} of all",
            "seconds": round(record["seconds"], 1),
        }


def _each(option: str, values: tuple[Any, ...], count: int) -> tuple[Any, ...]:
    if len(values) == 1:
        return values * count
    if len(values) != count:
        raise ValueError(
            f"--{option} takes one value for all deltas or one for each: {count} --post, {len(values)} --{option}"
        )
    return values


@contextlib.contextmanager
def progress_bar(what: str) -> Iterator[Callable[[int, int], None]]:
    """A bar on stderr, where that is a terminal."""
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

    console = Console(stderr=True)
    bar = Progress(
        TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeRemainingColumn(), console=console,
        disable=not console.is_terminal,
    )  # fmt: skip
    with bar:
        task = bar.add_task(what, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)
