"""The OpenAI-compatible server, asked by the official client over loopback."""

from __future__ import annotations

import contextlib
import dataclasses
import http.client
import json
import math
import socket
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch

openai = pytest.importorskip("openai", reason="the extra `dev` is not installed")
uvicorn = pytest.importorskip("uvicorn", reason="the extra `serve` is not installed")

from trialist.decoding import flags  # noqa: E402
from trialist.decoding.prompts import chat_prompt  # noqa: E402
from trialist.decoding.running import run  # noqa: E402
from trialist.decoding.server import app as application  # noqa: E402
from trialist.decoding.server.app import build_app  # noqa: E402
from trialist.decoding.settings import Sampling, neutral  # noqa: E402

from .fake_technique import FLAGS  # noqa: E402

NAME = "tiny"
HELLO = [{"role": "user", "content": "hello"}]


class Steps:
    """Counts forward passes of a model, and their rows."""

    def __init__(self, model: Any) -> None:
        self.rows: list[int] = []
        self.handle = model.register_forward_pre_hook(self.count, with_kwargs=True)

    def count(self, module: Any, arguments: Any, keywords: Any) -> None:
        self.rows.append((keywords["input_ids"] if "input_ids" in keywords else arguments[0]).shape[0])

    def settled(self) -> int:
        """How many there are once none has been added for a while."""
        while True:
            before = len(self.rows)
            time.sleep(0.3)
            if len(self.rows) == before:
                return before


@contextlib.contextmanager
def served(model: Any, tokenizer: Any, **options: Any) -> Iterator[Any]:
    """A running server: `url`, `port`, `worker`, `client(...)`."""
    options = {"defaults": neutral().replace({"max_new_tokens": 12}), **options}
    app = build_app(model, tokenizer, NAME, **options)
    listener = socket.socket()
    listener.bind(("127.0.0.1", 0))
    runner = uvicorn.Server(uvicorn.Config(app, log_level="error", lifespan="on", timeout_graceful_shutdown=3))
    thread = threading.Thread(target=runner.run, kwargs={"sockets": [listener]}, daemon=True)
    thread.start()
    while not runner.started:
        assert thread.is_alive()
        time.sleep(0.01)
    port = listener.getsockname()[1]

    class Place:
        url = f"http://127.0.0.1:{port}"
        worker = app.state.worker
        steps = Steps(model)
        stop = staticmethod(lambda: setattr(runner, "should_exit", True))

        @staticmethod
        def client(**settings: Any) -> Any:
            plain = openai.DefaultHttpxClient(verify=False, trust_env=False)  # certificates take long to read
            settings = {"api_key": "none", "max_retries": 0, "timeout": 60, "http_client": plain, **settings}
            return openai.OpenAI(base_url=f"{Place.url}/v1", **settings)

        @staticmethod
        def raw(method: str, path: str, body: bytes | None = None, **headers: str) -> tuple[int, dict[str, Any], Any]:
            connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
            connection.request(method, path, body, {"Content-Type": "application/json", **headers})
            answer = connection.getresponse()
            content = answer.read()
            connection.close()
            return answer.status, dict(answer.getheaders()), content

    try:
        yield Place
    finally:
        runner.should_exit = True
        thread.join(20)
        Place.steps.handle.remove()
        assert not thread.is_alive()
        assert not Place.worker.alive


@pytest.fixture(scope="module")
def place(byte_model, chat_tokenizer):
    """A server with the technique that says what it is told to."""
    with pytest.MonkeyPatch.context() as patch:
        for technique, path in FLAGS.items():
            patch.setitem(flags.FLAGS, technique, path)
        with served(byte_model, chat_tokenizer, most_waiting=40) as found:
            yield found


@pytest.fixture(scope="module")
def client(place):
    return place.client()


def expected(model: Any, tokenizer: Any, messages: Any = HELLO, **sampling: Any) -> list[str]:
    prompt = chat_prompt(tokenizer, messages)
    settings = dataclasses.replace(neutral(), sampling=Sampling(**{"max_new_tokens": 12, **sampling}))
    return [row.text for row in run(model, tokenizer, settings, [prompt]).rows]


def ask(client: Any, **arguments: Any) -> Any:
    return client.chat.completions.create(**{"model": NAME, "messages": HELLO, **arguments})


