"""Budget forcing within `generate`, held to a naive loop without cache, to closed forms, and to what it must never do."""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import pytest
import torch
import transformers
from tokenizers import AddedToken
from transformers import LogitsProcessorList

from trialist.decoding import BudgetForcing, around_loop, generate
from trialist.decoding.budget_forcing.option import RECIPE

from ..models.conftest import FAMILIES, GREEDY, SIZES, VOCABULARY, sharpen
from .conftest import CHARACTERS

PROMPT = torch.tensor([[0, 0, 5, 9, 11], [7, 3, 8, 4, 6], [0, 12, 3, 20, 14]])
INPUTS = {"input_ids": PROMPT, "attention_mask": (PROMPT != 0).long()}
EOS = 2
NEW = 24
LONG = {**GREEDY, "max_new_tokens": NEW}


def built(name: str, seed: int = 5) -> Any:
    torch.manual_seed(seed)
    config = FAMILIES[name]()
    config.eos_token_id = None  # `generate` takes the model's own for an argument of None
    model = transformers.AutoModelForCausalLM.from_config(config)
    sharpen(model)
    return model.eval()


@pytest.fixture(scope="module")
def llama() -> Any:
    return built("llama")


def chain(table: torch.Tensor) -> Any:
    """A model whose next token depends on the last one only, with the logits of `table` (V, V)."""
    sizes = {**SIZES, "hidden_size": VOCABULARY, "eos_token_id": None, "num_hidden_layers": 1,
             "num_attention_heads": 1, "num_key_value_heads": 1,
             "max_position_embeddings": 512, "tie_word_embeddings": False}  # fmt: skip
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes)).eval()
    with torch.no_grad():
        for parameter in model.model.layers.parameters():
            parameter.zero_()
        model.model.embed_tokens.weight.copy_(torch.eye(VOCABULARY))
        model.lm_head.weight.copy_(table.T / VOCABULARY**0.5)
    return model


def natural_end(model: Any, tokenizer: Any, step: int = 4) -> str:
    """The character that the second prompt's plain continuation has at `step`, so that ends are proposed often."""
    plain = model.generate(**INPUTS, **LONG)[:, PROMPT.shape[1] :]
    return tokenizer.decode([plain[1, step]])


def unpadded(row: int) -> list[int]:
    return PROMPT[row, PROMPT[row].ne(0).int().argmax() :].tolist()


def best(model: Any, ids: list[int]) -> torch.Tensor:
    with torch.no_grad():
        return model(torch.tensor([ids]), use_cache=False).logits[0, -1]


def naive(model: Any, ids: list[int], tokenizer: Any, option: BudgetForcing, eos: int | None = None) -> tuple:
    """Budget forcing as the state machine of the paper, one token after another over the whole text; delimiters are a token.

    Returns the new ids, the number of thinking tokens and the number of ignored ends.
    """
    end, ignore = tokenizer.encode(option.end_think)[0], tokenizer.encode(option.ignore_text)
    new: list[int] = []
    used = ignored = 0
    fresh = False
    while len(new) < NEW:
        if option.max_thinking_tokens is not None and used >= option.max_thinking_tokens:
            before = "" if new and tokenizer.decode([new[-1]]) == "\n" else "\n"
            new += tokenizer.encode(before + option.end_think + option.final_prefix)
            break
        logits = best(model, ids + new)
        token = int(logits.argmax())
        if token in (end, eos):
            room = option.max_thinking_tokens is None or used + len(ignore) < option.max_thinking_tokens
            if ignored < option.num_ignore and room and not fresh:
                new += ignore
                used, ignored, fresh = used + len(ignore), ignored + 1, True
                continue
            if not fresh and used >= option.min_thinking_tokens:
                new.append(end)
                break
            logits[[token for token in (end, eos) if token is not None]] = -torch.inf
            token = int(logits.argmax())
        new.append(token)
        used, fresh = used + 1, False
    while len(new) < NEW:
        new.append(int(best(model, ids + new).argmax()))
        if new[-1] == eos:
            break
    return new[:NEW], used, ignored


OPTIONS = {
    "maximum": {"max_thinking_tokens": 3},
    "two ends put off": {"num_ignore": 2},
    "minimum": {"min_thinking_tokens": 9},
    "all at once": {"max_thinking_tokens": 12, "min_thinking_tokens": 5, "num_ignore": 3, "ignore_text": "W, "},
}


