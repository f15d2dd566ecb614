from __future__ import annotations

import pytest
import torch
import transformers
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

from tests.models.conftest import SIZES, sharpen
from trialist.models import scoring, selected_logprobs
from trialist.models.scoring import Head, _project


def plain_logprobs(model: nn.Module, ids: Tensor, mask: Tensor | None, scored: Tensor) -> tuple[Tensor, Tensor]:
    """Through the model's own full logits."""
    positions = None if mask is None else (mask.cumsum(-1) - 1).clamp(min=0)
    log_p = model(input_ids=ids, attention_mask=mask, position_ids=positions).logits[:, :-1].log_softmax(-1)
    chosen = log_p.gather(-1, ids[:, 1:, None])[..., 0]
    entropy = -(log_p.exp() * log_p).sum(-1)
    return chosen * scored[:, 1:], entropy * scored[:, 1:]


def completion(mask: Tensor) -> Tensor:
    """Scored: the second half of each row, with one hole, nothing in the last row."""
    scored = mask.clone()
    scored[:, :5] = 0
    scored[0, 8] = 0
    scored[2] = 0
    return scored


CONFIGS = {
    "llama": lambda: transformers.LlamaConfig(**SIZES),
    "llama-tied": lambda: transformers.LlamaConfig(**{**SIZES, "tie_word_embeddings": True}),
    "gemma2-softcap": lambda: transformers.Gemma2Config(**SIZES, final_logit_softcapping=3.0),
    "granite-scaled": lambda: transformers.GraniteConfig(**SIZES, logits_scaling=2.5),
    "cohere-scaled": lambda: transformers.CohereConfig(**SIZES, logit_scale=0.3),
    "hyperclovax-multiplied": lambda: transformers.AutoConfig.for_model("hyperclovax", **SIZES, logits_scaling=0.4),
    "falcon-h1-multiplied": lambda: transformers.FalconH1Config(
        **SIZES,
        lm_head_multiplier=0.25,
        mamba_d_ssm=24,
        mamba_n_heads=2,
        mamba_d_head=12,
        mamba_d_state=8,
        mamba_n_groups=1,
        mamba_chunk_size=8,
    ),
    "gpt2": lambda: transformers.GPT2Config(vocab_size=37, n_embd=24, n_layer=2, n_head=6, n_positions=64),
    "opt": lambda: transformers.OPTConfig(
        vocab_size=37, hidden_size=24, ffn_dim=40, num_hidden_layers=2, num_attention_heads=6, word_embed_proj_dim=16
    ),
    "phi-bias": lambda: transformers.PhiConfig(**{**SIZES, "num_key_value_heads": 6}),
}


def build(name: str) -> nn.Module:
    torch.manual_seed(3)
    model = transformers.AutoModelForCausalLM.from_config(CONFIGS[name]()).double().eval()
    sharpen(model, 5.0)
    if getattr(model.get_output_embeddings(), "bias", None) is not None:
        nn.init.normal_(model.get_output_embeddings().bias)
    return model


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("chunk", [4, 4096])
def test_values_and_gradients_equal_those_through_full_logits(padded, name: str, chunk: int) -> None:
    model, (ids, mask) = build(name), padded
    if name.startswith(
        ("gemma2", "falcon")
    ):  # whose eager attention and whose recurrence do not take padding in float64
        mask = torch.ones_like(mask)
    scored = completion(mask)
    weights = torch.randn(3, 10, dtype=torch.float64), torch.randn(3, 10, dtype=torch.float64)
    results = []
    for ours in (True, False):
        model.zero_grad()
        if ours:
            pair = selected_logprobs(model, ids, mask, scored, chunk=chunk, outputs=("log_probs", "entropy"))
        else:
            pair = plain_logprobs(model, ids, mask, scored)
        sum((weight * value).sum() for weight, value in zip(weights, pair)).backward()
        results.append([*pair, *(p.grad for p in model.parameters() if p.grad is not None)])
    assert len(results[0]) == len(results[1])
    for one, other in zip(*results):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-9)


