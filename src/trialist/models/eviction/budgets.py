"""Budgets of tokens: one number for all layers that evict, or one a layer."""

from __future__ import annotations

from collections.abc import Sequence

LEAST = 2
"""A budget must hold the first token and the current one"""

Budgets = int | Sequence[int | None] | None


def spread_budgets(budgets: Budgets, layers: int, field: str = "budgets") -> list[int | None]:
    """A budget a layer, None where a layer keeps everything; `layers` counts the layers that can evict, in order.

    Raises ValueError for a list of another length and for budgets below 2.
    """
    if budgets is None or isinstance(budgets, int):
        spread: list[int | None] = [budgets] * layers
    else:
        spread = list(budgets)
    if len(spread) != layers:
        raise ValueError(
            f"{field} names {len(spread)} budgets for {layers} layers that can evict; give one a layer, in order"
        )
    for index, budget in enumerate(spread):
        if budget is not None and (isinstance(budget, bool) or not isinstance(budget, int) or budget < LEAST):
            raise ValueError(
                f"{field}: the budget of layer {index} of {layers} is {budget!r}; give at least {LEAST} tokens (the first "
                "and the current one), or None for all"
            )
    return spread
