"""Does guidance by a principle make texts follow it more, at equal fluency, than sharper sampling or the better of two?"""

from __future__ import annotations

import dataclasses
import functools
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trialist.engine.context import Context
from trialist.engine.contract import Arm, Budget, Claim, Cost, Endpoint, Items, Outcome, Trial, Tuning
from trialist.engine.hardware import resolve_device
from trialist.trials._guided import Request, distinct, log_likelihoods, write
from trialist.trials._language_model import (
    BUILT_IN,
    PRELOAD,
    VERSIONS,
    check_inputs,
    model_inputs,
    new_decoder,
    save,
    train,
)
from trialist.trials._pruning import stored_outcome

if TYPE_CHECKING:
    from trialist.data.principles import Principled
    from trialist.data.tagged_styles import StyleLanguage, Trigrams
    from trialist.engine.tradeoff import Reading

STYLES = "styles"
TEMPERATURES = (1.0, 1.3, 0.8, 0.6, 0.45, 0.33)
"""Points of the curve of every arm; the first is read by itself"""
RANGE = (0.2, 0.45)
"""Fluency over which adherence is averaged: nats a token under the trigram model, above those of texts of the language itself"""
TEMPERATURES_GIVEN_MODEL = (1.0, 0.7, 0.4)
STRENGTHS, NUCLEI = (0.5, 1.0, 2.0, 4.0), (1.0, 0.95, 0.9, 0.8)
EMPTY = "Answer the request."
"""Principle of the negative control of a given model"""
VALIDATION = "validation_adherence"


