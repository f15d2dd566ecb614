"""PEER, swapped into a model of transformers or inside the modular decoder, in the hands of what trains, decodes and scores."""

from __future__ import annotations

import copy

import pytest
import torch

from tests.models.conftest import EXPERTS, GREEDY
from tests.models.recurrent import recurrent
from trialist.models import PEER, peer_metrics, swap_ffn

KINDS = ["swapped", "decoder", "in the loop"]
kinds = pytest.mark.parametrize("kind", KINDS)


@pytest.fixture
def model(family, decoder):
    def build(kind: str):
        if kind == "swapped":
            torch.manual_seed(3)
            built = swap_ffn(family("llama"), [1], **EXPERTS)
        elif kind == "decoder":
            built = decoder("full_attention", "full_attention", ffn_types=["peer", "swiglu"], peer=EXPERTS)
        else:
            ffn = ["swiglu", "peer", "peer", "swiglu"]
            built = recurrent(decoder, changes={"ffn_types": ffn, "peer": EXPERTS}, mean_recurrence=3)
        torch.manual_seed(4)
        for module in built.modules():
            if isinstance(module, PEER):
                module.query_norm.running_mean.normal_()  # as after training
        return built.eval()

    return build


def statistics(model) -> list[torch.Tensor]:
    return [buffer for name, buffer in model.named_buffers() if "running" in name]


@kinds
@pytest.mark.parametrize("options", [{"num_beams": 3}, {"do_sample": True}, {"cache_implementation": "static"}])
def test_decoding_with_a_cache_gives_the_tokens_of_full_passes(model, padded, kind: str, options: dict) -> None:
    if kind == "in the loop" and "cache_implementation" in options:
        pytest.skip("recurrent depth arranges its own cache")
    peer, (ids, mask) = model(kind), padded
    written = []
    for given in (options, {**options, "cache_implementation": None, "use_cache": False}):
        torch.manual_seed(5)
        written.append(peer.generate(ids, attention_mask=mask, **{**GREEDY, **given}))
    assert torch.equal(*written)


@kinds
def test_speculation_writes_what_plain_decoding_writes(model, padded, kind: str) -> None:
    peer, ids = model(kind), padded[0][:1]
    expected = peer.generate(ids, **GREEDY)
    assert torch.equal(peer.generate(ids, prompt_lookup_num_tokens=3, max_matching_ngram_size=1, **GREEDY), expected)
    assert torch.equal(peer.generate(ids, assistant_model=copy.deepcopy(peer), **GREEDY), expected)


@kinds
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])
@torch.no_grad()
def test_weights_of_half_precision_decode_close_to_float32(model, padded, kind: str, dtype: torch.dtype) -> None:
    peer, (ids, mask) = model(kind), padded
    exact = peer(ids, attention_mask=mask).logits
    half = peer.to(dtype)
    similar = torch.nn.functional.cosine_similarity(exact, half(ids, attention_mask=mask).logits.float(), dim=-1)
    assert similar[mask.bool()].min() > 0.9
    assert half.generate(ids, attention_mask=mask, **GREEDY).shape == (3, 20)


@kinds
def test_weights_of_bfloat16_train(model, padded, kind: str) -> None:
    half, (ids, mask) = model(kind).to(torch.bfloat16), padded
    half.train()(ids, attention_mask=mask, labels=ids).loss.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in half.parameters())


def test_checkpointing_in_the_loop_changes_no_gradient_and_counts_each_step_once(model, padded) -> None:
    ids, mask = padded
    found = []
    for checkpointing in (False, True):
        peer = model("in the loop").train()
        if checkpointing:
            peer.gradient_checkpointing_enable()
        peer(ids, attention_mask=mask, labels=ids, num_steps=(1, 2)).loss.backward()
        found.append([*(p.grad for p in peer.parameters()), *statistics(peer)])
    torch.testing.assert_close(*found)