def test_an_answer_is_that_of_the_model_with_its_lengths(client, byte_model, chat_tokenizer):
    answer = ask(client)
    (text,) = expected(byte_model, chat_tokenizer)
    (choice,) = answer.choices
    assert (choice.message.content, choice.message.role, choice.finish_reason) == (text, "assistant", "length")
    length = len(chat_prompt(chat_tokenizer, HELLO).token_ids)
    assert answer.usage.model_dump(exclude_none=True) == {
        "prompt_tokens": length,
        "completion_tokens": 12,
        "total_tokens": length + 12,
    }
    assert (answer.object, answer.model, answer.id[:9]) == ("chat.completion", NAME, "chatcmpl-")
    assert answer.x_trialist["decoding"] == "greedy search"
    assert answer.x_trialist["choices"][0]["cache_bytes"] > 0


def test_a_stream_brings_role_text_end_and_usage_in_this_order(client, byte_model, chat_tokenizer):
    chunks = list(ask(client, stream=True, stream_options={"include_usage": True}))
    assert (chunks[0].choices[0].delta.role, chunks[0].choices[0].delta.content) == ("assistant", "")
    pieces = [chunk.choices[0].delta.content for chunk in chunks[1:-2]]
    assert "".join(pieces) == expected(byte_model, chat_tokenizer)[0]
    assert len(pieces) > 6
    assert chunks[-2].choices[0].finish_reason == "length"
    assert chunks[-2].choices[0].delta.content is None
    assert chunks[-1].choices == []
    assert chunks[-1].usage.completion_tokens == 12
    assert all(chunk.usage is None for chunk in chunks[:-1])
    assert len({chunk.id for chunk in chunks}) == 1
    assert [chunk.choices[0].finish_reason for chunk in chunks[:-2]] == [None] * (len(chunks) - 2)


def test_the_lines_of_a_stream_end_with_done(place):
    body = json.dumps({"model": NAME, "messages": HELLO, "stream": True}).encode()
    status, headers, content = place.raw("POST", "/v1/chat/completions", body)
    assert status == 200
    assert headers["content-type"].startswith("text/event-stream")
    lines = content.decode().split("\n\n")
    assert lines[-2:] == ["data: [DONE]", ""]
    assert all(line.startswith("data: ") for line in lines[:-1])
    assert not any("usage" in json.loads(line[6:]) for line in lines[:-2])  # none was asked for


def test_several_choices_are_drawn_and_repeatable_by_their_seed(client, byte_model, chat_tokenizer):
    drawn = [ask(client, n=2, temperature=1.3, seed=11) for _ in range(2)]
    texts = [[choice.message.content for choice in answer.choices] for answer in drawn]
    assert texts[0] == texts[1] == expected(byte_model, chat_tokenizer, temperature=1.3, num_sequences=2, seed=11)
    assert texts[0][0] != texts[0][1]
    assert drawn[0].usage.completion_tokens == 24
    assert [choice.index for choice in drawn[0].choices] == [0, 1]
    streamed = ["", ""]
    for chunk in ask(client, n=2, temperature=1.3, seed=11, stream=True):
        for choice in chunk.choices:
            streamed[choice.index] += choice.delta.content or ""
    assert streamed == texts[0]
    other = ask(client, n=2, temperature=1.3)
    assert [choice.message.content for choice in other.choices] != texts[0]
    seed = other.x_trialist["choices"][0]["seed"]
    again = ask(client, n=2, temperature=1.3, seed=seed)
    assert [choice.message.content for choice in again.choices] == [choice.message.content for choice in other.choices]


@pytest.mark.parametrize("stop", ["lo w", ["never", "wond", "lo w"]])
def test_a_stop_string_over_several_tokens_ends_the_text_before_it(client, stop):
    extra = {"say": "hello wonderful world"}
    answer = ask(client, stop=stop, max_tokens=100, extra_body=extra)
    assert (answer.choices[0].message.content, answer.choices[0].finish_reason) == ("hel", "stop")
    assert answer.usage.completion_tokens == len("hello w")
    chunks = list(ask(client, stop=stop, max_tokens=100, extra_body=extra, stream=True))
    pieces = [chunk.choices[0].delta.content or "" for chunk in chunks]
    assert "".join(pieces) == "hel"
    assert chunks[-1].choices[0].finish_reason == "stop"


