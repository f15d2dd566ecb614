from __future__ import annotations

import json
import multiprocessing
import os
import signal
from pathlib import Path

import pytest
import torch
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    LlamaForSequenceClassification,
    TrainerCallback,
)

from trialist.data.augment_preferences import augment_preferences
from trialist.data.tokenizers import byte_tokenizer
from trialist.training import progress
from trialist.training.output import ModelOutput
from trialist.training.recipe import Work
from trialist.training.reward import RewardModelling

pytest.importorskip("trl", reason="the extra `trl` is not installed")


@pytest.fixture
def folder(llama, tmp_path) -> Path:
    """A saved tiny Llama with the byte tokenizer."""
    llama(vocab_size=259, max_position_embeddings=128).save_pretrained(tmp_path / "model")
    tokenizer = byte_tokenizer()
    tokenizer.split_special_tokens = False  # TRL writes the end of a sequence as text
    tokenizer.save_pretrained(tmp_path / "model")
    return tmp_path


def rows_of(count: int = 24) -> list[dict]:
    return [
        {"prompt": f"{'say it ' * (n % 3)}{n}? ", "chosen": f"{n}!", "rejected": f"no{n}" if n % 2 else f"{n + 1}?"}
        for n in range(count)
    ]


def written(folder: Path, rows: list[dict], name: str = "rows.jsonl") -> str:
    (folder / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(folder / name)


def recipe(folder, rows, output="out", **options):
    data = rows if isinstance(rows, str) else written(folder, rows)
    given = {"steps": 6, "batch": 3, "accumulate": 1, "learning_rate": 3e-3, "checkpoint_every": 2, "log_every": 1,
             "device": "cpu"}  # fmt: skip
    return RewardModelling(str(folder / "model"), data, str(folder / output), **{**given, **options})


def run(*arguments, **options):
    said: list[str] = []
    return recipe(*arguments, **options)(said.append), said


def weights(folder):
    return AutoModelForSequenceClassification.from_pretrained(folder).state_dict()


def rewards(folder, texts: list[str]) -> torch.Tensor:
    """As any user of transformers would compute them, all in one padded batch."""
    model, tokenizer = AutoModelForSequenceClassification.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    with torch.no_grad():
        return model(**tokenizer(texts, padding=True, return_tensors="pt")).logits[:, 0]


def test_it_learns_and_leaves_a_model_that_any_tool_loads(folder):
    result, said = run(folder, rows_of(), steps=30, learning_rate=1e-2, checkpoint_every=30)
    assert result["validation loss after"] < 0.5 * result["validation loss before"]
    assert result["validation accuracy after"] == 1.0
    model = AutoModelForSequenceClassification.from_pretrained(folder / "out")
    assert (model.config.num_labels, model.config.pad_token_id, model.config.use_cache) == (1, 258, True)
    texts = [f"7? {answer}<eos>" for answer in ("7!", "8?", "no7")]
    together, alone = rewards(folder / "out", texts), torch.cat([rewards(folder / "out", [text]) for text in texts])
    torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-4)
    assert together[0] > together[1:].max()
    assert any(line.startswith("step 30/30") and "accuracy" in line for line in said)


def test_the_sequences_of_a_prompt_are_scored_once_and_nothing_else_changes(folder):
    pairs = augment_preferences(rows_of(12), sample_fraction=1.0)
    (once, said), (apart, _) = (
        run(folder, pairs, name, grouping=grouping, validation=0.0)
        for name, grouping in (("once", True), ("apart", False))
    )
    assert (once["prompts"], once["pairs"], once["sequences"], apart["sequences"]) == (12, 180, 72, 360)
    assert any("72 sequences to score (360 pair by pair)" in line for line in said)
    a, b = weights(folder / "once"), weights(folder / "apart")
    assert max(float((a[name] - b[name]).abs().max()) for name in a) < 1e-4
    start = AutoModelForSequenceClassification.from_pretrained(folder / "model", num_labels=1).state_dict()
    assert any(float((a[name] - start[name]).abs().max()) > 1e-3 for name in a if name in start)


