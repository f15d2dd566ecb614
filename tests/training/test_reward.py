from __future__ import annotations

import json
import multiprocessing
import os
import signal
from pathlib import Path

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
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
def folder(llama, tmp_path, monkeypatch) -> Path:
    """A saved tiny Llama with the byte tokenizer."""
    monkeypatch.setenv("TRIALIST_CACHE", str(tmp_path / "cache"))
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


def test_answers_of_rows_held_out_are_in_no_pair_of_augmented_data(folder):
    rows = [{**row, "chosen": f"a{n}", "rejected": f"b{n}"} for n, row in enumerate(rows_of(20))]
    pairs = augment_preferences(rows, sample_fraction=1.0)
    built, said = recipe(folder, pairs, validation=0.2), []
    train, held = built._examples(Work(byte_tokenizer(), None, 64, ModelOutput(folder / "out", {}), said.append))
    text = {tuple(ids) for group in train for ids in group["sequences"]}
    answers = {"".join(map(chr, ids[:-1])).rpartition(" ")[2] for ids in text}
    gone = {"".join(map(chr, ids[:-1])).rpartition(" ")[2] for group in held for ids in group["sequences"]}
    assert len(held) >= 3
    assert not answers & gone
    assert len(answers | gone) == 40
    assert any("pairs have an answer of a row held out: left out" in line for line in said)


def test_the_robust_way_in_one_command_is_that_in_four(folder):
    from trialist.analysis.rewards import RewardsAnalysis
    from trialist.data.augment_preferences import AugmentPreferences
    from trialist.data.filter_preferences import FilterPreferences

    run(folder, rows_of(), "rm", steps=8, validation=0.0)
    options = {"sample_fraction": 0.8, "include": ("original", "non_contextual"), "avoid_similar": True}
    given, quiet = {"validation": 0.0, "steps": 3}, {"say": lambda text: None}
    one, said = run(
        folder, rows_of(), "one", donors=2, filter_model=str(folder / "rm"), min_gap=0.5, **options, **given
    )
    assert 24 < one["pairs"] < 24 * 8
    assert any("added pairs" in line and "stay" in line for line in said)
    names = [str(folder / name) for name in ("rows.jsonl", "pairs.jsonl", "scored.jsonl", "kept.jsonl")]
    AugmentPreferences(names[0], names[1], **options)(**quiet)
    RewardsAnalysis(str(folder / "rm"), names[1], names[2], device="cpu")(**quiet)
    FilterPreferences(names[2], names[3], min_gap=0.5)(**quiet)
    four, _ = run(folder, names[3], "four", **given)
    assert [one[name] for name in ("pairs", "prompts", "sequences")] == [
        four[name] for name in ("pairs", "prompts", "sequences")
    ]
    a, b = weights(folder / "one"), weights(folder / "four")
    for name in a:
        torch.testing.assert_close(a[name], b[name], rtol=1e-4, atol=1e-5)  # the order of pairs in a group differs


def test_one_prompt_of_many_rows_makes_several_steps_of_bounded_size(folder):
    rows = [{"prompt": "Write a poem. ", "chosen": f"good {n}", "rejected": f"bad {n}"} for n in range(40)]
    result, _ = run(folder, rows, steps=None, epochs=1.0, batch=2, validation=0.0)
    assert (result["pairs"], result["prompts"], result["steps"]) == (40, 5, 3)  # 80 sequences in groups of 16


def test_added_pairs_alone_can_be_trained_on_and_validated_on_original_ones(folder):
    built = recipe(folder, rows_of(), donors=2, include=("non_contextual",), sample_fraction=1.0, validation=0.2)
    train, held = built._examples(Work(byte_tokenizer(), None, 64, ModelOutput(folder / "out", {}), lambda text: None))
    assert {len(group["pairs"]) for group in train} == {8}
    assert {len(group["pairs"]) for group in held} == {1}


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_nothing_is_dropped_out_in_training(folder):
    from datasets import Dataset
    from transformers import GPT2Config, GPT2ForSequenceClassification
    from trl import RewardConfig

    from trialist.training.reward_trainer import RobustRewardTrainer

    config = GPT2Config(vocab_size=259, n_embd=8, n_layer=1, n_head=1, num_labels=1, pad_token_id=258, resid_pdrop=0.5)
    arguments = RewardConfig(
        str(folder / "t"), use_cpu=True, bf16=False, report_to="none", gradient_checkpointing=False
    )
    trainer = RobustRewardTrainer(
        GPT2ForSequenceClassification(config), arguments, train_dataset=Dataset.from_list(rows_of(5)),
        processing_class=byte_tokenizer(),
    )  # fmt: skip
    assert {module.p for module in trainer.model.modules() if isinstance(module, torch.nn.Dropout)} == {0}


