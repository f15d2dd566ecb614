"""What preferences are learned from in a trial, and how a model that learned from them is measured.

Either a small decoder that imitated the answers of a generated task, or a given model with rows of the user's own.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any

import numpy as np

from trialist.engine.context import Context
from trialist.engine.contract import Cost, Outcome
from trialist.engine.hardware import resolve_device
from trialist.trials._language_model import BUILT_IN, given_model, new_decoder, train
from trialist.trials._own_preferences import Pairs, own_pairs

if TYPE_CHECKING:
    import torch

    from trialist.data.preference_task import PreferenceTask
    from trialist.objectives import Preference
    from trialist.trials.d2po import D2POTrial

Rows = list[dict[str, Any]]

IMITATION, FLIPPED = 0, 3
"""Parts of the generated data beside those for training, validation and test"""
LONGER = {"first": 0.75, "last": 0.5}
"""Share of pairs whose chosen answer is the longer one"""
SAMPLED_AT_ONCE = 32
"""Answers of a given model that are sampled together; a constant, as who shares a batch decides about the random numbers"""
FEW_CAPPED = 0.05
"""Up to this share of answers at the cap, mean lengths are taken as they are"""
ONE_HALF = "the test pairs do not hold both: chosen answers that are longer, and chosen answers that are not"


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
    def own(self) -> tuple[Pairs, tuple[str, ...]]:
        return own_pairs(self.trial, self.tokenizer)

    @functools.cached_property
    def pairs(self) -> Pairs:
        """`train`, `validation` and `test`; of the generated task also `flipped`, where the chosen answer is the shorter."""
        trial = self.trial
        if not self.generated:
            return self.own[0]
        sizes = {"train": trial.pairs, "validation": trial.test_items, "test": trial.test_items}
        pairs = {
            name: self.task.pairs(size, part, longer=LONGER[self.setting])
            for part, (name, size) in enumerate(sizes.items())
        }
        return {**pairs, "flipped": self.task.pairs(trial.test_items, FLIPPED, longer=0.0)}

    @property
    def notes(self) -> tuple[str, ...]:
        """What a reader of the results should know of the pairs."""
        return () if self.generated else self.own[1]

    @property
    def autocast(self) -> torch.dtype | None:
        """In which training, the reference and the readings compute log-probabilities, where it is not the weights' type."""
        import torch

        return None if self.trial.dtype == "float32" else getattr(torch, self.trial.dtype)

    def rows(self, part: str, objective: Preference | None = None) -> Rows:
        """The objective's rows, with the reference's column where it needs one."""
        from trialist.objectives.preference_rows import preference_row

        rows: Rows = [preference_row(pair) for pair in self.pairs[part]]
        if objective is None or not objective.needs_reference:
            return rows
        scored = np.load(self.reference / f"{part}.npz")["logprobs"]
        ends = np.cumsum([len(row["input_ids"]) for row in rows])
        return [{**row, "ref_logprobs": column} for row, column in zip(rows, np.split(scored, ends[:-1]), strict=True)]

    def shares(self, model: Any) -> bool:
        """Whether prompts are computed once for both answers: where the model can, and where it saves work."""
        from trialist.objectives.preference_rows import shares_prompts, sharing_cost

        return shares_prompts(model) and sharing_cost(model, self.rows("train"), self.trial.batch) < 1

    def _stage(self, name: str, seeds: bool, build: Any) -> Path:
        """Keyed by everything that makes the model before training and the pairs; by the seed only where that matters."""
        trial = self.trial
        later = {"model", "device", "data", "gamma", "beta", "steps"}
        if not trial.imitation_steps:
            later |= {"learning_rate", "batch", "lora"}
        named = sorted({field.name for field in dataclasses.fields(trial)} - later)
        inputs = (self.setting, self.context.seed if seeds else "all seeds", *sorted(trial.digests().items()))
        return self.context.stage(name, (*inputs, *(getattr(trial, field) for field in named)), build)

    @functools.cached_property
    def base(self) -> Path:
        """The model that imitated the task's answers, or the chosen ones of the user's own data."""
        return self._stage("preference-base", self.generated, functools.partial(build_base, self))

    @functools.cached_property
    def reference(self) -> Path:
        """The log-probabilities of all pairs before training on preferences."""
        return self._stage("preference-reference", self.generated, functools.partial(build_reference, self))

    @functools.cached_property
    def before(self) -> dict[str, float]:
        """What `sampled` says of the model before training on preferences."""
        place = self._stage("preference-before", True, functools.partial(build_before, self))
        return json.loads((place / "before.json").read_text())

    def model(self) -> Any:
        """A fresh model before training on preferences."""
        from trialist.models.loading import load_model

        if self.generated:
            return load_model(str(self.base / "model"), device=resolve_device(self.trial.device))
        name = str(self.base / "model") if self.trial.imitation_steps else self.trial.model
        return given_model(self.context, name, device=self.trial.device, lora=self.trial.lora)

    def answers(self, model: Any) -> list[list[int]]:
        """An answer, sampled, to the prompt of each test pair, with its end unless it was cut. All arms share the random
        numbers."""
        import torch

        prompts = [pair.prompt for pair in self.pairs["test"]]
        found: list[list[int]] = [[]] * len(prompts)
        order = sorted(range(len(prompts)), key=lambda index: len(prompts[index]))
        device = model.device
        size = len(prompts) if self.generated else SAMPLED_AT_ONCE
        pad = 0 if self.end is None else self.end
        with torch.no_grad(), torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            for start in range(0, len(order), size):
                torch.manual_seed(self.context.stream("sampling") + start)  # however long the answers before were
                part = order[start : start + size]
                longest = max(len(prompts[i]) for i in part)
                ids = torch.tensor([[pad] * (longest - len(prompts[i])) + prompts[i] for i in part], device=device)
                mask = torch.tensor(
                    [[0] * (longest - len(prompts[i])) + [1] * len(prompts[i]) for i in part], device=device
                )
                written = model.generate(
                    input_ids=ids, attention_mask=mask, do_sample=True, temperature=1.0, top_k=0, top_p=1.0,
                    max_new_tokens=self.trial.answer, pad_token_id=pad, eos_token_id=self.end, repetition_penalty=1.0,
                )[:, longest:].tolist()  # fmt: skip
                for index, tokens in zip(part, written, strict=True):
                    found[index] = tokens[: tokens.index(self.end) + 1] if self.end in tokens else tokens
                self.context.alive()
        return found

    def sampled(self, model: Any) -> dict[str, float]:
        """Of answers to the test prompts: mean length without the end, share that was cut, tokens sampled; and of a generated
        task the share that is right."""
        answers = self.answers(model)
        ended = [bool(answer) and answer[-1] == self.end for answer in answers]
        bodies = [answer[: len(answer) - end] for answer, end in zip(answers, ended, strict=True)]
        found = {
            "answer_length": fmean([len(body) for body in bodies]),
            "capped_answers": 1 - fmean(ended),
            "generated_tokens": float(sum(map(len, answers))),
        }
        if self.generated and self.setting == "first":  # without the noise of sampling
            found["accuracy"] = right_beginnings(model, self.rows("test"), self.size, self.autocast)
        elif self.generated:
            prompts = np.array([pair.prompt for pair in self.pairs["test"]])
            found["accuracy"] = float((self.task.right_answers(prompts, bodies) & ended).mean())
        return found

    def rankings(self, model: Any, objective: Preference) -> tuple[dict[str, float], dict[str, str]]:
        """How a model that learned ranks held-out pairs; and what could not be measured."""

        def share(rows: Sequence[Mapping[str, Any]]) -> float:
            return ranked(model, objective, rows, self.size, self.autocast)

        found = {"held_out_preference_accuracy": share(self.rows("validation", objective))}
        if self.generated:
            return {**found, "flipped_accuracy": share(self.rows("flipped", objective))}, {}
        halves = self.halves(self.rows("test", objective))
        if not all(halves):
            return found, dict.fromkeys(("accuracy", "flipped_accuracy"), ONE_HALF)
        longer, flipped = map(share, halves)
        # where length speaks for the chosen answer and where it speaks against it, pairs weigh the same
        return {**found, "accuracy": fmean([longer, flipped]), "flipped_accuracy": flipped}, {}

    def halves(self, rows: Sequence[Any]) -> tuple[list[Any], list[Any]]:
        """Of the test pairs those whose chosen answer is the longer one, and the others."""
        longer = [len(pair.chosen) > len(pair.rejected) for pair in self.pairs["test"]]
        first, second = (
            [row for row, is_longer in zip(rows, longer, strict=True) if is_longer == half] for half in (True, False)
        )
        return first, second

    def measured(self, model: Any, objective: Preference, outcome: Outcome) -> Outcome:
        """The outcome of training with what was measured of the model that came out."""
        after = self.sampled(model)
        ranks, undefined = self.rankings(model, objective)
        before = {"answer_length": self.before["answer_length"]}
        if self.generated:
            before["accuracy"] = self.before["accuracy"]
        spent = outcome.cost.tokens or 0.0
        curves = {name: ((0.0, value), (spent, after[name])) for name, value in before.items()}
        return dataclasses.replace(
            outcome,
            metrics={**self.lengths(after), **ranks},
            undefined=undefined,
            curves={**outcome.curves, **curves},
            cost=dataclasses.replace(outcome.cost, generated_tokens=after["generated_tokens"]),
            notes=(*self.notes, *self.cut(self.before, after)),
        )

    def outcome_before(self) -> Outcome:
        """Of the model before training on preferences. Policy and reference are one: as rankers of pairs they toss a coin."""
        ranks = ["held_out_preference_accuracy", "flipped_accuracy"]
        undefined: dict[str, str] = {}
        if not self.generated:
            ranks.append("accuracy")
            if not all(self.halves(self.pairs["test"])):
                undefined = dict.fromkeys(("accuracy", "flipped_accuracy"), ONE_HALF)
        return Outcome(
            metrics={**self.lengths(self.before), **{name: 0.5 for name in ranks if name not in undefined}},
            undefined=undefined,
            cost=Cost(tokens=0.0, steps=0.0, sequence_forwards=0.0, generated_tokens=self.before["generated_tokens"]),
            notes=(*self.notes, *self.cut(self.before)),
        )

    def lengths(self, after: Mapping[str, float]) -> dict[str, float]:
        """`after` as metrics, and by how much its mean length is another than before training on preferences."""
        inflation = after["answer_length"] - self.before["answer_length"]
        metrics = {name: value for name, value in after.items() if name != "generated_tokens"}
        return {"length_drift": abs(inflation), "length_inflation": inflation, **metrics}

    def cut(self, *readings: Mapping[str, float]) -> tuple[str, ...]:
        """A note, where lengths say too little because answers were cut."""
        if all(reading["capped_answers"] <= FEW_CAPPED for reading in readings):
            return ()
        return (
            f"setting {self.setting}: in some runs more than {FEW_CAPPED:.0%} of the sampled answers reach {self.trial.answer:,} "
            "tokens and are cut, so that what they would gain or lose beyond is not seen (capped_answers says how many); raise "
            "--answer",
        )

    @property
    def size(self) -> int:
        """Pairs in a forward pass without gradients."""
        return 256 if self.generated else self.trial.batch


