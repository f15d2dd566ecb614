"""What preferences are learned from in a trial, and how a model that learned from them is measured.

Either a small decoder that imitated the answers of a generated task, or a given model with rows of the user's own.
"""

from __future__ import annotations

import dataclasses
import functools
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trialist.engine.context import Context
from trialist.engine.hardware import resolve_device
from trialist.trials._language_model import BUILT_IN, given_model, new_decoder, train

if TYPE_CHECKING:
    from trialist.data.preference_task import PreferenceTask
    from trialist.data.preferences import PreferencePair
    from trialist.trials.d2po import D2POTrial

IMITATION, FLIPPED = 0, 3
"""Parts of the generated data beside those for training, validation and test"""
LONGER = {"first": 0.75, "last": 0.5}
"""Share of pairs whose chosen answer is the longer one"""


@dataclass(frozen=True)
class PreferenceModels:
    """Model, pairs and measurements for one run in one setting."""

    trial: D2POTrial
    context: Context
    setting: str

    @property
    def generated(self) -> bool:
        return self.trial.model == BUILT_IN

    @functools.cached_property
    def task(self) -> PreferenceTask:
        from trialist.data.preference_task import PreferenceTask

        return PreferenceTask(self.setting, self.context.stream("task") % 2**32)

    @functools.cached_property
    def tokenizer(self) -> Any:
        from trialist.data.tokenizers import load_tokenizer

        return None if self.generated else load_tokenizer(self.trial.model)

    @property
    def end(self) -> int | None:
        from trialist.data.preference_task import END

        return END if self.generated else self.tokenizer.eos_token_id

    @functools.cached_property
    def pairs(self) -> dict[str, list[PreferencePair]]:
        """`train`, `validation` and `test`; of the generated task also `flipped`, where the chosen answer is the shorter."""
        trial = self.trial
        if self.generated:
            sizes = {"train": trial.pairs, "validation": trial.test_items, "test": trial.test_items}
            pairs = {
                name: self.task.pairs(size, part, longer=LONGER[self.setting])
                for part, (name, size) in enumerate(sizes.items())
            }
            return {**pairs, "flipped": self.task.pairs(trial.test_items, FLIPPED, longer=0.0)}
        return own_pairs(trial, self.tokenizer)

    def rows(self, part: str) -> list[dict[str, Any]]:
        """The objective's rows, with the reference's column."""
        return scored_rows(self.pairs[part], part, self.reference, None)

    def _stage(self, name: str, seeds: bool, build: Any) -> Path:
        """Keyed by everything that makes the model before training and the pairs; by the seed only where that matters."""
        trial = self.trial
        later = {"model", "device", "data", "gamma", "beta", "margin_ratio", "learning_rate", "steps", "batch", "lora"}
        named = sorted({field.name for field in dataclasses.fields(trial)} - later)
        inputs = (self.setting, self.context.seed if seeds else "all seeds", *sorted(trial.digests().items()))
        return self.context.stage(name, (*inputs, *(getattr(trial, field) for field in named)), build)

    @functools.cached_property
    def base(self) -> Path:
        """The decoder that imitated the task's answers."""
        return self._stage("preference-base", True, functools.partial(build_base, self))

    @functools.cached_property
    def reference(self) -> Path:
        """The log-probabilities of all pairs before training on preferences."""
        return self._stage("preference-reference", self.generated, functools.partial(build_reference, self))

    @functools.cached_property
    def length_before(self) -> float:
        """Mean length of sampled answers before training on preferences, tokens."""
        place = self._stage("preference-length", True, functools.partial(build_length, self))
        return json.loads((place / "length.json").read_text())

    def model(self) -> Any:
        """A fresh model before training on preferences."""
        from trialist.models.loading import load_model

        if self.generated:
            return load_model(str(self.base / "model"), device=resolve_device(self.trial.device))
        return given_model(self.context, self.trial.model, device=self.trial.device, lora=self.trial.lora)

    def answers(self, model: Any) -> list[list[int]]:
        """An answer, sampled, to the prompt of each test pair, without its end. All arms share the random numbers."""
        import torch

        prompts = [pair.prompt for pair in self.pairs["test"]]
        found: list[list[int]] = [[]] * len(prompts)
        order = sorted(range(len(prompts)), key=lambda index: len(prompts[index]))
        device = model.device
        size = len(prompts) if self.generated else 4 * self.trial.batch
        pad = 0 if self.end is None else self.end
        with torch.no_grad(), torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            torch.manual_seed(self.context.stream("sampling"))
            for start in range(0, len(order), size):
                part = order[start : start + size]
                longest = max(len(prompts[index]) for index in part)
                ids = torch.tensor([[pad] * (longest - len(prompts[i])) + prompts[i] for i in part], device=device)
                mask = torch.tensor(
                    [[0] * (longest - len(prompts[i])) + [1] * len(prompts[i]) for i in part], device=device
                )
                written = model.generate(
                    input_ids=ids, attention_mask=mask, do_sample=True, temperature=1.0, top_k=0, top_p=1.0,
                    max_new_tokens=self.trial.answer, pad_token_id=pad, eos_token_id=self.end, repetition_penalty=1.0,
                )[:, longest:].tolist()  # fmt: skip
                for index, tokens in zip(part, written, strict=True):
                    found[index] = tokens[: tokens.index(self.end)] if self.end in tokens else tokens
                self.context.alive()
        return found

    def scores(self, model: Any, objective: Any) -> tuple[dict[str, float], dict[str, str]]:
        """Of a model that learned: lengths, right answers, how it ranks held-out pairs; and what could not be measured."""
        import numpy as np

        answers = self.answers(model)
        inflation = mean([len(answer) for answer in answers]) - self.length_before
        found = {
            "length_drift": abs(inflation),
            "length_inflation": inflation,
            "held_out_preference_accuracy": ranked(model, objective, self.rows("validation"), self.size),
        }
        if self.generated:
            prompts = np.array([pair.prompt for pair in self.pairs["test"]])
            found["accuracy"] = (
                # the share of right answers among samples, without the noise of sampling
                right_beginnings(model, self.rows("test"), self.size)
                if self.setting == "first"
                else float(self.task.right_answers(prompts, answers).mean())
            )
            found["flipped_accuracy"] = ranked(model, objective, self.rows("flipped"), self.size)
            return found, {}
        rows = self.rows("test")
        longer = [len(pair.chosen) > len(pair.rejected) for pair in self.pairs["test"]]
        halves = [
            [row for row, is_longer in zip(rows, longer, strict=True) if is_longer == half] for half in (True, False)
        ]
        if not all(halves):
            reason = "the test pairs do not hold both: chosen answers that are longer, and chosen answers that are not"
            return found, {"accuracy": reason, "flipped_accuracy": reason}
        shares = [ranked(model, objective, half, self.size) for half in halves]
        # where length speaks for the chosen answer and where it speaks against it, pairs weigh the same
        return {**found, "accuracy": mean(shares), "flipped_accuracy": shares[1]}, {}

    @property
    def size(self) -> int:
        """Pairs in a forward pass without gradients."""
        return 256 if self.generated else self.trial.batch


