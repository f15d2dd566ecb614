"""Is precision worth more early than late, at equal average bits of decoding?"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from trialist.engine.context import Context
from trialist.engine.contract import Arm, Budget, Claim, Endpoint, Items, Outcome, Trial
from trialist.trials._language_model import BUILT_IN, check_length, check_positive, save
from trialist.trials._precision_models import (
    GREEDY,
    SAMPLED,
    PrecisionModels,
    Prompts,
    Subject,
    prompts_digest,
    said_prompts,
)
from trialist.trials._text_trial import TextTrial

if TYPE_CHECKING:
    from torch import Tensor

    from trialist.decoding.precision.schedules import FixedSchedule

SHUFFLED, ALTERNATING, WIDE = "shuffled", "alternating", "wide"
BINS = 8
"""Points of the curve over positions"""

Weighted = tuple[tuple[float, "FixedSchedule"], ...]
"""Schedules that requests are given, with the share of the requests that each gets"""


@dataclass(frozen=True)
class PMPDTrial(TextTrial):
    """Is precision that falls while a text is written nearer to full precision than any other order of the same bits?"""

    claim = Claim(
        statement="At equal average bits of decoding, weights read at high precision first and at low precision later keep a "
        "model nearer to its full precision than the reverse order, a random order, or high precision for some requests and low "
        "precision for the others.",
        source="arXiv:2410.13461",
        reported="average precision of decoding lowered to 2 to 3 bits at the quality of uniform high precision in summaries, "
        "translations and chats of models of 1 to 7B; 1.4 to 12.2 times the speed of fp16 in linear layers on GPUs",
        endpoint=Endpoint("divergence", unit="nats a token", better="lower", margin=0.1, scale="log"),
        secondary=(
            Endpoint("divergence_of_sampled", unit="nats a token", better="lower", scale="log"),
            Endpoint("nll_of_sampled", unit="nats a token", better="lower"),
            Endpoint("divergence_with_prompt_low", unit="nats a token", better="lower", scale="log"),
            Endpoint("rouge_l", unit="F1 against the greedy text", better="higher"),
            Endpoint("shared_prefix", unit="share of the greedy text", better="higher"),
            Endpoint("recall", unit="share of answers", better="higher"),
            Endpoint("recall_with_prompt_low", unit="share of answers", better="higher"),
        ),
    )
    budget = Budget("bits")
    replicate = "seed x item"
    tuning = None
    presets = {
        "tiny": dict(seeds=3, about="about 10 minutes a setting on 2 cores"),
        "real": dict(
            model="smollm2-135m-instruct", prompts="gsm8k", items=100, decode_steps=96, prompt_length=256, length=512, batch=4,
            calibration_rows=32, seeds=1, about="a given model and real questions, nothing is trained, hours on 2 cores",
        ),
        "gpu": dict(
            data="enwik8", tokenizer="bpe-4096", layers=8, width=512, heads=8, length=1024, batch=32, steps=3_000, items=256,
            prompt_length=256, decode_steps=256, calibration_rows=64, test_bytes=1_000_000, seeds=6,
            about="an hour on one GPU",
        ),
    }  # fmt: skip
    preload = (  # type: ignore[assignment]
        *TextTrial.preload,
        "trialist.weights.nested.quantize",
        "trialist.decoding.precision.scoring",
    )
    usage = (
        "from trialist.decoding import ProgressivePrecision, StaticSchedule, generate\n"
        "generate(nested_model, [ProgressivePrecision(StaticSchedule(high=3, low=2, high_steps=85), prefill_bits=4)], ids)"
    )

    model: str = BUILT_IN
    """Hub id, local folder or asset of a model that is quantised as it is; `decoder` trains a small one for each seed"""
    prompts: str = ""
    """Prompts for a given model: a file of them, or a benchmark (gsm8k) whose questions they are; without it windows of text"""
    items: int = 48
    """Prompts"""
    prompt_length: int = 96
    """Tokens of a window of text; of other prompts the most"""
    decode_steps: int = 96
    """Steps of decoding behind the first token, an even number: half of them run at high precision"""
    parent: int = 4
    """Highest precision of the nested weights, in bits; prompts are read at it"""
    high: int = 3
    """Bits of high precision"""
    lowest: int = 2
    """Bits of low precision"""
    calibration_rows: int = 32
    """Sequences of `length` tokens of validation text on which sensitivities are found"""
    recall_steps: int = 1000
    """Training steps of the recall task, of the built-in decoder only"""
    fillers: int = 15
    """Symbols between what is to be recalled and the question, an odd number"""

    @property
    def base(self) -> str:
        return self.model

    @property
    def given(self) -> bool:
        return self.model != BUILT_IN

    @property
    def at_once(self) -> int:
        """Prompts in a forward pass."""
        return self.batch if self.given else max(self.batch, 48)

    def check(self) -> None:
        check_positive(items=self.items, prompt_length=self.prompt_length, decode_steps=self.decode_steps,
                       calibration_rows=self.calibration_rows, recall_steps=self.recall_steps)  # fmt: skip
        if not 1 <= self.lowest < self.high <= self.parent <= 8:
            raise ValueError(
                f"--lowest {self.lowest}, --high {self.high}, --parent {self.parent}: bits with 1 <= lowest < high <= parent <= 8"
            )
        if self.decode_steps % 2:
            raise ValueError(
                f"--decode-steps {self.decode_steps}: an even number, so that half of them are at high precision"
            )
        if self.fillers < 1 or self.fillers % 2 == 0:
            raise ValueError(f"--fillers {self.fillers}: an odd number, so that with the question the steps are even")
        longest = self.prompt_length + self.decode_steps + 1
        if self.given:
            check_length(self.model, longest)
        elif longest > self.length:
            raise ValueError(
                f"--prompt-length {self.prompt_length} and --decode-steps {self.decode_steps} are {longest} tokens, more than "
                f"the --length {self.length} that the decoder is trained on"
            )
        if self.prompts:
            if not self.given:
                raise ValueError(
                    "--prompts are for a given --model; the built-in decoder goes on with windows of its text"
                )
            said_prompts(self.prompts)
        super().check()

    def digests(self) -> Mapping[str, str]:
        return {**super().digests(), **({"prompts": prompts_digest(self.prompts)} if self.prompts else {})}

    def with_benchmark(self, name: str) -> tuple[Trial, Endpoint]:
        return Trial.with_benchmark(self, name)  # an arm is a model under a schedule, which no benchmark follows

    def replicates_over(self) -> Any:
        return "item" if self.given else self.replicate

    def remarks(self) -> tuple[str, ...]:
        said = "the metrics of the paper, rouge_l and shared_prefix, favour early precision mechanically; recall, late"
        left = (
            ("recall and the setting of shuffled text need a model that is trained here, and are left out",)
            if self.given
            else ()
        )
        return (*super().remarks(), said, *left)

    def arms(self) -> Iterator[Arm]:
        narrow, wide = {"high": self.high, "low": self.lowest}, {"high": self.parent, "low": self.lowest}
        order = "high precision for the first half of the steps, low precision for the second"

        def compared(setting: str, bits: Mapping[str, int], null: bool = False) -> Iterator[Arm]:
            yield Arm("reversed", "control", setting, null, options={"order": "reversed", **bits},
                      about="low precision first")  # fmt: skip
            yield Arm("random", "control", setting, null, options={"order": "random", **bits},
                      about="the same steps in random order, drawn anew for each seed")  # fmt: skip
            yield Arm("mixed", "control", setting, null, options={"order": "mixed", **bits},
                      about="half of the requests at high precision throughout, half at low: the mean of both")  # fmt: skip
            yield Arm("forward", "treatment", setting, null, options={"order": "forward", **bits}, about=order)

        yield from compared("text", narrow)
        for name in ("high", "low"):
            yield Arm(
                name, "reference", "text", options={"order": name, **narrow}, about=f"{name} precision at all steps"
            )
        if self.parent > self.high:
            yield from compared(WIDE, wide)
            yield Arm("uniform", "control", WIDE, options={"order": "uniform", **wide},
                      about="the precision between the two at all steps, the next higher where there is no middle")  # fmt: skip
        for setting in (ALTERNATING,) if self.given else (SHUFFLED, ALTERNATING):
            if setting == SHUFFLED:
                yield from compared(SHUFFLED, narrow, null=True)
                continue
            yield Arm("reversed", "control", ALTERNATING, True, options={"order": "alternating low", **narrow},
                      about="low and high precision in turns, low precision first")  # fmt: skip
            yield Arm("forward", "treatment", ALTERNATING, True, options={"order": "alternating high", **narrow},
                      about="high and low precision in turns, high precision first: neither is early")  # fmt: skip

    def run(self, arm: Arm, seed: int, context: Context) -> Outcome:
        models = PrecisionModels(self, context, shuffled=arm.setting == SHUFFLED)
        subject = models.subject()
        if isinstance(subject, Outcome):
            return subject
        prompts = models.prompts()
        texts = models.references(subject, prompts)
        order = context.stream("order of precisions")
        plan = schedules(arm, self.decode_steps, order)
        scores = self.fixed_text(subject, prompts, texts[SAMPLED], plan, context)
        curves: dict[str, tuple[tuple[float, float], ...]] = {"divergence_by_position": binned(scores.pop("positions"))}
        undefined: dict[str, str] = {}
        metrics: dict[str, float] = {}
        if not arm.null:
            scores |= self.own_text(models, subject, prompts, texts[GREEDY], plan, context)
            if self.given:
                reason = "a model that is not trained here knows nothing of the recall task"
                undefined = dict.fromkeys(("recall", "recall_with_prompt_low"), reason)
            else:
                metrics, undefined = self.recalls(arm, models, order)
        items = {
            name: Items(prompts.ids, tuple(float(score) for score in values), prompts.clusters)
            for name, values in scores.items()
        }
        if context.keep_model:
            save(subject.nested, subject.tokenizer, context.model_folder)
        spent = sum(weight * sum(schedule.over(self.decode_steps)) for weight, schedule in plan) / self.decode_steps
        return Outcome(
            metrics={**{name: sum(of.scores) / len(of.scores) for name, of in items.items()}, **metrics},
            items=items,
            curves=curves,
            cost=dataclasses.replace(subject.trained.cost, bits=spent),
            undefined=undefined,
        )

    def fixed_text(
        self, subject: Subject, prompts: Prompts, texts: Tensor, plan: Weighted, context: Context
    ) -> dict[str, Any]:
        """The endpoint: texts drawn from the full model, read by all arms; every decoded position counts alike."""
        import torch

        from trialist.decoding.precision.scoring import divergences

        found: dict[str, list[Any]] = {"divergence": [], "divergence_with_prompt_low": []}
        for name, prefill in (("divergence", self.parent), ("divergence_with_prompt_low", self.lowest)):
            for number, part in enumerate(prompts.batches(self.at_once)):
                tokens, mask = prompts.padded(part, subject.nested.device)
                text = texts[part].to(tokens.device)
                kl = sum(
                    weight * divergences(
                        subject.nested, subject.dense, tokens, mask, text, schedule.over(self.decode_steps), prefill
                    )[:, 1:]
                    for weight, schedule in plan
                )  # fmt: skip
                assert isinstance(kl, torch.Tensor)
                found[name].append(kl.double().cpu())
                context.progress(number, len(prompts.batches(self.at_once)))
        whole = {name: torch.cat(parts) for name, parts in found.items()}  # (items, steps)
        positions = whole["divergence"].mean(0).tolist()
        return {**{name: kl.mean(1).tolist() for name, kl in whole.items()}, "positions": positions}

    def own_text(
        self,
        models: PrecisionModels,
        subject: Subject,
        prompts: Prompts,
        greedy: Tensor,
        plan: Weighted,
        context: Context,
    ) -> dict[str, list[float]]:
        """What the arms write themselves: drawn with common random numbers, and greedy texts as the paper compares them."""
        from trialist.decoding.precision.progressive import ProgressivePrecision
        from trialist.decoding.precision.scoring import compare, rouge_l, shared_prefix

        names = ("divergence_of_sampled", "nll_of_sampled", "rouge_l", "shared_prefix")
        found: dict[str, list[float]] = {name: [0.0] * len(prompts.ids) for name in names}
        drawn = context.stream("sampling")
        parts = prompts.batches(self.at_once)
        for number, part in enumerate(parts):
            tokens, mask = prompts.padded(part, subject.nested.device)
            expected = greedy[part].tolist()
            for weight, schedule in plan:
                option = (ProgressivePrecision(schedule, self.parent),)
                own = models.written(subject.nested, prompts, part, option, drawn)
                beside = compare(
                    subject.nested, subject.dense, tokens, mask, own, schedule.over(self.decode_steps), self.parent
                )
                texts = models.written(subject.nested, prompts, part, option, None).tolist()
                scored = {
                    "divergence_of_sampled": beside.backward[:, 1:].mean(1).tolist(),
                    "nll_of_sampled": beside.surprise[:, 1:].mean(1).tolist(),
                    "rouge_l": [rouge_l(text, other) for text, other in zip(texts, expected)],
                    "shared_prefix": [shared_prefix(text, other) for text, other in zip(texts, expected)],
                }
                for name, values in scored.items():
                    for at, value in enumerate(values):
                        found[name][part.start + at] += weight * value
            context.progress(number + 1, len(parts))
        return found

    def recalls(self, arm: Arm, models: PrecisionModels, order: int) -> tuple[dict[str, float], dict[str, str]]:
        """Share of right answers behind fillers, prompts read at the highest and at low precision."""
        from trialist.decoding.precision.scoring import scheduled_logits

        names = {"recall": self.parent, "recall_with_prompt_low": self.lowest}
        built = models.recall()
        if built is None:
            return {}, dict.fromkeys(names, "training on the recall task diverged")
        model, questions = built
        tokens = questions["input_ids"]
        P = tokens.shape[1] - self.fillers - 2
        found = {}
        for name, prefill in names.items():
            right = 0.0
            for weight, schedule in schedules(arm, self.fillers + 1, order):
                *_, last = scheduled_logits(
                    model,
                    tokens[:, :P],
                    tokens.new_ones(len(tokens), P),
                    tokens[:, P:],
                    schedule.over(self.fillers + 1),
                    prefill,
                )
                right += weight * float((last[:, -1].argmax(-1) == tokens[:, -1]).double().mean())
            found[name] = right
        return found, {}


def schedules(arm: Arm, steps: int, seed: int) -> Weighted:
    """What an arm does over an even number of steps; all but the references have as many at high as at low precision."""
    from trialist.decoding.precision.schedules import RandomSchedule, ReversedSchedule, StaticSchedule

    high, low, order = arm["high"], arm["low"], arm["order"]
    forward = StaticSchedule(high, low, steps // 2)
    always_high, always_low = StaticSchedule(high, high, 0), StaticSchedule(low, low, 0)
    middle = -(-(high + low) // 2)
    found: dict[str, Weighted] = {
        "forward": ((1.0, forward),),
        "reversed": ((1.0, ReversedSchedule(forward, steps)),),
        "random": ((1.0, RandomSchedule(forward, steps, seed)),),
        "mixed": ((0.5, always_high), (0.5, always_low)),
        "high": ((1.0, always_high),),
        "low": ((1.0, always_low),),
        "uniform": ((1.0, StaticSchedule(middle, middle, 0)),),
    }
    if order in found:
        return found[order]
    return ((1.0, alternating(high, low) if order == "alternating high" else alternating(low, high)),)


def alternating(first: int, second: int) -> FixedSchedule:
    """Two precisions in turns."""
    from trialist.decoding.precision.schedules import FixedSchedule

    class Alternating(FixedSchedule):
        @property
        def precisions(self) -> tuple[int, ...]:
            return tuple(sorted({first, second}, reverse=True))

        def at(self, step: int) -> int:
            return second if step % 2 else first

    return Alternating()


def binned(values: Sequence[float]) -> tuple[tuple[float, float], ...]:
    """Means of equal parts of a course over positions, each at its middle."""
    size = -(-len(values) // BINS)
    parts = [(start, values[start : start + size]) for start in range(0, len(values), size)]
    return tuple((start + 1 + (len(part) - 1) / 2, sum(part) / len(part)) for start, part in parts)
