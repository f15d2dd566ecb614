"""What a cache under budgets keeps to take its latest tokens back: `crop`, copies, and the memory of it."""

from __future__ import annotations

import copy
import dataclasses
import gc
import weakref

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache

from tests.models.conftest import GREEDY
from trialist.models import cache_bytes, enable_eviction, enable_selective_attention
from trialist.models.eviction import attention, cache
from trialist.models.selective_attention import mixer

TECHNIQUES = {
    "penalty": lambda model: enable_selective_attention(model, selector_head=2, budgets=5),
    "no budget": lambda model: enable_selective_attention(model, selector_head=2),
    "recency": lambda model: enable_eviction(model, "recency", 5, sinks=1),
    "h2o": lambda model: enable_eviction(model, "h2o", 5),
    "h2o beside the penalty": lambda model: enable_eviction(enable_selective_attention(model), "h2o", [5, 30]),
}
techniques = pytest.mark.parametrize("technique", TECHNIQUES.values(), ids=TECHNIQUES)


@pytest.fixture
def window(monkeypatch) -> int:
    """A window so short that small calls are long ones."""
    for module in (attention, cache, mixer):
        monkeypatch.setattr(module, "UNDO_WINDOW", 4)
    return 4


def tokens(B: int = 2, T: int = 16, seed: int = 3) -> Tensor:
    return torch.randint(3, 37, (B, T), generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def fed(model, ids: Tensor, pieces: list[int], mask: Tensor | None = None, held=None):  # type: ignore[no-untyped-def]
    """The cache after `ids` were fed in pieces, and the logits of the last piece."""
    held = DynamicCache(config=model.config) if held is None else held
    logits, start = None, held.get_seq_length()
    for piece in pieces:
        given = {} if mask is None else {"attention_mask": mask[:, : start + piece]}
        logits = model(ids[:, start : start + piece], past_key_values=held, **given).logits
        start += piece
    return held, logits


@techniques
@pytest.mark.parametrize("pieces", [[11], [7, 4], [2, 9], [5, 3, 2, 1]], ids=str)
@pytest.mark.parametrize("padded", [False, True])
def test_after_the_end_of_a_call_of_any_length_was_taken_back_decoding_goes_on_as_a_full_pass(
    family, window: int, technique, pieces: list[int], padded: bool
) -> None:
    model, ids = technique(family("llama").double()), tokens()
    mask = torch.ones_like(ids)
    mask[1, : 3 if padded else 0] = 0
    positions = torch.arange(16).expand(2, 16)  # as the model counts them without being told
    for removed in range(1, min(window, pieces[-1]) + 1):
        held, _ = fed(model, ids, pieces, mask)
        held.crop(-removed)
        assert held.get_seq_length() == 11 - removed
        other = torch.cat([ids[:, : 11 - removed], tokens(2, 5, seed=8)], 1)
        held, logits = fed(model, other, [3, 2], mask, held)
        given = {"attention_mask": mask[:, : other.shape[1]], "position_ids": positions[:, : other.shape[1]]}
        with torch.no_grad():
            expected = model(other, use_cache=False, **given).logits[:, -2:]
        torch.testing.assert_close(logits, expected, rtol=1e-9, atol=1e-9)


@techniques
def test_what_lies_before_the_window_of_a_long_call_cannot_be_taken_back(family, window: int, technique) -> None:
    model, ids = technique(family("llama")), tokens()
    held, _ = fed(model, ids, [11])
    if held.layers[0].scores == () and held.layers[0].columns is None:
        pytest.skip("nothing was scored or evicted")
    with pytest.raises(RuntimeError, match=f"take back its last {window} tokens, 6 were asked for"):
        held.layers[0].crop(-6)
    held.layers[0].crop(-window)


@pytest.mark.parametrize("T", [80, 200])
@pytest.mark.parametrize("name", ["penalty", "recency", "h2o", "h2o beside the penalty"])
def test_prompts_longer_than_the_window_are_decoded_with_lookup_and_assistant_as_without(
    family, name: str, T: int
) -> None:
    model = TECHNIQUES[name](family("llama", max_position_embeddings=300).double())
    ids, options = tokens(1, T), {**GREEDY, "max_new_tokens": 6}
    expected = model.generate(ids, **options)
    assert torch.equal(model.generate(ids, prompt_lookup_num_tokens=4, max_matching_ngram_size=1, **options), expected)
    assistant = family("llama", max_position_embeddings=300).double()
    assert torch.equal(model.generate(ids, assistant_model=assistant, **options), expected)
    assert torch.equal(model.generate(ids, use_cache=False, **options), expected)


@techniques
def test_a_copy_is_cropped_while_its_original_goes_on(family, technique) -> None:
    model, ids = technique(family("llama").double()), tokens()
    original, _ = fed(model, ids, [9])
    twin = copy.deepcopy(original)
    fed(model, ids, [5, 1], held=original)
    twin.crop(-3)
    expected, _ = fed(model, ids, [6])
    for one, other in zip(fed(model, ids, [3, 2], held=twin), fed(model, ids, [3, 2], held=expected)):
        if isinstance(one, Tensor):
            torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-9)


