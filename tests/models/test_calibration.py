from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tests.models.conftest import EVICTING, tokens
from trialist.models import (
    calibrate_budgets,
    enable_eviction,
    enable_selective_attention,
    get_budgets,
    memory_profile,
    selected_logprobs,
    set_budgets,
)


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


@pytest.mark.parametrize("search", ["lazy", "greedy"])
@pytest.mark.parametrize(("total", "step"), [(40, 1), (33, 1), (17, 1), (24, 4), (9, 3)])
def test_tokens_go_where_they_lower_a_convex_loss_most(decoder, monkeypatch, total: int, step: int, search) -> None:
    from trialist.models.eviction import calibration

    model = decoder(*["selective_attention"] * 3)

    def convex(budgets) -> float:  # type: ignore[no-untyped-def]
        return sum(need / budget for need, budget in zip((40.0, 1.0, 9.0), budgets))

    monkeypatch.setattr(calibration, "_loss", lambda model, batches: convex(get_budgets(model)))
    found = calibrate_budgets(model, tokens(), total=total, step=step, search=search, progress=False)
    assert sum(found) == total
    splits = ((a, b, total - a - b) for a in range(2, 25) for b in range(2, 25) if 2 <= total - a - b <= 24)
    best = min(splits, key=convex)
    assert all(abs(ours - ideal) <= 3 * step for ours, ideal in zip(found, best))
    if step == 1:  # coarse cuts at the start may cost a little
        assert convex(found) <= 1.02 * convex(best)


def test_the_lazy_search_finds_as_good_budgets_with_a_fraction_of_the_tries(decoder, monkeypatch) -> None:
    from trialist.models.eviction import calibration

    model, tries = decoder(*["selective_attention"] * 12), {"lazy": 0, "greedy": 0}
    reached = {}
    for search in ("lazy", "greedy"):

        def convex(model, batches) -> float:  # type: ignore[no-untyped-def]
            tries[search] += 1  # noqa: B023
            return sum((3 + layer) ** 2 / budget for layer, budget in enumerate(get_budgets(model)))

        monkeypatch.setattr(calibration, "_loss", convex)
        set_budgets(model, None)
        found = calibrate_budgets(model, tokens(), total=120, step=1, search=search, progress=False)
        assert sum(found) == 120
        reached[search] = convex(model, None)
    assert reached["lazy"] <= 1.01 * reached["greedy"]
    assert tries["lazy"] < tries["greedy"] / 4


def test_the_lazy_search_gives_up_only_after_every_layer_was_tried(decoder, monkeypatch) -> None:
    from trialist.models.eviction import calibration

    model = decoder(*["selective_attention"] * 3)

    def jumps(model, batches) -> float:  # type: ignore[no-untyped-def]
        first, second, third = get_budgets(model)
        # the third layer is dear until the first has lost tokens, so what is remembered of it is too much
        return (24 - first) * 0.01 + (0.0 if first < 24 else 24 - third) + (24 - second) * 10.0

    monkeypatch.setattr(calibration, "_loss", jumps)
    found = calibrate_budgets(model, tokens(), target=0.2, step=1, progress=False)
    assert found[2] == 2
    assert found[1] is None


@pytest.mark.parametrize("kind", EVICTING)
def test_cuts_stop_where_the_loss_would_exceed_its_target(evicting, kind: str) -> None:
    model = evicting(kind)
    silence(model, 0)
    rows = own_words(model, tokens())
    full = nats(model, rows)
    found = calibrate_budgets(model, rows, target=full + 1e-6, step=3, progress=False)
    assert found[0] == 2
    assert nats(model, rows) <= full + 1e-6
    looser = calibrate_budgets(model, rows, target=full + 0.5, step=3, progress=False)
    assert full + 1e-6 < nats(model, rows) <= full + 0.5
    looser, tight = ([24 if budget is None else budget for budget in budgets] for budgets in (looser, found))
    assert sum(looser) < sum(tight)
    for layer in (0, 1):  # a further step in any layer that has one left would be too much
        if looser[layer] > 2:
            further = list(looser)
            further[layer] = max(2, further[layer] - 3)
            set_budgets(model, further)
            assert nats(model, rows) > full + 0.5


def test_a_total_is_met_exactly_and_spent_at_least_as_well_as_by_equal_budgets(evicting) -> None:
    model = evicting("decoder")
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


def test_no_allocation_is_evaluated_twice_and_progress_is_told(evicting, monkeypatch) -> None:
    from trialist.models.eviction import calibration

    model, seen, told = evicting("decoder"), [], []
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


def test_labels_and_documents_of_packed_rows_are_honoured(evicting) -> None:
    model = evicting("decoder")
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