def build_base(models: PreferenceModels, folder: Path) -> None:
    """Raises ValueError where imitation diverges: nothing can be built on that."""
    from trialist.data.collation import stack_or_pad
    from trialist.data.order import BatchOrder
    from trialist.data.preference_task import LONGEST_ANSWER, PROMPT, VOCABULARY

    trial, context = models.trial, models.context
    model = new_decoder(
        context, device=trial.device, hidden_size=trial.width, vocab_size=VOCABULARY, num_hidden_layers=trial.layers,
        num_attention_heads=trial.heads, head_dim=trial.width // trial.heads,
        layer_types=["full_attention"] * trial.layers, max_position_embeddings=PROMPT + max(LONGEST_ANSWER, trial.answer),
    )  # fmt: skip
    examples = models.task.examples(64 * trial.base_steps, IMITATION)
    rows = [{"input_ids": [*prompt, *answer], "labels": [-100] * PROMPT + answer} for prompt, answer in examples]
    order = BatchOrder(len(rows), 64, context.stream("imitation"))

    def batches(step: int) -> dict[str, Any]:
        batch = stack_or_pad([rows[index] for index in order(step)])
        return {name: tensor.to(model.device) for name, tensor in batch.items()}

    outcome, _ = train(
        model, batches, dataclasses.replace(context, folder=folder, keep_model=True), steps=trial.base_steps,
        learning_rate=3e-3, dtype=trial.dtype, evaluate=lambda _: {}, evaluations=1,
    )  # fmt: skip
    if outcome.diverged is not None:
        raise ValueError(f"the model before training on preferences has diverged ({outcome.diverged})")


