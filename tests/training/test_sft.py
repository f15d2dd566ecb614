from __future__ import annotations

import json
import multiprocessing
import os
import signal
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback

from trialist.data.tokenizers import byte_tokenizer
from trialist.models import enable_selective_attention, load_model
from trialist.training import progress
from trialist.training.output import ModelOutput
from trialist.training.sft import SupervisedFineTuning

CHATML = (
    "{% for m in messages %}{{ m['role'] + ':' + m['content'] + eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant:' }}{% endif %}"
)


@pytest.fixture
def folder(llama, tmp_path) -> Path:
    """A saved tiny Llama with the byte tokenizer."""
    model = llama(vocab_size=259, max_position_embeddings=128)
    model.save_pretrained(tmp_path / "model")
    tokenizer = byte_tokenizer()
    tokenizer.split_special_tokens = False
    tokenizer.chat_template = CHATML
    tokenizer.save_pretrained(tmp_path / "model")
    return tmp_path


@pytest.fixture
def rows(folder) -> str:
    path = folder / "rows.jsonl"
    made = [{"prompt": f"{'say it ' * (i % 4)}{i}: ", "completion": "yes" if i % 3 else "no, no"} for i in range(30)]
    path.write_text("".join(json.dumps(row) + "\n" for row in made))
    return str(path)


def recipe(folder, data, output="out", **options):
    given = {"steps": 6, "batch": 3, "learning_rate": 3e-3, "checkpoint_every": 2, "log_every": 1, "device": "cpu"}
    return SupervisedFineTuning(str(folder / "model"), data, str(folder / output), **{**given, **options})


def run(*arguments, **options):
    said: list[str] = []
    return recipe(*arguments, **options)(said.append), said


def weights(folder):
    return AutoModelForCausalLM.from_pretrained(folder).state_dict()


def assert_same_bits(a, b):
    assert a.keys() == b.keys()
    assert all(torch.equal(a[name], b[name]) for name in a)


def test_it_learns_and_leaves_a_model_that_loads_and_generates(folder, rows):
    result, said = run(folder, rows, steps=40, learning_rate=1e-2, checkpoint_every=40)
    assert result["validation loss after"] < 0.7 * result["validation loss before"]
    model = AutoModelForCausalLM.from_pretrained(folder / "out")
    tokenizer = AutoTokenizer.from_pretrained(folder / "out")
    assert model.config.use_cache
    assert tokenizer.chat_template == CHATML
    prompt = tokenizer("4: ", return_tensors="pt")
    assert model.generate(**prompt, max_new_tokens=3).shape[1] == prompt["input_ids"].shape[1] + 3
    assert sorted(path.name for path in (folder / "out").iterdir() if path.is_dir()) == []
    assert any(line.startswith("step 40/40") for line in said)


def test_the_same_command_again_returns_what_was_trained_and_another_is_refused(folder, rows):
    first, _ = run(folder, rows)
    again, said = run(folder, rows, log_every=5)
    assert again == first
    assert "holds the finished model" in said[0]
    with pytest.raises(
        ValueError, match=r"holds a finished model of other settings \(learning_rate: 0.003 there, 0.1 now\)"
    ):
        run(folder, rows, learning_rate=0.1)


class KillAt(TrainerCallback):
    def __init__(self, step):
        self.step = step

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            os.kill(os.getpid(), signal.SIGKILL)


def killed(work) -> None:
    process = multiprocessing.get_context("fork").Process(target=work)
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL


@pytest.mark.parametrize("lora", [0, 3], ids=["full", "lora"])
def test_a_killed_run_goes_on_to_the_bit(folder, rows, monkeypatch, lora):
    def interrupted():
        monkeypatch.setattr(progress.Lines, "on_pre_optimizer_step", KillAt(5).on_pre_optimizer_step, raising=False)
        run(folder, rows, "killed", lora=lora)

    killed(interrupted)
    checkpoints = folder / "killed" / "checkpoint"
    (checkpoints / "checkpoint-5").mkdir()  # one that was being written
    result, said = run(folder, rows, "killed", lora=lora)
    whole, _ = run(folder, rows, "whole", lora=lora)
    assert "goes on from step 4" in said
    assert any("was being written" in line for line in said)
    assert result["validation loss after"] == whole["validation loss after"]
    assert result["validation loss before"] == whole["validation loss before"]
    assert_same_bits(weights(folder / "killed"), weights(folder / "whole"))


