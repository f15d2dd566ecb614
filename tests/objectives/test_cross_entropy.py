from __future__ import annotations

import pytest
import torch
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from trialist.objectives.cross_entropy import CrossEntropy

B, T, V = 3, 7, 29


def llama():
    torch.manual_seed(1)
    sizes = {
        "hidden_size": 16,
        "intermediate_size": 20,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
    }
    return LlamaForCausalLM(LlamaConfig(vocab_size=V, **sizes)).double()


def gpt2():
    torch.manual_seed(1)
    config = GPT2Config(
        vocab_size=V, n_embd=16, n_layer=2, n_head=4, n_positions=T, resid_pdrop=0, embd_pdrop=0, attn_pdrop=0
    )
    return GPT2LMHeadModel(config).double()


def batch(seed=0, sides="right"):
    generator = torch.Generator().manual_seed(seed)
    input_ids = torch.randint(V, (B, T), generator=generator)
    real = torch.arange(T) < torch.tensor([7, 4, 2])[:, None]
    return {"input_ids": input_ids, "attention_mask": (real if sides == "right" else real.flip(1)).long()}


@pytest.mark.parametrize("make", [llama, gpt2])
def test_loss_and_gradients_are_those_of_transformers_for_the_same_labels(make):
    ours, theirs, given = make(), make(), batch()
    given["labels"] = given["input_ids"].masked_fill(given["attention_mask"] == 0, -100)
    given["labels"][0, 2:4] = -100
    loss, stats = CrossEntropy()(ours, given)
    expected = theirs(**given).loss
    assert int(stats["weight"]) == 6 - 2 + 3 + 1
    (loss / stats["weight"]).backward()
    expected.backward()
    torch.testing.assert_close(loss / stats["weight"], expected.double(), rtol=1e-6, atol=0)  # theirs sums in float32
    for (name, a), b in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-5, atol=1e-8, msg=name)


@pytest.mark.parametrize("side", ["left", "right"])
def test_without_labels_every_token_after_a_real_one_counts(side):
    model, given = llama(), batch(sides=side)
    loss, stats = CrossEntropy()(model, given)
    total = 0.0
    for row, mask in zip(given["input_ids"], given["attention_mask"], strict=True):
        alone = row[mask.bool()][None]
        log_probs = model(alone).logits[0, :-1].log_softmax(-1)
        total -= sum(log_probs[t, alone[0, t + 1]].item() for t in range(alone.shape[1] - 1))
    assert int(stats["weight"]) == 6 + 3 + 1
    assert float(loss.detach()) == pytest.approx(total, rel=1e-9)


def test_packed_documents_cost_what_they_cost_alone():
    model = llama()
    documents = [torch.tensor([3, 8, 1, 20]), torch.tensor([5, 2, 2])]
    packed = {"input_ids": torch.cat(documents)[None], "position_ids": torch.tensor([[0, 1, 2, 3, 0, 1, 2]])}
    loss, stats = CrossEntropy()(model, packed)
    alone = [CrossEntropy()(model, {"input_ids": document[None]}) for document in documents]
    assert int(stats["weight"]) == 5 == sum(int(stats["weight"]) for _, stats in alone)
    torch.testing.assert_close(loss, sum(loss for loss, _ in alone))


def test_the_loss_is_a_sum_over_rows():
    model, given = llama(), batch()
    rows = [CrossEntropy()(model, {name: tensor[[row]] for name, tensor in given.items()}) for row in range(B)]
    loss, stats = CrossEntropy()(model, given)
    torch.testing.assert_close(loss, sum(loss for loss, _ in rows))
    assert stats["weight"] == sum(stats["weight"] for _, stats in rows)


def test_a_batch_in_which_nothing_counts_costs_nothing():
    model, given = llama(), batch()
    loss, stats = CrossEntropy()(model, {**given, "labels": torch.full((B, T), -100)})
    loss.backward()
    assert (float(loss.detach()), int(stats["weight"])) == (0.0, 0)
    assert all(parameter.grad is None or not parameter.grad.any() for parameter in model.parameters())


def test_labels_may_differ_from_the_tokens():
    model, given = llama(), batch()
    labels = torch.randint(V, (B, T), generator=torch.Generator().manual_seed(9))
    loss, _ = CrossEntropy()(model, {"input_ids": given["input_ids"], "labels": labels})
    logits = model(given["input_ids"]).logits[:, :-1].flatten(0, 1)
    torch.testing.assert_close(loss, nn.functional.cross_entropy(logits, labels[:, 1:].flatten(), reduction="sum"))


def test_labels_of_another_shape_are_refused():
    with pytest.raises(ValueError, match=r"labels have shape \(3, 6\), input_ids \(3, 7\)"):
        CrossEntropy()(llama(), {**batch(), "labels": torch.zeros(B, T - 1, dtype=torch.long)})
