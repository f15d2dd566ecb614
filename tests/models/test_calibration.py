from __future__ import annotations

import pytest
import torch
from torch import Tensor

from trialist.models import (
    calibrate_budgets,
    enable_eviction,
    enable_selective_attention,
    get_budgets,
    kv_bytes,
    memory_profile,
    selected_logprobs,
    set_budgets,
)

KINDS = ["decoder", "swapped llama", "h2o", "recency"]


def tokens(N: int = 5, T: int = 24) -> Tensor:
    return torch.randint(3, 37, (N, T), generator=torch.Generator().manual_seed(1))


@pytest.fixture
def build(decoder, family):
    def make(kind: str):  # type: ignore[no-untyped-def]
        if kind == "decoder":
            return decoder("selective_attention", "selective_attention")
        if kind == "swapped llama":
            return enable_selective_attention(family("llama"))
        return enable_eviction(family("llama"), kind, **({"sinks": 1} if kind == "recency" else {}))

    return make


def silence(model, layer: int) -> None:  # type: ignore[no-untyped-def]
    """The attention of one layer writes nothing, so its budget cannot matter."""
    block = model.model.layers[layer]
    attention = block.mixer if hasattr(block, "mixer") else block.self_attn
    with torch.no_grad():
        attention.o_proj.weight.zero_()


def own_words(model, rows: Tensor, **more: Tensor) -> dict[str, Tensor]:  # type: ignore[no-untyped-def]
    """A batch whose labels are what the model itself finds most probable, so that whatever it forgets costs it."""
    with torch.no_grad():
        best = model(rows, use_cache=False, **more).logits.argmax(-1)
    return {"input_ids": rows, "labels": torch.nn.functional.pad(best[:, :-1], (1, 0), value=-100), **more}


def nats(model, rows: dict[str, Tensor]) -> float:  # type: ignore[no-untyped-def]
    with torch.no_grad():
        return float(-selected_logprobs(model, **rows).sum() / (rows["labels"] != -100).sum())


@pytest.mark.parametrize(("total", "step"), [(40, 1), (33, 1), (17, 1), (24, 4), (9, 3)])
def test_tokens_go_where_they_lower_a_convex_loss_most(decoder, monkeypatch, total: int, step: int) -> None:
    from trialist.models.eviction import calibration

    model = decoder(*["selective_attention"] * 3)

    def convex(budgets) -> float:  # type: ignore[no-untyped-def]
        return sum(need / budget for need, budget in zip((40.0, 1.0, 9.0), budgets))

    monkeypatch.setattr(calibration, "_loss", lambda model, batches: convex(get_budgets(model)))
    found = calibrate_budgets(model, tokens(), total=total, step=step, progress=False)
    assert sum(found) == total
    splits = ((a, b, total - a - b) for a in range(2, 25) for b in range(2, 25) if 2 <= total - a - b <= 24)
    best = min(splits, key=convex)
    assert all(abs(ours - ideal) <= 3 * step for ours, ideal in zip(found, best))
    if step == 1:  # coarse cuts at the start may cost a little
        assert convex(found) <= 1.02 * convex(best)


@pytest.mark.parametrize("kind", KINDS)
def test_cuts_stop_where_the_loss_would_exceed_its_target(build, kind: str) -> None:
    model = build(kind)
    silence(model, 0)
    rows = own_words(model, tokens())
    full = nats(model, rows)
    found = calibrate_budgets(model, rows, target=full + 1e-6, step=3, progress=False)
    assert found[0] == 2
    assert nats(model, rows) <= full + 1e-6
    looser = calibrate_budgets(model, rows, target=full + 0.5, step=3, progress=False)
    assert full + 1e-6 < nats(model, rows) <= full + 0.5
    assert sum(looser) < sum(found)
    for layer in (0, 1):  # a further step in any layer that has one left would be too much
        if looser[layer] > 2:
            further = list(looser)
            further[layer] = max(2, further[layer] - 3)
            set_budgets(model, further)
            assert nats(model, rows) > full + 0.5


def test_a_total_is_met_exactly_and_spent_at_least_as_well_as_by_equal_budgets(build) -> None:
    model = build("decoder")
    rows = own_words(model, tokens())
    found = calibrate_budgets(model, rows, total=15, step=1, progress=False)
    assert sum(found) == 15
    loss = nats(model, rows)
    best = min(loss_with(model, rows, [split, 15 - split]) for split in range(2, 14))
    assert loss <= loss_with(model, rows, [7, 8])
    assert loss >= best
    again = calibrate_budgets(model, rows, total=9, step=1, start=found, progress=False)
    assert sum(again) == 9
    assert all(a <= b for a, b in zip(again, found))


def loss_with(model, rows: dict[str, Tensor], budgets: list[int]) -> float:  # type: ignore[no-untyped-def]
    set_budgets(model, budgets)
    return nats(model, rows)