def forcing(tokenizer: Any, end: str, **options: Any) -> BudgetForcing:
    return BudgetForcing(
        tokenizer, end_think=end, start_think=None, **{"final_prefix": ".", "ignore_text": "W", **options}
    )


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma", "qwen3"])
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_rows_with_padding_are_those_of_a_loop_over_the_whole_text(name, options, character_tokenizer):
    model = built(name)
    option = forcing(character_tokenizer, natural_end(model, character_tokenizer), **options)
    out = generate(model, [option], **INPUTS, **LONG, return_dict_in_generate=True)
    for row in range(len(PROMPT)):
        new, used, ignored = naive(model, unpadded(row), character_tokenizer, option)
        assert out.sequences[row, PROMPT.shape[1] :].tolist() == new
        if len(new) < NEW or out.thinking[row].ended != "open":
            assert (out.thinking[row].tokens, out.thinking[row].ignores) == (used, ignored)


def test_an_end_of_the_sequence_proposes_an_end_and_finished_rows_stay_as_they_are(llama, character_tokenizer):
    eos = int(llama.generate(**INPUTS, **LONG)[1, PROMPT.shape[1] + 6])
    option = forcing(character_tokenizer, ":", num_ignore=1)
    options = {**LONG, "eos_token_id": eos}
    out = generate(llama, [option], **INPUTS, **options, return_dict_in_generate=True)
    lengths = []
    for row in range(len(PROMPT)):
        new, used, ignored = naive(llama, unpadded(row), character_tokenizer, option, eos)
        found = out.sequences[row, PROMPT.shape[1] :].tolist()
        assert found[: len(new)] == new
        assert not any(found[len(new) :])
        report = out.thinking[row]
        assert (report.tokens, report.ignores) == (used, ignored)
        if new[-1] == eos:
            assert report.answer_tokens == len(new) - used - 2
            assert report.ended == "natural"
        lengths.append(len(new))
    assert min(lengths) < max(lengths)


NEUTRAL = [{}, {"do_sample": True}, {"num_beams": 3}, {"num_return_sequences": 2, "do_sample": True}]


@pytest.mark.parametrize("more", NEUTRAL, ids=str)
def test_nothing_to_force_is_plain_generation(llama, character_tokenizer, more):
    option = forcing(character_tokenizer, ":")
    given = {**INPUTS, **LONG, **more}
    assert option.prepare(llama, given) == given
    torch.manual_seed(1)
    plain = llama.generate(**given)
    torch.manual_seed(1)
    assert torch.equal(plain, generate(llama, [option], **given))


@pytest.mark.parametrize("more", NEUTRAL, ids=str)
def test_until_something_is_forced_no_token_changes_also_of_sampling(llama, character_tokenizer, more):
    end = natural_end(llama, character_tokenizer)
    given = {**INPUTS, **LONG, **more, "max_new_tokens": 12}
    torch.manual_seed(1)
    plain = llama.generate(**given)
    torch.manual_seed(1)
    unseen = next(character for character in CHARACTERS if character_tokenizer.encode(character)[0] not in plain)
    assert torch.equal(plain, generate(llama, [forcing(character_tokenizer, unseen, num_ignore=4)], **given))
    if "num_beams" not in more:
        torch.manual_seed(1)
        late = generate(llama, [forcing(character_tokenizer, end, max_thinking_tokens=8)], **given)
        assert torch.equal(plain[:, : 5 + 8], late[:, : 5 + 8])


@pytest.mark.parametrize("maximum", [1, 2, 7, 11])
@pytest.mark.parametrize("more", NEUTRAL, ids=str)
def test_no_row_thinks_longer_than_the_maximum(llama, character_tokenizer, maximum, more):
    end = natural_end(llama, character_tokenizer)
    option = forcing(character_tokenizer, end, max_thinking_tokens=maximum, num_ignore=2, ignore_text="W, ")
    torch.manual_seed(2)
    out = generate(llama, [option], **INPUTS, **{**LONG, **more}, return_dict_in_generate=True)
    (stop,) = character_tokenizer.encode(end)
    for report, row in zip(out.thinking, out.sequences[:, PROMPT.shape[1] :].tolist(), strict=True):
        assert 0 <= report.tokens <= maximum
        assert report.ended in ("natural", "forced")
        assert row.index(stop) == report.tokens + (report.ended == "forced" and row[report.tokens] != stop)