def build_base(models: PreferenceModels, folder: Path) -> None:
    """Raises ValueError where imitation diverges: nothing can be built on that."""
    from trialist.data.collation import stack_or_pad
    from trialist.data.order import BatchOrder

    trial = models.trial
    if models.generated:
        context, model = models.context, new_model(models)
        examples = models.task.examples(64 * trial.base_steps, IMITATION)
        steps, batch, learning_rate = trial.base_steps, 64, 3e-3
    else:
        context = dataclasses.replace(models.context, seed=0)  # one model for all seeds, as the given one is
        model = given_model(context, trial.model, device=trial.device, lora=trial.lora)
        examples = [(pair.prompt, pair.chosen) for pair in models.pairs["train"]]
        steps, batch, learning_rate = trial.imitation_steps, trial.batch, trial.learning_rate
    rows = [{"input_ids": [*prompt, *answer], "labels": [-100] * len(prompt) + answer} for prompt, answer in examples]
    order = BatchOrder(len(rows), batch, context.stream("imitation"))

    def batches(step: int) -> dict[str, Any]:
        padded = stack_or_pad([rows[index] for index in order(step)])
        return {name: tensor.to(model.device) for name, tensor in padded.items()}

    outcome, _ = train(
        model, batches, dataclasses.replace(context, folder=folder, keep_model=True), steps=steps,
        learning_rate=learning_rate, dtype=trial.dtype, evaluate=lambda _: {}, evaluations=1, tokenizer=models.tokenizer,
    )  # fmt: skip
    if outcome.diverged is not None:
        raise ValueError(f"the model before training on preferences has diverged ({outcome.diverged})")
    shutil.rmtree(folder / "checkpoint", ignore_errors=True)


