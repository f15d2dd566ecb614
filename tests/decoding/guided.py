"""Tiny models under guidance, and the same done step by step from scratch."""

from __future__ import annotations

from typing import Any

import torch
import transformers
from torch import Tensor

from trialist.decoding import ContrastiveGuidance, generate
from trialist.models import initialize_

from ..models.conftest import FAMILIES, GREEDY, sharpen

NEW = GREEDY["max_new_tokens"]
PLAIN = [[5, 9, 11, 7], [7, 3], [8, 4, 6, 30, 22, 12]]
CONTEXTS = [[3, 4, 20, 5, 9, 11, 7], [21, 7, 3], [14, 15, 8, 4, 6, 30, 22, 12]]
OTHER = [[33, 5, 9, 11, 7], [17, 18, 19, 7, 3], [29, 8, 4, 6, 30, 22, 12]]


def built(family: str, seed: int = 0, factor: float = 4.0, **changes: Any) -> Any:
    config = FAMILIES[family]()
    for name, value in changes.items():
        setattr(config, name, value)
    model = transformers.AutoModelForCausalLM.from_config(config)
    initialize_(model, seed)
    sharpen(model, factor)
    return model.eval()


def padded(rows: list[list[int]]) -> dict[str, Tensor]:
    T = max(map(len, rows))
    ids = torch.tensor([[0] * (T - len(row)) + row for row in rows])
    mask = torch.tensor([[0] * (T - len(row)) + [1] * len(row) for row in rows])
    return {"input_ids": ids, "attention_mask": mask}


def new_tokens(model: Any, option: ContrastiveGuidance, rows: list[list[int]], **more: Any) -> list[list[int]]:
    inputs = padded(rows)
    found = generate(model, [option], **inputs, **{**GREEDY, **more})
    return found[:, inputs["input_ids"].shape[1] :].tolist()


def log_p(model: Any, ids: list[int]) -> Tensor:
    with torch.no_grad():
        return model(torch.tensor([ids])).logits[0].double().log_softmax(-1)


def naive(
    model: Any, plain: list[int], context: list[int], strength: float, window: int, first: bool = True
) -> list[int]:
    """Greedy OPAD of one row, each step from scratch, in float64."""
    tokens: list[int] = []
    for step in range(NEW):
        l_c, l_0 = log_p(model, context + tokens), log_p(model, plain + tokens)
        score = l_c[-1].clone()
        for back in range(1, min(window, step + 1) + 1):
            if step or first:
                score += strength * (l_c[-back] - l_0[-back])
        tokens.append(int(score.argmax()))
    return tokens