def test_a_beginning_of_a_stop_string_that_does_not_go_on_is_given(client):
    answer = ask(client, stop=["hello!"], max_tokens=7, extra_body={"say": "aha hello"})
    assert (answer.choices[0].message.content, answer.choices[0].finish_reason) == ("aha hel", "length")
    whole = ask(client, stop=["hello!"], max_tokens=50, extra_body={"say": "aha hello"})
    assert (whole.choices[0].message.content, whole.choices[0].finish_reason) == ("aha hello", "stop")


def test_characters_of_several_tokens_are_never_cut(client):
    said = "👩‍🔬 grüßt 世界"
    chunks = list(ask(client, max_tokens=100, stream=True, extra_body={"say": said}))
    pieces = [chunk.choices[0].delta.content or "" for chunk in chunks]
    assert "".join(pieces) == said
    assert not any("\ufffd" in piece for piece in pieces)
    assert len([piece for piece in pieces if piece]) == len(said)
    assert ask(client, max_tokens=3, extra_body={"say": said}).choices[0].message.content == "\ufffd"


def test_log_probabilities_are_those_of_the_model_for_each_token(client, byte_model, chat_tokenizer):
    said = "aé"
    (choice,) = ask(
        client, max_tokens=20, temperature=0.4, logprobs=True, top_logprobs=2, extra_body={"say": said}
    ).choices
    ids = [*chat_prompt(chat_tokenizer, HELLO).token_ids, *said.encode()]
    with torch.no_grad():
        logits = byte_model(torch.tensor([ids])).logits[0, -4:-1].double()
    values = logits.log_softmax(-1)
    assert [entry.bytes for entry in choice.logprobs.content] == [[byte] for byte in said.encode()]
    for entry, byte, row in zip(choice.logprobs.content, said.encode(), values):
        assert entry.logprob == pytest.approx(row[byte].item(), abs=1e-4)
        assert [top.logprob for top in entry.top_logprobs] == pytest.approx(row.topk(2).values.tolist(), abs=1e-4)
    streamed = [
        entry.logprob
        for chunk in ask(client, max_tokens=20, temperature=0.4, logprobs=True, stream=True, extra_body={"say": said})
        for entry in (chunk.choices[0].logprobs.content if chunk.choices[0].logprobs else ())
    ]
    assert streamed == pytest.approx([entry.logprob for entry in choice.logprobs.content], abs=1e-6)
    plain = client.completions.create(model=NAME, prompt="x", logprobs=2, max_tokens=9, extra_body={"say": said})
    logprobs = plain.choices[0].logprobs
    assert logprobs.text_offset == [0, 1, 1]
    assert len(logprobs.top_logprobs[0]) == 2
    assert logprobs.tokens == ["a", "\ufffd", "\ufffd"]
    assert ask(client).choices[0].logprobs is None


def test_tokens_after_a_stop_string_have_no_log_probabilities(client):
    (choice,) = ask(client, stop="lo", logprobs=True, extra_body={"say": "hello"}).choices
    assert [entry.token for entry in choice.logprobs.content] == ["h", "e", "l"]


def test_plain_completions_take_texts_and_tokens_one_or_several(client, chat_tokenizer):
    texts = ["once upon", "the cat"]
    several = client.completions.create(model=NAME, prompt=texts, max_tokens=7)
    assert [choice.index for choice in several.choices] == [0, 1]
    alone = [client.completions.create(model=NAME, prompt=text, max_tokens=7).choices[0].text for text in texts]
    assert [choice.text for choice in several.choices] == alone
    tokens = client.completions.create(model=NAME, prompt=list(texts[0].encode()), max_tokens=7)
    assert tokens.choices[0].text == alone[0]
    both = client.completions.create(model=NAME, prompt=[list(text.encode()) for text in texts], max_tokens=7)
    assert [choice.text for choice in both.choices] == alone
    assert both.usage.prompt_tokens == sum(map(len, texts))
    pieces = ["", ""]
    for chunk in client.completions.create(model=NAME, prompt=texts, max_tokens=7, stream=True):
        pieces[chunk.choices[0].index] += chunk.choices[0].text
    assert pieces == alone