def new_model(models: PreferenceModels) -> Any:
    """The built-in decoder with its initial weights."""
    from trialist.data.preference_task import LONGEST_ANSWER, PROMPT, VOCABULARY

    trial = models.trial
    return new_decoder(
        models.context, device=trial.device, hidden_size=trial.width, vocab_size=VOCABULARY, num_hidden_layers=trial.layers,
        num_attention_heads=trial.heads, head_dim=trial.width // trial.heads,
        layer_types=["full_attention"] * trial.layers, max_position_embeddings=PROMPT + max(LONGEST_ANSWER, trial.answer),
    )  # fmt: skip


def build_reference(models: PreferenceModels, folder: Path) -> None:
    """An .npz for each part that objectives look at: `logprobs`, the columns of its rows one after the other."""
    from trialist.training import reference_logprobs

    model = models.model().eval()
    for part in ("train", "validation", "flipped" if models.generated else "test"):
        columns = reference_logprobs(
            model, models.rows(part), batch=models.size, autocast=models.autocast, share_prompt=models.shares(model),
            say=lambda _: models.context.alive(),
        )  # fmt: skip
        np.savez(folder / f"{part}.npz", logprobs=np.concatenate(columns))


def build_before(models: PreferenceModels, folder: Path) -> None:
    (folder / "before.json").write_text(json.dumps(models.sampled(models.model().eval())))


