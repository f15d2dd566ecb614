"""Models trained on text in which copies of test items were planted, after rows were removed from it by a rule."""

from __future__ import annotations

import dataclasses
import functools
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trialist.engine.context import Context
from trialist.engine.contract import Items, Outcome
from trialist.engine.hardware import resolve_device
from trialist.engine.records import outcome_from_json, outcome_to_json
from trialist.trials._edited_copies import EDITS, Texts, copies_of
from trialist.trials._language_model import BUILT_IN, given_model, new_decoder, train
from trialist.trials._planted_text import Item, bits_per_byte_of, load_texts
from trialist.trials._removal import READ, RULES, SHARES, recalls, removed

if TYPE_CHECKING:
    import numpy as np
    from transformers import PreTrainedModel

    from trialist.trials.decontamination import DecontaminationTrial

NOTHING, CLEAN = "nothing", "clean"
"""The arms that train on all rows, and on those that were not planted"""
MIXED, OTHERS = "mixed", "other items"
SETTINGS = {MIXED: tuple(EDITS), "light": ("5 % dropped",), "heavy": ("30 % dropped",), OTHERS: tuple(EDITS)}
"""Setting -> the edits of an item's copies, in turn"""
RATE, RATE_GIVEN_MODEL, RATE_OF_ADAPTERS = 4e-3, 5e-5, 1e-3
SURE = 3.0
"""The gain from planting must be so many of its standard errors over items, or nothing is said of what is left of it"""


@dataclass(frozen=True)
class PlantedModels:
    """Rows, what is removed of them, and models for one run."""

    trial: DecontaminationTrial
    context: Context

    @functools.cached_property
    def folder(self) -> Path:
        return self.trial.source.stage(self.context)

    @functools.cached_property
    def texts(self) -> tuple[list[Texts], dict[str, list[Item]]]:
        return load_texts(self.folder)

    @functools.cached_property
    def tokenizer(self) -> Any:
        from trialist.data.tokenizers import load_tokenizer

        return load_tokenizer(str(self.folder))

    def rows(self, setting: str) -> tuple[list[Texts], np.ndarray]:
        """The training rows with copies of items among them, and which of them are copies."""
        import numpy as np

        rows, items = self.texts
        copied = [item.texts for item in items["others" if setting == OTHERS else "planted"]]
        draw = np.random.default_rng(self.context.stream("planting"))
        made = copies_of(copied, SETTINGS[setting], self.trial.copies, draw)
        return [*rows, *made], np.arange(len(rows) + len(made)) >= len(rows)

    def kept(self, arm: str, rows: Sequence[Texts], planted: np.ndarray) -> np.ndarray:
        """(rows,) bool: what the arm trains on. All items are looked for, whether they were planted or not."""
        import numpy as np

        if arm == NOTHING:
            return np.ones(len(rows), bool)
        if arm == CLEAN:
            return ~planted
        wanted = [item.texts for part in self.texts[1].values() for item in part]
        if arm in RULES:
            return ~removed(arm, rows, wanted, **self._options(arm))
        as_many = int(removed("tulu3", rows, wanted, **self._options("tulu3")).sum())
        keep = np.ones(len(rows), bool)
        keep[np.random.default_rng(self.context.stream("removal")).permutation(len(rows))[:as_many]] = False
        return keep

    def recalls(self, arm: str, share: float) -> tuple[dict[str, float], tuple[tuple[float, float], ...]]:
        """What an arm finds of copies by their edit, as `_removal.recalls` tells it.

        share: of all rows that it removes, which is what arms without a rule find.
        """
        import numpy as np

        if arm not in RULES:
            return dict.fromkeys(READ, share), tuple((dropped, share) for dropped in SHARES)
        items = [item.texts for item in self.texts[1]["planted"]]
        return recalls(arm, items, np.random.default_rng(self.context.stream("recall")), **self._options(arm))

    def _options(self, arm: str) -> dict[str, Any]:
        return {"n": self.trial.n, "coverage": self.trial.coverage} if arm == "tulu3" else {}

    def end(self, which: str) -> Outcome:
        """Training on the clean rows (`clean`) or on all rows of a setting: the gain from planting lies between them."""
        trial, digests = self.trial, self.trial.digests()
        named = sorted({field.name for field in dataclasses.fields(trial)} - {"n", "coverage", *digests})
        inputs = (which, self.context.seed, *(getattr(trial, name) for name in named), *sorted(digests.items()))
        place = self.context.stage("planting-end", inputs, functools.partial(build_end, self, which))
        return outcome_from_json(json.loads((place / "outcome.json").read_text(encoding="utf-8")))

    def trained(self, rows: Sequence[Texts], context: Context | None = None) -> Outcome:
        """A model trained on rows: its cost, and bits per byte of each item that is tested, without metrics."""
        from trialist.data.order import PackedBatches
        from trialist.data.packing import pack
        from trialist.data.tokenizers import document_start, encode_documents

        trial, context = self.trial, context or self.context
        device = resolve_device(trial.device)
        tokens = encode_documents(self.tokenizer, ["\n".join(row) for row in rows])
        packed = pack(tokens, trial.length, bos_id=document_start(self.tokenizer))
        batches = PackedBatches(packed, trial.batch, context.stream("data_order"))
        items = self.texts[1]
        tested = {"planted_bits_per_byte": items["planted"], "test_bits_per_byte": items["kept out"]}
        scores: dict[str, Items] = {}

        def evaluate(model: Any) -> dict[str, float]:
            for name, part in tested.items():
                bits = bits_per_byte_of(model, self.tokenizer, part, length=trial.length, batch=trial.batch).tolist()
                names, groups = zip(*((item.name, item.group) for item in part))
                scores[name] = Items(names, tuple(bits), groups)
            return {name: sum(of.scores) / len(of.scores) for name, of in scores.items()}

        rate = RATE if trial.model == BUILT_IN else RATE_OF_ADAPTERS if trial.lora else RATE_GIVEN_MODEL
        outcome, _ = train(
            self.model(),
            lambda step: {name: tensor.to(device) for name, tensor in batches(step).items()},
            context,
            steps=trial.steps,
            learning_rate=trial.learning_rate or rate,
            dtype=trial.dtype,
            evaluate=evaluate,
            evaluations=2,
            tokenizer=self.tokenizer,
            over="steps",
        )
        return dataclasses.replace(outcome, items=dict(scores))

    def model(self) -> PreTrainedModel:
        """Before training, the same for all arms of a seed."""
        trial, device = self.trial, resolve_device(self.trial.device)
        if trial.model != BUILT_IN:
            return given_model(self.context, trial.model, device=device, lora=trial.lora)
        return new_decoder(
            self.context, device=device, vocab_size=len(self.tokenizer), hidden_size=trial.width,
            num_hidden_layers=trial.layers, num_attention_heads=trial.heads, max_position_embeddings=trial.length,
        )  # fmt: skip


