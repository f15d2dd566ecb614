"""Budgets of the layers of a model: read, set, and found on a text.

Works for selective attention (arXiv 2410.02703) and for eviction from standard attention alike. N rows, T tokens of a row,
L layers that can evict
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from trialist.models.attention_interface import plain_model
from trialist.models.eviction.budgets import Budgets, spread_budgets
from trialist.models.eviction.measure import Rows, batches, evaluating
from trialist.models.eviction.policies import evicting_modules
from trialist.models.scoring import selected_logprobs

Report = Callable[[float, float, Mapping[str, float]], None]
Search = Literal["lazy", "greedy"]


def get_budgets(model: nn.Module) -> list[int | None]:
    """Tokens that each layer keeps, of the layers that can evict, in order; None keeps all."""
    return [module.eviction.budget for module in evicting_modules(model)]


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
        if budget is not None:
            module.eviction.policy.check(budget)
    for module, budget in zip(modules, spread):
        module.eviction = replace(module.eviction, budget=budget)
    config = plain_model(model).config
    given = {module.layer_idx: module.eviction for module in modules if module.eviction.given}
    own = {
        module.layer_idx: module.eviction.replaced if module.eviction.given else module.eviction for module in modules
    }
    own = {layer: settings for layer, settings in own.items() if settings is not None}
    swapped = _note(config, "selective_attention", own)
    _note(config, "eviction", given)
    if native := [own[layer].budget for layer in own if layer not in swapped]:
        config.selective = {**(config.selective or {}), "budgets": native}


def _note(config: Any, field: str, settings: Mapping[int, Any]) -> Sequence[int]:
    """Writes the budgets where the configuration lists layers that were changed, and returns those layers."""
    noted = getattr(config, field, None)
    if not isinstance(noted, dict):
        return ()
    setattr(config, field, {**noted, "budgets": [settings[layer].budget for layer in noted["layers"]]})
    return noted["layers"]


def calibrate_budgets(
    model: nn.Module,
    rows: Rows,
    *,
    target: float | None = None,
    total: int | None = None,
    step: int = 8,
    start: Budgets = None,
    batch_size: int = 16,
    search: Search = "lazy",
    progress: bool | Report = True,
) -> list[int | None]:
    """Budgets a layer, found greedily on a text, set in the model and its configuration, and returned.

    From full budgets on, the layer whose cut hurts least loses tokens, again and again: at first many at once, in the end
    `step` tokens, until a further cut would bring the loss above `target`, or until `total` tokens are left over all layers.
    A try costs a pass over `rows`.

    rows: held-out TRAINING text, token ids `(N, T)` or a batch of N rows, on the model's device, as long as the texts that the
        budgets are for: nothing is known of longer ones. A text that results are reported on would be fitted.
    target: largest loss, mean nats a token; a layer of which no cut was harmless enough keeps everything, which is None.
    total: sum of the budgets, at most T tokens a layer. Give one of the two.
    start: begin with these budgets instead of full ones, such as those found for a larger total.
    search: `greedy` tries every layer before every cut, L tries each. `lazy` remembers what a layer's cut did the last time it
        was tried, takes that for the least it does now, as it mostly is, and tries in this order until no remembered harm is
        below one just measured: a few tries a cut. Where it would give up, it tries all.
    progress: a bar where stderr is a terminal; or a callable that is told (done, total, numbers).
    Raises ValueError for a target that the model misses without any cut, a total that is out of reach from `start` or on rows
    so short, rows without a scored token, and models in which no layer can evict.
    """
    if (target is None) == (total is None):
        raise ValueError("give exactly one of target (nats a token) and total (tokens over all layers)")
    if search not in get_args(Search):
        raise ValueError(f"search is {search!r}; choose lazy or greedy")
    if step < 1:
        raise ValueError(f"step is {step}; it must be at least 1 token")
    before, modules = get_budgets(model), evicting_modules(model)
    if not modules:
        set_budgets(model, None)  # raises
    parts = batches(model, rows, batch_size)
    if not sum(map(_count, parts)):
        raise ValueError(
            "rows hold no scored token, so there is no loss to go by; give rows of at least two tokens with labels"
        )
    longest = parts[0]["input_ids"].shape[1]
    floors = [module.eviction.policy.least for module in modules]
    begun = [longest if budget is None else min(budget, longest) for budget in spread_budgets(start, len(modules))]
    if max(floors) > longest:
        raise ValueError(f"rows have {longest} tokens and a budget holds at least {max(floors)}; give longer rows")
    if total is not None and total < sum(floors):
        raise ValueError(f"total is {total}; {len(modules)} layers need at least {sum(floors)} tokens")
    if total is not None and total > sum(begun):
        raise ValueError(
            f"total is {total} and the layers begin with {sum(begun)} tokens, budgets of {begun} on rows of {longest}; give a "
            "smaller total, longer rows or a larger start"
        )
    known: dict[tuple[int, ...], float] = {}

    def loss(budgets: Sequence[int]) -> float:
        key = tuple(budgets)
        if key not in known:
            set_budgets(model, list(budgets))
            known[key] = _loss(model, parts)
        return known[key]

    try:
        with evaluating(model), _reporting(progress) as report:
            found = _descend(begun, floors, loss, target, total, step, longest, search == "lazy", report)
    except BaseException:
        set_budgets(model, before)
        raise
    result = [None if total is None and budget == longest else budget for budget in found]
    set_budgets(model, result)
    return result


def _descend(
    budgets: list[int], floors: list[int], loss: Callable[[Sequence[int]], float], target: float | None,
    total: int | None, step: int, longest: int, lazy: bool, report: Report,
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
    remembered = [-math.inf] * len(budgets)  # nats a token of the cut, as of the last try
    while sum(budgets) > least:
        left = sum(budgets) - least
        while total is not None and width > step and width * len(budgets) > left:
            width //= 2  # fine cuts decide how the last tokens are shared
        tries: list[tuple[float, int, list[int]]] = []
        for index in sorted(range(len(budgets)), key=lambda i: (remembered[i], -budgets[i])):
            if lazy and tries and (remembered[index], -budgets[index]) > min(tries)[:2]:
                break
            cut = min(width, budgets[index] - floors[index], left)
            if cut > 0:
                tried = [*budgets[:index], budgets[index] - cut, *budgets[index + 1 :]]
                # differences below a hundred-thousandth of a nat are rounding: then the largest budget is cut
                remembered[index] = round(loss(tried) - at, 5) / cut
                if target is None or loss(tried) <= target:
                    tries.append((remembered[index], -budgets[index], tried))
            report(first - sum(budgets), first - least, {"loss": at, "tokens": sum(budgets)})
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