def test_rows_with_long_prompts_can_be_left_out(folder):
    rows = [*rows_of(12), {"prompt": "long " * 40, "chosen": "b", "rejected": "c"}]
    result, said = run(folder, rows, drop_long=True, steps=1, validation=0.0)
    assert result["pairs"] == 12
    assert any("in 1 of 13 rows prompts fill 128 tokens: left out" in line for line in said)


def test_ties_are_no_part_of_the_accuracy_and_have_a_distance(folder):
    from trialist.training.reward_trainer import RobustRewardTrainer

    rows = [{**row, "label_prob": 0.5 if n % 3 else 1.0} for n, row in enumerate(rows_of(9))]
    trainer, _ = trainer_of(folder, RobustRewardTrainer, rows, "shares")
    trainer.accelerator.unwrap_model(trainer.model).eval()
    found, reward = trainer.evaluate(trainer.train_dataset), {}
    with torch.no_grad():
        for group in trainer.train_dataset:
            for ids in group["sequences"]:
                reward[tuple(ids)] = trainer.model(torch.tensor([ids])).logits.item()
    gaps = [reward[tuple(g["sequences"][0])] - reward[tuple(g["sequences"][1])] for g in trainer.train_dataset]
    assert found["eval_accuracy"] == pytest.approx(sum(gap > 0 for gap in gaps[::3]) / 3)
    assert found["eval_margin"] == pytest.approx(sum(gaps[::3]) / 3, abs=1e-5)
    assert found["eval_tie_distance"] == pytest.approx(sum(abs(g) for n, g in enumerate(gaps) if n % 3) / 6, abs=1e-5)
    assert found["eval_mean_reward"] == pytest.approx(sum(reward.values()) / len(reward), abs=1e-5)


def test_reinforcement_reads_a_reward_model_where_it_was_trained(folder):
    from trialist.training.rlvr import VerifiableRewards

    with_template(folder)
    run(folder, talks_of(rows_of()), "rm", steps=2)
    own = VerifiableRewards(
        model=str(folder / "model"), data="arithmetic", output=str(folder / "rl"), max_examples=6, steps=1, group=3, batch=6,
        answer_length=5, beta=0.0, device="cpu", chat=True, reward_model=str(folder / "rm"), reward_weight=1.0,
    )  # fmt: skip
    tokenizer = AutoTokenizer.from_pretrained(folder / "model")
    given = Work(tokenizer, *own.limits(), ModelOutput(folder / "rl", {}), lambda text: None)
    prompts = own.prompts(tokenizer)
    trainer = own._trainer(given, AutoModelForCausalLM.from_pretrained(folder / "model"), prompts, [])
    asked = [row["prompt"] for row in prompts[:4]]
    answers = [[{"role": "assistant", "content": text}] for text in ("7", "no idea", "", "12 12")]
    found = trainer.reward_funcs[1](prompts=asked, completions=answers, completion_ids=None)
    assert found == pytest.approx(as_grpo_scores(folder / "rm", asked, answers), abs=1e-4)
    trainer.train()
    assert any("rewards/rewards/mean" in entry for entry in trainer.state.log_history)


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


CHATML = (
    "{% for m in messages %}{{ m['role'][:1] + ':' + m['content'] }}<eos>{{ '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}a:{% endif %}"
)
"""A template that writes a line break behind the end of a turn, as most do"""


def talks_of(rows: list[dict]) -> list[dict]:
    return [
        {"prompt": [{"role": "user", "content": row["prompt"]}],
         **{name: [{"role": "assistant", "content": row[name]}] for name in ("chosen", "rejected")}}
        for row in rows
    ]  # fmt: skip


def with_template(folder: Path, template: str = CHATML) -> None:
    tokenizer = AutoTokenizer.from_pretrained(folder / "model")
    tokenizer.chat_template = template
    tokenizer.save_pretrained(folder / "model")