def test_every_pair_weighs_the_same_however_prompts_are_batched(folder):
    pairs = augment_preferences(rows_of(12), sample_fraction=0.4)  # unequal numbers of pairs
    for name, options in (("one", {"batch": 6}), ("three", {"batch": 2, "accumulate": 3})):
        run(folder, pairs, name, steps=4, validation=0.0, **options)
    a, b = weights(folder / "one"), weights(folder / "three")
    for name in a:
        torch.testing.assert_close(a[name], b[name], rtol=1e-4, atol=1e-5)


class KillAt(TrainerCallback):
    def __init__(self, step):
        self.step = step

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.parametrize("lora", [0, 3], ids=["full", "lora"])
def test_a_killed_run_goes_on_to_the_bit(folder, monkeypatch, lora):
    data = written(folder, rows_of())

    def interrupted():
        monkeypatch.setattr(progress.Lines, "on_pre_optimizer_step", KillAt(5).on_pre_optimizer_step, raising=False)
        run(folder, data, "killed", lora=lora, donors=1)

    process = multiprocessing.get_context("fork").Process(target=interrupted)
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    assert not (folder / "killed" / "config.json").exists()
    with pytest.raises(ValueError, match=r"holds an interrupted run of other settings \(donors: 1 there, 2 now\)"):
        run(folder, data, "killed", lora=lora, donors=2)
    result, said = run(folder, data, "killed", lora=lora, donors=1)
    whole, _ = run(folder, data, "whole", lora=lora, donors=1)
    assert "goes on from step 4" in said
    assert result["validation loss after"] == whole["validation loss after"]
    a, b = weights(folder / "killed"), weights(folder / "whole")
    assert all(torch.equal(a[name], b[name]) for name in a)
    again, said = run(folder, data, "whole", lora=lora, donors=1)
    assert again == whole
    assert "holds the finished model" in said[0]


def test_donors_bring_losers_and_ties_from_rows_that_are_not_held_out(folder, monkeypatch):
    rows = [{**row, "chosen": f"a{n}", "rejected": f"b{n}"} for n, row in enumerate(rows_of(20))]
    encoded: list[list[dict]] = []
    encode = RewardModelling._pairs
    monkeypatch.setattr(RewardModelling, "_pairs", lambda self, work, some, source: (
        encoded.append(some), encode(self, work, some, source))[1])  # fmt: skip
    built = recipe(folder, rows, donors=2, sample_fraction=1.0, validation=0.2)
    train, held = built._examples(Work(byte_tokenizer(), None, 64, ModelOutput(folder / "out", {}), lambda text: None))
    prompts = {row["prompt"] for row in encoded[1]}
    assert len(train) == len(prompts)
    assert len(train) + len(held) == 20
    assert all(len(group["pairs"]) == 15 and len(group["sequences"]) == 6 for group in train)
    assert all(len(group["pairs"]) == 1 for group in held)
    used = {answer for row in encoded[1] for answer in (row["chosen"], row["rejected"])}
    assert used == {f"{letter}{n}" for n, row in enumerate(rows) if row["prompt"] in prompts for letter in "ab"}


def test_ties_draw_rewards_together_and_labels_of_one_apart(folder):
    gaps = {}
    for label in (0.5, 1.0):
        rows = [{**row, "label_prob": label} for row in rows_of()]
        run(folder, rows, f"label {label}", steps=25, learning_rate=1e-2, validation=0.0, checkpoint_every=25)
        found = rewards(folder / f"label {label}", ["7? 7!<eos>", "7? no7<eos>"])
        gaps[label] = float(found[0] - found[1])
    assert abs(gaps[0.5]) < 0.2 < 2 < gaps[1.0]


