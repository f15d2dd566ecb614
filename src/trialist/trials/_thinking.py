"""What the trial of budget forcing does with a model: who answers which questions, and traces by every way of thinking.

A `Thinker` is a small model trained on self-checking sums, or a given model with worded problems. Traces are stages: arms
that are compared at equal generated tokens read the same ones.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trialist.engine.context import Context
from trialist.engine.contract import Cost, Outcome
from trialist.trials._language_model import BUILT_IN, new_decoder, save, train

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from trialist.data.self_checks import SelfChecks

VALIDATION, EVALUATION = 50_001, 50_002
"""Seeds of the generated questions that choose limits and that decide"""
ROUNDS = 64
"""Most samples of a question"""
ROWS = 128
"""Questions that are answered at a time"""
INSTRUCTION = "{question}\n\nReason step by step. Then write the answer, a number, behind the words Final Answer:"
FINAL = "Final Answer:"


@dataclass(frozen=True)
class Item:
    """A question with its answer."""

    name: str
    question: str
    answer: str


@dataclass(frozen=True)
class Trace:
    """One answer to a question."""

    text: str
    answer: str | None
    correct: bool
    thinking: int
    """Tokens of thought"""
    tokens: int
    """All that were generated, forced ones too"""


@dataclass(frozen=True)
class Thinker:
    """A model, its questions and its limits, as fields that identify them."""

    model: str
    """`decoder`, or a given model"""
    digest: str
    data: str
    items: int
    device: str
    dtype: str
    layers: int
    width: int
    heads: int
    fewest: int
    most: int
    modulus: int
    planted: float
    batch: int
    steps: int
    learning_rate: float
    think_tokens: int
    answer_tokens: int

    @property
    def own(self) -> bool:
        return self.model == BUILT_IN

    @property
    def task(self) -> SelfChecks:
        from trialist.data.self_checks import SelfChecks

        return SelfChecks(fewest=self.fewest, most=self.most, modulus=self.modulus, planted=self.planted)

    # -- model -------------------------------------------------------------------------------------------------------

    def load(self, context: Context) -> tuple[PreTrainedModel, Any, Outcome]:
        """Model, tokenizer, and the outcome of a training, which has diverged or has no metrics."""
        from trialist.data.tokenizers import load_tokenizer
        from trialist.models.loading import load_model

        if not self.own:
            return load_model(self.model, dtype=self.dtype, device=self.device), load_tokenizer(self.model), Outcome()
        from trialist.data.self_checks import character_tokenizer

        inputs = (*(getattr(self, field.name) for field in dataclasses.fields(self)), context.seed)
        folder = context.stage("thinker", inputs, functools.partial(self._train, context))
        stored = json.loads((folder / "training.json").read_text())
        curves = {name: tuple((x, y) for x, y in points) for name, points in stored["curves"].items()}
        outcome = Outcome(curves=curves, cost=Cost(**stored["cost"]), diverged=stored["diverged"])
        model = None if outcome.diverged else load_model(str(folder / "model"), device=self.device)
        return model, character_tokenizer(), outcome  # type: ignore[return-value]

    def _train(self, context: Context, folder: Path) -> None:
        from trialist.data.self_checks import BOS, CHARACTERS, EOS, PAD, SPECIAL, SelfCheckBatches, character_tokenizer

        model = new_decoder(
            context, device=self.device, hidden_size=self.width, num_hidden_layers=self.layers, num_attention_heads=self.heads,
            vocab_size=len(SPECIAL) + len(CHARACTERS), max_position_embeddings=self.task.longest + self.think_tokens + 16,
            bos_token_id=BOS, eos_token_id=EOS, pad_token_id=PAD,
        )  # fmt: skip
        batches = SelfCheckBatches(self.task, self.batch, context.stream("data_order"))
        held_out = [SelfCheckBatches(self.task, self.batch, VALIDATION)(step) for step in range(4)]

        def on_device(batch: Mapping[str, Any]) -> dict[str, Any]:
            return {name: tensor.to(self.device) for name, tensor in batch.items()}

        def evaluate(trained: Any) -> dict[str, float]:
            from trialist.trials._symbols import mean_loss

            return {"validation_loss": mean_loss(trained, [on_device(batch) for batch in held_out])}

        outcome, _ = train(
            model, lambda step: on_device(batches(step)), dataclasses.replace(context, keep_model=False), steps=self.steps,
            learning_rate=self.learning_rate, dtype=self.dtype, evaluate=evaluate, evaluations=4,
        )  # fmt: skip
        if outcome.diverged is None:
            save(model, character_tokenizer(), folder / "model")
        stored = {"diverged": outcome.diverged, "cost": outcome.cost.as_dict(), "curves": dict(outcome.curves)}
        (folder / "training.json").write_text(json.dumps(stored))

    # -- questions ---------------------------------------------------------------------------------------------------

    def questions(self, seed: int, count: int) -> list[Item]:
        """Those of `EVALUATION` or of `VALIDATION`: of a given data set its first rows, and the rows behind them."""
        if self.own:
            from trialist.data.self_checks import questions

            return [Item(one.text, one.text, one.answer) for one in questions(self.task, count, seed)]
        rows = problems(self.data)
        first = 0 if seed == EVALUATION else self.items
        if len(rows) < first + count:
            raise ValueError(f"--data {self.data} has {len(rows)} rows; {first + count} are needed, lower --test-items")
        return rows[first : first + count]

    def told(self, question: str, tokens: int) -> str:
        """The question with the number of thinking tokens that is asked for."""
        if self.own:
            return self.task.letter(tokens) + question
        from trialist.decoding.budget_forcing.baselines import token_conditional

        return token_conditional(question, tokens)

    def prompt(self, tokenizer: Any, question: str) -> str:
        if self.own:
            return question
        text = INSTRUCTION.replace("{question}", question)
        if getattr(tokenizer, "chat_template", None) is None:
            return text + "\n\n"
        messages = [{"role": "user", "content": text}]
        return tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)

    def forcing(self, tokenizer: Any, **options: Any) -> Any:
        """Budget forcing with the delimiters of the model, and the limits that hold for every arm."""
        from trialist.data.self_checks import END
        from trialist.decoding.budget_forcing.option import BudgetForcing

        ends = {"end_think": END if self.own else FINAL, "separator": "" if self.own else "\n\n", "final_prefix": ""}
        limits: dict[str, Any] = {
            **ends,
            "max_thinking_tokens": self.think_tokens,
            "max_answer_tokens": self.answer_tokens,
        }
        return BudgetForcing(tokenizer, start_think=None, **{**limits, **options})

    def string(self, wait: bool) -> str:
        """What is written in place of an end: "Wait", or a string that means nothing to the model."""
        from trialist.data.self_checks import UNTRAINED, WAIT

        if self.own:
            return WAIT if wait else UNTRAINED
        return "\nWait" if wait else "\nHmm"

    def answer(self, text: str) -> str | None:
        if self.own:
            from trialist.data.self_checks import answer_of

            return answer_of(text)
        from trialist.data.verifiers import last_number

        behind = text.rpartition(FINAL)[2]
        return last_number(re.split(r"\n\s*\n", behind.strip())[0]) or last_number(text)

    # -- traces ------------------------------------------------------------------------------------------------------

    def answers(
        self, model: PreTrainedModel, tokenizer: Any, asked: Sequence[tuple[str, str]], *, sampled: int | None = None,
        report: Callable[[float, float], None] = lambda done, total: None, **options: Any,
    ) -> list[Trace]:  # fmt: skip
        """A trace for each question and its right answer, greedy, or drawn at temperature 1 with the seed `sampled`.

        options: of budget forcing; without them it holds the common limits only.
        """
        import torch

        from trialist.decoding.options import generate

        option = self.forcing(tokenizer, **options)
        prompts = [self.prompt(tokenizer, question) for question, _ in asked]
        order = sorted(range(len(asked)), key=lambda number: len(prompts[number]))  # rows of a batch are about as long
        found: dict[int, Trace] = {}
        draws = (
            {"do_sample": False}
            if sampled is None
            else {"do_sample": True, "temperature": 1.0, "top_k": 0, "top_p": 1.0}
        )
        with torch.random.fork_rng(), torch.no_grad():
            if sampled is not None:
                torch.manual_seed(sampled)
            for start in range(0, len(order), ROWS):
                report(start, len(order))
                part = order[start : start + ROWS]
                batch = tokenizer(
                    [prompts[number] for number in part], return_tensors="pt", padding=True, padding_side="left",
                    add_special_tokens=self.own,
                ).to(model.device)  # fmt: skip
                out = generate(
                    model, [option], batch["input_ids"], attention_mask=batch["attention_mask"], return_dict_in_generate=True,
                    pad_token_id=tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id,
                    eos_token_id=tokenizer.eos_token_id, repetition_penalty=1.0, **draws,
                )  # fmt: skip
                new = out.sequences[:, batch["input_ids"].shape[1] :].tolist()
                for number, row, thinking in zip(part, new, out.thinking, strict=True):
                    length = row.index(tokenizer.eos_token_id) if tokenizer.eos_token_id in row else len(row)
                    text = tokenizer.decode(row[:length])
                    answer = self.answer(text)
                    right = answer is not None and answer == asked[number][1]
                    found[number] = Trace(text, answer, right, thinking.tokens, min(length + 1, len(row)))
        return [found[number] for number in range(len(asked))]

    def stored(
        self, context: Context, name: str, inputs: tuple, build: Callable[[], list[list[Trace]]]
    ) -> list[list[Trace]]:
        """Lists of traces as a stage."""

        def write(folder: Path) -> None:
            (folder / "traces.json").write_text(
                json.dumps([[dataclasses.astuple(one) for one in part] for part in build()])
            )

        identity = (*(getattr(self, field.name) for field in dataclasses.fields(self)), context.seed, *inputs)
        folder = context.stage(name, identity, write)
        return [[Trace(*one) for one in part] for part in json.loads((folder / "traces.json").read_text())]


def until(
    needs: Sequence[int], first: Sequence[Trace], draw: Callable[[list[int], int], list[Trace]]
) -> list[list[Trace]]:
    """Samples of every question, `first` among them, until they have as many tokens as it needs.

    draw: numbers of questions and the round -> a sample of each.
    """
    found = [[trace] for trace in first] if first else [[] for _ in needs]
    for number in range(ROUNDS):
        short = [index for index, need in enumerate(needs) if sum(trace.tokens for trace in found[index]) < need]
        if not short:
            return found
        for index, trace in zip(short, draw(short, number), strict=True):
            found[index].append(trace)
    raise ValueError(f"{ROUNDS} samples of a question do not reach the tokens of the treatment; lower --think-tokens")


def problems(data: str) -> list[Item]:
    """Worded problems with a number as answer: `gsm8k` (test) of the asset `benchmarks`, or rows with question and answer."""
    from trialist.data.verifiers import load_verifier

    if data == "gsm8k":
        from trialist.data.benchmarks import documents

        rows: Any = documents("gsm8k/gold_bpb_5shot")
    else:
        from trialist.data.corpora import load_rows

        rows = load_rows(data, required=("question", "answer"))
    found = []
    for number, row in enumerate(rows, start=1):
        try:
            found.append(Item(f"{data} {number}", str(row["question"]), load_verifier("number").read(row["answer"])))
        except ValueError as error:
            raise ValueError(f"--data {data} row {number}: 'answer': {error}") from error
    return found
