from __future__ import annotations

import json
import math
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import PrinterCallback, TrainerCallback, TrainingArguments, get_scheduler

from trialist.data.collation import pack_rows
from trialist.models import ModularDecoderConfig, ModularDecoderForCausalLM, enable_selective_attention, initialize_
from trialist.objectives.cross_entropy import CrossEntropy
from trialist.objectives.memory_loss import MemoryLoss
from trialist.optimizers.adamw import adamw
from trialist.training.fit import fit
from trialist.training.schedules import Schedule
from trialist.training.trainer import ObjectiveTrainer

STEPS, ACCUMULATE, ROWS, WARMUP, RATE = 24, 3, 3, 4, 3e-3


def uneven(index):
    """Three rows of eleven tokens with padding on the right; between 1 and 10 tokens of a row count."""
    generator = torch.Generator().manual_seed(1000 + index)
    input_ids = torch.randint(61, (ROWS, 11), generator=generator)
    padding = torch.tensor([(index + row) % 4 for row in range(ROWS)])
    mask = (torch.arange(11) < 11 - padding[:, None]).long()
    labels = input_ids.masked_fill(mask == 0, -100)
    labels[:, : 1 + index % 7] = -100
    return {"input_ids": input_ids, "attention_mask": mask, "labels": labels}


def packed(index):
    """The same tokens as two documents a row, apart from each other."""
    batch = uneven(index)
    positions = torch.arange(11).repeat(ROWS, 1)
    positions[:, 4:] -= 4
    labels = batch["input_ids"].masked_fill(positions == 0, -100)
    labels[:, : index % 4] = -100
    return {"input_ids": batch["input_ids"], "position_ids": positions, "labels": labels}


def rows_of(batches, count=STEPS * ACCUMULATE):
    return [
        {name: value[row] for name, value in batches(index).items()} for index in range(count) for row in range(ROWS)
    ]


def trainer(
    folder, model, rows, *, objective=None, optimizers=None, callbacks=(), collator=None, evaluation=None, **options
):
    given = {
        "max_steps": STEPS,
        "per_device_train_batch_size": ROWS,
        "per_device_eval_batch_size": 4,
        "gradient_accumulation_steps": ACCUMULATE,
        "logging_steps": 1,
        "report_to": "none",
        "save_strategy": "no",
        "disable_tqdm": True,
        "use_cpu": True,
        "dataloader_pin_memory": False,
        "train_sampling_strategy": "sequential",
    }
    if optimizers is None:
        optimizer = adamw(model, RATE)
        optimizers = optimizer, get_scheduler("cosine", optimizer, WARMUP, STEPS)
    made = ObjectiveTrainer(
        model,
        TrainingArguments(output_dir=str(folder), **{**given, **options}),
        objective=objective or CrossEntropy(),
        data_collator=collator,
        train_dataset=rows,
        eval_dataset=evaluation,
        optimizers=optimizers,
        callbacks=list(callbacks),
    )
    made.remove_callback(PrinterCallback)
    return made


def logged(made, name="loss"):
    return [entry[name] for entry in made.state.log_history if name in entry]


def fitted(model, batches, *, objective=None, **options):
    return fit(
        model, batches, objective or CrossEntropy(), adamw(model, RATE), Schedule("cosine", warmup=WARMUP), {"steps": STEPS},
        accumulate=ACCUMULATE, progress=False, **options,
    )  # fmt: skip


def adapted(model):
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(7)
    return get_peft_model(model, LoraConfig(r=3, target_modules="all-linear", task_type="CAUSAL_LM"))


@pytest.mark.parametrize("batches", [uneven, packed])
@pytest.mark.parametrize("prepare", [lambda model: model, adapted], ids=["full", "lora"])
def test_losses_and_weights_are_those_of_fit(llama, tmp_path, batches, prepare):
    ours, theirs = prepare(llama()), prepare(llama())
    expected = fitted(ours, batches)
    made = trainer(tmp_path, theirs, rows_of(batches))
    made.train()
    assert logged(made) == pytest.approx(expected.losses, rel=1e-6)
    assert expected.losses[-1] < 0.999 * expected.losses[0]
    for name, weight in ours.state_dict().items():
        torch.testing.assert_close(theirs.state_dict()[name], weight, rtol=1e-4, atol=2e-5)


def recurrent_core():
    config = ModularDecoderConfig(
        vocab_size=61, hidden_size=24, intermediate_size=40, num_hidden_layers=3, num_attention_heads=4, depth="recurrent",
        prelude_layers=1, core_layers=1, coda_layers=1, mean_recurrence=2, layer_types=["selective_attention"] * 3,
    )  # fmt: skip
    model = ModularDecoderForCausalLM(config)
    initialize_(model, 3)
    return model


