"""Budget forcing through a server: equal to the option in greedy search, with the official client against a loopback server."""

from __future__ import annotations

import copy
import dataclasses
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest
import torch

from trialist.decoding import BudgetForcing, generate
from trialist.decoding.budget_forcing.driver import Reply, budget_force, from_model

from .test_budget_forcing import built

EOS = 2
TEMPLATE = (
    "{% for message in messages %}{{ message['role'][0] }}:{{ message['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}a:{% endif %}"
)
PROMPTS = ["abc", "what is", "x y z", "n."]


@pytest.fixture(scope="module")
def tokenizer(character_tokenizer) -> Any:
    tokenizer = copy.deepcopy(character_tokenizer)
    tokenizer.chat_template = TEMPLATE
    return tokenizer


@pytest.fixture(scope="module")
def model() -> Any:
    return built("llama")


def option_of(tokenizer: Any, **limits: Any) -> BudgetForcing:
    given = {"max_thinking_tokens": 14, "max_answer_tokens": 3, "final_prefix": ".", "ignore_text": "W,", **limits}
    return BudgetForcing(tokenizer, **{"end_think": ":", "start_think": None, **given})


def end_of(model: Any, tokenizer: Any, prompt: str) -> str:
    """A character with which the prompt is continued soon, and that spells no part of a special token: servers compare texts."""
    ids = torch.tensor([tokenizer.encode(prompt)])
    new = model.generate(ids, max_new_tokens=14, do_sample=False, pad_token_id=0)[0, ids.shape[1] + 2 :]
    return next(text for text in map(tokenizer.decode, new[:, None]) if len(text) == 1 and text not in "<pads/>")


LIMITS = {
    "maximum": {},
    "ends put off": {"num_ignore": 2},
    "one token to a string": {"num_ignore": 3, "ignore_text": "W"},
    "no string": {"num_ignore": 2, "ignore_text": ""},
    "minimum": {"min_thinking_tokens": 9},
    "all": {"num_ignore": 1, "min_thinking_tokens": 11, "max_thinking_tokens": 13},
}


@pytest.mark.parametrize("limits", LIMITS.values(), ids=LIMITS)
def test_the_rounds_are_the_option_token_for_token_in_greedy_search(model, tokenizer, limits):
    found_ends = set()
    for prompt in PROMPTS:
        forcing = option_of(tokenizer, end_think=end_of(model, tokenizer, prompt), **limits)
        (driven,) = budget_force(from_model(model, tokenizer, [EOS]), [prompt], forcing, eos_token_ids=[EOS])
        ids = torch.tensor([tokenizer.encode(prompt)])
        out = generate(
            model, [forcing], ids, eos_token_id=EOS, pad_token_id=0, do_sample=False, return_dict_in_generate=True
        )
        new = out.sequences[0, ids.shape[1] :].tolist()
        assert list(driven.ids) == [token for token in new if token != EOS]
        assert driven.report == out.thinking[0]
        assert driven.text == tokenizer.decode(driven.ids)
        assert driven.text.startswith(driven.thinking)
        assert driven.text.endswith(driven.answer)
        found_ends.add(driven.report.ended)
    assert found_ends & {"natural", "forced"}


class Server(ThreadingHTTPServer):
    """Speaks the OpenAI protocol on the loopback interface, by a model in this process."""

    daemon_threads = True

    def __init__(
        self, model: Any, tokenizer: Any, *, continues: bool = True, counts: bool = True, failures: int = 0
    ) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.client, self.tokenizer = from_model(model, tokenizer, [EOS]), tokenizer
        self.continues, self.counts, self.failures = continues, counts, failures
        self.lock, self.bodies = threading.Lock(), []

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}/v1"


class Handler(BaseHTTPRequestHandler):
    server: Server

    def log_message(self, *_: Any) -> None:
        pass

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with self.server.lock:
            self.server.bodies.append(body)
            if self.server.failures:
                self.server.failures -= 1
                return self.answer(503, {"error": {"message": "busy"}})
            if "messages" in body:
                ids = self.rendered(body)
            else:
                ids = (
                    body["prompt"] if isinstance(body["prompt"], list) else self.server.tokenizer.encode(body["prompt"])
                )
            banned = [int(token) for token, bias in (body.get("logit_bias") or {}).items() if bias == -100]
            reply = self.server.client(ids)(
                (),
                max_tokens=body["max_tokens"],
                stop=body.get("stop") or (),
                banned=banned,
                temperature=body["temperature"],
            )
        text = self.server.tokenizer.decode(reply.ids)
        choice = {"index": 0, "finish_reason": reply.finished, "logprobs": None}
        choice |= {"message": {"role": "assistant", "content": text}} if "messages" in body else {"text": text}
        usage = {"prompt_tokens": len(ids), "completion_tokens": len(reply.ids), "total_tokens": 0}
        kind = "chat.completion" if "messages" in body else "text_completion"
        answer = {"id": "1", "object": kind, "created": 0, "model": body["model"], "choices": [choice]}
        return self.answer(200, {**answer, **({"usage": usage} if self.server.counts else {})})

    def rendered(self, body: dict[str, Any]) -> list[int]:
        goes_on = bool(body.get("continue_final_message")) and self.server.continues
        text = self.server.tokenizer.apply_chat_template(
            body["messages"], tokenize=False, continue_final_message=goes_on, add_generation_prompt=not goes_on
        )
        return self.server.tokenizer.encode(text)

    def answer(self, status: int, body: dict[str, Any]) -> None:
        content = json.dumps(body).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)