def test_a_forced_end_writes_its_tokens_once_and_after_a_separator_no_second_one(llama, character_tokenizer):
    newline = character_tokenizer.encode("\n")[0]
    option = forcing(character_tokenizer, ":", max_thinking_tokens=4, final_prefix="ab.")
    tail = character_tokenizer.encode("\n:ab.")
    found = generate(llama, [option], **INPUTS, **LONG)[:, 5:].tolist()
    assert all(row[4:9] == tail for row in found)
    table = torch.zeros(VOCABULARY, VOCABULARY)
    table[:, newline] = 9.0
    found = generate(chain(table), [option], **INPUTS, **LONG)[:, 5:].tolist()
    assert all(row[:8] == [newline] * 4 + tail[1:] for row in found)


def test_below_the_minimum_the_end_never_comes(llama, character_tokenizer):
    table = torch.zeros(VOCABULARY, VOCABULARY)
    end, other = character_tokenizer.encode(":a")
    table[:, end], table[:, other] = 9.0, 5.0
    for more in ({}, {"do_sample": True}, {"num_beams": 2}):
        option = forcing(character_tokenizer, ":", min_thinking_tokens=7)
        out = generate(
            chain(table), [option], **INPUTS, **{**LONG, "eos_token_id": 4, **more}, return_dict_in_generate=True
        )
        assert not (out.sequences[:, 5:12] == end).any()
        assert all(report.tokens >= 7 for report in out.thinking)
    assert (generate(chain(table), [option], **INPUTS, **LONG)[:, 12] == end).all()


def test_the_row_does_not_depend_on_its_neighbours(llama, character_tokenizer):
    end = natural_end(llama, character_tokenizer)
    option = forcing(character_tokenizer, end, max_thinking_tokens=10, num_ignore=2)
    together = generate(llama, [option], **INPUTS, **LONG)[:, PROMPT.shape[1] :]
    for row in range(len(PROMPT)):
        alone = generate(llama, [option], torch.tensor([unpadded(row)]), **LONG)
        assert torch.equal(alone[0, len(unpadded(row)) :], together[row])


def test_ends_are_put_off_as_often_as_sampling_draws_them(character_tokenizer):
    end, ignore, other = character_tokenizer.encode(":Wa")
    table = torch.full((VOCABULARY, VOCABULARY), -torch.inf)
    table[:, end], table[:, other] = torch.tensor(0.3).log(), torch.tensor(0.7).log()
    table = table.clamp_min(-80.0)
    option = forcing(character_tokenizer, ":", num_ignore=1)
    rows = 6000
    torch.manual_seed(0)
    out = generate(
        chain(table), [option], torch.full((rows, 1), other), **{**LONG, "max_new_tokens": 12, "do_sample": True, "top_k": 0},
        return_dict_in_generate=True,
    )  # fmt: skip
    new = out.sequences[:, 1:]
    first = (new == ignore).int().argmax(1)
    for step, share in enumerate([0.3, 0.7 * 0.3, 0.7**2 * 0.3, 0.7**3 * 0.3]):
        here = (first == step) & (new == ignore).any(1)
        assert float(here.float().mean()) == pytest.approx(share, abs=4 * (share * (1 - share) / rows) ** 0.5)
    # behind the string one token of thought, then ends at the model's own rate
    at_once = first == 0
    at_once &= (new == ignore).any(1)
    assert (new[at_once, 1] == other).all()
    count = int(at_once.sum())
    second = float((new[at_once, 2] == end).float().mean())
    assert second == pytest.approx(0.3, abs=4 * (0.3 * 0.7 / count) ** 0.5)


def test_sampling_that_leaves_only_the_end_takes_the_next_best_token(character_tokenizer):
    table = torch.zeros(VOCABULARY, VOCABULARY)
    end, other = character_tokenizer.encode(":a")
    table[:, end], table[:, other] = 9.0, 5.0
    option = forcing(character_tokenizer, ":", min_thinking_tokens=3)
    found = generate(chain(table), [option], **INPUTS, **{**LONG, "do_sample": True, "top_k": 1})[:, 5:9]
    assert (found == torch.tensor([other, other, other, end])).all()