def build_reference(models: PreferenceModels, folder: Path) -> None:
    model = models.model().eval()
    for part, pairs in models.pairs.items():
        scored_rows(pairs, part, folder, model, models.size)


def build_length(models: PreferenceModels, folder: Path) -> None:
    lengths = [len(answer) for answer in models.answers(models.model().eval())]
    (folder / "length.json").write_text(json.dumps(mean(lengths)))


def scored_rows(
    pairs: Sequence[PreferencePair], part: str, folder: Path, model: Any, size: int = 8
) -> list[dict[str, Any]]:
    """Rows with the reference's column, from `folder`; with a model it is computed and put there."""
    from trialist.objectives.preference_rows import preference_row
    from trialist.training import reference_logprobs

    def missing() -> Any:
        raise ValueError("the stage that scored the pairs holds other pairs; remove it with `trialist runs --clean`")

    rows: list[dict[str, Any]] = [preference_row(pair) for pair in pairs]
    columns = reference_logprobs(model or missing, rows, digest=part, folder=folder, batch=size, say=lambda _: None)
    return [{**row, "ref_logprobs": column} for row, column in zip(rows, columns, strict=True)]


def ranked(model: Any, objective: Any, rows: Sequence[Mapping[str, Any]], size: int) -> float:
    """Share of pairs whose chosen answer has the higher reward under the objective."""
    import torch

    from trialist.data.collation import stack_or_pad

    right, cuda = 0.0, [model.device] if model.device.type == "cuda" else []
    with torch.no_grad(), torch.random.fork_rng(devices=cuda):
        torch.manual_seed(0)  # what sampo draws
        for start in range(0, len(rows), size):
            batch = stack_or_pad(rows[start : start + size])
            batch = {name: tensor.to(model.device) for name, tensor in batch.items()}
            right += float(objective(model, batch)[1]["accuracy"])
    return right / len(rows)


def right_beginnings(model: Any, rows: Sequence[Mapping[str, Any]], size: int) -> float:
    """Mean probability of the right content, with which the chosen answers begin, given the prompt."""
    import torch

    from trialist.data.collation import stack_or_pad
    from trialist.data.preference_task import SIGNAL
    from trialist.objectives.preference_rows import CHOSEN, answer_logprobs

    total = 0.0
    with torch.no_grad():
        for start in range(0, len(rows), size):
            batch = stack_or_pad(rows[start : start + size])
            ids, segments = batch["input_ids"].to(model.device), batch["segments"].to(model.device)
            chosen = segments == CHOSEN
            content = chosen & (chosen.cumsum(-1) <= SIGNAL)
            total += float((answer_logprobs(model, ids, segments) * content).sum(-1).exp().sum())
    return total / len(rows)


def own_pairs(trial: D2POTrial, tokenizer: Any) -> dict[str, list[PreferencePair]]:
    """The user's rows, split by prompt; at most `pairs` to train on and `test_items` of each other part."""
    from trialist.data.corpora import Documents
    from trialist.data.preferences import encode_preferences, read_preferences
    from trialist.data.splits import split_documents

    rows = read_preferences(trial.data, columns=trial.columns, split=trial.split, max_examples=trial.max_examples)
    found, _ = encode_preferences(rows, tokenizer, max_length=trial.length, source=trial.data)
    texts = tuple(tokenizer.decode(pair.prompt) for pair in found)
    splits = split_documents(Documents(tuple(map(str, range(len(found)))), texts, trial.data))
    most = {"train": trial.pairs, "validation": trial.test_items, "test": trial.test_items}
    return {part: [found[int(index)] for index in getattr(splits, part).ids[:size]] for part, size in most.items()}


def mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
