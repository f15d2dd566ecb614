"""How much context the layers of a model need: what they remember, what they store, and budgets found on a text.

Works for selective attention (arXiv 2410.02703) and for eviction from standard attention alike: a layer that can evict
is a module with a `budget`. N rows, T tokens of a row, L layers that can evict
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from transformers import DynamicCache

from trialist.models.attention_interface import plain_model
from trialist.models.eviction.budgets import LEAST, Budgets, spread_budgets
from trialist.models.eviction.cache import cache_bytes
from trialist.models.scoring import selected_logprobs
from trialist.models.selective_attention.memory import record_memory

Rows: TypeAlias = Tensor | Mapping[str, Tensor]
"""Token ids `(N, T)`, or a batch of N rows with `input_ids` and what else `selected_logprobs` takes"""

Report = Callable[[float, float, Mapping[str, float]], None]


def evicting_modules(model: nn.Module) -> list[Any]:
    """The modules that can evict, in the order of their layers."""
    return sorted(
        (module for module in model.modules() if hasattr(module, "budget")), key=lambda module: module.layer_idx
    )


def get_budgets(model: nn.Module) -> list[int | None]:
    """Tokens that each layer keeps, of the layers that can evict, in order; None keeps all."""
    return [module.budget for module in evicting_modules(model)]


def set_budgets(model: nn.Module, budgets: Budgets) -> None:
    """Let the layers that can evict keep so many tokens: one number for all, or one a layer in order; None keeps all.

    The configuration takes them too, so they are saved with the model. Raises ValueError for a model in which no layer
    can evict, and for budgets that do not fit.
    """
    modules = evicting_modules(model)
    if not modules:
        raise ValueError(
            f"no layer of {type(model).__name__} can evict; call enable_selective_attention or enable_eviction first, or build "
            "a decoder with selective attention"
        )
    spread = spread_budgets(budgets, len(modules))
    for module, budget in zip(modules, spread):
        policy = getattr(module, "_evicts", None)
        if budget is not None and policy is not None:
            policy.check(budget)
    for module, budget in zip(modules, spread):
        module.budget = budget
    config = plain_model(model).config
    by_layer = {module.layer_idx: module.budget for module in modules}
    for field in ("selective_attention", "eviction"):
        settings = getattr(config, field, None)
        if isinstance(settings, dict):
            setattr(config, field, {**settings, "budgets": [by_layer[layer] for layer in settings["layers"]]})
    native = [m.budget for m in modules if not hasattr(m, "_selective") and not hasattr(m, "_evicts")]
    if native:
        config.selective = {**(config.selective or {}), "budgets": native}


@dataclass(frozen=True)
class LayerMemory:
    """What one layer makes of its context, over all tokens of a text that are no padding."""

    layer: int
    remembered_mean: float
    """Tokens with a penalty below tau, counted in part: M of the paper, mean over queries"""
    remembered_max: float
    seen_mean: float
    """Tokens that a query can attend to, itself included: all before it without a budget"""
    seen_max: float
    bytes: float
    """Memory of the layer's cache after a row, bytes a row"""


@torch.no_grad()
def memory_profile(model: nn.Module, rows: Rows, *, tau: float = 1.0, batch_size: int = 16) -> list[LayerMemory]:
    """What each layer with selective attention remembers, sees and stores, one entry a layer.

    rows: token ids `(N, T)` or a batch of N rows. tau: penalty from which on a token counts as forgotten.
    Raises ValueError for a model without selective attention.
    """
    batches = list(_batches(rows, batch_size))
    remembered: list[list[Tensor]] = []
    seen: list[list[Tensor]] = []
    sizes: list[dict[int, int]] = []
    with _evaluating(model):
        for batch in batches:
            mask = batch.get("attention_mask")
            real = torch.ones_like(batch["input_ids"], dtype=torch.bool) if mask is None else mask.bool()
            with record_memory(model, tau) as records:
                model(**_inputs(batch), use_cache=False)
                remembered.append([torch.stack(record.memories).mean(0)[real].float() for record in records])
                seen.append([torch.stack(record.seen).float().mean(0)[real] for record in records])
            sizes.append(_layer_bytes(model, batch))
    N = sum(len(batch["input_ids"]) for batch in batches)
    profile = []
    modules = [module for module in evicting_modules(model) if hasattr(module, "memory_record")]
    for index, module in enumerate(modules):
        memory, sees = (torch.cat([part[index] for part in parts]) for parts in (remembered, seen))
        size = sum(part[module.layer_idx] for part in sizes) / N
        profile.append(
            LayerMemory(
                module.layer_idx,
                remembered_mean=float(memory.mean()),
                remembered_max=float(memory.max()),
                seen_mean=float(sees.mean()),
                seen_max=float(sees.max()),
                bytes=size,
            )
        )
    return profile