def beams(model: Any, ids: list[int], tokenizer: Any, option: BudgetForcing, K: int, steps: int) -> list[int]:
    """Beam search with budget forcing, each hypothesis over the whole text; delimiter and ignored string are one token."""
    end, ignore = (tokenizer.encode(text)[0] for text in (option.end_think, option.ignore_text))
    running = [(0.0, [], 0, 0, False, "think")]
    for _ in range(steps):
        candidates = []
        for score, new, used, ignored, fresh, phase in running:
            logp = best(model, ids + new).log_softmax(-1)
            forced = None
            if phase == "think":
                if used == option.max_thinking_tokens:
                    forced, after = end, (used, ignored, False, "answer")
                elif ignored < option.num_ignore and not fresh and used + 1 < option.max_thinking_tokens:
                    if int(logp.argmax()) == end:
                        forced, after = ignore, (used + 1, ignored + 1, True, "think")
                    logp[end] = -torch.inf
                elif fresh:
                    logp[end] = -torch.inf
            if forced is not None:
                candidates.append((score, [*new, forced], *after))
                continue
            for token in logp.topk(2 * K).indices.tolist():
                value = score + float(logp[token])
                if phase == "think" and token == end:
                    candidates.append((value, [*new, token], used, ignored, False, "answer"))
                else:
                    candidates.append((value, [*new, token], used + (phase == "think"), ignored, False, phase))
        running = sorted(candidates, key=lambda candidate: -candidate[0])[:K]
    return running[0][1], running[0][2], running[0][3]


@pytest.mark.parametrize("seed", range(4))
def test_beams_carry_their_states_along(character_tokenizer, seed):
    model = built("llama", seed)
    end = natural_end(model, character_tokenizer, 2)
    option = forcing(character_tokenizer, end, max_thinking_tokens=6, num_ignore=2, final_prefix="", separator="")
    out = generate(
        model, [option], **INPUTS, **{**GREEDY, "max_new_tokens": 9}, num_beams=3, return_dict_in_generate=True
    )
    for row in range(len(PROMPT)):
        new, used, ignored = beams(model, unpadded(row), character_tokenizer, option, 3, 9)
        assert out.sequences[row, PROMPT.shape[1] :].tolist() == new
        assert (out.thinking[row].tokens, out.thinking[row].ignores) == (used, ignored)


def test_each_of_several_sequences_has_a_report(llama, character_tokenizer):
    end = natural_end(llama, character_tokenizer)
    option = forcing(character_tokenizer, end, max_thinking_tokens=5, num_ignore=1)
    torch.manual_seed(0)
    sampled = generate(
        llama, [option], **INPUTS, **{**LONG, "do_sample": True}, num_return_sequences=4, return_dict_in_generate=True
    )
    assert len(sampled.thinking) == len(sampled.sequences) == 12
    beamed = generate(
        llama, [option], **INPUTS, **LONG, num_beams=4, num_return_sequences=2, return_dict_in_generate=True
    )
    assert len(beamed.thinking) == 6
    (stop,) = character_tokenizer.encode(end)
    for report, row in zip(beamed.thinking, beamed.sequences[:, 5:].tolist(), strict=True):
        assert report.tokens <= row.index(stop)


# -- delimiters --------------------------------------------------------------------------------------------------------


def told(text: str, tokenizer: Any) -> torch.Tensor:
    """A chain that spells `text` again and again; its characters are all different."""
    ids = tokenizer.encode(text)
    assert len(set(ids)) == len(ids)
    table = torch.zeros(VOCABULARY, VOCABULARY)
    for token, after in zip(ids, ids[1:] + ids[:1], strict=True):
        table[token, after] = 9.0
    return table


def said(model: Any, option: BudgetForcing, prompt: str, **more: Any) -> tuple[str, Any]:
    ids = torch.tensor([option.tokenizer.encode(prompt)])
    out = generate(model, [option], ids, **{**LONG, **more}, return_dict_in_generate=True)
    return option.tokenizer.decode(out.sequences[0, ids.shape[1] :]), out.thinking[0]


def test_a_segment_that_the_model_opens_counts_from_there(character_tokenizer):
    model = chain(told("xyz<ab>cdef", character_tokenizer))
    option = BudgetForcing(character_tokenizer, "f", "<a", max_thinking_tokens=2, final_prefix=".", separator="")
    text, report = said(model, option, "x")
    assert text.startswith("yz<ab>f.")
    assert (report.tokens, report.ended) == (2, "forced")
    never, report = said(model, dataclasses.replace(option, start_think="<b"), "x")
    assert never == "yz<ab>cdefxyz<ab>cdefxyz"
    assert (report.tokens, report.ended, report.answer_tokens) == (0, "absent", 0)


