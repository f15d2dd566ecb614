"""Batches of prompts under settings: plain generation at neutral ones, rows that end by themselves, what is reported."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import transformers

from trialist.decoding import flags
from trialist.decoding.prompts import chat_prompt, left_padded, text_prompt, token_limit, token_prompt
from trialist.decoding.running import Continuation, run
from trialist.decoding.settings import Sampling, Settings, flag_classes, neutral
from trialist.models import initialize_

from ..models.conftest import FAMILIES, sharpen

TEXTS = ("once upon a time ", "a", "the cat sat on the mat")


def prompts_of(tokenizer: Any, texts: Sequence[str] = TEXTS) -> list[Any]:
    return [text_prompt(tokenizer, text) for text in texts]


def with_sampling(**values: Any) -> Settings:
    return dataclasses.replace(neutral(), sampling=Sampling(**values))


@pytest.mark.parametrize("family_name", ["llama", "gpt2", "qwen3"])
@pytest.mark.parametrize(
    "sampling",
    [{}, {"temperature": 0.7, "top_p": 0.9, "seed": 5}, {"temperature": 1.5, "num_sequences": 2, "seed": 1},
     {"num_beams": 3}, {"num_beams": 3, "num_sequences": 2}],
    ids=str,
)  # fmt: skip
def test_neutral_settings_are_plain_generate_token_for_token(character_tokenizer, family_name, sampling):
    model = transformers.AutoModelForCausalLM.from_config(FAMILIES[family_name]())
    initialize_(model, 0)
    sharpen(model.eval())
    prompts = prompts_of(character_tokenizer)
    batch = run(model, character_tokenizer, with_sampling(max_new_tokens=9, **sampling), prompts)
    torch.manual_seed(sampling.get("seed", 0))
    inputs = character_tokenizer(list(TEXTS), return_tensors="pt", padding=True, return_token_type_ids=False)
    arguments = {"temperature": sampling.get("temperature", 1.0), "do_sample": "temperature" in sampling}
    arguments |= {"top_p": sampling["top_p"]} if "top_p" in sampling else {}
    n = sampling.get("num_sequences", 1)
    plain = model.generate(**inputs, **arguments, num_beams=sampling.get("num_beams", 1), num_return_sequences=n,
                           max_new_tokens=9, pad_token_id=0, eos_token_id=2)  # fmt: skip
    expected = [row[inputs["input_ids"].shape[1] :].tolist() for row in plain]
    expected = [row[: row.index(2) + 1] if 2 in row else row for row in expected]
    assert [row.tokens for row in batch.rows] == expected
    texts = [character_tokenizer.decode([t for t in row if t > 2]) for row in expected]
    assert [row.text for row in batch.rows] == texts
    assert [row.finish for row in batch.rows] == ["stop" if 2 in row else "length" for row in expected]


def test_what_a_generation_config_says_of_sampling_raises_no_warning_in_greedy_search(
    byte_model, chat_tokenizer, caplog
):
    before = byte_model.generation_config
    byte_model.generation_config = transformers.GenerationConfig(
        do_sample=True, temperature=0.6, top_p=0.9, max_new_tokens=4
    )
    try:
        settings = with_sampling(temperature=0.0)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            batch = run(byte_model, chat_tokenizer, settings, prompts_of(chat_tokenizer))
        assert [len(row.tokens) for row in batch.rows] == [4, 4, 4]
        assert batch.seed is None
        assert not [record for record in caplog.records if "generation flags" in record.message]
        assert Sampling().describe(byte_model) == "sampling at temperature 0.6, top-p 0.9, top-k 50"
        assert run(byte_model, chat_tokenizer, neutral(), prompts_of(chat_tokenizer)).seed is not None
    finally:
        byte_model.generation_config = before


def test_rows_of_a_batch_have_limits_and_stops_of_their_own(byte_model, chat_tokenizer):
    prompts = prompts_of(chat_tokenizer)
    free = run(byte_model, chat_tokenizer, with_sampling(max_new_tokens=20), prompts)
    stop = free.rows[2].text[3:5]
    cut = run(byte_model, chat_tokenizer, neutral(), prompts, limits=[3, 20, 20], stops=[(), (), (stop,)])
    assert cut.rows[0].tokens == free.rows[0].tokens[:3]
    assert cut.rows[1].tokens == free.rows[1].tokens
    assert cut.rows[2].text == free.rows[2].text[: free.rows[2].text.index(stop)]
    assert [row.finish for row in cut.rows] == ["length", "length", "stop"]


@pytest.mark.parametrize("beams", [1, 3])
def test_stop_strings_end_the_search_and_are_cut_off(byte_model, chat_tokenizer, beams):
    prompts = prompts_of(chat_tokenizer, TEXTS[:1])
    free = run(byte_model, chat_tokenizer, with_sampling(max_new_tokens=30, num_beams=beams), prompts).rows[0]
    stop = free.text[4:6]
    found = run(
        byte_model, chat_tokenizer, with_sampling(max_new_tokens=30, num_beams=beams, stop=(stop,)), prompts
    ).rows[0]
    assert found.finish == "stop"
    assert stop not in found.text
    if beams == 1:
        assert found.text == free.text[: free.text.index(stop)]
        assert len(found.tokens) < 30


def test_a_batch_ends_when_nobody_waits_for_it(byte_model, chat_tokenizer):
    told: list[tuple[int, str]] = []
    batch = run(
        byte_model, chat_tokenizer, with_sampling(max_new_tokens=50), prompts_of(chat_tokenizer),
        tell=lambda at, text, logprobs: told.append((at, text)), given_up=lambda at: len(told) > 8 + at,
    )  # fmt: skip
    assert {row.finish for row in batch.rows} == {"cancelled"}
    assert max(len(row.tokens) for row in batch.rows) < 15
    assert "".join(text for at, text in told if at == 1) == batch.rows[1].text


def test_log_probabilities_are_those_of_the_model_before_everything_else(byte_model, chat_tokenizer, scripted):
    said = "stop here"
    settings = neutral().replace({"say": said, "temperature": 0.3, "top_k": 2, "repetition_penalty": 1.7})
    prompts = prompts_of(chat_tokenizer, TEXTS[:2])
    batch = run(byte_model, chat_tokenizer, settings, prompts, top_logprobs=3)
    for prompt, row in zip(prompts, batch.rows):
        ids = torch.tensor([[*prompt.token_ids, *said.encode()]])
        with torch.no_grad():
            logits = byte_model(ids).logits[0].double()
        expected = (logits - logits.logsumexp(-1, keepdim=True))[len(prompt.token_ids) - 1 : -1]
        assert [entry.token for entry in row.logprobs] == list(said.encode())
        assert [entry.start for entry in row.logprobs] == list(range(len(said)))
        for entry, place in zip(row.logprobs, expected):
            assert entry.logprob == pytest.approx(place[entry.token].item(), abs=1e-4)
            values, ids = place.topk(3)
            assert [token for token, _ in entry.top] == ids.tolist()
            assert [value for _, value in entry.top] == pytest.approx(values.tolist(), abs=1e-4)


def test_options_learn_the_prompts_and_what_they_report_is_told_row_by_row(byte_model, chat_tokenizer, scripted):
    settings = neutral().replace({"say": "four", "num_sequences": 2, "temperature": 1.0})
    prompts = [chat_prompt(chat_tokenizer, [{"role": "user", "content": text}]) for text in TEXTS]
    batch = run(byte_model, chat_tokenizer, settings, prompts)
    assert [row.text for row in batch.rows] == ["four"] * 6
    assert batch.rows[3].report == {"script_length": 5, "average_place": 2.0}
    assert batch.report["cache_bytes"] > 0
    assert settings.asked() == {"say": "four"}
    longest = max(len(prompt.token_ids) for prompt in prompts) + 4
    assert (
        batch.report["cache_bytes"] >= 2 * 2 * 6 * 3 * 4 * longest * 4
    )  # layers, keys and values, rows, heads, width, bytes


def test_text_is_told_as_it_comes(byte_model, chat_tokenizer, scripted):
    told: list[str] = []
    run(byte_model, chat_tokenizer, neutral().replace({"say": "aé👩b"}), prompts_of(chat_tokenizer, ["x"]),
        tell=lambda at, text, logprobs: told.append(text))  # fmt: skip
    assert told == ["a", "é", "👩", "b"]


def test_the_same_seed_draws_the_same_and_another_one_something_else(byte_model, chat_tokenizer):
    prompts = prompts_of(chat_tokenizer)

    def texts(seed: int | None) -> list[str]:
        settings = with_sampling(max_new_tokens=12, temperature=1.0, seed=seed)
        return [row.text for row in run(byte_model, chat_tokenizer, settings, prompts).rows]

    assert texts(3) == texts(3) != texts(4)
    assert texts(None) != texts(None)


def test_a_continued_text_keeps_the_space_of_its_first_word(byte_model):
    from transformers import PreTrainedTokenizerBase

    from trialist.decoding.detokenizer import Detokenizer

    class Words:
        def decode(self, ids: Sequence[int], **_: Any) -> str:
            return " ".join(f"w{i}" for i in ids)

    tokenizer: PreTrainedTokenizerBase = Words()  # type: ignore[assignment]
    assert Detokenizer(tokenizer, [1, 2]).push(3) == " w3"
    assert Detokenizer(tokenizer).push(3) == "w3"


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"max_new_tokens": 0}, "--max-new-tokens must be at least 1, not 0"),
        ({"temperature": -1.0}, "--temperature must be 0"),
        ({"temperature": float("nan")}, "--temperature must be 0"),
        ({"top_p": 1.5}, "--top-p must be between 0 and 1"),
        ({"top_k": -1}, "--top-k must be at least 0"),
        ({"stop": ("a", "")}, "--stop must be text"),
        ({"num_beams": 2, "num_sequences": 3}, "--num-sequences must be at most --num-beams 2"),
        ({"repetition_penalty": 0.0}, "--repetition-penalty must be a number above 0"),
        ({"seed": 2**63}, "--seed must be"),
    ],
)  # fmt: skip
def test_sampling_out_of_range_is_refused_with_the_flag(values, words):
    with pytest.raises(ValueError, match=words):
        Sampling(**values)


def test_several_sequences_of_greedy_search_are_refused(byte_model, chat_tokenizer):
    with pytest.raises(ValueError, match="would all be the same"):
        run(byte_model, chat_tokenizer, with_sampling(num_sequences=2), prompts_of(chat_tokenizer))


def test_a_choice_among_the_likely_is_sampling(byte_model):
    assert Sampling(top_p=0.5).samples(byte_model)
    assert Sampling(top_k=3).samples(byte_model)
    assert not Sampling(top_p=1.0, top_k=0).samples(byte_model)
    assert not Sampling(top_p=0.5, temperature=0.0).samples(byte_model)


def test_the_context_is_kept_with_both_lengths_in_the_error(byte_model, chat_tokenizer):
    prompt = text_prompt(chat_tokenizer, "x" * 500)
    assert token_limit(byte_model, prompt, None) == 12
    assert token_limit(byte_model, prompt, 12) == 12
    with pytest.raises(ValueError, match=r"500 tokens, and with 13 new ones .* context of 512"):
        token_limit(byte_model, prompt, 13)
    with pytest.raises(ValueError, match=r"512 tokens and the model's context is 512"):
        token_limit(byte_model, text_prompt(chat_tokenizer, "x" * 512), None)
    batch = run(byte_model, chat_tokenizer, neutral(), [prompt])
    assert len(batch.rows[0].tokens) == 12


def test_empty_prompts_and_conversations_that_a_template_refuses_are_told(chat_tokenizer, character_tokenizer):
    with pytest.raises(ValueError, match="empty"):
        text_prompt(chat_tokenizer, "")
    with pytest.raises(ValueError, match="empty"):
        chat_prompt(chat_tokenizer, [{"role": "user", "content": " "}])
    with pytest.raises(ValueError, match="no chat template"):
        chat_prompt(character_tokenizer, [{"role": "user", "content": "a"}])
    with pytest.raises(ValueError, match="the token 259; the model's are 0 to 258"):
        token_prompt(chat_tokenizer, [1, 259])
    chat_tokenizer.chat_template, before = "{{ raise_exception('roles must alternate') }}", chat_tokenizer.chat_template
    try:
        with pytest.raises(ValueError, match="roles must alternate"):
            chat_prompt(chat_tokenizer, [{"role": "user", "content": "a"}])
    finally:
        chat_tokenizer.chat_template = before


def test_padding_is_on_the_left(chat_tokenizer):
    inputs = left_padded(prompts_of(chat_tokenizer, ["abc", "d"]), 9, torch.device("cpu"))
    assert inputs["input_ids"].tolist() == [[97, 98, 99], [9, 9, 100]]
    assert inputs["attention_mask"].tolist() == [[1, 1, 1], [0, 0, 1]]


def test_two_techniques_with_one_flag_are_refused_with_both_names(monkeypatch):
    @dataclass(frozen=True)
    class Other:
        say: str = ""

    monkeypatch.setitem(flags.FLAGS, "scripted", "tests.decoding.fake_technique:ScriptedFlags")
    monkeypatch.setattr("tests.decoding.fake_technique.Other", Other, raising=False)
    monkeypatch.setitem(flags.FLAGS, "other", "tests.decoding.fake_technique:Other")
    with pytest.raises(ValueError, match="--say is of both scripted and other"):
        flag_classes()


def test_values_of_json_are_checked_like_options(scripted):
    pytest.importorskip("pydantic", reason="the extra `serve` is not installed")
    settings = neutral()
    changed = settings.replace_json({"say": "a", "temperature": 1, "stop": ["x"]})
    assert (changed.asked(), changed.sampling.temperature, changed.sampling.stop) == ({"say": "a"}, 1.0, ("x",))
    wrong: Mapping[str, Any]
    for wrong in ({"say": 3}, {"step_seconds": "fast"}, {"top_k": 1.5}, {"stop": "x"}, {"seed": True}):
        with pytest.raises(ValueError, match=f"^{next(iter(wrong))}: "):
            settings.replace_json(wrong)
    with pytest.raises(ValueError, match="--step-seconds must be at least 0"):
        settings.replace_json({"step_seconds": -1.0})


def test_a_row_takes_nothing_after_its_end():
    from trialist.decoding.detokenizer import StopStrings

    class Letters:
        def push(self, token: int) -> str:
            return chr(token)

        def flush(self) -> str:
            return ""

    row = Continuation(3, frozenset({0}), Letters(), StopStrings(["zz"]))  # type: ignore[arg-type]
    for token in b"abcd":
        row.push(token)
    assert (row.text, row.tokens, row.finish) == ("abc", list(b"abc"), "length")
