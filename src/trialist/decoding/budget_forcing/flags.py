"""Command-line options of budget forcing."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

START, END = "<think>", "</think>"
ANSWER = "Final Answer:"


@dataclass(frozen=True)
class ThinkFlags:
    """A minimum and a maximum of thinking (budget forcing)."""

    think_budget: int | None = None
    """Most thinking tokens, at least 1; then the model must answer. Without it there is no maximum"""
    think_min: int = 0
    """Thinking tokens before which thinking does not end"""
    think_ignore: int = 0
    """Ends of thinking that are put off; --think-text is written in their place"""
    think_text: str = "Wait"
    """Written in place of an end that is put off"""
    think_start: str | None = None
    """What opens thinking; without it <think>, or where the model has no such token thinking begins with the first new token"""
    think_end: str | None = None
    """What closes thinking; without it </think>, or where the model has no such token "Final Answer:" """
    think_answer: int | None = None
    """Most tokens of the answer behind thinking, at least 1; without it there is no maximum"""

    def __post_init__(self) -> None:
        for name in ("think_budget", "think_answer"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(
                    f"--{name.replace('_', '-')} must be at least 1, not {value}; leave it out for no maximum"
                )
        for name in ("think_min", "think_ignore"):
            if getattr(self, name) < 0:
                raise ValueError(f"--{name.replace('_', '-')} must be at least 0, not {getattr(self, name)}")
        if self.think_budget is not None and self.think_min > self.think_budget:
            raise ValueError(
                f"--think-min {self.think_min} is more than --think-budget {self.think_budget}; lower the one"
            )

    def options(self, model: Any, tokenizer: Any, prompts: Sequence[Any]) -> Sequence[Any]:
        if self == ThinkFlags(think_text=self.think_text, think_start=self.think_start, think_end=self.think_end):
            return ()
        from trialist.decoding.budget_forcing.option import BudgetForcing
        from trialist.decoding.budget_forcing.state import added_tokens

        known = {tokenizer.convert_ids_to_tokens(token) for token in added_tokens(tokenizer)}
        start = self.think_start if self.think_start is not None else (START if START in known else None)
        end = self.think_end if self.think_end is not None else (END if END in known else ANSWER)
        option = BudgetForcing(
            tokenizer, end_think=end, start_think=start or None, max_thinking_tokens=self.think_budget,
            min_thinking_tokens=self.think_min, num_ignore=self.think_ignore, ignore_text=self.think_text,
            final_prefix="" if end == ANSWER else f"\n{ANSWER}", max_answer_tokens=self.think_answer,
        )  # fmt: skip
        return (option,)
