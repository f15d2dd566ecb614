"""What post-training changed as a LoRA adapter: the best low-rank approximation of each linear layer's delta.

The adapter can be put on the model's own base (a small file instead of a model) or, where the lineage allows, on another:
a ParamDelta (arXiv 2504.21023) of low rank. Truncated singular value decomposition is the closest matrix of its rank
(Eckart and Young); what it leaves out is told.
"""

# m outputs, n inputs of a layer, r rank

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from trialist.models.loading import model_source
from trialist.weights.architecture import Architecture, Linear, architecture_of
from trialist.weights.checkpoint import Checkpoint, listed, open_checkpoint
from trialist.weights.companions import write_adapter_companions, write_json
from trialist.weights.lineage import config_differences, likeness, refusal
from trialist.weights.plan import Delta, Part, Plan, make_plan, mismatch
from trialist.weights.streaming import BLOCK, Progress, check_seed, refuse_not_finite, unwatched
from trialist.weights.writing import TensorFile, folder_written_whole, nbytes, ordered, output_folder

OVERSAMPLING, POWER_STEPS = 16, 6
"""Of the randomised decomposition (arXiv 0909.4061), taken where a rank is given that is far below the full one"""
RECORD = "low_rank_delta.json"
PREFIX = "base_model.model."


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
    linear: Linear
    factors: Factors
    square: float

    @property
    def rank(self) -> int:
        return self.factors.up.shape[1]


@dataclass(frozen=True)
class Whole:
    """A tensor whose delta no adapter holds, its name in the model, and whether it is stored as it is in post."""

    part: Part
    place: str
    square: float
    saved: bool

    @property
    def module(self) -> str:
        return self.place.rpartition(".")[0]


def extract_delta(
    post: str, base: str, output: str | Path, *, rank: int | None = None, energy: float = 0.9, rest: str = "leave",
    force: bool = False, seed: int = 0, device: str = "cpu", progress: Progress = unwatched,
) -> Mapping[str, Any]:  # fmt: skip
    """Writes post - base as a LoRA adapter folder that PEFT loads onto base, whole or not at all; returns its record.

    rank: the same for all linear layers; None takes for each the smallest that keeps the share `energy`, in (0, 1], of its
    squared norm. rest: what no adapter of linear layers holds (embeddings, norms, biases) is left out, or with "save" stored
    whole beside it; stacked experts, biases of adapted layers, and embeddings whose rows stand for other tokens are left out in
    any case. The record names what is, and its share. device: where matrices are decomposed. Raises ValueError for models that do
    not fit together, with names, and for values that are not finite.
    """
    if rank is not None and rank < 1:
        raise ValueError(f"--rank is at least 1, not {rank}")
    if not 0 < energy <= 1:
        raise ValueError(f"--energy is a share above 0, at most 1, not {energy}")
    if rest not in ("leave", "save"):
        raise ValueError(f"--rest is {rest!r}; choose leave or save")
    check_seed(seed)
    target = output_folder(output)
    began = time.perf_counter()
    with open_checkpoint(post) as of_post, open_checkpoint(base) as of_base:
        known = architecture_of(of_base.folder)
        if known is None:
            raise ValueError(f"transformers does not have the class of {base!r}, so its linear layers are not known")
        plan, against = _compared(of_post, of_base, known, force)
        parts = [part for part in plan.parts if part.deltas]
        size = sum(nbytes(torch.float32, part.shape) for part in parts)
        with folder_written_whole(target, size) as folder:
            generator = torch.Generator(device="cpu").manual_seed(seed)
            layers: list[Layer] = []
            others: list[tuple[Part, float]] = []
            total, done = sum(part.elements for part in parts), 0
            for part in parts:
                if (square := _square(of_post, of_base, part)) > 0:
                    linear = _linear(part, known)
                    if linear is None:
                        others.append((part, square))
                    else:
                        delta = _delta(of_post, of_base, part)
                        found = decompose(delta.T if linear.transposed else delta, rank, energy, generator, device)
                        layers.append(Layer(part.name, linear, found, square))
                done += part.elements
                progress(done, total)
            if not layers:
                raise ValueError(f"{post!r} and {base!r} agree in every linear layer, so there is nothing to decompose")
            whole = [_whole(part, square, rest, layers, known) for part, square in others]
            saved = [entry for entry in whole if entry.saved]
            _write_weights(folder / "adapter_model.safetensors", of_post, plan.parts, layers, saved, known)
            write_json(folder / "adapter_config.json", adapter_config(base, layers, whole, known))
            notes = write_adapter_companions(folder, of_post, of_base, plan)
            if cut := [layer.name for layer in layers if rank is not None and layer.rank < rank]:
                notes.append(f"{len(cut)} layers are smaller than rank {rank} and are held whole: {listed(cut, 3)}")
            record = _record(post, base, rank, energy, layers, whole, plan, against, notes, time.perf_counter() - began)
            write_json(folder / RECORD, record)
    return record