@pytest.mark.parametrize("kind", ["full", "lora", pytest.param("recurrent core", marks=pytest.mark.slow)])
def test_a_price_on_memory_trains_as_in_fit(llama, tmp_path, kind):
    def made():
        if kind == "recurrent core":
            return recurrent_core()
        model = enable_selective_attention(llama())
        return adapted(model) if kind == "lora" else model

    ours, theirs, objective = made(), made(), MemoryLoss(epsilon=0.7)
    expected = fitted(ours, uneven, objective=objective)
    run = trainer(tmp_path, theirs, rows_of(uneven), objective=objective)
    run.train()
    assert logged(run) == pytest.approx(expected.losses, rel=1e-5)
    assert all(0 < share < 1 for share in logged(run, "memory"))
    plain = fitted(made(), uneven)
    assert expected.losses[0] == pytest.approx(plain.losses[0] + 0.7 * logged(run, "memory")[0], rel=1e-5)


def test_a_price_on_memory_holds_under_autocast(llama, tmp_path):
    losses = []
    for options in ({}, {"bf16": True}):
        model = adapted(enable_selective_attention(llama()))
        run = trainer(tmp_path, model, rows_of(uneven), objective=MemoryLoss(epsilon=0.7), **options)
        run.train()
        losses.append(logged(run))
        assert all(0 < share < 1 for share in logged(run, "memory"))
    assert losses[1] == pytest.approx(losses[0], rel=0.02)
    assert losses[1] != losses[0]


class StopAt(TrainerCallback):
    def __init__(self, step):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        control.should_training_stop = state.global_step == self.step


@pytest.mark.parametrize("prepare", [lambda model: model, adapted], ids=["full", "lora"])
def test_losses_after_a_resume_are_those_of_fit(llama, tmp_path, prepare):
    expected = fitted(prepare(llama()), uneven)
    saving = {"save_strategy": "steps", "save_steps": 10}
    first = trainer(tmp_path, prepare(llama()), rows_of(uneven), callbacks=[StopAt(13)], **saving)
    first.train()
    second = trainer(tmp_path, prepare(llama(seed=5)), rows_of(uneven), **saving)
    if prepare is not adapted:  # an adapter's checkpoint holds no base weights
        second.train(resume_from_checkpoint=str(tmp_path / "checkpoint-10"))
    else:
        second = trainer(tmp_path, prepare(llama()), rows_of(uneven), **saving)
        second.train(resume_from_checkpoint=str(tmp_path / "checkpoint-10"))
    assert logged(first)[:13] == pytest.approx(expected.losses[:13], rel=1e-6)
    assert logged(second) == pytest.approx(expected.losses, rel=1e-6)


def test_weights_told_before_the_forward_pass_change_nothing(llama, tmp_path):
    after, ahead = (trainer(tmp_path, llama(), rows_of(uneven)) for _ in range(2))
    ahead.weigh_ahead = True
    after.train()
    ahead.train()
    assert logged(ahead) == pytest.approx(logged(after), rel=1e-6)
    assert logged(ahead, "grad_norm") == pytest.approx(logged(after, "grad_norm"), rel=1e-5)


def test_the_gradient_norm_is_that_of_the_mean_before_clipping(llama, tmp_path):
    model = llama()
    total = weight = 0
    for index in range(ACCUMULATE):
        batch = uneven(index)
        logits = model(batch["input_ids"], attention_mask=batch["attention_mask"]).logits[:, :-1]
        labels = batch["labels"][:, 1:]
        total = total + torch.nn.functional.cross_entropy(logits.transpose(1, 2), labels, reduction="sum")
        weight += (labels != -100).sum()
    (total / weight).backward()
    norm = math.sqrt(sum(float(p.grad.square().sum()) for p in model.parameters()))
    made = trainer(tmp_path, llama(), rows_of(uneven), max_steps=1, max_grad_norm=0.01)
    made.train()
    assert logged(made, "grad_norm") == [pytest.approx(norm, rel=1e-5)]
    assert logged(made) == [pytest.approx(float(total / weight), rel=1e-6)]


def test_evaluation_weighs_every_token_the_same_whatever_its_batch(llama, tmp_path):
    model = llama().eval()
    rows = rows_of(uneven, 4)[:10]  # batches of 4, 4 and 2 rows
    total = weight = 0.0
    for row in rows:
        length = int(row["attention_mask"].sum())
        logits = model(row["input_ids"][None, :length]).logits[0, :-1]
        labels = row["labels"][1:length]
        total += float(torch.nn.functional.cross_entropy(logits, labels, reduction="sum"))
        weight += int((labels != -100).sum())
    made = trainer(tmp_path, model, rows, evaluation=rows)
    assert made.evaluate()["eval_loss"] == pytest.approx(total / weight, rel=1e-6)