def test_options_of_a_request_are_echoed_with_what_they_report(client):
    answer = ask(client, extra_body={"say": "yes", "top_k": 3, "num_beams": 2})
    assert answer.x_trialist["options"] == {"say": "yes"}
    assert answer.x_trialist["decoding"] == "search with 2 beams, sampling at temperature 1, top-k 3"
    answer = ask(client, extra_body={"say": "yes"})
    assert answer.x_trialist["choices"][0]["script_length"] == 4
    assert answer.x_trialist["choices"][0]["average_place"] == 1.5
    chunks = list(ask(client, stream=True, extra_body={"say": "yes"}))
    assert chunks[-1].x_trialist["choices"][0]["script_length"] == 4


def test_beams_come_at_the_end_of_a_stream(client, byte_model, chat_tokenizer):
    chunks = ask(client, stream=True, extra_body={"num_beams": 3})
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
    assert text == expected(byte_model, chat_tokenizer, num_beams=3)[0]


def test_options_of_the_command_line_are_defaults_of_requests(byte_model, chat_tokenizer, scripted):
    defaults = neutral().replace({"say": "by default", "max_new_tokens": 5, "stop": ("u",)})
    with served(byte_model, chat_tokenizer, defaults=defaults, system="be brief") as place:
        client = place.client()
        assert ask(client).choices[0].message.content == "by de"
        assert ask(client, max_tokens=50).choices[0].message.content == "by defa"
        answer = ask(client, max_completion_tokens=50, stop="e", extra_body={"say": ""})
        system = [{"role": "system", "content": "be brief"}, *HELLO]
        assert answer.usage.prompt_tokens == len(chat_prompt(chat_tokenizer, system).token_ids)
        own = [{"role": "developer", "content": "shout"}, *HELLO]
        answer = ask(client, messages=own)
        own[0] = {"role": "system", "content": "shout"}
        assert answer.usage.prompt_tokens == len(chat_prompt(chat_tokenizer, own).token_ids)


def test_a_client_that_hangs_up_ends_the_work(place, client):
    started = len(place.steps.rows)
    stream = ask(client, stream=True, max_tokens=400, extra_body={"say": "a" * 400, "step_seconds": 0.02})
    for number, _ in enumerate(stream):
        if number == 4:
            break
    stream.close()
    assert place.steps.settled() - started < 100
    started = len(place.steps.rows)
    with pytest.raises(openai.APITimeoutError):
        ask(place.client(timeout=0.6), max_tokens=400, extra_body={"say": "a" * 400, "step_seconds": 0.02})
    assert 3 < place.steps.settled() - started < 100
    assert ask(client).choices[0].finish_reason == "length"  # and the server goes on


def test_twenty_clients_at_once_get_what_each_would_get_alone(place, byte_model, chat_tokenizer):
    conversations = [[{"role": "user", "content": "word " * (number % 5) + str(number)}] for number in range(20)]

    def one(number: int) -> str:
        with place.client() as client:
            if number % 2:
                return ask(client, messages=conversations[number]).choices[0].message.content
            chunks = ask(client, messages=conversations[number], stream=True)
            return "".join(chunk.choices[0].delta.content or "" for chunk in chunks)

    before = len(place.steps.rows)
    with ThreadPoolExecutor(20) as pool:
        answers = list(pool.map(one, range(20)))
    assert answers == [expected(byte_model, chat_tokenizer, messages)[0] for messages in conversations]
    assert max(place.steps.rows[before:]) > 1  # those that waited together were answered together


def test_requests_of_other_settings_wait_for_a_batch_of_their_own(place):
    def later(**arguments: Any) -> Any:
        return ask(place.client(), **arguments)

    with ThreadPoolExecutor(6) as pool:
        slow = pool.submit(later, max_tokens=30, extra_body={"say": "a" * 30, "step_seconds": 0.05})
        time.sleep(0.5)
        others = [
            pool.submit(later, max_tokens=3),
            pool.submit(later, max_tokens=5, stop="q"),
            pool.submit(later, temperature=0.9),
            pool.submit(later, temperature=0.9, seed=3),
        ]
        rows = [other.result().x_trialist["choices"][0]["rows_in_batch"] for other in others]
        assert slow.result().choices[0].message.content == "a" * 30
    assert rows == [2, 2, 1, 1]


