from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch
from torch.nn.functional import cosine_similarity, kl_div
from transformers import DynamicCache

from tests.models.recurrent import GREEDY, recurrent
from trialist.models.recurrent_depth.exit import change, without_improbable
from trialist.models.recurrent_depth.steps import depth_of


@pytest.fixture
def ids() -> torch.Tensor:
    return torch.randint(3, 37, (3, 9), generator=torch.Generator().manual_seed(4))


def test_changes_equal_their_formulas() -> None:
    generator = torch.Generator().manual_seed(0)
    now, before = (torch.randn(2, 5, 7, generator=generator).log_softmax(-1) for _ in range(2))
    expected = kl_div(now, before, reduction="none", log_target=True).sum(
        -1
    )  # as the official code has it: KL(before || now)
    torch.testing.assert_close(change("kl", now, before), expected)
    entropies = [torch.distributions.Categorical(logits=x).entropy() for x in (now, before)]
    torch.testing.assert_close(change("entropy_diff", now, before), (entropies[0] - entropies[1]).abs())
    distance = (now - before).pow(2).sum(-1).sqrt() / now.pow(2).sum(-1).sqrt()
    torch.testing.assert_close(change("latent_diff", now, before), distance)
    torch.testing.assert_close(change("cosine", now, before), 1 - cosine_similarity(now, before, dim=-1))


@pytest.mark.parametrize("criterion", ["kl", "entropy_diff", "latent_diff", "cosine"])
def test_threshold_zero_never_exits_and_changes_nothing(decoder, ids, criterion: str) -> None:
    model = recurrent(decoder)
    output = model(ids, exit_criterion=criterion, exit_threshold=0.0, num_steps=6)
    assert output.num_steps.unique().tolist() == [6]
    torch.testing.assert_close(output.logits, model(ids, num_steps=6).logits)


@pytest.mark.parametrize("criterion", ["kl", "minp_kl", "entropy_diff", "latent_diff", "cosine"])
@pytest.mark.parametrize("least", [1, 3])
def test_an_infinite_threshold_exits_at_min_steps(decoder, ids, criterion: str, least: int) -> None:
    model = recurrent(decoder)
    output = model(ids, exit_criterion=criterion, exit_threshold=math.inf, min_steps=least, num_steps=6)
    assert output.num_steps.unique().tolist() == [least]
    torch.testing.assert_close(output.logits, model(ids, num_steps=least).logits, rtol=1e-4, atol=1e-4)


def test_looks_come_every_so_many_steps_from_min_steps_on(decoder, ids) -> None:
    model = recurrent(decoder)
    for threshold in (0.2, 0.6, 1.0):
        taken = model(
            ids, exit_criterion="latent_diff", exit_threshold=threshold, min_steps=2, check_every=3, num_steps=9
        ).num_steps
        assert set(taken.unique().tolist()) <= {2, 5, 8, 9}


def test_a_token_stops_where_its_state_first_moves_less_than_the_threshold(decoder, ids) -> None:
    model = recurrent(decoder)
    token = ids[:, :1]  # the first token sees no other: its steps are those of a pass without exit
    states = model(token, num_steps=9, output_latent_states=True).latent_states
    moves = torch.stack([(b - a).norm(dim=-1) / b.norm(dim=-1) for a, b in pairwise(states)])[..., 0]  # (9, 3)
    threshold = float(moves[2:7].median())
    expected = [next((step + 1 for step in range(8) if moves[step, row] < threshold), 9) for row in range(3)]
    taken = model(ids, exit_criterion="latent_diff", exit_threshold=threshold, num_steps=9).num_steps
    assert taken[:, 0].tolist() == expected


def test_argmax_stops_at_the_first_look_at_threshold_0_and_never_at_infinity(decoder, ids) -> None:
    model = recurrent(decoder)
    for threshold, steps in ((0, 1), (math.inf, 7)):
        taken = model(ids, exit_criterion="argmax", exit_threshold=threshold, num_steps=7).num_steps
        assert taken.unique().tolist() == [steps]


def test_minp_kl_compares_what_is_at_least_a_tenth_as_probable_as_the_best() -> None:
    p = torch.tensor([0.5, 0.3, 0.06, 0.04, 0.1], dtype=torch.float64)
    found = without_improbable(p.log()).exp()
    expected = torch.tensor([0.5, 0.3, 0.06, 0.2, 0.1], dtype=torch.float64) / 1.16  # 0.04 < 0.05 becomes 1/5
    torch.testing.assert_close(found, expected)
    now = torch.tensor([0.2, 0.2, 0.2, 0.2, 0.2], dtype=torch.float64)
    by_hand = sum(float(q * math.log(q / 0.2)) for q in expected)
    assert float(change("minp_kl", now.log(), found.log())) == pytest.approx(by_hand)


