"""What post-training changed as a LoRA adapter: the best low-rank approximation of each linear layer's delta.

The adapter can be put on the model's own base (a small file instead of a model) or, where the lineage allows, on another:
a ParamDelta (arXiv 2504.21023) of low rank. Truncated singular value decomposition is the closest matrix of its rank
(Eckart and Young); what it leaves out is told.
"""

# m outputs, n inputs of a layer, r rank

from __future__ import annotations

import json
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from trialist.weights.architecture import Architecture, architecture_of
from trialist.weights.checkpoint import Checkpoint, open_checkpoint
from trialist.weights.lineage import config_differences, likeness, refusal
from trialist.weights.plan import Delta, Part, make_plan
from trialist.weights.streaming import BLOCK, Progress, unwatched
from trialist.weights.writing import folder_written_whole, nbytes

OVERSAMPLING, POWER_STEPS = 16, 6
"""Of the randomised decomposition (arXiv 0909.4061), taken where a rank is given that is far below the full one"""
RECORD = "low_rank_delta.json"


@dataclass(frozen=True)
class Factors:
    """A matrix as up @ down, (m, r) and (r, n), with the share of its squared norm that this keeps."""

    up: Tensor
    down: Tensor
    kept: float


@dataclass(frozen=True)
class Layer:
    """A linear layer's delta; `square` is its squared norm."""

    name: str
    module: str
    factors: Factors
    square: float

    @property
    def rank(self) -> int:
        return self.factors.up.shape[1]


@dataclass(frozen=True)
class Whole:
    """A tensor whose delta no adapter holds, and whether it is stored as it is in post."""

    name: str
    module: str
    square: float
    saved: bool