def test_lora_trains_the_head_too_and_the_adapter_alone_can_be_saved(folder):
    from peft import AutoPeftModelForSequenceClassification

    merged, _ = run(folder, rows_of(), "merged", lora=4, learning_rate=1e-2)
    adapter, _ = run(folder, rows_of(), "adapter", lora=4, learning_rate=1e-2, save="adapter")
    assert (folder / "adapter" / "adapter_config.json").is_file()
    assert not (folder / "adapter" / "config.json").exists()
    assert merged["validation loss after"] == adapter["validation loss after"]
    loaded = AutoPeftModelForSequenceClassification.from_pretrained(folder / "adapter", num_labels=1).merge_and_unload()
    own = weights(folder / "merged")
    for name, value in loaded.state_dict().items():
        torch.testing.assert_close(value, own[name], rtol=1e-4, atol=1e-5)


def test_training_goes_on_from_a_reward_model(folder):
    run(folder, rows_of(), "first", steps=20, learning_rate=1e-2, checkpoint_every=20)
    said: list[str] = []
    result = RewardModelling(
        str(folder / "first"),
        str(folder / "rows.jsonl"),
        str(folder / "second"),
        steps=1,
        learning_rate=1e-6,
        device="cpu",
    )(said.append)
    assert "LlamaForSequenceClassification with the head it had" in said
    assert result["validation accuracy before"] == 1.0


def test_conversations_go_through_the_chat_template(folder):
    tokenizer = AutoTokenizer.from_pretrained(folder / "model")
    tokenizer.chat_template = "{% for m in messages %}{{ m['role'][:1] + ':' + m['content'] + eos_token }}{% endfor %}"
    tokenizer.save_pretrained(folder / "model")
    rows = [
        {"prompt": [{"role": "user", "content": row["prompt"]}],
         **{name: [{"role": "assistant", "content": row[name]}] for name in ("chosen", "rejected")}}
        for row in rows_of()
    ]  # fmt: skip
    result, _ = run(folder, rows, donors=1, steps=20, learning_rate=1e-2, checkpoint_every=20)
    assert result["validation loss after"] < result["validation loss before"]