def test_no_allocation_is_evaluated_twice_and_progress_is_told(build, monkeypatch) -> None:
    from trialist.models.eviction import calibration

    model, seen, told = build("decoder"), [], []
    evaluate = calibration._loss

    def counting(model, batches):  # type: ignore[no-untyped-def]
        seen.append(tuple(get_budgets(model)))
        return evaluate(model, batches)

    monkeypatch.setattr(calibration, "_loss", counting)
    calibrate_budgets(
        model, tokens(), total=10, step=2, progress=lambda done, total, numbers: told.append((done, total, numbers))
    )
    assert len(seen) == len(set(seen))
    assert told[-1][:2] == (38, 38)
    assert told[-1][2]["tokens"] == 10
    assert [done for done, _, _ in told] == sorted(done for done, _, _ in told)


def test_labels_and_documents_of_packed_rows_are_honoured(build) -> None:
    model = build("decoder")
    positions = torch.cat([torch.arange(5), torch.arange(7)]).expand(2, 12)
    batch = own_words(model, tokens(2, 12), position_ids=positions)
    batch["labels"][:, 5] = -100
    full = nats(model, batch)
    found = calibrate_budgets(model, batch, target=full + 1e-6, step=1, progress=False)
    assert max(found) <= 7  # no document is longer, so larger budgets are no use
    assert nats(model, batch) <= full + 1e-6
    told = []
    calibrate_budgets(model, batch, total=20, progress=lambda done, total, numbers: told.append(numbers["loss"]))
    assert told[-1] == pytest.approx(full)


def test_a_failed_calibration_leaves_the_budgets_as_they_were(build) -> None:
    model = build("decoder")
    set_budgets(model, [5, 7])
    with pytest.raises(ValueError, match=r"before any cut, above the target of 0\.0100"):
        calibrate_budgets(model, tokens(), target=0.01, progress=False)
    assert get_budgets(model) == [5, 7]


@pytest.mark.parametrize("kind", KINDS)
def test_budgets_are_saved_with_the_configuration(build, kind: str, tmp_path) -> None:
    from trialist.models import load_model

    model = build(kind)
    set_budgets(model, [5, None])
    model.save_pretrained(tmp_path)
    assert get_budgets(load_model(str(tmp_path))) == [5, None]


def test_budgets_of_chosen_layers_stand_in_the_order_in_which_they_were_chosen(family) -> None:
    model = enable_selective_attention(family("llama", num_hidden_layers=3), [3, 1], layers=[2, 0], budgets=[8, 4])
    assert get_budgets(model) == [4, 8]
    set_budgets(model, [5, 9])
    assert model.config.selective_attention["budgets"] == [9, 5]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("T", [30, 160])
def test_measured_bytes_are_those_of_the_budgets_and_of_the_token_evicted_next(build, kind: str, T: int) -> None:
    model, rows = build(kind), tokens(2, T)
    model.config.max_position_embeddings = 200
    set_budgets(model, [10, 20])
    groups, width = 3, 4
    noted = {"h2o": groups * 8, "recency": 4}.get(kind, 8)  # column, and what the token is scored by
    kept = groups * 4 if kind == "h2o" else 4  # the indices of those that stay, a token of the budget each
    entry = groups * width * 4 * 2 + noted
    assert kv_bytes(model, rows) == (11 + 21) * entry + (10 + 20) * kept


def test_profile_without_selections_counts_every_token(build) -> None:
    model, rows = build("decoder"), tokens(2, 12)
    with torch.no_grad():
        for block in model.model.layers:
            block.mixer.q_proj.weight[:4] = 0.0  # head 0 selects nothing
    for layer in memory_profile(model, rows, batch_size=1):
        assert (layer.remembered_mean, layer.remembered_max) == pytest.approx((6.5, 12.0))
        assert (layer.seen_mean, layer.seen_max) == (6.5, 12.0)
        assert layer.bytes == 12 * (4 * 3 * 4 * 2 + 4)


def test_profile_of_a_pruned_padded_batch_counts_what_is_alive(build) -> None:
    model, rows = build("swapped llama"), tokens(2, 12)
    mask = torch.ones_like(rows)
    mask[1, :6] = 0
    set_budgets(model, [4, None])
    first, second = memory_profile(model, {"input_ids": rows, "attention_mask": mask})
    seen = [min(n, 5) for n in range(1, 13)] + [min(n, 5) for n in range(1, 7)]  # the budget, and the query itself
    assert (first.seen_mean, first.seen_max) == pytest.approx((sum(seen) / 18, 5))
    assert (second.seen_mean, second.seen_max) == pytest.approx((sum(range(1, 13)) / 18 + sum(range(1, 7)) / 18, 12))
    assert 1 <= first.remembered_mean <= first.seen_mean
    assert first.remembered_max <= 5


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({}, "exactly one of target"),
        ({"target": 3.0, "total": 20}, "exactly one of target"),
        ({"total": 3}, "total is 3; 2 layers need at least 4 tokens"),
        ({"total": 20, "step": 0}, "step is 0"),
        ({"total": 20, "start": [9]}, "names 1 budgets for 2 layers"),
    ],
)
def test_wrong_arguments_are_refused(build, arguments, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        calibrate_budgets(build("decoder"), tokens(), progress=False, **arguments)


def test_models_without_a_layer_that_can_evict_are_refused(family) -> None:
    with pytest.raises(ValueError, match="no layer of LlamaForCausalLM can evict"):
        set_budgets(family("llama"), 4)
    with pytest.raises(ValueError, match="has no selective attention"):
        memory_profile(enable_eviction(family("llama")), tokens())
