from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import DynamicCache, StaticCache, StoppingCriteria
from transformers.generation.streamers import BaseStreamer

from trialist.decoding.compact_cache.options import KeyPruning
from trialist.decoding.guidance.option import ContrastiveGuidance
from trialist.decoding.options import generate, prepare
from trialist.decoding.precision.option import Precision
from trialist.decoding.precision.progressive import ProgressivePrecision
from trialist.decoding.precision.schedules import (
    ConfidenceSchedule,
    LearnedSchedule,
    PiecewiseSchedule,
    RandomSchedule,
    ReversedSchedule,
    StaticSchedule,
)
from trialist.models.nested.precision import get_precision, precision, set_precision
from trialist.training.precision_schedule import PrecisionClassifier

from ..models.conftest import FAMILIES, GREEDY, VOCABULARY, tokens
from .nested_model import dense_model, nested_model, padded_rows

T = GREEDY["max_new_tokens"]
DICT = {**GREEDY, "return_dict_in_generate": True}


@pytest.fixture(scope="module")
def nested() -> Any:
    return nested_model()


@pytest.fixture(autouse=True)
def _as_before(nested) -> Any:  # type: ignore[no-untyped-def]
    yield
    assert get_precision(nested) == 4
    assert not nested._forward_hooks
    assert not nested._forward_pre_hooks


def by_hand(model: Any, prompt: torch.Tensor, bits: list[int], prefill: int) -> tuple[list[int], DynamicCache]:
    """Greedy search one forward pass at a time: the oracle."""
    cache, chosen, ids = DynamicCache(config=model.config), [], prompt[None]
    for precise in [prefill, *bits]:
        with precision(model, precise), torch.no_grad():
            logits = model(input_ids=ids, past_key_values=cache, use_cache=True).logits[0, -1]
        chosen.append(int(logits.argmax()))
        ids = torch.tensor([[chosen[-1]]])
    return chosen, cache


SCHEDULES = {
    "static": StaticSchedule(4, 2, 3),
    "low only": StaticSchedule(4, 2, 0),
    "piecewise": PiecewiseSchedule(((0, 4), (2, 3), (5, 2))),
    "reversed": ReversedSchedule(StaticSchedule(4, 2, 3), T - 1),
    "random": RandomSchedule(StaticSchedule(3, 2, 4), T - 1, seed=1),
}


@pytest.mark.parametrize("prefill", [4, 2])
@pytest.mark.parametrize("name", SCHEDULES)
def test_text_is_that_of_one_forward_pass_at_a_time(nested, name, prefill):
    ids = tokens(1, 7)
    out = generate(nested, [ProgressivePrecision(SCHEDULES[name], prefill)], ids, **DICT)
    bits = SCHEDULES[name].over(T - 1)
    expected, cache = by_hand(nested, ids[0], bits, prefill)
    assert out.sequences[0, 7:].tolist() == expected
    assert out.bits.tolist() == [[prefill, *bits]]
    assert out.average_bits.tolist() == pytest.approx([(prefill + sum(bits)) / T])
    # caches differ by nothing: what was written before a switch stays as it was
    for own, theirs in zip(out.past_key_values.layers, cache.layers):
        torch.testing.assert_close(own.keys, theirs.keys)
        torch.testing.assert_close(own.values, theirs.values)


@pytest.mark.parametrize("family", FAMILIES)
def test_equal_precisions_are_plain_generation_at_that_precision(family):
    model = nested_model(family)
    ids = tokens(3, 6)
    option = ProgressivePrecision(StaticSchedule(4, 4, 5))
    kwargs = {"input_ids": ids, **GREEDY}
    assert option.prepare(model, kwargs) == kwargs  # neutral: the arguments as they are
    set_precision(model, 2)
    plain = model.generate(ids, **GREEDY)
    set_precision(model, 4)
    low = generate(model, [ProgressivePrecision(StaticSchedule(2, 2, 3))], ids, **GREEDY)
    assert torch.equal(low, plain)
    assert not torch.equal(low, model.generate(ids, **GREEDY))


