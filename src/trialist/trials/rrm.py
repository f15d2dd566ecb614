"""Do counterfactual pairs make a reward model judge answers by the prompt, and not by artefacts?"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trialist.engine.context import Context
from trialist.engine.contract import Arm, Budget, Claim, Cost, Endpoint, Outcome, Trial, Tuning
from trialist.engine.hardware import resolve_device
from trialist.trials._language_model import (
    BUILT_IN,
    PRELOAD,
    VERSIONS,
    check_inputs,
    check_length,
    model_inputs,
    train,
)
from trialist.trials._reward_arms import GroupBatches, accuracies, best_of, groups_of, rewards_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from trialist.trials._reward_data import RewardData, Rows

GENERATED = "keywords"
LEARNING_RATES = (5e-4, 1e-3, 2e-3)
LEARNING_RATES_GIVEN_MODEL = (1e-5, 3e-5, 1e-4)
BALANCED = 0.55
"""How often an artefact is in either answer in the null setting"""


class EarlierDiverged(Exception):
    """The model that an arm filters by has diverged, and with it the arm: an outcome, no failure."""

    def __init__(self, reason: str, spent: float) -> None:
        super().__init__(reason)
        self.spent = spent


@dataclass(frozen=True)
class RRMTrial(Trial):
    """Do pairs with answers to other prompts keep a reward model from rewarding a phrase and length?"""

    claim = Claim(
        statement="At equal sequence forwards, a reward model that also learns that answers to other prompts lose to and tie "
        "among each other orders pairs rightly where an artefact sits in the worse answer, more often than one without.",
        source="arXiv:2409.13156",
        reported="RewardBench 80.61 to 84.15 for Gemma-2-9b-it (Chat and Reasoning fall, Chat-Hard and Safety gain); policies "
        "aligned to it: MT-Bench 7.27 to 8.31, length-controlled AlpacaEval 2 33.46 % to 52.49 %",
        endpoint=Endpoint("shifted_accuracy", unit="share of pairs", better="higher", margin=0.03),
        guards=(Endpoint("clean_accuracy", unit="share of pairs", better="higher", margin=0.03),),
        secondary=(
            Endpoint("inserted_accuracy", unit="share of pairs", better="higher"),
            Endpoint("lengthened_accuracy", unit="share of pairs", better="higher"),
            Endpoint("off_topic_accuracy", unit="share of pairs", better="higher"),
            Endpoint("annotated_accuracy", unit="share of pairs", better="higher"),
            Endpoint("best_of_16_quality", unit="of four wanted", better="higher"),
            Endpoint("best_of_16_artefacts", unit="share of artefacts", better="lower"),
        ),
    )
    budget = Budget("sequence_forwards", tolerance=0.01, reason="a step holds the sequences of whole prompts")
    tuning = Tuning(tries=3, metric=Endpoint("validation_accuracy", unit="share of pairs", better="higher"))
    presets = {
        "tiny": dict(seeds=3, about="about 10 minutes a setting on 2 cores"),
        "real": dict(model="smollm2-135m-instruct", pairs=600, test_items=300, forwards=7_200, batch=24, length=192,
                     artefact_chosen=0.3, artefact_rejected=0.0, lora=16, seeds=3,
                     about="a given model and --data of your own, many hours on 2 cores"),
        "gpu": dict(layers=4, width=256, pairs=60_000, forwards=960_000, batch=480, test_items=4_000, seeds=6,
                    about="minutes on one GPU"),
    }  # fmt: skip
    preload = (
        *PRELOAD,
        "trialist.data.augment_preferences",
        "trialist.data.artefact_task",
        "trialist.models.reward_model",
    )
    versions = VERSIONS
    usage = (
        "from trialist.data.augment_preferences import augment_preferences\n"
        "pairs = augment_preferences(rows, num_donors=2)  # then `trialist train reward --data ...`, or --donors 2 at once"
    )

    model: str = BUILT_IN
    """Hub id, local folder or asset of a language model to make a reward model of; `decoder` trains a small one from scratch"""
    data: str = GENERATED
    """Rows of preferences: Hub id, local .jsonl, .json or .parquet file or folder; `keywords` are generated"""
    layers: int = 2
    """Layers of the built-in model"""
    width: int = 64
    """Width of the built-in model, a multiple of 4"""
    pairs: int = 6_000
    """Annotated pairs to train on"""
    forwards: int = 96_000
    """Sequences that each arm may put through a model: in training, in training the model it filters by, and in filtering"""
    batch: int = 48
    """Sequences in a step"""
    learning_rate: float = 1e-3
    """Peak learning rate where nothing was tuned"""
    artefact_chosen: float = 0.8
    """How often an artefact is in the preferred answer of the annotated pairs"""
    artefact_rejected: float = 0.3
    """How often it is in the other one"""
    noise: float = 0.05
    """Share of generated pairs whose worse answer is preferred"""
    phrase: str = "Sure, here is the response:"
    """Artefact that is put into rows of your own"""
    sample_fraction: float = 0.5
    """Share of the added pairs that is kept at random, before filtering"""
    min_gap: float = 0.2
    """Pairs stay whose label the earlier model misses by at least this much, in probability"""
    test_items: int = 500
    """Pairs in each test"""
    length: int = 512
    """Most tokens of a prompt with an answer, of rows of your own"""
    columns: str = ""
    """Columns of your rows under other names, ours first: chosen=better,rejected=worse"""
    split: str | None = None
    """Split of your rows; without it train, or all there is"""
    max_examples: int | None = None
    """Most rows of your own to read"""
    device: str = "auto"
    """`auto`, `cpu` or `cuda`"""
    dtype: str = "float32"
    """float32, or bfloat16 for autocast"""
    lora: int = 0
    """Rank of LoRA adapters for a given model; 0 trains all weights"""

    def check(self) -> None:
        check_inputs(
            self.model, self.dtype, self.lora, layers=self.layers, width=self.width, pairs=self.pairs, forwards=self.forwards,
            batch=self.batch, test_items=self.test_items, length=self.length,
        )  # fmt: skip
        for name in ("artefact_chosen", "artefact_rejected", "noise", "min_gap"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"--{name.replace('_', '-')} must be from 0 to 1, not {getattr(self, name)}")
        if not 0 < self.sample_fraction <= 1:
            raise ValueError(f"--sample-fraction must be above 0 and at most 1, not {self.sample_fraction}")
        if self.batch < 6 or self.batch % 2:
            raise ValueError(f"--batch must be even and at least 6, the answers to a prompt, not {self.batch}")
        if self.forwards < 10 * self.pairs:
            raise ValueError(
                f"--forwards {self.forwards} is too few for --pairs {self.pairs}: the earlier model takes 2 a pair, filtering up "
                f"to 6, training as many again; give at least {10 * self.pairs}"
            )
        if self.model == BUILT_IN and self.width % 4:
            raise ValueError(f"--width {self.width} must be a multiple of 4, the number of heads")
        if self.data != GENERATED:
            if self.model == BUILT_IN:
                raise ValueError(
                    f"--data {self.data}: the built-in model reads symbols; name a --model that reads text"
                )
            check_length(self.model, self.length)
            from trialist.data.corpora import kind_of

            kind_of(self.data)
        elif self.model != BUILT_IN:
            check_length(self.model, self._task().longest)

    def digests(self) -> Mapping[str, str]:
        digests = model_inputs(self.model, self.device)
        if self.data == GENERATED:
            return digests
        from trialist.data.corpora import data_digest

        return {**digests, "data": data_digest(self.data)}

    def remarks(self) -> tuple[str, ...]:
        if self.data == GENERATED:
            return ()
        return (
            "rows of your own: the only artefact put in is the phrase, the length test takes rows whose rejected answer is the "
            "longer, and there is no best of 16, which needs answers of known quality",
        )

    def arms(self) -> Iterator[Arm]:
        rates = LEARNING_RATES if self.model == BUILT_IN else LEARNING_RATES_GIVEN_MODEL
        rate = self.learning_rate if self.model == BUILT_IN else rates[1]
        settings = [("artefacts", False), ("topic-named", False), ("balanced", True)]
        if self.data != GENERATED:
            settings.pop(1)
        for setting, null in settings:
            common: dict[str, Any] = {"learning_rate": rate, "donors": 0, "neutrals": False, "filter": False}
            tune = {"learning_rate": rates} if setting == "artefacts" else None
            yield Arm("plain", "control", setting, null, options=common, tune=tune,
                      about="Bradley-Terry on the annotated pairs, more epochs")  # fmt: skip
            yield Arm("filter-only", "control", setting, null, options={**common, "filter": True}, tune=tune,
                      about="annotated pairs, those that an earlier model has wrong or is unsure about twice")  # fmt: skip
            robust = {**common, "donors": 2, "neutrals": True, "filter": True}
            yield Arm("rrm", "treatment", setting, null, options=robust, tune=tune,
                      about="answers to two other prompts as losers and as ties, filtered by an earlier model")  # fmt: skip
            if setting == "artefacts":
                yield Arm("no-neutrals", "reference", setting, options={**robust, "neutrals": False}, tune=tune,
                          about="the same without ties")  # fmt: skip
                yield Arm("unfiltered", "reference", setting, options={**robust, "filter": False}, tune=tune,
                          about="the same without the filter")  # fmt: skip

    def run(self, arm: Arm, seed: int, context: Context) -> Outcome:
        model = self._model(context)
        data = self._data(arm, context, model)
        try:
            rows, overhead, notes = self._rows(arm, context, data)
        except EarlierDiverged as error:
            return Outcome(cost=Cost(sequence_forwards=error.spent), diverged=f"the model to filter by: {error}")
        groups = groups_of(rows, data.encode)
        batches = GroupBatches(groups, self.batch, self.forwards - overhead, context.stream("data_order"))

        def evaluate(trained: Any) -> dict[str, float]:
            found = accuracies(trained, data.tests, data.encode, batch=self.batch)
            shifted = (found["inserted_accuracy"] + found["lengthened_accuracy"]) / 2
            return {"shifted_accuracy": shifted, **found, **best_of(trained, data.choices, batch=self.batch)}

        outcome, last, spent = self._train(arm, context, model, batches, evaluate)
        cost = dataclasses.replace(outcome.cost, sequence_forwards=float(spent + overhead))
        outcome = dataclasses.replace(outcome, cost=cost, notes=notes)
        if outcome.diverged is not None:
            return outcome
        validation = accuracies(model, {"validation_accuracy": data.validation}, data.encode, batch=self.batch)
        undefined = {} if data.choices else dict.fromkeys(
            ("best_of_16_quality", "best_of_16_artefacts"), "answers of known quality are generated only"
        )  # fmt: skip
        return dataclasses.replace(outcome, metrics={**last, **validation}, undefined=undefined)

    def _train(
        self,
        arm: Arm,
        context: Context,
        model: PreTrainedModel,
        batches: GroupBatches,
        evaluate: Any,
        evaluations: int = 4,
    ) -> tuple[Outcome, Mapping[str, float], int]:
        from trialist.data.reward_groups import collate_groups
        from trialist.objectives.reward import RewardLoss

        plan = batches.plan()
        if not plan:
            raise ValueError(f"--forwards {self.forwards} leaves none to train on; raise it, or lower --pairs")
        device = resolve_device(self.device)
        padding = model.config.get_text_config().pad_token_id

        def batch(step: int) -> dict[str, Any]:
            chosen = [batches.groups[index] for index in plan[step]]
            return {name: tensor.to(device) for name, tensor in collate_groups(chosen, pad_token_id=padding).items()}

        outcome, last = train(
            model, batch, context, steps=len(plan), learning_rate=arm["learning_rate"], dtype=self.dtype, evaluate=evaluate,
            evaluations=evaluations, objective=RewardLoss(),
        )  # fmt: skip
        return outcome, last, batches.spent(plan)

    def _rows(self, arm: Arm, context: Context, data: RewardData) -> tuple[Rows, int, tuple[str, ...]]:
        """What an arm trains on, the sequence forwards that this took, and what is to be said of it."""
        from trialist.data.augment_preferences import augment_preferences
        from trialist.data.filter_preferences import filter_by_reward_model

        original = [{**row, "pair_type": "original", "source_index": index} for index, row in enumerate(data.train)]
        made: Rows = [{**row, "pair_type": "copy", "source_index": f"copy {row['source_index']}"} for row in original]
        if arm["donors"]:
            kinds = ("non_contextual", "neutral") if arm["neutrals"] else ("non_contextual",)
            made = augment_preferences(
                data.train, num_donors=arm["donors"], include=kinds, sample_fraction=self.sample_fraction,
                seed=context.stream("donors"),
            )  # fmt: skip
        if not arm["filter"]:
            return [*original, *(made if arm["donors"] else ())], 0, ()
        earlier, spent = self._earlier(arm, context, data)
        pairs = data.encode(made)
        sequences = [[*pair.prompt, *answer] for pair in pairs for answer in (pair.chosen, pair.rejected)]
        rewards = rewards_of(earlier, sequences, batch=self.batch)
        found = dict(zip((pair.row for pair in pairs), zip(rewards[::2], rewards[1::2])))
        scored = [row for number, row in enumerate(made) if number in found]
        kept = filter_by_reward_model(scored, lambda rows: list(found.values()), min_gap=self.min_gap)
        spent += len(set(map(tuple, sequences)))
        share = len(kept) / max(len(scored), 1)
        return (
            [*original, *kept],
            spent,
            (f"{arm.name} in setting {arm.setting}: the filter kept {share:.0%} of its pairs",),
        )

    def _earlier(self, arm: Arm, context: Context, data: RewardData) -> tuple[PreTrainedModel, int]:
        """The reward model to filter by: one pass over the annotated pairs; and the sequence forwards it took."""
        from trialist.models.reward_model import load_reward_model

        def build(folder: Path) -> None:
            groups = groups_of(data.train, data.encode)
            batches = GroupBatches(groups, self.batch, 2 * len(groups), context.stream("data_order"))
            own = dataclasses.replace(context, folder=folder, keep_model=True)
            outcome, _, spent = self._train(arm, own, self._model(context), batches, lambda _: {}, evaluations=1)
            (folder / "earlier.json").write_text(json.dumps({"spent": spent, "diverged": outcome.diverged}))

        left_out = {"device", "model", "data", "forwards", "test_items", "sample_fraction", "min_gap", "learning_rate"}
        inputs = tuple(getattr(self, name) for name in sorted({f.name for f in dataclasses.fields(self)} - left_out))
        place = context.stage(
            "rrm-earlier",
            (arm.setting, arm["learning_rate"], context.seed, *inputs, *sorted(self.digests().items())),
            build,
        )
        padding = self._model(context).config.get_text_config().pad_token_id if self.model == BUILT_IN else None
        told = json.loads((place / "earlier.json").read_text())
        if told["diverged"] is not None:
            raise EarlierDiverged(told["diverged"], float(told["spent"]))
        loaded, _ = load_reward_model(str(place / "model"), device=resolve_device(self.device), pad_token_id=padding)
        return loaded, told["spent"]

    def _task(self, setting: str = "artefacts") -> Any:
        from trialist.data.artefact_task import ArtefactTask

        rates = (BALANCED, BALANCED) if setting == "balanced" else (self.artefact_chosen, self.artefact_rejected)
        return ArtefactTask(*rates, noise=self.noise, names_topic=setting == "topic-named")

    def _data(self, arm: Arm, context: Context, model: PreTrainedModel) -> RewardData:
        from trialist.trials._reward_data import generated, own_rows

        if self.data == GENERATED:
            from trialist.trials._symbols import symbol_ids

            task = self._task(arm.setting)
            ids = range(task.vocabulary)
            if self.model != BUILT_IN:
                ids = symbol_ids(model.config.get_text_config().vocab_size, task.vocabulary).tolist()
            return generated(task, context.stream("pairs"), pairs=self.pairs, test_items=self.test_items, ids=ids)
        from trialist.data.preferences import encode_preferences, read_preferences
        from trialist.data.tokenizers import load_tokenizer

        rows = read_preferences(self.data, columns=self.columns, split=self.split, max_examples=self.max_examples)
        tokenizer = load_tokenizer(self.model)
        rates = (self.artefact_chosen, self.artefact_rejected)
        if arm.setting == "balanced":
            rates = (sum(rates) / 2,) * 2
        return own_rows(
            rows, context.stream("pairs"), phrase=self.phrase, rates=rates, pairs=self.pairs, test_items=self.test_items,
            encode=lambda some: encode_preferences(some, tokenizer, max_length=self.length, source=self.data)[0],
        )  # fmt: skip

    def _model(self, context: Context) -> PreTrainedModel:
        """A fresh reward model, the same for all arms of a seed."""
        if self.model == BUILT_IN:
            return new_reward_model(context.stream("init"), self._task(), layers=self.layers, width=self.width).to(
                resolve_device(self.device)
            )
        from trialist.data.tokenizers import load_tokenizer
        from trialist.models.reward_model import load_reward_model, padding_token

        padding = padding_token(load_tokenizer(self.model))
        model, _ = load_reward_model(
            self.model, device=resolve_device(self.device), pad_token_id=padding, seed=context.stream("init")
        )
        if not self.lora:
            return model
        import torch

        from trialist.models.reward_model import reward_adapters

        torch.manual_seed(context.stream("init"))
        return reward_adapters(model, self.lora)


def new_reward_model(seed: int, task: Any, *, layers: int, width: int) -> PreTrainedModel:
    """A small Llama with a reward head; its weights depend on seed and parameter name only."""
    from transformers import LlamaConfig, LlamaForSequenceClassification

    from trialist.data.artefact_task import PAD
    from trialist.models.initialization import initialize_

    config = LlamaConfig(
        vocab_size=task.vocabulary, hidden_size=width, intermediate_size=2 * width, num_hidden_layers=layers,
        num_attention_heads=4, max_position_embeddings=task.longest, num_labels=1, pad_token_id=PAD, use_cache=False,
        initializer_range=width**-0.5,  # such small models learn late, or not at all, from the usual 0.02
    )  # fmt: skip
    model = LlamaForSequenceClassification(config)
    initialize_(model, seed)
    return model
