from __future__ import annotations

import numpy as np
import pytest
import torch
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from trialist.data.collation import pack_rows, stack_or_pad
from trialist.data.packing import pack_whole
from trialist.models.documents import keeps_documents_apart

SIZES = {"vocab_size": 53, "hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 2, "num_attention_heads": 4}


def made(kind: str, attention: str = "eager"):
    torch.manual_seed(0)
    if kind == "llama":
        model = LlamaForCausalLM(LlamaConfig(**SIZES, num_key_value_heads=2, attn_implementation=attention))
    elif kind == "qwen":
        model = Qwen3ForCausalLM(Qwen3Config(**SIZES, num_key_value_heads=2, head_dim=8, attn_implementation=attention))
    elif kind == "gpt2":
        model = GPT2LMHeadModel(
            GPT2Config(vocab_size=53, n_embd=24, n_layer=2, n_head=4, attn_implementation=attention)
        )
    else:
        model = OPTForCausalLM(
            OPTConfig(vocab_size=53, hidden_size=24, ffn_dim=40, num_hidden_layers=2, num_attention_heads=4,
                      word_embed_proj_dim=24, pad_token_id=1)
        )  # fmt: skip
    return model.double().eval()


def examples(lengths):
    draw = np.random.default_rng(0)
    rows = []
    for size in lengths:
        ids = draw.integers(2, 53, size)
        rows.append({"input_ids": ids, "labels": np.where(np.arange(size) < size // 2, -100, ids)})
    return rows


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("kind", ["llama", "qwen", "gpt2"])
@torch.no_grad()
def test_packed_examples_cost_what_each_costs_alone(kind, attention):
    model, rows = made(kind, attention), examples([9, 2, 5, 3, 7, 4])
    batch = pack_rows(rows)
    assert batch["input_ids"].shape == (4, 9)
    logits = model(input_ids=batch["input_ids"], position_ids=batch["position_ids"], use_cache=False).logits[:, :-1]
    together = torch.nn.functional.cross_entropy(logits.transpose(1, 2), batch["labels"][:, 1:], reduction="sum")
    alone = 0.0
    for row in rows:
        ids, labels = torch.tensor(row["input_ids"]), torch.tensor(row["labels"])
        alone += float(torch.nn.functional.cross_entropy(model(ids[None]).logits[0, :-1], labels[1:], reduction="sum"))
    assert float(together) == pytest.approx(alone, rel=1e-9)
    assert keeps_documents_apart(model, 52, torch.device("cpu"))


@torch.no_grad()
def test_a_model_that_counts_positions_itself_is_found_out():
    apart = keeps_documents_apart(made("opt"), 52, torch.device("cpu"))
    model, rows = made("opt"), examples([4, 5])
    packed = pack_rows([{name: np.concatenate([row[name] for row in rows]) for name in rows[0]}])  # one row of both
    positions = torch.tensor([[0, 1, 2, 3, 0, 1, 2, 3, 4]])
    logits = model(input_ids=packed["input_ids"], position_ids=positions, use_cache=False).logits[0, 4:]
    alone = model(torch.tensor(rows[1]["input_ids"])[None]).logits[0]
    assert apart == torch.allclose(logits, alone, atol=1e-9)


class OneRowOnly(LlamaForCausalLM):
    """Reads restarting positions in batches of one row only, as kernels of variable length do."""

    def __init__(self, config):
        super().__init__(config)
        self.model.register_forward_pre_hook(self.forget, with_kwargs=True)

    @staticmethod
    def forget(module, arguments, options):
        return arguments, options | ({"position_ids": None} if len(options["input_ids"]) > 1 else {})


@torch.no_grad()
def test_a_model_that_keeps_apart_one_row_at_a_time_is_found_out():
    model = OneRowOnly(LlamaConfig(**SIZES)).double().eval()
    assert not keeps_documents_apart(model, 52, torch.device("cpu"))


def test_padding_is_worked_by_hand():
    rows = [{"input_ids": [5, 6, 7], "labels": [-100, 6, 7], "id": "a", "weight": 0.5},
            {"input_ids": torch.tensor([8]), "labels": np.array([8]), "id": "b", "weight": 2.0}]  # fmt: skip
    batch = stack_or_pad(rows, pad_token_id=9)
    assert {name: value.tolist() for name, value in batch.items()} == {
        "input_ids": [[5, 6, 7], [8, 9, 9]],
        "labels": [[-100, 6, 7], [8, -100, -100]],
        "weight": [0.5, 2.0],
        "attention_mask": [[1, 1, 1], [1, 0, 0]],
    }


def test_packed_rows_are_stacked_or_padded_without_a_mask():
    rows = [{"input_ids": [5, 6, 7], "position_ids": [0, 1, 0]}, {"input_ids": [8, 9], "position_ids": [0, 1]}]
    assert set(stack_or_pad([rows[0], rows[0]])) == {"input_ids", "position_ids"}
    batch = stack_or_pad(rows)
    assert set(batch) == {"input_ids", "position_ids"}  # a mask would let packed documents see each other
    assert batch["position_ids"].tolist() == [[0, 1, 0], [0, 1, 0]]


def test_rows_that_do_not_fit_together_are_named():
    with pytest.raises(ValueError, match="row 1 of the batch lacks 'labels'"):
        stack_or_pad([{"input_ids": [1], "labels": [1]}, {"input_ids": [1]}])
    with pytest.raises(ValueError, match="column 'image': rows of shapes"):
        stack_or_pad([{"input_ids": [1], "image": [1, 2]}, {"input_ids": [1], "image": [1, 2, 3]}])


def test_whole_examples_are_packed_as_worked_by_hand():
    packed = pack_whole([[1, 2], [3, 4, 5, 6], [7], [8, 9, 10]], 5, counted=[[1, 1], [0, 0, 1, 1], [1], [0, 1, 0]])
    assert packed.input_ids.tolist() == [[1, 2, 8, 9, 10], [3, 4, 5, 6, 7]]
    assert packed.position_ids.tolist() == [[0, 1, 0, 1, 2], [0, 1, 2, 3, 0]]
    assert packed.labels.tolist() == [[-100, 2, -100, 9, -100], [-100, -100, 5, 6, -100]]
    assert packed.documents.tolist() == [[0, 0, 3, 3, 3], [1, 1, 1, 1, 2]]
    assert packed.scored == 4
    assert packed.rows([1])["labels"].tolist() == packed.labels[1:].tolist()


def test_every_example_stays_whole_and_rows_are_well_filled():
    draw = np.random.default_rng(1)
    lists = [draw.integers(0, 70_000, size) for size in draw.integers(1, 40, 300)]
    packed = pack_whole(lists, 40)
    seen = set()
    for index, offset, size in packed.pieces.tolist():
        assert offset // 40 == (offset + size - 1) // 40
        assert packed.input_ids.flatten()[offset : offset + size].tolist() == lists[index].tolist()
        assert packed.position_ids.flatten()[offset : offset + size].tolist() == list(range(size))
        seen.add(index)
    assert seen == set(range(300))
    assert sum(map(len, lists)) / packed.tokens.size > 0.95


@pytest.mark.parametrize(
    ("lists", "counted", "message"),
    [
        ([[1], []], None, "example 1 has 0 tokens"),
        ([[1, 2, 3, 4]], None, "example 0 has 4 tokens; a row takes 1 to 3"),
        ([[1, 2]], [[True]], "one value for each token"),
        ([], None, "nothing to pack"),
    ],
)
def test_examples_that_cannot_be_packed_are_named(lists, counted, message):
    with pytest.raises(ValueError, match=message):
        pack_whole(lists, 3, counted=counted)
