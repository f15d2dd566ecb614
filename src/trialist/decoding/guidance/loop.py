"""One call of `generate` under guidance: the loop around sees B rows, the model and its cache hold those of every branch.

Hooks on the model turn the inputs of a forward pass into those of all branches, and their logits into the guided ones, so
sampling, beams, processors, streamers and stopping criteria of any loop work as they are.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import threading
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import Cache
from transformers.generation import GenerationMode

from trialist.decoding.guidance.rows import Rows, begun, prompt_rows, refuse_overflow

if TYPE_CHECKING:
    from trialist.decoding.guidance.option import ContrastiveGuidance

CACHES = ("past_key_values", "cache_params")
"""Under which names models take their cache"""
REPLACED = ("input_ids", "attention_mask", "position_ids", "logits_to_keep")


def around_guided(
    option: ContrastiveGuidance,
    contexts: list[list[list[int]]],
    loop: Callable[..., Any],
    model: Any,
    input_ids: Tensor,
    *,
    generation_config: Any,
    **kwargs: Any,
) -> Any:
    """Runs `loop` under guidance; its output without the cache, whose rows are those of all branches.

    contexts: token ids of each context and row before the rows were repeated for beams and several sequences.
    Raises ValueError for settings of generation that do not go with guidance, and for prompts that are too long.
    """
    _refuse(generation_config)
    if (repeats := len(input_ids) // max(1, len(contexts[0]) if contexts else len(input_ids))) > 1:
        contexts = [[row for row in context for _ in range(repeats)] for context in contexts]
    plain = prompt_rows(input_ids, kwargs.get("attention_mask"))
    named = {"the plain prompt": plain} | {f"context {number}": rows for number, rows in enumerate(contexts, start=1)}
    new_tokens = generation_config.max_length - input_ids.shape[1]
    call = _Call(option, model, named, input_ids, new_tokens, generation_config.prefill_chunk_size)
    cache = next((kwargs[name] for name in CACHES if kwargs.get(name) is not None), None)
    if cache is None and kwargs.get("use_cache"):
        raise ValueError(f"{type(model).__name__} keeps its state in a way of its own; pass use_cache=False")
    if cache is None and option.reward == "official":
        raise ValueError(
            "reward='official' is there to compare with the paper's code, which has a cache; leave out use_cache"
        )
    _refuse_cache(cache, call.rows.ids.shape[1] + new_tokens - 1)
    call.cache = cache
    config = copy.copy(generation_config)
    config.prefill_chunk_size, config.disable_compile = (
        None,
        True,
    )  # the call reads in chunks itself; hooks change shapes
    with call.hooked(model), _following(cache, call):
        result = loop(model, input_ids, generation_config=config, **kwargs)
    if not call.acted:
        raise RuntimeError(
            f"no forward pass of {type(model).__name__} was seen with the cache and the rows of this generation, so nothing was "
            "guided: another option gives the loop within a cache of its own"
        )
    if hasattr(result, "past_key_values"):
        result.past_key_values = None
    return result


def _refuse(config: Any) -> None:
    if config.get_generation_mode(None) == GenerationMode.ASSISTED_GENERATION:
        raise ValueError(
            "prompt lookup and early exit draft tokens that are checked in blocks against the model's own distribution, which "
            "guidance replaces; leave them out, or the guidance"
        )
    if config.guidance_scale not in (None, 1):
        raise ValueError(
            f"guidance_scale={config.guidance_scale} is transformers' own guidance; leave it out, or give it as "
            "ContrastiveGuidance.classifier_free(contexts, guidance_scale)"
        )
    if config.output_attentions or config.output_hidden_states:
        raise ValueError(
            "attentions and hidden states of several branches cannot be told apart in the output; leave out output_attentions "
            "and output_hidden_states"
        )
    if config.token_healing:
        raise ValueError("token healing changes the end of the plain prompt only; leave out token_healing")


def _refuse_cache(cache: Cache | None, columns: int) -> None:
    if cache is None:
        return
    if cache.is_initialized:
        raise ValueError(
            "the given cache holds tokens, or was laid out for the rows of the plain prompt; guidance needs a fresh one, which "
            "it fills with the rows of every branch"
        )
    for layer in cache.layers:
        room = getattr(layer, "max_cache_len", None)
        if room is not None and not layer.is_sliding and room < columns:
            raise ValueError(
                f"the static cache has room for {room} tokens and the longest branch needs {columns}; use a dynamic cache, or "
                f"pass past_key_values=StaticCache(config=model.config, max_cache_len={columns})"
            )


@contextlib.contextmanager
def _following(cache: Cache | None, call: _Call) -> Iterator[None]:
    """Lets the cache, told to reorder or select rows of the loop, do so with the rows of every branch."""
    if cache is None:
        yield
        return
    names = ("reorder_cache", "batch_select_indices")
    before = {name: vars(cache)[name] for name in names if name in vars(cache)}
    for name in names:
        setattr(cache, name, functools.partial(call.follow, getattr(cache, name)))
    try:
        yield
    finally:
        for name in names:
            delattr(cache, name)
        vars(cache).update(before)


class _Call:
    """State of one call: the rows of every branch, what the steps before said, and the amateur's cache."""

    def __init__(
        self, option: ContrastiveGuidance, model: Any, named: dict[str, list[list[int]]], input_ids: Tensor,
        new_tokens: int, chunk: int | None,
    ) -> None:  # fmt: skip
        self.option, self.chunk = option, chunk
        self.batch, self.prompt = input_ids.shape
        names = list(named)
        own = names if option.contexts else [names[0]] * 2
        if option.amateur is not None:
            own = own[1:]
        needed = option.needed[-len(own) :]
        self.run = [name for name, used in zip(own, needed, strict=True) if used]
        self.used = needed
        for name in self.run:
            refuse_overflow(named[name], new_tokens, model, name)
        self.rows = Rows([begun(named[name], model, name) for name in self.run], input_ids.device)
        self.amateur, self.amateur_rows, self.amateur_cache = option.amateur, None, None
        if option.amateur is not None and option.needed[0]:
            refuse_overflow(plain := named[names[0]], new_tokens, option.amateur, f"{names[0]} of the amateur")
            self.amateur_rows = Rows([begun(plain, option.amateur, names[0])], option.amateur.device)
        self.cache: Cache | None = None
        self.count, self.acted = 0, False
        self.past: list[Tensor] = []
        self.thread, self.inside = threading.get_ident(), False
        self.inputs: tuple[Tensor, bool] | None = None

    @contextlib.contextmanager
    def hooked(self, model: Any) -> Iterator[None]:
        handles = [
            model.register_forward_pre_hook(self.before, with_kwargs=True),
            model.register_forward_hook(self.after, with_kwargs=True),
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def ours(self, kwargs: dict[str, Any]) -> bool:
        """Whether a forward pass is the loop's, and not one of another thread, of a processor, or of this call itself."""
        if self.inside or threading.get_ident() != self.thread:
            return False
        found = next((kwargs[name] for name in CACHES if kwargs.get(name) is not None), None)
        ids = kwargs.get("input_ids")
        return found is self.cache and ids is not None and len(ids) == self.batch

    def before(self, model: Any, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]] | None:
        if not self.ours(kwargs):
            return None
        for name, value in kwargs.items():
            if isinstance(value, Tensor) and name not in REPLACED:
                raise ValueError(
                    f"the model is given {name}, a tensor for the plain prompt only; guidance cannot take it"
                )
        self.acted = True
        ids = kwargs["input_ids"]
        cached, generated = self.cache is not None and self.count > 0, ids
        if not cached:
            generated = ids[:, self.prompt :]
            self.count = max(self.count, generated.shape[1])
        self.inputs = (generated, cached)
        inputs = self.rows.inputs(generated, self.count, cached=cached)
        if "position_ids" not in kwargs:
            del inputs["position_ids"]
        kwargs = {**kwargs, **inputs}
        if "logits_to_keep" in kwargs:
            kwargs["logits_to_keep"] = self.kept(cached)
        return args, kwargs if cached else self.read(model, kwargs)

    def kept(self, cached: bool) -> int:
        """Positions at the end of which logits are needed; 0 is all."""
        if cached:
            return 1
        if self.option.reward == "official" and self.count == 0:
            return 0
        return min(self.option.steps, self.count + 1)

    def read(self, model: Any, kwargs: dict[str, Any]) -> dict[str, Any]:
        """Reads all chunks of a prompt but the last into the cache; the arguments of the last."""
        length = kwargs["input_ids"].shape[1]
        if self.chunk is None or self.cache is None or length <= self.chunk or self.kept(False) == 0:
            return kwargs
        if hasattr(self.cache, "await_prompt"):  # it cuts what it holds once the prompt is whole
            self.cache.await_prompt(length)
        ends = [*range(self.chunk, length, self.chunk), length]
        for start, end in zip([0, *ends], ends):
            part = {"input_ids": kwargs["input_ids"][:, start:end]}
            if kwargs["attention_mask"] is not None:
                part["attention_mask"] = kwargs["attention_mask"][:, :end]
            if "position_ids" in kwargs:
                part["position_ids"] = kwargs["position_ids"][:, start:end]
            if end < length:
                with self.apart():
                    model(**{**kwargs, **part})
        return {**kwargs, **part}

    @contextlib.contextmanager
    def apart(self) -> Iterator[None]:
        self.inside = True
        try:
            yield
        finally:
            self.inside = False

    def after(self, model: Any, args: tuple, kwargs: dict[str, Any], output: Any) -> Any:
        if self.inside or self.inputs is None or threading.get_ident() != self.thread:
            return None
        (generated, cached), self.inputs = self.inputs, None
        parts = list(output.logits.chunk(len(self.run)))  # (B, t, V) each
        found: list[Tensor | None] = [parts.pop(0) if used else None for used in self.used]
        if self.amateur is not None:
            found.insert(0, self.ask_amateur(generated, cached, output.logits.device))
        output.logits = self.guided(found, cached)[:, None]
        if self.cache is not None:
            self.count += 1
        return output

    def ask_amateur(self, generated: Tensor, cached: bool, device: torch.device) -> Tensor | None:
        if self.amateur is None or self.amateur_rows is None:
            return None
        inputs = self.amateur_rows.inputs(generated, self.count, cached=cached)
        with self.apart():
            output = self.amateur(
                **inputs, past_key_values=self.amateur_cache, use_cache=self.cache is not None, return_dict=True
            )
        if self.cache is not None:
            self.amateur_cache = output.past_key_values
        return output.logits.to(device)

    def guided(self, found: list[Tensor | None], cached: bool) -> Tensor:
        """Scores `(B, V)` from the logits `(B, t, V)` of every branch, whose last positions belong together."""
        option, first = self.option, self.count == 0

        def at(position: int) -> list[Tensor | None]:
            return [None if logits is None else logits[:, position] for logits in found]

        past = self.past
        if self.cache is None:  # the steps before are read again, so nothing needs to follow the beams
            steps = min(option.steps, self.count + 1)
            past = [change for step in range(steps, 1, -1) if (change := option.combine(at(-step))[1]) is not None]
        score, change = option.combine(at(-1), past, first)
        if self.cache is not None and option.steps > 1 and change is not None:
            if option.reward == "official" and first:
                change = option.combine(self.means(found))[1]
                assert change is not None
            self.past = [*self.past, change][-(option.steps - 1) :]
        return score

    def means(self, found: list[Tensor | None]) -> list[Tensor | None]:
        """Logits `(B, V)` of every branch, averaged over the positions of its prompt."""
        masks = list(self.rows.mask.chunk(len(self.run)))
        weights = [masks.pop(0) if used else None for used in self.used]
        if self.amateur is not None:
            weights.insert(0, None if self.amateur_rows is None else self.amateur_rows.mask)
        return [
            None if logits is None or mask is None else (logits * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)
            for logits, mask in zip(found, weights, strict=True)
        ]

    def follow(self, own: Callable[[Tensor], None], indices: Tensor) -> None:
        """Reorders or selects rows: `indices` are those of the loop, `own` does it to the cache."""
        own(self.rows.stacked(indices))
        self.rows.select(indices)
        self.past = [change[indices.to(change.device)] for change in self.past]
        self.batch = len(indices)
        if self.amateur_rows is not None and self.amateur_cache is not None:
            getattr(self.amateur_cache, own.__name__)(indices.to(self.amateur_rows.ids.device))
            self.amateur_rows.select(indices)