def build_end(models: PlantedModels, which: str, folder: Path) -> None:
    """Fills a stage: `outcome.json`."""
    rows, planted = models.rows(MIXED if which == CLEAN else which)
    keep = models.kept(CLEAN if which == CLEAN else NOTHING, rows, planted)
    # the checkpoint of an interrupted training stays in the folder of the run: an unfinished stage is thrown away
    context = dataclasses.replace(models.context, folder=models.context.folder / which, keep_model=False)
    outcome = models.trained([row for row, stays in zip(rows, keep) if stays], context)
    (folder / "outcome.json").write_text(json.dumps(outcome_to_json(outcome)), encoding="utf-8")


def inflations(outcome: Outcome, clean: Outcome, most: Outcome) -> tuple[dict[str, Items], dict[str, str]]:
    """By item, how many bits per byte fewer than `clean` a model needs (`inflation`), and that over the mean for `most`.

    Returns the scores, and why one has none: the share is undefined where planting taught next to nothing.
    """
    import numpy as np

    for end in (clean, most):
        if end.diverged is not None:
            return {}, dict.fromkeys(
                ("inflation", "inflation_left"), f"a model to compare with diverged: {end.diverged}"
            )
    name = "planted_bits_per_byte"
    bits, before, after = (np.array(one.items[name].scores) for one in (outcome, clean, most))
    gain = before - after
    mean, error = float(gain.mean()), float(gain.std()) / max(len(gain) - 1, 1) ** 0.5
    scores = {"inflation": dataclasses.replace(outcome.items[name], scores=tuple((before - bits).tolist()))}
    if len(gain) < 2 or not mean > SURE * error:
        reason = (
            f"planting gained {mean:.3f} bits per byte, less than {SURE:g} of its standard errors over items ({error:.3f}); "
            "raise --copies, --steps or --items"
        )
        return scores, {"inflation_left": reason}
    scores["inflation_left"] = dataclasses.replace(outcome.items[name], scores=tuple(((before - bits) / mean).tolist()))
    return scores, {}