def kv_bytes(model: nn.Module, rows: Rows) -> float:
    """Memory that the cache of all layers holds after decoding the last token of the rows, measured, in bytes a row.

    Between two decoding steps a layer holds its budget and the token that is evicted next.
    """
    with torch.no_grad(), _evaluating(model):
        batch = next(_batches(rows, len(rows if isinstance(rows, Tensor) else rows["input_ids"])))
        return cache_bytes(_filled_cache(model, batch)) / len(batch["input_ids"])


def _filled_cache(model: nn.Module, batch: Mapping[str, Tensor]) -> DynamicCache:
    cache = DynamicCache(config=plain_model(model).config)
    ids, mask = batch["input_ids"], batch.get("attention_mask")
    for end in sorted({max(1, ids.shape[1] - 1), ids.shape[1]}):  # the prompt, then one token decoded
        part = slice(cache.get_seq_length(), end)
        given = None if mask is None else mask[:, :end]
        model(input_ids=ids[:, part], attention_mask=given, past_key_values=cache, use_cache=True)
    return cache


def _layer_bytes(model: nn.Module, batch: Mapping[str, Tensor]) -> dict[int, int]:
    layers = _filled_cache(model, batch).layers
    return {index: cache_bytes(_only(layer)) for index, layer in enumerate(layers)}


def _only(layer: Any) -> DynamicCache:
    cache = DynamicCache()
    cache.layers.append(layer)
    return cache


def calibrate_budgets(
    model: nn.Module,
    rows: Rows,
    *,
    target: float | None = None,
    total: int | None = None,
    step: int = 8,
    start: Budgets = None,
    batch_size: int = 16,
    progress: bool | Report = True,
) -> list[int | None]:
    """Budgets a layer, found greedily on a text, set in the model and its configuration, and returned.

    From full budgets on, the layer whose cut hurts least loses tokens, again and again: at first many at once, in the end
    `step` tokens, until a further cut would bring the loss above `target`, or until `total` tokens are left over all layers.

    rows: held-out TRAINING text, token ids `(N, T)` or a batch of N rows. A text that results are reported on would be fitted.
    target: largest loss, mean nats a token. total: sum of the budgets. Give one of them.
    start: begin with these budgets instead of full ones, such as those found for a larger total.
    progress: a bar where stderr is a terminal; or a callable that is told (done, total, numbers).
    Raises ValueError for a target that the model misses without any cut, a total that is out of reach, and models in which
    no layer can evict.
    """
    if (target is None) == (total is None):
        raise ValueError("give exactly one of target (nats a token) and total (tokens over all layers)")
    if step < 1:
        raise ValueError(f"step is {step}; it must be at least 1 token")
    batches = list(_batches(rows, batch_size))
    before, modules = get_budgets(model), evicting_modules(model)
    if not modules:
        set_budgets(model, None)  # raises
    longest = batches[0]["input_ids"].shape[1]
    floors = [getattr(getattr(module, "_evicts", None), "least", LEAST) for module in modules]
    begun = [longest if budget is None else min(budget, longest) for budget in spread_budgets(start, len(modules))]
    if total is not None and not sum(floors) <= total:
        raise ValueError(f"total is {total}; {len(modules)} layers need at least {sum(floors)} tokens")
    known: dict[tuple[int, ...], float] = {}

    def loss(budgets: Sequence[int]) -> float:
        key = tuple(budgets)
        if key not in known:
            set_budgets(model, list(budgets))
            known[key] = _loss(model, batches)
        return known[key]

    try:
        with _evaluating(model), _reporting(progress) as report:
            found = _descend(begun, floors, loss, target, total, step, longest, report)
    except BaseException:
        set_budgets(model, before)
        raise
    set_budgets(model, found)
    return list(found)