def test_a_full_queue_is_answered_with_429_and_nothing_is_lost(byte_model, chat_tokenizer, scripted):
    with served(byte_model, chat_tokenizer, most_waiting=2, most_rows=1) as place:

        def one(number: int) -> Any:
            try:
                return ask(place.client(), extra_body={"say": "abcde", "step_seconds": 0.1})
            except openai.RateLimitError as error:
                return error

        with ThreadPoolExecutor(8) as pool:
            found = list(pool.map(one, range(8)))
        refused = [answer for answer in found if isinstance(answer, openai.RateLimitError)]
        assert 0 < len(refused) < 8
        assert refused[0].code == "queue_full"
        assert refused[0].response.headers["retry-after"] == "1"
        assert {answer.choices[0].message.content for answer in found if answer not in refused} == {"abcde"}
        with pytest.raises(openai.BadRequestError, match="3 prompts in a request; at most 2 can wait"):
            place.client().completions.create(model=NAME, prompt=["a", "b", "c"])
        assert f"trialist_refused_total {len(refused)}" in place.raw("GET", "/metrics")[2].decode()


def test_a_request_that_nobody_waits_for_takes_no_place_in_the_queue(byte_model, chat_tokenizer, scripted):
    with served(byte_model, chat_tokenizer, most_waiting=1, most_rows=1) as place, ThreadPoolExecutor(2) as pool:
        slow = pool.submit(ask, place.client(), max_tokens=40, extra_body={"say": "a" * 40, "step_seconds": 0.05})
        time.sleep(0.4)
        with pytest.raises(openai.APITimeoutError):
            ask(place.client(timeout=0.3))
        assert place.worker.waiting == 1
        time.sleep(0.2)
        assert ask(place.client()).choices[0].finish_reason == "length"
        assert slow.result().choices[0].message.content == "a" * 40


def test_a_key_is_asked_for_where_there_is_one(byte_model, chat_tokenizer):
    with served(byte_model, chat_tokenizer, api_key="secret") as place:
        with pytest.raises(openai.AuthenticationError, match="API key is missing or wrong") as caught:
            ask(place.client(api_key="guess"))
        assert caught.value.code == "invalid_api_key"
        assert place.raw("GET", "/v1/models")[0] == 401
        assert place.raw("GET", "/health")[0] == 200
        assert ask(place.client(api_key="secret")).choices[0].message.content


def test_models_and_health_are_told(place, client):
    assert [model.id for model in client.models.list()] == [NAME]
    assert client.models.retrieve(NAME).owned_by == "trialist"
    with pytest.raises(openai.NotFoundError, match="no model 'other'"):
        client.models.retrieve("other")
    assert json.loads(place.raw("GET", "/health")[2]) == {"status": "ok"}


def test_fields_that_mean_nothing_here_are_named_in_a_warning(place):
    body = {"model": NAME, "messages": HELLO, "user": "me", 'fo\no"é': 1, "tools": [], "presence_penalty": 0.0}
    status, headers, content = place.raw("POST", "/v1/chat/completions", json.dumps(body).encode())
    assert status == 200, content
    assert headers["warning"] == '299 trialist "ignored fields: fo?o??, user"'