def test_labels_score_their_own_tokens_where_they_are_not_ignored(decoder, padded) -> None:
    model, ids = decoder().double(), padded[0]
    labels = torch.full_like(ids, -100)
    labels[0, 4], labels[2, 10], labels[1, 0] = 9, 5, 7
    log_p = model(ids, use_cache=False).logits.log_softmax(-1)
    expected = torch.zeros(3, 10, dtype=torch.float64)
    expected[0, 3], expected[2, 9] = log_p[0, 3, 9], log_p[2, 9, 5]
    torch.testing.assert_close(selected_logprobs(model, ids, labels=labels), expected)


def test_packed_rows_score_each_document_as_if_it_stood_alone(decoder) -> None:
    model = decoder("selective_attention").double()
    ids = torch.randint(3, 37, (1, 12))
    positions = torch.cat([torch.arange(5), torch.arange(7)])[None]
    labels = ids.clone()
    labels[0, [0, 5]] = -100
    packed = selected_logprobs(model, ids, position_ids=positions, labels=labels)[0]
    assert packed[4] == 0
    torch.testing.assert_close(packed[:4], selected_logprobs(model, ids[:, :5])[0])
    torch.testing.assert_close(packed[5:], selected_logprobs(model, ids[:, 5:])[0])


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_padding_on_the_left_leaves_log_probabilities_unchanged(padded, name: str) -> None:
    model, (ids, mask) = build(name), padded
    together = selected_logprobs(model, ids, mask)[1]
    assert (together[:4] == 0).all()
    torch.testing.assert_close(together[4:], selected_logprobs(model, ids[1:2, 4:])[0])


def test_lora_on_layers_and_head_is_scored_as_the_adapted_model(padded) -> None:
    adapted = get_peft_model(build("llama"), LoraConfig(r=2, target_modules=["q_proj", "lm_head"], lora_alpha=8))
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter)
    adapted.double().eval()
    ids, mask = padded
    gradients = []
    for ours in (True, False):
        adapted.zero_grad()
        both = (
            selected_logprobs(adapted, ids, mask, completion(mask), chunk=4, outputs=("log_probs", "entropy"))
            if ours
            else plain_logprobs(adapted, ids, mask, completion(mask))
        )
        (both[0].sum() + 2 * both[1].sum()).backward()
        gradients.append([*both, *(p.grad for p in adapted.parameters() if p.grad is not None)])
    assert len(gradients[0]) == 2 + 2 * 2 + 2
    for one, other in zip(*gradients):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("softcap", [None, 0.8])
@pytest.mark.parametrize("bias", [False, True])
def test_gradcheck_of_the_projection_in_tiles_that_do_not_divide_the_positions(
    softcap: float | None, bias: bool
) -> None:
    linear = nn.Linear(5, 7, bias=bias, dtype=torch.float64)
    states = torch.randn(5, 5, dtype=torch.float64, requires_grad=True)
    targets = torch.tensor([6, 0, 3, 3, 1])

    def function(states: Tensor, *parameters: Tensor) -> tuple[Tensor, ...]:
        return _project(states, targets, Head(linear, 1.7, softcap), 2, True)

    assert torch.autograd.gradcheck(function, (states, *linear.parameters()))


def test_uniform_logits_give_log_vocabulary_as_entropy(decoder, padded) -> None:
    model = decoder()
    nn.init.zeros_(model.lm_head.weight)
    log_probs, entropy = selected_logprobs(model, padded[0], outputs=("log_probs", "entropy"))
    torch.testing.assert_close(entropy, torch.full((3, 10), 37.0).log())
    torch.testing.assert_close(log_probs, -entropy)


def test_a_batch_without_scored_token_gives_zeros_and_zero_gradients(decoder, padded) -> None:
    model, ids = decoder(), padded[0]
    for _ in range(2):
        values = selected_logprobs(model, ids, completion_mask=torch.zeros_like(ids))
        assert torch.equal(values, torch.zeros(3, 10))
        values.sum().backward()
    assert all(p.grad is None or not p.grad.any() for p in model.parameters())


def test_no_tensor_as_large_as_the_full_logits_is_ever_made(decoder) -> None:
    model = decoder("full_attention", vocab_size=5003)
    ids = torch.randint(3, 5003, (4, 60))
    scored = torch.zeros_like(ids)
    scored[:, 50:] = 1
    largest = 0

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            nonlocal largest
            result = function(*args, **(kwargs or {}))
            for tensor in result if isinstance(result, tuple | list) else [result]:
                if isinstance(tensor, Tensor):
                    largest = max(largest, tensor.numel())
            return result

    selected_logprobs(model, ids)  # the check of a new model is not watched
    model.requires_grad_(False)
    with Watch():
        selected_logprobs(model, ids, completion_mask=scored, chunk=8)
    assert largest < 5003 * 60


