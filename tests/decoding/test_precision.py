"""The precision of a nested model as a generation option."""

from __future__ import annotations

import pytest
import torch
import transformers

from trialist.decoding import Precision, generate, prepare
from trialist.decoding.precision.flags import PrecisionFlags
from trialist.models import NestedQuantConfig, get_precision, initialize_, precision
from trialist.weights.nested import quantize_nested

from ..models.conftest import FAMILIES, GREEDY, sharpen

PROMPT = torch.tensor([[0, 0, 5, 9, 11], [7, 3, 8, 4, 6]])
INPUTS = {"input_ids": PROMPT, "attention_mask": (PROMPT != 0).long()}


@pytest.fixture(scope="module")
def dense():
    model = transformers.AutoModelForCausalLM.from_config(FAMILIES["llama"]())
    initialize_(model, 0)
    sharpen(model)
    return model.eval()


@pytest.fixture(scope="module")
def nested():
    model = transformers.AutoModelForCausalLM.from_config(FAMILIES["llama"]())
    initialize_(model, 0)
    sharpen(model)
    quantize_nested(model, NestedQuantConfig(sensitivity="none"))
    return model.eval()


@pytest.mark.parametrize(
    "more",
    [
        {},
        {"do_sample": True, "top_k": 5},
        {"num_beams": 3},
        {"num_return_sequences": 2, "do_sample": True},
        {"use_cache": False},
    ],
    ids=str,
)
def test_every_way_to_generate_runs_at_the_precision_and_leaves_the_model_as_it_was(nested, more):
    options = {**GREEDY, **INPUTS, **more}
    torch.manual_seed(3)
    found = generate(nested, [Precision(2)], **options)
    assert get_precision(nested) == 4
    torch.manual_seed(3)
    with precision(nested, 2):
        assert torch.equal(found, nested.generate(**options))
    torch.manual_seed(3)
    assert not torch.equal(found, nested.generate(**options))


def test_an_assistant_keeps_its_own_precision(nested, dense):
    found = generate(nested, [Precision(3)], PROMPT[1:], assistant_model=dense, **GREEDY)
    assert torch.equal(found, generate(nested, [Precision(3)], PROMPT[1:], **GREEDY))


def test_without_bits_the_arguments_stay_as_they_are(nested, dense):
    for model in (nested, dense):
        assert prepare(model, [Precision()], INPUTS) == INPUTS


def test_a_generation_that_fails_leaves_the_model_as_it_was(nested):
    def fail(*_):
        raise OSError

    with pytest.raises(OSError):
        generate(nested, [Precision(2)], **INPUTS, **GREEDY, logits_processor=[fail])
    assert get_precision(nested) == 4


def test_models_and_bits_that_do_not_go_together_are_refused_before_anything_runs(nested, dense):
    with pytest.raises(ValueError, match="trialist apply quantize"):
        prepare(dense, [Precision(3)], INPUTS)
    with pytest.raises(ValueError, match="cannot be read at 8 bits; they can at 2, 3 or 4"):
        prepare(nested, [Precision(8)], INPUTS)
    with pytest.raises(ValueError, match="both decide the precision of the weights"):
        prepare(nested, [Precision(3), Precision(2)], INPUTS)


def test_the_flag_gives_the_option_and_its_name_stands_in_errors(nested, dense):
    assert PrecisionFlags().options(dense, None, []) == ()
    assert PrecisionFlags(bits=3).options(nested, None, []) == (Precision(3),)
    with pytest.raises(ValueError, match=r"--bits 8: .* 2, 3 or 4"):
        PrecisionFlags(bits=8).options(nested, None, [])
    with pytest.raises(ValueError, match=r"--bits 3: .* apply quantize"):
        PrecisionFlags(bits=3).options(dense, None, [])