def as_grpo_scores(folder: Path, prompts: list, answers: list) -> list[float]:
    """What `trl.GRPOTrainer` makes of a conversation for a reward model."""
    from trl import apply_chat_template

    model, tokenizer = AutoModelForSequenceClassification.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    texts = [
        apply_chat_template({"messages": prompt + answer}, tokenizer)["text"]
        for prompt, answer in zip(prompts, answers)
    ]
    inputs = tokenizer(text=texts, return_tensors="pt", padding=True, padding_side="right", add_special_tokens=False)
    with torch.no_grad():
        return model(**inputs).logits[:, 0].tolist()


def test_rewards_of_conversations_are_read_where_they_were_learnt(folder):
    from trialist.analysis.rewards import RewardsAnalysis
    from trialist.models.reward_scoring import RewardScorer

    with_template(folder)
    rows = talks_of(rows_of(30))
    result, _ = run(folder, rows, steps=40, batch=8, learning_rate=1e-2, checkpoint_every=100)
    assert result["validation accuracy after"] == 1.0
    prompts = [row["prompt"] for row in rows]
    by_hand = {
        name: as_grpo_scores(folder / "out", prompts, [row[name] for row in rows]) for name in ("chosen", "rejected")
    }
    assert all(a > b for a, b in zip(by_hand["chosen"], by_hand["rejected"]))
    RewardsAnalysis(str(folder / "out"), str(folder / "rows.jsonl"), str(folder / "scored.jsonl"), device="cpu")(
        lambda text: None
    )
    scored = [json.loads(line) for line in (folder / "scored.jsonl").read_text().splitlines()]
    scorer = RewardScorer.load(str(folder / "out"))
    for name, expected in by_hand.items():
        assert [row[f"{name}_reward"] for row in scored] == pytest.approx(expected, abs=1e-4)
        assert scorer.rewards(prompts, [row[name] for row in rows], extra=1) == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize("kind", ["strings", "conversations"])
def test_sequences_are_those_of_trl(folder, kind):
    from datasets import Dataset
    from trl import RewardConfig, RewardTrainer

    from trialist.training.reward_trainer import RobustRewardTrainer

    with_template(folder)
    rows = rows_of(5) if kind == "strings" else talks_of(rows_of(5))
    model = AutoModelForSequenceClassification.from_pretrained(folder / "model", num_labels=1, pad_token_id=258)
    arguments = RewardConfig(
        str(folder / "t"), use_cpu=True, bf16=False, report_to="none", gradient_checkpointing=False
    )
    tokenizer = AutoTokenizer.from_pretrained(folder / "model")
    ours, theirs = (
        trainer(model, arguments, train_dataset=Dataset.from_list(rows), processing_class=tokenizer).train_dataset
        for trainer in (RobustRewardTrainer, RewardTrainer)
    )
    assert [group["sequences"] for group in ours] == [[row["chosen_ids"], row["rejected_ids"]] for row in theirs]


