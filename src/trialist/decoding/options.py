"""Generation options: what changes how a model that the user already has generates, through its own `generate`.

An option is a frozen dataclass. It turns the arguments of `generate` into others (a cache, a loop around the model's own, a
logits processor), so `model.generate(**option.prepare(model, inputs))` is all that it needs, and at its neutral setting it
returns them as they are. Options compose; `generate(model, options, **inputs)` checks that no two of them own the same thing.
"""

from __future__ import annotations

import copy
import functools
import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, Literal, Protocol

from torch import Tensor
from transformers import GenerationMixin, StoppingCriteriaList, StopStringCriteria
from transformers.generation.utils import GENERATION_MODES_MAPPING

Slot = Literal["cache.keys", "cache.values", "cache.eviction", "weights", "loop", "logits.last", "logits"]
ORDER: tuple[Slot, ...] = ("loop", "weights", "cache.keys", "cache.values", "cache.eviction", "logits.last", "logits")
"""In which options are prepared, whatever the order in which they are given: each runs around those before it, so the cache
stands before a loop of its own begins"""
SHARED: tuple[Slot, ...] = ("logits",)
"""Slots that take more than one option"""

Loop = Callable[..., Any]
"""`loop(model, input_ids, logits_processor=, stopping_criteria=, generation_config=, **model_kwargs)`, as `generate` calls it"""
Around = Callable[..., Any]
"""`around(loop, model, input_ids, **kwargs)`: runs `loop(model, input_ids, **kwargs)`, with more before, after or around it"""

WITHHELD = ("streamer", "assistant_model", "assistant_tokenizer", "tokenizer", "synced_gpus")
"""Arguments that `generate` gives to its own loops only"""


class GenerationOption(Protocol):
    """What one technique does to `generate`."""

    slot: ClassVar[Slot]
    """What it owns"""

    def prepare(self, model: GenerationMixin, generate_kwargs: Mapping[str, Any]) -> dict[str, Any]:
        """Other arguments of `generate`. The model is as before when `generate` returns.

        generate_kwargs: all that `generate` is going to be called with, `input_ids` `(B, T)` by name.
        Raises ValueError for a model, or for arguments, that the option cannot serve.
        """


def prepare(
    model: GenerationMixin, options: Sequence[GenerationOption], generate_kwargs: Mapping[str, Any]
) -> dict[str, Any]:
    """Arguments of `generate` under all `options`. Raises ValueError where two of them own the same slot."""
    owners: dict[Slot, str] = {}
    for option in options:
        name = type(option).__name__
        if option.slot in owners and option.slot not in SHARED:
            raise ValueError(
                f"{owners[option.slot]} and {name} both decide {WORDS[option.slot]}; one at a time can: leave one out"
            )
        owners[option.slot] = name
    if options and isinstance(generate_kwargs.get("custom_generate"), str):
        raise ValueError(
            f"custom_generate={generate_kwargs['custom_generate']!r} is a recipe of its own, within which options such as "
            f"{', '.join(owners.values())} have no effect; leave it out, or give a function"
        )
    prepared = dict(generate_kwargs)
    for option in sorted(options, key=lambda option: ORDER.index(option.slot)):
        prepared = option.prepare(model, prepared)
    return prepared


WORDS: dict[Slot, str] = {
    "cache.keys": "which channels of the keys are kept",
    "cache.values": "how values are stored",
    "cache.eviction": "which tokens stay in the cache",
    "weights": "the precision of the weights",
    "loop": "how the loop of generation runs",
    "logits.last": "last which token comes next",
    "logits": "the logits",
}


def generate(
    model: GenerationMixin,
    options: Sequence[GenerationOption] = (),
    inputs: Tensor | None = None,
    **generate_kwargs: Any,
) -> Any:
    """`model.generate(inputs, **generate_kwargs)` under `options`: prompt and continuation `(B, T)`, or the output that
    `return_dict_in_generate` asks for, to which options may add fields."""
    if inputs is not None:
        generate_kwargs["input_ids"] = inputs
    return model.generate(**prepare(model, options, generate_kwargs))  # type: ignore[arg-type]


def around_loop(generate_kwargs: Mapping[str, Any], around: Around) -> dict[str, Any]:
    """Arguments of `generate` with which `around` runs the loop that they ran before: the model's own, or another `around`.

    All that the loop needs is there when it starts: processors, also those of sampling; stopping criteria; the cache; inputs
    expanded for beams and for several sequences a prompt.
    """
    prepared = _with_stop_strings(generate_kwargs)
    inner: Loop | None = prepared.get("custom_generate")
    if inner is None:
        withheld = {name: prepared[name] for name in WITHHELD if prepared.get(name) is not None}
        inner = functools.partial(_own_loop, withheld)
    loop = inner

    # `generate` reads the names of these arguments, and gives the tensor to loops that name it
    def run(model: Any, input_ids: Tensor, inputs_tensor: Tensor | None = None, **kwargs: Any) -> Any:
        return around(loop, model, input_ids, inputs_tensor=inputs_tensor, **kwargs)

    return {**prepared, "custom_generate": run}


def _own_loop(withheld: Mapping[str, Any], model: Any, input_ids: Tensor, **kwargs: Any) -> Any:
    """The loop that `generate` would have run: sampling and greedy search, beams, or assisted decoding."""
    mode = kwargs["generation_config"].get_generation_mode(withheld.get("assistant_model"))
    name = GENERATION_MODES_MAPPING[mode]
    if "/" in name:
        raise ValueError(
            f"{mode.value.replace('_', ' ')} is a recipe outside of transformers and cannot be combined with options; "
            "use greedy search, sampling, beams or an assistant"
        )
    loop = getattr(type(model), name)
    names = inspect.signature(loop).parameters
    known = {argument: value for argument, value in withheld.items() if argument in names}
    if "inputs_tensor" not in names:
        kwargs.pop("inputs_tensor", None)
    return loop(model, input_ids, **known, **kwargs)


def _with_stop_strings(generate_kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments with stop strings as the criterion that `generate` makes of them: it loses the tokenizer that it needs for
    this when the loop is not its own."""
    prepared, tokenizer = dict(generate_kwargs), generate_kwargs.get("tokenizer")
    config = prepared.get("generation_config")
    strings = prepared.get("stop_strings") or getattr(config, "stop_strings", None)
    if not strings or tokenizer is None:
        return prepared
    prepared.pop("stop_strings", None)
    if config is not None:
        prepared["generation_config"] = config = copy.deepcopy(config)
        config.stop_strings = None
    own = prepared.get("stopping_criteria") or ()
    prepared["stopping_criteria"] = StoppingCriteriaList([*own, StopStringCriteria(tokenizer, strings)])
    return prepared
