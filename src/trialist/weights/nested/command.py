"""The transform `quantize`: options, calibration, progress, and what is shown at the end."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from trialist.weights.context_pruning import saved_to
from trialist.weights.context_text import ModelAndText, bits_per_byte, rows_for

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from trialist.models.nested.quantizer import NestedQuantConfig

Say = Callable[[str], None]
DEFAULT_LENGTH = 512
MOST_BITS = 8
MIB = 2**20


@dataclass(frozen=True, kw_only=True)
class Quantize(ModelAndText):
    """Store a model's weights so that one copy of them can be read at several precisions, 2, 3 or 4 bits a weight.

    Weights of a row become codes into small tables; what errors of a weight count is found on a text of yours. The output folder
    opens with from_pretrained where trialist.models is imported; `--bits` of the generating commands chooses the precision.
    """

    output: str
    """New folder for the model"""
    method: Literal["nested"] = "nested"
    """How weights are stored: nested codes (Any-Precision LLM)"""
    bits: str = "2-4"
    """Lowest and highest precision, 1 to 8 bits a weight; a single number builds that one alone"""
    data: str = "python-stdlib"
    """Calibration text: Hub id, local .txt, .jsonl or .parquet file or folder, or a built-in name (python-stdlib, enwik8)"""
    tokens: int = 51_200
    """Tokens of text on which sensitivities are found"""
    length: int | None = None
    """Tokens in a calibration sequence; without it 512, or the model's context if shorter"""
    check_tokens: int = 8_192
    """Tokens of other text on which bits per byte are told, before and after; 0 tells none"""
    sensitivity: Literal["fisher", "activation", "none"] = "fisher"
    """What an error of a weight counts: mean square of its gradient, of its input, or the same for all"""
    nesting: Literal["greedy", "joint"] = "greedy"
    """How precisions are fitted into each other: clusters split one by one, or all borders moved together"""
    seed_init: Literal["dp", "kmeans++"] = "dp"
    """How the lowest precision is found: the best clusters, or drawn and improved ones"""
    head: bool = False
    """Quantise the output layer too; one that shares the embedding's weights then has codes of its own"""
    keep: tuple[str, ...] = ()
    """Linear layers to leave alone, by name or last part of it, as down_proj"""
    table_dtype: Literal["float16", "bfloat16"] = "float16"
    """Numbers in the tables"""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Numbers of all that is not quantised; auto keeps those of the model"""
    seed: int = 0
    """Of kmeans++"""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.bit_range()
        if self.check_tokens < 0:
            raise ValueError(f"--check-tokens must be at least 0, not {self.check_tokens}")

    def bit_range(self) -> tuple[int, int]:
        """Lowest and highest precision."""
        found = re.fullmatch(r"(\d)(?:-(\d))?", self.bits)
        low, high = (int(found[1]), int(found[2] or found[1])) if found else (0, 0)
        if not 1 <= low <= high <= MOST_BITS:
            raise ValueError(f"--bits {self.bits!r}: give the lowest and the highest, as 2-4, within 1 to {MOST_BITS}")
        return low, high

    def row_length(self) -> int:
        given = super().row_length()
        return given if self.length is not None else min(DEFAULT_LENGTH, given)

    def config(self, model: PreTrainedModel, length: int) -> NestedQuantConfig:
        from trialist.models.nested.quantizer import NestedQuantConfig

        low, high = self.bit_range()
        output = model.get_output_embeddings()
        names = [name for name, module in model.named_modules() if module is output and not self.head]
        return NestedQuantConfig(
            seed_bits=low, parent_bits=high, sensitivity=self.sensitivity, nesting=self.nesting, seed_init=self.seed_init,
            calibration_samples=max(1, self.tokens // length), calibration_length=length, table_dtype=self.table_dtype,
            modules_to_not_convert=[*names, *self.keep], seed=self.seed,
        )  # fmt: skip

    def __call__(self, say: Say = print) -> Mapping[str, Any]:
        """Writes the folder and returns what to show: bytes by part, errors and bits per byte by precision."""
        import torch

        from trialist.data.samples import sample_halves, sample_text
        from trialist.models.nested.precision import nested_bytes, precision
        from trialist.weights.nested.quantize import chosen_layers, quantize_nested

        length = self.row_length()
        reads = self.sensitivity != "none" or self.check_tokens > 0
        documents = self.documents(self.data) if reads else None
        model, tokenizer = self.loaded()
        kept = model.dtype if self.dtype == "auto" else getattr(torch, self.dtype)
        if model.dtype == torch.float16:
            model.float()  # gradients would vanish
        config = self.config(model, length)
        layers, _ = chosen_layers(model, config)
        size = sum(int(layer.weight.numel()) for layer in layers.values())  # type: ignore[union-attr, operator]
        held = sum(x.nbytes for x in model.parameters()) + (4 * size if self.sensitivity == "fisher" else 0)
        say(f"{len(layers)} layers with {size:,} weights; model and sensitivities take {held / MIB:,.0f} MiB of memory")
        with saved_to(self.output, model) as save:
            fitted = checked = None
            if documents is not None and self.check_tokens and self.sensitivity != "none":
                fitted, other = sample_halves(
                    documents, tokenizer, tokens=max(self.tokens, self.check_tokens), length=length
                )
                checked = rows_for(model, other)
                checked_bytes = other.bytes
            elif documents is not None:
                sample = sample_text(documents, tokenizer, tokens=self.tokens or self.check_tokens, length=length)
                fitted, checked_bytes = sample, sample.bytes
                checked = rows_for(model, sample) if self.check_tokens else None
            shown: dict[str, str] = {}
            if checked is not None:
                checked, checked_bytes = first_rows(checked, checked_bytes, self.check_tokens)
                full = bits_per_byte(model, checked, checked_bytes, batch=self.batch)
                shown["dense"] = f"{full:.4f} bits per byte"
            rows = None
            if fitted is not None and self.sensitivity != "none":
                rows = rows_for(model, fitted)
                rows = {name: x[: max(1, self.tokens // length)] for name, x in rows.items()}
                say(f"{len(rows['input_ids'])} sequences of {length} tokens of {self.data}")
            report = quantize_nested(model, config, rows, progress=tenths(say))
            model.to(kept)
            for bits in config.bits:
                words = f"weighted error {report.error[bits]:.3g}, {nested_bytes(model, bits).total / MIB:,.1f} MiB by itself"
                if checked is not None:
                    with precision(model, bits):
                        quality = bits_per_byte(model, checked, checked_bytes, batch=self.batch)
                    words += f", {quality:.4f} bits per byte"
                shown[f"{bits} bits"] = words
            save(tokenizer)
        stored = nested_bytes(model)
        return {
            "nested weights": f"{report.weights:,} in {report.layers} layers, {report.bits_per_weight:.2f} bits each with tables",
            "codes": f"{stored.codes / MIB:,.1f} MiB",
            "tables": f"{stored.tables / MIB:,.1f} MiB",
            "everything else": f"{stored.untouched / MIB:,.1f} MiB" + _left(report.left),
            "all": f"{stored.total / MIB:,.1f} MiB instead of {report.dense / MIB:,.1f}",
            **shown,
            "model": self.output,
        }


def first_rows(rows: Mapping[str, Any], size: int, tokens: int) -> tuple[dict[str, Any], int]:
    """The first rows of a sample that hold `tokens` scored tokens, and their share of its bytes."""
    scored = (rows["labels"][:, 1:] >= 0).sum(1).cumsum(0)
    count = min(len(scored), int((scored < tokens).sum()) + 1)
    share = float(scored[count - 1]) / float(scored[-1])
    return {name: x[:count] for name, x in rows.items()}, max(1, round(size * share))


def _left(left: Mapping[str, str]) -> str:
    return ", with " + "; ".join(f"{name}, {why}" for name, why in left.items()) if 0 < len(left) <= 3 else ""


def tenths(say: Say) -> Callable[[str, int, int], None]:
    """Progress that is said at every tenth of the way."""
    told: dict[str, int] = {}

    def report(what: str, done: int, total: int) -> None:
        if int(10 * done / total) > told.get(what, 0):
            told[what] = int(10 * done / total)
            say(f"{what}: {done} of {total}")

    return report