def test_a_scorer_reads_generated_strings_as_rows_are_read(folder):
    from trialist.data.preferences import encode_preferences
    from trialist.models.reward_scoring import RewardScorer

    run(folder, rows_of(), steps=2)
    scorer, rows = RewardScorer.load(str(folder / "out")), rows_of(7)
    pairs, _ = encode_preferences(rows, scorer.tokenizer, max_length=64, whole=True)
    found = [scorer._tokens(row["prompt"], row["chosen"]) for row in rows]
    assert found == [[*pair.prompt, *pair.chosen] for pair in pairs]
    expected = rewards(folder / "out", [f"{row['prompt']}{row['chosen']}<eos>" for row in rows])
    given = scorer.rewards([row["prompt"] for row in rows], [row["chosen"] for row in rows])
    assert given == pytest.approx(expected.tolist(), abs=1e-4)


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
@pytest.mark.parametrize(
    ("options", "more"),
    [({}, {}), ({"center_rewards_coefficient": 0.1}, {}), ({}, {"margin": 3.0})],
    ids=["plain", "centred", "margin"],
)
def test_certain_pairs_are_trained_as_trl_trains_them(folder, options, more):
    from trl import RewardTrainer

    from trialist.training.reward_trainer import RobustRewardTrainer

    rows = [{**row, **{name: value * (n % 3) for name, value in more.items()}} for n, row in enumerate(rows_of())]
    ours, losses = trainer_of(folder, RobustRewardTrainer, rows, "ours", **options)
    theirs, expected = trainer_of(folder, RewardTrainer, rows, "theirs", **options)
    assert losses == pytest.approx(expected, rel=1e-5)
    for entry, other in zip(ours.state.log_history[:-1], theirs.state.log_history):
        shared = ("accuracy", "margin", "mean_reward")
        assert [entry[name] for name in shared] == pytest.approx([other[name] for name in shared], abs=1e-4)
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


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_the_trainer_warns_of_rows_that_it_cuts_or_leaves_out(folder):
    from trialist.training.reward_trainer import RobustRewardTrainer

    rows = [*rows_of(9), {"prompt": "long " * 9, "chosen": "b", "rejected": "c"}]
    with pytest.warns(UserWarning, match="train data: in 1 of 10 rows prompts fill 20 tokens: left out"):
        trainer, _ = trainer_of(folder, RobustRewardTrainer, rows, "long", max_length=20)
    assert len(trainer.train_dataset) == 9


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_the_trainer_takes_names_adapters_and_rows_to_validate_on_as_trl_does(folder):
    from datasets import Dataset
    from peft import LoraConfig
    from trl import RewardConfig

    from trialist.training.reward_trainer import RobustRewardTrainer

    arguments = RewardConfig(
        str(folder / "named"), max_steps=3, eval_strategy="steps", eval_steps=3, bf16=False, use_cpu=True, report_to="none",
        save_strategy="no", disable_tqdm=True, gradient_checkpointing=False, learning_rate=1e-2,
        model_init_kwargs={"dtype": "float32"},
    )  # fmt: skip
    trainer = RobustRewardTrainer(
        str(folder / "model"),
        arguments,
        train_dataset=Dataset.from_list(rows_of()),
        eval_dataset=Dataset.from_list(rows_of(5)),
        peft_config=LoraConfig(r=2, target_modules="all-linear", task_type="SEQ_CLS", modules_to_save=["score"]),
    )
    trainer.train()
    assert any("eval_accuracy" in entry for entry in trainer.state.log_history)
    trained = {name for name, parameter in trainer.model.named_parameters() if parameter.requires_grad}
    assert any("lora" in name for name in trained)
    assert any("score" in name for name in trained)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_bfloat16_with_adapters_moves_the_whole_head(folder, checkpointing):
    options = {"lora": 2, "dtype": "bfloat16", "learning_rate": 1e-5, "validation": 0.0, "save": "adapter", "steps": 3}
    run(folder, rows_of(), gradient_checkpointing=checkpointing, **options)
    from safetensors.torch import load_file

    from trialist.models.reward_model import load_reward_model

    found = load_file(folder / "out" / "adapter_model.safetensors")["base_model.model.score.weight"]
    start = load_reward_model(str(folder / "model"), dtype="bfloat16", pad_token_id=258, seed=0)[0].score.weight
    assert found.dtype == torch.float32
    assert (found != start).float().mean() > 0.95
    again, new = load_reward_model(str(folder / "out"), pad_token_id=258)
    assert not new
    assert torch.equal(again.score.weight, found)


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
        ([*rows_of(5), {**rows_of(1)[0], "margin": "much"}], {}, "row 6: margin is 'much'"),
        ([*rows_of(5), {**rows_of(1)[0], "pair_type": "original"}], {"donors": 1}, "row 6 has a pair_type"),
        ([{**row, "pair_type": "neutral"} for row in rows_of()], {}, "the rows held out: all are added pairs"),
        (rows_of(), {"include": ("neutral",)}, "--include is about pairs that --donors adds; pass --donors 2"),
        (rows_of(), {"donors": 1, "include": ()}, "--include names no kind"),
        (rows_of(), {"filter_model": "x"}, "--filter-model is about pairs that --donors adds"),
        (rows_of(), {"donors": 1, "min_gap": 2.0}, "--min-gap must be from 0 to 1, not 2.0"),
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
    ids=["no rejected", "equal", "label", "no number", "margin", "augmented", "only added", "include", "no kind", "filter", "gap",
         "long prompt", "one prompt", "no validation", "length", "donors",
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
