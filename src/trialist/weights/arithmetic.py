"""ParamDelta: what post-training changed in one base, added to another, by streaming over the checkpoints.

theta = base_new + sum_i alpha_i (post_i - base_i), for every tensor, norms, embeddings and head included (arXiv 2504.21023;
the paper's own case is one delta with alpha 1). Nothing is trained. The sum is computed in float32 (or float64) and rounded
once, to the new base's dtype or a chosen one. All alphas 0 is the new base, bit for bit. Where base_new equals base the
result is post up to one rounding of post - base, half an ulp of the difference, and exactly post where they are within a
factor of two of each other; in float64 it is exact for weights stored in 32 bits or fewer, but for magnitudes 2^29 apart.

Models go through memory in stretches of tensors, whatever their size: see `streaming`.
"""

from __future__ import annotations

import contextlib
import itertools
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from trialist.weights.architecture import architecture_of
from trialist.weights.checkpoint import Checkpoint, open_checkpoint
from trialist.weights.companions import check_companions, write_companions
from trialist.weights.lineage import config_differences, likeness, refusal, remark
from trialist.weights.plan import ON_MISMATCH, Delta, Plan, make_plan
from trialist.weights.report import DeltaReport, Likeness
from trialist.weights.streaming import Files, Progress, Summing, check_seed, stream, unwatched
from trialist.weights.writing import folder_written_whole, nbytes, output_folder

OUTPUT_DTYPES = {
    "float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, "float64": torch.float64,
}  # fmt: skip
PRECISIONS = ("float32", "float64")
ROUNDINGS = ("nearest", "stochastic")
TOKENIZERS = ("post", "base-new")


def apply_param_delta(
    base_new: str, deltas: Sequence[tuple[str, str, float]], output: str | Path, *, dtype: str = "auto",
    precision: str = "float32", rounding: str = "nearest", seed: int = 0, include: Sequence[str] = (),
    exclude: Sequence[str] = (), on_mismatch: str = "error", tokenizer: str = "post", force: bool = False,
    progress: Progress = unwatched,
) -> DeltaReport:  # fmt: skip
    """Writes base_new + sum alpha (post - base) as a Hugging Face folder, whole or not at all, with `param_delta.json`.

    base_new, and (post, base, alpha) of each delta: Hub id, local folder or asset name. dtype: "auto" is that of each
    tensor of base_new. rounding, seed: "stochastic" rounds up or down by chance in proportion, so that deltas below half an
    ulp survive on average. include, exclude: glob patterns of tensor names that get the delta; all others stay base_new's.
    on_mismatch: "error"; "skip" leaves what does not fit as it is in base_new; of embedding and head "by-token" matches rows
    by token, and "by-row" by number, which is right where tokens were only renamed. tokenizer: "post" (of the first delta) or
    "base-new". force: goes on where lineage, settings or dtypes speak against it; the record says so. Raises ValueError that
    lists names for whatever does not fit, FileNotFoundError for an asset that was not fetched; then no output is left.
    """
    _check(base_new, deltas, dtype, precision, rounding, on_mismatch, tokenizer)
    check_seed(seed)
    job = _Job(
        base_new, deltas, dtype=dtype, precision=precision, rounding=rounding, seed=seed, include=include, exclude=exclude,
        on_mismatch=on_mismatch, tokenizer=tokenizer, force=force, progress=progress,
    )  # fmt: skip
    return job.run(output_folder(output))


def delta_diagnostics(
    base_new: str, post: str, base: str, *, on_mismatch: str = "error", progress: Progress = unwatched
) -> DeltaReport:
    """The report of `apply_param_delta` with alpha 1, without its output and without its refusals.

    What would have been refused stands in `overridden`. Mismatches of names and shapes raise ValueError all the same.
    """
    deltas = ((post, base, 1.0),)
    _check(base_new, deltas, "auto", "float32", "nearest", on_mismatch, "post")
    tokenizer = "base-new" if on_mismatch == "skip" else "post"
    return _Job(base_new, deltas, on_mismatch=on_mismatch, tokenizer=tokenizer, force=True, progress=progress).run(None)