def test_each_step_of_the_loop_has_metrics_of_its_own(model, padded) -> None:
    peer, (ids, mask) = model("in the loop"), padded
    batch = {"input_ids": ids, "attention_mask": mask, "num_steps": 2}
    layer = "model.layers.core.blocks.1.ffn"
    steps = peer_metrics(peer, [batch, batch], by_call=True)
    assert set(steps) == {f"model.layers.core.blocks.{block}.ffn[{step}]" for block in (0, 1) for step in (0, 1)}
    alone = peer_metrics(peer, [{**batch, "num_steps": 1}])[layer]
    assert steps[f"{layer}[0]"] == pytest.approx(alone)
    assert steps[f"{layer}[1]"] != pytest.approx(alone)
    joined = peer_metrics(peer, [batch])[layer]
    assert max(steps[f"{layer}[{step}]"]["usage"] for step in (0, 1)) <= joined["usage"]


@pytest.mark.slow
@pytest.mark.parametrize("checkpointing", [False, True], ids=["plain", "checkpointing"])
@pytest.mark.parametrize("whole", [True, False], ids=["model", "blocks"])
def test_a_compiled_swapped_model_trains_as_the_plain_one(model, padded, checkpointing: bool, whole: bool) -> None:
    ids, mask = padded
    found = []
    for compiled in (False, True):
        peer = model("swapped").train()
        if checkpointing:
            peer.gradient_checkpointing_enable()
        if compiled and whole:
            peer.compile(backend="aot_eager")
        elif compiled:
            for block in peer.model.layers:
                block.compile(backend="aot_eager")
        loss = peer(ids, attention_mask=mask, labels=ids).loss
        loss.backward()
        found.append([loss, *(p.grad for p in peer.parameters()), *statistics(peer)])
    torch._dynamo.reset()
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-5)


@pytest.fixture
def tokenizer():
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import WhitespaceSplit
    from transformers import PreTrainedTokenizerFast

    words = {"<pad>": 0, "<bos>": 1, "<eos>": 2, **{f"w{n}": n for n in range(3, 37)}}
    plain = Tokenizer(WordLevel(words, unk_token="<pad>"))
    plain.pre_tokenizer = WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=plain, pad_token="<pad>", bos_token="<bos>", eos_token="<eos>")


@kinds
def test_a_step_of_the_sft_trainer_moves_experts_and_queries(model, tokenizer, tmp_path, kind: str) -> None:
    datasets, trl = pytest.importorskip("datasets"), pytest.importorskip("trl")
    rows = datasets.Dataset.from_list([{"text": "w3 w4 w5 w6"}, {"text": "w7 w8"}, {"text": "w9 w10 w11"}])
    peer = model(kind)
    before = {name: tensor.clone() for name, tensor in peer.state_dict().items()}
    arguments = trl.SFTConfig(
        output_dir=str(tmp_path), max_steps=1, per_device_train_batch_size=3, learning_rate=1e-3, report_to=[],
        use_cpu=True, bf16=False, save_strategy="no", gradient_checkpointing=True, disable_tqdm=True, max_length=16,
        weight_decay=0.0,
    )  # fmt: skip
    trl.SFTTrainer(peer, arguments, train_dataset=rows, processing_class=tokenizer).train()
    after = peer.state_dict()
    for part in ("keys.0", "up.0", "query_proj.weight", "query_norm.running_mean"):
        names = [name for name in before if name.endswith(part)]
        assert names
        assert not any(torch.equal(before[name], after[name]) for name in names), part
    assert all(tensor.isfinite().all() for tensor in after.values())


@kinds
@torch.no_grad()
def test_lm_eval_scores_a_continuation_by_the_sum_of_its_log_probabilities(model, tokenizer, kind: str) -> None:
    huggingface = pytest.importorskip("lm_eval.models.huggingface")
    peer = model(kind)
    scorer = huggingface.HFLM(pretrained=peer, tokenizer=tokenizer, batch_size=2, max_length=32)
    context, parts = [3, 4, 5], ([6, 7], [8], [9, 10, 11])
    scored = scorer._loglikelihood_tokens([(("", ""), context, part) for part in parts], disable_tqdm=True)
    for (total, _), part in zip(scored, parts, strict=True):
        logits = peer(torch.tensor([context + part])).logits[0].log_softmax(-1)
        expected = sum(float(logits[len(context) - 1 + n, token]) for n, token in enumerate(part))
        assert total == pytest.approx(expected, abs=1e-3)