def extract_delta(
    post: str, base: str, output: str | Path, *, rank: int | None = None, energy: float = 0.9, rest: str = "leave",
    force: bool = False, seed: int = 0, device: str = "cpu", progress: Progress = unwatched,
) -> Mapping[str, Any]:  # fmt: skip
    """Writes post - base as a LoRA adapter folder that PEFT loads onto base, whole or not at all; returns its record.

    rank: the same for all linear layers; None takes for each the smallest that keeps the share `energy`, in (0, 1], of its
    squared norm. rest: what no adapter of linear layers holds (embeddings, norms, biases, stacked experts) is left out, or
    with "save" stored whole beside it; the record names both shares. device: where matrices are decomposed. Raises ValueError
    for models that do not fit together, with names, as `apply_param_delta` does.
    """
    if rank is not None and rank < 1:
        raise ValueError(f"--rank is at least 1, not {rank}")
    if not 0 < energy <= 1:
        raise ValueError(f"--energy is a share above 0, at most 1, not {energy}")
    if rest not in ("leave", "save"):
        raise ValueError(f"--rest is {rest!r}; choose leave or save")
    began = time.perf_counter()
    with open_checkpoint(post) as of_post, open_checkpoint(base) as of_base:
        known = architecture_of(of_base.folder)
        if known is None:
            raise ValueError(f"transformers does not have the class of {base!r}, so its linear layers are not known")
        plan = make_plan(
            of_base, [Delta(of_post, of_base, 1.0)], known, dtype=None, include=(), exclude=(), on_mismatch="error",
            tokenizer="post",
        )  # fmt: skip
        against = [*config_differences(of_post, of_base)[0], *filter(None, [refusal(likeness(of_post, of_base))])]
        if against and not force:
            raise ValueError(". ".join(against) + ". Check the models; --force goes on, and the record says so")
        parts = [part for part in plan.parts if part.deltas]
        total, done = sum(part.elements for part in parts), 0
        size = sum(nbytes(torch.float32, part.shape) for part in parts)
        generator = torch.Generator(device="cpu").manual_seed(seed)
        factors: list[Layer] = []
        whole: list[Whole] = []
        adapted = {layer.module for layer in known.linear.values()}
        with folder_written_whole(Path(output), size) as folder:
            tensors: dict[str, Tensor] = {}
            for part in parts:
                layer = known.linear.get(part.name)
                if layer is not None and (square := _square(of_post, of_base, part)) > 0:
                    delta = _delta(of_post, of_base, part)
                    found = decompose(delta.T if layer.transposed else delta, rank, energy, generator, device)
                    factors.append(Layer(part.name, layer.module, found, square))
                    tensors[f"base_model.model.{layer.module}.lora_A.weight"] = found.down
                    tensors[f"base_model.model.{layer.module}.lora_B.weight"] = found.up
                elif layer is None and (square := _square(of_post, of_base, part)) > 0:
                    module = known.module_of(part.name)
                    # PEFT replaces whole modules, and a layer that has an adapter cannot be replaced as well
                    saved = rest == "save" and module not in adapted
                    whole.append(Whole(part.name, module, square, saved))
                    if saved:
                        leaf = part.name.rpartition(".")[2]
                        value = of_post.read(part.name).view(part.shape).float()
                        for place in (f"{module}.{leaf}", *known.tied_to(part.name)):
                            tensors[f"base_model.model.{place}"] = value.clone()
                done += part.elements
                progress(done, total)
            if not factors:
                raise ValueError(f"{post!r} and {base!r} agree in every linear layer, so there is nothing to decompose")
            save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
            config = adapter_config(base, factors, [entry.module for entry in whole if entry.saved], known)
            (folder / "adapter_config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
            record = _record(post, base, rank, energy, factors, whole, against, time.perf_counter() - began)
            (folder / RECORD).write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    return record


def decompose(
    matrix: Tensor, rank: int | None, energy: float, generator: torch.Generator, device: str = "cpu"
) -> Factors:
    """The closest product of rank r to a matrix (m, n) that is not zero, the singular values shared equally by both factors."""
    matrix = matrix.to(device)
    m, n = matrix.shape
    if rank is not None and 4 * (rank + OVERSAMPLING) < min(m, n):
        start = torch.randn(n, rank + OVERSAMPLING, generator=generator).to(matrix)
        basis = torch.linalg.qr(matrix @ start)[0]
        for _ in range(POWER_STEPS):
            basis = torch.linalg.qr(matrix @ torch.linalg.qr(matrix.T @ basis)[0])[0]
        left, values, right = torch.linalg.svd(basis.T @ matrix, full_matrices=False)
        left = basis @ left
    else:
        left, values, right = torch.linalg.svd(matrix, full_matrices=False)
    squares = values.double().square()
    if rank is None:
        rank = int((squares.cumsum(0) / squares.sum() < energy - 1e-12).sum()) + 1
    rank = min(rank, len(values))
    root = values[:rank].sqrt()
    kept = float(squares[:rank].sum() / matrix.double().square().sum())
    up, down = left[:, :rank] * root, root[:, None] * right[:rank]
    return Factors(up.cpu().contiguous(), down.cpu().contiguous(), min(kept, 1.0))


def adapter_config(base: str, layers: Sequence[Layer], saved: Sequence[str], known: Architecture) -> dict[str, Any]:
    """What PEFT reads: a scaling of 1 for every layer, whatever its rank. saved: modules that are stored whole."""
    from peft import LoraConfig

    ranks = [layer.rank for layer in layers]
    usual = max(sorted(set(ranks)), key=ranks.count)
    pattern = {layer.module: layer.rank for layer in layers if layer.rank != usual}
    config = LoraConfig(
        r=usual, lora_alpha=usual, rank_pattern=pattern, alpha_pattern=dict(pattern), lora_dropout=0.0, bias="none",
        target_modules=[layer.module for layer in layers], task_type="CAUSAL_LM", base_model_name_or_path=base,
        inference_mode=True, fan_in_fan_out=any(known.linear[layer.name].transposed for layer in layers),
        modules_to_save=sorted(set(saved)) or None, ensure_weight_tying=bool(saved) and bool(known.tied),
    )  # fmt: skip
    return {key: sorted(value) if isinstance(value, set) else value for key, value in config.to_dict().items()}


def _delta(post: Checkpoint, base: Checkpoint, part: Part) -> Tensor:
    return (post.read(part.name).float() - base.read(part.name).float()).view(part.shape)


def _square(post: Checkpoint, base: Checkpoint, part: Part) -> float:
    """Squared norm of the delta, without holding the tensor."""
    blocks = ((post.read(part.name, *block), base.read(part.name, *block)) for block in part.blocks(BLOCK))
    return sum(float((one.double() - other.double()).square().sum()) for one, other in blocks)


def _record(
    post: str, base: str, rank: int | None, energy: float, layers: Sequence[Layer], whole: Sequence[Whole],
    against: Sequence[str], seconds: float,
) -> dict[str, Any]:  # fmt: skip
    inside = sum(layer.square for layer in layers)
    outside = sum(entry.square for entry in whole)
    left_out = [entry for entry in whole if not entry.saved]
    return {
        "transform": "extract-delta",
        "post": post,
        "base": base,
        "rank": rank,
        "energy": None if rank is not None else energy,
        "kept_of_linear_layers": sum(layer.factors.kept * layer.square for layer in layers) / inside,
        "share_outside_of_linear_layers": outside / (inside + outside),
        "share_left_out": sum(entry.square for entry in left_out) / (inside + outside),
        "left_out": [entry.name for entry in left_out],
        "overridden": list(against),
        "layers": [
            {"name": layer.name, "rank": layer.rank, "kept": layer.factors.kept, "norm": math.sqrt(layer.square)}
            for layer in layers
        ],
        "seconds": round(seconds, 3),
    }
