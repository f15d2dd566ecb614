"""Principles on the command line: where they stand in the prompt, and what strengths mean."""

from __future__ import annotations

from typing import Any

import pytest

from trialist.data import assets
from trialist.decoding import ContrastiveGuidance, generate
from trialist.decoding.flags import FLAGS
from trialist.decoding.guidance.flags import GuidanceFlags, with_principle
from trialist.decoding.prompts import chat_prompt

OWN_SYSTEM = (
    "{% if messages[0]['role'] != 'system' %}<s>you are w</s>\n{% endif %}"
    "{% for m in messages %}<{{ m['role'][0] }}>{{ m['content'] }}</s>\n{% endfor %}<a>"
)
NO_DEFAULT = "{% for m in messages %}<{{ m['role'][0] }}>{{ m['content'] }}</s>\n{% endfor %}<a>"
REFUSING = "{% for m in messages %}{% if m['role'] == 'system' %}{{ raise_exception('no system') }}{% endif %}" + (
    "<{{ m['role'][0] }}>{{ m['content'] }}</s>\n{% endfor %}<a>"
)
SILENT = "{% for m in messages %}{% if m['role'] != 'system' %}" + (
    "<{{ m['role'][0] }}>{{ m['content'] }}</s>\n{% endif %}{% endfor %}"
)
USER = [{"role": "user", "content": "say hello"}]


@pytest.fixture
def tokenizer(character_tokenizer: Any) -> Any:
    character_tokenizer.chat_template = None
    yield character_tokenizer
    character_tokenizer.chat_template = None


def text_of(tokenizer: Any, template: str, messages: list[dict[str, str]]) -> str:
    tokenizer.chat_template = template
    return tokenizer.decode(with_principle(tokenizer, messages, "be short"))


def test_a_principle_ends_the_system_message_that_is_there(tokenizer):
    system = [{"role": "system", "content": "you are a cat"}]
    wanted = "<s>you are a cat\n\nbe short</s>\n<u>say hello</s>\n<a>".replace("\\\n", "\n")
    assert text_of(tokenizer, NO_DEFAULT, system + USER) == wanted
    assert text_of(tokenizer, OWN_SYSTEM, system + USER) == wanted


def test_a_principle_keeps_the_system_message_that_the_template_writes_itself(tokenizer):
    found = text_of(tokenizer, OWN_SYSTEM, USER)
    plain = tokenizer.decode(chat_prompt(tokenizer, USER).token_ids)
    assert found == plain.replace("you are w", "you are w\n\nbe short")
    assert text_of(tokenizer, NO_DEFAULT, USER).startswith("<s>be short</s>")


@pytest.mark.parametrize("template", [REFUSING, SILENT], ids=["refused", "dropped"])
def test_templates_without_system_messages_have_it_before_the_users_words(tokenizer, template):
    assert text_of(tokenizer, template, USER).startswith("<u>be short\n\nsay hello</s>")


def test_a_text_begins_with_the_principle(tokenizer):
    assert tokenizer.decode(with_principle(tokenizer, "once upon", "be short")) == "be short\n\nonce upon"


def test_without_a_principle_there_is_no_option(tokenizer):
    assert GuidanceFlags().options(None, tokenizer, ["once upon"]) == ()
    assert GuidanceFlags(guidance=3.0).options(None, tokenizer, ["once upon"]) == ()


def test_flags_become_the_option(tokenizer):
    flags = GuidanceFlags(("be short", "be nice"), (1.0, -0.5), 0.25, "two_step", 0.2)
    (option,) = flags.options(None, tokenizer, ["once upon", "a time"])
    assert isinstance(option, ContrastiveGuidance)
    assert (option.strength, option.values, option.steps, option.mask_alpha) == (0.25, (1.0, -0.5), 2, 0.2)
    assert [len(context) for context in option.contexts] == [2, 2]
    assert tokenizer.decode(option.contexts[1][1]) == "be nice\n\na time"


def test_the_entry_is_listed_and_neutral_by_default():
    assert FLAGS["guidance"] == f"{GuidanceFlags.__module__}:{GuidanceFlags.__name__}"


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"principle": (" ",)}, "--principle must be text"),
        (
            {"principle": ("a",), "principle_weights": (1.0, 2.0)},
            "--principle-weights must be one for each --principle: 2 for 1",
        ),
        ({"guidance": -0.5}, "--guidance must be at least 0"),
        ({"guidance_mask": 1.5}, "--guidance-mask must be between 0 and 1"),
    ],
    ids=["empty", "weights", "guidance", "mask"],
)
def test_values_out_of_range_name_their_flag(values, words):
    with pytest.raises(ValueError, match=words):
        GuidanceFlags(**values)


@pytest.mark.slow
@pytest.mark.asset
def test_a_principle_moves_the_answer_of_the_real_model():
    try:
        assets.path("smollm2-135m-instruct")
    except FileNotFoundError:
        pytest.skip("smollm2-135m-instruct was not fetched: trialist assets fetch smollm2-135m-instruct")
    from trialist.data.tokenizers import load_tokenizer
    from trialist.decoding.prompts import left_padded
    from trialist.models import load_model

    model, tokenizer = load_model("smollm2-135m-instruct"), load_tokenizer("smollm2-135m-instruct")
    questions = ["What is the capital of France?", "Name three animals that live in the sea, please."]
    messages = [[{"role": "user", "content": question}] for question in questions]
    prompts = [chat_prompt(tokenizer, conversation) for conversation in messages]
    inputs = left_padded(prompts, tokenizer.pad_token_id, model.device)
    answers = []
    for strength in (0.0, 1.0):
        flags = GuidanceFlags(("Answer in capital letters only.",), guidance=strength, guidance_mask=0.1)
        found = generate(model, flags.options(model, tokenizer, messages), **inputs, max_new_tokens=24, do_sample=False)
        answers.append(tokenizer.batch_decode(found[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True))
    capitals = [sum(map(str.isupper, "".join(texts))) / len("".join(texts)) for texts in answers]
    assert capitals[1] > capitals[0]
