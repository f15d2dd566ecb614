from __future__ import annotations

import errno
import json
import math
import multiprocessing
import os
import pickle
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError
from transformers import TrainerCallback

from trialist.objectives.cross_entropy import CrossEntropy
from trialist.optimizers.adamw import adamw
from trialist.training import checkpoints
from trialist.training.checkpoints import load_checkpoint, load_optimizer_state, save_checkpoint
from trialist.training.fit import fit

ROWS = torch.randint(61, (40, 11), generator=torch.Generator().manual_seed(0))


def epochs(index):
    """Batches of three of forty rows in a new order each epoch: an epoch ends within a batch."""
    places = range(3 * index, 3 * index + 3)
    orders = {
        epoch: torch.randperm(40, generator=torch.Generator().manual_seed(epoch)) for epoch in {p // 40 for p in places}
    }
    return {"input_ids": ROWS[[int(orders[place // 40][place % 40]) for place in places]]}


def train(make, folder, *, steps=90, **options):
    model = make(attention_dropout=0.2, tie_word_embeddings=True)
    optimizer = adamw(model, 3e-3)
    given = {
        "schedule": "cosine",
        "budget": {"steps": steps},
        "accumulate": 2,
        "seed": 11,
        "checkpoint": folder,
        "checkpoint_every": 15,
    }
    result = fit(model, epochs, CrossEntropy(), optimizer, **{**given, **options})
    return model, optimizer, result


def in_another_process(work):
    """Runs `work` in a forked process and returns its exit code; negative: the signal that ended it."""
    process = multiprocessing.get_context("fork").Process(target=work)
    process.start()
    process.join()
    return process.exitcode


def assert_same_bits(a, b):
    assert a.keys() == b.keys()
    for name in a:
        same = torch.equal(a[name], b[name]) if isinstance(a[name], torch.Tensor) else a[name] == b[name]
        assert same, name


class KillAt(TrainerCallback):
    def __init__(self, step):
        self.step = step

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            os.kill(os.getpid(), signal.SIGKILL)


def test_a_run_killed_in_mid_epoch_resumes_to_the_bit(llama, tmp_path):
    code = in_another_process(lambda: train(llama, tmp_path / "killed", callbacks=[KillAt(39)]))
    assert code == -signal.SIGKILL
    model, optimizer, resumed = train(llama, tmp_path / "killed")
    whole_model, whole_optimizer, whole = train(llama, None)
    assert resumed.resumed_at == 30
    assert resumed.losses[30:80] == whole.losses[30:80]
    assert resumed.losses == whole.losses
    assert_same_bits(model.state_dict(), whole_model.state_dict())
    for ours, theirs in zip(optimizer.state.values(), whole_optimizer.state.values(), strict=True):
        assert_same_bits(ours, theirs)
    assert optimizer.param_groups[0]["lr"] == whole_optimizer.param_groups[0]["lr"]
    for unit in ("steps", "tokens", "flops"):
        assert resumed.cost[unit] == whole.cost[unit]
    assert resumed.curves["train_loss"] == whole.curves["train_loss"]


def test_a_run_killed_while_it_writes_resumes_from_the_checkpoint_before(llama, tmp_path, monkeypatch):
    write = checkpoints.save_file

    def half(tensors, path):
        write(tensors, path)
        if "00000045" in str(path):
            os.truncate(path, os.path.getsize(path) // 2)
            os.kill(os.getpid(), signal.SIGKILL)

    def work():
        monkeypatch.setattr(checkpoints, "save_file", half)
        train(llama, tmp_path, steps=46)

    assert in_another_process(work) == -signal.SIGKILL
    assert any(path.suffix == ".tmp" for path in tmp_path.iterdir())
    model, _, resumed = train(llama, tmp_path, steps=46)
    whole, _, _ = train(llama, None, steps=46)
    assert resumed.resumed_at == 30
    assert_same_bits(model.state_dict(), whole.state_dict())
    assert not any(path.suffix == ".tmp" for path in tmp_path.iterdir())


PROGRAM = """
import importlib.util, sys
spec = importlib.util.spec_from_file_location("conftest", sys.argv[1]); made = importlib.util.module_from_spec(spec)
spec.loader.exec_module(made)
spec = importlib.util.spec_from_file_location("tests", sys.argv[2]); tests = importlib.util.module_from_spec(spec)
spec.loader.exec_module(tests)
tests.train(made.tiny_llama, sys.argv[3], checkpoint_every=3)
"""


@pytest.mark.slow
def test_fresh_interpreters_killed_from_outside_end_at_the_same_bits(llama, tmp_path):
    here = Path(__file__)
    command = [sys.executable, "-c", PROGRAM, str(here.with_name("conftest.py")), str(here), str(tmp_path)]
    for least in (10, 40, 70):
        process = subprocess.Popen(command)
        while not any(path.name > f"step-{least:08d}" for path in tmp_path.glob("step-*.json")):
            assert process.poll() is None
            time.sleep(0.01)
        process.send_signal(signal.SIGKILL)
        process.wait()
    subprocess.run(command, check=True)
    model, _, resumed = train(llama, tmp_path, checkpoint_every=3)
    whole, _, expected = train(llama, None)
    assert resumed.resumed_at == 90
    assert resumed.losses == expected.losses
    assert_same_bits(model.state_dict(), whole.state_dict())


def test_evaluation_curves_and_lora_weights_survive_a_resume(llama, batches, tmp_path):
    from peft import LoraConfig, get_peft_model

    def run(folder, **options):
        model = get_peft_model(llama(), LoraConfig(r=3, lora_dropout=0.2, target_modules=["q_proj"]))
        evaluate = {"evaluate": lambda model: {"probe": float(next(iter(adapters(model))).sum())}, "evaluate_every": 2}
        optimizer = adamw(model, 1e-2)
        return model, fit(
            model, batches, CrossEntropy(), optimizer, budget={"steps": 9}, checkpoint=folder, checkpoint_every=4,
            **evaluate, **options,
        )  # fmt: skip

    def adapters(model):
        return (parameter for name, parameter in model.named_parameters() if "lora_A" in name)

    in_another_process(lambda: run(tmp_path, callbacks=[KillAt(6)]))
    model, resumed = run(tmp_path)
    other, whole = run(None)
    assert resumed.resumed_at == 4
    assert resumed.curves == whole.curves
    assert_same_bits(model.state_dict(), other.state_dict())


def test_a_state_comes_back_as_it_was(tmp_path):
    weight = torch.randn(4, 6)
    state = {
        "tied": weight,
        "again": weight,
        "rows": weight[1:3],
        "transposed": weight.T,
        "bf16": torch.randn(3).bfloat16(),
        "flags": torch.tensor([True, False]),
        "scalar": torch.tensor(3, dtype=torch.int64),
        "empty": torch.zeros(0, 5),
        0: {"betas": (0.9, 0.95), "list": [1, None, "word", True, []]},
        "floats": [0.1 + 0.2, 1e-320, -0.0, math.inf, 5e300],
    }
    save_checkpoint(tmp_path, 7, state, {})
    step, loaded = load_checkpoint(tmp_path, {})
    assert step == 7
    assert_same_bits(loaded, state)
    assert isinstance(loaded[0]["betas"], tuple)
    assert math.copysign(1, loaded["floats"][2]) == -1


def test_tied_tensors_are_stored_once(tmp_path):
    weight = torch.zeros(1000)
    save_checkpoint(tmp_path, 1, {"a": weight, "b": weight}, {})
    assert (tmp_path / "step-00000001.safetensors").stat().st_size < 2 * weight.nbytes


def test_nothing_is_pickled(tmp_path, llama, monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError("pickle was used")

    for module, name in ((pickle, "dump"), (pickle, "dumps"), (pickle, "load"), (torch, "save"), (torch, "load")):
        monkeypatch.setattr(module, name, refuse)
    train(llama, tmp_path, steps=2)
    train(llama, tmp_path, steps=2)
    assert {path.suffix for path in tmp_path.iterdir()} == {".safetensors", ".json"}


def truncate(path):
    os.truncate(path, path.stat().st_size * 2 // 3)


def flip(path):
    content = bytearray(path.read_bytes())
    content[-3] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize(
    ("suffix", "harm"),
    [
        ("safetensors", truncate),
        ("safetensors", flip),
        ("safetensors", lambda path: path.unlink()),
        ("json", truncate),
        ("json", lambda path: path.write_text("")),
        ("json", lambda path: path.write_text("[]")),
    ],
    ids=["tensors cut", "bit flipped", "tensors missing", "json cut", "json empty", "json of something else"],
)
def test_a_damaged_checkpoint_is_passed_over_with_a_warning(tmp_path, suffix, harm):
    for step in (3, 6):
        save_checkpoint(tmp_path, step, {"x": torch.full((5,), float(step))}, {})
    harm(tmp_path / f"step-00000006.{suffix}")
    with pytest.warns(UserWarning, match=r"step-00000006\.json is damaged"):
        step, state = load_checkpoint(tmp_path, {})
    assert step == 3
    assert torch.equal(state["x"], torch.full((5,), 3.0))
    save_checkpoint(tmp_path, 5, state, {}, keep=1)  # what lies ahead of the new one belongs to the damaged past
    assert load_checkpoint(tmp_path, {})[0] == 5


def test_the_newest_are_kept_and_other_files_left_alone(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    for step in (1, 2, 10):
        save_checkpoint(tmp_path, step, {"x": torch.zeros(1)}, {}, keep=2)
    names = {path.name for path in tmp_path.iterdir()}
    expected = {f"step-{step:08d}.{suffix}" for step in (2, 10) for suffix in ("json", "safetensors")}
    assert names == expected | {"notes.txt"}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"seed": 12}, "seed: 11 there, 12 now"),
        ({"clip": 0.5}, "clip: 1.0 there, 0.5 now"),
        ({"accumulate": 1}, "accumulate: 2 there, 1 now"),
        ({"schedule": "linear"}, "schedule: .*'cosine'.* there, .*'linear'.* now"),
        ({"steps": 5}, "schedule: .*'steps': 3.* there, .*'steps': 5.* now"),
        ({"autocast": "bfloat16"}, "autocast: None there, 'torch.bfloat16' now"),
    ],
)
def test_a_checkpoint_of_other_settings_is_refused_with_both(llama, tmp_path, change, words):
    train(llama, tmp_path, steps=3)
    with pytest.raises(ValueError, match=words):
        train(llama, tmp_path, **{"steps": 3, **change})


@pytest.mark.parametrize("part", ["model", "data", "objective", "optimizer"])
def test_a_checkpoint_of_other_parts_is_refused(llama, batches, tmp_path, part):
    def run(changed=None):
        model = llama(num_hidden_layers=1) if changed == "model" else llama(num_hidden_layers=1, intermediate_size=48)
        data = (lambda index: batches(index + 1)) if changed == "data" else batches
        loss = CrossEntropy()
        objective = (lambda *given: loss(*given)) if changed == "objective" else loss
        optimizer = adamw(model, 0.02 if changed == "optimizer" else 0.01)
        fit(model, data, objective, optimizer, budget={"steps": 1}, checkpoint=tmp_path)

    run()
    with pytest.raises(ValueError, match=f"other settings \\({part}: .* there, .* now\\)"):
        run(part)


def test_a_finished_run_is_not_trained_again(llama, tmp_path):
    model, _, first = train(llama, tmp_path, steps=4, evaluate=lambda _: {"n": 1.0})

    def never(_):
        raise AssertionError("evaluated again")

    again, _, second = train(llama, tmp_path, steps=4, evaluate=never)
    assert second.cost == first.cost
    assert second.curves == first.curves
    assert second.losses == first.losses
    assert_same_bits(model.state_dict(), again.state_dict())


def test_a_budget_can_grow_where_the_schedule_does_not_depend_on_it(llama, tmp_path):
    train(llama, tmp_path, steps=4, schedule=None)
    model, _, longer = train(llama, tmp_path, steps=9, schedule=None)
    whole, _, _ = train(llama, None, steps=9, schedule=None)
    assert longer.resumed_at == 4
    assert_same_bits(model.state_dict(), whole.state_dict())


def test_a_budget_below_the_checkpoint_is_refused(llama, tmp_path):
    train(llama, tmp_path, steps=4, schedule=None)
    with pytest.raises(ValueError, match="is at step 4, beyond the budget of 3 steps"):
        train(llama, tmp_path, steps=3, schedule=None)


def test_a_full_disk_leaves_the_earlier_checkpoint_and_nothing_half_written(llama, tmp_path, monkeypatch):
    write = checkpoints.save_file

    def full(tensors, path):
        if "00000030" in str(path):
            path.write_bytes(b"half")
            raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")
        write(tensors, path)

    monkeypatch.setattr(checkpoints, "save_file", full)
    with pytest.raises(
        OSError, match=r"checkpoint of step 30 \(0\.\d MB\) could not be written to .*No space left"
    ) as error:
        train(llama, tmp_path, steps=31)
    assert error.value.errno == errno.ENOSPC
    assert {path.name for path in tmp_path.iterdir()} == {"step-00000015.json", "step-00000015.safetensors"}
    monkeypatch.setattr(checkpoints, "save_file", write)
    model, _, resumed = train(llama, tmp_path, steps=31)
    whole, _, _ = train(llama, None, steps=31)
    assert resumed.resumed_at == 15
    assert_same_bits(model.state_dict(), whole.state_dict())


def test_a_write_that_the_system_cuts_short_is_an_error(tmp_path):
    save_checkpoint(tmp_path, 1, {"x": torch.zeros(10)}, {})
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, limits[1]))
    try:
        with pytest.raises(OSError, match="checkpoint of step 2") as error:
            save_checkpoint(tmp_path, 2, {"x": torch.zeros(100_000)}, {})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert error.value.errno == errno.EFBIG
    assert load_checkpoint(tmp_path, {})[0] == 1
    assert len(list(tmp_path.iterdir())) == 2


def test_a_folder_that_cannot_be_written_is_refused_before_training(llama, tmp_path):
    (tmp_path / "file").write_text("")
    for folder in (tmp_path / "file" / "inside", "/proc/nowhere"):
        trained = []
        with pytest.raises(OSError, match=f"checkpoint folder {folder} cannot be written"):
            train(llama, folder, evaluate=trained.append)
        assert not trained


def test_a_read_only_folder_is_refused_before_training(llama, tmp_path, monkeypatch):
    def refuse(self, *args, **kwargs):
        raise PermissionError(errno.EACCES, "Permission denied", str(self))

    monkeypatch.setattr("pathlib.Path.touch", refuse)
    with pytest.raises(PermissionError, match=r"cannot be written \(Permission denied\); give a folder that can"):
        train(llama, tmp_path)


def test_a_checkpoint_of_a_newer_version_is_refused(tmp_path):
    path = save_checkpoint(tmp_path, 1, {}, {})
    path.write_text(json.dumps({**json.loads(path.read_text()), "format": 99}))
    with pytest.raises(ValueError, match="has format 99, this trialist reads up to 2; update trialist"):
        load_checkpoint(tmp_path, {})


def test_a_state_that_would_need_pickle_is_refused_by_its_path(tmp_path):
    with pytest.raises(ValueError, match=r"'/optimizer/0/hook' is a function"):
        save_checkpoint(tmp_path, 1, {"optimizer": [{"hook": lambda: None}]}, {})
    assert not list(tmp_path.iterdir())


def test_optimizer_state_keeps_a_dtype_other_than_the_parameters():
    weight = torch.nn.Parameter(torch.ones(3).bfloat16())
    optimizer = torch.optim.AdamW([weight])
    weight.grad = torch.ones_like(weight)
    optimizer.step()
    exact = torch.tensor([1 / 3, 2 / 3, 1 / 7])
    optimizer.state[weight]["exp_avg"] = exact.clone()
    state = optimizer.state_dict()
    other = torch.optim.AdamW([weight])
    load_optimizer_state(other, state)
    assert torch.equal(other.state[weight]["exp_avg"], exact)