def test_a_segment_is_open_where_the_prompt_opened_it_and_did_not_close_it(character_tokenizer):
    model = chain(told("xyz<ab>cdef", character_tokenizer))
    option = BudgetForcing(character_tokenizer, "f", "<a", max_thinking_tokens=3, final_prefix="", separator="")
    assert said(model, option, "<ab")[0].startswith(">cdf")
    assert said(model, option, "<abfx")[0].startswith("yz<ab>cf")  # the second segment
    prompts = ["<ab", "abcxy"]  # only one is open, and its padding is none of it
    batch = character_tokenizer(prompts, return_tensors="pt", padding=True)
    found = generate(model, [option], **{name: batch[name] for name in ("input_ids", "attention_mask")}, **LONG)
    texts = character_tokenizer.batch_decode(found[:, 5:])
    assert texts[0].startswith(">cdf")
    assert texts[1].startswith("z<ab>cf")


def test_a_delimiter_of_plain_text_is_read_however_it_is_written(character_tokenizer):
    model = chain(told("abc<.>de", character_tokenizer))
    option = forcing(character_tokenizer, "<.>", num_ignore=1, max_thinking_tokens=18, final_prefix="")
    text, report = said(model, option, "a")
    # its last token is put off, what stands before stays
    assert text.startswith("bc<.W")
    assert report.ignores == 1
    text, report = said(model, forcing(character_tokenizer, "<.>", max_thinking_tokens=18), "a")
    assert text.startswith("bc<.>de")
    assert (report.tokens, report.ended) == (4, "natural")
    # a budget that ends within the delimiter completes it
    text, report = said(model, forcing(character_tokenizer, "<.>", max_thinking_tokens=4), "a")
    assert text.startswith("bc<.>.")
    assert report.ended == "forced"


@pytest.fixture
def tagging(character_tokenizer) -> Any:
    """A tokenizer with an added token in the place of an unused one."""
    import copy

    tokenizer = copy.deepcopy(character_tokenizer)
    tokenizer.add_tokens([AddedToken("<|im|>", special=True)])
    return tokenizer


def test_a_delimiter_that_begins_with_an_added_token_is_put_off_whole_and_completed(tagging):
    (tag,) = tagging.encode("<|im|>")
    assert tag == VOCABULARY
    ids = tagging.encode("abc") + [tag] + tagging.encode("de")
    table = torch.zeros(VOCABULARY + 1, VOCABULARY + 1)
    for token, after in zip(ids, ids[1:] + ids[:1], strict=True):
        table[token, after] = 9.0
    sizes = {**SIZES, "vocab_size": VOCABULARY + 1, "eos_token_id": None, "hidden_size": VOCABULARY + 1, "num_hidden_layers": 1,
             "num_attention_heads": 1, "num_key_value_heads": 1, "head_dim": 38, "tie_word_embeddings": False}  # fmt: skip
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes)).eval()
    with torch.no_grad():
        for parameter in model.model.layers.parameters():
            parameter.zero_()
        model.model.embed_tokens.weight.copy_(torch.eye(VOCABULARY + 1))
        model.lm_head.weight.copy_(table.T)
    option = forcing(tagging, "<|im|>xy", num_ignore=1, ignore_text="a", max_thinking_tokens=20)
    prompt = torch.tensor([tagging.encode("a")])
    out = generate(model, [option], prompt, **{**LONG, "max_new_tokens": 30}, return_dict_in_generate=True)
    assert tagging.decode(out.sequences[0, 1:]).startswith("bcabc<|im|>xy")
    assert (out.thinking[0].tokens, out.thinking[0].ended) == (5, "natural")


def test_an_end_that_is_put_off_without_a_string_takes_another_token(character_tokenizer):
    table = torch.zeros(VOCABULARY, VOCABULARY)
    end, other = character_tokenizer.encode(":a")
    table[:, end], table[:, other] = 9.0, 5.0
    option = forcing(character_tokenizer, ":", num_ignore=3, ignore_text="")
    text, report = said(chain(table), option, "x")
    assert text.startswith("aaa:")
    assert (report.tokens, report.ignores) == (3, 3)