IMAGE = {"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}
BAD: list[tuple[dict[str, Any], int, str, str | None]] = [
    ({"model": "other"}, 404, "no model 'other'; this server has 'tiny'", "model"),
    ({"model": None}, 400, "model: ", "model"),
    ({"messages": []}, 400, "messages: ", "messages"),
    ({"messages": None}, 400, "messages: ", "messages"),
    ({"messages": [{"role": "king", "content": "x"}]}, 400, "role", "messages.0.role"),
    ({"messages": [{"content": "x"}]}, 400, "messages.0.role: ", "messages.0.role"),
    ({"messages": [{"role": "user", "content": 3}]}, 400, "messages.0.content: ", "messages.0.content"),
    ({"messages": [{"role": "user", "content": "  "}]}, 400, "the prompt is empty", "messages"),
    ({"messages": [IMAGE]}, 400, "'image_url' is not supported", "messages.0.content"),
    ({"messages": [{"role": "tool", "content": "x"}]}, 400, "tools are not supported", "messages.0"),
    ({"messages": [{"role": "user", "content": "x" * 600}]}, 400, "tokens and the model's context is 512", "messages"),
    ({"max_tokens": 501}, 400, "more than the model's context of 512", "messages"),
    ({"max_tokens": 0}, 400, "max_tokens: ", "max_tokens"),
    ({"max_tokens": "9"}, 400, "max_tokens: ", "max_tokens"),
    ({"max_tokens": 3, "max_completion_tokens": 4}, 400, "differ", "max_tokens"),
    ({"temperature": -1}, 400, "temperature: ", "temperature"),
    ({"temperature": 3}, 400, "temperature: ", "temperature"),
    ({"temperature": math.nan}, 400, "temperature: ", "temperature"),
    ({"top_p": 1.1}, 400, "top_p: ", "top_p"),
    ({"n": 0}, 400, "n: ", "n"),
    ({"n": 2}, 400, "would all be the same", None),
    ({"seed": 1.5}, 400, "seed: ", "seed"),
    ({"seed": 2**70}, 400, "seed: ", "seed"),
    ({"stop": ""}, 400, "stop must be text", "stop"),
    ({"stop": ["a", 3]}, 400, "stop", "stop"),
    ({"stop": ["x"] * 17}, 400, "stop must be text, or up to 16", "stop"),
    ({"stream_options": {"include_usage": True}}, 400, "stream_options goes with stream=true", "stream_options"),
    ({"top_logprobs": 3}, 400, "top_logprobs goes with logprobs=true", "top_logprobs"),
    ({"logprobs": True, "top_logprobs": 21}, 400, "top_logprobs: ", "top_logprobs"),
    ({"logprobs": True, "num_beams": 2}, 400, "leave out --num-beams", None),
    ({"tools": [{"type": "function"}]}, 400, "tools is not supported", "tools"),
    ({"response_format": {"type": "json_object"}}, 400, "response_format is not supported", "response_format"),
    ({"logit_bias": {"5": 3}}, 400, "logit_bias is not supported", "logit_bias"),
    ({"frequency_penalty": 0.5}, 400, "frequency_penalty is not supported", "frequency_penalty"),
    ({"say": 3}, 400, "say: input should be a valid string", "say"),
    ({"step_seconds": -1.0}, 400, "--step-seconds must be at least 0", None),
    ({"num_beams": 2.5}, 400, "num_beams: ", "num_beams"),
    ({"top_k": -4}, 400, "--top-k must be at least 0", None),
    ({"max_tokens": 3, "max_new_tokens": 3}, 400, "max_new_tokens is said twice", "max_new_tokens"),
    ({"messages": [{"role": "user", "content": "\ud800"}]}, 400, "", None),
]  # fmt: skip


@pytest.mark.parametrize(("changes", "status", "words", "param"), BAD, ids=[str(entry[0])[:50] for entry in BAD])
@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
def test_a_bad_request_is_refused_in_words_before_anything_is_sent(place, changes, status, words, param, stream):
    body = {key: value for key, value in ({"model": NAME, "messages": HELLO} | changes).items() if value is not None}
    if "stream_options" not in body:
        body["stream"] = stream
    found, headers, content = place.raw("POST", "/v1/chat/completions", json.dumps(body).encode())
    error = json.loads(content)["error"]
    assert (found, headers["content-type"]) == (status, "application/json"), error
    assert set(error) == {"message", "type", "param", "code"}
    assert words in error["message"]
    assert error["type"] == "invalid_request_error"
    if param:
        assert error["param"] == param


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"prompt": []}, "prompt is empty"),
        ({"prompt": ""}, "the prompt is empty"),
        ({"prompt": [[]]}, "the prompt has no tokens"),
        ({"prompt": [5, 600]}, "the prompt has the token 600"),
        ({"prompt": {"a": 1}}, "prompt"),
        ({"prompt": None}, "prompt: field required"),
        ({"logprobs": 21}, "logprobs: "),
        ({"echo": True}, "echo is not supported"),
        ({"best_of": 3}, "best_of is not supported"),
        ({"suffix": "end"}, "suffix is not supported"),
        ({"prompt": "x" * 513}, "context is 512"),
    ],
    ids=str,
)
def test_a_bad_completion_is_refused(place, changes, words):
    body = {key: value for key, value in ({"model": NAME, "prompt": "a"} | changes).items() if value is not None}
    status, _, content = place.raw("POST", "/v1/completions", json.dumps(body).encode())
    assert status == 400
    assert words in json.loads(content)["error"]["message"]


