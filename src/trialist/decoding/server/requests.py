"""Requests of the OpenAI protocol: what is understood, what is refused, what is left aside with a warning.

The types of the package `openai` describe what a client may send, without ranges or errors to answer with, and that package is
a client: a server has no other use for it. So the fields that this one serves stand here, checked.
"""

from __future__ import annotations

import dataclasses
import re
from abc import abstractmethod
from collections.abc import Mapping
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from trialist.decoding.settings import Settings

MOST_CHOICES, MOST_STOPS, MOST_TOP = 128, 16, 20
MARKS_NO_CHOICE: dict[str, tuple[Any, ...]] = {
    "tools": ([],), "functions": ([],), "tool_choice": ("none", "auto"), "function_call": ("none", "auto"),
    "response_format": ({"type": "text"},), "modalities": (["text"],), "audio": (), "logit_bias": ({},),
    "presence_penalty": (0,), "frequency_penalty": (0,), "web_search_options": (), "prediction": (), "echo": (False,),
    "best_of": (1,), "suffix": ("",), "continue_final_message": (False,),
}  # fmt: skip
"""Fields that would change the answer and are not served, with the values at which they ask for nothing"""


class RequestError(ValueError):
    """A request that is refused: HTTP status, the field it is about, a short code."""

    def __init__(
        self, message: str, param: str | None = None, code: str | None = None, status: int = 400, headers: Any = None
    ) -> None:
        super().__init__(message)
        self.param, self.code, self.status, self.headers = param, code, status, headers

    def body(self) -> dict[str, Any]:
        kind = {401: "authentication_error", 429: "rate_limit_error"}.get(self.status, "invalid_request_error")
        kind = "server_error" if self.status >= 500 else kind
        return {"error": {"message": str(self), "type": kind, "param": self.param, "code": self.code}}


class StreamOptions(BaseModel):
    model_config = ConfigDict(strict=True)
    include_usage: bool | None = None


class Message(BaseModel):
    model_config = ConfigDict(strict=True, extra="allow")
    role: Literal["system", "developer", "user", "assistant", "tool", "function"]
    content: str | list[dict[str, Any]] | None = None

    def plain(self, place: int) -> dict[str, str]:
        """As chat templates take it. Raises RequestError for what is no text."""
        where = f"messages.{place}"
        if self.role in ("tool", "function") or any(
            (self.model_extra or {}).get(name) for name in ("tool_calls", "function_call")
        ):
            raise RequestError("tools are not supported; send text only", where, "unsupported_value")
        parts = [{"type": "text", "text": self.content or ""}] if not isinstance(self.content, list) else self.content
        for part in parts:
            if part.get("type") != "text" or not isinstance(part.get("text"), str):
                raise RequestError(
                    f"a part of type {part.get('type')!r} is not supported; send parts of type 'text'",
                    f"{where}.content", "unsupported_value",
                )  # fmt: skip
        role = "system" if self.role == "developer" else self.role
        return {"role": role, "content": "".join(part["text"] for part in parts)}