@techniques
def test_memory_of_a_cache_is_free_as_soon_as_it_is_gone(family, technique) -> None:
    model = technique(family("llama"))
    gc.disable()
    try:
        held, _ = fed(model, tokens(), [9, 2])
        layer = weakref.ref(held.layers[0])
        del held
        assert layer() is None
    finally:
        gc.enable()


def reachable(value, seen: set[int], storages: dict[int, int]) -> int:  # type: ignore[no-untyped-def]
    """Bytes of all tensors that can be reached from a value, through closures and attributes of any kind."""
    if id(value) in seen or isinstance(value, type | str | int | float | torch.dtype | torch.device):
        return sum(storages.values())
    seen.add(id(value))
    if isinstance(value, Tensor):
        storages[value.untyped_storage().data_ptr()] = value.untyped_storage().nbytes()
    else:
        closure = [cell.cell_contents for cell in getattr(value, "__closure__", None) or ()]
        parts = (
            list(value.values()) if isinstance(value, dict) else list(value) if isinstance(value, list | tuple) else []
        )
        for part in [*closure, *parts, *vars(value).values()] if hasattr(value, "__dict__") else [*closure, *parts]:
            reachable(part, seen, storages)
    return sum(storages.values())


@techniques
@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_every_tensor_that_a_cache_holds_on_to_is_counted(family, window: int, technique, implementation: str) -> None:
    model, ids = technique(family("llama", implementation)), tokens()
    mask = torch.ones_like(ids)
    mask[1, :3] = 0
    for pieces in ([3], [11], [9, 1, 1], [2, 5, 4]):
        held, _ = fed(model, ids, pieces, mask)
        assert cache_bytes(held) == reachable(held.layers, set(), {})


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_what_a_cache_without_budgets_keeps_of_a_long_prompt_grows_with_its_length_alone(
    family, implementation: str
) -> None:
    model = enable_selective_attention(family("llama", implementation, max_position_embeddings=700))
    sizes = []
    for T in (160, 320, 640):
        mask = torch.ones(1, T, dtype=torch.long)
        mask[:, :3] = 0
        sizes.append(cache_bytes(fed(model, tokens(1, T), [T], mask)[0]))
    assert sizes[2] - sizes[1] == 2 * (sizes[1] - sizes[0])


@techniques
def test_a_cache_moved_away_and_back_decodes_and_is_cropped_as_before(family, technique) -> None:
    model, ids = technique(family("llama").double()), tokens()
    here, away = (fed(model, ids, [9])[0] for _ in range(2))
    for layer in away.layers:
        layer.offload()
        layer.prefetch()
    for held in (here, away):
        held.crop(-2)
    expected, logits = (fed(model, ids, [3, 1], held=held)[1] for held in (here, away))
    assert torch.equal(logits, expected)


def test_what_is_kept_to_take_back_is_plain_data(family) -> None:
    held, _ = fed(TECHNIQUES["h2o"](family("llama")), tokens(), [9, 3])
    assert all(dataclasses.is_dataclass(call) for layer in held.layers for call in layer.calls)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["penalty", "h2o"])
def test_a_compiled_model_decodes_with_a_cache_as_an_uncompiled_one(family, name: str) -> None:
    model, ids = TECHNIQUES[name](family("llama").double()), tokens()
    _, expected = fed(model, ids, [9, 1, 1, 1])
    torch.compiler.reset()
    model.forward = torch.compile(model.forward, backend="eager")
    torch.testing.assert_close(fed(model, ids, [9, 1, 1, 1])[1], expected, rtol=1e-9, atol=1e-9)
