"""Does the weight difference that post-training made carry over to a base that has learned more, without training?"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from trialist.engine.context import Context
from trialist.engine.contract import Arm, Budget, Claim, Cost, Endpoint, Outcome, Trial
from trialist.trials._fact_models import FactModels, lineage_cosine
from trialist.trials._language_model import BUILT_IN, PRELOAD, VERSIONS, check_inputs, check_length, model_inputs

DISTANCES = {"near": 1, "middle": 2, "far": 4}
"""Setting -> how many times `continued` steps lie between the base and the new base"""
SHORT = 0.1
"""Share of the fine-tuning steps that the control with a small budget gets"""


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
        guards=(Endpoint("old_facts", unit="share of sampled answers", better="higher", margin=0.1),),
        secondary=(
            Endpoint("new_facts_greedy", unit="share of answers", better="higher"),
            Endpoint("old_facts_greedy", unit="share of answers", better="higher"),
            Endpoint("statement_loss", unit="nats per token", better="lower"),
            Endpoint("share_of_direct", unit="of direct fine-tuning's new_facts", better="higher"),
            Endpoint("lineage_cosine", unit="mean over matrices", better="higher"),
        ),
    )
    budget = Budget("tokens")
    presets = {
        "tiny": dict(seeds=3, about="about 10 minutes a setting on 2 cores"),
        "real": dict(model="smollm2-135m-instruct", steps=300, continued=150, sft_steps=150, batch=8, learning_rate=1e-4,
                     sft_learning_rate=3e-5, short_learning_rate=1e-4, seeds=3,
                     about="a given model as the base, many hours on 2 cores"),
        "gpu": dict(layers=8, width=384, heads=8, old=1024, new=1024, names=64, steps=6_000, continued=3_000, sft_steps=2_000,
                    batch=64, learning_rate=1e-3, seeds=6, about="under an hour on one GPU"),
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
    """Peak learning rate of post-training and of direct fine-tuning"""
    short_learning_rate: float = 1e-3
    """Peak learning rate of direct fine-tuning with a tenth of the steps, which needs a higher one"""
    device: str = "auto"
    """`auto`, `cpu` or `cuda`"""
    dtype: str = "float32"
    """float32, or bfloat16 for autocast"""

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
        controls: tuple[tuple[str, dict[str, float], str], ...] = (
            ("base-new", {}, "the new base, without post-training"),
            ("post", {}, "the old base with post-training, kept as it is"),
            ("average", {}, "mean of the new base's weights and the old post-trained ones"),
            ("direct-short", {"share": SHORT}, "the new base fine-tuned with a tenth of the steps"),
        )
        references: tuple[tuple[str, dict[str, float], str], ...] = (
            ("alpha-0.5", {"alpha": 0.5}, "half of the difference"),
            ("alpha-1.5", {"alpha": 1.5}, "one and a half times the difference"),
            ("direct", {}, "the new base fine-tuned with all steps: what ParamDelta saves"),
        )
        for setting in (*DISTANCES, "foreign"):
            null = setting == "foreign"
            for name, options, about in controls[: 3 if null else 4]:
                yield Arm(name, "control", setting, null, options=options, about=about)
            yield Arm("param-delta", "treatment", setting, null, options={"alpha": 1.0},
                      about="new base + (post - base), no training")  # fmt: skip
            for name, options, about in references[: 0 if null else 3]:
                yield Arm(name, "reference", setting, options=options, about=about)

    def run(self, arm: Arm, seed: int, context: Context) -> Outcome:
        models = FactModels(self, context)
        where = arm.setting, DISTANCES.get(arm.setting, 1)
        base, post, new = models.base(), models.post(), models.new(*where)
        scratch = context.folder / "made"
        shutil.rmtree(scratch, ignore_errors=True)  # of a run that was interrupted
        notes: tuple[str, ...] = ()
        if arm.name in ("base-new", "post"):
            place = {"base-new": new, "post": post}[arm.name]
        elif arm.name == "direct":
            place = models.direct(*where)
        elif arm.name == "direct-short":
            place = models.short(new, arm["share"], scratch)
        else:
            place, notes = merge(arm, scratch, base=base, post=post, new=new)
        trained = arm.name in ("direct", "direct-short")
        cost = (
            json.loads((place / "cost.json").read_text())
            if trained
            else dict.fromkeys(("tokens", "steps", "flops"), 0.0)
        )
        scores, undefined = models.scores(place), {}
        if arm.setting == "foreign":
            undefined["share_of_direct"] = "not measured in the null setting"
        else:
            scores["share_of_direct"] = scores["new_facts"] / models.scores(models.direct(*where))["new_facts"]
        if context.keep_model:
            shutil.copytree(place / "model", context.model_folder, dirs_exist_ok=True)
        scores["lineage_cosine"] = lineage_cosine(base, new)
        return Outcome(metrics=scores, cost=Cost(**cost), undefined=undefined, notes=notes)


def merge(arm: Arm, folder: Path, *, base: Path, post: Path, new: Path) -> tuple[Path, tuple[str, ...]]:
    """Puts the sum or the average of models into `folder/model`; returns what the lineage check had against it as well."""
    from trialist.weights.arithmetic import apply_param_delta

    of_base, of_post, of_new = (str(place / "model") for place in (base, post, new))
    if arm.name == "average":  # new + (post - new) / 2
        report = apply_param_delta(of_new, [(of_post, of_new, 0.5)], folder / "model", force=True)
    else:
        report = apply_param_delta(of_new, [(of_post, of_base, arm["alpha"])], folder / "model", force=True)
    refused = any("not of one lineage" in words for words in report.overridden)
    said = f"{arm.name} in setting {arm.setting}: the lineage check refuses these models and was overridden"
    return folder, (said,) if refused else ()