def test_as_many_high_steps_as_there_are_is_high_precision_and_none_is_low_behind_the_prompt(nested):
    ids = tokens(2, 8)
    with precision(nested, 3):
        high = nested.generate(ids, **GREEDY)
    assert torch.equal(generate(nested, [ProgressivePrecision(StaticSchedule(3, 2, T - 1))], ids, **GREEDY), high)
    with precision(nested, 2):
        low = nested.generate(ids, **GREEDY)
    option = ProgressivePrecision(StaticSchedule(3, 2, 0), prefill_bits=2)
    assert torch.equal(generate(nested, [option], ids, **GREEDY), low)
    out = generate(nested, [ProgressivePrecision(StaticSchedule(3, 2, 0))], ids, **DICT)
    assert out.bits[0].tolist() == [3] + [2] * (T - 1)


def test_keys_and_values_written_before_a_switch_are_bit_identical_behind_it(nested):
    ids = tokens(2, 7)
    seen: list[list[torch.Tensor]] = []

    class Look(BaseStreamer):
        def put(self, value: torch.Tensor) -> None:
            if cache.get_seq_length():
                seen.append([x.clone() for layer in cache.layers for x in (layer.keys, layer.values)])

        def end(self) -> None:
            pass

    cache = DynamicCache(config=nested.config)
    option = ProgressivePrecision(StaticSchedule(4, 2, 3))
    generate(nested, [option], ids[:1], past_key_values=cache, streamer=Look(), **GREEDY)
    last = seen[-1]
    assert len(seen) == T
    for earlier in seen:
        for before, behind in zip(earlier, last):
            assert torch.equal(before, behind[:, :, : before.shape[2]])
    with precision(nested, 2), torch.no_grad():  # and they are not those of the precision that follows
        plain = DynamicCache(config=nested.config)
        nested(input_ids=ids[:1], past_key_values=plain, use_cache=True)
    assert not torch.allclose(plain.layers[-1].keys, last[-2][:, :, :7], atol=1e-3)


def test_a_row_of_a_left_padded_batch_gives_what_it_gives_alone(nested):
    ids, mask = padded_rows()
    option = ProgressivePrecision(StaticSchedule(4, 2, 4))
    batch = generate(nested, [option], ids, attention_mask=mask, **DICT)
    alone = generate(nested, [option], ids[1:2, 4:], **DICT)
    assert batch.sequences[1, 11:].tolist() == alone.sequences[0, 7:].tolist()
    assert torch.equal(batch.bits[1], alone.bits[0])


@pytest.mark.parametrize(
    "more",
    [
        {"do_sample": True, "num_return_sequences": 2, "top_k": 0},
        {"num_beams": 3},
        {"num_beams": 3, "num_return_sequences": 2},
        {"prefill_chunk_size": 3},
        {"cache_implementation": "static"},
    ],
    ids=["sampling", "beams", "beams, two sequences", "prompt in chunks", "static cache"],
)
def test_every_loop_follows_the_schedule(nested, more):
    ids, schedule = tokens(2, 8), StaticSchedule(4, 2, 3)
    torch.manual_seed(0)
    out = generate(nested, [ProgressivePrecision(schedule)], ids, **{**DICT, **more})
    asked = [4, *schedule.over(T - 1)]
    assert out.bits.tolist() == [asked] * len(out.sequences)
    # the same loop, told the bits by the length of what each forward pass has read
    torch.manual_seed(0)
    read = 0

    def told(model: Any, args: tuple, kwargs: dict[str, Any]) -> None:
        nonlocal read
        read += kwargs["input_ids"].shape[1]
        set_precision(model, 4 if read <= 8 else schedule.at(read - 9))

    handle = nested.register_forward_pre_hook(told, with_kwargs=True)
    try:
        expected = nested.generate(ids, **{**DICT, **more}).sequences
    finally:
        handle.remove()
        set_precision(nested, 4)
    assert torch.equal(out.sequences, expected)