def test_an_interrupted_run_is_not_gone_on_with_other_settings(folder, rows, monkeypatch):
    killed(lambda: (monkeypatch.setattr(ModelOutput, "write", lambda *_, **__: os.kill(os.getpid(), signal.SIGKILL)),
                    run(folder, rows)))  # fmt: skip
    assert not (folder / "out" / "config.json").exists()
    with pytest.raises(ValueError, match=r"holds an interrupted run of other settings \(batch: 3 there, 2 now\)"):
        run(folder, rows, batch=2)
    result, said = run(folder, rows)
    assert "goes on from step 6" in said
    assert result["steps"] == 6


def test_packing_changes_nothing_but_the_work(folder, rows):
    results = [run(folder, rows, name, packing=packing)[0] for name, packing in (("packed", True), ("padded", False))]
    assert results[0]["validation loss after"] == pytest.approx(results[1]["validation loss after"], rel=1e-5)
    packed, padded = weights(folder / "packed"), weights(folder / "padded")
    for name in packed:
        torch.testing.assert_close(packed[name], padded[name], rtol=1e-4, atol=1e-4)


def test_gradient_checkpointing_changes_nothing_but_the_memory(folder, rows):
    for lora in (0, 2):
        a, b = (
            run(folder, rows, f"{name}{lora}", gradient_checkpointing=name == "on", lora=lora, steps=3)[0]
            for name in ("on", "off")
        )
        assert a["validation loss after"] == pytest.approx(b["validation loss after"], rel=1e-6)


def test_accumulation_weighs_every_token_the_same(folder, rows):
    results = [
        run(folder, rows, f"{batch}", batch=batch, accumulate=6 // batch, validation=0.0, steps=4) for batch in (6, 2)
    ]
    one, three = (weights(folder / name) for name in ("6", "2"))
    assert [line.split("  ")[1] for line in results[0][1] if line.startswith("step")] == [
        line.split("  ")[1] for line in results[1][1] if line.startswith("step")
    ]
    for name in one:
        torch.testing.assert_close(one[name], three[name], rtol=1e-4, atol=1e-4)


def test_an_adapter_alone_or_merged_is_the_same_model(folder, rows):
    run(folder, rows, "merged", lora=3)
    run(folder, rows, "adapter", lora=3, save="adapter")
    assert not (folder / "adapter" / "config.json").exists()
    ids = torch.arange(40, 60)[None]
    merged, adapter = (
        AutoModelForCausalLM.from_pretrained(folder / name).eval()(ids).logits for name in ("merged", "adapter")
    )
    untrained = AutoModelForCausalLM.from_pretrained(folder / "model").eval()(ids).logits
    torch.testing.assert_close(merged, adapter, rtol=1e-4, atol=1e-5)
    assert (merged - untrained).abs().max() > 1e-3


def test_bfloat16_trains_float32_weights(folder, rows):
    plain, _ = run(folder, rows, "plain")
    half, _ = run(folder, rows, "half", dtype="bfloat16")
    assert half["validation loss after"] == pytest.approx(plain["validation loss after"], rel=0.02)
    assert half["validation loss after"] != plain["validation loss after"]
    assert {weight.dtype for weight in weights(folder / "half").values()} == {torch.float32}


def test_conversations_and_a_template_of_ones_own(folder):
    path = folder / "chat.jsonl"
    talk = [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "bye"}]
    path.write_text("".join(json.dumps({"messages": talk, "id": i}) + "\n" for i in range(8)))
    (folder / "mine.jinja").write_text(CHATML.replace(":'", ">'"))
    result, said = run(folder, str(path), chat_template=str(folder / "mine.jinja"), validation=0.0)
    assert "validation loss after" not in result
    assert "8 examples, 200 tokens, 32 of them count; held out: 0" in said  # "bye" and its end
    assert AutoTokenizer.from_pretrained(folder / "out").chat_template == CHATML.replace(":'", ">'")


def test_tensorboard_gets_its_events_into_the_output(folder, rows):
    pytest.importorskip("tensorboard")
    run(folder, rows, report_to=("tensorboard",))
    assert list((folder / "out" / "logs").glob("events*"))


def test_a_diverged_run_stops_with_words(folder, rows):
    model = AutoModelForCausalLM.from_pretrained(folder / "model")
    with torch.no_grad():
        model.lm_head.weight[121, 0] = float("nan")
    model.save_pretrained(folder / "model")
    with pytest.raises(ValueError, match=r"training has diverged: loss is nan at step 1; lower --learning-rate"):
        run(folder, rows, validation=0.0)
    assert not (folder / "out" / "config.json").exists()


