"""Does stopping each token by itself keep the quality of recurrent depth at fewer steps?"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from trialist.engine.context import Context
from trialist.engine.contract import Arm, Budget, Claim, Endpoint, Outcome, Saving
from trialist.trials._language_model import PRELOAD, VERSIONS
from trialist.trials._walks import EVALUATION, VALIDATION, Walker, WalkTrial, answered, decoded, load_stage

if TYPE_CHECKING:
    from torch import Tensor

CRITERIA = ("kl", "entropy_diff", "latent_diff", "cosine", "argmax")
KL_THRESHOLD = 5e-4
"""The paper's"""
SWEEP = {"latent_diff": (0.3, 0.1, 0.03, 0.01), "kl": (1e-2, 1e-3, KL_THRESHOLD, 1e-4)}
"""Thresholds whose accuracy and steps are reported beside the verdict"""


@dataclass(frozen=True)
class AdaptiveExitTrial(WalkTrial):
    """Does stopping each token by itself keep the accuracy of recurrent depth at fewer steps?"""

    claim = Claim(
        statement="Decoding walks with a trained recurrent-depth model, tokens that stop when their state has settled "
        "answer as well as tokens that all run the full number of steps, at fewer steps on average.",
        source="arXiv:2502.05171",
        reported="KL exit at 5e-4 keeps MTBench (5.56 against 5.63); exit steps differ between subjects",
        endpoint=Endpoint("accuracy", unit="share of answers", better="higher", margin=0.02),
        secondary=(
            Endpoint("mean_steps", unit="steps", better="lower"),
            Endpoint("spearman_steps_hops", unit="rank correlation", better="higher"),
        ),
        kind="non-inferiority",
        saving=Saving("mean_steps", least=0.2),
    )
    budget = Budget("tokens")
    presets = {
        "tiny": dict(seeds=3, about="about 5 minutes on 2 cores"),
        "real": dict(model="smollm2-135m-instruct", layers="2,4,2", recurrence=4, backprop=4, batch=16, steps=300,
                     test_items=128, seeds=3, about="a given model with a loop among its layers, hours on 2 cores"),
        "gpu": dict(width=256, heads=8, layers="1,2,1", nodes=16, letters=8, hops=16, recurrence=16, batch=256, steps=4_000,
                    test_items=2048, seeds=6, about="minutes on one GPU"),
    }  # fmt: skip
    preload = (*PRELOAD, "trialist.data.walks", "trialist.models.recurrent_depth.loop")
    versions = VERSIONS
    usage = 'model.generate(ids, num_steps=32, exit_criterion="latent_diff", exit_threshold=0.03)'

    criterion: str = "latent_diff"
    """`kl`, `entropy_diff`, `latent_diff`, `cosine` or `argmax`"""
    threshold: float = 0.03
    """A token stops when the criterion falls below it"""

    @property
    def longest(self) -> int:
        """Hops of a test walk: some more than trained, for on trained hops every answer of a good model is right."""
        return self.hops + self.hops // 2

    def check(self) -> None:
        super().check()
        if self.criterion not in CRITERIA:
            raise ValueError(f"--criterion {self.criterion!r}: one of {', '.join(CRITERIA)}")
        if not self.threshold >= 0:
            raise ValueError(f"--threshold must be at least 0, not {self.threshold}")

    def arms(self) -> Iterator[Arm]:
        def arm(name: str, role: Any, about: str, criterion: str = "", threshold: float = 0.0) -> Arm:
            options = {"learning_rate": self.learning_rate, "criterion": criterion, "threshold": threshold}
            return Arm(name, role, "walks", options=options, about=about)

        chosen = (self.criterion, self.threshold)
        mean = "every token runs as many steps as tokens of `exit` run on average, rounded up"
        yield arm("all-steps", "control", "every token runs twice the mean training steps")
        yield arm("mean-steps", "reference", mean, *chosen)
        yield arm("random-exit", "reference", "the numbers of steps of `exit`, dealt out at random", *chosen)
        yield arm("exit-kl", "reference", f"tokens stop when KL falls below {KL_THRESHOLD:g}", "kl", KL_THRESHOLD)
        yield arm("exit", "treatment", f"tokens stop when {self.criterion} falls below {self.threshold:g}", *chosen)

    def walker(self, arm: Arm) -> Walker:
        return self.walker_of("walks", "recurrent", arm["learning_rate"])

    def run(self, arm: Arm, seed: int, context: Context) -> Outcome:
        walker = self.walker(arm)
        model, outcome = load_stage(walker.stage(context, self.longest), self.device)
        if outcome.diverged is not None:
            return outcome
        if context.keep_model:
            assert model is not None
            model.save_pretrained(context.model_folder)
        items = walker.items(context, EVALUATION, self.test_items, self.longest)
        symbols = walker.symbols(model, context)  # type: ignore[arg-type]
        most = 2 * self.recurrence
        options = {"num_steps": most, "exit_criterion": arm["criterion"], "exit_threshold": arm["threshold"]}
        if arm.name == "all-steps":
            found, taken = decoded(model, items, symbols, num_steps=most)
        elif arm.name in ("exit", "exit-kl"):
            found, taken = decoded(model, items, symbols, **options)
        else:
            _, taken = decoded(model, items, symbols, **options)
            if arm.name == "mean-steps":
                found, taken = decoded(model, items, symbols, num_steps=-(-int(taken.sum()) // taken.numel()))
            else:
                found, taken = self.dealt_out(model, items, symbols, taken, context.stream("sampling"))
        undefined, metrics = {}, scores(found, taken, items)
        correlation = rank_correlation(taken)
        if correlation is None:
            undefined["spearman_steps_hops"] = "all tokens ran equally many steps"
        else:
            metrics["spearman_steps_hops"] = correlation
        for hop, steps in enumerate(taken.float().mean(0).tolist(), start=1):
            metrics[f"steps_at_hop_{hop}"] = steps
        if arm.name == "exit-kl":  # an arm whose time is compared with nothing
            held_out = walker.items(context, VALIDATION, self.test_items, self.longest)
            for criterion, thresholds in SWEEP.items():
                for threshold in thresholds:
                    swept = {"num_steps": most, "exit_criterion": criterion, "exit_threshold": threshold}
                    values = scores(*decoded(model, held_out, symbols, **swept), held_out)
                    metrics |= {f"{name}_{criterion}_{threshold:g}": value for name, value in values.items()}
        return dataclasses.replace(outcome, metrics=metrics, undefined=undefined)

    def dealt_out(
        self, model: Any, items: Mapping[str, Tensor], symbols: Tensor, taken: Tensor, seed: int
    ) -> tuple[Tensor, Tensor]:
        """Predictions where each token is read after a number of steps drawn from those in `taken`."""
        import torch

        order = torch.randperm(taken.numel(), generator=torch.Generator().manual_seed(seed))
        dealt = taken.flatten()[order].view_as(taken)
        found = torch.empty_like(taken)
        for steps in dealt.unique().tolist():
            here = dealt == steps
            found[here] = decoded(model, items, symbols, num_steps=steps)[0][here]
        return found, dealt


def scores(found: Tensor, taken: Tensor, items: Mapping[str, Tensor]) -> dict[str, float]:
    """`accuracy` and `mean_steps` over all answers. found, taken: (B, answers)."""
    answers = items["labels"][:, answered(items) + 1]
    return {"accuracy": float((found == answers).float().mean()), "mean_steps": float(taken.float().mean())}


def rank_correlation(taken: Tensor) -> float | None:
    """Spearman's correlation between the hops of an answer and the steps it took, (B, hops); None where steps do not vary."""
    from scipy import stats

    if bool((taken == taken[0, 0]).all()) or taken.shape[1] < 2:
        return None
    hops = [list(range(taken.shape[1])) for _ in range(len(taken))]
    return float(stats.spearmanr([h for row in hops for h in row], taken.flatten().tolist()).statistic)
