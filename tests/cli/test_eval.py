"""`trialist eval`, and `trialist compare` on the runs it leaves."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time

import psutil
import pytest

from tests.cli.test_cli import call
from tests.evaluation.benchmark_asset import save_model, write_asset
from tests.test_house import modules_after


@pytest.fixture(scope="module")
def material(tmp_path_factory):
    """A folder with two tiny models, a text and the made-up asset `benchmarks`."""
    folder = tmp_path_factory.mktemp("material")
    for seed, name in enumerate(("one", "two")):
        save_model(folder / name, seed=seed)
    save_model(folder / "short", context=64)
    texts = [f"document {at} {'and more ' * (at % 5)}" for at in range(24)]
    (folder / "own.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in texts))
    write_asset(folder / "cache")
    return folder


@pytest.fixture
def here(material, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("TRIALIST_HOME")
    monkeypatch.setenv("TRIALIST_CACHE", str(material / "cache"))
    return material


def evaluate(capsys, folder, model: str, *arguments: str) -> dict:
    code, out, err = call(capsys, "eval", *arguments, "--model", str(folder / model), "--json")
    assert code == 0, err
    return json.loads(out)["evaluations"][0]


def test_an_evaluation_is_stored_by_item_not_run_twice_and_compared(here, capsys):
    text = f"text:{here / 'own.jsonl'}"
    one = evaluate(capsys, here, "one", text)
    assert one["items"] == 24
    code, out, err = call(capsys, "eval", text, "--model", str(here / "one"))
    assert "1 of them already in the ledger" in err
    assert one["run"] in out
    assert "bits_per_byte" in out
    again = evaluate(capsys, here, "one", text, "--again")
    assert again["run"] != one["run"]
    assert again["metrics"] == one["metrics"]
    two = evaluate(capsys, here, "two", text)
    listed = json.loads(call(capsys, "runs", "--json")[1])
    assert {row["id"] for row in listed} == {one["run"], again["run"], two["run"]}
    assert {(row["trial"], row["status"]) for row in listed} == {("eval", "done")}

    assert "stand alone and have no verdict" in " ".join(call(capsys, "report", "eval")[2].split())
    code, out, err = call(capsys, "compare", one["run"][:7], two["run"], "--margin", "0.05", "--json")
    assert code == 0, err
    result = json.loads(out)
    assert result["better"] == "lower"
    change = two["metrics"]["bits_per_byte"] - one["metrics"]["bits_per_byte"]
    assert result["effect"] == pytest.approx(-change)
    assert result["low"] < result["effect"] < result["high"]
    assert result["verdict"] in ("supported", "small", "no effect", "contradicted", "inconclusive")
    assert "run " + two["run"] in call(capsys, "compare", one["run"], two["run"], "--metric", "bits")[1]


def test_a_recurrent_model_is_evaluated_at_several_numbers_of_steps_with_their_flops(here, capsys, tmp_path):
    from trialist.data.tokenizers import byte_tokenizer
    from trialist.models import ModularDecoderConfig, ModularDecoderForCausalLM, flops_per_token, initialize_

    config = ModularDecoderConfig(
        vocab_size=259, hidden_size=16, intermediate_size=24, num_hidden_layers=3, num_attention_heads=2, depth="recurrent",
        recurrent={"mean_recurrence": 3}, initializer_range=0.5, max_position_embeddings=256,
    )  # fmt: skip
    model = ModularDecoderForCausalLM(config)
    initialize_(model, 0)
    model.save_pretrained(tmp_path / "deep")
    byte_tokenizer().save_pretrained(tmp_path / "deep")
    text = f"text:{here / 'own.jsonl'}"
    plain = evaluate(capsys, tmp_path, "deep", text)["metrics"]
    code, out, err = call(capsys, "eval", text, "--model", str(tmp_path / "deep"), "--num-steps", "1,3", "--json")
    assert code == 0, err
    once, often = json.loads(out)["evaluations"]
    assert (once["num_steps"], often["num_steps"]) == (1, 3)
    assert often["metrics"] == plain != once["metrics"]
    assert often["flops_per_token"] == pytest.approx(flops_per_token(model, 256))
    table = call(capsys, "eval", text, "--model", str(tmp_path / "deep"), "--num-steps", "1,3")[1]
    assert f"{often['flops_per_token']:.3g}" in table
    for steps, words in (("2", "has no recurrent depth"), ("1,x", "whole numbers of at least 1, separated by commas")):
        code, _, err = call(capsys, "eval", text, "--model", str(here / "one"), "--num-steps", steps)
        assert code != 0
        assert words in " ".join(err.split())


def test_a_benchmark_of_lm_eval_runs_offline_with_its_clusters(here, capsys):
    pytest.importorskip("lm_eval", reason="the extra `eval` is not installed")
    one = evaluate(capsys, here, "one", "lm-eval:hellaswag", "--limit", "10")
    two = evaluate(capsys, here, "two", "hellaswag", "--limit", "10")
    assert one["benchmark"] == "hellaswag"
    assert one["items"] == 10
    result = json.loads(call(capsys, "compare", one["run"], two["run"], "--metric", "acc", "--json")[1])
    assert result["clusters"] == 5
    code, _, err = call(capsys, "eval", "arc_easy", "--model", str(here / "short"), "--shots", "2")
    assert code == 2
    assert "the model's context is 64" in " ".join(err.split())


@pytest.mark.slow
def test_an_evaluation_killed_half_way_is_done_again_and_leaves_no_folder(here, capsys, tmp_path):
    text = tmp_path / "long.txt"
    text.write_text("\n\n".join(f"line {at} of a text that takes a while " * 60 for at in range(400)))
    command = [sys.executable, "-m", "trialist", "eval", f"text:{text}", "--model", str(here / "one"), "--batch", "1"]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True)
    runs = tmp_path / ".trialist" / "runs"
    deadline = time.monotonic() + 120
    while not (runs.is_dir() and any(runs.iterdir())):
        assert process.poll() is None, "it ended before it could be killed"
        assert time.monotonic() < deadline
        time.sleep(0.02)
    process.kill()
    process.wait()
    left = psutil.Process()  # a worker ends when its parent is gone, and with it the last member of the session
    while any(p.is_running() and p.pid != left.pid and _session(p.pid) == process.pid for p in psutil.process_iter()):
        assert time.monotonic() < deadline + 30
        time.sleep(0.05)
    (run,) = json.loads(call(capsys, "runs", "--json")[1])
    assert run["status"] == "running"
    (runs / run["id"]).mkdir(exist_ok=True)
    result = evaluate(capsys, here, "one", f"text:{text}", "--batch", "1")
    assert result["run"] == run["id"]
    assert [row["status"] for row in json.loads(call(capsys, "runs", "--json")[1])] == ["done"]
    assert not any(runs.iterdir())
    (runs / run["id"]).mkdir()  # as a kill between the end of the run and the removal of its folder would leave it
    evaluate(capsys, here, "one", f"text:{text}", "--batch", "1")
    assert not any(runs.iterdir())


def _session(pid: int) -> int | None:
    try:
        return os.getsid(pid)
    except (ProcessLookupError, PermissionError):
        return None


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("hellaswga", "--model", "x"), "Did you mean 'hellaswag'"),
        (("hellaswag",), "which model?"),
        (("text", "--model", "one"), "which text?"),
        (("hellaswag", "--chat", "--model", "{here}/one"), "--chat goes with benchmarks whose answers are written"),
        (("text:none.txt", "--model", "one"), "no such file"),
        (("text:{here}/own.jsonl", "--model", "./nowhere"), "does not exist"),
        (("text:{here}/own.jsonl", "--model", "{here}/one", "--batch", "0"), "--batch must be at least 1"),
        (("text:{here}/own.jsonl", "--model", "{here}/short", "--length", "4096"), "context is 64"),
    ],
)
def test_wrong_use_exits_with_2_and_says_what_to_do(here, capsys, arguments, words):
    code, _, err = call(capsys, "eval", *(argument.format(here=here) for argument in arguments))
    assert code == 2
    assert words in " ".join(err.split())


def test_without_names_it_lists_the_benchmarks(capsys):
    code, out, _ = call(capsys, "eval")
    assert code == 0
    assert "hellaswag" in out
    assert "assets fetch benchmarks" in out
    assert "blimp" in [row["name"] for row in json.loads(call(capsys, "eval", "--json")[1])]


@pytest.mark.parametrize("arguments", ["'eval'", "'eval', '--help'", "'compare', '--help'"])
def test_help_and_list_load_no_heavy_library(arguments):
    code = f"from trialist.cli.main import main\ntry: main([{arguments}])\nexcept SystemExit: pass"
    assert not {"torch", "transformers", "sqlalchemy", "datasets", "lm_eval"} & modules_after(code)