@pytest.mark.parametrize(
    ("method", "path", "body", "headers", "status"),
    [
        ("GET", "/v1/nowhere", None, {}, 404),
        ("GET", "/v1/chat/completions", None, {}, 405),
        ("POST", "/v1/chat/completions", b"{", {}, 400),
        ("POST", "/v1/chat/completions", b"", {}, 400),
        ("POST", "/v1/chat/completions", b"[1]", {}, 400),
        ("POST", "/v1/chat/completions", b"\xff\xfe", {}, 400),
        ("POST", "/v1/chat/completions", b'{"model": "tiny"}', {"Content-Type": "text/plain"}, 400),
        ("POST", "/v1/completions", b'{"a": ' + b"9" * 5000 + b"}", {}, 400),
    ],
)
def test_whatever_is_sent_is_answered_in_the_shape_of_errors(place, method, path, body, headers, status):
    found, _, content = place.raw(method, path, body, **headers)
    assert (found, set(json.loads(content)["error"])) == (status, {"message", "type", "param", "code"})


def test_a_request_that_is_too_large_is_not_read(place, monkeypatch):
    monkeypatch.setattr(application, "MOST_BYTES", 2000)
    body = json.dumps({"model": NAME, "messages": [{"role": "user", "content": "x" * 3000}]}).encode()
    status, _, content = place.raw("POST", "/v1/chat/completions", body)
    assert (status, json.loads(content)["error"]["code"]) == (413, "too_large")
    connection = http.client.HTTPConnection("127.0.0.1", int(place.url.rpartition(":")[2]), timeout=30)
    pieces = iter([body[:1000], body[1000:]])  # in chunks, which tell no length
    connection.request(
        "POST", "/v1/chat/completions", pieces, {"Content-Type": "application/json"}, encode_chunked=True
    )
    assert connection.getresponse().status == 413
    connection.close()


def test_a_failure_of_the_model_is_a_500_and_the_server_goes_on(place, client):
    with pytest.raises(openai.InternalServerError, match="RuntimeError: the script is lost"):
        ask(client, extra_body={"failing": True})
    with pytest.raises(openai.InternalServerError, match="the script is lost"):
        list(ask(client, stream=True, extra_body={"failing": True}))
    assert ask(client).choices[0].finish_reason == "length"


def test_out_of_memory_is_a_503(place, client, monkeypatch):
    def fail(*_: Any, **__: Any) -> Any:
        raise torch.OutOfMemoryError("no")

    with monkeypatch.context() as patch:
        patch.setattr("trialist.decoding.server.worker.run", fail)
        with pytest.raises(openai.InternalServerError, match="out of memory") as caught:
            ask(client)
    assert caught.value.status_code == 503


def test_one_request_that_cannot_be_served_does_not_spoil_those_beside_it(place, monkeypatch):
    from trialist.decoding.server import worker

    def particular(model: Any, tokenizer: Any, settings: Any, prompts: Any, **arguments: Any) -> Any:
        if any("poison" in str(prompt.content) for prompt in prompts):
            raise ValueError("this prompt is poison")
        return run(model, tokenizer, settings, prompts, **arguments)

    monkeypatch.setattr(worker, "run", particular)
    with ThreadPoolExecutor(4) as pool:
        slow = pool.submit(ask, place.client(), max_tokens=30, extra_body={"say": "a" * 20, "step_seconds": 0.05})
        time.sleep(0.4)
        good = [pool.submit(ask, place.client()) for _ in range(2)]
        bad = pool.submit(ask, place.client(), messages=[{"role": "user", "content": "poison"}])
        assert {answer.result().choices[0].finish_reason for answer in (slow, *good)} == {"stop", "length"}
        with pytest.raises(openai.BadRequestError, match="this prompt is poison"):
            bad.result()


def test_the_end_of_the_server_ends_its_work_and_answers_those_who_wait(byte_model, chat_tokenizer, scripted):
    with served(byte_model, chat_tokenizer, most_rows=1) as place, ThreadPoolExecutor(2) as pool:
        arguments = {"max_tokens": 400, "extra_body": {"say": "a" * 400, "step_seconds": 0.05}}
        waiting = [pool.submit(ask, place.client(), **arguments) for _ in range(2)]
        time.sleep(0.8)
        place.worker.close()
        for one in waiting:
            with pytest.raises(openai.InternalServerError, match="server"):
                one.result(20)
        assert len(place.steps.rows) < 60
        assert place.raw("GET", "/health")[0] == 503
        with pytest.raises(openai.InternalServerError, match="shutting down"):
            ask(place.client())