def test_low_precision_autocast_gives_float32_near_the_full_precision_values(decoder, padded) -> None:
    model, ids = decoder().train(), padded[0]
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.div_(6)
    exact = selected_logprobs(model, ids)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        values = selected_logprobs(model, ids)
    values.sum().backward()
    assert values.dtype == torch.float32
    torch.testing.assert_close(values, exact, rtol=0.05, atol=0.05)
    assert model.lm_head.weight.grad.dtype == torch.float32


def test_a_model_with_an_unknown_path_to_its_logits_is_refused(decoder, padded) -> None:
    class Doubled(type(decoder())):
        def forward(self, *args, **kwargs):
            output = super().forward(*args, **kwargs)
            output.logits = output.logits * 2
            return output

    model = Doubled(decoder().config)
    with pytest.raises(ValueError, match="in a way that selected_logprobs does not know"):
        selected_logprobs(model, padded[0])


@pytest.mark.parametrize("factor", [1.01, 0.99])
def test_a_scale_that_is_wrong_by_one_in_a_hundred_is_noticed(decoder, padded, factor: float) -> None:
    class Scaled(type(decoder())):
        def forward(self, *args, **kwargs):
            output = super().forward(*args, **kwargs)
            output.logits = output.logits * factor
            return output

    with pytest.raises(ValueError, match="in a way that selected_logprobs does not know"):
        selected_logprobs(Scaled(decoder().config), padded[0])


def test_a_scale_that_a_head_of_zeros_hides_is_not_guessed(padded) -> None:
    model = build("granite-scaled")
    nn.init.zeros_(model.get_output_embeddings().weight)
    with pytest.raises(ValueError, match="scales its logits, and those of the first batch are all 0"):
        selected_logprobs(model, *padded)


@pytest.mark.parametrize("name", ["llama", "granite-scaled", "hyperclovax-multiplied"])
def test_models_in_bfloat16_are_scored_like_their_own_logits(padded, name: str) -> None:
    model = build(name).bfloat16()
    with torch.no_grad():
        values = selected_logprobs(model, *padded)
        expected, _ = plain_logprobs(model.double(), *padded, padded[1])
    torch.testing.assert_close(values[1:], expected[1:].float() * (values[1:] != 0), atol=0.5, rtol=0.05)


def test_tiles_are_larger_where_products_are_fast_against_memory() -> None:
    positions = [scoring._rows_at_once(152_000, 4096, device) for device in ("cpu", "cuda")]
    assert positions == [2**24 // 152_000, 2**26 // 152_000]
    assert scoring._rows_at_once(10**9, 4096, "cpu") == 1
    assert scoring._rows_at_once(100, 4096, "cuda") == 4096


def test_dropout_is_the_same_in_the_check_and_after_it(decoder, padded) -> None:
    results = []
    for _ in range(2):
        model = decoder(attention_dropout=0.4).train()
        torch.manual_seed(1)
        first = selected_logprobs(model, padded[0])
        torch.manual_seed(1)
        results.append((first, selected_logprobs(model, padded[0])))
    assert torch.equal(*results[0])
    assert model in scoring._VERIFIED


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"completion_mask": torch.ones(3, 11), "labels": torch.ones(3, 11)}, "give one of them"),
        ({"completion_mask": torch.ones(3, 10)}, "completion_mask has shape \\(3, 10\\), input_ids \\(3, 11\\)"),
        ({"completion_mask": torch.ones(3, 11)}, "row 1: a token is scored where attention_mask marks padding"),
        ({"outputs": ("perplexity",)}, "choose from"),
        ({"chunk": 0}, "chunk is 0"),
    ],
)
def test_wrong_arguments_are_refused_with_the_way_out(decoder, padded, arguments: dict, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        selected_logprobs(decoder(), padded[0], padded[1], **arguments)


def test_a_model_without_head_is_refused(decoder, padded) -> None:
    with pytest.raises(ValueError, match="no language-model head"):
        selected_logprobs(decoder().model, padded[0])
