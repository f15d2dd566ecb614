"""Does weighing late tokens less in DPO keep answers as long as they were, and as good?"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from trialist.engine.context import Context
from trialist.engine.contract import Arm, Budget, Claim, Endpoint, Outcome, Trial, Tuning
from trialist.trials._language_model import (
    BUILT_IN,
    PRELOAD,
    VERSIONS,
    check_inputs,
    check_length,
    model_inputs,
    train,
)

RATES, BETAS, GAMMAS, MARGINS = (1e-4, 3e-4), (0.01, 0.03, 0.1, 0.3, 1.0, 3.0), (0.9, 0.98), (0.0, 0.5)
BETAS_OF_MEANS = (1.0, 2.5, 10.0)
BETAS_GIVEN_MODEL = (0.1, 0.3)
"""The usual one, and as much more as it takes to make up for what gamma 0.98 leaves of a sum over 140 tokens"""
BEFORE = "the model before training on preferences: the zero point of accuracy and length"
ACCURACY = Endpoint("held_out_preference_accuracy", unit="share of pairs", better="higher")


@dataclass(frozen=True)
class D2POTrial(Trial):
    """Does weighing late tokens less than early ones keep answers as long as before, and as good, where DPO lengthens them?"""

    claim = Claim(
        statement="At equal steps on pairs whose chosen answers tend to be longer, D2PO leaves the length of answers nearer to "
        "what it was than DPO, SimPO and SamPO do, and answers no worse.",
        source="arXiv:2502.14340",
        reported="5.9 to 8.8 points over DPO on AlpacaEval 2, 3.3 to 9.7 on Arena-Hard, with shorter answers",
        endpoint=Endpoint("length_drift", unit="tokens", better="lower", margin=1.0),
        guards=(Endpoint("accuracy", unit="share", better="higher", margin=0.02, needs="gold"),),
        secondary=(
            Endpoint("length_inflation", unit="tokens", better="lower"),
            Endpoint("answer_length", unit="tokens", better="lower"),
            Endpoint("capped_answers", unit="share of answers", better="lower"),
            Endpoint("flipped_accuracy", unit="share of pairs", better="higher"),
            ACCURACY,
        ),
    )
    budget = Budget("tokens")
    tuning = Tuning(tries=12, metric=ACCURACY)
    presets = {
        "tiny": dict(seeds=3, about="about 10 minutes a setting on 2 cores"),
        "real": dict(model="smollm2-135m-instruct", lora=8, learning_rate=2e-4, imitation_steps=100, steps=100, batch=8,
                     length=192, answer=128, pairs=800, test_items=192, seeds=3,
                     about="a given model and --data of your own, hours on 2 cores"),
        "gpu": dict(layers=8, width=384, heads=8, base_steps=4_000, pairs=16_384, steps=800, batch=64, test_items=4_096,
                    seeds=6, about="under an hour on one GPU"),
    }  # fmt: skip
    preload = (*PRELOAD, "trialist.data.preference_task")
    versions = VERSIONS
    usage = (
        "from trialist.objectives import D2PO\n"
        "trainer = ObjectiveTrainer(model, arguments, objective=D2PO(gamma=0.98), train_dataset=rows)\n"
        "# or: trialist train preference --objective d2po --model M --data prefs.jsonl --output OUT"
    )

    model: str = BUILT_IN
    """Hub id, local folder or asset of a model to train on --data; `decoder` trains a small one on generated pairs"""
    data: str = ""
    """Preferences for a given model: Hub id, local .jsonl, .json or .parquet file or folder"""
    columns: str = ""
    """Columns under other names: prompt=question,chosen=better,rejected=worse"""
    split: str | None = None
    """Split of the data to read; it is cut 80/10/10 by prompt"""
    max_examples: int | None = None
    """Most rows to read"""
    layers: int = 3
    """Layers of the built-in decoder"""
    width: int = 96
    """Width of the built-in decoder"""
    heads: int = 4
    """Attention heads of the built-in decoder"""
    base_steps: int = 700
    """Steps of 64 answers by which the built-in decoder learns to answer before it sees preferences"""
    imitation_steps: int = 0
    """Steps of --batch chosen answers that a given model imitates before it sees preferences, so that it writes and ends answers
    like those of the data; 0 takes it as it is"""
    pairs: int = 2_048
    """Most pairs to train on"""
    steps: int = 120
    """Training steps on preferences"""
    batch: int = 32
    """Pairs in a step"""
    length: int = 512
    """Most tokens of a prompt with an answer, for a given model"""
    answer: int = 128
    """Most tokens of a sampled answer; one that reaches them is cut and counts as so long"""
    test_items: int = 1_024
    """Most pairs for validation, and for the test, to whose prompts answers are sampled"""
    gamma: float = 0.98
    """Weight of a token over that of the token before, where nothing was tuned; in (0, 1], 1 is DPO"""
    beta: float = 0.1
    """Inverse temperature where nothing was tuned"""
    learning_rate: float = 5e-5
    """Peak learning rate for a given model, in all arms"""
    device: str = "auto"
    """`auto`, `cpu` or `cuda`"""
    dtype: str = "float32"
    """float32, or bfloat16 for autocast"""
    lora: int = 0
    """Rank of LoRA adapters for a given model; 0 trains all weights"""

    def __post_init__(self) -> None:
        # with a given model every try takes long; they go to beta, as D2PO's sums are on another scale than DPO's
        if self.model != BUILT_IN:
            object.__setattr__(self, "tuning", dataclasses.replace(type(self).tuning, tries=len(BETAS_GIVEN_MODEL)))

    def check(self) -> None:
        check_inputs(
            self.model, self.dtype, self.lora, layers=self.layers, width=self.width, heads=self.heads, batch=self.batch,
            base_steps=self.base_steps, steps=self.steps, pairs=self.pairs, test_items=self.test_items, answer=self.answer,
            length=self.length,
        )  # fmt: skip
        if not 0 < self.gamma <= 1:
            raise ValueError(f"--gamma must be in (0, 1], not {self.gamma}; 1 is DPO")
        if not self.beta > 0 or not self.learning_rate > 0:
            raise ValueError(f"--beta and --learning-rate must be > 0, not {self.beta} and {self.learning_rate}")
        if self.imitation_steps < 0:
            raise ValueError(f"--imitation-steps must be at least 0, not {self.imitation_steps}")
        if self.model == BUILT_IN:
            if self.imitation_steps:
                raise ValueError("--imitation-steps are for a given model; the built-in decoder has --base-steps")
            if self.data:
                raise ValueError(
                    "--data are for a given model, the built-in decoder reads generated pairs; name a --model"
                )
            if self.width % self.heads:
                raise ValueError(f"--width {self.width} must be a multiple of --heads {self.heads}")
            return
        if not self.data:
            raise ValueError(f"--model {self.model} needs --data with preferences: prompt, chosen, rejected")
        check_length(self.model, self.length + self.answer)
        from trialist.data.tokenizers import load_tokenizer
        from trialist.trials._own_preferences import own_pairs

        own_pairs(self, load_tokenizer(self.model))

    def digests(self) -> Mapping[str, str]:
        found = model_inputs(self.model, self.device)
        if self.data:
            from trialist.data.corpora import data_digest

            found["data"] = data_digest(self.data)
        return found

    def remarks(self) -> tuple[str, ...]:
        if self.model == BUILT_IN:
            return ()
        return (
            "for accuracy, which needs gold, stands the share of test pairs that the trained model ranks right, those where the "
            "chosen answer is longer and those where it is not weighing the same",
            "SimPO, SamPO and the null setting are left out: your data do not say which tokens decide",
            f"each arm takes the beta of {' and '.join(map(str, BETAS_GIVEN_MODEL))} that ranks held-out pairs better, at one "
            "learning rate and one gamma",
        )

    def arms(self) -> Iterator[Arm]:
        if self.model != BUILT_IN:
            given: dict[str, Any] = {"beta": self.beta, "learning_rate": self.learning_rate, "gamma": 1.0}
            tune: Mapping[str, tuple] = {"beta": BETAS_GIVEN_MODEL}
            yield Arm("before", "reference", "own", options={"method": "none"}, about=BEFORE)
            yield Arm(
                "dpo", "control", "own", options={**given, "method": "dpo"}, tune=tune, about="every token weighs 1"
            )
            yield Arm("d2po", "treatment", "own", options={**given, "method": "d2po", "gamma": self.gamma}, tune=tune,
                      about="token t weighs gamma^t")  # fmt: skip
            return
        options: dict[str, Any] = {"beta": self.beta, "learning_rate": 3e-4, "gamma": self.gamma, "margin_ratio": 0.0}
        grids: tuple[tuple[str, dict[str, tuple], str], ...] = (
            ("dpo", {"beta": BETAS}, "every token weighs 1"),
            ("simpo", {"beta": BETAS_OF_MEANS, "margin_ratio": MARGINS}, "mean over tokens, a margin, no reference"),
            ("sampo", {"beta": BETAS}, "as many tokens of the longer answer as the shorter has"),
            ("d2po", {"beta": BETAS[2:5], "gamma": GAMMAS}, "token t weighs gamma^t"),
        )
        for setting, null in (("first", False), ("last", True)):
            yield Arm("before", "reference", setting, null, options={"method": "none"}, about=BEFORE)
            for name, grid, about in grids:
                yield Arm(
                    name, "treatment" if name == "d2po" else "control", setting, null, options={**options, "method": name},
                    tune=None if null else {"learning_rate": RATES, **grid}, about=about,
                )  # fmt: skip

    def run(self, arm: Arm, seed: int, context: Context) -> Outcome:
        from trialist.data.collation import stack_or_pad
        from trialist.data.order import BatchOrder
        from trialist.models import deterministic_scoring
        from trialist.objectives import Preference
        from trialist.trials._preference_models import PreferenceModels

        models, method = PreferenceModels(self, context, arm.setting), arm["method"]
        if method == "none":
            return models.outcome_before()
        model = models.model()
        objective = Preference(
            method, beta=arm["beta"], gamma=arm["gamma"] if method == "d2po" else None,
            margin_ratio=arm["margin_ratio"] if method == "simpo" else None, share_prompt=models.shares(model),
        )  # fmt: skip
        rows = models.rows("train", objective)
        order = BatchOrder(len(rows), self.batch, context.stream("data_order"))

        def batches(step: int) -> dict[str, Any]:
            batch = stack_or_pad([rows[index] for index in order(step)])
            return {name: tensor.to(model.device) for name, tensor in batch.items()}

        with deterministic_scoring(model):  # as the reference scored, without dropout
            outcome, _ = train(
                model, batches, context, steps=self.steps, learning_rate=arm["learning_rate"], dtype=self.dtype,
                evaluate=lambda _: {}, evaluations=1, tokenizer=models.tokenizer, objective=objective,
            )  # fmt: skip
        forwards = 2 * self.batch * (outcome.cost.steps or 0) + 2 * len(rows) * objective.needs_reference
        cost = dataclasses.replace(outcome.cost, sequence_forwards=forwards)
        outcome = dataclasses.replace(outcome, cost=cost, notes=models.notes)
        return outcome if outcome.diverged is not None else models.measured(model.eval(), objective, outcome)