def test_minp_kl_stops_where_the_kl_of_the_probable_tokens_is_small(decoder, ids) -> None:
    model, token = recurrent(decoder), ids[:, :1]
    seen = [model(token, num_steps=steps).logits[:, -1].log_softmax(-1) for steps in range(1, 8)]
    kept = [without_improbable(log_probs) for log_probs in seen]
    values = torch.stack([change("minp_kl", b, a) for a, b in pairwise(kept)])  # (6, 3), at steps 2 to 7
    threshold = float(values.detach().median())
    taken = model(token, exit_criterion="minp_kl", exit_threshold=threshold, min_steps=2, num_steps=9).num_steps[:, 0]
    for row in range(3):
        small = [step for step in range(2, 8) if values[step - 2, row] < threshold]
        assert int(taken[row]) == small[0] if small else int(taken[row]) > 7


def test_argmax_exits_after_so_many_equal_looks(decoder, ids) -> None:
    model = recurrent(decoder)
    token = ids[:, :1]
    best = torch.stack([model(token, num_steps=steps).logits[:, -1].argmax(-1) for steps in range(1, 9)])  # (8, 3)
    taken = model(token, exit_criterion="argmax", exit_threshold=2, num_steps=9).num_steps[:, 0]
    for row in range(3):
        equal = [step for step in range(3, 9) if len(set(best[step - 3 : step, row].tolist())) == 1]
        assert int(taken[row]) == (equal[0] if equal else 9)


@pytest.mark.parametrize("criterion", ["latent_diff", "cosine"])
@pytest.mark.parametrize(
    "settings", [{}, {"core_norm": False, "prelude_layers": 0, "coda_layers": 2}], ids=["paper", "other"]
)
def test_scoring_a_text_equals_decoding_it_token_by_token(decoder, padded, criterion: str, settings: dict) -> None:
    model, ids = recurrent(decoder, **settings), padded[0]
    options = {"exit_criterion": criterion, "exit_threshold": 0.8 if settings else 0.5, "num_steps": 7}
    together = model(ids, use_cache=False, **options)
    assert len(together.num_steps.unique()) > 2
    cache, logits = DynamicCache(), []
    for token in ids.split(1, dim=1):
        logits.append(model(token, past_key_values=cache, **options).logits)
    assert torch.equal(cache.num_steps, together.num_steps)
    torch.testing.assert_close(torch.cat(logits, 1), together.logits, rtol=1e-4, atol=1e-4)