def _check(
    base_new: str, deltas: Sequence[tuple[str, str, float]], dtype: str, precision: str, rounding: str, on_mismatch: str,
    tokenizer: str,
) -> None:  # fmt: skip
    if not deltas:
        raise ValueError("at least one delta (post, base, alpha) is needed")
    for post, base, alpha in deltas:
        if not math.isfinite(alpha):
            raise ValueError(f"alpha of {post!r} is {alpha}; a finite number is wanted (1 is the whole delta, 0 none)")
        if not (base_new and post and base):
            raise ValueError("a model is named by a Hub id, a local folder or an asset, not by an empty string")
    for name, value, known in (
        ("dtype", dtype, ("auto", *OUTPUT_DTYPES)), ("precision", precision, PRECISIONS), ("rounding", rounding, ROUNDINGS),
        ("on-mismatch", on_mismatch, ON_MISMATCH), ("tokenizer", tokenizer, TOKENIZERS),
    ):  # fmt: skip
        if value not in known:
            raise ValueError(f"--{name} is {value!r}; choose one of {', '.join(known)}")


@dataclass
class _Job:
    base_new: str
    pairs: Sequence[tuple[str, str, float]]
    dtype: str = "auto"
    precision: str = "float32"
    rounding: str = "nearest"
    seed: int = 0
    include: Sequence[str] = ()
    exclude: Sequence[str] = ()
    on_mismatch: str = "error"
    tokenizer: str = "post"
    force: bool = False
    progress: Progress = unwatched

    def run(self, output: Path | None) -> DeltaReport:
        began = time.perf_counter()
        with contextlib.ExitStack() as stack:
            opened: dict[str, Checkpoint] = {}
            for name in (self.base_new, *itertools.chain.from_iterable(pair[:2] for pair in self.pairs)):
                if name not in opened:
                    opened[name] = stack.enter_context(open_checkpoint(name))
            new = opened[self.base_new]
            deltas = [Delta(opened[post], opened[base], alpha) for post, base, alpha in self.pairs]
            known = architecture_of(new.folder)
            plan = make_plan(
                new, deltas, known, dtype=OUTPUT_DTYPES.get(self.dtype), include=self.include, exclude=self.exclude,
                on_mismatch=self.on_mismatch, tokenizer=self.tokenizer,
            )  # fmt: skip
            if output is not None:
                check_companions(new, deltas, plan, self.tokenizer)
            found, overridden = self._judge(new, deltas, plan)
            size = sum(nbytes(part.dtype, part.shape) for part in plan.parts)
            report = DeltaReport(
                self._settings(new, deltas), [part.report for part in plan.parts], found, plan.notes, overridden, plan.skipped,
                0.0,
            )  # fmt: skip
            summing = Summing(new, deltas, self._compute_dtype(new, deltas), self.rounding, self.seed)
            if output is None:
                stream(summing, plan.parts, None, self.progress)
                return replace(report, seconds=time.perf_counter() - began)
            with folder_written_whole(output, size) as folder:
                files = Files(folder, new, plan.parts)
                stream(summing, files.parts, files, self.progress)
                report = replace(report, seconds=time.perf_counter() - began)
                write_companions(folder, new, deltas, plan, report, dtype=self.dtype, tokenizer=self.tokenizer)
            return report

    def _judge(self, new: Checkpoint, deltas: Sequence[Delta], plan: Plan) -> tuple[list[Likeness], list[str]]:
        """How alike the models are, and what speaks against the sum. Raises ValueError with it unless forced."""
        found, against = [], []
        read = [delta for delta in deltas if delta.alpha != 0]
        pairs = [(delta.base, new) for delta in read] + [(delta.post, delta.base) for delta in read]
        for first, second in {(first.name, second.name): (first, second) for first, second in pairs}.values():
            grave, light = config_differences(first, second)
            against += grave
            plan.notes += [f"settings are the new base's: {words}" for words in light]
            found.append(likeness(first, second, plan.summed))
            if (words := remark(found[-1])) is not None:
                plan.notes.append(words)
            if (reason := refusal(found[-1])) is not None:
                against.append(reason)
        against += plan.against
        if against and not self.force:
            raise ValueError(". ".join(against) + ". Check the models; --force goes on, and the record says so")
        return found, against

    def _compute_dtype(self, new: Checkpoint, deltas: Sequence[Delta]) -> torch.dtype:
        everyone = [new, *(model for delta in deltas for model in (delta.post, delta.base))]
        wide = any(stored.dtype == torch.float64 for model in everyone for stored in model.tensors.values())
        return torch.float64 if wide or "float64" in (self.precision, self.dtype) else torch.float32

    def _settings(self, new: Checkpoint, deltas: Sequence[Delta]) -> dict[str, Any]:
        return {
            "base_new": new.name,
            "deltas": [{"post": d.post.name, "base": d.base.name, "alpha": d.alpha} for d in deltas],
            "dtype": self.dtype,
            "precision": self.precision,
            "rounding": self.rounding,
            "seed": self.seed,
            "include": list(self.include),
            "exclude": list(self.exclude),
            "on_mismatch": self.on_mismatch,
            "tokenizer": self.tokenizer,
        }