def _compared(post: Checkpoint, base: Checkpoint, known: Architecture, force: bool) -> tuple[Plan, list[str]]:
    """What can be compared, and what was overridden. Raises ValueError for models that do not fit together."""
    plan = make_plan(
        base,
        [Delta(post, base, 1.0)],
        known,
        dtype=None,
        include=(),
        exclude=(),
        on_mismatch="skip",
        tokenizer="base-new",
    )
    wrong = [words for name, entry in plan.unfit.items() if name not in plan.by_token for words in entry]
    if wrong:
        raise ValueError(f"{mismatch(wrong)}. Both models must be of one architecture and size")
    against = [*config_differences(post, base)[0], *filter(None, [refusal(likeness(post, base, plan.summed))])]
    against += plan.against
    if against and not force:
        raise ValueError(". ".join(against) + ". Check the models; --force goes on, and the record says so")
    return plan, against


def decompose(
    matrix: Tensor, rank: int | None, energy: float, generator: torch.Generator, device: str = "cpu"
) -> Factors:
    """The closest product of rank r to a matrix (m, n) that is not zero, the singular values shared equally by both factors."""
    matrix = matrix.to(device)
    if rank is not None and 4 * (rank + OVERSAMPLING) < min(matrix.shape):
        up, down, squares = _randomised(matrix, rank, generator)
    elif matrix.shape[0] > matrix.shape[1]:
        right, left, squares = _by_eigenvalues(matrix.T, rank, energy)
        up, down = left.T, right.T
    else:
        up, down, squares = _by_eigenvalues(matrix, rank, energy)
    kept = float(squares.sum() / torch.linalg.vector_norm(matrix, dtype=torch.float64).square())
    return Factors(up.float().cpu().contiguous(), down.float().cpu().contiguous(), min(kept, 1.0))


