"""Guided decoding on the command line: principles in words, and how strongly they guide."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

MARK = "\u2042 principle \u2042"
"""Stands for a system message where a template is asked what it makes of one"""


@dataclass(frozen=True)
class GuidanceFlags:
    """Guided decoding: answers follow principles more than a prompt alone makes them."""

    principle: tuple[str, ...] = ()
    """What the answer should be like; may be given several times. The next token is drawn as if the model with the principle in
    its system message were further away from the model without; none is plain generation"""
    principle_weights: tuple[float, ...] = ()
    """A weight for each principle, below 0 for what the answer should not be like. Without them all share 1"""
    guidance: float = 1.0
    """Strength, at least 0: 1/beta of OPAD, guidance_scale - 1 of classifier-free guidance. 0 only prompts with the principle"""
    guidance_reward: Literal["token", "two_step"] = "token"
    """`two_step` adds the previous step's log-ratio at the same candidates"""
    guidance_mask: float = 0.1
    """Candidates have at least this share of the largest probability under the principle, in [0, 1]; 0 allows all tokens"""

    def __post_init__(self) -> None:
        if any(not text.strip() for text in self.principle):
            raise ValueError("--principle must be text that says what the answer should be like, not empty")
        if self.principle_weights and len(self.principle_weights) != len(self.principle):
            raise ValueError(
                f"--principle-weights must be one for each --principle: {len(self.principle_weights)} for {len(self.principle)}"
            )
        if not 0 <= self.guidance < float("inf"):
            raise ValueError(f"--guidance must be at least 0, not {self.guidance}")
        if not 0 <= self.guidance_mask <= 1:
            raise ValueError(f"--guidance-mask must be between 0 and 1, not {self.guidance_mask}")

    def options(self, model: Any, tokenizer: Any, prompts: Sequence[Any]) -> Sequence[Any]:
        if not self.principle:
            return ()
        from trialist.decoding.guidance.option import ContrastiveGuidance

        contexts = [[with_principle(tokenizer, prompt, text) for prompt in prompts] for text in self.principle]
        return (
            ContrastiveGuidance(
                contexts, self.guidance, weights=self.principle_weights or None, reward=self.guidance_reward,
                mask_alpha=self.guidance_mask,
            ),
        )  # fmt: skip


def with_principle(tokenizer: Any, prompt: Any, principle: str) -> list[int]:
    """Token ids of the prompt with a principle: at the end of its system message, or before the prompt where it is text.

    A system message that the template writes itself where none is given is kept, so that the two prompts differ in the principle
    alone. Templates without system messages have it before the first message of the user.
    """
    from trialist.decoding.prompts import chat_prompt, text_prompt

    if isinstance(prompt, str):
        return list(text_prompt(tokenizer, f"{principle}\n\n{prompt}").token_ids)
    messages = list(prompt)
    if messages[0]["role"] == "system":
        head, rest = messages[0]["content"], messages[1:]
    else:
        head, rest = _own_system(tokenizer, messages), messages
    if head is not None:
        messages = [{"role": "system", "content": f"{head}\n\n{principle}".strip()}, *rest]
    else:
        first = next((place for place, message in enumerate(messages) if message["role"] == "user"), 0)
        content = f"{principle}\n\n{messages[first]['content']}"
        messages = [*messages[:first], {**messages[first], "content": content}, *messages[first + 1 :]]
    return list(chat_prompt(tokenizer, messages).token_ids)


def _own_system(tokenizer: Any, messages: list[Mapping[str, str]]) -> str | None:
    """The system message that the template adds to a conversation without one, often empty; None where it knows of none."""
    from jinja2 import TemplateError

    def rendered(conversation: list[Mapping[str, str]]) -> str:
        return tokenizer.apply_chat_template(conversation, tokenize=False, add_generation_prompt=True)

    try:
        marked = rendered([{"role": "system", "content": MARK}, *messages])
    except (TemplateError, ValueError, TypeError):
        return None
    if MARK not in marked:
        return None
    before, _, after = marked.partition(MARK)
    plain = rendered(messages)
    found = plain.startswith(before) and plain.endswith(after) and len(plain) >= len(before) + len(after)
    return plain[len(before) : len(plain) - len(after)] if found else ""
