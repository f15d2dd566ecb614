"""Pairs in rows: the answers' log-probabilities from two sequences, from one, and the objective on a model."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MambaConfig,
    MambaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
)

from trialist.data.collation import stack_or_pad
from trialist.data.preferences import PreferencePair
from trialist.models import ModularDecoderConfig, ModularDecoderForCausalLM, initialize_
from trialist.models.scoring import selected_logprobs
from trialist.objectives import D2PO, Preference
from trialist.objectives.preference_rows import answer_logprobs, preference_row, shares_prompts

V = 37
PAIRS = [
    PreferencePair([3, 4, 5, 6], [7, 8, 9], [7, 11, 12, 13, 2], 0),
    PreferencePair([9], [21, 22, 2], [23, 2], 1),
    PreferencePair([14, 15], [16], [17, 18], 2),
]


def llama(**options: Any) -> Any:
    torch.manual_seed(0)
    sizes = {
        "hidden_size": 16,
        "intermediate_size": 20,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
    }
    return LlamaForCausalLM(LlamaConfig(vocab_size=V, **sizes, **options)).double().eval()


def gpt2() -> Any:
    torch.manual_seed(0)
    return GPT2LMHeadModel(GPT2Config(vocab_size=V, n_embd=16, n_layer=2, n_head=4, n_positions=32)).double().eval()


def decoder(kind: str = "full_attention") -> Any:
    model = ModularDecoderForCausalLM(
        ModularDecoderConfig(
            vocab_size=V, hidden_size=16, intermediate_size=20, num_hidden_layers=2, num_attention_heads=4,
            layer_types=[kind] * 2,
        )
    )  # fmt: skip
    initialize_(model, 0)
    return model.double().eval()


def mistral(window: int | None) -> Any:
    torch.manual_seed(0)
    sizes = {
        "hidden_size": 16,
        "intermediate_size": 20,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
    }
    return MistralForCausalLM(MistralConfig(vocab_size=V, sliding_window=window, **sizes)).double().eval()


def mamba() -> Any:
    torch.manual_seed(0)
    config = MambaConfig(vocab_size=V, hidden_size=16, num_hidden_layers=2, state_size=4)
    return MambaForCausalLM(config).double().eval()


def batch(order: list[int] | None = None, left: bool = False) -> dict[str, Tensor]:
    rows = [preference_row(PAIRS[index]) for index in order or range(3)]
    made = stack_or_pad(rows)
    made.pop("attention_mask", None)
    if left:
        keep = (made["segments"] == 0).long().argsort(dim=-1, stable=True, descending=True)
        made = {name: tensor.gather(1, keep) for name, tensor in made.items()}
    return made


def naive(model: nn.Module, pair: PreferencePair) -> list[float]:
    """From the model's own logits, one sequence at a time, token by token."""
    found = []
    for answer in (pair.chosen, pair.rejected):
        ids = [*pair.prompt, *answer]
        log_p = model(input_ids=torch.tensor([ids])).logits[0].log_softmax(-1)
        found += [float(log_p[place - 1, ids[place]]) for place in range(len(pair.prompt), len(ids))]
    return found


@pytest.mark.parametrize("share_prompt", [False, True], ids=["two sequences", "one sequence"])
@pytest.mark.parametrize("left", [False, True], ids=["right", "left"])
@pytest.mark.parametrize("make", [llama, gpt2, decoder, lambda: llama(attn_implementation="eager")],
                         ids=["llama", "gpt2", "decoder", "eager"])  # fmt: skip
