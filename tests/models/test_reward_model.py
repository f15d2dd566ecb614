from __future__ import annotations

import copy

import pytest
import torch
from transformers import (
    AutoModelForSequenceClassification,
    BertConfig,
    BertForMaskedLM,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MambaConfig,
    MambaForCausalLM,
    RobertaConfig,
    RobertaForMaskedLM,
    T5Config,
    T5ForConditionalGeneration,
)

from trialist.models.reward_model import _passes, load_reward_model, reward_adapters, sequence_rewards, sequence_scores

SIZES = {"vocab_size": 41, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
FAMILIES = {
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**SIZES, initializer_range=0.3)),
    "gpt2": lambda: GPT2LMHeadModel(GPT2Config(vocab_size=41, n_embd=16, n_layer=2, n_head=2, initializer_range=0.3)),
    "gemma3": lambda: Gemma3ForCausalLM(Gemma3TextConfig(**SIZES, num_key_value_heads=1, head_dim=8)),
    "bert": lambda: BertForMaskedLM(BertConfig(**SIZES)),
    "roberta": lambda: RobertaForMaskedLM(RobertaConfig(**SIZES, pad_token_id=0)),
}
SEQUENCES = [[1, 2, 3], [4, 5, 6, 7, 8, 9, 10], [11], [1, 2, 3, 12, 13]]


@pytest.fixture
def saved(tmp_path):
    def save(family: str = "llama") -> str:
        torch.manual_seed(0)
        FAMILIES[family]().save_pretrained(tmp_path / family)
        return str(tmp_path / family)

    return save


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_gives_a_sequence_the_reward_that_it_has_alone(saved, family):
    model, new = load_reward_model(saved(family), pad_token_id=0)
    assert new
    together = sequence_rewards(model, SEQUENCES, pad_token_id=0, batch=3)
    with torch.no_grad():
        alone = [model(torch.tensor([ids])).logits.item() for ids in SEQUENCES]
    torch.testing.assert_close(together, torch.tensor(alone), rtol=1e-4, atol=1e-5)
    assert len(set(together.tolist())) == len(SEQUENCES)


def test_the_seed_draws_the_head_and_nothing_else(saved):
    folder = saved()
    one, again, other = (load_reward_model(folder, pad_token_id=0, seed=seed)[0].state_dict() for seed in (1, 1, 2))
    assert all(torch.equal(one[name], again[name]) for name in one)
    assert [name for name in one if not torch.equal(one[name], other[name])] == ["score.weight"]


@pytest.mark.parametrize("family", ["llama", "roberta"])
def test_the_head_of_a_bfloat16_model_is_float32_and_computes_so_under_autocast(saved, family):
    model, _ = load_reward_model(saved(family), dtype="bfloat16", pad_token_id=0)
    head = model.score if family == "llama" else model.classifier
    assert {parameter.dtype for parameter in head.parameters()} == {torch.float32}
    assert {parameter.dtype for parameter in model.base_model.parameters()} == {torch.bfloat16}
    hidden = torch.randn(3, 5, 16).bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        found = copy.deepcopy(head)(hidden)
        rewards = sequence_scores(model, torch.tensor([[1, 2, 3], [3, 2, 1]]), torch.ones(2, 3))
    plain = head.weight if family == "llama" else None
    assert found.dtype == rewards.dtype == torch.float32
    if plain is not None:
        torch.testing.assert_close(found, hidden.float() @ plain.T, rtol=1e-6, atol=1e-6)
    assert (rewards != rewards.bfloat16().float()).any()  # more than 8 bits


def test_adapters_on_a_bfloat16_model_train_the_whole_head_by_steps_that_bfloat16_would_lose(saved):
    folder = saved()
    moved = {}
    for dtype in ("float32", "bfloat16"):
        model, _ = load_reward_model(folder, dtype=dtype, pad_token_id=0)
        trained = reward_adapters(model, 2)
        assert {p.dtype for p in trained.parameters() if p.requires_grad} == {torch.float32}
        head = next(p for name, p in trained.named_parameters() if "score.modules_to_save" in name)
        start = head.detach().clone()
        optimizer = torch.optim.AdamW([head], lr=1e-5, weight_decay=0.0)
        sequence_scores(trained, torch.tensor([[1, 2, 3], [3, 2, 1]]), torch.ones(2, 3))[0].backward()
        optimizer.step()
        moved[dtype] = (head - start).detach()
    assert (moved["bfloat16"] != 0).all()
    torch.testing.assert_close(moved["bfloat16"].abs(), moved["float32"].abs(), rtol=1e-2, atol=1e-8)


