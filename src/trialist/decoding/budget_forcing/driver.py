"""Budget forcing through a server: rounds of requests, each of which continues what was written so far (arXiv 2501.19393).

For servers that speak the OpenAI protocol, and for any function that continues tokens. In greedy search the result is that of the
`BudgetForcing` option, token for token, for delimiters that begin with an added token or are a single one; of another delimiter
that is put off, the option must leave standing what the model has written, and this driver takes it away.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Literal, Protocol

from trialist.decoding.budget_forcing.option import BudgetForcing
from trialist.decoding.budget_forcing.state import Rules, Thinking, encode_inside

FORBIDDEN = -100
"""The bias under which a server never draws a token"""


@dataclass(frozen=True)
class Reply:
    """What one request brought."""

    ids: tuple[int, ...]
    """New tokens, without what stopped them"""
    finished: Literal["stop", "length"]
    """`stop`: at a stop string or the end of the sequence; `length`: at `max_tokens`"""


class Continue(Protocol):
    """Goes on with one prompt."""

    def __call__(
        self, ids: Sequence[int], *, max_tokens: int, stop: Sequence[str], banned: Sequence[int], **sampling: Any
    ) -> Reply:
        """At most `max_tokens` tokens behind the prompt and `ids`, none of them of `banned`, up to one of the strings `stop`."""


@dataclass(frozen=True)
class ForcedCompletion:
    """The continuation of one prompt."""

    text: str
    """All of it, delimiters included; the text of `ids`"""
    ids: tuple[int, ...]
    thinking: str
    """Within the segment, as it stands before the delimiter"""
    answer: str
    """Behind the delimiter, and behind `final_prefix` where that was written"""
    report: Thinking
    requests: int
    """How often the server was asked"""


def budget_force(
    client: Any,
    prompts: Sequence[Any],
    forcing: BudgetForcing,
    *,
    model: str = "",
    eos_token_ids: Sequence[int] | None = None,
    api: Literal["completions", "chat"] = "completions",
    send: Literal["ids", "text"] = "ids",
    sampling: Mapping[str, Any] | None = None,
    answer_sampling: Mapping[str, Any] | None = None,
    extra_body: Mapping[str, Any] | None = None,
    concurrency: int = 8,
) -> list[ForcedCompletion]:
    """A completion for each prompt, under the limits of `forcing`, which needs a maximum for thinking and for the answer.

    client: an `openai.OpenAI`, whose own retries and time-outs hold, or a function `client(prompt_ids) -> Continue`.
    prompts: strings whose thinking segment is open at their end (`forcing.start_think`), or lists of messages for `chat`.
    eos_token_ids: what ends a sequence, forbidden where thinking must go on; without them the tokenizer's.
    api: `completions` sends prompt and continuation again as one prompt. `chat` sends the continuation as the assistant's
        message to be continued (`continue_final_message`, as vLLM has it) and checks in the server's count of tokens that it was.
    send: whether prompts of `completions` go as tokens or as text; tokens leave no doubt where one ends.
    sampling, answer_sampling: arguments of requests while thinking and for the answer; the second is the first where not given.
        Without them temperature 0, which is greedy search.
    extra_body: what the server takes beyond the protocol. vLLM cuts special tokens, delimiters among them, out of what it
        compares with stop strings, unless it gets {"skip_special_tokens": False}.
    concurrency: prompts at a time.

    Raises ValueError for limits or prompts that this way cannot serve and for servers that do not continue a message; errors of
    the client come as they are, with a note which prompt it was.
    """
    if not isinstance(forcing.max_thinking_tokens, int) or forcing.max_answer_tokens is None:
        raise ValueError(
            "a server needs a number for every request: give max_thinking_tokens and max_answer_tokens as numbers, not "
            f"{forcing.max_thinking_tokens} and {forcing.max_answer_tokens}"
        )
    if concurrency < 1:
        raise ValueError(f"concurrency must be at least 1, not {concurrency}")
    if eos_token_ids is None:
        own = forcing.tokenizer.eos_token_id
        eos_token_ids = [] if own is None else [own]
    rules, _ = forcing.rules(frozenset(eos_token_ids))
    shared = _Shared(client, model, forcing.tokenizer, send, dict(extra_body or {}))
    thinking = {"temperature": 0.0, **(sampling or {})}
    answering = thinking if answer_sampling is None else dict(answer_sampling)

    def one(number: int) -> ForcedCompletion:
        try:
            request = shared.chat(prompts[number]) if api == "chat" else shared.completions(prompts[number])
            return _forced(request, shared.text_of(prompts[number]), rules, forcing, thinking, answering, number)
        except Exception as error:
            error.add_note(f"prompt {number} of {len(prompts)}")
            raise

    with ThreadPoolExecutor(concurrency) as pool:
        return list(pool.map(one, range(len(prompts))))


def _forced(
    request: Continue, prompt: str, rules: Rules, forcing: BudgetForcing, thinking: Mapping[str, Any],
    answering: Mapping[str, Any], number: int,
) -> ForcedCompletion:  # fmt: skip
    """The rounds of one prompt. What counts is that of `Rules`; a round ends where the option would have decided something."""
    tokenizer, end = forcing.tokenizer, rules.end
    state = rules.first(prompt)
    if state.phase != "thinking":
        raise ValueError(
            f"prompt {number} does not open a thinking segment with {forcing.start_think!r}; write that at its end, or "
            "start_think=None where thinking begins with the first new token: a server does not tell which string it stopped at"
        )
    assert rules.maximum is not None
    stop = [_text(tokenizer, end.ids[:1]) if end.added else end.text]
    fixed = end.added or len(end.text) == 1  # the tokens that end the segment are the same everywhere
    ids: list[int] = []
    requests = 0
    must_go_on = False  # the next token is one of thought
    while not rules.spent(state):
        ended = False
        left = rules.maximum - state.thinking
        if must_go_on or (state.thinking < rules.minimum and not rules.may_ignore(state)):
            most = 1 if must_go_on or not fixed else rules.minimum - state.thinking
            tail = dataclasses.replace(state, text=_text(tokenizer, ids))
            reply = request(ids, max_tokens=min(most, left), stop=(), banned=sorted(rules.ends(tail)), **thinking)
            if reply.finished == "stop":
                raise ValueError(
                    "the server ended the sequence although the tokens that end it were forbidden; it ignores logit_bias, or "
                    "eos_token_ids is not complete"
                )
        else:
            reply = request(ids, max_tokens=left, stop=stop, banned=(), **thinking)
            ended = reply.finished == "stop"
            if not ended and not reply.ids:
                raise ValueError(f"the server wrote none of {left} tokens and names no end: its context is too short")
        requests += 1
        new = reply.ids[:left]
        ids += new
        state = dataclasses.replace(state, thinking=state.thinking + len(new), fresh=state.fresh and not new)
        must_go_on = False
        if not ended or rules.spent(state):
            continue
        if state.fresh:
            must_go_on = True
        elif rules.may_ignore(state):
            ids += rules.ignore
            state = dataclasses.replace(
                state, thinking=state.thinking + len(rules.ignore), ignores=state.ignores + 1, fresh=bool(rules.ignore)
            )
            must_go_on = not rules.ignore
        elif state.thinking >= rules.minimum:
            state = dataclasses.replace(state, ended="natural")
            break
        else:
            must_go_on = True
    trace = list(ids)
    if state.ended == "natural":
        ids += end.ids
    else:
        closed = bool(ids) and bool(forcing.separator) and _text(tokenizer, ids[-1:]).endswith(forcing.separator)
        ids += rules.forced[0 if closed else 1]
        state = dataclasses.replace(state, ended="forced")
    assert forcing.max_answer_tokens is not None
    reply = request(ids, max_tokens=forcing.max_answer_tokens, stop=(), banned=(), **answering)
    state = dataclasses.replace(state, phase="answer", answer=len(reply.ids))
    return ForcedCompletion(
        text=_text(tokenizer, [*ids, *reply.ids]), ids=(*ids, *reply.ids), thinking=_text(tokenizer, trace),
        answer=_text(tokenizer, reply.ids), report=state.report, requests=requests + 1,
    )  # fmt: skip


def _text(tokenizer: Any, ids: Sequence[int]) -> str:
    return tokenizer.decode(list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False)


@dataclass(frozen=True)
class _Shared:
    """What the requests of all prompts have in common."""

    client: Any
    model: str
    tokenizer: Any
    send: Literal["ids", "text"]
    extra_body: dict[str, Any]

    def text_of(self, prompt: Any) -> str:
        if isinstance(prompt, str):
            return prompt
        return self.tokenizer.apply_chat_template(prompt, add_generation_prompt=True, tokenize=False)

    def completions(self, prompt: Any) -> Continue:
        if not isinstance(prompt, str):
            raise ValueError(
                'prompts of the completions protocol are strings; render messages with the chat template, or take api="chat"'
            )
        before = self.tokenizer.encode(prompt)
        if not hasattr(self.client, "completions"):
            return self.client(before)

        def request(
            ids: Sequence[int], *, max_tokens: int, stop: Sequence[str], banned: Sequence[int], **sampling: Any
        ) -> Reply:
            whole = [*before, *ids]
            answer = self.client.completions.create(
                model=self.model, prompt=whole if self.send == "ids" else _text(self.tokenizer, whole), max_tokens=max_tokens,
                **self._optional(stop, banned), **sampling,
            )  # fmt: skip
            choice = answer.choices[0]
            return self._reply(choice, choice.text)

        return request

    def chat(self, messages: Any) -> Continue:
        if isinstance(messages, str) or not hasattr(self.client, "chat"):
            raise ValueError('api="chat" takes prompts that are lists of messages, and an OpenAI client')

        def request(
            ids: Sequence[int], *, max_tokens: int, stop: Sequence[str], banned: Sequence[int], **sampling: Any
        ) -> Reply:
            body, talk = dict(self.extra_body), list(messages)
            if ids:
                talk.append({"role": "assistant", "content": _text(self.tokenizer, ids)})
                body |= {"continue_final_message": True, "add_generation_prompt": False}
            optional = {**self._optional(stop, banned), "extra_body": body}
            try:
                answer = self.client.chat.completions.create(
                    model=self.model, messages=talk, max_tokens=max_tokens, **optional, **sampling
                )
            except Exception as error:
                if ids and getattr(error, "status_code", None) in (400, 422):
                    raise ValueError(f"{NOT_CONTINUED}; it said: {error}") from error
                raise
            if ids:
                self._check_continued(talk, answer.usage)
            choice = answer.choices[0]
            return self._reply(choice, choice.message.content or "")

        return request

    def _check_continued(self, talk: list[dict[str, str]], usage: Any) -> None:
        """A server that does not know `continue_final_message` closes the message, which takes tokens of its own."""
        if usage is None:
            raise ValueError(f"{NOT_CONTINUED}: it does not count tokens, so that nothing shows whether it did")
        whole = self.tokenizer.apply_chat_template(talk, continue_final_message=True, tokenize=False)
        wanted = len(self.tokenizer.encode(whole, add_special_tokens=False))
        if usage.prompt_tokens != wanted:
            raise ValueError(
                f"{NOT_CONTINUED}: it read {usage.prompt_tokens} tokens where the continued message has {wanted}"
            )

    def _optional(self, stop: Sequence[str], banned: Sequence[int]) -> dict[str, Any]:
        given: dict[str, Any] = {"extra_body": self.extra_body} if self.extra_body else {}
        if stop:
            given["stop"] = list(stop)
        if banned:
            given["logit_bias"] = {str(token): FORBIDDEN for token in banned}
        return given

    def _reply(self, choice: Any, text: str) -> Reply:
        """The tokens that the server names, where they spell the text; else those of the text."""
        ids = getattr(choice, "token_ids", None)
        if ids is None or _text(self.tokenizer, ids) != text:
            ids = encode_inside(self.tokenizer, text, "the server's text") if text else ()
        return Reply(tuple(ids), "length" if choice.finish_reason == "length" else "stop")


NOT_CONTINUED = (
    "this server does not continue an assistant's message, which budget forcing through the chat protocol needs; use the "
    "completions protocol with prompts rendered by the chat template"
)


def from_model(model: Any, tokenizer: Any, eos_token_ids: Sequence[int] | None = None) -> Callable[..., Continue]:
    """A `client` that is a model in this process: `budget_force(from_model(model, tokenizer), prompts, forcing)`.

    sampling: `temperature` (0 is greedy search) and `top_p`.
    """
    import torch
    from transformers import StoppingCriteriaList, StopStringCriteria

    eos = list(eos_token_ids if eos_token_ids is not None else [tokenizer.eos_token_id])

    def client(before: Sequence[int]) -> Continue:
        def request(
            ids: Sequence[int], *, max_tokens: int, stop: Sequence[str], banned: Sequence[int], **sampling: Any
        ) -> Reply:
            given = torch.tensor([[*before, *ids]], device=model.device)
            temperature = sampling.pop("temperature", 1.0)
            draws = (
                {"do_sample": True, "temperature": temperature, "top_k": 0, **sampling}
                if temperature
                else {"do_sample": False}
            )
            criteria = StoppingCriteriaList([StopStringCriteria(tokenizer, list(stop))] if stop else [])
            whole = model.generate(
                given, attention_mask=torch.ones_like(given), max_new_tokens=max_tokens, stopping_criteria=criteria,
                eos_token_id=eos, pad_token_id=eos[0], suppress_tokens=list(banned) or None, **draws,
            )  # fmt: skip
            new = whole[0, given.shape[1] :].tolist()
            if new and new[-1] in eos:
                return Reply(tuple(new[:-1]), "stop")
            text = _text(tokenizer, new)
            place = min((text.find(string) for string in stop if string in text), default=-1)
            if place < 0:
                return Reply(tuple(new), "length")
            while len(_text(tokenizer, new)) > place:
                new.pop()
            return Reply(tuple(new), "stop")

        return request

    return client
