"""Answers in the shapes of the OpenAI protocol: whole or in chunks, of chats and of plain completions."""

from __future__ import annotations

import time
import uuid
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from trialist.decoding.detokenizer import token_bytes, token_text
from trialist.decoding.running import Continuation, TokenLogprob
from trialist.decoding.settings import Settings


@dataclass(frozen=True)
class Shape:
    """One answer. chat: `messages` were given, else a prompt."""

    chat: bool
    model: str
    tokenizer: Any
    settings: Settings
    decoding: str
    id: str = field(default_factory=lambda: uuid.uuid4().hex)
    created: int = field(default_factory=lambda: int(time.time()))

    def whole(
        self, rows: Sequence[Continuation], usage: dict[str, Any], reports: Sequence[dict[str, Any]]
    ) -> dict[str, Any]:
        choices = []
        for index, row in enumerate(rows):
            said = (
                {"message": {"role": "assistant", "content": row.text, "refusal": None}}
                if self.chat
                else {"text": row.text}
            )
            choices.append({
                "index": index, **said, "finish_reason": row.finish, "logprobs": self._logprobs(row.logprobs),
            })  # fmt: skip
        kind = "chat.completion" if self.chat else "text_completion"
        return {**self._head(kind), "choices": choices, "usage": usage, "x_trialist": self.told(reports)}

    def chunk(
        self, choice: int, text: str = "", logprobs: Sequence[TokenLogprob] = (), finish: str | None = None,
        role: str | None = None,
    ) -> dict[str, Any]:  # fmt: skip
        delta = ({"role": role} if role else {}) | ({"content": text} if text or role else {})
        said = {"delta": delta} if self.chat else {"text": text}
        entry = {"index": choice, **said, "finish_reason": finish, "logprobs": self._logprobs(logprobs)}
        return {**self._head("chat.completion.chunk" if self.chat else "text_completion"), "choices": [entry]}

    def usage_chunk(self, usage: dict[str, Any]) -> dict[str, Any]:
        return {
            **self._head("chat.completion.chunk" if self.chat else "text_completion"),
            "choices": [],
            "usage": usage,
        }

    def told(self, reports: Sequence[dict[str, Any]]) -> dict[str, Any]:
        """What was asked of techniques, how tokens were chosen, and what was measured choice by choice."""
        return {"options": self.settings.asked(), "decoding": self.decoding, "choices": list(reports)}

    def _head(self, kind: str) -> dict[str, Any]:
        prefix = "chatcmpl" if self.chat else "cmpl"
        return {"id": f"{prefix}-{self.id}", "object": kind, "created": self.created, "model": self.model}

    def _logprobs(self, entries: Sequence[TokenLogprob]) -> dict[str, Any] | None:
        if not entries:
            return None
        if self.chat:
            content = [
                {
                    **self._token(entry.token, entry.logprob),
                    "top_logprobs": [self._token(*pair) for pair in entry.top],
                }
                for entry in entries
            ]
            return {"content": content, "refusal": None}
        return {
            "tokens": [token_text(self.tokenizer, entry.token) for entry in entries],
            "token_logprobs": [entry.logprob for entry in entries],
            "top_logprobs": [
                {token_text(self.tokenizer, token): value for token, value in entry.top} for entry in entries
            ],
            "text_offset": [entry.start for entry in entries],
        }

    def _token(self, token: int, logprob: float) -> dict[str, Any]:
        return {
            "token": token_text(self.tokenizer, token),
            "logprob": max(logprob, -9999.0),  # JSON has no infinity
            "bytes": token_bytes(self.tokenizer, token),
        }


def usage_of(prompt_tokens: int, rows: Sequence[Continuation]) -> dict[str, int]:
    """Tokens of the prompts, each once, and of all continuations, with the tokens that ended them."""
    written = sum(len(row.tokens) for row in rows)
    return {"prompt_tokens": prompt_tokens, "completion_tokens": written, "total_tokens": prompt_tokens + written}
