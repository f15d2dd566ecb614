"""Decoders of recurrent layers in the hands of peft, trl, lm-eval and transformers."""

from __future__ import annotations

import itertools

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn

from tests.models.conftest import GREEDY, SIZES
from trialist.data.tokenizers import byte_tokenizer
from trialist.models import ModularDecoderConfig, ModularDecoderForCausalLM, ModularDecoderForSequenceClassification
from trialist.models.decoder import ModularDecoderModel

MIXTURES = {
    "min_gru": ["min_gru", "min_gru"],
    "min_lstm-gru": ["min_lstm", "gru"],
    "with-attention": ["conv_attention", "min_gru", "full_attention"],
}
mixture = pytest.mark.parametrize("names", MIXTURES.values(), ids=MIXTURES)


def of_bytes(*names: str) -> ModularDecoderForCausalLM:
    tokenizer = byte_tokenizer()
    sizes = {**SIZES, "vocab_size": len(tokenizer), "pad_token_id": tokenizer.pad_token_id}
    config = ModularDecoderConfig(**{**sizes, "layer_types": list(names), "num_hidden_layers": len(names)})
    torch.manual_seed(0)
    return ModularDecoderForCausalLM(config)


@mixture
def test_an_adapter_is_saved_loaded_and_merged_with_the_same_logits(
    decoder, padded, tmp_path, names: list[str]
) -> None:
    adapted = get_peft_model(decoder(*names), LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM"))
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.1, generator=torch.Generator().manual_seed(len(name)))
    adapted.save_pretrained(tmp_path)
    adapted.eval()
    expected, plain = adapted(input_ids=padded[0]).logits, decoder(*names)(padded[0]).logits
    assert (expected - plain).abs().max() > 0.1
    loaded = PeftModel.from_pretrained(decoder(*names), str(tmp_path)).eval()
    torch.testing.assert_close(loaded(input_ids=padded[0]).logits, expected, rtol=1e-4, atol=1e-4)
    merged = loaded.merge_and_unload()
    torch.testing.assert_close(merged(padded[0]).logits, expected, rtol=1e-4, atol=1e-3)


def test_the_sft_trainer_of_trl_packs_documents_that_do_not_see_each_other(tmp_path, monkeypatch) -> None:
    trl = pytest.importorskip("trl", reason="the extra `trl` is not installed")
    datasets = pytest.importorskip("datasets")
    model, given, forward = of_bytes("min_gru", "full_attention"), [], ModularDecoderModel.forward

    def spy(self, input_ids=None, attention_mask=None, position_ids=None, **further):
        given.append((input_ids, attention_mask, position_ids))
        return forward(self, input_ids=input_ids, attention_mask=attention_mask, position_ids=position_ids, **further)

    monkeypatch.setattr(ModularDecoderModel, "forward", spy)
    rows = datasets.Dataset.from_dict({"text": ["hello world", "abc", "a longer text here to pack"] * 3})
    arguments = trl.SFTConfig(
        output_dir=str(tmp_path), max_steps=1, per_device_train_batch_size=2, packing=True, max_length=32, report_to="none",
        use_cpu=True, bf16=False, save_strategy="no", disable_tqdm=True, learning_rate=0.0,
    )  # fmt: skip
    trl.SFTTrainer(model, args=arguments, train_dataset=rows, processing_class=byte_tokenizer()).train()
    ids, mask, positions = given[0]
    starts = [*(positions[0] == 0).nonzero()[:, 0].tolist(), ids.shape[1]]
    assert mask is None
    assert len(starts) > 3
    model.eval()
    packed = model(ids, position_ids=positions).logits
    for start, end in itertools.pairwise(starts):
        torch.testing.assert_close(packed[:, start:end], model(ids[:, start:end]).logits, rtol=1e-4, atol=1e-5)


@mixture
def test_lm_eval_sums_the_log_probabilities_of_a_continuation(names: list[str]) -> None:
    pytest.importorskip("lm_eval", reason="the extra `eval` is not installed")
    from lm_eval.models.huggingface import HFLM

    model, tokenizer = of_bytes(*names).eval(), byte_tokenizer()
    prompts = [tokenizer(text)["input_ids"] for text in ("the cat", "a")]
    ends = [tokenizer(text)["input_ids"] for text in (" sat", " dog ran")]
    requests = [(("", ""), prompt, end) for prompt, end in zip(prompts, ends)]
    reference = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=2)
    found = reference._loglikelihood_tokens(requests, disable_tqdm=True)
    for (total, _), prompt, end in zip(found, prompts, ends):
        log_p = model(torch.tensor([prompt + end])).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
        expected = log_p.gather(1, torch.tensor(end)[:, None]).sum()
        assert total == pytest.approx(float(expected), abs=1e-3)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("names", [["min_gru", "min_lstm"], ["gru", "min_gru"]])
def test_weights_in_half_precision_decode_the_same_tokens_with_and_without_cache(decoder, padded, dtype, names) -> None:
    model, (ids, mask) = decoder(*names).to(dtype), padded
    uncached = model.generate(ids, attention_mask=mask, use_cache=False, **GREEDY)
    assert torch.equal(model.generate(ids, attention_mask=mask, **GREEDY), uncached)


@pytest.mark.slow
@mixture
def test_a_compiled_model_decodes_the_tokens_of_the_plain_one_with_a_cache(decoder, padded, names: list[str]) -> None:
    model, compiled, (ids, mask) = decoder(*names), decoder(*names), padded
    compiled.forward = torch.compile(compiled.forward, backend="eager")
    found = compiled.generate(ids, attention_mask=mask, **GREEDY)
    assert torch.equal(found, model.generate(ids, attention_mask=mask, **GREEDY))


@mixture
@pytest.mark.parametrize("side", ["left", "right"])
def test_a_classifier_scores_the_last_token_whatever_the_padding(padded, names: list[str], side: str) -> None:
    config = ModularDecoderConfig(**{**SIZES, "layer_types": names, "num_hidden_layers": len(names), "num_labels": 3})
    torch.manual_seed(0)
    model = ModularDecoderForSequenceClassification(config).eval()
    nn.init.normal_(model.score.weight)
    ids, mask = padded if side == "left" else (padded[0].flip(1), padded[1].flip(1))
    document = ids[1:2, 4:] if side == "left" else ids[1:2, :7]
    together = model(ids, attention_mask=mask).logits[1]
    torch.testing.assert_close(together, model(document).logits[0], rtol=1e-4, atol=1e-5)


def test_a_recurrent_model_cannot_draft_for_another_because_it_cannot_take_tokens_back(decoder, padded) -> None:
    model, drafter = decoder("full_attention", "full_attention"), decoder("min_gru", "min_gru", seed=1)
    with pytest.raises(RuntimeError, match="decode without assistant"):
        model.generate(padded[0][:1], assistant_model=drafter, **GREEDY)
