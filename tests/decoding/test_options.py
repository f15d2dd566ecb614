"""Generation options: the seam through which every decoding technique acts on `generate`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import pytest
import torch
import transformers
from transformers import LogitsProcessor, LogitsProcessorList

from trialist.decoding import around_loop, generate, prepare
from trialist.models import initialize_

from ..models.conftest import FAMILIES, GREEDY, sharpen


@pytest.fixture(scope="module")
def llama() -> Any:
    model = transformers.AutoModelForCausalLM.from_config(FAMILIES["llama"]())
    initialize_(model, 0)
    sharpen(model)
    return model.eval()


PROMPT = torch.tensor([[0, 0, 5, 9, 11], [7, 3, 8, 4, 6]])
INPUTS = {"input_ids": PROMPT, "attention_mask": (PROMPT != 0).long()}


@dataclass(frozen=True)
class Watch:
    """Runs the loop and notes what it was given."""

    seen: list[Any]
    slot: ClassVar[Any] = "loop"

    def prepare(self, model: Any, generate_kwargs: Mapping[str, Any]) -> dict[str, Any]:
        def around(loop: Any, model: Any, input_ids: Any, **kwargs: Any) -> Any:
            self.seen.append(kwargs)
            return loop(model, input_ids, **kwargs)

        return around_loop(generate_kwargs, around)


@dataclass(frozen=True)
class Only:
    """Allows one token, as the last of all processors."""

    token: int
    slot: ClassVar[Any] = "logits"

    def prepare(self, model: Any, generate_kwargs: Mapping[str, Any]) -> dict[str, Any]:
        def around(loop: Any, model: Any, input_ids: Any, *, logits_processor: Any, **kwargs: Any) -> Any:
            last = LogitsProcessorList([*logits_processor, self])
            return loop(model, input_ids, logits_processor=last, **kwargs)

        return around_loop(generate_kwargs, around)

    def __call__(self, input_ids: Any, scores: Any) -> Any:
        return torch.full_like(scores, -torch.inf).index_fill(1, torch.tensor([self.token]), 0.0)


class Collect(transformers.generation.BaseStreamer):
    def __init__(self) -> None:
        self.tokens: list[int] = []

    def put(self, value: Any) -> None:
        self.tokens += value.flatten().tolist()

    def end(self) -> None:
        self.tokens.append(-1)


@pytest.mark.parametrize(
    "more",
    [
        {},
        {"do_sample": True, "temperature": 0.7, "top_k": 5},
        {"num_beams": 3},
        {"num_beams": 2, "do_sample": True},
        {"num_return_sequences": 2, "do_sample": True},
        {"use_cache": False},
        {"return_dict_in_generate": True, "output_scores": True},
    ],
    ids=str,
)
def test_a_loop_around_the_own_one_changes_nothing(llama, more):
    options = {**GREEDY, **INPUTS, **more}
    torch.manual_seed(3)
    plain = llama.generate(**options)
    torch.manual_seed(3)
    watch = Watch([])
    wrapped = generate(llama, [watch], **options)
    assert len(watch.seen) == 1
    if more.get("return_dict_in_generate"):
        assert torch.equal(torch.stack(plain.scores), torch.stack(wrapped.scores))
        plain, wrapped = plain.sequences, wrapped.sequences
    assert torch.equal(plain, wrapped)


def test_loops_stand_around_each_other_and_options_of_logits_come_last(llama):
    watch = Watch([])
    found = generate(llama, [Only(13), watch], **INPUTS, **{**GREEDY, "do_sample": True, "top_k": 2})
    assert (found[:, PROMPT.shape[1] :] == 13).all()
    kinds = [type(processor).__name__ for processor in watch.seen[0]["logits_processor"]]
    assert kinds[-1] == "Only"
    assert "TopKLogitsWarper" in kinds


def test_a_streamer_gets_the_prompt_and_every_token(llama):
    plain, wrapped = Collect(), Collect()
    llama.generate(PROMPT[1:], streamer=plain, **GREEDY)
    generate(llama, [Watch([])], PROMPT[1:], streamer=wrapped, **GREEDY)
    assert len(plain.tokens) == 5 + 9 + 1
    assert plain.tokens == wrapped.tokens


def test_an_assistant_drafts_within_the_loop(llama):
    plain = llama.generate(PROMPT[1:], **GREEDY)
    drafted = generate(llama, [Watch([])], PROMPT[1:], assistant_model=llama, **GREEDY)
    assert torch.equal(plain, drafted)


@pytest.mark.parametrize("place", ["argument", "configuration"])
def test_stop_strings_reach_their_tokenizer(llama, character_tokenizer, place):
    stop = character_tokenizer.decode(llama.generate(PROMPT[1:], **GREEDY)[0, 7:9])
    options = {"stop_strings": [stop], **GREEDY}
    if place == "configuration":
        options = {"generation_config": transformers.GenerationConfig(**options)}
    options["tokenizer"] = character_tokenizer
    plain = llama.generate(PROMPT[1:], **options)
    wrapped = generate(llama, [Watch([])], PROMPT[1:], **options)
    assert plain.shape[1] < 5 + 9
    assert torch.equal(plain, wrapped)


def test_a_second_owner_of_a_slot_is_refused_with_both_names(llama):
    @dataclass(frozen=True)
    class Other(Watch):
        pass

    with pytest.raises(ValueError, match="Watch and Other both decide how the loop"):
        prepare(llama, [Watch([]), Other([])], INPUTS)


def test_options_of_logits_are_not_alone(llama):
    found = generate(llama, [Only(4), Only(9)], **INPUTS, **GREEDY)
    assert (found[:, 5:] == 4).all()  # the first is the innermost loop, so its processor is the very last


def test_recipes_of_other_repositories_are_refused(llama):
    with pytest.raises(ValueError, match=r"custom_generate='someone/recipe' .* Watch"):
        prepare(llama, [Watch([])], {**INPUTS, "custom_generate": "someone/recipe"})
    with pytest.raises(ValueError, match="contrastive search"):
        generate(llama, [Watch([])], **INPUTS, **{**GREEDY, "penalty_alpha": 0.6, "top_k": 4})


def test_no_options_are_plain_generate(llama):
    assert torch.equal(generate(llama, **INPUTS, **GREEDY), llama.generate(**INPUTS, **GREEDY))
    assert prepare(llama, [], INPUTS) == INPUTS


def test_a_processor_is_a_logits_processor_of_transformers():
    assert LogitsProcessorList([Only(1)])(PROMPT, torch.zeros(2, 20)).isfinite().sum() == 2
    assert not isinstance(Only(1), LogitsProcessor)