def test_a_string_is_not_begun_where_it_does_not_fit(character_tokenizer):
    model = chain(told("abc:", character_tokenizer))
    option = forcing(character_tokenizer, ":", num_ignore=9, ignore_text="xyz", max_thinking_tokens=6)
    text, report = said(model, option, "a")
    assert text.startswith("bcxyz")
    assert (report.tokens, report.ignores, report.ended) == (6, 1, "forced")
    text, report = said(model, dataclasses.replace(option, max_thinking_tokens=5), "a")
    assert text.startswith("bc:")
    assert (report.tokens, report.ignores) == (2, 0)


def test_an_answer_ends_at_its_number_of_tokens(llama, character_tokenizer):
    option = forcing(character_tokenizer, ":", max_thinking_tokens=3, max_answer_tokens=4)
    out = generate(llama, [option], **INPUTS, eos_token_id=EOS, pad_token_id=0, return_dict_in_generate=True)
    assert out.sequences.shape[1] - 5 <= 3 + 3 + 4 + 1
    for report, row in zip(out.thinking, out.sequences[:, 5:].tolist(), strict=True):
        assert report.answer_tokens <= 4
        assert EOS in row


# -- company -----------------------------------------------------------------------------------------------------------


class Collect(transformers.generation.BaseStreamer):
    def __init__(self) -> None:
        self.tokens: list[int] = []

    def put(self, value: Any) -> None:
        self.tokens += value.flatten().tolist()

    def end(self) -> None:
        pass


def test_a_streamer_gets_forced_tokens_like_others(llama, character_tokenizer):
    option = forcing(character_tokenizer, ":", max_thinking_tokens=3)
    streamer = Collect()
    out = generate(llama, [option], PROMPT[1:2], streamer=streamer, **LONG)
    assert streamer.tokens == out[0].tolist()


def test_a_stop_string_ends_a_row_and_its_padding_is_no_thought(llama, character_tokenizer):
    plain = llama.generate(**INPUTS, **LONG)[1, 5:]
    place = next(place for place in range(1, NEW) if plain[place] > EOS and plain[place + 1] > EOS)
    stop = character_tokenizer.decode(plain[place : place + 2])
    option = forcing(character_tokenizer, ":", num_ignore=1)
    out = generate(
        llama, [option], **INPUTS, **{**LONG, "eos_token_id": EOS}, stop_strings=[stop], tokenizer=character_tokenizer,
        return_dict_in_generate=True,
    )  # fmt: skip
    assert out.sequences[1, 5 : 5 + place + 2].tolist() == plain[: place + 2].tolist()
    assert not out.sequences[1, 5 + place + 2 :].any()
    assert (out.thinking[1].tokens, out.thinking[1].ended) == (place + 2, "open")


def test_an_adapter_changes_nothing(llama, character_tokenizer):
    from peft import LoraConfig, get_peft_model

    end = natural_end(llama, character_tokenizer)
    option = forcing(character_tokenizer, end, max_thinking_tokens=9, num_ignore=1)
    plain = generate(llama, [option], **INPUTS, **LONG)
    adapted = get_peft_model(built("llama"), LoraConfig(r=2, target_modules="all-linear")).eval()
    assert torch.equal(plain, generate(adapted, [option], **INPUTS, **LONG))


@dataclass(frozen=True)
class Only:
    """Allows one token."""

    token: int
    slot: ClassVar[Any] = "logits"

    def prepare(self, model: Any, generate_kwargs: Mapping[str, Any]) -> dict[str, Any]:
        def around(loop: Any, model: Any, input_ids: Any, *, logits_processor: Any, **kwargs: Any) -> Any:
            return loop(model, input_ids, logits_processor=LogitsProcessorList([*logits_processor, self]), **kwargs)

        return around_loop(generate_kwargs, around)

    def __call__(self, input_ids: Any, scores: Any) -> Any:
        return torch.full_like(scores, -torch.inf).index_fill(1, torch.tensor([self.token]), 0.0)


@pytest.mark.parametrize("order", [1, -1])
def test_no_other_processor_undoes_what_is_forced(llama, character_tokenizer, order):
    option = forcing(character_tokenizer, ":", max_thinking_tokens=4)
    found = generate(llama, [option, Only(7)][::order], **INPUTS, **{**LONG, "do_sample": True, "top_k": 3})[:, 5:]
    assert (found[:, :4] == 7).all()
    assert found[0, 4:7].tolist() == character_tokenizer.encode("\n:.")
    assert (found[:, 7:] == 7).all()