@pytest.mark.parametrize("kind", EVICTING)
def test_a_layer_of_which_no_cut_is_harmless_keeps_everything_also_of_longer_texts(evicting, kind: str) -> None:
    model = evicting(kind)
    model.config.max_position_embeddings = 200
    silence(model, 0)
    rows = own_words(model, tokens())
    found = calibrate_budgets(model, rows, target=nats(model, rows) + 1e-6, step=22, progress=False)
    assert found[0] is not None
    assert found[1] is None
    assert get_budgets(model) == found
    longer = tokens(2, 60)
    with torch.no_grad():
        pruned = model(longer).logits
        set_budgets(model, None)
        torch.testing.assert_close(pruned, model(longer).logits)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"total": 1000}, r"total is 1000 and the layers begin with 48 tokens, budgets of \[24, 24\] on rows of 24"),
        ({"total": 30, "start": [5, 5]}, r"total is 30 and the layers begin with 10 tokens, budgets of \[5, 5\]"),
        ({"total": 49}, "give a smaller total, longer rows or a larger start"),
    ],
)
def test_a_total_out_of_reach_is_refused_with_both_numbers(evicting, arguments, words: str) -> None:
    model = evicting("decoder")
    with pytest.raises(ValueError, match=words):
        calibrate_budgets(model, tokens(), progress=False, **arguments)
    assert get_budgets(model) == [None, None]


def test_a_failed_calibration_leaves_the_budgets_as_they_were(evicting) -> None:
    model = evicting("decoder")
    set_budgets(model, [5, 7])
    with pytest.raises(ValueError, match=r"before any cut, above the target of 0\.0100"):
        calibrate_budgets(model, tokens(), target=0.01, progress=False)
    assert get_budgets(model) == [5, 7]


@pytest.mark.parametrize("kind", EVICTING)
def test_budgets_are_saved_with_the_configuration(evicting, kind: str, tmp_path) -> None:
    from trialist.models import load_model

    model = evicting(kind)
    set_budgets(model, [5, None])
    model.save_pretrained(tmp_path)
    assert get_budgets(load_model(str(tmp_path))) == [5, None]


ENABLE = {
    "selective": lambda model: enable_selective_attention(model, 2, budgets=[4, 6]),
    "eviction": lambda model: enable_eviction(model, "recency", [4, 6], sinks=1),
}


@pytest.mark.parametrize("enable", ENABLE.values(), ids=ENABLE)
@pytest.mark.parametrize("when", ["saved with the base", "enabled again"])
def test_an_adapter_finds_its_settings_in_its_base_or_is_given_them_again(family, tmp_path, enable, when: str) -> None:
    from peft import LoraConfig, get_peft_model

    from trialist.models import load_model

    base, rows = family("llama"), tokens(2, 12)
    if when == "saved with the base":
        enable(base)
    base.save_pretrained(tmp_path / "base")
    base = load_model(str(tmp_path / "base"))
    if when == "enabled again":
        enable(base)
    lora = LoraConfig(r=2, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM", init_lora_weights=False)
    model = get_peft_model(base, lora).eval()
    model.save_pretrained(tmp_path / "adapter")
    loaded = load_model(str(tmp_path / "adapter"))
    if when == "enabled again":
        assert get_budgets(loaded) == []
        enable(loaded)
    assert get_budgets(loaded) == [4, 6]
    torch.testing.assert_close(loaded(rows).logits, model(input_ids=rows).logits)
    merged = model.merge_and_unload()
    merged.save_pretrained(tmp_path / "merged")
    again = load_model(str(tmp_path / "merged"))
    assert get_budgets(again) == [4, 6]
    torch.testing.assert_close(again(rows).logits, loaded(rows).logits, rtol=1e-4, atol=1e-4)


def test_budgets_of_chosen_layers_stand_in_the_order_in_which_they_were_chosen(family) -> None:
    model = enable_selective_attention(family("llama", num_hidden_layers=3), [3, 1], layers=[2, 0], budgets=[8, 4])
    assert get_budgets(model) == [4, 8]
    set_budgets(model, [5, 9])
    assert model.config.selective_attention["budgets"] == [9, 5]


@pytest.mark.parametrize(
    ("rows", "options", "words"),
    [
        (tokens(5, 1), {}, "rows hold no scored token"),
        ({"input_ids": tokens(), "labels": torch.full((5, 24), -100)}, {}, "rows hold no scored token"),
        ({"input_ids": tokens(), "attention_mask": torch.zeros(5, 24, dtype=torch.long)}, {}, "nothing but padding"),
        (
            {"input_ids": tokens(), "attention_mask": torch.ones(4, 24, dtype=torch.long)},
            {},
            "has 4 rows and input_ids 5",
        ),
        (tokens()[0], {}, r"rows have shape \(24,\), wanted token ids \(N, T\)"),
        (tokens(), {"batch_size": 0}, "batch_size is 0; it must be at least 1 row"),
        (tokens(), {"batch_size": -1}, "batch_size is -1; it must be at least 1 row"),
    ],
)
def test_rows_that_measure_nothing_are_refused(evicting, rows, options, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        calibrate_budgets(evicting("decoder"), rows, total=20, progress=False, **options)
    if "scored" not in words:
        with pytest.raises(ValueError, match=words):
            memory_profile(evicting("decoder"), rows, **options)


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
def test_wrong_arguments_are_refused(evicting, arguments, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        calibrate_budgets(evicting("decoder"), tokens(), progress=False, **arguments)


def test_models_without_a_layer_that_can_evict_are_refused(family) -> None:
    with pytest.raises(ValueError, match="no layer of LlamaForCausalLM can evict"):
        set_budgets(family("llama"), 4)
    with pytest.raises(ValueError, match="has no selective attention"):
        memory_profile(enable_eviction(family("llama")), tokens())