def _randomised(matrix: Tensor, rank: int, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """Up, down and the squared singular values that they hold, by a random subspace and power iterations."""
    start = torch.randn(matrix.shape[1], rank + OVERSAMPLING, generator=generator).to(matrix)
    basis = torch.linalg.qr(matrix @ start)[0]
    for _ in range(POWER_STEPS):
        basis = torch.linalg.qr(matrix @ torch.linalg.qr(matrix.T @ basis)[0])[0]
    up, down, squares = _by_eigenvalues(basis.T @ matrix, rank, 1.0)
    return basis @ up.to(basis), down, squares


def _by_eigenvalues(matrix: Tensor, rank: int | None, energy: float) -> tuple[Tensor, Tensor, Tensor]:
    """The same for m <= n, exactly, from the eigenvalues of the (m, m) products of rows.

    These are the squared singular values; in float64 they resolve what float32 weights hold, in less time than
    a full decomposition takes.
    """
    wide = matrix.double()
    squares, left = torch.linalg.eigh(wide @ wide.T)
    squares, left = squares.flip(0).clamp(min=0), left.flip(1)
    if rank is None:
        rank = int((squares.cumsum(0) / squares.sum() < energy - 1e-12).sum()) + 1
    squares, left = squares[:rank], left[:, :rank]
    root = squares.sqrt().sqrt()
    inverse = torch.where(root > 0, 1 / root, 0)
    return left * root, inverse[:, None] * (left.T @ wide), squares


def adapter_config(
    base: str, layers: Sequence[Layer], whole: Sequence[Whole], known: Architecture
) -> Mapping[str, Any]:
    """What PEFT reads: a scaling of 1 for every layer, whatever its rank, and the modules that are stored whole."""
    from peft import LoraConfig

    ranks = [layer.rank for layer in layers]
    usual = max(sorted(set(ranks)), key=ranks.count)
    pattern = {layer.linear.module: layer.rank for layer in layers if layer.rank != usual}
    saved = sorted({entry.module for entry in whole if entry.saved})
    source = model_source(base)
    config = LoraConfig(
        r=usual, lora_alpha=usual, rank_pattern=pattern, alpha_pattern=dict(pattern), lora_dropout=0.0, bias="none",
        target_modules=[layer.linear.module for layer in layers], task_type="CAUSAL_LM",
        base_model_name_or_path=str(Path(source).resolve()) if Path(source).is_dir() else source, inference_mode=True,
        fan_in_fan_out=any(layer.linear.transposed for layer in layers), modules_to_save=saved or None,
        ensure_weight_tying=bool(saved) and bool(known.tied),
    )  # fmt: skip
    return {key: sorted(value) if isinstance(value, set) else value for key, value in config.to_dict().items()}


def _linear(part: Part, known: Architecture) -> Linear | None:
    place = known.place(part.name)
    return known.linear.get(place.name) if place is not None and place.whole else None


def _whole(part: Part, square: float, rest: str, layers: Sequence[Layer], known: Architecture) -> Whole:
    place = known.place(part.name)
    if rest == "leave" or place is None or not place.whole:
        return Whole(part, "", square, saved=False)
    module = place.name.rpartition(".")[0]
    # PEFT replaces whole modules; one that has an adapter, or other modules in it, cannot be replaced as well
    saved = module in known.leaves and all(module != layer.linear.module for layer in layers)
    return Whole(part, place.name, square, saved)


def _write_weights(
    file: Path, post: Checkpoint, parts: Sequence[Part], layers: Sequence[Layer], saved: Sequence[Whole], known: Architecture
) -> None:  # fmt: skip
    """Factors, and stretch by stretch the modules that are stored as they are in post, with all that they hold."""
    stored: dict[str, Tensor | Part] = {}
    for layer in layers:
        stored[f"{PREFIX}{layer.linear.module}.lora_A.weight"] = layer.factors.down
        stored[f"{PREFIX}{layer.linear.module}.lora_B.weight"] = layer.factors.up
    modules = {entry.module for entry in saved}
    for part in parts:
        place = known.place(part.name)
        if place is not None and place.name.rpartition(".")[0] in modules:
            shared = [name for name, source in known.tied.items() if source == place.name]
            stored |= {f"{PREFIX}{name}": part for name in (place.name, *shared)}
    layout = ordered(
        [
            (name, tensor.dtype if isinstance(tensor, Tensor) else post.tensors[tensor.name].dtype, tuple(tensor.shape))
            for name, tensor in stored.items()
        ]
    )
    output = TensorFile(file, layout)
    for name, _, _ in layout:
        for piece in _pieces(post, stored[name]):
            output.write(piece)
    output.close()


def _pieces(post: Checkpoint, stored: Tensor | Part) -> Iterator[Tensor]:
    if isinstance(stored, Tensor):
        yield stored
    else:
        yield from (post.read(stored.name, *block) for block in stored.blocks(BLOCK))


def _delta(post: Checkpoint, base: Checkpoint, part: Part) -> Tensor:
    return (post.read(part.name).float() - base.read(part.name).float()).view(part.shape)


def _square(post: Checkpoint, base: Checkpoint, part: Part) -> float:
    """Squared norm of the delta, without holding the tensor. Raises ValueError for values that are not finite."""
    square = 0.0
    for block in part.blocks(BLOCK):
        one, other = post.read(part.name, *block), base.read(part.name, *block)
        square += float((one.double() - other.double()).square().sum())
        if not math.isfinite(square):
            refuse_not_finite(part.name, {base: other, post: one})
    return square


def _record(
    post: str, base: str, rank: int | None, energy: float, layers: Sequence[Layer], whole: Sequence[Whole], plan: Plan,
    against: Sequence[str], notes: Sequence[str], seconds: float,
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
        "left_out": [entry.part.name for entry in left_out],
        "not_compared": [*plan.apart, *plan.unfit],
        "overridden": list(against),
        "notes": list(notes),
        "layers": [
            {"name": layer.name, "rank": layer.rank, "kept": layer.factors.kept, "norm": math.sqrt(layer.square)}
            for layer in layers
        ],
        "seconds": round(seconds, 3),
    }