def test_rows_that_guidance_stacks_are_no_steps(nested):
    ids = tokens(2, 6)
    guided = ContrastiveGuidance([[row.tolist() for row in tokens(2, 10)]], 1.5)
    schedule = StaticSchedule(4, 2, 3)
    out = generate(nested, [ProgressivePrecision(schedule), guided], ids, prefill_chunk_size=4, **DICT)
    assert out.bits.tolist() == [[4, *schedule.over(T - 1)]] * 2
    plain = generate(nested, [guided], ids, **GREEDY)
    assert torch.equal(generate(nested, [ProgressivePrecision(StaticSchedule(4, 2, T)), guided], ids, **GREEDY), plain)
    assert not torch.equal(out.sequences, plain)


def test_bits_end_where_a_row_ends_and_the_average_counts_generated_tokens_alone(nested):
    ids = tokens(4, 7)
    free = generate(nested, [ProgressivePrecision(StaticSchedule(4, 2, 3))], ids, **DICT).sequences[:, 7:]
    eos = int(free[1, 4])
    out = generate(
        nested, [ProgressivePrecision(StaticSchedule(4, 2, 3))], ids, **{**DICT, "eos_token_id": eos, "pad_token_id": 0}
    )
    assert out.bits.shape == (4, out.sequences.shape[1] - 7)
    for row, bits, average in zip(free.tolist(), out.bits.tolist(), out.average_bits.tolist()):
        length = row.index(eos) + 1 if eos in row else T
        expected = [4, 4, 4, 4, 2, 2, 2, 2, 2][:length]
        assert bits == expected + [0] * (len(bits) - length)
        assert average == pytest.approx(sum(expected) / length)
    assert (out.bits == 0).any()


def test_beams_that_end_early_have_bits_for_their_tokens_only(nested):
    ids = tokens(3, 7)
    free = generate(nested, [], ids, **GREEDY)[:, 7:]
    kwargs = {**DICT, "num_beams": 2, "eos_token_id": int(free[0, 2])}
    out = generate(nested, [ProgressivePrecision(StaticSchedule(4, 2, 2))], ids, **kwargs)
    for row, bits in zip(out.sequences[:, 7:].tolist(), out.bits.tolist()):
        length = row.index(kwargs["eos_token_id"]) + 1 if kwargs["eos_token_id"] in row else len(row)
        assert bits == [4, 4, 4, 2, 2, 2, 2, 2, 2][:length] + [0] * (len(row) - length)


class _Asks:
    """A schedule whose rows ask for different bits."""

    reads_logits = False
    precisions = (4, 3, 2)

    def start(self, prompt: Any) -> None:
        self.lengths = prompt.lengths

    def next(self, state: None, step: int, logits: Any) -> list[int]:
        return [4 if step < 2 else 2, 3 if step < 5 else 2]


class _Enough(StoppingCriteria):
    """Ends one row."""

    def __init__(self, row: int, tokens: int) -> None:
        self.row, self.tokens = row, tokens

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        return (torch.arange(len(input_ids)) == self.row) & (input_ids.shape[1] >= self.tokens)


def test_a_batch_runs_at_the_most_that_a_row_asks_for_which_has_not_ended(nested):
    ids, mask = padded_rows()
    asks = _Asks()
    out = generate(nested, [ProgressivePrecision(asks)], ids[:2], attention_mask=mask[:2], **DICT)
    assert asks.lengths == (11, 7)
    assert out.bits.tolist() == [[4, 4, 4, 3, 3, 3, 2, 2, 2]] * 2
    enough = _Enough(row=1, tokens=11 + 4)
    ended = generate(
        nested, [ProgressivePrecision(asks)], ids[:2], attention_mask=mask[:2], stopping_criteria=[enough], **DICT
    )
    # row 1 ends at token 3; it is known to have ended when token 4 is chosen, so token 5 no longer minds it
    assert ended.bits.tolist()[0] == [4, 4, 4, 3, 3, 2, 2, 2, 2]
    assert ended.bits.tolist()[1] == [4, 4, 4, 3, 0, 0, 0, 0, 0]


