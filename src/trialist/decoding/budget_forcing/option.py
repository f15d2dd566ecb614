"""Budget forcing: a minimum and a maximum of thinking, within one call of `generate` (s1, arXiv 2501.19393).

At the maximum the thinking segment is closed for the model, so that it answers. Where the model would close it itself, the end
is put off: a string such as "Wait" is written instead, and the model goes on. All that is written is tokens of the same
sequence, so nothing is read a second time.

The budget counts tokens of thought: strings written in place of an end are among them, delimiters and what is written with them
are not. Departures from the official code: the budget is one for all rounds of thinking (there each round has all of it), what is
cut is cut in text and tokens alike, and a string is not begun where the budget has no room for all of it and a token behind it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor
from transformers import GenerationMixin, LogitsProcessorList
from transformers.generation.configuration_utils import GenerationMode
from transformers.utils import ModelOutput

from trialist.decoding.budget_forcing.processor import FinishedRows, Forcing, Unforced
from trialist.decoding.budget_forcing.state import Delimiter, Pieces, Rules, Thinking, encode_inside
from trialist.decoding.options import Slot, around_loop

__all__ = ["RECIPE", "BudgetForcing", "Thinking"]

RECIPE = str(Path(__file__).parent / "recipe")
"""For `model.generate(..., custom_generate=RECIPE, trust_remote_code=True, tokenizer=..., num_ignore=...)`, which takes the
fields of `BudgetForcing` as arguments"""

ANSWER = 100
"""Tokens that a maximum of "auto" leaves to an answer without a limit of its own, as in the official code"""
MODES = {
    GenerationMode.GREEDY_SEARCH: "greedy search",
    GenerationMode.SAMPLE: "sampling",
    GenerationMode.BEAM_SEARCH: "beams",
}


@dataclass(frozen=True)
class BudgetForcing:
    """A minimum and a maximum of thinking tokens, for every row by itself.

    Where `generate` returns a ModelOutput (`return_dict_in_generate=True`), it gets a field `thinking`: a `Thinking` for each
    sequence. An end of the sequence within the segment is taken for an end of the segment. Under sampling an end is put off or
    accepted exactly as often as sampling would draw it; among beams it is looked at where it is the most probable next token of
    a hypothesis, and what is forced costs no hypothesis anything.

    Raises ValueError for delimiters that are no tokens, for limits that contradict each other, the length of the generation or
    the model's context, and for assisted decoding and sampling among beams, whose draws are not of one sequence.
    """

    tokenizer: Any
    """That of the model"""
    end_think: str = "</think>"
    """What closes the thinking segment. A delimiter that begins with an added token of the tokenizer is put off whole; of
    another one, what the model has written of it when its last token is put off stays in the trace"""
    start_think: str | None = "<think>"
    """What opens it, in the prompt or by the model; None: thinking begins with the first new token"""
    max_thinking_tokens: int | Literal["auto"] | None = None
    """Most tokens of thought, at least 1; None is no maximum, "auto" all that the length of the generation leaves"""
    min_thinking_tokens: int = 0
    """Tokens of thought before which the segment does not end, also where no end may be put off any more"""
    num_ignore: int = 0
    """Ends that are put off; 0 accepts the first one"""
    ignore_text: str = "Wait"
    """Written in place of an end that is put off; "" writes nothing, the model takes its next best token"""
    final_prefix: str = "\nFinal Answer:"
    """Written behind the delimiter where the end is forced, so that the model answers at once"""
    separator: str = "\n"
    """Written before the delimiter where the end is forced, unless the trace ends with it"""
    max_answer_tokens: int | None = None
    """Most tokens of the answer, at least 1; the sequence then ends. None is no maximum"""

    slot: ClassVar[Slot] = "logits.last"

    def __post_init__(self) -> None:
        for name in ("max_thinking_tokens", "max_answer_tokens"):
            value = getattr(self, name)
            if value is not None and value != "auto" and value < 1:
                raise ValueError(f"{name} must be at least 1, not {value}; None is no maximum")
        for name in ("min_thinking_tokens", "num_ignore"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must be at least 0, not {getattr(self, name)}")
        if isinstance(self.max_thinking_tokens, int) and self.min_thinking_tokens > self.max_thinking_tokens:
            raise ValueError(
                f"min_thinking_tokens={self.min_thinking_tokens} is more than max_thinking_tokens="
                f"{self.max_thinking_tokens}; lower the one or raise the other"
            )

    @property
    def neutral(self) -> bool:
        """Whether nothing is ever forced: then this is plain generation."""
        limits = (self.max_thinking_tokens, self.max_answer_tokens)
        return limits == (None, None) and not self.num_ignore and not self.min_thinking_tokens

    def prepare(self, model: GenerationMixin, generate_kwargs: Mapping[str, Any]) -> dict[str, Any]:
        if self.neutral:
            return dict(generate_kwargs)
        if getattr(model.config, "is_encoder_decoder", False):
            raise ValueError("budget forcing acts on continuations of a prompt; an encoder-decoder model has none")
        for name in ("assistant_model", "prompt_lookup_num_tokens"):
            if generate_kwargs.get(name) is not None:
                raise ValueError(
                    f"budget forcing decides after every token, and {name} drafts several at once; leave one of them out"
                )
        prepared = dict(generate_kwargs)
        if self.max_answer_tokens is not None and isinstance(self.max_thinking_tokens, int):
            config = prepared.get("generation_config") or getattr(model, "generation_config", None)
            given = ("max_new_tokens", "max_length")
            if not any(prepared.get(name) or getattr(config, name, None) for name in given):
                forced = max(map(len, self._forced()[:2]))
                prepared["max_new_tokens"] = self.max_thinking_tokens + forced + self.max_answer_tokens + 1
        return around_loop(prepared, self._around)

    def rules(self, eos: frozenset[int]) -> tuple[Rules, Pieces]:
        """The limits as tokens. eos: tokens that end a sequence."""
        pieces = Pieces(self.tokenizer)
        end = Delimiter(self.tokenizer, self.end_think, "end_think", pieces)
        start = None
        if self.start_think is not None:
            start = Delimiter(self.tokenizer, self.start_think, "start_think", pieces)
        if clash := eos & {*end.ids, *(start.ids if start else ())}:
            name = self.tokenizer.decode(sorted(clash))
            raise ValueError(
                f"the delimiters hold {name!r}, which ends a sequence of this model; choose other delimiters"
            )
        if self.max_answer_tokens is not None and not eos:
            raise ValueError(
                "max_answer_tokens ends a sequence, and generation has no eos_token_id; give one, or leave it to max_new_tokens"
            )
        never = end.ids, end.ids, ()
        closed, open_, prefix = never if self.max_thinking_tokens is None else self._forced()
        ignore = encode_inside(self.tokenizer, self.ignore_text, "ignore_text") if self.ignore_text else ()
        found = Rules(
            start=start, end=end, ignore=ignore if self.num_ignore else (), forced=(closed, open_), separator=self.separator,
            prefix=prefix, last_text=self._text_of, eos=eos, stop=min(eos, default=None),
            maximum=self.max_thinking_tokens if isinstance(self.max_thinking_tokens, int) else None,
            minimum=self.min_thinking_tokens, num_ignore=self.num_ignore, max_answer=self.max_answer_tokens,
        )  # fmt: skip
        return found, pieces

    def _forced(self) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]:
        """What a forced end writes behind a separator, without one, and behind the delimiter alone."""
        closing = self.end_think + self.final_prefix
        closed = encode_inside(self.tokenizer, closing, "end_think and final_prefix")
        open_ = encode_inside(self.tokenizer, self.separator + closing, "separator, end_think and final_prefix")
        prefix = encode_inside(self.tokenizer, self.final_prefix, "final_prefix") if self.final_prefix else ()
        return closed, open_, prefix

    def _text_of(self, token: int) -> str:
        return self.tokenizer.decode([token], skip_special_tokens=False, clean_up_tokenization_spaces=False)

    def _around(
        self, loop: Any, model: Any, input_ids: Tensor, *, logits_processor: Any, stopping_criteria: Any,
        generation_config: Any, **kwargs: Any,
    ) -> Any:  # fmt: skip
        mode = generation_config.get_generation_mode()
        if mode not in MODES:
            raise ValueError(
                f"budget forcing works with {', '.join(MODES.values())}; {str(mode.value).replace('_', ' ')} does not draw the "
                "tokens of one sequence one by one"
            )
        eos = getattr(generation_config, "_eos_token_tensor", None)
        eos_ids = frozenset(eos.flatten().tolist()) if eos is not None else frozenset()
        rules, pieces = self.rules(eos_ids)
        rules = dataclasses.replace(rules, maximum=self._maximum(model, input_ids.shape[1], generation_config))
        beams = generation_config.num_beams if mode == GenerationMode.BEAM_SEARCH else 1
        unforced, finished = Unforced(), None
        if beams == 1:
            stopping_criteria = finished = FinishedRows(stopping_criteria)
        forcing = Forcing(
            rules, pieces, input_ids, self._prompts(input_ids, kwargs.get("attention_mask")),
            do_sample=mode == GenerationMode.SAMPLE, num_beams=beams, unforced=unforced, finished=finished,
        )  # fmt: skip
        result = loop(
            model, input_ids, logits_processor=LogitsProcessorList([unforced, *logits_processor, forcing]),
            stopping_criteria=stopping_criteria, generation_config=generation_config, **kwargs,
        )  # fmt: skip
        if isinstance(result, ModelOutput):
            result.thinking = forcing.reports(result.sequences)  # type: ignore[attr-defined]
        return result

    def _prompts(self, input_ids: Tensor, mask: Tensor | None) -> list[str]:
        """The prompts as texts, without what pads them; empty where no delimiter can open a segment in them."""
        if self.start_think is None:
            return [""] * len(input_ids)
        if mask is None or mask.shape != input_ids.shape:
            mask = torch.ones_like(input_ids)
        rows = [row[kept.bool()].tolist() for row, kept in zip(input_ids, mask, strict=True)]
        return self.tokenizer.batch_decode(rows, skip_special_tokens=False, clean_up_tokenization_spaces=False)

    def _maximum(self, model: Any, prompt: int, config: Any) -> int | None:
        """The maximum, once it is sure that an answer still fits behind it."""
        if self.max_thinking_tokens is None:
            return None
        forced = max(map(len, self._forced()[:2]))
        room = config.max_length - prompt - forced
        what = f"max_new_tokens={config.max_length - prompt}"
        context = getattr(model.config.get_text_config(), "max_position_embeddings", None)
        if context is not None and context < config.max_length:
            # the model's last token needs no place of its own
            room, what = (
                context + 1 - prompt - forced,
                f"the model's context of {context} tokens behind a prompt of {prompt}",
            )
        answer = self.max_answer_tokens if self.max_answer_tokens is not None else 1
        if self.max_thinking_tokens == "auto":
            found = room - (self.max_answer_tokens or ANSWER)
            if found < max(1, self.min_thinking_tokens):
                raise ValueError(
                    f"{what} leaves {max(found, 0)} tokens to thinking, with {self.max_answer_tokens or ANSWER} for the "
                    "answer; give more, a shorter prompt, or a lower max_answer_tokens"
                )
            return found
        if room < self.max_thinking_tokens + answer:
            raise ValueError(
                f"{what} ends before the answer: max_thinking_tokens={self.max_thinking_tokens}, {forced} tokens of delimiter "
                f"and {answer} of answer do not fit; give more, a shorter prompt, or a lower budget"
            )
        return self.max_thinking_tokens