def bad(folder, name):
    data = folder / "bad.jsonl"
    if name == "no column":
        data.write_text('{"question": "a", "answer": "b"}\n')
        return {"data": str(data)}, r"expected the column 'messages', or.*found 'question', 'answer'"
    if name == "wrong column":
        data.write_text('{"question": "a", "answer": "b"}\n')
        return {"data": str(data), "columns": "prompt=quest,completion=answer"}, "expected the column 'quest', found"
    if name == "broken line":
        data.write_text('{"prompt": "a", "completion": "b"}\n{"prompt": \n')
        return {"data": str(data)}, "line 2: not valid JSON"
    if name == "too long":
        return {"length": 200}, r"--length 200 is longer than .*takes, 128 tokens"
    if name == "no tokenizer":
        for file in (folder / "model").glob("token*"):
            file.unlink()
        return {}, "has no tokenizer"
    if name == "foreign folder":
        (folder / "out").mkdir()
        (folder / "out" / "thesis.txt").write_text("x")
        return {}, r"is not empty \(it holds thesis.txt\)"
    if name == "logger":
        return {"report_to": ("wandb",)}, "--report-to wandb: not installed here"
    if name == "one row":
        data.write_text('{"prompt": "a", "completion": "b"}\n')
        return {"data": str(data)}, "pass --validation 0"
    return {name: 0}, f"--{name} must be "


@pytest.mark.parametrize(
    "name",
    ["no column", "wrong column", "broken line", "too long", "no tokenizer", "foreign folder", "logger", "one row", "steps",
     "epochs"],
)  # fmt: skip
def test_errors_are_said_in_words_before_anything_is_written(folder, rows, name):
    options, message = bad(folder, name)
    before = sorted(folder.rglob("*"))
    with pytest.raises(ValueError, match=message):
        run(folder, options.pop("data", rows), **options)
    assert sorted(folder.rglob("*")) == before


@pytest.mark.slow
@pytest.mark.asset
def test_a_real_model_learns_real_rows_and_generates(shared_data, tmp_path):
    from trialist.data import assets

    try:
        assets.path("smollm2-135m-instruct")
    except FileNotFoundError as error:
        pytest.skip(str(error))
    lines = (shared_data / "gsm8k" / "train.jsonl").read_text().splitlines()
    short = [line for line in lines if len(line) < 300]
    (tmp_path / "train.jsonl").write_text("\n".join(short[:60]))
    (tmp_path / "held.jsonl").write_text("\n".join(short[60:68]))
    result = SupervisedFineTuning(
        "smollm2-135m-instruct", str(tmp_path / "train.jsonl"), str(tmp_path / "out"), lora=8, batch=2, steps=24, chat=True,
        columns="prompt=question,completion=answer", validation_data=str(tmp_path / "held.jsonl"), learning_rate=5e-4,
    )(print)  # fmt: skip
    assert result["validation loss after"] < 0.9 * result["validation loss before"]
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    ask = [{"role": "user", "content": json.loads(short[60])["question"]}]
    prompt = tokenizer.apply_chat_template(ask, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    answers = []
    for place in (tmp_path / "out", assets.path("smollm2-135m-instruct")):
        written = AutoModelForCausalLM.from_pretrained(place).generate(**prompt, max_new_tokens=30, do_sample=False)
        answers.append(tokenizer.decode(written[0, prompt["input_ids"].shape[1] :]))
    assert len(answers[0].split()) > 3
    assert answers[0] != answers[1]


def test_a_price_on_memory_needs_a_model_that_can_forget_and_makes_it_forget(folder, rows, llama):
    with pytest.raises(ValueError, match=r"--memory-price 0\.5: .* has no selective attention"):
        run(folder, rows, memory_price=0.5)
    with pytest.raises(ValueError, match="--memory-price must be at least 0, not -1"):
        run(folder, rows, memory_price=-1.0)
    model = enable_selective_attention(AutoModelForCausalLM.from_pretrained(folder / "model"))
    model.save_pretrained(folder / "model")
    kept = {}
    for price in (0.05, 20.0):
        result, said = run(folder, rows, f"out {price}", memory_price=price, steps=20, learning_rate=1e-2)
        kept[price] = result["validation share of context kept after"]
        assert any("share of context kept" in line for line in said)
        assert load_model(str(folder / f"out {price}")).config.selective_attention["layers"] == [0, 1]
    assert kept[20.0] < 0.8 * kept[0.05]
    plain, _ = run(folder, rows, "plain")
    assert "validation share of context kept after" not in plain