@dataclass(frozen=True)
class OPADTrial(Trial):
    """Do texts guided by a principle follow it more at equal fluency than sharpened ones, and than the better one of two?"""

    claim = Claim(
        statement="At equal fluency, texts drawn with OPAD's two-step reward follow a principle more often than texts that the "
        "prompted model draws at a lower temperature, and than the one of two such texts that the principle makes more likely.",
        source="arXiv:2502.14204",
        reported="win rates above prompting and other decoding methods on general and personalised alignment with models of 7B, "
        "at about twice the time of decoding",
        endpoint=Endpoint("adherence_at_equal_fluency", unit="share of texts", better="higher", margin=0.03, floor=0.4),
        secondary=(
            Endpoint("distinct_at_equal_fluency", unit="share of bigrams", better="higher"),
            Endpoint("adherence", unit="share of texts at temperature 1", better="higher"),
            Endpoint("fluency", unit="nats per token above real texts, at temperature 1", better="higher"),
            Endpoint("length", unit="tokens per text at temperature 1", better="higher"),
        ),
    )
    budget = Budget("tokens")
    tuning = Tuning(tries=4, metric=Endpoint(VALIDATION, unit="share of texts", better="higher"))
    presets = {
        "tiny": dict(seeds=3, about="about 5 minutes a setting on 2 cores"),
        "real": dict(
            model="smollm2-135m-instruct", data="google/IFEval", texts=64, batch=8, seeds=1,
            about="a given model and its requests with verifiable principles, hours on 2 cores; --data takes a local copy",
        ),
        "gpu": dict(layers=6, width=384, heads=8, batch=256, steps=3_000, texts=4096, seeds=6, about="minutes on one GPU"),
    }  # fmt: skip
    preload = (*PRELOAD, "trialist.decoding.guidance.option", "trialist.data.tagged_styles")
    versions = VERSIONS
    usage = (
        "from trialist.decoding import ContrastiveGuidance, generate\n"
        'option = ContrastiveGuidance.opad([prompts_with_principle], beta=1.0, reward="two_step")\n'
        "generate(model, [option], **tokenizer(prompts, return_tensors='pt', padding=True))"
    )

    model: str = BUILT_IN
    """Hub id, local folder or asset of a model to decode with; `decoder` trains a small one on a made-up language first"""
    data: str = STYLES
    """`styles`, the made-up language of the built-in decoder; for a given model a Hub id or file with the columns of IFEval"""
    split: str | None = None
    """Split of the data to read"""
    columns: str = ""
    """Columns under other names, prompt=NAME"""
    layers: int = 2
    """Layers of the built-in decoder"""
    width: int = 64
    """Width of the built-in decoder"""
    heads: int = 4
    """Attention heads of the built-in decoder"""
    noise: float = 0.35
    """Share of training texts of the made-up language whose tag is wrong, in [0, 0.75)"""
    batch: int = 32
    """Texts in a training step; with a given model, requests decoded at once"""
    steps: int = 1_000
    """Training steps of the built-in decoder"""
    learning_rate: float = 3e-3
    """Its peak learning rate"""
    texts: int = 512
    """Texts that an arm writes at each temperature; with a given model, requests at most"""
    strength: float = 1.0
    """1/beta of guided arms where nothing was tuned"""
    mask: float = 0.1
    """Share of the largest probability that candidates of guided arms have at least; 0 allows all"""
    new_tokens: int = 128
    """Tokens of an answer of a given model at most"""
    device: str = "auto"
    """`auto`, `cpu` or `cuda`"""
    dtype: str = "float32"
    """float32, or bfloat16 for autocast in training"""

    def __post_init__(self) -> None:
        if not self.given:
            return
        claim = dataclasses.replace(
            type(self).claim,
            statement="Guided by OPAD's two-step reward, a given model's answers follow a principle more often than answers of "
            "the model prompted with it, and than the one of two that the principle makes more likely, and stay as fluent.",
            endpoint=Endpoint("adherence", unit="share of answers", better="higher", margin=0.05),
            guards=(Endpoint("fluency", unit="nats per token", better="higher", margin=0.2),),
            secondary=(
                Endpoint("distinct", unit="share of bigrams", better="higher"),
                Endpoint("length", unit="tokens", better="higher"),
            ),
        )
        object.__setattr__(self, "claim", claim)
        object.__setattr__(self, "tuning", None)  # every try takes long

    @property
    def given(self) -> bool:
        return self.model != BUILT_IN

    def check(self) -> None:
        from trialist.decoding.guidance.option import ContrastiveGuidance

        check_inputs(
            self.model, self.dtype, 0, layers=self.layers, width=self.width, heads=self.heads, batch=self.batch,
            steps=self.steps, texts=self.texts, new_tokens=self.new_tokens,
        )  # fmt: skip
        if not 0 <= self.noise < 0.75:
            raise ValueError(f"--noise {self.noise}: in [0, 0.75); at 0.75 a tag says nothing of its text")
        if self.strength <= 0:
            raise ValueError(f"--strength {self.strength}: above 0, 1/beta")
        ContrastiveGuidance([[[0]]], self.strength, mask_alpha=self.mask)
        if not self.given and self.data != STYLES:
            raise ValueError(f"--data {self.data!r} is for a given model: add --model, or leave it {STYLES!r}")
        if self.given:
            if self.data == STYLES:
                raise ValueError(
                    "--model answers requests: give --data, a file or Hub id with the columns of IFEval (prompt, "
                    "instruction_id_list, kwargs), such as google/IFEval"
                )
            self.items()
        elif self.width % (2 * self.heads):
            raise ValueError(f"--width {self.width} must be an even multiple of --heads {self.heads}")

    def digests(self) -> Mapping[str, str]:
        from trialist.data.corpora import data_digest

        return {**model_inputs(self.model, self.device), **({"data": data_digest(self.data)} if self.given else {})}

    def replicates_over(self) -> Any:
        return "item" if self.given else "seed"

    def remarks(self) -> tuple[str, ...]:
        if not self.given:
            return ()
        return (
            f"{len(self.items())} requests; adherence is the mean over temperatures {TEMPERATURES_GIVEN_MODEL}, and fluency what "
            "the same model says to the answer without the principle",
        )

    def arms(self) -> Iterator[Arm]:
        for setting in ("principles", "empty-principle") if self.given else ("tags", "random-tags"):
            null = setting in ("empty-principle", "random-tags")

            def arm(name: str, role: Any, way: str, knob: dict[str, tuple], about: str, setting: str = setting,
                    null: bool = null) -> Arm:  # fmt: skip
                options = {"way": way, "top_p": 1.0, "strength": self.strength}
                tune = knob if knob and not null and not self.given else None
                return Arm(name, role, setting, null, options=options, tune=tune, about=about)

            yield arm("sharpened", "control", "sharpened", {"top_p": NUCLEI},
                      "the prompted model at lower and lower temperature")  # fmt: skip
            yield arm("best-of-2", "control", "best-of-2", {"top_p": NUCLEI},
                      "two texts of the prompted model, the one that the principle makes more likely")  # fmt: skip
            yield arm("two-step", "treatment", "two_step", {"strength": STRENGTHS},
                      "OPAD with the reward of two steps")  # fmt: skip
            if not null:
                yield arm("token", "reference", "token", {"strength": STRENGTHS},
                          "OPAD with the reward of one step: classifier-free guidance")  # fmt: skip
                yield arm("prompted", "reference", "sharpened", {}, "the prompted model, sampled from all tokens")

    def run(self, arm: Arm, seed: int, context: Context) -> Outcome:
        return self.answers(arm, context) if self.given else self.styles(arm, seed, context)

    # the made-up language

    def language(self, context: Context, setting: str) -> StyleLanguage:
        from trialist.data.tagged_styles import StyleLanguage

        return StyleLanguage(context.stream("language"), 0.75 if setting == "random-tags" else self.noise)

    def styles(self, arm: Arm, seed: int, context: Context) -> Outcome:
        from trialist.data import tagged_styles
        from trialist.models.loading import load_model

        assert self.tuning is not None
        inputs = (arm.setting, self.noise, self.layers, self.width, self.heads, self.batch, self.steps, self.learning_rate,
                  self.dtype, resolve_device(self.device), seed)  # fmt: skip
        folder = context.stage("model", inputs, functools.partial(self.build, arm, context))
        trained = stored_outcome(folder / "outcome.json")
        if trained.diverged is not None:
            return trained
        model = load_model(str(folder / "model"), device=resolve_device(self.device))
        language = self.language(context, arm.setting)
        held_out = language.draw(8_192, context.stream("reference"))[0]
        reference, natural = tagged_styles.Trigrams(held_out[:6_144], language.size), held_out[6_144:]
        level = sum(map(reference.score, natural)) / sum(map(len, natural))
        tuning = seed in self.tuning.seeds
        stream = context.stream("validation" if tuning else "sampling")
        styles = [row % language.styles for row in range(self.texts)]
        start = tagged_styles.BOS
        requests = [Request((start,), (start, language.tag(style))) for style in styles]
        points: dict[str, list[tuple[float, float]]] = {}
        forwards = tokens = 0
        for index, temperature in enumerate(TEMPERATURES):
            context.progress(index, len(TEMPERATURES))
            written = write(
                model, requests, arm, temperature=temperature, mask=self.mask, most=language.longest - 2, batch=512,
                end=tagged_styles.EOS, pad=tagged_styles.PAD, seed=(stream + index) % 2**63,
            )  # fmt: skip
            forwards += written.forwards
            tokens += sum(map(len, written.texts))
            for name, value in read(written.texts, styles, language, reference, level).items():
                points.setdefault(name, []).append((temperature, value))
        cost = dataclasses.replace(trained.cost, generated_tokens=float(tokens), sequence_forwards=float(forwards))
        outcome = dataclasses.replace(trained, cost=cost, metrics={})
        adherence = at_equal_fluency(points, "adherence")
        if tuning:
            return with_readings(outcome, {VALIDATION: adherence})
        if context.keep_model:
            save(model, None, context.model_folder)
        readings = {
            "adherence_at_equal_fluency": adherence,
            "distinct_at_equal_fluency": at_equal_fluency(points, "distinct"),
        }
        first = {name: points[name][0][1] for name in ("adherence", "fluency", "length")}
        fluency = [value for _, value in points["fluency"]]
        curves = {
            f"{name}_by_fluency": tuple(sorted(zip(fluency, (value for _, value in points[name]), strict=True)))
            for name in ("adherence", "distinct")
        }
        outcome = dataclasses.replace(outcome, metrics=first, curves={**outcome.curves, **curves})
        return with_readings(outcome, readings)

    def build(self, arm: Arm, context: Context, folder: Path) -> None:
        """Fills a stage: the trained model, and its cost and curve."""
        language = self.language(context, arm.setting)
        model = new_decoder(
            context, device=self.device, vocab_size=language.size, hidden_size=self.width, num_hidden_layers=self.layers,
            num_attention_heads=self.heads, max_position_embeddings=language.longest + 1, bos_token_id=1, eos_token_id=2,
            pad_token_id=0,
        )  # fmt: skip
        seed, device = context.stream("data_order") % 2**32, resolve_device(self.device)

        def batches(step: int) -> dict[str, Any]:
            return {name: tensor.to(device) for name, tensor in language.batch(self.batch, seed, step).items()}

        own = dataclasses.replace(context, keep_model=False, folder=context.folder / "training")
        outcome, _ = train(
            model, batches, own, steps=self.steps, learning_rate=self.learning_rate, dtype=self.dtype,
            evaluate=lambda trained: {}, evaluations=1,
        )  # fmt: skip
        save(model, None, folder / "model")
        stored = dataclasses.asdict(outcome)
        (folder / "outcome.json").write_text(
            json.dumps({key: stored[key] for key in ("metrics", "curves", "cost", "diverged", "notes")})
        )

    # a given model

    def items(self) -> list[Principled]:
        from trialist.data.principles import read_principles

        return read_principles(self.data, columns=self.columns, split=self.split, max_examples=self.texts)

    def answers(self, arm: Arm, context: Context) -> Outcome:
        from trialist.data.constraints import meets
        from trialist.data.tokenizers import load_tokenizer
        from trialist.decoding.guidance.flags import with_principle
        from trialist.decoding.prompts import chat_prompt, text_prompt
        from trialist.models.loading import load_model

        model, tokenizer = load_model(self.model, device=resolve_device(self.device)), load_tokenizer(self.model)
        items, empty = self.items(), arm.setting == "empty-principle"
        requests = []
        for item in items:
            said: Any = item.request if tokenizer.chat_template is None else [{"role": "user", "content": item.request}]
            plain = (text_prompt if isinstance(said, str) else chat_prompt)(tokenizer, said)
            requests.append(
                Request(plain.token_ids, tuple(with_principle(tokenizer, said, EMPTY if empty else item.principle)))
            )
        ends = model.generation_config.eos_token_id
        end = ends if ends is not None else tokenizer.eos_token_id
        pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else 0
        rounds, forwards = len(TEMPERATURES_GIVEN_MODEL), 0
        scores: dict[str, list[list[float]]] = {name: [] for name in ("adherence", "fluency", "length")}
        texts: list[list[int]] = []
        for index, temperature in enumerate(TEMPERATURES_GIVEN_MODEL):
            written = write(
                model, requests, arm, temperature=temperature, mask=self.mask, most=self.new_tokens, batch=self.batch,
                end=end, pad=pad, seed=(context.stream("sampling") + index) % 2**63,
                told=functools.partial(tell, context, index * len(items), rounds * len(items)),
            )  # fmt: skip
            forwards += written.forwards
            texts += written.texts
            answers = tokenizer.batch_decode(written.texts, skip_special_tokens=True)
            scores["adherence"].append(
                [float(meets(a, item.constraints)) for a, item in zip(answers, items, strict=True)]
            )
            scores["length"].append([float(len(text)) for text in written.texts])
            scores["fluency"].append(self.fluencies(model, requests, written.texts, pad))
        per_item = {name: [sum(column) / rounds for column in zip(*rows)] for name, rows in scores.items()}
        keys = tuple(item.key for item in items)
        return Outcome(
            metrics={name: sum(values) / len(values) for name, values in per_item.items()}
            | {"distinct": distinct(texts)},
            items={name: Items(keys, tuple(values)) for name, values in per_item.items()},
            cost=Cost(
                tokens=float(rounds * sum(len(request.plain) for request in requests)),
                generated_tokens=float(sum(map(len, texts))),
                sequence_forwards=float(forwards),
            ),
        )

    def fluencies(self, model: Any, requests: list[Request], texts: list[list[int]], pad: int) -> list[float]:
        found: list[float] = []
        for start in range(0, len(texts), self.batch):
            part = slice(start, start + self.batch)
            found += log_likelihoods(model, [request.plain for request in requests[part]], texts[part], pad)
        return [total / len(text) for total, text in zip(found, texts, strict=True)]


