"""Checkpoints as the official code packs them, written here by the rule of its layout, byte by byte."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import save_file
from transformers import LlamaConfig

from trialist.models import get_precision, set_precision
from trialist.weights.nested import import_any_precision
from trialist.weights.nested.any_precision import official_codes

from .conftest import llama


def official_row(bits: list[int]) -> list[int]:
    """One plane of a row as little-endian int32: eight weights a byte, the first highest, bytes moved within blocks of 128."""
    packed = [sum(bits[8 * i + n] << (7 - n) for n in range(8)) for i in range(len(bits) // 8)]
    moved = [0] * len(packed)
    for block in range(0, len(packed), 128):
        size = min(128, len(packed) - block)
        threads = size // 4
        for i in range(size):
            moved[block + 4 * (i % threads) + ((i // threads) ^ 3)] = packed[block + i]
    return [int.from_bytes(bytes(moved[n : n + 4]), "little", signed=True) for n in range(0, len(moved), 4)]


def official_planes(codes: torch.Tensor, P: int) -> torch.Tensor:
    planes = [[official_row([(int(c) >> (P - 1 - p)) & 1 for c in row]) for row in codes] for p in range(P)]
    return torch.tensor(planes, dtype=torch.int32)


@pytest.mark.parametrize("K", [32, 96, 1024, 1376, 2048 + 64])
def test_codes_are_read_out_of_the_shuffled_bytes(K):
    codes = torch.randint(0, 8, (2, K), generator=torch.Generator().manual_seed(K), dtype=torch.uint8)
    assert torch.equal(official_codes(official_planes(codes, 3)), codes)


def test_a_byte_stands_where_the_rule_puts_it():
    codes = torch.zeros(1, 1024, dtype=torch.uint8)
    codes[0, 8 * 33 + 2] = 1  # byte 33: thread 1, second of its four, so place 4 + (1 xor 3) = 6
    raw = official_planes(codes, 1).view(torch.uint8).flatten()
    assert raw.nonzero().flatten().tolist() == [6]
    assert int(raw[6]) == 1 << 5
    assert torch.equal(official_codes(official_planes(codes, 1)), codes)


@pytest.fixture
def packed(tmp_path):
    """A folder as the official code writes it, and the matrices that its rule reads at 3 bits."""
    model = llama(hidden_size=32, intermediate_size=64, head_dim=8, num_attention_heads=4)
    state, expected = {}, {}
    generator = torch.Generator().manual_seed(0)
    for name, tensor in model.state_dict().items():
        if tensor.dim() < 2 or "embed" in name or "lm_head" in name:
            state[name] = tensor.clone()
            continue
        stem = name.removesuffix(".weight")
        codes = torch.randint(0, 16, tensor.shape, generator=generator, dtype=torch.uint8)
        state[f"{stem}.qweight"] = official_planes(codes, 4)
        for b in (3, 4):
            state[f"{stem}.lut{b}"] = torch.randn(len(tensor), 1 << b, generator=generator).half()
        table = state[f"{stem}.lut3"]
        expected[stem] = torch.tensor([[float(table[r, c >> 1]) for c in row] for r, row in enumerate(codes.tolist())])
    folder = tmp_path / "official"
    folder.mkdir()
    save_file(state, folder / "model.safetensors")
    config: LlamaConfig = model.config
    anyprec = {"seed_precision": 3, "parent_precision": 4}
    (folder / "config.json").write_text(
        json.dumps({**config.to_dict(), "architectures": ["LlamaForCausalLM"], "anyprec": anyprec})
    )
    return folder, expected


def test_an_official_checkpoint_becomes_a_model_that_reads_the_same_matrices(packed, tmp_path):
    from transformers import AutoModelForCausalLM

    folder, expected = packed
    model = import_any_precision(folder, tmp_path / "ours")
    assert get_precision(model) == 4
    set_precision(model, 3)
    for name, matrix in expected.items():
        assert torch.equal(model.get_submodule(name).dequantize(), matrix)
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "ours")
    set_precision(again, 3)
    ids = torch.arange(9)[None]
    assert torch.equal(again(ids).logits, model(ids).logits)


def test_folders_that_hold_no_such_checkpoint_are_refused(packed, tmp_path):
    folder, _ = packed
    with pytest.raises(FileNotFoundError, match=r"has no config\.json"):
        import_any_precision(tmp_path)
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(FileNotFoundError, match=r"pytorch_model\.bin would be unpickled"):
        import_any_precision(folder)
    save_file(
        {"a.qweight": torch.zeros(3, 2, 4, dtype=torch.int32), "a.lut3": torch.zeros(2, 4).half()},
        folder / "x.safetensors",
    )
    with pytest.raises(ValueError, match=r"a: qweight torch\.int32 \(3, 2, 4\) and tables \[\(2, 4\)\] do not fit"):
        import_any_precision(folder)
    save_file({"a.weight": torch.zeros(2)}, folder / "x.safetensors")
    with pytest.raises(ValueError, match="no tensor is called qweight"):
        import_any_precision(folder, tmp_path / "nothing")
    assert not (tmp_path / "nothing").exists()
