"""Does the weight difference that post-training made carry over to a base that has learned more, without training?"""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trialist.engine.context import Context
from trialist.engine.contract import Arm, Budget, Claim, Cost, Endpoint, Outcome, Trial, Tuning
from trialist.trials._fact_models import FactModels, lineage_cosine
from trialist.trials._language_model import BUILT_IN, PRELOAD, VERSIONS, check_inputs, check_length, model_inputs

DISTANCES = {"near": 1, "middle": 2, "far": 4}
"""Setting -> how many times `continued` steps lie between the base and the new base"""
SHORT = 0.1
"""Share of the fine-tuning steps that the control with a small budget gets"""
RATES, WARMUPS = (1 / 3, 1.0, 3.0), (0.05, 0.2)
"""What tuning tries for fine-tuning the new base: multiples of the learning rate, and shares of warm-up"""
ALPHAS = (0.75, 1.0, 1.25, 1.5, 1.75, 2.0)
"""And for the factor of the delta, in as many tries"""
LEAST_DIRECT = 0.01
"""Answers that direct fine-tuning must give for a share of them to mean something"""


@dataclass(frozen=True)
class ParamDeltaTrial(Trial):
    """Does new base + (post-trained - base) answer what only the new base knows, in the form only post-training taught?"""

    claim = Claim(
        statement="Without any training, adding the weight difference of post-training to a base that was trained on gives a "
        "model that answers questions about what only the new base has learned.",
        source="arXiv:2504.21023",
        reported="about 95 % of the post-trained successor's average with deltas of Llama 3 on Llama 3.1 70B; over 75 % of "
        "questions on a new domain answered where the plain model answers none",
        endpoint=Endpoint("new_facts", unit="share of sampled answers", better="higher", margin=0.05),
        # against the arms on the new base: `post` stands on the old one, where nothing was trained over what it knows
        guards=(Endpoint("old_facts", unit="share of sampled answers", better="higher", margin=0.1),),
        secondary=(
            Endpoint("new_facts_greedy", unit="share of answers", better="higher"),
            Endpoint("old_facts_greedy", unit="share of answers", better="higher"),
            Endpoint("statement_loss", unit="nats per token", better="lower"),
            Endpoint("carried_over", unit="new_facts of param-delta over direct's", better="higher"),
            Endpoint("lineage_cosine", unit="mean over matrices", better="higher"),
        ),
    )
    version = 2
    budget = Budget("tokens")
    tuning = Tuning(tries=6, metric=Endpoint("validation_new_facts", unit="share of sampled answers", better="higher"))
    presets = {
        "tiny": dict(seeds=3, about="about 10 minutes a setting on 2 cores"),
        "real": dict(model="smollm2-135m-instruct", steps=300, continued=150, sft_steps=150, batch=8, learning_rate=1e-4,
                     sft_learning_rate=3e-5, direct_learning_rate=3e-5, short_learning_rate=1e-4, seeds=3,
                     about="a given model as the base, many hours on 2 cores; learning rates were not tried beforehand"),
        "gpu": dict(layers=8, width=384, heads=8, old=1024, new=1024, names=64, steps=6_000, continued=3_000, sft_steps=2_000,
                    batch=64, learning_rate=1e-3, direct_learning_rate=3e-4, short_learning_rate=1e-3, seeds=6,
                    about="under an hour on one GPU; learning rates were not tried beforehand"),
    }  # fmt: skip
    preload = (*PRELOAD, "trialist.data.fact_world", "trialist.weights.arithmetic")
    versions = VERSIONS
    usage = (
        "from trialist.weights import apply_param_delta\n"
        'apply_param_delta("my-new-base", [("my-old-chat-model", "my-old-base", 1.0)], "my-new-chat-model")'
    )

    model: str = BUILT_IN
    """Hub id, local folder or asset of a model that is taught the facts first; `decoder` trains a small one from scratch"""
    layers: int = 3
    """Layers of the built-in decoder"""
    width: int = 64
    """Width of the built-in decoder"""
    heads: int = 4
    """Attention heads of the built-in decoder"""
    old: int = 96
    """Entities whose facts the base learns; questions about half of them are post-training"""
    new: int = 96
    """Entities whose facts only the new base learns; half of them are asked about"""
    names: int = 16
    """First names, and last names"""
    length: int = 64
    """Tokens in a training sequence of statements"""
    batch: int = 16
    """Sequences of statements in a step; of questions twice as many"""
    steps: int = 800
    """Steps that make the base"""
    continued: int = 800
    """Steps from the base to the new base in setting near; two and four times as many in middle and far"""
    sft_steps: int = 500
    """Steps of post-training, and of direct fine-tuning of the new base"""
    learning_rate: float = 3e-3
    """Peak learning rate of the base, and again from base to new base"""
    sft_learning_rate: float = 3e-4
    """Peak learning rate of post-training"""
    direct_learning_rate: float = 1e-3
    """Peak learning rate of direct fine-tuning where nothing was tuned; tuning tries a third and three times as much too"""
    short_learning_rate: float = 3e-3
    """The same of direct fine-tuning with a tenth of the steps, which needs a higher one"""
    device: str = "auto"
    """`auto`, `cpu` or `cuda`"""
    dtype: str = "float32"
    """float32, or bfloat16 for autocast"""

    def __post_init__(self) -> None:
        if self.model != BUILT_IN:  # every try takes long
            object.__setattr__(self, "tuning", dataclasses.replace(type(self).tuning, tries=2, seeds=(1001,)))

    def check(self) -> None:
        check_inputs(
            self.model, self.dtype, 0, layers=self.layers, width=self.width, heads=self.heads, length=self.length,
            batch=self.batch, steps=self.steps, continued=self.continued, sft_steps=self.sft_steps, names=self.names,
        )  # fmt: skip
        if self.length < 8:
            raise ValueError(
                f"--length must be at least 8, the tokens of a question with its answer, not {self.length}"
            )
        if min(self.old, self.new) < 4:
            raise ValueError(f"--old and --new must be at least 4 entities, not {self.old} and {self.new}")
        if self.old + self.new > self.names**2:
            raise ValueError(
                f"--names {self.names} makes {self.names**2} entities, fewer than the {self.old + self.new} of --old and --new"
            )
        if self.model != BUILT_IN:
            check_length(self.model, self.length)
        elif self.width % self.heads:
            raise ValueError(f"--width {self.width} must be a multiple of --heads {self.heads}")

    def digests(self) -> Mapping[str, str]:
        return model_inputs(self.model, self.device)

    def remarks(self) -> tuple[str, ...]:
        if self.model == BUILT_IN:
            return ()
        return (
            "the foreign lineage of a given model is its architecture with weights drawn at random and trained alike",
        )

    def arms(self) -> Iterator[Arm]:
        """Fine-tuning of the new base and the factor of the delta are tuned, with equally many tries; the treatment is not: the
        paper's own factor is 1."""
        given = self.model != BUILT_IN
        rates, warmups, alphas = ((1.0, 3.0), (0.05,), (1.0, 1.5)) if given else (RATES, WARMUPS, ALPHAS)

        def fine_tuning(rate: float) -> dict[str, Any]:
            return {"learning_rate": tuple(rate * factor for factor in rates), "warmup": warmups}

        short = {"share": SHORT, "learning_rate": self.short_learning_rate, "warmup": WARMUPS[0]}
        direct = {"share": 1.0, "learning_rate": self.direct_learning_rate, "warmup": WARMUPS[0]}
        for setting in (*DISTANCES, "foreign"):
            null = setting == "foreign"
            yield Arm("base-new", "control", setting, null, about="the new base, without post-training")
            yield Arm("average", "control", setting, null, about="mean of the weights of new base and post")
            if not null:
                yield Arm("direct-short", "control", setting, options=short, tune=fine_tuning(self.short_learning_rate),
                          about="the new base fine-tuned with a tenth of the steps")  # fmt: skip
            yield Arm("param-delta", "treatment", setting, null, options={"alpha": 1.0},
                      about="new base + (post - base), no training")  # fmt: skip
            if null:
                continue
            yield Arm("post", "reference", setting, about="the old base with post-training, kept as it is")
            yield Arm("alpha-0.5", "reference", setting, options={"alpha": 0.5}, about="half of the difference")
            yield Arm("alpha-1.5", "reference", setting, options={"alpha": 1.5}, about="1.5 times the difference")
            yield Arm("alpha-tuned", "reference", setting, options={"alpha": 1.0}, tune={"alpha": alphas},
                      about="the difference times a factor chosen on validation questions")  # fmt: skip
            yield Arm("direct", "reference", setting, options=direct, tune=fine_tuning(self.direct_learning_rate),
                      about="the new base fine-tuned with all steps: what ParamDelta saves")  # fmt: skip

    def run(self, arm: Arm, seed: int, context: Context) -> Outcome:
        """All arms are handed base, post and new base; an arm is charged with what it trains beyond them."""
        models = FactModels(self, context)
        base, post, new = models.base(), models.post(), models.new(arm.setting, DISTANCES.get(arm.setting, 1))
        made = context.folder / "made"
        cost = Cost(tokens=0.0, steps=0.0, flops=0.0)
        notes: tuple[str, ...] = ()
        undefined = {"carried_over": "measured in the arm direct"}
        if arm.name in ("base-new", "post"):
            place = {"base-new": new, "post": post}[arm.name]
        elif arm.name in ("direct", "direct-short"):
            place, trained = made, models.taught(new, arm["share"], arm["learning_rate"], arm["warmup"], made)
            if trained.diverged is not None:
                return Outcome(metrics={}, cost=trained.cost, diverged=trained.diverged)
            cost = trained.cost
        else:
            place, notes = merge(arm, arm.options.get("alpha", 1.0), made, base=base, post=post, new=new)
        scores = models.scores(place)
        if arm.name == "direct":
            undefined = {}
            summed, _ = merge(arm, 1.0, context.folder / "summed", base=base, post=post, new=new)
            if scores["new_facts"] < LEAST_DIRECT:
                reason = f"direct fine-tuning answers {scores['new_facts']:.2g}, nothing to take a share of"
                undefined = {"carried_over": reason}
            else:
                scores["carried_over"] = models.scores(summed)["new_facts"] / scores["new_facts"]
        if context.keep_model:
            shutil.copytree(place / "model", context.model_folder, dirs_exist_ok=True)
        scores["lineage_cosine"] = lineage_cosine(base, new)
        return Outcome(metrics=scores, cost=cost, undefined=undefined, notes=notes)


def merge(arm: Arm, alpha: float, folder: Path, *, base: Path, post: Path, new: Path) -> tuple[Path, tuple[str, ...]]:
    """Puts the sum, or for `average` the mean, into `folder/model`; returns what the lineage check had against it as well."""
    from trialist.weights.arithmetic import apply_param_delta

    shutil.rmtree(folder, ignore_errors=True)  # of a run that was interrupted
    of_base, of_post, of_new = (str(place / "model") for place in (base, post, new))
    # the mean is new + (post - new) / 2
    delta = (of_post, of_new, 0.5) if arm.name == "average" else (of_post, of_base, alpha)
    report = apply_param_delta(of_new, [delta], folder / "model", force=True)
    refused = any("not of one lineage" in words for words in report.overridden)
    said = f"{arm.name} in setting {arm.setting}: the lineage check refuses these models and was overridden"
    return folder, (said,) if refused else ()