class WithStats(CrossEntropy):
    def __call__(self, model, batch):
        loss, stats = super().__call__(model, batch)
        return loss, {**stats, "marked": batch["mark"].sum()}


def test_columns_reach_the_objective_and_its_stats_are_logged_per_unit_of_weight(llama, tmp_path):
    rows = [{**row, "mark": float(number)} for number, row in enumerate(rows_of(uneven, 2 * ACCUMULATE))]
    made = trainer(tmp_path, llama(), rows, objective=WithStats(), max_steps=2, logging_steps=2, evaluation=rows[:5])
    made.train()
    weights = [sum(int((uneven(i)["labels"][:, 1:] != -100).sum()) for i in part) for part in (range(3), range(3, 6))]
    means = sum(range(9)) / weights[0], sum(range(9, 18)) / weights[1]
    assert logged(made, "marked") == [pytest.approx(sum(means) / 2, rel=1e-6)]
    weight = sum(int((row["labels"][1:] != -100).sum()) for row in rows[:5])
    assert made.evaluate()["eval_marked"] == pytest.approx(sum(range(5)) / weight, rel=1e-6)


def test_rows_of_unequal_length_are_padded_and_train_like_rows_on_their_own(llama, tmp_path):
    rows = [
        {"input_ids": list(range(3, 3 + n)), "labels": [-100] * (n // 2) + list(range(3 + n // 2, 3 + n))}
        for n in (4, 9, 6)
    ]
    losses = []
    for size, steps in ((3, 1), (1, 3)):
        made = trainer(
            tmp_path, llama(), rows, max_steps=1, per_device_train_batch_size=size, gradient_accumulation_steps=steps
        )
        made.train()
        losses += logged(made)
    made = trainer(tmp_path, llama(), rows, max_steps=1, gradient_accumulation_steps=1, collator=pack_rows)
    made.train()
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)
    assert logged(made)[0] == pytest.approx(losses[0], rel=1e-6)


def test_a_loss_that_is_no_number_is_logged_as_such(llama, tmp_path):
    model = llama()
    with torch.no_grad():
        model.lm_head.weight[3, 3] = math.nan
    made = trainer(tmp_path, model, rows_of(uneven), max_steps=1)
    made.train()
    assert math.isnan(logged(made)[0])


def events(folder: Path) -> dict[str, list[float]]:
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator").EventAccumulator(
        str(folder)
    )
    accumulator.Reload()
    return {tag: [event.value for event in accumulator.Scalars(tag)] for tag in accumulator.Tags()["scalars"]}


def test_tensorboard_gets_the_losses_of_the_trainer(llama, tmp_path, monkeypatch):
    pytest.importorskip("tensorboard")
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "logs"))
    made = trainer(tmp_path, llama(), rows_of(uneven), max_steps=3, report_to="tensorboard")
    made.train()
    assert events(tmp_path / "logs")["train/loss"] == pytest.approx(logged(made), rel=1e-6)


def test_tensorboard_gets_the_losses_of_fit(llama, tmp_path, monkeypatch):
    pytest.importorskip("tensorboard")
    from transformers.integrations import TensorBoardCallback

    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path))
    result = fitted(llama(), uneven, callbacks=[TensorBoardCallback()])
    assert events(tmp_path)["train/loss"] == pytest.approx([result.losses[i] for i in (9, 19, 23)], rel=1e-6)


def test_what_an_objective_has_no_use_for_is_refused(llama, tmp_path):
    arguments = TrainingArguments(output_dir=str(tmp_path), report_to="none", use_cpu=True, label_smoothing_factor=0.1)
    with pytest.raises(ValueError, match="label_smoothing_factor"):
        ObjectiveTrainer(llama(), arguments, objective=CrossEntropy())
    arguments = TrainingArguments(output_dir=str(tmp_path), report_to="none", use_cpu=True)
    with pytest.raises(ValueError, match="compute_metrics: an objective returns no predictions"):
        ObjectiveTrainer(llama(), arguments, objective=CrossEntropy(), compute_metrics=lambda _: {})


def test_a_step_in_which_nothing_counts_is_an_error(llama, tmp_path):
    rows = [{**row, "labels": torch.full((11,), -100)} for row in rows_of(uneven, ACCUMULATE)]
    with pytest.raises(ValueError, match="step 1 has weight 0"):
        trainer(tmp_path, llama(), rows, max_steps=1).train()


