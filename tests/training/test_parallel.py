"""Two gloo processes under torchrun against one process. They run once; the tests look at what each of them wrote."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from tests.training import parallel_program as program
from trialist.training.checkpoints import load_checkpoint
from trialist.training.consolidation import consolidate
from trialist.training.fit import fit
from trialist.training.parallel import _add_gradients, _buckets, initialize_from_torchrun, shard_model

ROOT = Path(__file__).parents[2]
KINDS = ("ddp", "fsdp")
TRAINED = [(kind, family) for kind in KINDS for family in program.FAMILIES]

pytestmark = pytest.mark.distributed


def torchrun(*arguments):
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore::FutureWarning"}
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", *arguments]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=900)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ranks")
    sections = ("trajectories", "odd", "resuming", "decisions", "errors", "experts")
    run = torchrun("-m", "tests.training.parallel_program", str(folder), ",".join(KINDS), *sections)
    assert run.returncode == 0, run.stderr[-6000:]
    return folder


@pytest.fixture(scope="module")
def seen(folder):
    """What each rank saw, by name."""
    ranks = [json.loads((folder / f"{rank}.json").read_text()) for rank in (0, 1)]
    return lambda name: [rank[name] for rank in ranks]


@pytest.fixture(scope="module")
def alone():
    """Model, result and norms of the gradient of one process, by family of models."""
    made = {}

    def train(family):
        if family not in made:
            norms = program.Norms()
            arguments = {**program.TRAJECTORY, "steps": program.steps(family), "callbacks": [norms]}
            made[family] = *program.train(None, family, **arguments)[::2], norms.seen
        return made[family]

    return train


@pytest.mark.parametrize(("kind", "family"), TRAINED)
def test_training_on_two_ranks_have_the_losses_of_one_process(seen, alone, kind, family):
    result = alone(family)[1]
    assert result.loss < 0.99 * result.losses[0]
    for rank in seen(f"{kind}/trajectories/{family}"):
        assert rank["diverged"] is None
        assert rank["losses"] == pytest.approx(list(result.losses), rel=1e-5)
        drift = torch.tensor(rank["losses"]).double() - torch.tensor(result.losses).double()
        assert abs(float(drift.mean())) < 1e-6 * result.loss  # to neither side


@pytest.mark.parametrize(("kind", "family"), TRAINED)
def test_the_norm_that_is_clipped_is_that_of_the_whole_gradient(seen, alone, kind, family):
    expected = alone(family)[2]  # clipping and Adam would hide a gradient of another scale from the losses
    for rank in seen(f"{kind}/trajectories/{family}"):
        assert rank["norms"] == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize(("kind", "family"), TRAINED)
def test_two_ranks_spend_what_one_process_spends(seen, alone, kind, family):
    for rank in seen(f"{kind}/trajectories/{family}"):
        assert {**rank["cost"], "seconds": 0} == {**alone(family)[1].cost, "seconds": 0}


@pytest.mark.parametrize(("kind", "family"), TRAINED)
def test_evaluation_on_two_ranks_sees_the_model_of_one_process(seen, alone, kind, family):
    first, second = seen(f"{kind}/trajectories/{family}")
    assert first["curves"] == second["curves"]
    for name in ("nats", "square"):
        ours, expected = torch.tensor(first["curves"][name]), torch.tensor(alone(family)[1].curves[name])
        torch.testing.assert_close(ours, expected, rtol=2e-5, atol=0)


@pytest.mark.parametrize(("kind", "family"), TRAINED)
def test_a_checkpoint_of_two_ranks_becomes_a_model_folder(folder, alone, tmp_path, kind, family):
    model = program.make(family)
    consolidate(folder / kind / family, model, tmp_path / "model")
    expected = alone(family)[0].state_dict()
    for name, tensor in model.state_dict().items():
        torch.testing.assert_close(tensor, expected[name], rtol=1e-3, atol=2e-5)
    if family != "lora":
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
        text = program.batches(4)["input_ids"]
        assert torch.equal(loaded.eval()(text).logits, model.eval()(text).logits)
        assert not list((tmp_path / "model").glob("*.bin"))


@pytest.mark.parametrize("family", program.FAMILIES)
def test_sharded_weights_are_split_between_the_ranks(seen, family):
    whole = sum(parameter.numel() for parameter in program.make(family).parameters())
    first, second = (rank["held"] for rank in seen(f"fsdp/trajectories/{family}"))
    assert first + second == whole
    assert first < 0.55 * whole


@pytest.mark.parametrize("kind", KINDS)
def test_weights_that_some_ranks_or_none_use_train_as_on_one_process(seen, kind):
    model, _, result = program.train_odd(None, irregular=kind == "ddp")
    for losses, weights in zip(seen(f"{kind}/odd/losses"), seen(f"{kind}/odd/weights")):
        assert losses == pytest.approx(list(result.losses), rel=1e-5)
        for name, parameter in model.named_parameters():
            torch.testing.assert_close(torch.tensor(weights[name]), parameter.detach(), rtol=1e-4, atol=1e-6)
        assert weights["never"] == [1.0, 1.0]  # no gradient: no weight decay either


@pytest.mark.parametrize("kind", KINDS)
def test_a_buffer_is_that_of_the_first_rank_everywhere(seen, kind):
    assert seen(f"{kind}/odd/seen") == [12.0, 12.0]  # two micro-batches with an even index in each of six steps


@pytest.mark.parametrize("kind", KINDS)
def test_a_resume_gives_the_bits_of_an_uninterrupted_run(seen, kind):
    assert seen(f"{kind}/resuming/from the newest") == [[4, True]] * 2
    assert seen(f"{kind}/odd/resumed") == [[4, True]] * 2  # with shards of no rows
    assert seen(f"{kind}/resuming/another seed") == [False] * 2  # the dropout is there


@pytest.mark.parametrize("kind", KINDS)
def test_all_ranks_pass_over_a_damaged_checkpoint_and_one_says_so(seen, kind):
    assert seen(f"{kind}/resuming/from the one before") == [[8, True]] * 2
    told, silent = seen(f"{kind}/resuming/warnings")
    assert re.search(r"step-00000009\.json is damaged \(step-00000009.*safetensors has another hash", told[0])
    assert silent == []


@pytest.mark.parametrize("kind", KINDS)
def test_the_newest_checkpoints_are_kept(seen, kind):
    suffixes = ("", ".json", ".safetensors") if kind == "fsdp" else (".json", ".safetensors")
    expected = [f"step-{step:08d}{suffix}" for step in (8, 9) for suffix in suffixes]
    assert seen(f"{kind}/resuming/kept") == [expected] * 2


@pytest.mark.parametrize("kind", KINDS)
def test_checkpoints_hold_nothing_pickled(folder, kind):
    files = [path for path in (folder / kind / "resumed").rglob("*") if path.is_file()]
    assert {path.suffix for path in files} == {".json", ".safetensors"}


@pytest.mark.parametrize("kind", KINDS)
def test_a_checkpoint_of_other_ranks_is_refused_with_both(seen, folder, kind):
    other = {"ddp": "fsdp", "fsdp": "ddp"}[kind]
    for name, words in seen(f"{kind}/resuming/other kind"):
        assert name == "ValueError"
        assert f"parallel: '{kind} on 2 ranks' there, '{other} on 2 ranks' now" in words
    with pytest.raises(ValueError, match=f"parallel: '{kind} on 2 ranks' there, None now"):
        program.train(None, "llama", schedule="cosine", checkpoint=folder / kind / "llama")
    newest = json.loads((folder / kind / "llama" / "step-00000050.json").read_text())
    with pytest.raises(ValueError, match=f"'{kind} on 2 ranks' there, '{kind} on 3 ranks' now"):
        load_checkpoint(folder / kind / "llama", {**newest["settings"], "parallel": f"{kind} on 3 ranks"})


@pytest.mark.parametrize("kind", KINDS)
def test_a_damaged_shard_is_passed_over_when_a_model_is_made(folder, tmp_path, kind):
    with pytest.warns(UserWarning, match="step-00000009.json is damaged"):
        consolidate(folder / kind / "damaged", program.make("tied, recomputed"), tmp_path / "model")
    with (
        pytest.warns(UserWarning, match="damaged"),
        pytest.raises(FileNotFoundError, match="does not hold an intact checkpoint of step 9"),
    ):
        consolidate(folder / kind / "damaged", program.make("tied, recomputed"), tmp_path / "other", step=9)
    assert not (tmp_path / "other").exists()


@pytest.mark.parametrize("kind", KINDS)
def test_a_budget_in_tokens_counts_those_of_all_ranks(seen, kind):
    expected = program.train(None, steps=4)[2].cost
    for cost in seen(f"{kind}/decisions/tokens"):
        assert {**cost, "seconds": 0} == {**expected, "seconds": 0}


@pytest.mark.parametrize("kind", KINDS)
def test_a_budget_in_seconds_ends_at_the_same_step_on_all_ranks(seen, kind):
    first, second = seen(f"{kind}/decisions/seconds")
    assert first == second
    assert first[1] >= 0.4


@pytest.mark.parametrize("kind", KINDS)
def test_ranks_draw_by_micro_batch(seen, kind):
    first, second = seen(f"{kind}/decisions/draws")
    assert {"2", "3", "5"} <= set(first)
    assert {"1", "4"} <= set(second)
    for index in set(first) & set(second) - {"0"}:  # computed along at weight 0
        assert first[index] == second[index]
    together = {**second, **first}
    assert len(set(together.values())) == len(together) == 6


@pytest.mark.parametrize("kind", KINDS)
def test_a_divergence_on_one_rank_ends_training_on_all_before_it_reaches_the_weights(seen, kind):
    assert seen(f"{kind}/decisions/diverged") == [["loss is nan at step 3", True]] * 2


@pytest.mark.parametrize("kind", KINDS)
def test_what_a_callback_of_one_rank_asks_for_all_ranks_do(seen, kind):
    for rank, (heard, evaluated, told) in enumerate(seen(f"{kind}/decisions/callbacks")):
        assert heard == [[step, rank == 0, rank == 0] for step in (1, 2, 3)]
        assert evaluated == [[2.0, 0.0], [3.0, 0.0]]  # what rank 0 measured
        assert told == (rank == 0)


@pytest.mark.parametrize("kind", KINDS)
def test_what_cannot_work_is_refused_on_every_rank(seen, kind):
    words = {
        "accumulate": "accumulate is 1: that many micro-batches of a step cannot be shared by 2 ranks; give accumulate=2",
        "seed": "rank 1 was started with other settings (seed: 0 on rank 0, 1)",
    }
    if kind == "ddp":
        words |= {
            "wrapped": "model is wrapped in DistributedDataParallel",
            "whole": "that trialist.training.parallel.shard",
        }
    else:
        words |= {
            "optimizer": "make it after shard_model", "twice": "sharded already", "alone": "give parallel='fsdp', not None"
        }  # fmt: skip
    for name, expected in words.items():
        for error in seen(f"{kind}/errors/{name}"):
            assert error[0] == "ValueError"
            assert expected in error[1]


@pytest.mark.parametrize("kind", KINDS)
def test_a_disk_that_is_full_for_one_rank_is_an_error_on_all_and_leaves_nothing_half_written(seen, kind):
    for name, words in seen(f"{kind}/errors/full disk"):
        assert name == "OSError"
        assert "No space left on device" in words
        assert "Earlier checkpoints are intact" in words
    left = ["step-00000002", "step-00000002.json", "step-00000002.safetensors"]
    assert seen(f"{kind}/errors/left") == [left if kind == "fsdp" else left[1:]] * 2


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["batchnorm", "frozen and grown"])
def test_experts_train_on_two_ranks_as_on_one(seen, kind, name):
    """Also where old experts are frozen and new ones were grown: their tables take no part, or a part of their own."""
    alone = program.train_experts(None, program.EXPERTS[name])
    for found in seen(f"{kind}/experts/{name}"):
        assert found["losses"] == pytest.approx(alone["losses"], rel=1e-4)
        assert all(found["kept"])
        assert len(found["kept"]) == len(alone["kept"]) == (3 if name == "frozen and grown" else 0)


@pytest.mark.parametrize("kind", KINDS)
def test_statistics_over_ranks_are_those_of_one_process_with_the_batches_of_all(seen, kind):
    alone = program.train_experts(None, program.EXPERTS["batchnorm"], program.pairs, accumulate=2)
    apart = program.train_experts(None, program.EXPERTS["batchnorm"], program.equal_batches)
    first, second = seen(f"{kind}/experts/sync_batchnorm")
    assert first == second
    assert first["losses"] == pytest.approx(alone["losses"], rel=1e-4)
    assert first["statistics"] == pytest.approx(alone["statistics"], rel=1e-3)
    assert first["losses"] != pytest.approx(apart["losses"], rel=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_a_rank_without_a_batch_is_refused_where_statistics_are_taken_over_ranks(seen, kind):
    for error in seen(f"{kind}/experts/uneven"):
        assert error[0] == "ValueError"
        assert "layers.1.ffn.query_norm normalises over the batches of all 2 ranks" in error[1]
        assert "give a multiple of 2" in error[1]


def test_data_parallel_gradients_of_experts_are_the_mean_of_those_of_the_ranks(seen):
    means = None
    for rank in (0, 1):
        model = program.EXPERTS["frozen and grown"]()
        model(**program.equal_batches(rank)).loss.backward()
        own = [None if p.grad is None else p.grad / 2 for p in model.parameters()]
        means = own if means is None else [a if a is None else a + b for a, b in zip(means, own, strict=True)]
    for found in seen("ddp/experts/gradients"):
        for ours, mean in zip(found, means, strict=True):
            assert (ours is None) is (mean is None)
            if mean is not None:
                torch.testing.assert_close(torch.tensor(ours), mean, rtol=1e-4, atol=1e-6)


def test_a_model_folder_is_made_of_a_checkpoint_of_one_process_too(tmp_path):
    model, _, _ = program.train(None, steps=2, checkpoint=tmp_path / "checkpoints")
    made = program.make("llama")
    assert consolidate(tmp_path / "checkpoints", made, tmp_path / "model") == tmp_path / "model"
    assert all(torch.equal(a, b) for a, b in zip(made.state_dict().values(), model.state_dict().values()))
    with pytest.raises(FileExistsError, match="model is there already; give a new folder"):
        consolidate(tmp_path / "checkpoints", made, tmp_path / "model")
    with pytest.raises(ValueError, match=r"of another model: .* is absent there, \(.*\) in the model given"):
        consolidate(tmp_path / "checkpoints", program.make("modular"), tmp_path / "other")
    with pytest.raises(FileNotFoundError, match="does not hold an intact checkpoint"):
        consolidate(tmp_path / "nowhere", made, tmp_path / "other")


def test_outside_of_torchrun_the_way_to_start_is_named(monkeypatch):
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(ValueError, match=r"RANK, WORLD_SIZE.* not set .*torchrun --standalone --nproc-per-node 2"):
        initialize_from_torchrun()
    model = program.make("llama")
    optimizer = program.adamw(model, 1e-3)
    for kind in KINDS:
        with pytest.raises(ValueError, match="start the script by torchrun"):
            fit(model, program.batches, program.CrossEntropy(), optimizer, parallel=kind)
    with pytest.raises(ValueError, match="parallel is 'zero3'; choose from"):
        fit(model, program.batches, program.CrossEntropy(), optimizer, parallel="zero3")
    with pytest.raises(ValueError, match="needs several processes"):
        shard_model(model)


def test_buckets_hold_every_gradient_once_and_are_not_larger_than_wanted(monkeypatch):
    monkeypatch.setattr("trialist.training.parallel.BUCKET", 40)
    dtypes = [torch.float32, torch.bfloat16]
    gradients = [torch.full((size,), float(size), dtype=dtypes[size % 2]) for size in (3, 4, 8, 1, 25, 2, 6, 5)]
    buckets = list(_buckets(gradients))
    assert sorted(id(gradient) for bucket in buckets for gradient in bucket) == sorted(map(id, gradients))
    assert all(len(bucket) == 1 or sum(gradient.nbytes for gradient in bucket) <= 40 for bucket in buckets)
    assert all(len({gradient.dtype for gradient in bucket}) == 1 for bucket in buckets)
    assert len(buckets) < len(gradients)


def test_gradients_in_several_buckets_come_back_in_their_places(monkeypatch):
    class Sent:
        def __init__(self, tensor):
            tensor.mul_(2)

        def wait(self):
            pass

    monkeypatch.setattr("trialist.training.parallel.BUCKET", 40)
    monkeypatch.setattr("torch.distributed.all_reduce", lambda tensor, async_op: Sent(tensor))
    torch.manual_seed(0)
    gradients = [torch.randn(shape) for shape in ((3, 2), (5,), (1,), (2, 7), (4, 3))]
    gradients.append(torch.randn(4, 6).T)
    expected = [2 * gradient for gradient in gradients]
    _add_gradients(gradients)
    assert all(torch.equal(a, b) for a, b in zip(gradients, expected))


@pytest.mark.slow
def test_the_example_of_the_page_on_training_runs(tmp_path):
    page = (ROOT / "docs" / "training.md").read_text()
    script = re.search(r"^```bash\n(.*?)^```", page, re.MULTILINE | re.DOTALL)[1]
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    environment = {**os.environ, "PATH": path, "OMP_NUM_THREADS": "1"}
    run = subprocess.run(
        ["bash", "-ec", script], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=900
    )
    assert run.returncode == 0, run.stderr[-3000:]
    assert len(run.stdout.splitlines()) == 1  # one rank prints
    AutoModelForCausalLM.from_pretrained(tmp_path / "model")


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_a_rank_killed_from_outside_costs_the_steps_since_the_last_whole_checkpoint(tmp_path, kind):
    command = ("-m", "tests.training.parallel_program", str(tmp_path), kind, "killed")
    first = torchrun(*command)
    assert first.returncode != 0
    assert "SIGKILL" in first.stderr
    assert (tmp_path / kind / "killed" / "step-00000004.json").is_file()
    half = tmp_path / kind / "killed" / "step-00000008"  # as it looks when the machine goes down in a write
    if kind == "fsdp":
        shutil.copytree(half.with_name("step-00000004"), half)
    second = torchrun(*command)
    assert second.returncode == 0, second.stderr[-3000:]
    for rank in (0, 1):
        found = json.loads((tmp_path / f"{rank}.json").read_text())
        assert found[f"{kind}/killed/resumed"] == [4, True]
