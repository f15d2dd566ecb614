"""A technique for tests of what lies around techniques: it says a given text, slowly if asked to, and reports on itself."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

FLAGS = {"scripted": "tests.decoding.fake_technique:ScriptedFlags"}


@dataclass(frozen=True)
class ScriptedFlags:
    """Says what it is told to."""

    say: str = ""
    """Text of every continuation; none leaves it to the model"""
    step_seconds: float = 0.0
    """Seconds that a step takes more"""
    failing: bool = False
    """Fails at the first step"""

    def __post_init__(self) -> None:
        if self.step_seconds < 0:
            raise ValueError(f"--step-seconds must be at least 0, not {self.step_seconds}")

    def options(self, model: Any, tokenizer: Any, prompts: Sequence[Any]) -> Sequence[Any]:
        if self == ScriptedFlags():
            return []
        words = (*tokenizer(self.say)["input_ids"], tokenizer.eos_token_id) if self.say else ()
        return [Scripted(words, self.step_seconds, self.failing, [str(prompt) for prompt in prompts])]


@dataclass(frozen=True)
class Script:
    """What is reported of a row."""

    length: int


@dataclass(frozen=True)
class Scripted:
    words: tuple[int, ...]
    step_seconds: float
    failing: bool
    prompts: list[str]
    slot: ClassVar[Any] = "logits"

    def prepare(self, model: Any, generate_kwargs: Mapping[str, Any]) -> dict[str, Any]:
        from trialist.decoding import around_loop

        length = generate_kwargs["input_ids"].shape[1]
        assert generate_kwargs["input_ids"].shape[0] == len(self.prompts)

        def process(input_ids: Any, scores: Any) -> Any:
            if self.failing:
                raise RuntimeError("the script is lost")
            time.sleep(self.step_seconds)
            if not self.words:
                return scores
            word = self.words[min(input_ids.shape[1] - length, len(self.words) - 1)]
            forced = scores.new_full(scores.shape, -float("inf"))
            forced[:, word] = 0.0
            return forced

        def around(loop: Any, model: Any, input_ids: Any, *, logits_processor: Any, **kwargs: Any) -> Any:
            from transformers import LogitsProcessorList

            output = loop(
                model, input_ids, logits_processor=LogitsProcessorList([*logits_processor, process]), **kwargs
            )
            steps = output.sequences.shape[1] - length
            output.script = tuple(Script(len(self.words)) for _ in output.sequences)
            output["place"] = output.sequences.new_tensor([list(range(steps))] * len(output.sequences)).float()
            return output

        return around_loop(generate_kwargs, around)
