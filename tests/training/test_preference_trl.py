"""Our tokens and our training beside `trl.DPOTrainer`: conversations, LoRA without a second model, whole trajectories."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig
from transformers import LlamaConfig, LlamaForCausalLM, TrainingArguments

from trialist.data.collation import stack_or_pad
from trialist.data.preferences import encode_preferences, read_preferences
from trialist.data.tokenizers import bpe_tokenizer
from trialist.objectives import Preference
from trialist.objectives.preference_rows import answer_logprobs, preference_row
from trialist.training import ObjectiveTrainer, adapt_dpo_trainer, reference_logprobs

trl = pytest.importorskip("trl", reason="the extra `trl` is not installed")

CHATML = (
    "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}{{ eos_token }}\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
ROWS = [
    {"prompt": "the c", "chosen": "at sat, the dog ate", "rejected": "ow"},
    {"prompt": "the dog", "chosen": " ate", "rejected": " sat, the cat sat, the cat"},
    {"prompt": "the", "chosen": " cow sat", "rejected": " x sat"},
]


def model(seed: int = 0) -> Any:
    torch.manual_seed(seed)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    return LlamaForCausalLM(LlamaConfig(vocab_size=290, initializer_range=0.3, **sizes)).eval()


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    made = bpe_tokenizer(["the cat sat, the dog ate"] * 20, 290, cache=False)
    made.split_special_tokens = False  # TRL writes the end of sequence as text
    made.chat_template = CHATML
    return made


def arguments(folder: Path, **options: Any) -> dict[str, Any]:
    return {"output_dir": str(folder), "report_to": "none", "use_cpu": True, "bf16": False, "gradient_checkpointing": False,
            "disable_tqdm": True, "per_device_train_batch_size": len(ROWS), **options}  # fmt: skip


def theirs(tokenizer: Any, rows: list[dict[str, Any]], folder: Path, **options: Any) -> Any:
    from datasets import Dataset

    given = {name: options.pop(name) for name in ("ref_model", "peft_config") if name in options}
    return trl.DPOTrainer(
        model(), args=trl.DPOConfig(**arguments(folder, **options)), train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer, **given,
    )  # fmt: skip


def user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def assistant(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}


TALKS = {
    "one turn": {"prompt": [user("the cat")], "chosen": [assistant("sat")], "rejected": [assistant("ate")]},
    "no prompt": {"chosen": [user("the"), assistant("cat")], "rejected": [user("the"), assistant("dog")]},
    "several": {
        "prompt": [user("the dog")],
        "chosen": [assistant("sat"), user("the cat"), assistant("ate")],
        "rejected": [assistant("sat, sat")],
    },
}


@pytest.mark.parametrize("name", TALKS)
def test_tokens_of_conversations_are_those_of_trl_but_for_what_stands_behind_the_end(
    tokenizer: Any, tmp_path: Path, name: str
) -> None:
    """TRL learns the template's line break behind the end of the turn as well."""
    [pair], _ = encode_preferences(read_preferences([TALKS[name]]), tokenizer, max_length=90)
    [wanted] = theirs(tokenizer, [TALKS[name]], tmp_path, ref_model=model(1)).train_dataset
    behind = tokenizer("\n", add_special_tokens=False)["input_ids"]
    assert pair.prompt == wanted["prompt_ids"]
    assert [*pair.chosen, *behind] == wanted["chosen_ids"]
    assert [*pair.rejected, *behind] == wanted["rejected_ids"]


def test_the_adapted_trainer_computes_our_loss_with_lora_and_no_second_model(tokenizer: Any, tmp_path: Path) -> None:
    lora = LoraConfig(r=2, target_modules="all-linear")
    trainer = theirs(tokenizer, ROWS, tmp_path, beta=0.3, peft_config=lora)
    torch.manual_seed(4)
    for name, parameter in trainer.model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter.data)
    undo = adapt_dpo_trainer(trainer, gamma=0.9)
    trainer.model.eval()
    with torch.no_grad():
        wanted = trainer.compute_loss(trainer.model, trainer.data_collator(list(trainer.train_dataset)))
    undo()
    batch = stack_or_pad([preference_row(pair) for pair in encode_preferences(ROWS, tokenizer, max_length=50)[0]])
    with torch.no_grad():
        with trainer.model.disable_adapter():
            batch["ref_logprobs"] = answer_logprobs(trainer.model, batch["input_ids"], batch["segments"])
        loss, stats = Preference("d2po", beta=0.3, gamma=0.9)(trainer.model, batch)
    assert abs(float(wanted) - 0.69) > 0.01  # policy and reference differ
    torch.testing.assert_close(loss / stats["weight"], wanted, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("gamma", [1.0, 0.9])
def test_our_training_goes_the_way_of_the_adapted_trainer(tokenizer: Any, tmp_path: Path, gamma: float) -> None:
    """All rows are in every step, so their order does not matter."""
    course = {"max_steps": 4, "learning_rate": 1e-3, "logging_steps": 1, "save_strategy": "no"}
    trainer = theirs(tokenizer, ROWS, tmp_path, ref_model=model(), beta=0.3, **course)
    adapt_dpo_trainer(trainer, gamma=gamma)
    trainer.train()

    rows = [preference_row(pair) for pair in encode_preferences(ROWS, tokenizer, max_length=50)[0]]
    rows = [
        {**row, "ref_logprobs": column} for row, column in zip(rows, reference_logprobs(model(), rows), strict=True)
    ]
    ours = ObjectiveTrainer(
        model(), TrainingArguments(**arguments(tmp_path, **course)), objective=Preference("d2po", beta=0.3, gamma=gamma),
        train_dataset=rows,
    )  # fmt: skip
    ours.train()
    losses = [[entry["loss"] for entry in run.state.log_history if "loss" in entry] for run in (ours, trainer)]
    assert losses[0] == pytest.approx(losses[1], abs=1e-4)  # TRL rounds what it logs
    assert losses[0][-1] < losses[0][0] - 0.02
    start = dict(model().named_parameters())
    for name, wanted in trainer.model.named_parameters():
        moved = float((wanted - start[name]).abs().max())
        torch.testing.assert_close(dict(ours.model.named_parameters())[name], wanted, atol=0.02 * moved, rtol=0)
