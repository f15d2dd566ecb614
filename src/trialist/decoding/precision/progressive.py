"""Progressive mixed precision: the prompt is read at one precision, and the text is written at fewer and fewer bits.

Nested weights (`trialist apply quantize`) are read anew at every step, and for one sequence a step takes about as long as reading
them does: fewer bits, less time. Keys and values stay as they were written; a switch changes those of later tokens only. Source:
PMPD, arXiv 2410.13461.

What switches is the loop's own progress: processors are called once for every token that is chosen, so a prompt that is read in
chunks, rows that guidance stacks, and forward passes within a step cannot be taken for steps.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor
from transformers import GenerationMixin, LogitsProcessorList, StoppingCriteriaList
from transformers.generation import GenerationMode

from trialist.decoding.options import Slot, around_loop
from trialist.decoding.precision.schedules import PrecisionSchedule, PromptPass
from trialist.models.nested.precision import available_bits, precision, precision_dials

# R rows of the loop, N sequences that come out, P columns of prompts, T generated tokens

ASSISTED = ("assistant_model", "prompt_lookup_num_tokens", "assistant_early_exit")
CACHES = ("past_key_values", "cache_params")


@dataclass(frozen=True)
class ProgressivePrecision:
    """Generates with the precision of nested weights that a schedule says, step by step; afterwards the model is read as before.

    prefill_bits: at which the prompt is read, and the first token therefore chosen; None is the highest of the schedule.

    A step reads the weights once for all rows of a batch, so it runs at the largest number of bits that a row asks for which has
    not ended. With `return_dict_in_generate` the output has `bits` (N, T), at which each generated token was chosen, the
    first one by the pass over the prompt, 0 behind the end of a sequence; and `average_bits` (N,), their means over generated
    tokens.

    Neutral where nothing but the present precision of the model is asked for. Raises ValueError in `prepare` for a model that is
    not nested, with the command that makes one; for bits that it does not have; for assisted decoding and for generation
    without a cache.
    """

    schedule: PrecisionSchedule
    prefill_bits: int | None = None

    slot: ClassVar[Slot] = "weights"

    @property
    def prefill(self) -> int:
        return max(self.schedule.precisions) if self.prefill_bits is None else self.prefill_bits

    @property
    def precisions(self) -> tuple[int, ...]:
        """All that it may run at, descending."""
        return tuple(sorted({self.prefill, *self.schedule.precisions}, reverse=True))

    def prepare(self, model: GenerationMixin, generate_kwargs: Mapping[str, Any]) -> dict[str, Any]:
        check_precisions(model, self.precisions)
        if {dial.bits for dial in precision_dials(model)} == set(self.precisions):  # type: ignore[arg-type]
            return dict(generate_kwargs)
        config = generate_kwargs.get("generation_config")
        if any(generate_kwargs.get(name) is not None or getattr(config, name, None) is not None for name in ASSISTED):
            raise ValueError(
                "assisted decoding checks several drafted tokens in one pass, at one precision, and takes some back, so steps "
                "of a schedule cannot be counted; leave out the assistant, or the schedule"
            )
        uses_cache = generate_kwargs.get("use_cache")
        if uses_cache is False or (uses_cache is None and getattr(config, "use_cache", None) is False):
            raise ValueError(
                "without a cache every step computes the whole text anew, at its own precision, and nothing stays as it was "
                "written; leave out use_cache=False"
            )
        return around_loop(generate_kwargs, self._around)

    def _around(
        self, loop: Any, model: Any, input_ids: Tensor, *, logits_processor: Any, stopping_criteria: Any, generation_config: Any,
        **kwargs: Any,
    ) -> Any:  # fmt: skip
        if generation_config.get_generation_mode(None) == GenerationMode.ASSISTED_GENERATION:
            raise ValueError(
                "the model's generation_config asks for assisted decoding, which takes no schedule of precisions"
            )
        call = _Call(self, model, input_ids, kwargs)
        with precision(model, self.prefill):
            result = loop(
                model,
                input_ids,
                logits_processor=LogitsProcessorList([call.token_chosen, *logits_processor]),
                stopping_criteria=_Watched(stopping_criteria, call),
                generation_config=generation_config,
                **kwargs,
            )
        return call.reported(result)


def check_precisions(model: Any, precisions: tuple[int, ...]) -> None:
    """Raises ValueError for a model that is not nested, and for bits that it does not have."""
    available = available_bits(model)
    missing = [bits for bits in precisions if bits not in available]
    if missing:
        raise ValueError(
            f"the schedule asks for {', '.join(map(str, missing))} bits, and the weights can be read at "
            f"{', '.join(map(str, available))}"
        )


class _Call:
    """One call of `generate`: how far it is, at what precision each token was chosen, and which rows have ended."""

    def __init__(self, option: ProgressivePrecision, model: Any, input_ids: Tensor, kwargs: Mapping[str, Any]) -> None:
        self.schedule, self.dials = option.schedule, precision_dials(model)
        self.rows, self.begin = input_ids.shape
        self.present = option.prefill
        self.bits: list[int] = []
        mask = kwargs.get("attention_mask")
        self.mask = torch.ones_like(input_ids) if mask is None or mask.dim() != 2 else mask
        self.cache = next((kwargs[name] for name in CACHES if kwargs.get(name) is not None), None)
        self.state: Any = None
        self.ends = torch.full((self.rows,), -1)
        """Tokens that a row has where it ended; -1 before"""

    def token_chosen(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """A logits processor that changes nothing: (R, V) -> (R, V)."""
        done = input_ids.shape[1] - self.begin
        if done != len(self.bits):
            raise ValueError(
                f"the loop of generation went from {len(self.bits)} tokens to {done}, and a schedule of precisions follows loops "
                "that choose one token after the other"
            )
        if done == 0:
            lengths = tuple(self.mask.sum(1).tolist())
            self.state = self.schedule.start(PromptPass(lengths, self.mask, self.cache))
        self.bits.append(self.present)
        asked = self.schedule.next(self.state, done, scores if self.schedule.reads_logits else None)
        if len(set(asked)) > 1:  # else nothing has to be known of the rows
            asked = [bits for bits, end in zip(asked, self.ends.tolist()) if end < 0] or asked
        self.present = max(asked)
        for dial in self.dials:
            dial.set(self.present)
        return scores

    def note_ends(self, ended: Tensor, tokens: int) -> None:
        """ended: bool (R,). Of beams, which are more, the output tells."""
        if ended.shape == self.ends.shape:
            self.ends = self.ends.to(ended.device)
            self.ends = torch.where((self.ends < 0) & ended, tokens - self.begin, self.ends)

    def reported(self, result: Any) -> Any:
        if isinstance(result, Tensor) or not hasattr(result, "sequences"):
            return result
        N, T = result.sequences.shape[0], result.sequences.shape[1] - self.begin
        lengths = torch.full((N,), T)
        beams = getattr(result, "beam_indices", None)
        if beams is not None:
            lengths = (beams >= 0).sum(1).cpu()
        elif self.rows == N:
            lengths = torch.where(self.ends < 0, T, self.ends).cpu()
        bits = torch.tensor(self.bits[:T] + [0] * max(0, T - len(self.bits))).repeat(N, 1)
        bits = bits.masked_fill(torch.arange(T) >= lengths[:, None], 0)
        result["bits"] = bits
        result["average_bits"] = bits.sum(1) / (bits > 0).sum(1)
        return result


class _Watched(StoppingCriteriaList):
    """The criteria of a loop, which also tell a call which rows have ended."""

    def __init__(self, criteria: Any, call: _Call) -> None:
        super().__init__(criteria)
        self.call = call

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Any:
        ended = super().__call__(input_ids, scores, **kwargs)
        self.call.note_ends(ended, input_ids.shape[1])
        return ended


def average_bits(schedule: Any, tokens: int, prefill_bits: int) -> float:
    """Mean over `tokens` generated tokens under a fixed schedule, as `ProgressivePrecision` reports it; at least one."""
    if tokens < 1:
        raise ValueError(f"tokens={tokens}: at least 1")
    return math.fsum([prefill_bits, *schedule.over(tokens - 1)]) / tokens
