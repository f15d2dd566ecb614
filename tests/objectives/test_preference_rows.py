"""Pairs in rows: the answers' log-probabilities from two sequences, from one, and the objective on a model."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import (
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    GPT2Config,
    GPT2LMHeadModel,
    GPTNeoConfig,
    GPTNeoForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MambaConfig,
    MambaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
)

from trialist.data.collation import stack_or_pad
from trialist.data.preferences import PreferencePair
from trialist.models import ModularDecoderConfig, ModularDecoderForCausalLM, initialize_
from trialist.models.scoring import selected_logprobs
from trialist.objectives import D2PO, Preference
from trialist.objectives.preference_rows import (
    answer_logprobs,
    packs_sequences,
    preference_row,
    shares_prompts,
    sharing_cost,
)

V = 37
PAIRS = [
    PreferencePair([3, 4, 5, 6], [7, 8, 9], [7, 11, 12, 13, 2], 0),
    PreferencePair([9], [21, 22, 2], [23, 2], 1),
    PreferencePair([14, 15], [16], [17, 18], 2),
]


SIZES: dict[str, Any] = {
    "hidden_size": 16,
    "intermediate_size": 20,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}


def llama(**options: Any) -> Any:
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(vocab_size=V, **SIZES, **options)).double().eval()


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
    return MistralForCausalLM(MistralConfig(vocab_size=V, sliding_window=window, **SIZES)).double().eval()


def gpt_neo() -> Any:
    torch.manual_seed(0)
    config = GPTNeoConfig(
        vocab_size=V, hidden_size=16, num_layers=2, num_heads=4, window_size=16, max_position_embeddings=64,
        attention_types=[[["global", "local"], 1]], bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    return GPTNeoForCausalLM(config).double().eval()


def gemma3() -> Any:
    """Its configuration keeps that of the language model inside."""
    torch.manual_seed(0)
    text = {
        **SIZES, "vocab_size": 300, "head_dim": 4, "sliding_window": 16,
        "layer_types": ["sliding_attention", "full_attention"],
    }  # fmt: skip
    seen = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = Gemma3Config(
        text_config=text, vision_config={**seen, "image_size": 28, "patch_size": 14}, mm_tokens_per_image=1,
        image_token_index=299, boi_token_index=297, eoi_token_index=298,
    )  # fmt: skip
    return Gemma3ForConditionalGeneration(config).double().eval()


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


SHARING = {"llama": llama, "gpt2": gpt2, "decoder": decoder, "eager": lambda: llama(attn_implementation="eager")}
APART = {"window": lambda: mistral(4), "mamba": mamba, "min_gru": lambda: decoder("min_gru"), "gpt-neo": gpt_neo}


@pytest.mark.parametrize(
    ("make", "share_prompt"),
    [
        *(pytest.param(make, share, id=f"{name}-{'one' if share else 'two'}")
          for name, make in SHARING.items() for share in (False, True)),
        *(pytest.param(make, False, id=f"{name}-two") for name, make in APART.items()),
    ],
)  # fmt: skip
@pytest.mark.parametrize("left", [False, True], ids=["right", "left"])
def test_answers_score_as_token_by_token_from_the_logits(make: Any, left: bool, share_prompt: bool) -> None:
    model, rows = make().requires_grad_(False), batch(left=left)
    with torch.no_grad():
        found = answer_logprobs(model, rows["input_ids"], rows["segments"], share_prompt=share_prompt)
    answers = rows["segments"] > 1
    assert not found[~answers].any()
    for row, pair in enumerate(PAIRS):
        tolerance = 1e-6 if make is mamba else 1e-9  # its own logits are float32
        torch.testing.assert_close(
            found[row][answers[row]].tolist(), naive(model, pair), rtol=tolerance, atol=tolerance
        )


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
    assert shares_prompts(make())


@pytest.mark.parametrize("make", [*APART.values(), gemma3], ids=[*APART, "gemma3"])
def test_recurrent_and_windowed_models_do_not_share_prompts(make: Any) -> None:
    model = make()
    assert not shares_prompts(model)
    rows = batch()
    with pytest.raises(ValueError, match=f"share_prompt: {type(model).__name__} cannot compute a prompt once"):
        Preference("simpo", share_prompt=True)(model, rows)


def test_a_model_that_looks_at_no_other_token_cannot_tell_and_does_not_share() -> None:
    model = llama()
    for layer in model.model.layers:
        nn.init.zeros_(layer.self_attn.o_proj.weight)
    assert not shares_prompts(model)


def test_trying_a_model_out_leaves_its_modes_and_the_random_numbers_alone() -> None:
    model = GPT2LMHeadModel(GPT2Config(vocab_size=V, n_embd=16, n_layer=2, n_head=4, n_positions=32)).train()
    model.transformer.h[1].eval()
    modes = [module.training for module in model.modules()]
    torch.manual_seed(4)
    before = torch.get_rng_state()
    assert shares_prompts(model)
    assert packs_sequences(model)
    assert [module.training for module in model.modules()] == modes
    assert torch.equal(torch.get_rng_state(), before)
    assert all(parameter.grad is None for parameter in model.parameters())


@pytest.mark.parametrize(
    ("make", "share_prompt", "slots"),
    [
        (llama, True, 2 * 13),  # 4 + 3 + 5 + 1 tokens; 1 + 3 + 2 + 1 and 2 + 1 + 2 + 1 behind each other
        (llama, False, 4 * 9),  # 9; 7; 4 + 4; 3 + 3
        (lambda: mistral(4), False, 4 * 9),
        (mamba, False, 6 * 9),
    ],
    ids=["one sequence", "two sequences", "window", "mamba"],
)
def test_sequences_are_packed_into_rows_as_long_as_the_longest_where_the_model_can(
    make: Any, share_prompt: bool, slots: int
) -> None:
    model, rows, shapes = make(), batch(), []
    answer_logprobs(model, **rows, share_prompt=share_prompt)  # what is tried out once is not counted
    model.base_model.register_forward_pre_hook(
        lambda module, inputs, named: shapes.append(named["input_ids"].numel()), with_kwargs=True
    )
    answer_logprobs(model, **rows, share_prompt=share_prompt)
    assert shapes == [slots]


def row(prompt: int, chosen: int, rejected: int) -> dict[str, Any]:
    return preference_row(PreferencePair([3] * prompt, [4] * chosen, [5] * rejected, 0))


def test_operations_of_sharing_are_those_counted_by_hand() -> None:
    layer = 16 * 16 + 2 * 8 * 16 + 16 * 16 + 3 * 16 * 20  # q, k and v of half the width, o, gate, up and down
    whole, seen = 2 * 2 * layer, 2 * 4 * 16  # of a token, and of a token that it is held against, in two layers
    pairs = [row(2, 3, 4), row(6, 1, 1), row(3, 2, 2)]

    def cost(*sequences: tuple[int, int]) -> int:
        return sum(tokens * (whole + seen * longest) for tokens, longest in sequences)

    alone = cost((10, 10), (9, 9), (8, 8)) / cost((11, 6), (14, 7), (10, 5))
    assert sharing_cost(llama(), pairs) == pytest.approx(alone, rel=1e-12)
    together = cost((19, 10), (8, 8)) / cost((25, 7), (10, 5))
    assert sharing_cost(llama(), pairs, 2) == pytest.approx(together, rel=1e-12)


def test_sharing_pays_for_long_prompts_and_not_for_long_answers() -> None:
    assert sharing_cost(llama(), [row(256, 48, 40)]) < 0.7
    assert sharing_cost(llama(), [row(32, 900, 800)]) > 1.3


def test_tokens_are_counted_where_operations_cannot_be() -> None:
    model = MixtralForCausalLM(MixtralConfig(vocab_size=V, num_local_experts=2, num_experts_per_tok=1, **SIZES))
    assert sharing_cost(model, [row(2, 3, 4)]) == pytest.approx(10 / 11)


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


def test_a_policy_that_is_no_number_gives_a_loss_that_is_none_which_training_loops_report() -> None:
    model, rows = llama(), batch()
    with torch.no_grad():
        rows["ref_logprobs"] = answer_logprobs(model, **rows)
        model.get_output_embeddings().weight[3] = torch.nan
    assert Preference()(model, rows)[0].isnan()
    rows["ref_logprobs"][1, 2] = torch.inf
    with pytest.raises(ValueError, match="example 1: log-probabilities of its chosen answer under the reference"):
        Preference()(model, rows)


def test_the_objective_without_a_reference_needs_no_column() -> None:
    loss, stats = Preference("simpo")(llama(), batch())
    assert loss.isfinite()
    assert int(stats["weight"]) == int(Preference().weight(batch())) == 3
