"""Is one nested model as good at every precision as models that were built for each precision by themselves?"""

from __future__ import annotations

import copy
import dataclasses
import functools
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trialist.engine.context import Context
from trialist.engine.contract import Arm, Budget, Claim, Cost, Endpoint, Items, Outcome, Saving, Trial
from trialist.engine.hardware import resolve_device
from trialist.trials._language_model import BUILT_IN, check_length, check_positive, new_decoder, save
from trialist.trials._pruning import stored_outcome
from trialist.trials._text import PIECES, load_rows, take
from trialist.trials._text_trial import TextTrial

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor
    from transformers import PreTrainedModel

    from trialist.data.corpora import Documents
    from trialist.data.packing import PackedRows

HALF = 16
"""Bits of a table's entry"""


@dataclass(frozen=True)
class AnyPrecisionTrial(TextTrial):
    """Is one nested model as good at every precision as models that were built for each precision by themselves?"""

    claim = Claim(
        statement="Read at a precision, the weights of one nested model predict text as well as weights that were clustered for "
        "that precision alone, and the precisions together take a fraction of the bytes.",
        source="arXiv:2402.10517",
        reported="3- to 8-bit Llama-2-7B, Mistral-7B and OPT models from one parent about as good as SqueezeLLM models built "
        "for each bit-width, in the memory of the 8-bit one",
        endpoint=Endpoint("nats_per_token", unit="nats a token", better="lower", margin=0.02),
        secondary=(
            Endpoint("nats_at_lowest", unit="nats a token", better="lower"),
            Endpoint("nats_at_highest", unit="nats a token", better="lower"),
            Endpoint("nats_added", unit="nats a token", better="lower"),
        ),
        kind="non-inferiority",
        saving=Saving("bytes", least=0.3),
    )
    budget = Budget("bits")
    replicate = "seed x item"
    tuning = None
    presets = {
        "tiny": dict(seeds=3, about="about 5 minutes on 2 cores"),
        "real": dict(
            model="smollm2-135m-instruct", length=512, batch=4, calibration_rows=64, test_bytes=262_144, seeds=1,
            about="a given model, nothing is trained, hours on 2 cores",
        ),
        "gpu": dict(
            data="enwik8", tokenizer="bpe-4096", layers=8, width=512, heads=8, length=1024, batch=32, steps=3_000,
            calibration_rows=64, test_bytes=1_000_000, dtype="bfloat16", seeds=3, about="an hour on one GPU",
        ),
        "paper": dict(
            model="meta-llama/Llama-2-7b-hf", data="allenai/c4:en", bits="3-8", length=512, batch=1, calibration_rows=100,
            test_bytes=2_000_000, dtype="bfloat16", seeds=1, about="the paper's smallest Llama and calibration, on a GPU",
        ),
    }  # fmt: skip
    preload = (*TextTrial.preload, "trialist.weights.nested.quantize")  # type: ignore[assignment]
    usage = (
        "from trialist.models import NestedQuantConfig, precision\n"
        "from trialist.weights.nested import quantize_nested\n"
        "quantize_nested(model, NestedQuantConfig(seed_bits=2, parent_bits=4), calibration_sequences)\n"
        "with precision(model, 3):\n"
        "    model.generate(ids)"
    )

    model: str = BUILT_IN
    """Hub id, local folder or asset of a model that is quantised as it is; `decoder` trains a small one for each seed"""
    bits: str = "2-4"
    """Lowest and highest precision, in bits a weight"""
    calibration: str = ""
    """Text for sensitivities: Hub id, local file or folder, or a built-in name; without it validation text of the data"""
    calibration_rows: int = 32
    """Sequences of `length` tokens of it"""

    @property
    def base(self) -> str:
        return self.model

    @property
    def given(self) -> bool:
        return self.model != BUILT_IN

    @property
    def precisions(self) -> tuple[int, ...]:
        low, _, high = self.bits.partition("-")
        return tuple(range(int(low), int(high) + 1))

    def check(self) -> None:
        check_positive(calibration_rows=self.calibration_rows)
        low, dash, high = self.bits.partition("-")
        if not (low.isdigit() and dash and high.isdigit() and 1 <= int(low) < int(high) <= 8):
            raise ValueError(f"--bits {self.bits!r}: give the lowest and a higher precision, as 2-4, within 1 to 8")
        if self.given:
            check_length(self.model, self.length)
        if self.calibration:
            from trialist.data.corpora import load_documents

            load_documents(self.calibration, max_examples=1)
        if self.given and self.calibration:
            from trialist.data.corpora import load_documents

            check_positive(length=self.length, batch=self.batch, test_bytes=self.test_bytes)
            load_documents(self.data, split=self.split, max_examples=1)
        else:
            super().check()

    def digests(self) -> Mapping[str, str]:
        from trialist.data.corpora import data_digest

        return {**super().digests(), **({"calibration": data_digest(self.calibration)} if self.calibration else {})}

    def with_benchmark(self, name: str) -> tuple[Trial, Endpoint]:
        return Trial.with_benchmark(self, name)  # an arm is several models, one at each precision

    def replicates_over(self) -> Any:
        return "item" if self.given else self.replicate

    def remarks(self) -> tuple[str, ...]:
        if not (self.given and self.calibration):
            return super().remarks()
        return (f"test text is taken from all of {self.data}, sensitivities from {self.calibration}",)

    def arms(self) -> Iterator[Arm]:
        for name, role, kind, options, about in (
            ("separate", "control", "separate", {}, "weighted k-means of each row, found anew for every precision"),
            ("round-to-nearest", "control", "rounded", {},
             "even grids for parts of each row, as many as take the same bytes; ranges chosen by weighted error"),
            ("nested", "treatment", "nested", {}, "clusters of the lowest precision, split in two for each further bit"),
            ("nested-joint", "reference", "nested", {"nesting": "joint"}, "borders of all precisions moved together"),
            ("nested-unweighted", "reference", "nested", {"sensitivity": "none"}, "every weight counts the same"),
            ("full", "reference", "full", {}, "the weights as they are"),
        ):  # fmt: skip
            options = {"kind": kind, "nesting": "greedy", "sensitivity": "fisher", **options}
            yield Arm(name, role, "text", options=options, about=about)  # type: ignore[arg-type]

    def run(self, arm: Arm, seed: int, context: Context) -> Outcome:
        model, tokenizer, trained = self.subject(context)
        if model is None:
            return trained
        calibration, test = self.rows(context, tokenizer)
        sensitivity = None
        if arm["sensitivity"] == "fisher" and arm["kind"] != "full":
            sensitivity = self.sensitivity(model, calibration, context)
        readings, stored = self.readings_of(arm, model, test, sensitivity, context)
        if context.keep_model:
            save(model, tokenizer, context.model_folder)
        return self.outcome(arm, readings, stored, test, self.full(model, test, readings))

    def readings_of(
        self,
        arm: Arm,
        model: PreTrainedModel,
        test: PackedRows,
        sensitivity: Mapping[str, Tensor] | None,
        context: Context,
    ) -> tuple[dict[int, np.ndarray], Stored]:
        """Precision -> nats a token of each row of test text, and what the precisions take."""
        import torch
        from transformers.pytorch_utils import Conv1D

        from trialist.models import NestedQuantConfig, nested_bytes, precision
        from trialist.weights.nested.quantize import chosen_layers, quantize_nested
        from trialist.weights.round_to_nearest import round_to_nearest

        low, high = self.precisions[0], self.precisions[-1]

        def config(first: int, last: int) -> Any:
            return NestedQuantConfig(
                seed_bits=first, parent_bits=last, sensitivity=arm["sensitivity"], nesting=arm["nesting"],
                calibration_samples=self.calibration_rows, calibration_length=self.length,
            )  # fmt: skip

        def quantised(first: int, last: int) -> PreTrainedModel:
            made = copy.deepcopy(model)
            quantize_nested(made, config(first, last), sensitivity=sensitivity)
            return made

        layers, _ = chosen_layers(model, config(low, high))
        weights = sum(layer.weight.numel() for layer in layers.values())  # type: ignore[union-attr, operator]
        found: dict[int, np.ndarray] = {}
        if arm["kind"] == "full":
            whole = self.score(model, test)
            size = sum(layer.weight.nbytes for layer in layers.values())  # type: ignore[union-attr]
            return dict.fromkeys(self.precisions, whole), Stored(weights, dict.fromkeys(self.precisions, size), size)
        if arm["kind"] == "nested":
            made = quantised(low, high)
            for number, b in enumerate(self.precisions):
                with precision(made, b):
                    found[b] = self.score(made, test)
                context.progress(number, len(self.precisions))
            alone = {b: nested_bytes(made, b) for b in self.precisions}
            every = nested_bytes(made)
            return found, Stored(
                weights, {b: part.codes + part.tables for b, part in alone.items()}, every.codes + every.tables
            )
        sizes: dict[int, int] = {}
        for number, b in enumerate(self.precisions):
            if arm["kind"] == "separate":
                made = quantised(b, b)
                part = nested_bytes(made)
                sizes[b] = part.codes + part.tables
            else:
                made, sizes[b] = copy.deepcopy(model), 0
                for name in layers:
                    layer: Any = made.get_submodule(name)
                    transposed = isinstance(layer, Conv1D)
                    matrix = layer.weight.T if transposed else layer.weight
                    groups = min(1 << (b - 1), matrix.shape[1])
                    with torch.no_grad():
                        near = round_to_nearest(matrix, b, groups, None if sensitivity is None else sensitivity[name])
                        layer.weight.copy_(near.T if transposed else near)
                    padded = -(-matrix.shape[1] // 64) * 64  # as planes are stored
                    sizes[b] += matrix.shape[0] * (padded * b + 2 * groups * HALF) // 8
            found[b] = self.score(made, test)
            context.progress(number, len(self.precisions))
        return found, Stored(weights, sizes, sum(sizes.values()))

    def full(self, model: PreTrainedModel, test: PackedRows, readings: Mapping[int, np.ndarray]) -> float:
        """Nats a token of the weights as they are."""
        return float(self.score(model, test).mean())

    def score(self, model: PreTrainedModel, rows: PackedRows) -> np.ndarray:
        """(N,) nats a token of each row."""
        import math

        import numpy as np

        from trialist.evaluation.bits_per_byte import bits_of_pieces

        bits = bits_of_pieces(model, rows, batch_size=self.batch)
        row = rows.pieces[:, 1] // rows.length
        count = (rows.positions > 0).sum(1)
        nats = np.bincount(row, weights=bits, minlength=len(rows)) * math.log(2)
        return nats[count > 0] / count[count > 0]

    def outcome(
        self, arm: Arm, readings: Mapping[int, np.ndarray], stored: Stored, test: PackedRows, full: float
    ) -> Outcome:
        """An item's endpoint is its mean over the precisions above the lowest, where separate and nested weights are the same."""
        import numpy as np

        ids, clusters = row_names(test)
        low, *above = self.precisions
        items = {
            "nats_per_token": np.mean([readings[b] for b in above], axis=0),
            "nats_at_lowest": readings[low],
            "nats_at_highest": readings[above[-1]],
        }
        means = {name: float(scores.mean()) for name, scores in items.items()}
        points = tuple((float(b), float(scores.mean())) for b, scores in readings.items())
        return Outcome(
            metrics={**means, "nats_added": means["nats_per_token"] - full},
            items={name: Items(ids, tuple(scores.tolist()), clusters) for name, scores in items.items()},
            curves={"nats_per_token_by_bits": points},
            cost=Cost(
                bytes=float(stored.all),
                bits=8 * sum(stored.alone.values()) / len(stored.alone) / stored.weights,
            ),
            notes=(
                f"{arm.name}: {', '.join(f'{b} bits {value:.4f}' for b, value in points)} nats a token, {full:.4f} as they are; "
                f"{stored.all:,} bytes for all precisions of {stored.weights:,} weights",
            ),
        )

    def rows(self, context: Context, tokenizer: Any) -> tuple[dict[str, Tensor], PackedRows]:
        """Calibration sequences as a batch, and the rows of test text."""
        from trialist.data.corpora import load_documents

        def packed(documents: Documents, size: int) -> PackedRows:
            from trialist.data.packing import pack
            from trialist.data.tokenizers import document_start, encode_documents

            texts = take(documents, size, longest=max(1, size // PIECES))
            return pack(encode_documents(tokenizer, texts), self.length, bos_id=document_start(tokenizer))

        wanted = self.calibration_rows * self.length * 8
        if self.given and self.calibration:
            test = packed(load_documents(self.data, split=self.split), self.test_bytes)
        else:
            folder, _ = self.prepared(context, shuffled=False)
            test = load_rows(folder, "test")[0]
        if self.calibration:
            fitted = packed(load_documents(self.calibration), wanted)
        elif self.given:
            fitted = packed(self.text.splits().train, wanted)
        else:
            fitted = load_rows(folder, "validation")[0]
        return fitted.rows(slice(0, self.calibration_rows)), test

    def sensitivity(
        self, model: PreTrainedModel, calibration: Mapping[str, Tensor], context: Context
    ) -> dict[str, Tensor]:
        """Squared gradients of the weights, found once for all arms."""
        import hashlib

        from safetensors.torch import load_file

        digest = hashlib.sha256(calibration["input_ids"].numpy().tobytes()).hexdigest()
        inputs = (*self.model_key(context), digest, self.calibration_rows, self.length)
        stage = context.stage("sensitivity", inputs, functools.partial(build_sensitivity, model, calibration))
        return load_file(stage / "sensitivity.safetensors")

    def model_key(self, context: Context) -> tuple:
        """What the model that is quantised depends on."""
        if self.given:
            from trialist.models.loading import model_digest

            return (model_digest(self.model), self.dtype)
        return (self.text.digest(), self.text.tokenizer, self.layers, self.width, self.heads, self.length, self.batch, self.steps,
                self.learning_rate, resolve_device(self.device), self.dtype, context.seed)  # fmt: skip

    def subject(self, context: Context) -> tuple[PreTrainedModel | None, Any, Outcome]:
        """The model that is quantised, its tokenizer, and its training as an outcome; None where that diverged."""
        from trialist.data.tokenizers import load_tokenizer
        from trialist.models import load_model

        if self.given:
            model = load_model(self.model, device=resolve_device(self.device), dtype=self.dtype)
            return model, load_tokenizer(self.model), Outcome()
        _, tokenizer = self.prepared(context, shuffled=False)
        stage = context.stage("model", self.model_key(context), functools.partial(self.build, context))
        outcome = stored_outcome(stage / "outcome.json")
        if outcome.diverged is not None:
            return None, tokenizer, outcome
        return load_model(str(stage / "model"), device=resolve_device(self.device)), tokenizer, outcome

    def build(self, context: Context, folder: Path) -> None:
        """Fills a stage: the trained model in `model`, and its cost and curve in `outcome.json`."""
        own = dataclasses.replace(context, keep_model=False, folder=context.folder / "base")
        text, tokenizer = self.prepared(context, shuffled=False)
        model = new_decoder(
            own, device=resolve_device(self.device), vocab_size=len(tokenizer), hidden_size=self.width,
            num_hidden_layers=self.layers, num_attention_heads=self.heads, head_dim=self.width // self.heads,
            layer_types=["full_attention"] * self.layers, max_position_embeddings=self.length,
        )  # fmt: skip
        outcome, _ = self.fit_text(model, text, own, learning_rate=self.learning_rate, part="validation", evaluations=2)
        save(model, tokenizer, folder / "model")
        stored = dataclasses.asdict(outcome)
        (folder / "outcome.json").write_text(
            json.dumps({key: stored[key] for key in ("metrics", "curves", "cost", "diverged", "notes")})
        )


@dataclass(frozen=True)
class Stored:
    """What an arm stores of the quantised matrices."""

    weights: int
    """Numbers in them"""
    alone: Mapping[int, int]
    """Bits -> bytes of that precision by itself"""
    all: int
    """Bytes of all precisions together"""


def build_sensitivity(model: PreTrainedModel, calibration: Mapping[str, Tensor], folder: Path) -> None:
    from safetensors.torch import save_file

    from trialist.models import NestedQuantConfig
    from trialist.weights.nested.quantize import chosen_layers
    from trialist.weights.nested.sensitivity import sensitivities

    layers, _ = chosen_layers(model, NestedQuantConfig())
    found = sensitivities(model, layers, calibration, "fisher")
    save_file({name: x.contiguous() for name, x in found.items()}, folder / "sensitivity.safetensors")


def row_names(rows: PackedRows) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Ids of the rows that hold scored tokens, and the document that fills most of each."""
    import numpy as np

    largest: dict[int, tuple[int, int]] = {}
    for document, offset, size in rows.pieces:
        row = int(offset) // rows.length
        largest[row] = max(largest.get(row, (0, 0)), (int(size), int(document)))
    kept = np.flatnonzero((rows.positions > 0).sum(1) > 0).tolist()
    return tuple(f"row {row}" for row in kept), tuple(f"document {largest[row][1]}" for row in kept)