def test_answers_score_as_token_by_token_from_the_logits(make: Any, left: bool, share_prompt: bool) -> None:
    model, rows = make().requires_grad_(False), batch(left=left)
    with torch.no_grad():
        found = answer_logprobs(model, rows["input_ids"], rows["segments"], share_prompt=share_prompt)
    answers = rows["segments"] > 1
    assert not found[~answers].any()
    for row, pair in enumerate(PAIRS):
        torch.testing.assert_close(found[row][answers[row]].tolist(), naive(model, pair), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("make", [llama, gpt2, decoder])
def test_loss_and_gradient_from_one_sequence_are_those_from_two(make: Any) -> None:
    rows = batch()
    rows["ref_logprobs"] = -2 * torch.rand(rows["input_ids"].shape, dtype=torch.float64)
    results = []
    for share_prompt in (False, True):
        model = make()
        loss, stats = D2PO(gamma=0.9, share_prompt=share_prompt)(model, rows)
        loss.backward()
        results.append((loss, stats, {name: p.grad for name, p in model.named_parameters()}))
    for first, second in zip(*results, strict=True):
        torch.testing.assert_close(first, second, rtol=1e-5, atol=1e-8)  # rotary angles and norms are float32 in Llama


@pytest.mark.parametrize(
    "make", [llama, gpt2, decoder, lambda: mistral(None)], ids=["llama", "gpt2", "decoder", "mistral"]
)
def test_models_that_take_a_mask_of_their_own_share_prompts(make: Any) -> None:
    with torch.no_grad():
        assert shares_prompts(make(), 0, torch.device("cpu"))


@pytest.mark.parametrize(
    "make", [mamba, lambda: mistral(4), lambda: decoder("min_gru")], ids=["mamba", "window", "min_gru"]
)
def test_recurrent_and_windowed_models_do_not_share_prompts(make: Any) -> None:
    with torch.no_grad():
        assert not shares_prompts(make(), 0, torch.device("cpu"))


def test_the_rejected_answer_sees_nothing_of_the_chosen_one() -> None:
    model, rows = llama(), batch()
    changed = {**rows, "input_ids": torch.where(rows["segments"] == 2, 30, rows["input_ids"])}
    with torch.no_grad():
        before, after = (answer_logprobs(model, **columns, share_prompt=True) for columns in (rows, changed))
    rejected = rows["segments"] == 3
    assert torch.equal(before[rejected], after[rejected])
    assert not torch.equal(before, after)


def test_pairs_in_a_batch_do_not_touch_each_other() -> None:
    model, rows, alone = llama(), batch(), batch([1])
    with torch.no_grad():
        found = answer_logprobs(model, rows["input_ids"], rows["segments"])[1]
        one = answer_logprobs(model, alone["input_ids"], alone["segments"])[0]
    torch.testing.assert_close(found[: len(one)], one)


def test_a_mask_of_four_dimensions_scores_like_the_same_mask_of_two() -> None:
    model = llama()
    ids = torch.arange(2, 12).view(2, 5)
    plain = torch.tensor([[1] * 5, [1, 1, 1, 0, 0]])
    whole = (torch.ones(5, 5).tril().bool() & plain.bool()[:, None]) | torch.eye(5).bool()
    scored = plain.clone()
    with torch.no_grad():
        wanted = selected_logprobs(model, ids, plain, scored)
        found = selected_logprobs(model, ids, whole[:, None], scored)
    torch.testing.assert_close(found, wanted)


@pytest.mark.parametrize(("drop", "words"), [("segments", "'segments'"), ("ref_logprobs", "'ref_logprobs'")])
def test_a_missing_column_is_named(drop: str, words: str) -> None:
    rows = {**batch(), "ref_logprobs": torch.zeros(batch()["input_ids"].shape)}
    del rows[drop]
    with pytest.raises(ValueError, match=f"needs the column {words}"):
        Preference()(llama(), rows)


def test_a_pair_without_a_prompt_is_named_by_its_row() -> None:
    rows = batch()
    rows["segments"][1][rows["segments"][1] == 1] = 0
    with pytest.raises(ValueError, match="row 1: its prompt has no token"):
        answer_logprobs(llama(), rows["input_ids"], rows["segments"])


def test_the_objective_without_a_reference_needs_no_column() -> None:
    loss, stats = Preference("simpo")(llama(), batch())
    assert loss.isfinite()
    assert int(stats["weight"]) == int(Preference().weight(batch())) == 3