def ranked(
    model: Any, objective: Preference, rows: Sequence[Mapping[str, Any]], size: int, autocast: torch.dtype | None
) -> float:
    """Share of pairs whose chosen answer has the higher reward under the objective."""
    import torch

    from trialist.data.collation import stack_or_pad

    device = model.device
    right, cuda = 0.0, [device] if device.type == "cuda" else []
    with torch.no_grad(), torch.random.fork_rng(devices=cuda):
        torch.manual_seed(0)  # what sampo draws
        for start in range(0, len(rows), size):
            batch = stack_or_pad(rows[start : start + size])
            batch = {name: tensor.to(device) for name, tensor in batch.items()}
            with torch.autocast(device.type, autocast, enabled=autocast is not None):
                right += float(objective(model, batch)[1]["accuracy"])
    return right / len(rows)


def right_beginnings(model: Any, rows: Sequence[Mapping[str, Any]], size: int, autocast: torch.dtype | None) -> float:
    """Mean probability of the right content, with which the chosen answers begin, given the prompt."""
    import torch

    from trialist.data.collation import stack_or_pad
    from trialist.data.preference_task import SIGNAL
    from trialist.objectives.preference_rows import CHOSEN, answer_logprobs

    total, device = 0.0, model.device
    with torch.no_grad():
        for start in range(0, len(rows), size):
            batch = stack_or_pad(rows[start : start + size])
            ids, segments = batch["input_ids"].to(device), batch["segments"].to(device)
            chosen = segments == CHOSEN
            content = chosen & (chosen.cumsum(-1) <= SIGNAL)
            with torch.autocast(device.type, autocast, enabled=autocast is not None):
                scores = answer_logprobs(model, ids, segments)
            total += float((scores.float() * content).sum(-1).exp().sum())
    return total / len(rows)
