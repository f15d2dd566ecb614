"""Prompts to texts under settings: one batch through `generate`, each row watched as it grows.

A row ends at its own limit, at a stop string within its text, or when nobody waits for it any more, without the others.
"""

from __future__ import annotations

import dataclasses
import secrets
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import LogitsProcessorList, PreTrainedTokenizerBase, StoppingCriteria, StoppingCriteriaList
from transformers.generation import GenerateBeamDecoderOnlyOutput, GenerateDecoderOnlyOutput

from trialist.decoding.detokenizer import Detokenizer, StopStrings
from trialist.decoding.options import around_loop, prepare
from trialist.decoding.prompts import Prompt, left_padded, token_limit
from trialist.decoding.settings import Settings
from trialist.models.eviction.cache import cache_bytes

FinishReason = Literal["stop", "length", "cancelled"]
OUTPUT_FIELDS = {
    entry.name for cls in (GenerateDecoderOnlyOutput, GenerateBeamDecoderOnlyOutput) for entry in dataclasses.fields(cls)
}  # fmt: skip
"""What `generate` itself puts into its output; anything else is of an option"""


@dataclass(frozen=True)
class TokenLogprob:
    """A token with its log-probability (nats) and the most likely ones at its place: as the model gave them, before temperature,
    nucleus and what options change."""

    token: int
    logprob: float
    top: tuple[tuple[int, float], ...]
    start: int = 0
    """Character of the text at which the token's own begins"""


@dataclass
class Continuation:
    """One row as it grows. `tokens` has all that was generated, the end token included, `text` what is certain of it."""

    limit: int
    ends: frozenset[int]
    detokenizer: Detokenizer
    stops: StopStrings
    tell: Callable[[str, list[TokenLogprob]], None] | None = None
    """Is called with each new piece of text, and with the log-probabilities of tokens that start within the text so far"""
    given_up: Callable[[], bool] = lambda: False
    """Whether nobody waits for it any more"""
    tokens: list[int] = field(default_factory=list)
    text: str = ""
    logprobs: list[TokenLogprob] = field(default_factory=list)
    finish: FinishReason | None = None
    report: dict[str, Any] = field(default_factory=dict)
    """What options say about this row"""
    _made: int = 0
    """Characters made so far, also those held back as the possible start of a stop string"""
    _waiting: list[TokenLogprob] = field(default_factory=list)
    """Those whose text is held back"""

    def push(self, token: int, logprob: TokenLogprob | None = None) -> None:
        """Takes the next token, unless the row has ended."""
        if self.finish:
            return
        self.tokens.append(token)
        if token in self.ends:
            self.end("stop")
            return
        if logprob is not None:
            self._waiting.append(dataclasses.replace(logprob, start=self._made))
        text = self.detokenizer.push(token)
        self._made += len(text)
        self._tell(self.stops.push(text))
        if self.stops.found:
            self.finish = "stop"
        elif len(self.tokens) >= self.limit:
            self.end("length")

    def end(self, reason: FinishReason) -> None:
        """Nothing comes any more: gives what was held back."""
        if self.finish:
            return
        self.finish = reason
        rest = self.stops.push(self.detokenizer.flush())
        if self.stops.found:
            self.finish = "stop"
        self._tell(rest + self.stops.flush(), all_tokens=not self.stops.found)

    def _tell(self, text: str, all_tokens: bool = False) -> None:
        self.text += text
        known = [entry for entry in self._waiting if all_tokens or entry.start < len(self.text)]
        self._waiting = self._waiting[len(known) :]
        self.logprobs += known
        if self.tell and (text or known):
            self.tell(text, known)


@dataclass(frozen=True)
class Batch:
    """Rows of all prompts, those of a prompt together; what holds for the batch; times in seconds."""

    rows: list[Continuation]
    report: dict[str, Any]
    seed: int | None
    seconds: float
    seconds_to_first: float | None

    @property
    def tokens(self) -> int:
        return sum(len(row.tokens) for row in self.rows)