def trainer_of(folder, kind, rows, name, **options):
    from datasets import Dataset
    from trl import RewardConfig

    torch.manual_seed(0)
    model = AutoModelForSequenceClassification.from_pretrained(folder / "model", num_labels=1, pad_token_id=258)
    arguments = RewardConfig(
        str(folder / name), max_steps=4, per_device_train_batch_size=3, learning_rate=3e-3, logging_steps=1, bf16=False,
        use_cpu=True, report_to="none", save_strategy="no", disable_tqdm=True, train_sampling_strategy="sequential",
        gradient_checkpointing=False, **options,
    )  # fmt: skip
    tokenizer = AutoTokenizer.from_pretrained(folder / "model")
    trainer = kind(model, arguments, train_dataset=Dataset.from_list(rows), processing_class=tokenizer)
    trainer.train()
    return trainer, [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("options", [{}, {"center_rewards_coefficient": 0.1}], ids=["plain", "centred"])
def test_certain_pairs_are_trained_as_trl_trains_them(folder, options):
    from trl import RewardTrainer

    from trialist.training.reward_trainer import RobustRewardTrainer

    ours, losses = trainer_of(folder, RobustRewardTrainer, rows_of(), "ours", **options)
    theirs, expected = trainer_of(folder, RewardTrainer, rows_of(), "theirs", **options)
    assert losses == pytest.approx(expected, rel=1e-5)
    for name, value in theirs.model.state_dict().items():
        torch.testing.assert_close(ours.model.state_dict()[name], value, rtol=1e-3, atol=1e-4)  # Adam enlarges rounding


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_no_label_is_lost_as_an_unused_column(folder):
    from trialist.training.reward_trainer import RobustRewardTrainer

    rows = [{**row, "label_prob": 0.5} for row in rows_of()]
    trainer, losses = trainer_of(folder, RobustRewardTrainer, rows, "ties", remove_unused_columns=True)
    assert next(iter(trainer.get_train_dataloader()))["label_prob"].tolist() == [0.5] * 3
    assert min(losses) >= 0.6931  # ties cost at least ln 2
    trainer.train_dataset = trainer.train_dataset.remove_columns("label_prob")
    with pytest.raises(ValueError, match=r"lacks 'label_prob'.*remove_unused_columns=False"):
        trainer.train()


def test_nothing_is_told_to_anybody_and_no_card_names_another_loss(folder, monkeypatch):
    import trl.trainer.base_trainer as base

    monkeypatch.delenv("CI", raising=False)
    monkeypatch.setattr(base, "send_telemetry", lambda *a, **k: pytest.fail("telemetry was sent"))
    run(folder, rows_of(), steps=2)
    assert not list(folder.rglob("README.md"))


@pytest.mark.parametrize(
    ("rows", "options", "message"),
    [
        ([*rows_of(5), {"prompt": "a", "chosen": "b"}], {}, "line 6: 'rejected' is missing"),
        ([*rows_of(5), {"prompt": "a", "chosen": "b", "rejected": "b"}], {}, "line 6.*'chosen' equals 'rejected'"),
        ([*rows_of(5), {**rows_of(1)[0], "label_prob": 1.2}], {}, "row 6: label_prob is 1.2"),
        ([*rows_of(5), {**rows_of(1)[0], "label_prob": "high"}], {}, "row 6: label_prob is 'high'"),
        ([*rows_of(5), {"prompt": "long " * 40, "chosen": "b", "rejected": "c"}], {}, "row 6: its prompt has 2.. tokens and"),
        ([{**row, "prompt": "same"} for row in rows_of(30)], {"donors": 1, "validation": 0.0}, "30 rows have 1 distinct"),
        (rows_of(1), {}, "--validation 0"),
        (rows_of(), {"length": 4000}, "--length 4000 is longer than .* takes, 128 tokens"),
        (rows_of(), {"donors": 3}, "--donors must be 0, 1 or 2, not 3"),
        (rows_of(), {"sample_fraction": 0.0}, "--sample-fraction must be above 0"),
        (rows_of(), {"center": -1.0}, "--center must be at least 0, not -1.0"),
        (rows_of(), {"save": "adapter"}, "--save adapter needs --lora"),
        (rows_of(), {"batch": 0}, "--batch must be at least 1, not 0"),
    ],
    ids=["no rejected", "equal", "label", "no number", "long prompt", "one prompt", "no validation", "length", "donors",
         "fraction", "center", "adapter", "batch"],
)  # fmt: skip
def test_what_cannot_work_is_said_and_nothing_is_left(folder, rows, options, message):
    with pytest.raises(ValueError, match=message):
        run(folder, rows, **options)
    assert not (folder / "out").exists()


def test_models_that_make_no_reward_model_are_refused(folder):
    data = written(folder, rows_of())
    config = AutoModelForSequenceClassification.from_pretrained(folder / "model").config
    config.num_labels = 3
    LlamaForSequenceClassification(config).save_pretrained(folder / "classes")
    byte_tokenizer().save_pretrained(folder / "classes")
    for model, message in (
        (folder / "classes", "tells 3 classes apart"),
        (folder / "none", "no such folder|does not exist"),
    ):
        with pytest.raises((ValueError, FileNotFoundError), match=message):
            RewardModelling(str(model), data, str(folder / "out"), device="cpu")(lambda text: None)
    for size, message in ((200, "the padding token 258 is beyond the vocabulary of 200"), (258, None)):
        config = AutoModelForSequenceClassification.from_pretrained(folder / "model").config
        config.num_labels, config.vocab_size = 1, size
        tokenizer = byte_tokenizer()
        if message is None:  # the end of a sequence is token 257
            config.vocab_size, tokenizer.pad_token, message = (
                257,
                "a",
                "gives token 257, beyond the model's vocabulary of 257",
            )
        LlamaForSequenceClassification(config).save_pretrained(folder / f"small {size}")
        tokenizer.save_pretrained(folder / f"small {size}")
        with pytest.raises(ValueError, match=message):
            RewardModelling(str(folder / f"small {size}"), data, str(folder / "out"), device="cpu")(lambda text: None)
    assert not (folder / "out").exists()
