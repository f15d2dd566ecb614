"""Does a cache that drops the key channels which the latest queries use least lose less than other caches of the same bytes?"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from trialist.engine.context import Context
from trialist.engine.contract import Arm, Budget, Claim, Cost, Endpoint, Items, Outcome, Trial
from trialist.engine.hardware import resolve_device
from trialist.trials._compact import Caches, Passages, Reading, in_batches
from trialist.trials._language_model import BUILT_IN, check_positive, new_decoder, save, train
from trialist.trials._pruning import stored_outcome
from trialist.trials._text import take
from trialist.trials._text_trial import TextTrial

if TYPE_CHECKING:
    from transformers import PreTrainedModel

KEEPS = (0.12, 0.25, 0.4, 0.55, 0.7, 0.85)
"""Points of the curve: shares of the channels of each key; other caches hold the same bytes"""
RANGE = (0.68, 0.9)
"""Range of the endpoint: bytes of the cache as shares of those of all keys and values. Keys are half of them"""
EVALUATION, VALIDATION = 40_001, 40_002
"""Seeds of the generated lists that decide, the same for every seed and arm, and of those that training is watched on"""
CHANCE_STEPS = 4
"""The model that learns that lists tell nothing needs so many times fewer steps"""


@dataclass(frozen=True)
class ThinKTrial(TextTrial):
    """Do keys pruned by the latest queries lose less than other channels, and than fewer tokens, at equal bytes of cache?"""

    claim = Claim(
        statement="At equal bytes of cache, a prompt whose keys are pruned to the channels that its latest queries use most "
        "lets the model predict what follows better than one pruned to random channels or to the largest ones, and better than "
        "one of which fewer tokens are kept.",
        source="arXiv:2407.21018",
        reported="over 20 % of the memory of keys and values saved beyond token eviction or quantisation, at the same or better "
        "accuracy on LongBench and needle tests, with 40 to 60 % of the channels of keys pruned",
        endpoint=Endpoint("nats_added_by_pruning", unit="nats a token", better="lower", margin=0.02),
        secondary=(
            Endpoint("share_right_of_pruned", unit="share of tokens", better="higher"),
            Endpoint("nats_of_full", unit="nats a token", better="lower"),
        ),
    )
    budget = Budget(
        "bytes", tolerance=0.02, reason="channels and tokens are whole, and heads are too narrow for every share"
    )
    replicate = "seed x item"
    tuning = None
    presets = {
        "tiny": dict(seeds=3, about="about 5 minutes a setting on 2 cores"),
        "real": dict(
            model="smollm2-135m-instruct", length=1088, following=64, recent=32, window=32, pairs=48, asked=4, test_items=24,
            batch=1, seeds=1, about="a given model, nothing is trained, hours on 2 cores",
        ),
        "gpu": dict(
            data="enwik8", tokenizer="bpe-4096", layers=8, width=512, heads=8, key_value_heads=2, length=1024, following=128,
            batch=32, steps=3_000, recall_steps=6_000, recall_layers=4, recall_width=256, recall_heads=4, pairs=48,
            recent=8, window=16, test_items=256, dtype="bfloat16", seeds=6, about="an hour on one GPU",
        ),
    }  # fmt: skip
    preload: ClassVar[tuple[str, ...]] = (  # type: ignore[assignment]
        *TextTrial.preload, "trialist.data.key_value", "trialist.models.compact_cache.cache",
    )  # fmt: skip
    usage = (
        "from trialist.decoding import KeyPruning, generate\n"
        "output = generate(model, [KeyPruning(keep=0.6)], input_ids, max_new_tokens=200, return_dict_in_generate=True)\n"
        "output.past_key_values.report()  # what each layer holds, in bytes"
    )

    model: str = BUILT_IN
    """Hub id, local folder or asset of a model that is read as it is; `decoder` trains two small ones for each seed"""
    key_value_heads: int = 2
    """Key/value heads of the built-in decoders; query heads share them in groups"""
    heads: int = 4
    steps: int = 300
    following: int = 32
    """Tokens of a text that are predicted behind its prompt; the prompt is the rest of `length`"""
    recall_layers: int = 2
    """Layers of the decoder that learns to recall"""
    recall_width: int = 64
    """Its width"""
    recall_heads: int = 4
    """Its attention heads"""
    recall_steps: int = 1200
    """Its training steps"""
    recall_batch: int = 32
    """Lists in a step of its training"""
    recall_rate: float = 4e-3
    """Its peak learning rate"""
    pairs: int = 40
    """Pairs of key and value in a list"""
    asked: int = 16
    """Pairs of a list that are asked for"""
    recent: int = 4
    """Latest tokens of a prompt whose keys stay whole"""
    window: int = 8
    """Latest queries of a prompt that decide on channels, and on tokens in SnapKV"""
    test_items: int = 64
    """Texts, and lists, on which all arms are compared"""
    test_bytes: int = 32_768

    @property
    def base(self) -> str:
        return self.model

    @property
    def given(self) -> bool:
        return self.model != BUILT_IN

    def check(self) -> None:
        check_positive(
            following=self.following, recall_layers=self.recall_layers, recall_width=self.recall_width, pairs=self.pairs,
            recall_heads=self.recall_heads, recall_steps=self.recall_steps, recall_batch=self.recall_batch, asked=self.asked,
            window=self.window, test_items=self.test_items, key_value_heads=self.key_value_heads,
        )  # fmt: skip
        if self.recent < 0:
            raise ValueError(f"--recent {self.recent}: at least 0 tokens")
        shortest = 4 * (max(self.window, self.recent) + 8)
        if self.length - self.following < shortest:
            raise ValueError(
                f"--length {self.length} leaves prompts of {self.length - self.following} tokens before --following "
                f"{self.following}; with this --window and --recent they must have at least {shortest}"
            )
        if self.asked > self.pairs:
            raise ValueError(f"--asked {self.asked} is more than the --pairs {self.pairs} of a list")
        if not self.given:
            from trialist.data.key_value import VOCABULARY

            fewest = 2 * (max(self.window, self.recent) + 8)
            if not fewest <= self.pairs <= VOCABULARY.keys:
                raise ValueError(
                    f"--pairs {self.pairs}: at most {VOCABULARY.keys}, and at least {fewest} with this --window and --recent"
                )
            for name, heads, width in (
                ("heads", self.heads, self.width),
                ("recall-heads", self.recall_heads, self.recall_width),
            ):
                if heads % self.key_value_heads or width % (2 * heads):
                    raise ValueError(
                        f"--{name} {heads} must be a multiple of --key-value-heads {self.key_value_heads}, and the width {width} "
                        "an even multiple of it"
                    )
        super().check()

    def with_benchmark(self, name: str) -> tuple[Trial, Endpoint]:
        return Trial.with_benchmark(self, name)  # the arms share models, and differ in the cache alone

    def replicates_over(self) -> Any:
        return "item" if self.given else self.replicate

    def remarks(self) -> tuple[str, ...]:
        left_out = ("the null setting is left out: it needs a model that was trained on lists that tell nothing",)
        return (*super().remarks(), *(left_out if self.given else ()))

    def arms(self) -> Iterator[Arm]:
        for setting in ("text", "recall") if self.given else ("text", "recall", "chance"):
            null = setting == "chance"
            plain = {"channels": "", "recover": "none", "policy": ""}
            for name, role, options, about in (
                ("random-channels", "control", {"channels": "random"}, "channels of keys drawn at random"),
                ("key-norm", "control", {"channels": "key_norm"}, "the largest channels of the keys"),
                ("recency", "control", {"policy": "recency"}, "the first and the latest tokens, as many as the bytes hold"),
                ("heavy-hitters", "control", {"policy": "h2o"}, "the tokens that received most attention, and the latest"),
                ("snapkv", "control", {"policy": "snapkv"}, "the tokens that the latest queries attend to, and the latest"),
                ("think", "treatment", {"channels": "query"}, "the channels of keys that the latest queries use most"),
                ("think-mean", "reference", {"channels": "query", "recover": "mean"},
                 "the treatment, with the mean of what was dropped"),
                ("think-snapkv", "reference", {"channels": "query", "policy": "snapkv"},
                 "half of the saving by channels, the rest by tokens"),
                ("full-cache", "reference", {}, "everything"),
            ):  # fmt: skip
                if not (null and role == "reference"):
                    yield Arm(name, role, setting, null, options={**plain, **options}, about=about)  # type: ignore[arg-type]

    def run(self, arm: Arm, seed: int, context: Context) -> Outcome:
        model, tokenizer, trained = self.subject(arm.setting, context)
        if model is None:
            return trained
        caches = Caches(model, self.recent, self.window)
        full, curves, batches = [], [], self.passages(arm.setting, model, tokenizer, context)
        for index, batch in enumerate(batches):
            context.progress(index, len(batches))
            full.append(caches.read(batch, {}))
            curves.append([] if arm.name == "full-cache" else caches.curve(arm, batch, KEEPS))
        outcome = read(trained, batches, full, curves)
        if context.keep_model:
            save(model, tokenizer, context.model_folder)
        return outcome

    def subject(self, setting: str, context: Context) -> tuple[PreTrainedModel | None, Any, Outcome]:
        """The model that is read, its tokenizer or None, and its training as an outcome; None where that diverged."""
        from trialist.data.tokenizers import load_tokenizer
        from trialist.models.loading import load_model

        if self.given:
            model = load_model(self.model, device=resolve_device(self.device), dtype=self.dtype)
            return model, load_tokenizer(self.model), Outcome()
        sizes = (self.key_value_heads, resolve_device(self.device), self.dtype, context.seed)
        tokenizer, inputs = None, self.recall_inputs(setting)
        if setting == "text":
            folder, tokenizer = self.prepared(context, shuffled=False)
            inputs = (
                folder.name,
                self.layers,
                self.width,
                self.heads,
                self.length,
                self.batch,
                self.steps,
                self.learning_rate,
            )
        stage = context.stage("model", (*inputs, *sizes), functools.partial(self.build, setting, tokenizer, context))
        outcome = stored_outcome(stage / "outcome.json")
        if outcome.diverged is not None:
            return None, tokenizer, outcome
        return load_model(str(stage / "model"), device=resolve_device(self.device)), tokenizer, outcome

    def recall_inputs(self, setting: str) -> tuple[Any, ...]:
        return (setting, self.recall_layers, self.recall_width, self.recall_heads, self.recall_steps, self.recall_batch,
                self.recall_rate, self.pairs, self.asked)  # fmt: skip

    def build(self, setting: str, tokenizer: Any, context: Context, folder: Path) -> None:
        """Fills a stage: the trained model in `model`, and its cost and curve in `outcome.json`."""
        import json

        own = dataclasses.replace(context, keep_model=False, folder=context.folder / setting)
        if setting == "text":
            model = self.decoder(own, len(tokenizer), self.layers, self.width, self.heads, self.length)
            rows, _ = self.prepared(context, shuffled=False)
            outcome, _ = self.fit_text(
                model, rows, own, learning_rate=self.learning_rate, part="validation", evaluations=1
            )
        else:
            model, outcome = self.fit_lists(setting, own)
        save(model, tokenizer, folder / "model")
        stored = dataclasses.asdict(outcome)
        (folder / "outcome.json").write_text(
            json.dumps({key: stored[key] for key in ("metrics", "curves", "cost", "diverged", "notes")})
        )

    def decoder(
        self, context: Context, vocabulary: int, layers: int, width: int, heads: int, length: int
    ) -> PreTrainedModel:
        return new_decoder(
            context, device=resolve_device(self.device), vocab_size=vocabulary, hidden_size=width, num_hidden_layers=layers,
            num_attention_heads=heads, num_key_value_heads=self.key_value_heads, head_dim=width // heads,
            layer_types=["full_attention"] * layers, max_position_embeddings=length,
        )  # fmt: skip

    def fit_lists(self, setting: str, context: Context) -> tuple[PreTrainedModel, Outcome]:
        """A decoder that learnt to recall, or that answers are drawn by chance."""
        from trialist.data.key_value import VOCABULARY
        from trialist.trials._symbols import mean_loss

        source = self.lists(setting, context.stream("data_order"), self.recall_batch)
        watched = self.lists(setting, VALIDATION, self.recall_batch)
        model = self.decoder(
            context, VOCABULARY.size, self.recall_layers, self.recall_width, self.recall_heads, source.length
        )
        device = resolve_device(self.device)

        def batch(lists: Any, step: int) -> dict[str, Any]:
            return {name: tensor.to(device) for name, tensor in lists(step).items()}

        outcome, _ = train(
            model, functools.partial(batch, source), context, learning_rate=self.recall_rate, dtype=self.dtype, evaluations=3,
            steps=self.recall_steps if setting == "recall" else max(1, self.recall_steps // CHANCE_STEPS),
            evaluate=lambda _: {"validation_nats": mean_loss(model, [batch(watched, 0), batch(watched, 1)])},
        )  # fmt: skip
        return model, outcome

    def lists(self, setting: str, seed: int, batch: int) -> Any:
        from trialist.data.key_value import KeyValueBatches

        return KeyValueBatches("recall" if setting == "recall" else "chance", batch, seed, self.pairs, self.asked)

    def passages(self, setting: str, model: PreTrainedModel, tokenizer: Any, context: Context) -> list[Passages]:
        """The items that decide, the same for every seed and arm, in batches of one length."""
        if setting == "text":
            return in_batches(self.texts(model, tokenizer, context), self.batch)
        if self.given:
            return [self.list_in_words(index, model, tokenizer) for index in range(self.test_items)]
        lists = self.lists(setting, EVALUATION, self.test_items)
        whole = {name: tensor.to(model.device) for name, tensor in lists(0).items()}
        ids, P = tuple(f"list {index}" for index in range(self.test_items)), lists.prompt
        passages = Passages(whole["input_ids"][:, :P], whole["input_ids"][:, P:], whole["labels"][:, P:], ids, ids)
        return in_batches(passages, self.recall_batch)

    def texts(self, model: PreTrainedModel, tokenizer: Any, context: Context) -> Passages:
        """Passages of `length` tokens from test documents, cut once for all arms and seeds."""
        import numpy as np
        import torch

        source = (self.text.digest(), self.text.tokenizer, self.split, self.columns, self.max_examples)
        inputs = (*source, self.length, self.test_items)
        stage = context.stage("passages", inputs, functools.partial(self.cut_texts, tokenizer))
        with np.load(stage / "passages.npz") as stored:
            tokens = torch.from_numpy(stored["tokens"]).to(model.device)
            clusters = tuple(f"document {index}" for index in stored["documents"])
        P = self.length - self.following
        names = tuple(f"passage {index}" for index in range(len(tokens)))
        return Passages(tokens[:, :P], tokens[:, P:], tokens[:, P:], names, clusters)

    def cut_texts(self, tokenizer: Any, folder: Path) -> None:
        """Fills a stage: `passages.npz`, at most four of one document and none that overlap."""
        import numpy as np

        from trialist.data.tokenizers import document_start, encode_documents

        start = document_start(tokenizer)
        rows: list[list[int]] = []
        indices: list[int] = []
        documents = take(self.text.splits().test, 40 * self.test_items * self.length, longest=32 * self.length)
        for index, tokens in enumerate(encode_documents(tokenizer, documents)):
            size = self.length - (start is not None)
            for first in range(0, min(len(tokens) - size + 1, 4 * size), size):
                rows.append(
                    [*([] if start is None else [start]), *(int(token) for token in tokens[first : first + size])]
                )
                indices.append(index)
        if len(rows) < 2:
            raise ValueError(
                f"the test text holds {len(rows)} passages of {self.length} tokens; give longer documents, or lower --length"
            )
        np.savez(
            folder / "passages.npz",
            tokens=np.array(rows[: self.test_items], np.int64),
            documents=np.array(indices[: self.test_items]),
        )

    def list_in_words(self, index: int, model: PreTrainedModel, tokenizer: Any) -> Passages:
        from trialist.data.key_value import key_value_text

        parts = key_value_text(tokenizer, self.pairs, self.asked, seed=EVALUATION + index)
        prompt, questions, labels = (part.to(model.device) for part in parts)
        return Passages(prompt, questions, labels, (f"list {index}",), (f"list {index}",))


def read(trained: Outcome, batches: list[Passages], full: list[Reading], curves: list[list[Reading]]) -> Outcome:
    """An item's endpoint is the mean, over the range of bytes, of what its caches add to the full one's nats."""
    from trialist.engine import tradeoff

    low, high = (math.log2(share) for share in RANGE)
    ids = tuple(name for batch in batches for name in batch.ids)
    clusters = tuple(name for batch in batches for name in batch.clusters)
    nats = [value for reading in full for value in reading.nats]
    added: list[float] = []
    right: list[float] = []
    stored: list[tuple[float, int]] = []  # bytes a row, and rows
    points: list[list[tuple[float, float, int]]] = [[] for _ in range(max(1, len(curves[0])))]
    for whole, curve in zip(full, curves, strict=True):
        for row, before in enumerate(whole.nats):
            if not curve:
                added.append(0.0)
                right.append(whole.right[row])
                continue
            x = [math.log2(reading.share) for reading in curve]
            of_nats = tradeoff.area(zip(x, [reading.nats[row] - before for reading in curve], strict=True), (low, high))
            of_right = tradeoff.area(zip(x, [reading.right[row] for reading in curve], strict=True), (low, high))
            if of_nats.value is None or of_right.value is None:
                return dataclasses.replace(
                    trained, metrics={}, undefined={"nats_added_by_pruning": of_nats.reason or "undefined"}
                )
            added.append(of_nats.value)
            right.append(of_right.value)
        for place, reading in zip(points, curve or [whole]):
            place.append((reading.share, sum(reading.nats) - (sum(whole.nats) if curve else 0.0), len(reading.nats)))
            stored.append((reading.bytes, len(reading.nats)))
    items = {
        "nats_added_by_pruning": Items(ids, tuple(added), clusters),
        "share_right_of_pruned": Items(ids, tuple(right), clusters),
        "nats_of_full": Items(ids, tuple(nats), clusters),
    }
    line = tuple(
        (
            sum(share * n for share, _, n in place) / sum(n for *_, n in place),
            sum(total for _, total, _ in place) / len(ids),
        )
        for place in points
    )
    held = sum(size * n for size, n in stored) / sum(n for _, n in stored)
    return dataclasses.replace(
        trained,
        metrics={name: sum(of.scores) / len(of.scores) for name, of in items.items()},
        items=items,
        curves={**trained.curves, "nats_added_by_share_of_bytes": tuple(sorted(line))} if curves[0] else trained.curves,
        cost=dataclasses.replace(trained.cost, bytes=held) if trained.cost else Cost(bytes=held),
        notes=(*trained.notes, f"a row's cache holds {held:.0f} bytes on average over the points of the curve"),
    )