class Watch(StoppingCriteria):
    """Hands new tokens to the rows, ends those that are done, and notes log-probabilities where they are asked for.

    searches: beams compete, so that a row is known at the end only.
    """

    def __init__(self, rows: Sequence[Continuation], length: int, top: int | None, searches: bool) -> None:
        self.rows, self.seen, self.top, self.searches = rows, length, top, searches
        self.first: float | None = None
        self._logprobs: Tensor | None = None

    def note(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """A logits processor that changes nothing: (R, V) -> (R, V)."""
        self._logprobs = scores.float().log_softmax(-1)
        return scores

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        self.first = self.first or time.perf_counter()
        if not self.searches:
            self.take(input_ids)
        for row in self.rows:
            if row.given_up():
                row.end("cancelled")
        done = [bool(row.finish) for row in self.rows]
        if self.searches:
            done = [all(done)] * input_ids.shape[0]
        return torch.tensor(done, device=input_ids.device)

    def take(self, sequences: Tensor) -> None:
        """Hands over the tokens (R, T) that were not seen before."""
        new = sequences[:, self.seen :].tolist()
        entries: list[TokenLogprob | None] = [None] * len(new)
        if self.top is not None and self._logprobs is not None and new and len(new[0]) == 1:
            entries = self._entries(torch.tensor(new, device=self._logprobs.device), self.top)
        self.seen, self._logprobs = sequences.shape[1], None
        for row, tokens, entry in zip(self.rows, new, entries, strict=True):
            for token in tokens:
                row.push(token, entry)

    def _entries(self, tokens: Tensor, top: int) -> list[TokenLogprob | None]:
        assert self._logprobs is not None
        chosen = self._logprobs.gather(1, tokens)[:, 0].tolist()
        values, ids = self._logprobs.topk(min(top, self._logprobs.shape[1]), dim=1)
        pairs = [tuple(zip(*columns)) for columns in zip(ids.tolist(), values.tolist())]
        return [TokenLogprob(token, value, most) for (token,), value, most in zip(tokens.tolist(), chosen, pairs)]


def run(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    settings: Settings,
    prompts: Sequence[Prompt],
    *,
    limits: Sequence[int] | None = None,
    stops: Sequence[Sequence[str]] | None = None,
    top_logprobs: int | None = None,
    tell: Callable[[int, str, list[TokenLogprob]], None] | None = None,
    given_up: Callable[[int], bool] | None = None,
) -> Batch:
    """One batch of prompts, left-padded, through the model's own `generate` under all options.

    limits, stops: tokens at most and stop strings, prompt by prompt; without them those of the settings. top_logprobs: how many
    of the most likely tokens are kept beside each; None keeps no log-probabilities. tell(row, text, logprobs): is called as text
    comes; given_up(row): whether the row may end now.
    Raises ValueError for settings that do not fit, or prompts longer than the context.
    """
    sampling, config = settings.sampling, model.generation_config
    if limits is None:
        limits = [token_limit(model, prompt, sampling.max_new_tokens) for prompt in prompts]
    if top_logprobs is not None and sampling.num_beams > 1:
        raise ValueError("log-probabilities of tokens are those of sampling and greedy search; leave out --num-beams")
    own = [config.stop_strings] if isinstance(config.stop_strings, str) else list(config.stop_strings or ())
    all_stops = [(*own, *(stops[at] if stops is not None else sampling.stop)) for at in range(len(prompts))]
    ends = _end_tokens(model, tokenizer)
    pad = next(token for token in (config.pad_token_id, tokenizer.pad_token_id, *sorted(ends), 0) if token is not None)
    inputs = left_padded(prompts, pad, model.device)
    rows = []
    for at in range(len(prompts) * sampling.num_sequences):
        place = at // sampling.num_sequences
        prompt = prompts[place]
        detokenizer = Detokenizer(tokenizer, prompt.token_ids if prompt.continues else ())
        row = Continuation(limits[place], ends, detokenizer, StopStrings(all_stops[place]))
        row.tell = None if tell is None else _bound(tell, at)
        row.given_up = (lambda: False) if given_up is None else _bound(given_up, at)
        rows.append(row)
    watch = Watch(rows, inputs["input_ids"].shape[1], top_logprobs, sampling.num_beams > 1)
    generate_kwargs: dict[str, Any] = {
        **inputs,
        **sampling.arguments(model),
        "max_new_tokens": max(limits),
        "eos_token_id": sorted(ends) or None,
        "pad_token_id": pad,
        "return_dict_in_generate": True,
        "stopping_criteria": StoppingCriteriaList([watch]),
    }
    shared_stops = set(all_stops).pop() if len(set(all_stops)) == 1 else ()
    if own or (
        sampling.num_beams > 1 and shared_stops
    ):  # beams are not watched, so the search itself has to see their stops
        generate_kwargs |= {"stop_strings": list(shared_stops or own), "tokenizer": tokenizer}
    options = settings.options(model, tokenizer, [prompt.content for prompt in prompts])
    prepared = prepare(model, options, generate_kwargs)
    if top_logprobs is not None:
        prepared = around_loop(prepared, _noting(watch))
    seed = None
    if sampling.samples(model):
        seed = secrets.randbits(32) if sampling.seed is None else sampling.seed
        torch.manual_seed(seed)
    started = time.perf_counter()
    output = model.generate(**prepared)
    watch.take(output.sequences)
    for row in rows:
        row.end("length")
    _report(output, rows, inputs["input_ids"].shape[1])
    first = None if watch.first is None else watch.first - started
    cache = getattr(output, "past_key_values", None)
    report = {} if cache is None else {"cache_bytes": cache_bytes(cache)}
    return Batch(rows, report, seed, time.perf_counter() - started, first)


def _bound(function: Callable[..., Any], at: int) -> Callable[..., Any]:
    return lambda *arguments: function(at, *arguments)


def _noting(watch: Watch) -> Callable[..., Any]:
    """A loop around all others, whose processor therefore is the first to see the model's logits."""

    def around(loop: Any, model: Any, input_ids: Tensor, *, logits_processor: Any, **kwargs: Any) -> Any:
        return loop(model, input_ids, logits_processor=LogitsProcessorList([watch.note, *logits_processor]), **kwargs)

    return around


def _end_tokens(model: Any, tokenizer: PreTrainedTokenizerBase) -> frozenset[int]:
    """Tokens that end a continuation, as the model's generation_config says; it may be silent, but the tokenizer knows one."""
    said = model.generation_config.eos_token_id
    if said is None:
        said = tokenizer.eos_token_id
    return frozenset(said if isinstance(said, list | tuple) else () if said is None else (said,))


def _report(output: Any, rows: Sequence[Continuation], length: int) -> None:
    """Gives each row what options added to the output: a number, a record of some, or numbers of its tokens as their average."""
    for name, value in (vars(output) | dict(output)).items():
        if name in OUTPUT_FIELDS:
            continue
        values = value.tolist() if isinstance(value, Tensor) else value
        for at, row in enumerate(rows):
            own = values[at] if isinstance(values, list | tuple) and len(values) == len(rows) else values
            if dataclasses.is_dataclass(own) and not isinstance(own, type):
                row.report |= {
                    f"{name}_{part}": number for part, number in dataclasses.asdict(own).items() if _plain(number)
                }
            elif isinstance(own, list | tuple) and own and all(isinstance(part, int | float) for part in own):
                kept = own[: len(row.tokens)] if len(own) == output.sequences.shape[1] - length else own
                row.report.setdefault(f"average_{name}", sum(kept) / max(len(kept), 1))
            elif _plain(own):
                row.report[name] = own


def _plain(value: Any) -> bool:
    return isinstance(value, bool | int | float | str)
