"""Do counterfactual pairs make a reward model judge answers by the prompt, and not by artefacts?"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from trialist.engine.context import Context
from trialist.engine.contract import Arm, Budget, Claim, Cost, Endpoint, Outcome, Replicate, Trial, Tuning
from trialist.trials._language_model import (
    BUILT_IN,
    PRELOAD,
    VERSIONS,
    check_inputs,
    check_length,
    model_inputs,
)

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from trialist.data.artefact_task import ArtefactTask
    from trialist.trials._reward_data import RewardData

GENERATED = "keywords"
LEARNING_RATES = (5e-4, 1e-3, 2e-3)
LEARNING_RATES_GIVEN_MODEL = (3e-5, 2e-4)
FORWARDS_A_PAIR = 10
"""Least budget: the earlier model takes 2 sequences a pair, filtering up to 6, and training as many must be left"""
ORIGINAL, NO_TIES, ALL = "original", "original non_contextual", "original non_contextual neutral"
SHARE = "share of pairs"
CLEAN = Endpoint("clean_accuracy", unit=SHARE, better="higher", margin=0.03, floor=0.6)
CLEAN_FLOOR_OWN_ROWS = 0.55
"""Raters agree less with each other than generated labels do with what they are made of"""


@dataclass(frozen=True)
class RRMTrial(Trial):
    """Do pairs with answers to other prompts keep a reward model from rewarding a phrase and length?"""

    claim = Claim(
        statement="At equal sequence forwards, where one of two answers to a prompt carries an artefact, in the worse as often "
        "as in the better, a reward model that also learns that answers to other prompts lose to and tie among each other "
        "orders them rightly more often than one without.",
        source="arXiv:2409.13156",
        reported="RewardBench 80.61 to 84.15 for Gemma-2-9b-it (Chat and Reasoning fall, Chat-Hard and Safety gain); policies "
        "aligned to it: MT-Bench 7.27 to 8.31, length-controlled AlpacaEval 2 33.46 % to 52.49 %",
        endpoint=Endpoint("crossed_accuracy", unit=SHARE, better="higher", margin=0.03),
        guards=(CLEAN,),
        secondary=(
            Endpoint("against_artefacts", unit=SHARE, better="higher"),
            Endpoint("with_artefacts", unit=SHARE, better="higher"),
            Endpoint("artefact_pull", unit=SHARE, better="lower"),
            Endpoint("inserted_accuracy", unit=SHARE, better="higher"),
            Endpoint("lengthened_accuracy", unit=SHARE, better="higher"),
            Endpoint("relevance_accuracy", unit=SHARE, better="higher"),
            Endpoint("off_topic_accuracy", unit=SHARE, better="higher"),
            Endpoint("annotated_accuracy", unit=SHARE, better="higher"),
            Endpoint("best_of_16_quality", unit="of 7", better="higher"),
            Endpoint("best_of_16_artefacts", unit="share of artefacts", better="lower"),
        ),
    )
    budget = Budget("sequence_forwards", tolerance=0.01, reason="a step holds the sequences of whole prompts")
    tuning = Tuning(tries=3, metric=Endpoint("validation_accuracy", unit=SHARE, better="higher"))
    presets = {
        "tiny": dict(seeds=3, about="about 10 minutes a setting on 2 cores"),
        "real": dict(model="smollm2-135m-instruct", pairs=300, test_items=300, forwards=7_200, batch=24, length=512,
                     artefact_chosen=0.3, artefact_rejected=0.0, lora=16, seeds=3,
                     about="a given model and --data of your own; some hours a run on 2 cores, minutes on one GPU"),
        "gpu": dict(layers=4, width=256, pairs=40_000, forwards=960_000, batch=480, test_items=4_000, seeds=6,
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
    pairs: int = 2_000
    """Annotated pairs to train on"""
    forwards: int = 48_000
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
    test_items: int = 400
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

    def __post_init__(self) -> None:
        if self.model != BUILT_IN:  # every try takes long
            tries = len(LEARNING_RATES_GIVEN_MODEL)
            object.__setattr__(self, "tuning", dataclasses.replace(type(self).tuning, tries=tries, seeds=(1001,)))
        if self.own_rows:
            guard = dataclasses.replace(CLEAN, floor=CLEAN_FLOOR_OWN_ROWS)
            object.__setattr__(self, "claim", dataclasses.replace(type(self).claim, guards=(guard,)))

    @property
    def own_rows(self) -> bool:
        """Whether the rows are the user's own."""
        return self.data != GENERATED

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
        if self.forwards < FORWARDS_A_PAIR * self.pairs:
            raise ValueError(
                f"--forwards {self.forwards} is too few for --pairs {self.pairs}: the earlier model takes 2 a pair, filtering up "
                f"to 6, training more; give at least {FORWARDS_A_PAIR * self.pairs}"
            )
        if self.model == BUILT_IN and self.width % 4:
            raise ValueError(f"--width {self.width} must be a multiple of 4, the number of heads")
        if self.own_rows:
            if self.model == BUILT_IN:
                raise ValueError(
                    f"--data {self.data}: the built-in model reads symbols; name a --model that reads text"
                )
            check_length(self.model, self.length)
            from trialist.data.tokenizers import load_tokenizer
            from trialist.trials._reward_data import own_rows

            own_rows(self, 0, self._rates("artefacts"), load_tokenizer(self.model))
        elif self.model != BUILT_IN:
            check_length(self.model, self.task().longest)

    def digests(self) -> Mapping[str, str]:
        digests = model_inputs(self.model, self.device)
        if not self.own_rows:
            return digests
        from trialist.data.corpora import data_digest

        return {**digests, "data": data_digest(self.data)}

    def replicates_over(self) -> Replicate:
        return "seed x item" if self.own_rows else "seed"

    def remarks(self) -> tuple[str, ...]:
        if not self.own_rows:
            return ()
        return (
            "rows of your own: the artefact is the phrase, put into the rejected or into the chosen answer of each test row; the "
            "length test, which takes rows as they come, does not decide; there is neither best of 16 nor a test of relevance, "
            "which need answers of known quality",
        )

    def arms(self) -> Iterator[Arm]:
        rates = LEARNING_RATES if self.model == BUILT_IN else LEARNING_RATES_GIVEN_MODEL
        rate = self.learning_rate if self.model == BUILT_IN else rates[0]
        plain: dict[str, Any] = {"learning_rate": rate, "include": ORIGINAL, "filter": "none", "labels": True}
        robust = {**plain, "include": ALL, "filter": "added"}
        for setting, null in (("artefacts", False), ("topic-named", False), ("balanced", True)):
            if setting == "topic-named" and self.own_rows:
                continue
            primary = setting == "artefacts"
            tune = {"learning_rate": rates} if primary else None
            yield Arm("plain", "control", setting, null, options=plain, tune=tune,
                      about="Bradley-Terry on the annotated pairs, more epochs")  # fmt: skip
            yield Arm("filter-only", "control", setting, null, options={**plain, "filter": "all"}, tune=tune,
                      about="only annotated pairs that an earlier model has wrong or is unsure about")  # fmt: skip
            yield Arm("rrm", "treatment", setting, null, options=robust, tune=tune,
                      about="answers to two other prompts as losers and as ties, filtered by an earlier model")  # fmt: skip
            if not primary:
                continue
            unfiltered = {**robust, "filter": "none"}
            if not self.own_rows:
                yield Arm("no-neutrals", "reference", setting, options={**robust, "include": NO_TIES}, tuned_as="rrm",
                          about="the same without ties")  # fmt: skip
                yield Arm("unfiltered", "reference", setting, options=unfiltered, tuned_as="rrm",
                          about="the same without the filter")  # fmt: skip
            yield Arm("labels-off", "reference", setting, options={**unfiltered, "labels": False}, tuned_as="rrm",
                      about="no filter, and the annotated pairs as ties: what is learned without any label")  # fmt: skip

    def run(self, arm: Arm, seed: int, context: Context) -> Outcome:
        from trialist.data.reward_groups import group_rows
        from trialist.trials._reward_arms import GroupBatches, rows_of
        from trialist.trials._reward_measures import accuracies, best_of, items_of, right, scored
        from trialist.trials._reward_models import EarlierDiverged, earlier_model, fresh_model, train_rewards

        model = fresh_model(self, context)
        data = self._data(arm, context, model)
        try:
            rows, overhead, told = rows_of(self, arm, context, data, lambda: earlier_model(self, arm, context, data))
        except EarlierDiverged as error:
            return Outcome(cost=Cost(sequence_forwards=error.spent), diverged=f"the model to filter by: {error}")
        groups = group_rows(rows, data.encode(rows))
        batches = GroupBatches(groups, self.batch, self.forwards - overhead, context.stream("data_order"))
        scores: dict[str, list[float]] = {}

        def evaluate(trained: Any) -> dict[str, float]:
            scores.update(scored(trained, data, batch=self.batch))
            return {**accuracies(scores, data.inserted), **best_of(trained, data.choices, batch=self.batch)}

        outcome, last = train_rewards(self, arm, context, model, batches, evaluate)
        forwards = (outcome.cost.sequence_forwards or 0) + overhead
        cost = dataclasses.replace(outcome.cost, sequence_forwards=forwards)
        outcome = dataclasses.replace(outcome, cost=cost, notes=(*data.notes, *told))
        if outcome.diverged is not None:
            return outcome
        validation = right(model, data.validation, batch=self.batch)
        metrics = {**last, "validation_accuracy": sum(validation) / len(validation)}
        names = (endpoint.name for endpoint in self.claim.endpoints)
        undefined = {name: "the rows have no such test" for name in names if name not in metrics}
        items = items_of(scores, data.prompts) if data.prompts else {}
        return dataclasses.replace(outcome, metrics=metrics, undefined=undefined, items=items)

    def task(self, setting: str = "artefacts") -> ArtefactTask:
        """The generated preferences of a setting."""
        from trialist.data.artefact_task import ArtefactTask

        return ArtefactTask(*self._rates(setting), noise=self.noise, names_topic=setting == "topic-named")

    def _rates(self, setting: str) -> tuple[float, float]:
        """How often an artefact is in the preferred answer and in the other one."""
        rates = (self.artefact_chosen, self.artefact_rejected)
        return (sum(rates) / 2,) * 2 if setting == "balanced" else rates

    def _data(self, arm: Arm, context: Context, model: PreTrainedModel) -> RewardData:
        from trialist.trials._reward_data import generated, own_rows

        if self.own_rows:
            from trialist.data.tokenizers import load_tokenizer

            return own_rows(self, context.stream("pairs"), self._rates(arm.setting), load_tokenizer(self.model))
        from trialist.trials._symbols import symbol_ids

        task = self.task(arm.setting)
        ids = range(task.vocabulary)
        if self.model != BUILT_IN:
            ids = symbol_ids(model.config.get_text_config().vocab_size, task.vocabulary).tolist()
        return generated(task, context, pairs=self.pairs, test_items=self.test_items, ids=ids)