def read(
    texts: list[list[int]], styles: list[int], language: StyleLanguage, reference: Trigrams, level: float
) -> dict[str, float]:
    """Adherence (share of texts), fluency (nats a token above `level`), distinct bigrams (share) and length (tokens) of texts."""
    follows = [language.adherence(text, style) for text, style in zip(texts, styles, strict=True)]
    return {
        "adherence": sum(follows) / len(follows),
        "fluency": sum(map(reference.score, texts)) / sum(map(len, texts)) - level,
        "distinct": distinct(texts),
        "length": sum(map(len, texts)) / len(texts),
    }


def tell(context: Context, before: int, whole: int, done: int) -> None:
    context.progress(before + done, whole)


def with_readings(outcome: Outcome, readings: Mapping[str, Reading]) -> Outcome:
    """The outcome with what was read off curves, or why it could not be."""
    found = {name: reading.value for name, reading in readings.items() if reading.value is not None}
    missing = {name: reading.reason or "undefined" for name, reading in readings.items() if reading.value is None}
    return dataclasses.replace(
        outcome, metrics={**outcome.metrics, **found}, undefined={**outcome.undefined, **missing}
    )


def at_equal_fluency(points: Mapping[str, list[tuple[float, float]]], name: str) -> Reading:
    """A reading averaged over the fixed range of fluency."""
    from trialist.engine import tradeoff

    return tradeoff.area([(x, y) for (_, x), (_, y) in zip(points["fluency"], points[name], strict=True)], RANGE)
