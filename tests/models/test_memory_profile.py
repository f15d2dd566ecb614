"""What layers remember, see and store: the definition, whatever the padding, and bytes counted by hand."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tests.models.conftest import EVICTING, tokens
from trialist.models import (
    enable_selective_attention,
    kv_bytes,
    memory_profile,
    set_budgets,
)


@pytest.mark.parametrize("kind", EVICTING)
@pytest.mark.parametrize("T", [30, 160])
def test_measured_bytes_are_those_of_the_budgets_and_of_the_token_evicted_next(evicting, kind: str, T: int) -> None:
    model, rows = evicting(kind), tokens(2, T)
    model.config.max_position_embeddings = 200
    set_budgets(model, [10, 20])
    groups, width = 3, 4
    noted = {"h2o": groups * 12, "recency": 4}.get(kind, 12)  # column, score, and score before the latest token
    kept = groups * 4 if kind == "h2o" else 4  # the indices of those that stay, a token of the budget each
    entry = groups * width * 4 * 2 + noted
    assert kv_bytes(model, rows) == (11 + 21) * entry + (10 + 20) * kept


def test_profile_without_selections_counts_every_token(evicting) -> None:
    model, rows = evicting("decoder"), tokens(2, 12)
    with torch.no_grad():
        for block in model.model.layers:
            block.mixer.q_proj.weight[:4] = 0.0  # head 0 selects nothing
    for layer in memory_profile(model, rows, batch_size=1):
        assert (layer.remembered_mean, layer.remembered_max) == pytest.approx((6.5, 12.0))
        assert (layer.seen_mean, layer.seen_max) == (6.5, 12.0)
        replayed = 10 * (4 * 4 + 1)  # selector query and protection of all but the last token of the prompt of 11
        assert layer.bytes == 12 * (4 * 3 * 4 * 2 + 4 + 4) + replayed


def test_profile_of_a_pruned_padded_batch_counts_what_is_alive(evicting) -> None:
    model, rows = evicting("swapped llama"), tokens(2, 12)
    mask = torch.ones_like(rows)
    mask[1, :6] = 0
    set_budgets(model, [4, None])
    first, second = memory_profile(model, {"input_ids": rows, "attention_mask": mask})
    seen = [min(n, 5) for n in range(1, 13)] + [min(n, 5) for n in range(1, 7)]  # the budget, and the query itself
    assert (first.seen_mean, first.seen_max) == pytest.approx((sum(seen) / 18, 5))
    assert (second.seen_mean, second.seen_max) == pytest.approx((sum(range(1, 13)) / 18 + sum(range(1, 7)) / 18, 12))
    assert 1 <= first.remembered_mean <= first.seen_mean
    assert first.remembered_max <= 5


def by_definition(model, rows: Tensor, mask: Tensor, budget: int | None, tau: float) -> tuple[list[float], list[float]]:  # type: ignore[no-untyped-def]
    """M of layer 0 and what its queries see, one number a real token, from queries and keys that the layer is asked for."""
    states = {}
    attention = model.model.layers[0].self_attn
    hook = attention.register_forward_pre_hook(
        lambda module, args, kwargs: states.update(x=kwargs["hidden_states"], rope=kwargs["position_embeddings"]),
        with_kwargs=True,
    )
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    with torch.no_grad():
        model(rows, attention_mask=mask, position_ids=positions, use_cache=False)
    hook.remove()
    from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

    (N, T), D = rows.shape, 4
    q = attention.q_proj(states["x"]).view(N, T, -1, D).transpose(1, 2)
    k = attention.k_proj(states["x"]).view(N, T, -1, D).transpose(1, 2)
    q, k = apply_rotary_pos_emb(q, k, *states["rope"])
    remembered, seen = [], []
    for b in range(N):
        alive: list[int] = []
        F = [0.0] * T
        for i in range(T):
            if not mask[b, i]:
                continue
            look = [*alive, i]
            remembered.append(sum(1 - min(F[j], tau) / tau for j in look))
            seen.append(float(len(look)))
            for j in look[1:-1]:
                F[j] += max(0.0, float(q[b, 0, i] @ k[b, 0, j]) * D**-0.5)
            alive.append(i)
            if budget is not None and len(alive) > budget:
                alive.remove(max(alive[1:-1], key=lambda j: (F[j], -j)))
    return remembered, seen


@pytest.mark.parametrize("budget", [None, 4])
@pytest.mark.parametrize("tau", [0.5, 3.0])
@pytest.mark.parametrize("pad", [0, 5])
def test_a_profile_is_what_the_definition_remembers_and_sees(family, budget: int | None, tau: float, pad: int) -> None:
    model, rows = enable_selective_attention(family("llama").double(), budgets=budget), tokens(3, 13)
    mask = torch.ones_like(rows)
    mask[1, :pad] = 0
    with torch.no_grad():
        remembered, seen = by_definition(model, rows, mask, budget, tau)
    first = memory_profile(model, {"input_ids": rows, "attention_mask": mask}, tau=tau, batch_size=2)[0]
    assert (first.remembered_mean, first.remembered_max) == pytest.approx(
        (sum(remembered) / len(seen), max(remembered))
    )
    assert (first.seen_mean, first.seen_max) == pytest.approx((sum(seen) / len(seen), max(seen)))
    assert first.remembered_mean < first.seen_mean


@pytest.mark.parametrize("name", ["llama", "gpt2"])
@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_changes_no_profile(family, name: str, side: str) -> None:
    model, row = enable_selective_attention(family(name).double(), budgets=[4, None]), tokens(1, 12)
    pads = (5, 0) if side == "left" else (0, 5)
    padded = {
        "input_ids": torch.nn.functional.pad(row, pads),
        "attention_mask": torch.nn.functional.pad(torch.ones_like(row), pads),
    }
    for alone, among in zip(memory_profile(model, row), memory_profile(model, padded)):
        for field in ("remembered_mean", "remembered_max", "seen_mean", "seen_max"):
            assert getattr(among, field) == pytest.approx(getattr(alone, field)), field


def test_bytes_of_a_hybrid_count_keys_penalties_and_recurrent_states(decoder) -> None:
    model = decoder("full_attention", "selective_attention", "min_gru", selective={"budgets": 5})
    rows, T, entry = tokens(2, 30), 30, 3 * 4 * 4 * 2
    hidden = 4 * sum(tensor[0].numel() for tensor in recurrent_state(model, rows) if tensor is not None)
    assert hidden > 0
    assert kv_bytes(model, rows) == T * entry + 6 * (entry + 4 + 4 + 4) + 5 * 4 + hidden


def recurrent_state(model, rows: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[no-untyped-def]
    with torch.no_grad():
        layer = model(rows, use_cache=True).past_key_values.layers[2]
    return layer.state, layer.conv_tail


def test_rows_on_another_device_are_refused(evicting) -> None:
    with pytest.raises(ValueError, match="input_ids of the rows is on meta and the model on cpu; move it there"):
        kv_bytes(evicting("decoder"), tokens().to("meta"))