def test_an_adapter_is_merged_into_the_model_that_it_names(saved, tmp_path):
    model, _ = load_reward_model(saved(), pad_token_id=0)
    trained = reward_adapters(model, 2)
    with torch.no_grad():
        for parameter in trained.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.linspace(-0.5, 0.5, parameter.numel()).view_as(parameter))
    expected = sequence_rewards(trained, SEQUENCES, pad_token_id=0)
    trained.save_pretrained(tmp_path / "adapter")
    loaded, new = load_reward_model(str(tmp_path / "adapter"), pad_token_id=0, seed=5)
    assert not new
    assert not any("lora" in name for name in loaded.state_dict())
    torch.testing.assert_close(sequence_rewards(loaded, SEQUENCES, pad_token_id=0), expected, rtol=1e-4, atol=1e-5)
    loaded.save_pretrained(tmp_path / "merged")
    anyone = AutoModelForSequenceClassification.from_pretrained(tmp_path / "merged")
    torch.testing.assert_close(sequence_rewards(anyone, SEQUENCES, pad_token_id=0), expected, rtol=1e-4, atol=1e-5)


def test_an_adapter_of_another_model_is_refused(saved, tmp_path):
    reward_adapters(load_reward_model(saved(), pad_token_id=0)[0], 2).save_pretrained(tmp_path / "adapter")
    larger = LlamaForCausalLM(LlamaConfig(**{**SIZES, "hidden_size": 24}))
    larger.save_pretrained(tmp_path / "llama")
    with pytest.raises(ValueError, match=r"could not be put on a LlamaForSequenceClassification.*another model"):
        load_reward_model(str(tmp_path / "adapter"), pad_token_id=0)


def test_models_that_make_no_reward_model_are_refused_in_words(saved, tmp_path):
    sizes = {"vocab_size": 41, "d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 1, "num_heads": 2}
    T5ForConditionalGeneration(T5Config(**sizes)).save_pretrained(tmp_path / "t5")
    with pytest.raises(ValueError, match="t5' has an encoder and a decoder"):
        load_reward_model(str(tmp_path / "t5"), pad_token_id=0)
    MambaForCausalLM(MambaConfig(vocab_size=41, hidden_size=16, num_hidden_layers=1)).save_pretrained(
        tmp_path / "mamba"
    )
    with pytest.raises(ValueError, match="could not be loaded for sequence classification"):
        load_reward_model(str(tmp_path / "mamba"), pad_token_id=0)


def test_sequences_are_cut_into_passes_where_that_saves_tokens():
    assert _passes([1000, 990, 400, 400, 20]) == [slice(0, 2), slice(2, 4), slice(4, 5)]
    assert _passes([60, 50, 40, 10]) == [slice(0, 4)]
    assert _passes([7]) == [slice(0, 1)]


def test_passes_of_like_lengths_change_no_reward_and_no_gradient(saved, monkeypatch):
    from trialist.models import reward_model

    draw = torch.Generator().manual_seed(0)
    ids, mask = (
        torch.randint(1, 41, (5, 60), generator=draw),
        torch.arange(60) < torch.tensor([[60], [9], [57], [8], [31]]),
    )
    found = []
    for price in (10**6, 1):
        monkeypatch.setattr(reward_model, "PASS", price)
        model, _ = load_reward_model(saved(), pad_token_id=0)
        scores = sequence_scores(model, ids, mask.long())
        (scores * torch.arange(1.0, 6.0)).sum().backward()
        found.append((scores.detach(), model.score.weight.grad, model.model.embed_tokens.weight.grad))
    for one, several in zip(*found):
        torch.testing.assert_close(one, several, rtol=1e-4, atol=1e-5)


def test_the_longest_sequences_are_scored_first(saved):
    model, _ = load_reward_model(saved(), pad_token_id=0)
    seen: list[int] = []
    model.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(kwargs["input_ids"].shape[1]), with_kwargs=True
    )
    sequence_rewards(model, [*SEQUENCES, SEQUENCES[0]], pad_token_id=0, batch=1)
    assert seen == [7, 5, 3, 1]
