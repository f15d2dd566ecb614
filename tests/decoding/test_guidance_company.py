"""Guidance beside other parts of generation: caches, adapters, recipes, streamers; and what is refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

from trialist.decoding import ContrastiveGuidance, generate
from trialist.decoding.guidance.option import RECIPE
from trialist.models import enable_eviction

from ..models.conftest import GREEDY, VOCABULARY
from .guided import CONTEXTS, NEW, PLAIN, built, log_p, naive, new_tokens, padded


@pytest.fixture(scope="module")
def llama() -> Any:
    return built("llama")


def test_an_option_is_used_again_for_another_prompt(llama):
    option = ContrastiveGuidance.opad([CONTEXTS[:1]])
    first = new_tokens(llama, option, PLAIN[:1])
    new_tokens(llama, option, [[30, 31]])
    assert new_tokens(llama, option, PLAIN[:1]) == first


@pytest.mark.parametrize("chunk", [2, 3, 64])
def test_prompts_read_in_chunks_give_the_same_tokens(llama, chunk):
    option = ContrastiveGuidance.opad([CONTEXTS])
    assert new_tokens(llama, option, PLAIN, prefill_chunk_size=chunk) == new_tokens(llama, option, PLAIN)


def test_a_static_cache_with_room_serves_and_one_without_is_refused(llama):
    option, room = ContrastiveGuidance.opad([CONTEXTS]), max(map(len, CONTEXTS)) + NEW - 1
    cache = transformers.StaticCache(config=llama.config, max_cache_len=room)
    assert new_tokens(llama, option, PLAIN, past_key_values=cache) == new_tokens(llama, option, PLAIN)
    with pytest.raises(ValueError, match=f"room for {room - 2} tokens .* needs {room}"):
        new_tokens(llama, option, PLAIN, cache_implementation="static")


def test_it_stands_beside_eviction_from_the_cache():
    model = enable_eviction(built("llama", factor=2.0), "recency", 6)
    option = ContrastiveGuidance([CONTEXTS])
    found = new_tokens(model, option, PLAIN)
    assert found == new_tokens(model, option, PLAIN, use_cache=False)
    assert found == [
        new_tokens(model, ContrastiveGuidance([[context]]), [plain])[0] for plain, context in zip(PLAIN, CONTEXTS)
    ]


def test_it_goes_through_an_adapter():
    from peft import LoraConfig, get_peft_model

    model = built("llama")
    torch.manual_seed(0)
    wrapped = get_peft_model(model, LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False)).eval()
    found = new_tokens(wrapped, ContrastiveGuidance([CONTEXTS]), PLAIN)
    assert found == [naive(wrapped, plain, context, 1.0, 1) for plain, context in zip(PLAIN, CONTEXTS)]


class Tokens(transformers.generation.BaseStreamer):
    def __init__(self) -> None:
        self.seen: list[int] = []

    def put(self, value: Tensor) -> None:
        self.seen += value.flatten().tolist()

    def end(self) -> None:
        pass


def test_a_streamer_gets_the_plain_prompt_and_the_guided_tokens(llama):
    streamer, option = Tokens(), ContrastiveGuidance([CONTEXTS[:1]])
    found = new_tokens(llama, option, PLAIN[:1], streamer=streamer)
    assert streamer.seen == PLAIN[0] + found[0]


def test_the_recipe_of_transformers_is_the_same(llama):
    inputs = {**padded(PLAIN), **GREEDY}
    found = llama.generate(
        **inputs, custom_generate=RECIPE, trust_remote_code=True, contexts=[CONTEXTS], strength=0.5, reward="two_step"
    )
    assert torch.equal(found, generate(llama, [ContrastiveGuidance.opad([CONTEXTS], 2.0)], **inputs))


def test_texts_are_contexts_with_the_tokenizer_of_generate(llama, character_tokenizer):
    prompt = character_tokenizer("abc def", return_tensors="pt", add_special_tokens=False)
    ids = character_tokenizer("so: abc def", add_special_tokens=False)["input_ids"]
    inputs = {"input_ids": prompt["input_ids"], **GREEDY}
    found = generate(llama, [ContrastiveGuidance([["so: abc def"]])], **inputs, tokenizer=character_tokenizer)
    assert torch.equal(found, generate(llama, [ContrastiveGuidance([[ids]])], **inputs))
    with pytest.raises(ValueError, match="context 1, row 1 is a text: pass tokenizer="):
        generate(llama, [ContrastiveGuidance([["so: abc def"]])], **inputs)


def test_an_empty_context_begins_a_text_where_the_model_has_a_token_for_it(llama):
    found = new_tokens(llama, ContrastiveGuidance([[[]]], weights=[-0.5], strength=0.0), PLAIN[:1])
    tokens: list[int] = []
    for _ in range(NEW):
        tokens.append(int((1.5 * log_p(llama, PLAIN[0] + tokens)[-1] - 0.5 * log_p(llama, [1, *tokens])[-1]).argmax()))
    assert found == [tokens]
    model = built("llama", bos_token_id=None)
    with pytest.raises(ValueError, match="context 1, row 1 is empty"):
        new_tokens(model, ContrastiveGuidance([[[]]]), PLAIN[:1])
    inputs = {"input_ids": torch.zeros(1, 3, dtype=torch.long), "attention_mask": torch.zeros(1, 3, dtype=torch.long)}
    with pytest.raises(ValueError, match="the plain prompt, row 1 is empty"):
        generate(model, [ContrastiveGuidance([[[4]]])], **inputs, **GREEDY)


def test_the_model_is_left_as_it_was_also_after_an_error(llama):
    def fail(input_ids: Tensor, scores: Tensor) -> Tensor:
        raise RuntimeError("stop here")

    cache = transformers.DynamicCache(config=llama.config)
    before = dict(vars(cache))
    with pytest.raises(RuntimeError, match="stop here"):
        new_tokens(llama, ContrastiveGuidance([CONTEXTS]), PLAIN, logits_processor=[fail], past_key_values=cache)
    assert not llama._forward_hooks
    assert not llama._forward_pre_hooks
    assert vars(cache).keys() - before.keys() <= {"_is_user_defined"}


def test_the_cache_of_all_branches_is_not_returned(llama):
    found = generate(llama, [ContrastiveGuidance([CONTEXTS])], **padded(PLAIN), **GREEDY, return_dict_in_generate=True)
    assert found.past_key_values is None


@pytest.mark.parametrize(
    ("option", "more", "words"),
    [
        ({"contexts": [CONTEXTS[:2]]}, {}, "context 1 has 2 rows and the batch has 3"),
        ({"contexts": [[[3], [VOCABULARY], [4]]]}, {}, f"context 1, row 2 has token {VOCABULARY}"),
        ({"contexts": [[[3], 4.5, [4]]]}, {}, "context 1, row 2 must be a text or a list of token ids"),
        ({}, {"prompt_lookup_num_tokens": 2}, "prompt lookup .* leave them out"),
        ({}, {"guidance_scale": 2.0}, "transformers' own guidance"),
        ({}, {"output_hidden_states": True, "return_dict_in_generate": True}, "output_hidden_states"),
        ({}, {"max_new_tokens": 57}, r"context 1, row 3 has 8 tokens, which with 57 new ones is more than the 64"),
        ({"reward": "official"}, {"use_cache": False}, "leave out use_cache"),
        ({}, {"token_type_ids": torch.zeros(3, 6, dtype=torch.long)}, "token_type_ids is given"),
    ],
    ids=["rows", "vocabulary", "kind", "lookup", "guidance", "hidden states", "overflow", "official", "token types"],
)  # fmt: skip
def test_what_cannot_be_guided_is_refused_with_words(llama, option, more, words):
    with pytest.raises(ValueError, match=words):
        new_tokens(llama, ContrastiveGuidance(**{"contexts": [CONTEXTS], **option}), PLAIN, **more)


def test_the_plain_prompt_may_be_the_one_that_is_too_long(llama):
    with pytest.raises(ValueError, match="the plain prompt, row 1 has 60 tokens"):
        new_tokens(llama, ContrastiveGuidance([[[3, 4]]]), [[5] * 60])


def test_assistants_and_used_caches_and_other_vocabularies_are_refused(llama):
    option = ContrastiveGuidance([CONTEXTS])
    with pytest.raises(ValueError, match="an assistant drafts without the contexts"):
        new_tokens(llama, option, PLAIN, assistant_model=llama)
    cache = transformers.DynamicCache(config=llama.config)
    new_tokens(llama, option, PLAIN, past_key_values=cache)
    with pytest.raises(ValueError, match="guidance needs a fresh one"):
        new_tokens(llama, option, PLAIN, past_key_values=cache)
    amateur = built("llama", vocab_size=41)
    with pytest.raises(ValueError, match="vocabulary of 41 tokens and the model one of 37"):
        new_tokens(llama, ContrastiveGuidance.contrastive_decoding(amateur), PLAIN)
