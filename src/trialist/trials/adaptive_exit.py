"""Does stopping each token by itself save steps of recurrent depth, also against one number of steps chosen for all tokens?"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from trialist.engine.context import Context
from trialist.engine.contract import Arm, Budget, Claim, Endpoint, Outcome
from trialist.trials._language_model import PRELOAD, VERSIONS
from trialist.trials._walk_readings import (
    Decoding,
    answered,
    curve_by_hops,
    decoded,
    right,
    share_right,
    unlearnt,
)
from trialist.trials._walks import EVALUATION, VALIDATION, Walker, WalkTrial, load_stage

if TYPE_CHECKING:
    from torch import Tensor

CRITERIA = ("kl", "minp_kl", "entropy_diff", "latent_diff", "cosine", "argmax")
AS_WELL = 0.005
"""Loss of accuracy on validation walks up to which a fixed number of steps answers as well as `exit`"""
SWEEP = {"latent_diff": (0.01, 0.03, 0.1, 0.3), "kl": (1e-4, 5e-4, 1e-3, 1e-2)}
"""Thresholds whose accuracy and steps are reported beside the verdict"""


@dataclass(frozen=True)
class AdaptiveExitTrial(WalkTrial):
    """Does stopping each token by itself save steps of recurrent depth, also against one number of steps for all?"""

    claim = Claim(
        statement="Decoding walks with a trained recurrent-depth model, tokens that stop when their state has settled take fewer "
        "steps than the full number for every token, and than the fewest for every token that answer as well, without loss of "
        "accuracy.",
        source="arXiv:2502.05171",
        reported="KL exit at 5e-4 keeps MTBench (5.56 against 5.63); exit steps differ between subjects",
        endpoint=Endpoint("mean_steps", unit="steps", better="lower", margin=0.223, scale="log"),
        guards=(Endpoint("accuracy", unit="share of answers", better="higher", margin=0.02),),
        secondary=(Endpoint("spearman_steps_hops", unit="rank correlation", better="higher"),),
    )
    budget = Budget("tokens")
    presets = {
        "tiny": dict(seeds=3, about="about 5 minutes a setting on 2 cores"),
        "real": dict(model="smollm2-135m-instruct", layers="2,4,2", recurrence=4, backprop=4, batch=16, steps=300,
                     test_items=128, seeds=3, about="a given model with a loop among its layers, hours on 2 cores"),
        "gpu": dict(width=256, heads=8, layers="1,2,1", nodes=16, letters=8, hops=16, recurrence=16, batch=256, steps=4_000,
                    test_items=2048, seeds=6, about="minutes on one GPU"),
        "paper": dict(width=1024, heads=16, layers="1,4,1", recurrence=32, backprop=8, nodes=32, letters=16, hops=32, batch=512,
                      steps=50_000, learning_rate=4e-5, test_items=2048, dtype="bfloat16", criterion="kl", seeds=3,
                      about="the paper's small model at its mean of 32 steps, its learning rate and its exit, GPU days"),
    }  # fmt: skip
    preload = (*PRELOAD, "trialist.data.walks", "trialist.models.recurrent_depth.loop")
    versions = VERSIONS
    usage = 'model.generate(ids, num_steps=32, exit_criterion="latent_diff", exit_threshold=0.03)'

    criterion: str = "latent_diff"
    """`kl`, `minp_kl`, `entropy_diff`, `latent_diff`, `cosine` or `argmax`"""
    threshold: float | None = None
    """A token stops when the criterion falls below it (`argmax`: after so many equal looks); without it the criterion's own"""

    @property
    def longest(self) -> int:
        """Hops of a test walk: some more than trained, for on trained hops every answer of a good model is right."""
        return self.hops + self.hops // 2

    @property
    def most(self) -> int:
        """Steps of a token that never stops by itself."""
        return 2 * self.recurrence

    def check(self) -> None:
        super().check()
        if self.criterion not in CRITERIA:
            raise ValueError(f"--criterion {self.criterion!r}: one of {', '.join(CRITERIA)}")
        if self.threshold is not None and not self.threshold >= 0:
            raise ValueError(f"--threshold must be at least 0, not {self.threshold}")

    def arms(self) -> Iterator[Arm]:
        def arm(name: str, role: Any, about: str, setting: str = "walks", **exits: Any) -> Arm:
            options = {"learning_rate": self.learning_rate, "criterion": self.criterion, "threshold": self.threshold}
            return Arm(name, role, setting, setting != "walks", options={**options, **exits}, about=about)

        fewest = "every token runs the fewest steps that answer validation walks as well as `exit`"
        mean = "every token runs as many steps as tokens of `exit` run on average, rounded up"
        stop = f"tokens stop by {self.criterion} at {'its own threshold' if self.threshold is None else f'{self.threshold:g}'}"
        yield arm("all-steps", "control", "every token runs twice the mean training steps")
        yield arm("fixed-steps", "control", fewest)
        yield arm("mean-steps", "reference", mean)
        yield arm("random-exit", "reference", "the numbers of steps of `exit`, dealt out at random")
        yield arm("exit-kl", "reference", "tokens stop as in the paper, by kl at 5e-4", criterion="kl", threshold=5e-4)
        yield arm("exit", "treatment", stop)
        yield arm("fixed-steps", "control", fewest, setting="one-hop")
        yield arm("exit", "treatment", stop, setting="one-hop")

    def walker(self, arm: Arm) -> Walker:
        hops = {"hops": 1} if arm.setting == "one-hop" else {}
        return self.walker_of("walks", "recurrent", arm["learning_rate"], **hops)

    def run(self, arm: Arm, seed: int, context: Context) -> Outcome:
        walker, longest = self.walker(arm), 1 if arm.setting == "one-hop" else self.longest
        model, trained = load_stage(walker.stage(context, longest), self.device)
        if trained.diverged is not None:
            return trained
        assert model is not None
        if context.keep_model:
            model.save_pretrained(context.model_folder)
        items, held_out = (walker.items(context, kind, self.test_items, longest) for kind in (EVALUATION, VALIDATION))
        symbols = walker.symbols(model, context)
        first = {name: part[:1] for name, part in items.items()}
        decoded(model, first, symbols)  # what a first pass costs is not timed
        exits = {"num_steps": self.most, "exit_criterion": arm["criterion"]}
        if arm["threshold"] is not None:
            exits["exit_threshold"] = arm["threshold"]
        if arm.name == "all-steps":
            decoding = decoded(model, items, symbols, num_steps=self.most)
        elif arm.name == "fixed-steps":
            wanted = accuracy(decoded(model, held_out, symbols, **exits), held_out) - AS_WELL
            decoding = decoded(model, items, symbols, num_steps=self.fewest(model, held_out, symbols, wanted))
        elif arm.name == "mean-steps":
            taken = decoded(model, items, symbols, **exits).taken
            decoding = decoded(model, items, symbols, num_steps=-(-int(taken.sum()) // taken.numel()))
        elif arm.name == "random-exit":
            exited = decoded(model, items, symbols, **exits)
            decoding = self.dealt_out(model, items, symbols, exited, context.stream("sampling"))
        else:
            decoding = decoded(model, items, symbols, **exits)
        outcome = self.outcome(arm, decoding, items, trained)
        if arm.name == "exit-kl":  # an arm that decides nothing
            sweeps = self.sweeps(model, held_out, symbols)
            outcome = dataclasses.replace(outcome, curves={**outcome.curves, **sweeps})
        return outcome

    def outcome(self, arm: Arm, decoding: Decoding, items: Mapping[str, Tensor], trained: Outcome) -> Outcome:
        """The cost is that of decoding: the training is a stage that all arms share."""
        correct, taken = decoding.found == items["labels"][:, answered(items) + 1], decoding.taken
        metrics = {"accuracy": share_right(correct)}
        undefined = {}
        reason = unlearnt(correct) if arm.role == "treatment" else None
        if reason is None:
            metrics["mean_steps"] = float(taken.float().mean())
        else:
            undefined["mean_steps"] = reason
        correlation = rank_correlation(taken)
        if correlation is None:
            undefined["spearman_steps_hops"] = "all tokens ran equally many steps, or all answers are of one hop"
        else:
            metrics["spearman_steps_hops"] = correlation
        curves = {
            **trained.curves,
            "accuracy_by_hops": curve_by_hops(correct),
            "steps_by_hops": curve_by_hops(taken),
        }
        note = "FLOPs and seconds among the costs are those of decoding; wall and CPU time include the shared training"
        return Outcome(metrics=metrics, undefined=undefined, curves=curves, cost=decoding.cost, notes=(note,))

    def fewest(self, model: Any, items: Mapping[str, Tensor], symbols: Tensor, wanted: float) -> int:
        """The fewest steps for every token at which the accuracy reaches `wanted`; all of them where none does."""
        shares = (share_right(right(model, items, symbols, num_steps=steps)) for steps in range(1, self.most))
        return next((steps for steps, share in enumerate(shares, start=1) if share >= wanted), self.most)

    def dealt_out(
        self, model: Any, items: Mapping[str, Tensor], symbols: Tensor, exited: Decoding, seed: int
    ) -> Decoding:
        """Predictions where each token is read after a number of steps drawn from those that tokens of `exited` took."""
        import torch

        taken = exited.taken
        order = torch.randperm(taken.numel(), generator=torch.Generator().manual_seed(seed))
        dealt = taken.flatten()[order].view_as(taken)
        found = torch.empty_like(taken)
        for steps in dealt.unique().tolist():
            here = dealt == steps
            found[here] = decoded(model, items, symbols, num_steps=steps).found[here]
        # as many steps, so as many FLOPs; nobody decodes so, and its seconds would mean nothing
        return Decoding(found, dealt, dataclasses.replace(exited.cost, seconds=None))

    def sweeps(
        self, model: Any, items: Mapping[str, Tensor], symbols: Tensor
    ) -> dict[str, tuple[tuple[float, float], ...]]:
        """Accuracy and steps by threshold, and accuracy by steps, each also with warm starts; accuracy by slots of the cache."""

        def read(**options: Any) -> tuple[float, float]:
            decoding = decoded(model, items, symbols, **options)
            return accuracy(decoding, items), float(decoding.taken.float().mean())

        curves: dict[str, tuple[tuple[float, float], ...]] = {}
        warm = {"": {}, "_warm_start": {"warm_start": True}}
        for criterion, thresholds in SWEEP.items():
            for name, start in warm.items() if criterion == "latent_diff" else [("", {})]:
                found = [
                    read(num_steps=self.most, exit_criterion=criterion, exit_threshold=threshold, **start)
                    for threshold in thresholds
                ]
                shares, steps = zip(*found, strict=True)
                curves[f"accuracy_of_{criterion}{name}_by_threshold"] = tuple(zip(thresholds, shares, strict=True))
                curves[f"steps_of_{criterion}{name}_by_threshold"] = tuple(zip(thresholds, steps, strict=True))
        counts = [2**power for power in range(self.most.bit_length())]
        for name, start in warm.items():
            points = [(float(steps), read(num_steps=steps, **start)[0]) for steps in counts]
            curves[f"accuracy{name}_by_steps"] = tuple(points)
        slots = [slots for slots in (1, 2, 4) if slots < self.most]
        points = [(float(count), read(num_steps=self.most, kv_slots=count)[0]) for count in slots]
        curves["accuracy_by_kv_slots"] = (*points, (float(self.most), read(num_steps=self.most)[0]))
        return curves


def accuracy(decoding: Decoding, items: Mapping[str, Tensor]) -> float:
    """Share of right answers."""
    return share_right(decoding.found == items["labels"][:, answered(items) + 1])


def rank_correlation(taken: Tensor) -> float | None:
    """Spearman's correlation between the hops of an answer and the steps it took, (B, hops); None where one does not vary."""
    from scipy import stats

    if bool((taken == taken[0, 0]).all()) or taken.shape[1] < 2:
        return None
    hops = [list(range(taken.shape[1])) for _ in range(len(taken))]
    return float(stats.spearmanr([h for row in hops for h in row], taken.flatten().tolist()).statistic)