def test_confidence_is_told_the_logits_that_chose_the_token(nested):
    ids = tokens(1, 7)
    schedule = ConfidenceSchedule(4, 2, window=2, k=0.0)
    out = generate(nested, [ProgressivePrecision(schedule)], ids, output_logits=True, **DICT)
    surest = [float(logits[0].softmax(-1).max()) for logits in out.logits]
    low, expected = False, [4]
    for step in range(T - 1):
        low = low or (step >= 2 and surest[step] >= sum(surest[step - 2 : step]) / 2)
        expected.append(2 if low else 4)
    assert out.bits[0].tolist() == expected
    assert 2 in expected


def learned(seed: int = 0, classes: tuple[int, ...] = (0, 2, 5, 9)) -> LearnedSchedule:
    torch.manual_seed(seed)
    return LearnedSchedule(PrecisionClassifier(3, 4, len(classes)).eval(), 4, 2, classes, prefill_bits=4)


def test_a_learned_schedule_reads_the_prompt_alone_as_the_pass_over_it_wrote_it(nested):
    ids, schedule = tokens(1, 8), learned()
    read: list[torch.Tensor] = []
    schedule.classifier.register_forward_pre_hook(lambda module, args: read.append(args[0].clone()))
    out = generate(nested, [ProgressivePrecision(schedule)], ids, **DICT)
    with torch.no_grad():
        cache = DynamicCache(config=nested.config)
        nested(input_ids=ids, past_key_values=cache, use_cache=True)
    assert len(read) == 1  # once for a request
    torch.testing.assert_close(read[0], cache.layers[-1].keys.mean(1))
    keys, values = (x.mean(1) for x in (cache.layers[-1].keys, cache.layers[-1].values))
    choice = int(schedule.classifier(keys, values, torch.ones(1, 8)).argmax())
    assert out.bits[0].tolist() == [4, *StaticSchedule(4, 2, schedule.high_steps[choice]).over(T - 1)]


@pytest.mark.parametrize("seed", range(3))
def test_a_learned_schedule_says_the_same_of_a_row_in_a_padded_batch_in_chunks_and_in_a_static_cache(nested, seed):
    ids, mask = padded_rows()
    schedule = learned(seed)
    asked: list[list[int]] = []
    own = LearnedSchedule.start

    class Noted(LearnedSchedule):
        def start(self, prompt: Any) -> Any:
            found = own(self, prompt)
            asked.append([row.high_steps for row in found])
            return found

    noted = Noted(schedule.classifier, 4, 2, schedule.high_steps)
    option = ProgressivePrecision(noted)
    generate(nested, [option], ids, attention_mask=mask, **GREEDY)
    generate(nested, [option], ids, attention_mask=mask, prefill_chunk_size=4, **GREEDY)
    generate(nested, [option], ids, attention_mask=mask, cache_implementation="static", **GREEDY)
    assert asked[0] == asked[1] == asked[2]
    asked.clear()
    for row, real in zip(ids, mask):
        generate(nested, [option], row[real.bool()][None], **GREEDY)
    first = [[steps[0] for steps in asked]]
    asked.clear()
    generate(nested, [option], ids, attention_mask=mask, **GREEDY)
    assert first == asked


@pytest.mark.parametrize("kind", ["guidance", "compact cache"])
def test_a_learned_schedule_refuses_a_cache_that_is_not_of_the_prompts_alone(nested, kind):
    ids = tokens(2, 6)
    other = ContrastiveGuidance([[row.tolist() for row in ids]], 1.5) if kind == "guidance" else KeyPruning(keep=0.5)
    with pytest.raises(ValueError, match="use a static schedule"):
        generate(nested, [ProgressivePrecision(learned()), other], ids, **GREEDY)


