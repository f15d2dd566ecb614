from __future__ import annotations

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from trialist.data.packing import pack, shuffle_tokens

BOS = 10


def documents(lengths: list[int]) -> list[np.ndarray]:
    draw = np.random.default_rng(0)
    return [draw.integers(0, 10, length) for length in lengths]


def test_two_documents_are_packed_as_worked_by_hand():
    packed = pack([[1, 2, 3, 4, 5], [6, 7]], 4, bos_id=BOS)
    assert packed.input_ids.tolist() == [[BOS, 1, 2, 3], [3, 4, 5, BOS], [BOS, 6, 7, BOS]]
    assert packed.position_ids.tolist() == [[0, 1, 2, 3], [0, 1, 2, 0], [0, 1, 2, 0]]
    assert packed.labels.tolist() == [[-100, 1, 2, 3], [-100, 4, 5, -100], [-100, 6, 7, -100]]
    assert packed.documents.tolist() == [[0, 0, 0, 0], [0, 0, 0, -1], [1, 1, 1, -1]]
    assert packed.scored == 7


@pytest.mark.parametrize("length", [2, 3, 7, 64])
@pytest.mark.parametrize("bos_id", [BOS, None])
def test_every_token_is_scored_exactly_once_in_order(length: int, bos_id: int | None):
    lists = documents([5, 0, 1, 17, 2, 40, 3])
    packed = pack(lists, length, bos_id=bos_id)
    scored = packed.labels[packed.labels != -100].tolist()
    skipped = 0 if bos_id is not None else 1
    assert scored == [token for tokens in lists for token in tokens[skipped:]]
    owners = packed.documents[packed.labels != -100].tolist()
    assert owners == [index for index, tokens in enumerate(lists) for _ in tokens[skipped:]]
    assert packed.scored == len(scored)


def test_positions_restart_at_each_piece_and_padding_is_never_scored():
    packed = pack(documents([5, 9, 30, 2]), 8, bos_id=BOS)
    covered = torch.zeros(packed.input_ids.numel(), dtype=torch.bool)
    for _, offset, size in packed.pieces:
        assert packed.position_ids.reshape(-1)[offset : offset + size].tolist() == list(range(size))
        assert offset // 8 == (offset + size - 1) // 8
        covered[offset : offset + size] = True
    assert torch.all(packed.labels.reshape(-1)[~covered] == -100)
    assert torch.all(packed.documents.reshape(-1)[~covered] == -1)


def test_rows_give_the_same_tensors_as_the_whole():
    packed = pack(documents([5, 9, 30, 2]), 6, bos_id=BOS)
    rows = packed.rows(torch.tensor([3, 0, 3]))
    for name in ("input_ids", "position_ids", "labels"):
        assert torch.equal(rows[name], getattr(packed, name)[[3, 0, 3]])
        assert rows[name].dtype == torch.int64
        assert torch.equal(packed.rows(slice(1, 3))[name], getattr(packed, name)[1:3])


def test_large_token_ids_are_stored_without_loss():
    packed = pack([[3, 70_000, 299_999]], 8, bos_id=300_000)
    assert packed.input_ids[0, :4].tolist() == [300_000, 3, 70_000, 299_999]


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_no_piece_sees_another(attention: str):
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=11,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        attn_implementation=attention,
    )
    model = LlamaForCausalLM(config).double().eval()
    packed = pack(documents([4, 9, 2, 13, 1]), 9, bos_id=BOS)
    with torch.no_grad():
        together = model(input_ids=packed.input_ids, position_ids=packed.position_ids, use_cache=False).logits
        flat = together.reshape(-1, 11)
        for _, offset, size in packed.pieces:
            tokens = packed.input_ids.reshape(-1)[offset : offset + size]
            alone = model(input_ids=tokens[None], use_cache=False).logits[0]
            torch.testing.assert_close(flat[offset : offset + size], alone, rtol=1e-9, atol=1e-12)


def test_nothing_to_predict_and_too_short_rows_are_refused():
    with pytest.raises(ValueError, match="nothing to pack"):
        pack([[], []], 8, bos_id=BOS)
    with pytest.raises(ValueError, match="nothing to pack"):
        pack([[3]], 8, bos_id=None)
    with pytest.raises(ValueError, match="length must be at least 2"):
        pack([[3]], 1, bos_id=BOS)


def test_shuffling_keeps_each_documents_tokens_and_changes_their_order():
    lists = documents([50, 3, 1, 0, 41])
    shuffled = shuffle_tokens(lists, seed=4)
    assert [sorted(tokens.tolist()) for tokens in shuffled] == [sorted(tokens.tolist()) for tokens in lists]
    assert shuffled[0].tolist() != lists[0].tolist()
    assert shuffle_tokens(lists, seed=5)[0].tolist() != shuffled[0].tolist()


def test_a_shuffled_document_does_not_depend_on_its_neighbours_or_its_type():
    lists = documents([50, 30, 41])
    whole = shuffle_tokens(lists, seed=4)
    assert shuffle_tokens([lists[2].astype(np.uint8).tolist()], seed=4)[0].tolist() == whole[2].tolist()


def test_shuffling_leaves_no_trace_of_order():
    tokens = np.arange(20)
    places = np.array([shuffle_tokens([tokens], seed)[0] for seed in range(600)])
    mean = places.mean(axis=0)  # standard error of each: 5.77 / sqrt(600) = 0.24
    assert np.abs(mean - 9.5).max() < 1.1