def test_without_coda_the_kl_criterion_scores_as_it_decodes(decoder, ids) -> None:
    model = recurrent(decoder, prelude_layers=2, coda_layers=0)
    options = {"exit_criterion": "kl", "exit_threshold": 0.1, "num_steps": 7}
    together = model(ids, use_cache=False, **options)
    cache = DynamicCache()
    logits = [model(token, past_key_values=cache, **options).logits for token in ids.split(1, dim=1)]
    assert torch.equal(cache.num_steps, together.num_steps)
    torch.testing.assert_close(torch.cat(logits, 1), together.logits, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("criterion", ["kl", "minp_kl", "latent_diff", "entropy_diff", "argmax", "cosine"])
def test_each_row_decodes_as_it_does_alone(decoder, padded, criterion: str) -> None:
    model, (ids, mask) = recurrent(decoder), padded
    options = {
        "exit_criterion": criterion,
        "exit_threshold": {"argmax": 2, "minp_kl": 0.02}.get(criterion, 0.3),
        "num_steps": 7,
    }
    together = model.generate(ids, attention_mask=mask, return_dict_in_generate=True, **options, **GREEDY)
    steps = together.past_key_values.num_steps
    assert len(steps[:, 11:].unique()) > 2
    for row in range(3):
        own = ids[row : row + 1, int((mask[row] == 0).sum()) :]
        alone = model.generate(own, return_dict_in_generate=True, **options, **GREEDY)
        assert torch.equal(alone.sequences[0, -8:], together.sequences[row, -8:])
        assert torch.equal(alone.past_key_values.num_steps[0, -7:], steps[row, -7:])


def test_padding_runs_no_steps(decoder, padded) -> None:
    ids, mask = padded
    taken = recurrent(decoder)(ids, attention_mask=mask, exit_criterion="latent_diff", exit_threshold=0.5).num_steps
    assert (taken[mask == 0] == 0).all()
    assert (taken[mask == 1] > 0).all()


def test_a_token_that_stopped_leaves_its_last_keys_and_values_in_the_deeper_slots(decoder, ids) -> None:
    model = recurrent(decoder)
    cache = DynamicCache()
    model(ids, past_key_values=cache, exit_criterion="latent_diff", exit_threshold=0.5, num_steps=7)
    assert len(cache.num_steps.unique()) > 2
    for row, position in ((0, 3), (1, 5), (2, 8)):
        last = int(cache.num_steps[row, position]) - 1
        for j in (0, 1):
            for step in range(last, 7):
                for kind in ("keys", "values"):
                    found, wanted = (
                        getattr(cache.layers[1 + 2 * at + j], kind)[row, :, position] for at in (step, last)
                    )
                    assert torch.equal(found, wanted)


def test_only_rows_with_active_tokens_pass_the_core(decoder, ids) -> None:
    model, rows = recurrent(decoder), []
    depth_of(model).core.register_forward_pre_hook(lambda _, args: rows.append(len(args[0])))
    taken = model(ids[:, :1], exit_criterion="latent_diff", exit_threshold=0.45, num_steps=7).num_steps
    assert rows == [int((taken[:, 0] > step).sum()) for step in range(int(taken.max()))]
    assert len(set(rows)) > 1


def test_exits_with_shared_slots_leave_no_slot_without_a_token(decoder, ids) -> None:
    model = recurrent(decoder)
    cache = DynamicCache()
    for token in ids.split(1, dim=1):
        options = {"exit_criterion": "latent_diff", "exit_threshold": 0.6, "min_steps": 2, "num_steps": 7}
        model(token, past_key_values=cache, kv_slots=2, **options)
    assert {layer.get_seq_length() for layer in cache.layers} == {9}
    assert len(cache.num_steps.unique()) > 1


def test_self_speculation_with_exits_equals_greedy_decoding_with_exits(decoder, ids) -> None:
    model = recurrent(decoder)
    options = {"exit_criterion": "latent_diff", "exit_threshold": 0.4, "num_steps": 7}
    expected = model.generate(ids[:1], **options, **GREEDY)
    assert torch.equal(model.generate(ids[:1], assistant_model=model.with_steps(2), **options, **GREEDY), expected)


def test_looks_leave_no_trace_in_the_cache_of_the_coda(decoder, ids) -> None:
    model = recurrent(decoder)
    caches = [DynamicCache(), DynamicCache()]
    model(ids, past_key_values=caches[0], num_steps=6)
    model(ids, past_key_values=caches[1], num_steps=6, exit_criterion="kl", exit_threshold=0.0)
    for one, other in zip(caches[0].layers, caches[1].layers, strict=True):
        torch.testing.assert_close(one.keys, other.keys)
        torch.testing.assert_close(one.values, other.values)


def test_configured_exits_are_for_evaluation_only(decoder, ids) -> None:
    model = recurrent(decoder, exit_criterion="latent_diff", exit_threshold=math.inf)
    assert model(ids).num_steps.unique().tolist() == [1]
    model.train()
    assert len({int(model(ids).num_steps[0, 0]) for _ in range(10)}) > 2
    assert model(ids, num_steps=4).num_steps.unique().tolist() == [4]
    assert model(ids, past_key_values=DynamicCache()).num_steps.unique().tolist() == [5]


@pytest.mark.parametrize("criterion", ["latent_diff", "kl"])
def test_hidden_states_and_attentions_under_exits_are_refused(decoder, ids, criterion: str) -> None:
    model = recurrent(decoder)
    with pytest.raises(ValueError, match=r"output_hidden_states with exit_criterion=.*; take output_latent_states"):
        model(ids, exit_criterion=criterion, output_hidden_states=True)
    with pytest.raises(ValueError, match="output_attentions with exit_criterion"):
        model(ids, exit_criterion=criterion, output_attentions=True)
    states = model(ids, exit_criterion=criterion, output_latent_states=True).latent_states
    assert {tuple(state.shape) for state in states} == {(3, 9, 24)}


@torch.no_grad()
def test_beams_under_exits_choose_what_they_choose_alone(decoder, padded) -> None:
    model, (ids, mask) = recurrent(decoder), padded
    options = {"exit_criterion": "latent_diff", "exit_threshold": 0.4, "num_steps": 7, "num_beams": 3}
    together = model.generate(ids, attention_mask=mask, **options, **GREEDY)
    for row in range(3):
        alone = model.generate(ids[row : row + 1, int((mask[row] == 0).sum()) :], **options, **GREEDY)
        assert torch.equal(together[row, -8:], alone[0, -8:])


@pytest.mark.parametrize(
    ("types", "options", "words"),
    [
        (("selective_attention",) * 4, {"exit_criterion": "latent_diff"}, "the core holds selective_attention"),
        (
            ("full_attention",) * 3 + ("selective_attention",),
            {"exit_criterion": "kl"},
            "the coda holds selective_attention",
        ),
        (
            ("full_attention",) * 4,
            {"exit_criterion": "kl", "min_steps": 8},
            "min_steps is 8, more than num_steps, which is 5",
        ),
        (("full_attention",) * 4, {"exit_criterion": "kl", "kv_slots": 3}, "give min_steps=3 or more"),
        (("full_attention",) * 4, {"exit_criterion": "depth"}, "recurrent.exit_criterion is 'depth'"),
    ],
)
def test_exits_that_are_not_defined_are_refused(decoder, ids, types: tuple, options: dict, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        recurrent(decoder, *types)(ids, **options)


def test_exits_are_refused_in_training_without_a_head_and_in_static_caches(decoder, ids) -> None:
    model = recurrent(decoder)
    with pytest.raises(ValueError, match="no language-model head"):
        model.model(ids, exit_criterion="kl")
    with pytest.raises(ValueError, match="needs a dynamic cache"):
        model.generate(ids, exit_criterion="kl", cache_implementation="static", **GREEDY)
    with pytest.raises(ValueError, match="exit_criterion belongs to evaluation"):
        model.train()(ids, exit_criterion="kl")
    model.gradient_checkpointing_enable()
    with pytest.raises(ValueError, match="gradient checkpointing cannot"), torch.no_grad():
        model(ids, exit_criterion="kl")