def _descend(
    budgets: list[int], floors: list[int], loss: Callable[[Sequence[int]], float], target: float | None,
    total: int | None, step: int, longest: int, report: Report,
) -> list[int]:  # fmt: skip
    at = loss(budgets)
    if target is not None and at > target:
        raise ValueError(
            f"the loss is {at:.4f} nats a token before any cut, above the target of {target:.4f}; raise the target"
        )
    first, least = sum(budgets), sum(floors) if total is None else total
    width = step
    while width * 2 <= longest // 4:
        width *= 2
    while sum(budgets) > least:
        left = sum(budgets) - least
        while total is not None and width > step and width * len(budgets) > left:
            width //= 2  # fine cuts decide how the last tokens are shared
        tries = []
        for index, budget in enumerate(budgets):
            cut = min(width, budget - floors[index], left)
            if cut > 0:
                tried = [*budgets[:index], budget - cut, *budgets[index + 1 :]]
                # differences below a hundred-thousandth of a nat are rounding: then the largest budget is cut
                tries.append((round(loss(tried) - at, 5) / cut, -budget, tried))
            report(first - sum(budgets), first - least, {"loss": at, "tokens": sum(budgets)})
        if target is not None:
            tries = [entry for entry in tries if loss(entry[-1]) <= target]
        if tries:
            budgets = min(tries)[-1]
            at = loss(budgets)
        elif width > step:
            width = max(step, width // 2)
        else:
            break
    report(first - least, first - least, {"loss": at, "tokens": sum(budgets)})
    return budgets


@torch.no_grad()
def _loss(model: nn.Module, batches: Sequence[Mapping[str, Tensor]]) -> float:
    """Mean nats a scored token."""
    total = weight = 0.0
    for batch in batches:
        scored = {name: batch[name] for name in ("attention_mask", "position_ids", "labels") if name in batch}
        total -= float(selected_logprobs(model, batch["input_ids"], **scored).sum())
        weight += _count(batch)
    return total / weight


def _count(batch: Mapping[str, Tensor]) -> int:
    """Tokens that `selected_logprobs` scores."""
    if "labels" in batch:
        return int((batch["labels"][:, 1:] != -100).sum())
    if "attention_mask" in batch:
        return int((batch["attention_mask"][:, 1:] * batch["attention_mask"][:, :-1]).sum())
    return batch["input_ids"][:, 1:].numel()


def _batches(rows: Rows, batch_size: int) -> Iterator[dict[str, Tensor]]:
    whole = {"input_ids": rows} if isinstance(rows, Tensor) else dict(rows)
    if whole["input_ids"].dim() != 2 or len(whole["input_ids"]) == 0:
        raise ValueError(
            f"rows have shape {tuple(whole['input_ids'].shape)}, wanted token ids (N, T) with at least one row"
        )
    for start in range(0, len(whole["input_ids"]), batch_size):
        yield {name: tensor[start : start + batch_size] for name, tensor in whole.items()}


def _inputs(batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: batch[name] for name in ("input_ids", "attention_mask", "position_ids") if name in batch}


@contextlib.contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)


@contextlib.contextmanager
def _reporting(progress: bool | Report) -> Iterator[Report]:
    if callable(progress):
        yield progress
        return
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

    console = Console(stderr=True)
    columns = (TextColumn("calibrating budgets"), BarColumn(), TextColumn("{task.description}"), TimeElapsedColumn())
    with Progress(*columns, console=console, disable=not (progress and console.is_terminal), transient=True) as bar:
        task = bar.add_task("")

        def report(done: float, total: float, numbers: Mapping[str, float]) -> None:
            words = f"{numbers['tokens']:.0f} tokens, {numbers['loss']:.4f} nats a token"
            bar.update(task, completed=done, total=total, description=words)

        yield report
