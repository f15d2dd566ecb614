"""Every registered technique, alone and with every other one, through the flags that users have.

A technique that registers in FLAGS needs one line in EXAMPLES: values of its flags that change what a tiny model says.
"""

from __future__ import annotations

import copy
import functools
import itertools
from typing import Any

import pytest
import torch

from trialist.decoding.flags import FLAGS
from trialist.decoding.prompts import chat_prompt, left_padded, text_prompt
from trialist.decoding.running import Batch, run
from trialist.decoding.settings import Settings, neutral

from .conftest import CHAT_TEMPLATE

EXAMPLES: dict[str, dict[str, Any]] = {
    "budget-forcing": {"think_budget": 5, "think_end": "ab"},
    "compact-cache": {"key_keep": 0.5, "key_recent": 2, "value_bits": 4, "cache_budget": 20, "cache_policy": "recency"},
    "guidance": {"principle": ("Be kind.",), "guidance": 2.0},
    "precision": {"bits": 2},
    "progressive-precision": {"bits_schedule": "4@0,2@3"},
}
"""Technique -> values of its flags at which it does something"""
REFUSED: dict[tuple[str, str], str] = {
    ("precision", "progressive-precision"): "both decide the precision of the weights",
}
"""Pairs that cannot be combined -> words of the error that says why"""
TEXTS = ("Once upon a time there was", "Why?", "Name a fruit.")
PAIRS = list(itertools.combinations(sorted(FLAGS), 2))
STEPS = 28
SAMPLING = {"max_new_tokens": STEPS}


@pytest.fixture(scope="module")
def model(byte_model) -> Any:
    """A tiny model that also is what a technique asks for: nested weights."""
    from trialist.models.nested.quantizer import NestedQuantConfig
    from trialist.weights.nested import quantize_nested

    found = copy.deepcopy(byte_model)
    config = NestedQuantConfig(seed_bits=2, parent_bits=4, sensitivity="none")
    quantize_nested(found, config)
    return found


@pytest.fixture(scope="module")
def prompts(chat_tokenizer) -> Any:
    """Conversations of unequal lengths."""
    assert chat_tokenizer.chat_template == CHAT_TEMPLATE
    return [chat_prompt(chat_tokenizer, [{"role": "user", "content": text}]) for text in TEXTS]


def example(*techniques: str, **sampling: Any) -> Settings:
    missing = [technique for technique in techniques if technique not in EXAMPLES]
    if missing:
        pytest.fail(
            f"the technique {missing[0]!r} is registered in FLAGS but has no values in EXAMPLES of this file; add some"
        )
    values = functools.reduce(lambda one, other: one | other, (EXAMPLES[name] for name in techniques), {})
    return neutral().replace({**SAMPLING, **sampling, **values})


def tokens(batch: Batch) -> list[list[int]]:
    return [row.tokens for row in batch.rows]


def plain(model: Any, prompts: Any, **arguments: Any) -> list[list[int]]:
    """What `generate` of the model itself gives, up to the end token."""
    inputs = left_padded(prompts, model.config.pad_token_id, model.device)
    found = model.generate(**inputs, max_new_tokens=STEPS, **arguments)[:, inputs["input_ids"].shape[1] :].tolist()
    end = model.config.eos_token_id
    return [row[: row.index(end) + 1] if end in row else row for row in found]


def test_every_technique_has_example_values():
    for technique in FLAGS:
        example(technique)
    assert EXAMPLES.keys() <= FLAGS.keys(), "EXAMPLES has techniques that are not registered"


@pytest.mark.parametrize("sampling", [{}, {"temperature": 0.8, "seed": 7}, {"num_beams": 2}], ids=str)
@pytest.mark.parametrize("kind", ["chat", "text"])
def test_neutral_flags_are_plain_generate_token_for_token(model, prompts, chat_tokenizer, sampling, kind):
    if kind == "text":
        prompts = [text_prompt(chat_tokenizer, text) for text in TEXTS]
    found = tokens(run(model, chat_tokenizer, neutral().replace({**SAMPLING, **sampling}), prompts))
    arguments = {"do_sample": "temperature" in sampling, "temperature": sampling.get("temperature", 1.0)}
    torch.manual_seed(sampling.get("seed", 0))
    assert found == plain(model, prompts, **arguments, num_beams=sampling.get("num_beams", 1))


@pytest.mark.parametrize("technique", sorted(FLAGS))
def test_a_technique_does_something_and_leaves_the_model_as_it_was(model, prompts, chat_tokenizer, technique):
    before = plain(model, prompts, do_sample=False)
    changed = run(model, chat_tokenizer, example(technique), prompts)
    untouched = run(model, chat_tokenizer, neutral().replace(SAMPLING), prompts)
    assert tokens(changed) != before, f"the values of {technique!r} in EXAMPLES change nothing"
    assert tokens(untouched) == before == plain(model, prompts, do_sample=False)


@pytest.mark.parametrize(("one", "other"), PAIRS, ids=["+".join(pair) for pair in PAIRS])
def test_two_techniques_act_together_on_every_row_as_on_it_alone(model, prompts, chat_tokenizer, one, other):
    settings = example(one, other)
    if (one, other) in REFUSED:
        with pytest.raises(ValueError, match=REFUSED[one, other]):
            run(model, chat_tokenizer, settings, prompts)
        return
    assert len(settings.options(model, chat_tokenizer, [prompt.content for prompt in prompts])) >= 2
    before = plain(model, prompts, do_sample=False)
    together = run(model, chat_tokenizer, settings, prompts)
    alone = [run(model, chat_tokenizer, settings, [prompt]) for prompt in prompts]
    assert tokens(together) == [tokens(batch)[0] for batch in alone]
    assert plain(model, prompts, do_sample=False) == before
    backwards = Settings(settings.sampling, dict(reversed(settings.flags.items())))
    assert tokens(run(model, chat_tokenizer, backwards, prompts)) == tokens(together)
    singles = [tokens(run(model, chat_tokenizer, example(name), prompts)) for name in (one, other)]
    assert tokens(together) not in singles  # neither is without effect beside the other


@pytest.mark.parametrize(("one", "other"), PAIRS, ids=["+".join(pair) for pair in PAIRS])
@pytest.mark.parametrize("sampling", [{"temperature": 0.9, "num_sequences": 2, "seed": 3}, {"num_beams": 2}], ids=str)
def test_two_techniques_act_together_when_sampling_and_in_beams(model, prompts, chat_tokenizer, one, other, sampling):
    if (one, other) in REFUSED:
        pytest.skip(f"{one} and {other} cannot be combined: {REFUSED[one, other]}")
    settings = example(one, other, **sampling)
    first, second = (run(model, chat_tokenizer, settings, prompts) for _ in range(2))
    assert tokens(first) == tokens(second)
    assert len(first.rows) == 3 * settings.sampling.num_sequences
    assert all(0 < len(row.tokens) <= STEPS for row in first.rows)


def test_all_techniques_at_once(model, prompts, chat_tokenizer):
    left_out = {one for one, _ in REFUSED}
    techniques = [technique for technique in sorted(FLAGS) if technique not in left_out]
    settings = example(*techniques)
    together = run(model, chat_tokenizer, settings, prompts)
    assert settings.asked().keys() >= set().union(*(EXAMPLES[technique] for technique in techniques))
    alone = [run(model, chat_tokenizer, settings, [prompt]) for prompt in prompts]
    assert tokens(together) == [tokens(batch)[0] for batch in alone]