@pytest.fixture
def serving(model, tokenizer):
    import openai

    servers = []

    def start(retries: int = 0, **options: Any) -> tuple[Any, Server]:
        server = Server(model, tokenizer, **options)
        servers.append(server)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        return openai.OpenAI(base_url=server.url, api_key="none", max_retries=retries), server

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


@pytest.mark.parametrize("send", ["ids", "text"])
def test_the_official_client_brings_the_same_for_many_prompts_at_a_time(serving, model, tokenizer, send):
    client, server = serving()
    forcing = option_of(tokenizer, num_ignore=2, end_think=end_of(model, tokenizer, PROMPTS[0]))
    driven = budget_force(client, PROMPTS, forcing, model="m", eos_token_ids=[EOS], send=send, concurrency=3)
    local = budget_force(from_model(model, tokenizer, [EOS]), PROMPTS, forcing, eos_token_ids=[EOS], concurrency=1)
    assert driven == local
    assert sum(completion.requests for completion in driven) == len(server.bodies)


def test_the_budget_is_one_for_all_rounds(serving, model, tokenizer):
    client, server = serving()
    forcing = option_of(tokenizer, num_ignore=2, end_think=end_of(model, tokenizer, PROMPTS[0]))
    (driven,) = budget_force(client, PROMPTS[:1], forcing, model="m", eos_token_ids=[EOS])
    rounds = [
        (len(body["prompt"]) - len(tokenizer.encode(PROMPTS[0])), body["max_tokens"]) for body in server.bodies[:-1]
    ]
    assert len(rounds) > 1
    assert all(written + most == 14 for written, most in rounds if most != 1)
    assert driven.report.tokens <= 14
    assert server.bodies[-1]["max_tokens"] == 3


def test_messages_are_continued_and_equal_the_rendered_prompt(serving, model, tokenizer):
    client, _ = serving()
    messages = [{"role": "user", "content": "abc"}]
    forcing = option_of(tokenizer, num_ignore=1, end_think=end_of(model, tokenizer, "u:abc\na:"))
    (talked,) = budget_force(client, [messages], forcing, model="m", eos_token_ids=[EOS], api="chat")
    (written,) = budget_force(client, ["u:abc\na:"], forcing, model="m", eos_token_ids=[EOS])
    assert talked == written


@pytest.mark.parametrize(
    ("options", "words"),
    [({"continues": False}, "does not continue .* it read"), ({"counts": False}, "it does not count tokens")],
)
def test_a_server_that_does_not_continue_a_message_is_refused(serving, model, tokenizer, options, words):
    client, _ = serving(**options)
    with pytest.raises(ValueError, match=words):
        budget_force(client, [[{"role": "user", "content": "abc"}]], option_of(tokenizer), model="m", api="chat")


def test_errors_are_retried_by_the_client_and_then_come_with_the_prompt(serving, tokenizer):
    import openai

    client, _ = serving(retries=2, failures=2)
    assert len(budget_force(client, PROMPTS[:1], option_of(tokenizer), model="m", eos_token_ids=[EOS])) == 1
    client, _ = serving(failures=9)
    with pytest.raises(openai.InternalServerError) as caught:
        budget_force(client, PROMPTS[:1], option_of(tokenizer), model="m", eos_token_ids=[EOS])
    assert caught.value.__notes__ == ["prompt 0 of 1"]


def test_a_server_that_ends_what_must_go_on_is_found_out(tokenizer):
    def client(before: Any) -> Any:
        return lambda ids, **_: Reply((), "stop")

    with pytest.raises(ValueError, match="ignores logit_bias"):
        budget_force(client, ["abc"], option_of(tokenizer, min_thinking_tokens=2))


def test_a_segment_that_the_prompt_opens_is_gone_on_with(model, tokenizer):
    forcing = option_of(tokenizer, start_think="<>")
    client = from_model(model, tokenizer, [EOS])
    assert budget_force(client, ["ab<>"], forcing, eos_token_ids=[EOS])[0].report.tokens > 0
    with pytest.raises(ValueError, match="prompt 1 does not open a thinking segment with '<>'"):
        budget_force(client, ["ab<>", "ab"], forcing, eos_token_ids=[EOS], concurrency=1)


@pytest.mark.parametrize(
    ("limits", "options", "words"),
    [
        ({"max_thinking_tokens": None}, {}, "a server needs a number for every request"),
        ({"max_thinking_tokens": "auto"}, {}, "not auto and 3"),
        ({"max_answer_tokens": None}, {}, "max_answer_tokens as numbers"),
        ({}, {"concurrency": 0}, "concurrency must be at least 1"),
        ({}, {"api": "chat"}, "takes prompts that are lists of messages"),
    ],
)
def test_what_cannot_be_asked_of_a_server_is_refused(model, tokenizer, limits, options, words):
    forcing = dataclasses.replace(option_of(tokenizer), **limits)
    with pytest.raises(ValueError, match=words):
        budget_force(from_model(model, tokenizer, [EOS]), ["abc"], forcing, **options)