def test_an_objective_without_weight_is_an_error_in_words(llama, tmp_path):
    with pytest.raises(ValueError, match=r"stats\['weight'\]"):
        trainer(tmp_path, llama(), rows_of(uneven), objective=lambda model, batch: (torch.ones(()), {})).train()


PROGRAM = """
import importlib.util, json, sys
def load(name, path):
    spec = importlib.util.spec_from_file_location(name, path); made = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(made)
    return made
made, tests = load("made", sys.argv[1]), load("tests", sys.argv[2])
rows = tests.rows_of(tests.uneven)
run = tests.trainer(sys.argv[3], made.tiny_llama(), rows, evaluation=rows[:11], max_steps=8,
                    per_device_train_batch_size=int(sys.argv[4]))
run.train()
metrics = run.evaluate()
if run.is_world_process_zero():
    found = {"loss": tests.logged(run), "norm": tests.logged(run, "grad_norm"), "eval": metrics["eval_loss"]}
    json.dump(found, open(sys.argv[5], "w"))
"""


@pytest.mark.distributed
def test_two_ranks_train_and_evaluate_like_one(tmp_path):
    here = Path(__file__)

    def run(ranks: int) -> dict:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        result = tmp_path / f"{ranks}.json"
        command = [
            sys.executable,
            "-c",
            PROGRAM,
            str(here.with_name("conftest.py")),
            str(here),
            str(tmp_path),
            str(4 // ranks),
        ]
        processes = []
        for rank in range(ranks):
            place = {
                "RANK": rank,
                "LOCAL_RANK": rank,
                "WORLD_SIZE": ranks,
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": port,
            }
            environment = {**os.environ, **({name: str(value) for name, value in place.items()} if ranks > 1 else {})}
            processes.append(subprocess.Popen([*command, str(result)], env=environment))
        assert [process.wait(timeout=100) for process in processes] == [0] * ranks
        return json.loads(result.read_text())

    one, two = run(1), run(2)
    assert two["loss"] == pytest.approx(one["loss"], rel=1e-5)
    assert two["norm"] == pytest.approx(one["norm"], rel=1e-4)
    assert two["eval"] == pytest.approx(one["eval"], rel=1e-5)


def expert_model():
    from transformers import LlamaConfig, LlamaForCausalLM

    from trialist.models import swap_ffn

    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=61, **sizes))
    return swap_ffn(model, [1], num_experts=49, num_heads=2, top_k=3, key_dim=6, learning_rate_scale=4.0)


def test_the_optimizer_of_the_trainer_has_the_groups_that_modules_declare(tmp_path):
    model = expert_model()
    made = trainer(tmp_path, model, rows_of(uneven, 2), optimizers=(None, None), learning_rate=1e-3, weight_decay=0.1)
    optimizer = made.create_optimizer()
    experts = model.model.layers[1].mlp
    of = {id(p): group for group in optimizer.param_groups for p in group["params"]}
    assert len(of) == sum(len(group["params"]) for group in optimizer.param_groups) == len(list(model.parameters()))
    for table in (*experts.down, *experts.up):
        assert (of[id(table)]["lr"], of[id(table)]["weight_decay"]) == (4e-3, 0.0)
    assert [(of[id(keys)]["lr"], of[id(keys)]["weight_decay"]) for keys in experts.keys] == [(1e-3, 0.0)]
    assert (of[id(experts.query_proj.weight)]["lr"], of[id(experts.query_proj.weight)]["weight_decay"]) == (1e-3, 0.1)
    theirs = adamw(model, 1e-3, weight_decay=0.1)
    for group in theirs.param_groups:
        assert all(of[id(p)]["lr"] == group["lr"] for p in group["params"])


def test_a_schedule_scales_the_rates_of_declared_groups_and_an_adapter_without_experts_has_none(tmp_path):
    model = expert_model()
    made = trainer(
        tmp_path, model, rows_of(uneven, 4), optimizers=(None, None), learning_rate=1e-3, max_steps=4,
        gradient_accumulation_steps=1, lr_scheduler_type="linear",
    )  # fmt: skip
    made.train()
    rates = {group.get("name"): group["lr"] for group in made.optimizer.param_groups}
    assert rates["peer_experts"] == pytest.approx(4 * rates["peer_keys"])
    made = trainer(tmp_path, adapted(expert_model()), rows_of(uneven, 2), optimizers=(None, None))
    assert {group.get("name") for group in made.create_optimizer().param_groups} == {None}


def test_an_optimizer_that_was_passed_in_stays_as_it_is(tmp_path):
    model = expert_model()
    given = torch.optim.SGD(model.parameters(), 0.1)
    made = trainer(tmp_path, model, rows_of(uneven, 2), optimizers=(given, None))
    assert made.create_optimizer() is given
    assert len(given.param_groups) == 1