def test_two_of_them_are_refused(llama, character_tokenizer):
    option = forcing(character_tokenizer, ":", num_ignore=1)
    with pytest.raises(ValueError, match="BudgetForcing and BudgetForcing both decide last which token"):
        generate(llama, [option, option], **INPUTS, **LONG)


def test_the_recipe_folder_is_the_same_code(llama, character_tokenizer, tmp_path, monkeypatch):
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    end = natural_end(llama, character_tokenizer)
    options = {"max_thinking_tokens": 9, "num_ignore": 2, "ignore_text": "W", "final_prefix": ".", "start_think": None}
    folder = shutil.copytree(RECIPE, tmp_path / "recipe")
    found = llama.generate(
        **INPUTS, **LONG, custom_generate=str(folder), trust_remote_code=True, tokenizer=character_tokenizer, end_think=end,
        **options,
    )  # fmt: skip
    assert torch.equal(found, generate(llama, [BudgetForcing(character_tokenizer, end, **options)], **INPUTS, **LONG))
    with pytest.raises(ValueError, match="needs the model's tokenizer"):
        llama.generate(**INPUTS, **LONG, custom_generate=str(folder), trust_remote_code=True)


# -- bad input ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"max_thinking_tokens": 0}, "max_thinking_tokens must be at least 1, not 0"),
        ({"max_answer_tokens": -1}, "max_answer_tokens must be at least 1"),
        ({"num_ignore": -1}, "num_ignore must be at least 0"),
        (
            {"max_thinking_tokens": 4, "min_thinking_tokens": 5},
            "min_thinking_tokens=5 is more than max_thinking_tokens=4",
        ),
    ],
)
def test_limits_that_contradict_each_other_are_refused(character_tokenizer, options, words):
    with pytest.raises(ValueError, match=words):
        forcing(character_tokenizer, ":", **options)


@pytest.mark.parametrize(
    ("options", "arguments", "words"),
    [
        ({"end_think": ""}, {}, "end_think='' tokenises to nothing"),
        ({"end_think": "Ö"}, {}, "end_think='Ö' tokenises to nothing that spells it"),
        ({"num_ignore": 1, "ignore_text": "Ö"}, {}, "ignore_text='Ö'"),
        ({"max_thinking_tokens": 22}, {}, "max_new_tokens=24 ends before the answer: max_thinking_tokens=22, 3 tokens of delim"),
        ({"max_thinking_tokens": 57}, {"max_new_tokens": 99}, "context of 64 tokens behind a prompt of 5 ends before the answer"),
        ({"max_thinking_tokens": "auto"}, {}, "leaves 0 tokens to thinking"),
        ({}, {"assistant_model": "one"}, "assistant_model drafts several"),
        ({}, {"num_beams": 2, "do_sample": True}, "does not draw the tokens of one sequence"),
        ({}, {"eos_token_id": 31}, "which ends a sequence of this model"),
        ({"max_answer_tokens": 2}, {}, "generation has no eos_token_id"),
    ],
)  # fmt: skip
def test_what_cannot_work_is_refused_with_the_reason(llama, character_tokenizer, options, arguments, words):
    eos = {"eos_token_id": character_tokenizer.encode(":")[0]} if "eos_token_id" in arguments else {}
    option = BudgetForcing(
        character_tokenizer, **{"end_think": ":", "start_think": None, "max_thinking_tokens": 3, "final_prefix": ".", **options}
    )  # fmt: skip
    with pytest.raises(ValueError, match=words):
        generate(llama, [option], **INPUTS, **{**LONG, **arguments, **eos})


def test_the_largest_maximum_that_fits_is_taken_where_it_is_left_open(llama, character_tokenizer):
    model = chain(told("abcd", character_tokenizer))
    option = forcing(character_tokenizer, ":", max_thinking_tokens="auto", max_answer_tokens=4)
    _, report = said(model, option, "a", eos_token_id=EOS)
    assert (report.tokens, report.answer_tokens) == (NEW - 3 - 4, 4)
    _, report = said(model, dataclasses.replace(option, max_answer_tokens=None), "a", max_new_tokens=150)
    assert report.tokens == 150 - 3 - 100
