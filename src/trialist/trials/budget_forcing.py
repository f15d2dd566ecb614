"""Does putting off the end of thinking with "Wait" buy more right answers than the same tokens spent on samples?"""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from trialist.engine.context import Context
from trialist.engine.contract import Arm, Budget, Claim, Cost, Endpoint, Items, Outcome, Replicate, Trial
from trialist.engine.hardware import resolve_device
from trialist.trials._language_model import (
    BUILT_IN,
    PRELOAD,
    VERSIONS,
    check_inputs,
    check_length,
    check_positive,
    model_inputs,
    save,
)
from trialist.trials._thinking import EVALUATION, VALIDATION, Thinker, Trace
from trialist.trials._thinking_arms import VALIDATION_ITEMS, Traces, elected, enough, readings, repetition


@dataclass(frozen=True)
class BudgetForcingTrial(Trial):
    """Does putting off the end of thinking with "Wait" buy more right answers than the same tokens spent on samples?"""

    claim = Claim(
        statement='At equal generated tokens, thinking that is extended by putting off its end with "Wait" answers more '
        "questions right than a majority of samples, than samples of accepted length, and than a prompt that asks for it.",
        source="arXiv:2501.19393",
        reported="s1-32B on AIME24: 50.0 without, 56.7 with budget forcing, which scales with thinking; token-conditional and "
        "rejection sampling reach 40.0, the latter falls with its budget",
        endpoint=Endpoint("accuracy_at_equal_tokens", unit="share of questions", better="higher", margin=0.02),
        secondary=(
            Endpoint("gain_over_natural", unit="share of questions", better="higher"),
            Endpoint("thinking_tokens", unit="tokens", better="higher"),
            Endpoint("repetition", unit="share of n-grams", better="lower"),
        ),
    )
    budget = Budget("generated_tokens")
    replicate = "seed x item"
    presets = {
        "tiny": dict(seeds=3, about="about 10 minutes a setting on 2 cores"),
        "real": dict(model="smollm2-135m-instruct", test_items=256, think_tokens=320, answer_tokens=24, num_ignore=2, seeds=1,
                     about="a given model on GSM8K, over its questions, hours on 2 cores"),
        "gpu": dict(layers=6, width=256, heads=8, most=20, batch=256, steps=4_000, test_items=2048, num_ignore=4,
                    think_tokens=560, seeds=6, about="minutes on one GPU"),
    }  # fmt: skip
    preload = (*PRELOAD, "trialist.data.self_checks", "trialist.decoding.budget_forcing.option")
    versions = VERSIONS
    usage = (
        "from trialist.decoding import BudgetForcing, generate\n"
        "forcing = BudgetForcing(tokenizer, max_thinking_tokens=2048, num_ignore=2)\n"
        "out = generate(model, [forcing], **inputs, max_new_tokens=2560, return_dict_in_generate=True)\n"
        "out.thinking[0]  # tokens of thought, ends that were put off, how it ended"
    )

    model: str = BUILT_IN
    """Hub id, local folder or asset of a model that reasons in words; `decoder` trains a small one on self-checking sums"""
    data: str = "gsm8k"
    """Problems for a given model: gsm8k, or rows with question and answer (a number)"""
    layers: int = 2
    """Layers of the built-in decoder"""
    width: int = 64
    """Width of the built-in decoder"""
    heads: int = 4
    """Attention heads of the built-in decoder"""
    fewest: int = 4
    """Fewest numbers of a sum"""
    most: int = 12
    """Most numbers of a sum"""
    modulus: int = 5
    """Numbers and sums are below it, 2 to 10"""
    planted: float = 0.3
    """Share of training traces with a planted error, "Wait" and a re-computation"""
    batch: int = 64
    """Sequences in a step"""
    steps: int = 450
    """Training steps"""
    learning_rate: float = 4e-3
    """Peak learning rate"""
    num_ignore: int = 2
    """Most ends that are put off; the endpoint is the mean over 1, 2, 4, ... up to it"""
    think_tokens: int = 230
    """Most thinking tokens of any trace"""
    answer_tokens: int = 4
    """Most tokens of any answer"""
    test_items: int = 256
    """Test questions"""
    device: str = "auto"
    """`auto`, `cpu` or `cuda`"""
    dtype: str = "float32"
    """float32 or bfloat16: autocast of a training, weights of a given model"""

    def check(self) -> None:
        check_inputs(
            self.model, self.dtype, 0, layers=self.layers, width=self.width, heads=self.heads, batch=self.batch, steps=self.steps,
            test_items=self.test_items,
        )  # fmt: skip
        check_positive(num_ignore=self.num_ignore, think_tokens=self.think_tokens, answer_tokens=self.answer_tokens)
        thinker = self.thinker()
        if self.model == BUILT_IN:
            thinker.task.check()
            if self.width % self.heads:
                raise ValueError(f"--width {self.width} must be a multiple of --heads {self.heads}")
            longest = 2 * thinker.task.longest_trace
            if self.think_tokens < longest:
                raise ValueError(
                    f"--think-tokens {self.think_tokens}: a trace and its re-computation have up to {longest} tokens"
                )
        else:
            check_length(self.model, self.think_tokens + self.answer_tokens + 16)
        thinker.questions(EVALUATION, self.test_items)
        thinker.questions(VALIDATION, VALIDATION_ITEMS)

    def digests(self) -> Mapping[str, str]:
        return model_inputs(self.model, self.device)

    def replicates_over(self) -> Replicate:
        return self.replicate if self.model == BUILT_IN else "item"

    def remarks(self) -> tuple[str, ...]:
        if self.model == BUILT_IN:
            return ()
        return ("a given model is not trained for budgets in the prompt, as the paper's token-conditional control is",)

    def thinker(self) -> Thinker:
        given = {name: getattr(self, name) for name in Thinker.__dataclass_fields__ if hasattr(self, name)}
        given |= {
            "device": resolve_device(self.device),
            "digest": self.digests().get("model", ""),
            "items": self.test_items,
        }
        return Thinker(**given)

    @property
    def ignores(self) -> tuple[int, ...]:
        """1, 2, 4, ... up to the most."""
        return tuple(2**power for power in range(self.num_ignore.bit_length()) if 2**power <= self.num_ignore)

    def arms(self) -> Iterator[Arm]:
        for setting, null in (("wait", False), ("untrained-string", True)):
            yield Arm("majority-vote", "control", setting, null,
                      about="the greedy answer and samples, up to the tokens of budget-forcing; the majority")  # fmt: skip
            yield Arm("rejection-sampling", "control", setting, null,
                      about="as many samples; the majority of those no longer than the median")  # fmt: skip
            yield Arm("token-conditional", "control", setting, null,
                      about="the question asks for the thinking tokens of budget-forcing; else as majority-vote")  # fmt: skip
            if not null:
                yield Arm("natural", "reference", setting, about="greedy, thinking ends where the model ends it")
                yield Arm(
                    "shorter",
                    "reference",
                    setting,
                    about="greedy, half of the natural tokens at most, then it must answer",
                )
            yield Arm("budget-forcing", "treatment", setting, null,
                      about="greedy, ends put off " + ("with a string that no trace has" if null else 'with "Wait"'))  # fmt: skip

    def run(self, arm: Arm, seed: int, context: Context) -> Outcome:
        thinker = self.thinker()
        model, tokenizer, trained = thinker.load(context)
        if trained.diverged is not None:
            return trained
        if context.keep_model:
            save(model, tokenizer, context.model_folder)
        traces = Traces(thinker, model, tokenizer, context, self.ignores)
        wait = arm.setting == "wait"
        counts = self.ignores if arm.role != "reference" else (0,)
        spent = [self.spent(arm.name, traces, count, wait) for count in counts]
        answers = [[elected(voting) for _, voting in part] for part in spent]
        right = [statistics.fmean(float(part[place].correct) for part in answers) for place in range(len(traces.items))]
        accuracy, natural = statistics.fmean(right), statistics.fmean(trace.correct for trace in traces.natural())
        repeated = [repetition(trace.text, thinker.own) for part in answers for trace in part]
        metrics = {
            "accuracy_at_equal_tokens": accuracy,
            "gain_over_natural": accuracy - natural,
            "thinking_tokens": statistics.fmean(trace.thinking for part in answers for trace in part),
            "repetition": statistics.fmean(repeated),
        }
        tokens = sum(trace.tokens for part in spent for drawn, _ in part for trace in drawn)
        curves, notes = dict(trained.curves), [f"natural traces answer {natural:.3f} right"]
        for count, part in zip(counts, answers, strict=True):
            notes.append(f"{count} ends put off: {statistics.fmean(trace.correct for trace in part):.3f} right")
        if arm.name == "natural":
            more, said = readings(traces)
            curves, notes = curves | more, [*notes, *said]
        items = Items(tuple(item.name for item in traces.items), tuple(right))
        return Outcome(
            metrics=metrics, items={"accuracy_at_equal_tokens": items}, curves=curves, notes=tuple(notes),
            cost=Cost(generated_tokens=tokens),
        )  # fmt: skip

    def spent(self, name: str, traces: Traces, ignores: int, wait: bool) -> list[tuple[list[Trace], list[Trace]]]:
        """For each question all traces that were generated, and those whose majority answers it."""
        if name == "natural":
            return [([trace], [trace]) for trace in traces.natural()]
        if name == "shorter":
            half = statistics.fmean(trace.thinking for trace in traces.natural()) / 2
            return [([trace], [trace]) for trace in traces.forced(max_thinking_tokens=max(1, round(half)))]
        forced = traces.put_off(ignores, wait)
        if name == "budget-forcing":
            return [([trace], [trace]) for trace in forced]
        if name == "token-conditional":
            return [(part, part) for part in traces.told(ignores, wait)]
        samples = traces.sampled(wait)
        if name == "majority-vote":
            voters = [[first, *rest] for first, rest in zip(traces.natural(), samples, strict=True)]
            return [(part, part) for part in enough(voters, forced)]
        limits = traces.median_lengths()
        return [
            (part, [trace for trace in part if trace.thinking <= limit] or part)
            for part, limit in zip(enough(samples, forced), limits, strict=True)
        ]
