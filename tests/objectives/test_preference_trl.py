"""The losses of TRL's own DPOTrainer on a tiny model, against ours."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from trialist.data.collation import stack_or_pad
from trialist.data.preferences import encode_preferences
from trialist.data.tokenizers import bpe_tokenizer
from trialist.objectives import Preference
from trialist.objectives.preference_rows import answer_logprobs, preference_row
from trialist.training import adapt_dpo_trainer, preference_trl

trl = pytest.importorskip("trl", reason="the extra `trl` is not installed")

ROWS = [
    {"prompt": "the c", "chosen": "at sat, the dog ate", "rejected": "ow"},
    {"prompt": "the dog", "chosen": " ate", "rejected": " sat, the cat sat, the cat"},
    {"prompt": "the", "chosen": " cow sat", "rejected": " x sat"},
]


def model(seed: int) -> Any:
    torch.manual_seed(seed)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    return LlamaForCausalLM(LlamaConfig(vocab_size=290, initializer_range=0.3, **sizes)).eval()


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    made = bpe_tokenizer(["the cat sat, the dog ate"] * 20, 290, cache=False)
    made.split_special_tokens = False  # TRL writes the end of sequence as text
    return made


@pytest.fixture(scope="module")
def theirs(tokenizer: Any, tmp_path_factory: pytest.TempPathFactory) -> Any:
    from datasets import Dataset

    arguments = trl.DPOConfig(
        output_dir=str(tmp_path_factory.mktemp("trl")), report_to="none", use_cpu=True, bf16=False,
        gradient_checkpointing=False, disable_tqdm=True, per_device_train_batch_size=3,
    )  # fmt: skip
    return trl.DPOTrainer(
        model(0), ref_model=model(1), args=arguments, train_dataset=Dataset.from_list(ROWS), processing_class=tokenizer
    )


def ours(tokenizer: Any, objective: Preference) -> torch.Tensor:
    pairs, _ = encode_preferences(ROWS, tokenizer, max_length=50)
    batch = stack_or_pad([preference_row(pair) for pair in pairs])
    with torch.no_grad():
        batch["ref_logprobs"] = answer_logprobs(model(1), batch["input_ids"], batch["segments"])
        loss, stats = objective(model(0), batch)
    return loss / stats["weight"]


def test_tokens_are_those_of_trl(theirs: Any, tokenizer: Any) -> None:
    pairs, _ = encode_preferences(ROWS, tokenizer, max_length=50)
    found = [(row["prompt_ids"], row["chosen_ids"], row["rejected_ids"]) for row in theirs.train_dataset]
    assert [(pair.prompt, pair.chosen, pair.rejected) for pair in pairs] == found


@pytest.mark.parametrize("share_prompt", [False, True], ids=["two sequences", "one sequence"])
@pytest.mark.parametrize(
    ("settings", "objective"),
    [
        ({"loss_types": ["sigmoid"], "beta": 0.3, "ld_alpha": None}, {"method": "dpo", "beta": 0.3}),
        ({"loss_types": ["sigmoid"], "beta": 0.3, "ld_alpha": None}, {"method": "d2po", "beta": 0.3, "gamma": 1.0}),
        ({"loss_types": ["sigmoid_norm"], "beta": 5.0, "ld_alpha": None}, {"method": "dpo-norm"}),
        ({"loss_types": ["sigmoid"], "beta": 0.2, "ld_alpha": 0.35}, {"method": "ld-dpo", "beta": 0.2, "alpha": 0.35}),
    ],
    ids=["sigmoid", "gamma 1", "sigmoid_norm", "ld_alpha"],
)
def test_losses_are_those_of_trl(
    theirs: Any, tokenizer: Any, settings: dict[str, Any], objective: dict[str, Any], share_prompt: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    for name, value in settings.items():
        monkeypatch.setattr(theirs, name, value)
    inputs = theirs.data_collator(list(theirs.train_dataset))
    with torch.no_grad():
        wanted = theirs.compute_loss(theirs.model, inputs)
    found = ours(tokenizer, Preference(**objective, share_prompt=share_prompt))
    assert abs(float(wanted) - 0.69) > 0.01  # policy and reference differ
    torch.testing.assert_close(found, wanted, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize(("gamma", "start"), [(1.0, 0), (0.9, 0), (0.9, 1)])
def test_the_adapted_trainer_of_trl_computes_our_loss(
    theirs: Any, tokenizer: Any, gamma: float, start: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in {"loss_types": ["sigmoid"], "beta": 0.3, "ld_alpha": None}.items():
        monkeypatch.setattr(theirs, name, value)
    inputs = theirs.data_collator(list(theirs.train_dataset))
    with torch.no_grad():
        before = theirs.compute_loss(theirs.model, inputs)
        undo = adapt_dpo_trainer(theirs, gamma=gamma, exponent_start=start)
        wanted = theirs.compute_loss(theirs.model, inputs)
        undo()
        after = theirs.compute_loss(theirs.model, inputs)
    found = ours(tokenizer, Preference("d2po", beta=0.3, gamma=gamma, exponent_start=start))
    torch.testing.assert_close(found, wanted, atol=1e-6, rtol=1e-6)
    assert torch.equal(before, after)
    assert (float((before - wanted).abs()) > 1e-3) == (gamma < 1)


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("precompute_ref_logps", True, "precompute_ref_log_probs keeps sums"),
        ("loss_types", ["sigmoid", "sft"], "loss_type 'sft' does not go with D2PO"),
        ("loss_types", ["sigmoid_norm"], "loss_type 'sigmoid_norm'"),
        ("ld_alpha", 0.5, "ld_alpha does not go"),
        ("use_weighting", True, "use_weighting does not go"),
        ("f_divergence_type", "forward_kl", "f_divergence_type 'forward_kl' does not go"),
    ],
)
def test_what_weighted_log_probabilities_would_spoil_is_refused(
    theirs: Any, name: str, value: Any, words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(theirs, name, value)
    with pytest.raises(ValueError, match=words):
        adapt_dpo_trainer(theirs)


def test_a_gamma_out_of_range_is_refused(theirs: Any) -> None:
    with pytest.raises(ValueError, match=r"gamma must be in \(0, 1\]"):
        adapt_dpo_trainer(theirs, gamma=0.0)


def test_another_release_of_trl_is_refused(theirs: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(preference_trl, "version", lambda _: "1.17.0")
    with pytest.raises(ValueError, match=r"TRL 1.17.0 is installed, and 1.16 is what can be adapted"):
        adapt_dpo_trainer(theirs)


def test_a_trainer_is_adapted_once_until_that_is_undone(theirs: Any) -> None:
    undo = adapt_dpo_trainer(theirs)
    with pytest.raises(ValueError, match="adapted already, and would be weighted twice"):
        adapt_dpo_trainer(theirs)
    undo()
    adapt_dpo_trainer(theirs)()


def test_a_call_that_asks_for_no_log_probabilities_is_left_alone(theirs: Any) -> None:
    ids = torch.tensor([[4, 5, 6]])
    undo = adapt_dpo_trainer(theirs, gamma=0.5)
    with torch.no_grad():
        adapted = theirs.model(input_ids=ids).logits
        undo()
        assert torch.equal(adapted, theirs.model(input_ids=ids).logits)
