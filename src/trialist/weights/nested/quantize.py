"""Making a model nested: sensitivities, nested clusters of each row, codes and tables in place of the weights."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from trialist.kernels.nested import pack_planes
from trialist.models.nested.layer import NestedLinear, PrecisionDial
from trialist.models.nested.precision import NestedBytes, nested_bytes, nested_layers
from trialist.models.nested.quantizer import TABLE_DTYPES, NestedQuantConfig, is_linear, like, mark_quantized, sizes
from trialist.weights.nested.partition import coarser, move_together, split
from trialist.weights.nested.seeds import best_seeds, drawn_seeds
from trialist.weights.nested.sensitivity import Calibration, sensitivities
from trialist.weights.nested.sums import centroids, labels_of, sort_rows

AT_ONCE = 1 << 20
"""Weights whose rows are clustered together: bounds the memory, at about 200 bytes a weight"""
SMALLEST_COST = 1e-9
"""Cost of a precision, as a share of that of the seed, below which it counts no more: an exact one stays exact"""

Progress = Callable[[str, int, int], None]
"""What is being done, how much of it is done, and of how much"""


@dataclass(frozen=True, eq=False)
class Clusters:
    """Nested clusters of the rows of a matrix."""

    codes: Tensor
    """(N, K) uint8, of the highest precision"""
    tables: Mapping[int, Tensor]
    """Bits -> (N, 2^bits) float64, the weighted mean of each cluster; an empty one has that of the cluster it came from"""


def cluster_rows(
    weight: Tensor,
    sensitivity: Tensor | None = None,
    *,
    seed_bits: int,
    parent_bits: int,
    nesting: str = "greedy",
    seed_init: str = "dp",
    generator: torch.Generator | None = None,
) -> Clusters:
    """Clusters of the weights (N, K) of each row at every precision from `seed_bits` to `parent_bits`; equal ones build
    one precision for itself.

    sensitivity: (N, K), (K,) or None. nesting, seed_init: as of `NestedQuantConfig`; "joint" weighs each precision by the inverse
    of its greedy cost, so that a relative gain counts the same at all. generator: of k-means++.
    """
    N, K = weight.shape
    codes = torch.empty(N, K, dtype=torch.uint8, device=weight.device)
    bits = range(seed_bits, parent_bits + 1)
    tables = {b: torch.empty(N, 1 << b, dtype=torch.float64, device=weight.device) for b in bits}
    step = max(1, AT_ONCE // K)
    for start in range(0, N, step):
        part = slice(start, start + step)
        counts = sensitivity[part] if sensitivity is not None and sensitivity.dim() == 2 else sensitivity
        rows = sort_rows(weight[part], counts)
        if seed_init == "dp":
            borders = best_seeds(rows, 1 << seed_bits)
        else:
            borders = drawn_seeds(rows, 1 << seed_bits, generator or torch.Generator().manual_seed(0))
        for _ in bits[1:]:
            borders = split(rows, borders)
        if nesting == "joint":
            costs = torch.stack(
                [centroids(rows, labels_of(coarser(borders, parent_bits - b), K), 1 << b)[1] for b in bits], 1
            )
            alphas = 1 / torch.maximum(costs, SMALLEST_COST * costs[:, :1]).clamp(min=1e-300)
            borders = move_together(rows, borders, seed_bits, parent_bits, alphas)
        labels = labels_of(borders, K)
        codes[part] = torch.empty_like(labels).scatter_(1, rows.order, labels).to(torch.uint8)
        scale = weight[part].double().abs().amax(1, keepdim=True)
        above: Tensor | None = None
        for b in bits:
            means, _ = centroids(rows, labels >> (parent_bits - b), 1 << b)
            above = (
                _nearest(means) if above is None else torch.where(means.isnan(), above.repeat_interleave(2, 1), means)
            )
            tables[b][part] = above * scale
    return Clusters(codes, tables)


def _nearest(means: Tensor) -> Tensor:
    """Empty seed clusters take the mean of one before them, or behind where there is none."""
    C = means.shape[1]
    places = torch.arange(C, device=means.device)
    before = torch.where(means.isnan(), -1, places).cummax(1).values
    behind = torch.where(means.isnan(), C, places).flip(1).cummin(1).values.flip(1)
    return means.gather(1, torch.where(before >= 0, before, behind))


@dataclass(frozen=True)
class NestedReport:
    """What was quantised and what it costs."""

    layers: int
    weights: int
    """Numbers that became codes"""
    stored: NestedBytes
    dense: int
    """Bytes of the model before"""
    error: Mapping[int, float]
    """Bits -> sum of F (w - w_b)^2 over sum of F w^2, over all nested weights"""
    left: Mapping[str, str] = field(default_factory=dict)
    """Linear layers that were left as they are -> why"""

    @property
    def bits_per_weight(self) -> float:
        """Bits that a nested weight takes, tables counted, of all precisions together."""
        return 8 * (self.stored.codes + self.stored.tables) / self.weights


def quantize_nested(
    model: PreTrainedModel,
    config: NestedQuantConfig,
    calibration: Calibration | None = None,
    *,
    sensitivity: Mapping[str, Tensor] | None = None,
    progress: Progress | None = None,
) -> NestedReport:
    """Puts nested layers in place of the linear layers of a model, in place; it is then read at the highest precision.

    calibration: sequences for `config.sensitivity`, not needed where that is "none", or where `sensitivity` was found before by
    `sensitivities`. Biases, embeddings, norms and, by default,
    the output layer stay as they are. An output layer that shares its weights with the embedding becomes one of its own where
    `modules_to_not_convert` leaves it out; the embedding stays dense. Layer by layer: no more than one is held in full beside the
    model and the sensitivities.

    Raises ValueError for a model that is quantised already or has adapters, for weights that are not finite or beyond the range
    of the tables, naming the layer, for names in `modules_to_not_convert` that fit no layer, and where nothing is left to
    quantise; the model is then as it was.
    """
    if getattr(model, "_hf_peft_config_loaded", False) or hasattr(model, "peft_config"):
        raise ValueError("the model has adapters; merge them, or quantise the model first and adapt it then")
    layers, left = chosen_layers(model, config)
    for name, layer in layers.items():
        _refuse_weights(name, layer, config)
    found: dict[str, Tensor] = {}
    if sensitivity is not None:
        if missing := sorted(layers.keys() - sensitivity.keys()):
            raise ValueError(f"sensitivity has nothing for {missing[0]}; find it for all layers, of this model")
        found = dict(sensitivity)
    elif config.sensitivity != "none":
        if calibration is None:
            raise ValueError(
                f"sensitivity {config.sensitivity!r} needs calibration sequences, or pass sensitivity='none'"
            )
        tell = None if progress is None else lambda done, total: progress("calibration", done, total)
        found = sensitivities(model, layers, calibration, config.sensitivity, tell)
    size = sum(x.nbytes for x in {id(x): x for x in (*model.parameters(), *model.buffers())}.values())
    head = model.get_output_embeddings()
    dial = PrecisionDial(config.bits, config.parent_bits)
    generator = torch.Generator().manual_seed(config.seed)
    wrong, whole = dict.fromkeys(config.bits, 0.0), 0.0
    for number, (name, layer) in enumerate(layers.items()):
        built, squares, power = _nested(layer, found.pop(name, None), config, dial, generator)
        model.set_submodule(name, built)
        whole += power
        for b, square in squares.items():
            wrong[b] += square
        if layer is head:
            model.config.tie_word_embeddings = False  # it has codes of its own now
        del layer
        if progress is not None:
            progress("layers", number + 1, len(layers))
    config.nested_modules = list(layers)
    mark_quantized(model, config)
    return NestedReport(
        layers=len(layers),
        weights=sum(layer.in_features * layer.out_features for layer in nested_layers(model).values()),
        stored=nested_bytes(model),
        dense=size,
        error={b: square / whole if whole > 0 else 0.0 for b, square in wrong.items()},
        left=left,
    )


def chosen_layers(model: PreTrainedModel, config: NestedQuantConfig) -> tuple[dict[str, nn.Module], dict[str, str]]:
    """The linear layers to quantise, and the others with the reason why not, by name."""
    if nested_layers(model) or getattr(model, "quantization_method", None) is not None:
        raise ValueError("the model is quantised already; give the dense one that it was made from")
    head = model.get_output_embeddings()
    names = {name: module for name, module in model.named_modules() if is_linear(module)}
    skip: Sequence[str] = config.modules_to_not_convert or ()
    unknown = [part for part in skip if not any(_fits(name, part) for name in names)]
    if unknown:
        raise ValueError(
            f"modules_to_not_convert names {', '.join(map(repr, unknown))}, which is no linear layer of {type(model).__name__}; "
            f"its layers are {', '.join(list(names)[:4])}, ..."
        )
    left = {}
    for name, module in names.items():
        if module is head and config.modules_to_not_convert is None:
            shared = head.weight is model.get_input_embeddings().weight
            left[name] = "the output layer, whose weights are those of the embedding" if shared else "the output layer"
        elif any(_fits(name, part) for part in skip):
            left[name] = "named in modules_to_not_convert"
    layers = {name: module for name, module in names.items() if name not in left}
    if not layers:
        raise ValueError(f"{type(model).__name__} has no linear layer that is left to quantise")
    return layers, left


def _fits(name: str, part: str) -> bool:
    return name == part or name.endswith(f".{part}")


def _refuse_weights(name: str, layer: nn.Module, config: NestedQuantConfig) -> None:
    assert isinstance(layer.weight, Tensor)
    weight = layer.weight.detach()
    if not weight.isfinite().all():
        raise ValueError(
            f"{name}: {int((~weight.isfinite()).sum())} weights are not finite numbers; the model is damaged"
        )
    most = torch.finfo(TABLE_DTYPES[config.table_dtype]).max
    if weight.numel() and float(weight.abs().max()) > most:
        raise ValueError(
            f"{name}: weights reach {float(weight.abs().max()):.3g}, beyond {most:.5g}; use table_dtype='bfloat16'"
        )


@torch.no_grad()
def _nested(
    layer: nn.Module,
    sensitivity: Tensor | None,
    config: NestedQuantConfig,
    dial: PrecisionDial,
    generator: torch.Generator,
) -> tuple[NestedLinear, dict[int, float], float]:
    """The nested layer, the weighted square error at each precision, and the weighted square of the weights."""
    built = like(layer, config, dial)
    assert isinstance(layer.weight, Tensor)
    weight = (layer.weight.T if built.transposed else layer.weight).detach()
    clusters = cluster_rows(
        weight,
        sensitivity,
        seed_bits=config.seed_bits,
        parent_bits=config.parent_bits,
        nesting=config.nesting,
        seed_init=config.seed_init,
        generator=generator,
    )
    assert sizes(layer) == (weight.shape[1], weight.shape[0])
    built.qweight = pack_planes(clusters.codes, config.parent_bits)
    counts = torch.ones((), device=weight.device) if sensitivity is None else sensitivity.float()
    wide = weight.float()
    squares = {}
    for b, table in clusters.tables.items():
        values = table.to(TABLE_DTYPES[config.table_dtype])
        built._buffers[f"lut{b}"] = values
        near = values.float().gather(1, (clusters.codes >> (config.parent_bits - b)).long())
        squares[b] = float((counts * (wide - near).square()).sum(dtype=torch.float64))
    return built, squares, float((counts * wide.square()).sum(dtype=torch.float64))
