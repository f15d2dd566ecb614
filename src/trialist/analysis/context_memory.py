"""The analysis `context-memory`: how much of its context each layer of a model remembers, sees and stores."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trialist.weights.context_pruning import budget_words, budgets_by_layer
from trialist.weights.context_text import ModelAndText, bits_per_byte, nats_per_token, padded_rows, rows_for


@dataclass(frozen=True, kw_only=True)
class ContextMemoryAnalysis(ModelAndText):
    """What the layers of a model remember of a text, what their budgets leave, and what the cache takes.

    Tokens that a layer remembers are counted by the penalty of selective attention; a layer without it has only a budget, if
    any, and its share of the cache. `trialist apply prune-context` finds budgets.
    """

    data: str
    """Text: Hub id, local .txt, .jsonl or .parquet file or folder, or a built-in name (python-stdlib, enwik8)"""
    output: str | None = None
    """File for everything, layer by layer, as JSON"""
    tau: float = 1.0
    """Penalty from which on a token counts as forgotten"""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.tau < math.inf:
            raise ValueError(f"--tau must be > 0, not {self.tau}")

    def __call__(self, say: Callable[[str], None] = print) -> Mapping[str, Any]:
        """Measures, writes the file if one is named, and returns what to show: layer by layer, then cache and loss."""
        if self.output is not None and Path(self.output).exists():
            raise ValueError(f"--output {self.output} exists; give a new file, so that nothing is overwritten")
        report = self.report(say)
        if self.output is not None:
            Path(self.output).write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
        shown = {f"layer {layer['layer']}": in_words(layer) for layer in report["layers"]}
        file = {} if self.output is None else {"data": self.output}
        return {
            **shown,
            "bytes of cache": f"{report['kv_bytes']:,.0f} after {report['length']:,} tokens",
            "bits per byte": f"{report['bits_per_byte']:.4f}, {report['nats_per_token']:.4f} nats a token",
            **file,
        }

    def report(self, say: Callable[[str], None] = print) -> dict[str, Any]:
        """Everything that was measured, in JSON types."""
        from trialist.data.samples import sample_text
        from trialist.models import kv_bytes, memory_profile
        from trialist.models.selective_attention.memory import selective_modules

        length, documents = self.row_length(), self.documents(self.data)
        model, tokenizer = self.loaded()
        sample = sample_text(documents, tokenizer, tokens=self.tokens, length=length)
        rows = rows_for(model, sample)
        say(f"{sample.rows.scored:,} tokens of {self.data} in rows of {length}")
        bits = bits_per_byte(model, rows, sample.bytes, batch=self.batch)
        budgets, row = budgets_by_layer(model), rows["input_ids"][:1]
        remembered = {}
        if selective_modules(model):
            profile = memory_profile(model, padded_rows(model, sample), tau=self.tau, batch_size=self.batch)
            remembered = {entry.layer: dataclasses.asdict(entry) for entry in profile}
        return {
            "model": self.model,
            "data": self.data,
            "tokens": sample.rows.scored,
            "length": row.shape[1],
            "tau": self.tau,
            "layers": [
                {"layer": layer, "budget": budget, **remembered.get(layer, {})} for layer, budget in budgets.items()
            ],
            "kv_bytes": kv_bytes(model, row),
            "bits_per_byte": bits,
            "nats_per_token": nats_per_token(bits, rows, sample.bytes),
        }


def in_words(layer: Mapping[str, Any]) -> str:
    budget = f"keeps {budget_words(layer['budget'])}"
    if "remembered_mean" not in layer:
        return budget
    return (
        f"{budget}, remembers {layer['remembered_mean']:,.1f} of {layer['seen_mean']:,.1f} tokens on average and at most "
        f"{layer['remembered_max']:,.1f} of {layer['seen_max']:,.0f}, {layer['bytes']:,.0f} bytes"
    )
