"""The recipe `preference`: a causal language model learns from pairs of a chosen and a rejected answer."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any, ClassVar

from trialist.objectives.preference_options import Method, PreferenceOptions
from trialist.training.recipe import Recipe, Say, Work

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from trialist.data.preferences import PreferencePair
    from trialist.objectives.preference import Preference

Pairs = tuple["list[PreferencePair]", "list[dict[str, Any]]"]


@dataclass(frozen=True)
class PreferenceTraining(PreferenceOptions, Recipe):
    """Preference optimisation: DPO, D2PO and their kin on pairs of a chosen and a rejected answer.

    Rows hold `prompt`, `chosen`, `rejected` (strings or lists of messages; without a prompt it is their common start). The
    reference, the model itself before training, scores the pairs once; its log-probabilities are kept token by token, so
    another method or gamma on the same pairs does not score them again. The same command goes on after an
    interruption. Under torchrun every rank takes its share of the pairs.
    """

    columns: str = ""
    """Columns under other names, ours first: prompt=question,chosen=better,rejected=worse"""
    batch: int = 4
    """Pairs in a micro-batch, per device"""
    accumulate: int = 4
    """Micro-batches in a step; every pair of a step weighs the same"""
    learning_rate: float | None = None
    """Peak learning rate; without it 5e-6, with LoRA 5e-5"""
    warmup: float = 0.1
    """Share of the steps over which the learning rate rises from 0"""
    seed: int = 0
    """Of the order of the data, of adapters, of dropout and of sampo's draw"""
    objective: Method = "dpo"
    """Method: how the tokens of an answer are weighed"""
    reference: str | None = None
    """Model with the same tokenizer to measure from: Hub id, local folder or asset; without it the model before training"""
    drop_long: bool = False
    """Leave rows out whose prompt is longer than the model's context, instead of an error"""
    share_prompt: bool = True
    """Compute a prompt once for both its answers, where the model can and it takes fewer operations; the training is the same"""

    RATES: ClassVar = (5e-6, 5e-5)
    COMPARES_PASSES: ClassVar = True
    SHOWN: ClassVar = {
        "eval_accuracy": "validation accuracy", "accuracy": "accuracy", "reward_margin": "margin of rewards",
    }  # fmt: skip

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.reference is not None and (self.reference_free or self.objective == "simpo"):
            raise ValueError("--reference is not used without a reference term; leave it out")

    def train(self, work: Work) -> Mapping[str, Any]:
        from trialist.models.loading import load_model
        from trialist.training.trainer import ObjectiveTrainer

        train, validation = self._examples(work)
        work.say(f"{len(train):,} pairs, {sum(map(_tokens, train)):,} tokens; held out: {len(validation):,}")
        self._check_reference(work.tokenizer, train)
        model = load_model(self.model, dtype=self.weights_dtype)
        self.check_vocabulary(model, _largest([*train, *validation]))
        share = self._shares(model, train, work.say)
        objective = self._objective(share)
        began = time.perf_counter()
        rows = self._rows([*train, *validation], model, objective, share, work.say)
        sizes: dict[str, Any] = {"pairs": len(train)}
        if objective.needs_reference:
            sizes["seconds for the reference"] = round(time.perf_counter() - began, 1)
        trained = self.prepared(model)
        trainer = ObjectiveTrainer(
            trained,
            self.arguments(work, self.total_steps(len(train)), bool(validation)),
            objective=objective,
            train_dataset=rows[: len(train)],
            eval_dataset=rows[len(train) :] or None,
            processing_class=work.tokenizer,
            optimizers=self.optimizers(trained),
        )
        return self.run(work, trainer, sizes, {"eval_loss": "loss", "eval_accuracy": "accuracy"})

    def contents(self) -> dict[str, str]:
        from trialist.models.loading import model_digest

        more = {"reference content": model_digest(self.reference)} if self.reference is not None else {}
        return {**super().contents(), **more}

    def _objective(self, share: bool) -> Preference:
        from trialist.objectives.preference import Preference

        options = {option.name: getattr(self, option.name) for option in fields(PreferenceOptions)}
        return Preference(self.objective, share_prompt=share, **options)

    def _shares(self, model: PreTrainedModel, pairs: Sequence[PreferencePair], say: Say) -> bool:
        """Whether a prompt is computed once for both its answers."""
        from trialist.objectives.preference_rows import packs_sequences, preference_row, shares_prompts, sharing_cost

        name, share = type(model).__name__, self.share_prompt and shares_prompts(model)
        if share:
            cost = sharing_cost(model, [preference_row(pair) for pair in pairs], self.batch)
            share = cost < 1
            say(
                f"a prompt is computed {'once for both answers' if share else 'for each answer'}: once takes {cost:.2f} of the "
                "operations of twice"
            )
        elif self.share_prompt:
            say(f"note: {name} cannot compute a prompt once for both answers, so it is computed twice")
        if not share and not packs_sequences(model):
            say(f"note: {name} does not keep packed sequences apart, so they are padded")
        return share

    def _examples(self, work: Work) -> tuple[list[PreferencePair], list[PreferencePair]]:
        """What is trained on and what is held out."""
        from trialist.data.corpora import split_names
        from trialist.data.preferences import encode_preferences, notes, read_preferences

        self._objective(False)  # what it refuses is said before the pairs are read

        def read(data: str, split: str | None, most: int | None) -> Pairs:
            rows = read_preferences(data, columns=self.columns, split=split, max_examples=most, chat=self.chat)
            context = None if self.drop_long else work.context
            pairs, counts = encode_preferences(
                rows, work.tokenizer, max_length=work.length, context=context, source=data
            )
            for note in notes(counts, work.length):
                work.say(f"note: {data}: {note}")
            return pairs, rows

        train, rows = read(self.data, self.split, self.max_examples)
        brought = self.split in (None, "train") and "validation" in split_names(self.data)
        if self.validation_data is not None:
            return train, read(self.validation_data, None, None)[0]
        if brought:
            work.say(f"validation: the split of that name that {self.data} brings")
            return train, read(self.data, "validation", None)[0]
        if self.validation == 0:
            return train, []
        kept, held_out = self.hold_out([_asked(rows[pair.row]) for pair in train])
        return [train[i] for i in kept], [train[i] for i in held_out]

    def _check_reference(self, tokenizer: PreTrainedTokenizerBase, pairs: Sequence[PreferencePair]) -> None:
        """Raises ValueError where the reference would read other tokens than the model."""
        if self.reference is None:
            return
        from trialist.data.tokenizers import load_tokenizer
        from trialist.training.preference_reference import tokenizer_difference

        texts = [tokenizer.decode([*pair.prompt, *pair.chosen]) for pair in pairs[:20]]
        if difference := tokenizer_difference(tokenizer, load_tokenizer(self.reference), texts):
            raise ValueError(
                f"--reference {self.reference} has another tokenizer than {self.model} ({difference}); log-probabilities of "
                "different tokens cannot be compared: take a reference of the model's family"
            )

    def _rows(
        self,
        pairs: Sequence[PreferencePair],
        model: PreTrainedModel,
        objective: Preference,
        share: bool,
        say: Say,
    ) -> list[dict[str, Any]]:
        """Rows of the objective's columns; the reference's from the cache, or scored now."""
        import torch

        from trialist.models.loading import load_model, model_digest
        from trialist.objectives.preference_rows import preference_row
        from trialist.training.preference_reference import reference_logprobs

        rows: list[dict[str, Any]] = [preference_row(pair) for pair in pairs]
        if not objective.needs_reference:
            return rows
        device = self.compute_device
        digest = f"{model_digest(self.reference or self.model)} {model.dtype} {device.type}"

        def reference() -> PreTrainedModel:
            say(f"the reference scores {len(rows):,} pairs, once for these pairs")
            if self.reference is None:
                return model.to(device)  # type: ignore[arg-type]
            loaded = load_model(self.reference, dtype=self.weights_dtype)
            self.check_vocabulary(loaded, _largest(pairs), "reference")
            return loaded.to(device)  # type: ignore[arg-type]

        values = reference_logprobs(
            reference, rows, digest=digest, batch=self.batch, share_prompt=share and self.reference is None, say=say,
            autocast=torch.bfloat16 if self.dtype == "bfloat16" else None,
        )  # fmt: skip
        return [{**row, "ref_logprobs": column} for row, column in zip(rows, values, strict=True)]


def _largest(pairs: Iterable[PreferencePair]) -> int:
    """The largest token id."""
    return max(max((*pair.prompt, *pair.chosen, *pair.rejected)) for pair in pairs)


def _tokens(pair: PreferencePair) -> int:
    return len(pair.prompt) + len(pair.chosen) + len(pair.rejected)


def _asked(row: Mapping[str, Any]) -> str:
    """The prompt as text: rows that share it belong into the same split."""
    prompt = row["prompt"]
    if isinstance(prompt, str):
        return prompt or str(row["chosen"])
    return "\n".join(str(message["content"]) for message in prompt)