class GenerationRequest(BaseModel):
    """What both kinds of requests have. None is not said: then the server's own default holds."""

    model_config = ConfigDict(strict=True, extra="allow", allow_inf_nan=False)
    model: str
    max_tokens: int | None = Field(None, ge=1)
    temperature: float | None = Field(None, ge=0, le=2)
    top_p: float | None = Field(None, ge=0, le=1)
    n: int | None = Field(None, ge=1, le=MOST_CHOICES)
    seed: int | None = Field(None, ge=-(2**63), lt=2**63)
    stop: str | list[str] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None

    def settings(self, defaults: Settings) -> tuple[Settings, list[str]]:
        """Settings of this request, and the names of fields that mean nothing here.

        Raises RequestError for fields that are not served, for values out of range, and for two names of one thing.
        """
        extra = {name: value for name, value in (self.model_extra or {}).items() if value is not None}
        for name, neutral in MARKS_NO_CHOICE.items():
            if name in extra and extra[name] not in neutral:
                raise RequestError(f"{name} is not supported; leave it out", name, "unsupported_parameter")
        changes = {name: value for name, value in extra.items() if name in defaults.names()}
        said: dict[str, Any] = {"temperature": self.temperature, "top_p": self.top_p, "seed": self.seed}
        said |= {"num_sequences": self.n, "max_new_tokens": self.most_tokens(), "stop": self.stops()}
        for name, value in said.items():
            if value is not None and name in changes:
                raise RequestError(f"{name} is said twice, by its own name and by that of OpenAI; leave one out", name)
        changes |= {name: value for name, value in said.items() if value is not None}
        try:
            chosen = defaults.replace_json(changes)
        except ValueError as error:
            name = str(error).partition(":")[0]
            raise RequestError(str(error), name if name in changes else None, "invalid_value") from error
        if self.stream_options is not None and not self.stream:
            raise RequestError("stream_options goes with stream=true", "stream_options")
        return chosen, sorted(extra.keys() - defaults.names() - MARKS_NO_CHOICE.keys())

    def most_tokens(self) -> int | None:
        return self.max_tokens

    def stops(self) -> list[str] | None:
        found = [self.stop] if isinstance(self.stop, str) else self.stop
        if found is None:
            return None
        if "" in found or len(found) > MOST_STOPS:
            raise RequestError(f"stop must be text, or up to {MOST_STOPS} of them, none empty", "stop", "invalid_value")
        return found

    @abstractmethod
    def top(self) -> int | None:
        """Most likely tokens to give beside each token; None for no log-probabilities."""


class ChatRequest(GenerationRequest):
    messages: list[Message] = Field(min_length=1)
    max_completion_tokens: int | None = Field(None, ge=1)
    logprobs: bool | None = None
    top_logprobs: int | None = Field(None, ge=0, le=MOST_TOP)

    def most_tokens(self) -> int | None:
        if None not in (self.max_tokens, self.max_completion_tokens) and self.max_tokens != self.max_completion_tokens:
            raise RequestError("max_tokens and max_completion_tokens differ; give one of them", "max_tokens")
        return self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens

    def top(self) -> int | None:
        if self.top_logprobs is not None and not self.logprobs:
            raise RequestError("top_logprobs goes with logprobs=true", "top_logprobs")
        return (self.top_logprobs or 0) if self.logprobs else None


class CompletionRequest(GenerationRequest):
    prompt: str | list[str] | list[int] | list[list[int]]
    logprobs: int | None = Field(None, ge=0, le=MOST_TOP)

    def top(self) -> int | None:
        return self.logprobs

    def prompts(self) -> list[str | list[int]]:
        """One or several texts or lists of tokens."""
        said = self.prompt
        found: list[Any] = [said] if isinstance(said, str) or (said and isinstance(said[0], int)) else list(said)
        if not found:
            raise RequestError("prompt is empty", "prompt", "invalid_value")
        return found


def validation_error(errors: list[Mapping[str, Any]]) -> RequestError:
    """The first of pydantic's errors, in the protocol's shape."""
    first = errors[0]
    place = [str(part) for part in first["loc"] if part != "body"]
    names = [part for part in place if not part[:1].isupper() and "[" not in part and part not in ("str", "int")]
    if first["type"] == "json_invalid":
        return RequestError("the request body is not valid JSON", code="invalid_json")
    param = ".".join(names) or None
    reason = f"{first['msg'][0].lower()}{first['msg'][1:]}"
    where = "the request body" if param is None else param
    return RequestError(f"{where}: {reason}", param, "missing" if first["type"] == "missing" else "invalid_value")


def warning_header(ignored: list[str]) -> dict[str, str]:
    """Names of fields as a header, in which a client's own names can do no harm."""
    names = ", ".join(re.sub(r"[^\w.-]", "?", name, flags=re.ASCII) for name in ignored)
    return {"Warning": f'299 trialist "ignored fields: {names[:400]}"'} if ignored else {}


def sampled_alike(one: Settings, other: Settings) -> bool:
    """Whether requests may share a batch: lengths and stops are the row's own, all else is the batch's."""

    def policy(settings: Settings) -> Settings:
        sampling = dataclasses.replace(settings.sampling, max_new_tokens=None, stop=())
        return dataclasses.replace(settings, sampling=sampling)

    return policy(one) == policy(other)