def test_an_adapter_of_peft_generates_under_a_schedule(nested):
    from peft import LoraConfig, get_peft_model

    from trialist.models import nested_lora

    torch.manual_seed(3)
    model = nested_model()
    adapted = get_peft_model(model, nested_lora(LoraConfig(r=2, target_modules=["q_proj", "down_proj"]))).eval()
    ids, schedule = tokens(2, 6), StaticSchedule(4, 2, 3)
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.5)
    out = generate(adapted, [ProgressivePrecision(schedule)], ids, **DICT)
    assert out.bits[0].tolist() == [4, *schedule.over(T - 1)]
    expected, _ = by_hand(adapted, ids[0], schedule.over(T - 1), 4)
    assert out.sequences[0, 6:].tolist() == expected
    assert not torch.equal(
        out.sequences, generate(model, [ProgressivePrecision(schedule)], tokens(2, 6) * 0 + 3, **GREEDY)
    )


def test_the_model_is_as_before_after_an_exception(nested):
    def broken(input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        if input_ids.shape[1] == 10:
            raise RuntimeError("stop here")
        return scores

    with pytest.raises(RuntimeError, match="stop here"):
        generate(
            nested, [ProgressivePrecision(StaticSchedule(4, 2, 1))], tokens(1, 6), logits_processor=[broken], **GREEDY
        )
    assert get_precision(nested) == 4


def test_a_model_that_is_not_nested_is_refused_with_the_command():
    with pytest.raises(ValueError, match=r"trialist apply quantize --model"):
        generate(dense_model(), [ProgressivePrecision(StaticSchedule(4, 2, 1))], tokens(1, 6), **GREEDY)


@pytest.mark.parametrize(
    ("more", "words"),
    [
        ({"assistant_model": "self"}, "assisted decoding checks several drafted tokens"),
        ({"prompt_lookup_num_tokens": 2}, "assisted decoding checks several drafted tokens"),
        ({"use_cache": False}, "without a cache every step computes"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_generation_without_steps_or_without_a_cache_is_refused(nested, more, words):
    more = {name: nested if value == "self" else value for name, value in more.items()}
    with pytest.raises(ValueError, match=words):
        generate(nested, [ProgressivePrecision(StaticSchedule(4, 2, 1))], tokens(1, 6), **{**GREEDY, **more})


def test_bits_that_the_model_lacks_are_refused_with_those_it_has(nested):
    with pytest.raises(ValueError, match="asks for 8, 6 bits, and the weights can be read at 2, 3, 4"):
        generate(nested, [ProgressivePrecision(StaticSchedule(6, 2, 1), prefill_bits=8)], tokens(1, 6), **GREEDY)


def test_one_precision_and_a_schedule_clash_by_both_names(nested):
    with pytest.raises(ValueError, match="Precision and ProgressivePrecision both decide the precision of the weights"):
        prepare(nested, [Precision(3), ProgressivePrecision(StaticSchedule(4, 2, 1))], {"input_ids": tokens(1, 6)})


def test_a_given_static_cache_and_a_later_turn_count_from_where_they_begin(nested):
    ids, schedule = tokens(1, 6), StaticSchedule(4, 2, 3)
    cache = StaticCache(config=nested.config, max_cache_len=40)
    out = generate(nested, [ProgressivePrecision(schedule)], ids, past_key_values=cache, **DICT)
    more = torch.cat([out.sequences, torch.full((1, 2), VOCABULARY - 1)], 1)
    turn = generate(nested, [ProgressivePrecision(schedule)], more, past_key_values=cache, **DICT)
    assert turn.bits.tolist() == [[4, *schedule.over(T - 1)]]
