"""The commands about a model's context: `apply selective-attention`, `apply prune-context`, `analyze context-memory`."""

from __future__ import annotations

import json
import math
import random
from pathlib import Path

import pytest
import torch

from trialist.cli.main import main
from trialist.data.tokenizers import byte_tokenizer
from trialist.models import ModularDecoderConfig, ModularDecoderForCausalLM, get_budgets, load_model
from trialist.weights.context_pruning import PruneContext

SIZES = {"vocab_size": 259, "hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 2, "num_key_value_heads": 1,
         "max_position_embeddings": 48}  # fmt: skip


def saved(model, folder: Path) -> str:
    model.save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def llama(tmp_path_factory) -> str:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    return saved(LlamaForCausalLM(LlamaConfig(num_hidden_layers=2, **SIZES)), tmp_path_factory.mktemp("llama"))


@pytest.fixture(scope="module")
def text(tmp_path_factory) -> str:
    chance = random.Random(0)
    rows = [{"text": " ".join(chance.choices(("bara", "lomi", "ucas", "fä"), k=3 + n % 9))} for n in range(60)]
    path = tmp_path_factory.mktemp("text") / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.fixture
def call(capsys, tmp_path, monkeypatch, text):
    monkeypatch.chdir(tmp_path)

    def run(*arguments: str) -> tuple[int, dict[str, str], str]:
        """Exit code, result by label, and what was said on the way."""
        try:
            code = main([*arguments[:2], "--tokens", "400", "--device", "cpu", *arguments[2:]])
        except SystemExit as stop:
            code = int(stop.code or 0)
        captured = capsys.readouterr()
        pairs = (line.split("  ", 1) for line in captured.out.splitlines() if "  " in line)
        return code, {label: value.strip() for label, value in pairs}, " ".join(captured.err.split())

    return run


@pytest.fixture(scope="module")
def selective(llama, tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("selective") / "model"
    assert (
        main(["apply", "selective-attention", "--model", llama, "--output", str(folder), "--selector-head", "1"]) == 0
    )
    return str(folder)


def test_a_model_folder_with_selective_attention_has_the_same_weights_and_attends_selectively(llama, selective):
    plain, changed = load_model(llama), load_model(selective)
    assert changed.config.selective_attention["selector_head"] == [1, 1]
    for name, weight in plain.state_dict().items():
        assert torch.equal(weight, changed.state_dict()[name])
    ids = torch.arange(40)[None]
    assert not torch.equal(plain(ids).logits, changed(ids).logits)


def test_heads_are_chosen_on_the_text_and_the_cost_is_told(call, llama, text):
    options = ("--layers", "1", "--no-protect-bos")
    code, shown, _ = call(
        "apply",
        "selective-attention",
        "--model",
        llama,
        "--output",
        "out",
        "--selector-head",
        "auto",
        "--data",
        text,
        *options,
    )
    assert code == 0
    settings = load_model("out").config.selective_attention
    assert (settings["layers"], settings["protect_bos"]) == ([1], False)
    assert shown["selector head of layer"] == f"1: {settings['selector_head'][0]}"
    before, after = (float(word) for word in shown["bits per byte"].replace("before,", "").replace("after", "").split())
    assert 6 < before < 10
    assert 6 < after < 10


@pytest.mark.parametrize("policy", [(), ("--policy", "recency", "--sinks", "1"), ("--policy", "h2o")], ids=str)
@pytest.mark.parametrize("kind", ["llama", "selective"])
def test_budgets_are_found_shown_and_saved(call, request, kind, policy, text):
    model = request.getfixturevalue(kind)
    code, shown, said = call(
        "apply",
        "prune-context",
        "--model",
        model,
        "--data",
        text,
        "--output",
        "out",
        "--total",
        "30",
        "--step",
        "4",
        *policy,
    )
    assert code == 0
    assert "to find budgets on" in said
    pruned = load_model("out")
    budgets = get_budgets(pruned)
    assert sum(budgets) == 30
    assert [shown[f"layer {layer}"] for layer in (0, 1)] == [f"keeps {budget} tokens" for budget in budgets]
    enabled = getattr(pruned.config, "eviction", None)
    wanted = policy[1] if policy else {"llama": "h2o", "selective": None}[kind]
    assert (enabled and enabled["policy"]) == wanted
    kept, everything = (float(word.replace(",", "")) for word in shown["bytes of cache"].split()[:4:3])
    assert kept < everything
    prompt = torch.arange(40)[None]
    cached = pruned.generate(prompt, max_new_tokens=5, do_sample=False)
    assert torch.equal(cached, pruned.generate(prompt, max_new_tokens=5, do_sample=False, use_cache=False))


def test_a_pruned_model_is_pruned_anew_from_everything_also_by_another_policy(call, llama, text):
    common = ("--data", text, "--step", "8")
    call("apply", "prune-context", "--model", llama, "--output", "one", "--total", "20", *common)
    call("apply", "prune-context", "--model", "one", "--output", "two", "--total", "60", *common)
    assert sum(get_budgets(load_model("two"))) == 60
    call(
        "apply", "prune-context", "--model", "one", "--output", "three", "--total", "60", "--policy", "recency", *common
    )
    assert load_model("three").config.eviction["policy"] == "recency"


def test_a_goal_in_bits_per_byte_is_kept_on_the_text_that_the_budgets_are_found_on(call, selective, text):
    from trialist.data.samples import sample_halves
    from trialist.models import set_budgets
    from trialist.weights.context_text import bits_per_byte, rows_for

    entry = PruneContext(model=selective, data=text, output="out", within=0.001, tokens=400, step=2)
    entry(say=lambda _: None)
    pruned = load_model("out")
    sample, _ = sample_halves(entry.documents(text), byte_tokenizer(), tokens=400, length=48)
    rows = rows_for(pruned, sample)
    bits = [bits_per_byte(pruned, rows, sample.bytes, batch=8)]
    set_budgets(pruned, None)
    full = bits_per_byte(pruned, rows, sample.bytes, batch=8)
    assert bits[0] <= full + 0.001
    assert any(budget is not None for budget in get_budgets(load_model("out")))


def decoder(folder: Path, *kinds: str) -> str:
    model = ModularDecoderForCausalLM(
        ModularDecoderConfig(num_hidden_layers=len(kinds), layer_types=list(kinds), **SIZES)
    )
    return saved(model, folder)


def test_bits_per_byte_are_those_of_an_evaluation_whether_documents_can_be_packed_or_not(call, llama, tmp_path):
    from trialist.data.corpora import load_documents
    from trialist.evaluation.bits_per_byte import bits_per_byte

    long = tmp_path / "long.jsonl"  # one document, as the order of several decides where they are cut
    long.write_text(json.dumps({"text": "".join(f"{n} is not {n + 1}, ä. " for n in range(40))}))
    for folder in (llama, decoder(tmp_path / "recurrent", "min_gru", "selective_attention")):
        out = tmp_path / f"{Path(folder).name}.json"
        code, _, _ = call("analyze", "context-memory", "--model", folder, "--data", str(long), "--tokens", "10000",
                          "--output", str(out))  # fmt: skip
        assert code == 0
        found = json.loads(out.read_text())
        expected = bits_per_byte(load_model(folder), byte_tokenizer(), load_documents(str(long)), length=48)
        assert found["bits_per_byte"] == pytest.approx(expected.value, rel=1e-6)
        assert found["nats_per_token"] == pytest.approx(expected.value * math.log(2), rel=1e-6)  # a token is a byte
        assert found["tokens"] == expected.tokens


def test_the_memory_of_each_layer_is_shown_and_written(call, text, tmp_path):
    model = decoder(tmp_path / "model", "selective_attention", "full_attention", "selective_attention")
    code, shown, _ = call("analyze", "context-memory", "--model", model, "--data", text, "--output", "found.json")
    assert code == 0
    found = json.loads(Path("found.json").read_text())
    assert [layer["layer"] for layer in found["layers"]] == [0, 2]
    assert found["length"] == 48
    for layer in found["layers"]:
        assert layer["budget"] is None
        assert 1 <= layer["remembered_mean"] <= layer["seen_mean"] < 48
        words = shown[f"layer {layer['layer']}"]
        assert words.startswith(
            f"keeps everything, remembers {layer['remembered_mean']:.1f} of {layer['seen_mean']:.1f} tokens"
        )
    code, _, said = call("analyze", "context-memory", "--model", model, "--data", text, "--output", "found.json")
    assert code == 2
    assert "--output found.json exists" in said


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("prune-context", "--data", "TEXT", "--output", "out"), "exactly one of --total, --target and --within, not none"),
        (("prune-context", "--data", "TEXT", "--output", "out", "--total", "9", "--within", "1"), "not --total and --within"),
        (("prune-context", "--data", "TEXT", "--output", "out", "--within", "0"), "--within must be > 0"),
        (("prune-context", "--data", "TEXT", "--output", "out", "--target", "1"), "bits per byte with everything in its cache"),
        (("prune-context", "--data", "TEXT", "--output", "out", "--total", "9", "--policy", "selective"), "no selective"),
        (("prune-context", "--data", "TEXT", "--output", "out", "--total", "9", "--length", "49"), "longer than"),
        (("prune-context", "--data", "TEXT", "--output", "out", "--total", "9", "--batch", "0"), "--batch must be at least 1"),
        (("prune-context", "--data", "TEXT", "--output", "full", "--total", "9"), "full is not empty"),
        (("selective-attention", "--output", "out", "--selector-head", "auto"), "name one with --data"),
        (("selective-attention", "--output", "out", "--selector-head", "2"), "selector_head 2 does not exist"),
        (("selective-attention", "--output", "out", "--layers", "7"), "[7] are not attention layers"),
    ],
    ids=lambda value: " ".join(value[3:]) if isinstance(value, tuple) else "",
)  # fmt: skip
def test_what_cannot_work_is_refused_in_words_and_leaves_nothing(call, llama, text, tmp_path, arguments, words):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    filled = [text if word == "TEXT" else word for word in arguments]
    code, _, said = call("apply", *filled, "--model", llama)
    assert code == 2
    assert words in said
    assert sorted(path.name for path in tmp_path.iterdir()) == ["full"]


def test_an_adapter_is_measured_but_not_saved_without_its_model(call, llama, text, tmp_path):
    from peft import LoraConfig, get_peft_model

    adapter = str(tmp_path / "adapter")
    saved(get_peft_model(load_model(llama), LoraConfig(r=2, target_modules="all-linear")), Path(adapter))
    assert call("analyze", "context-memory", "--model", adapter, "--data", text)[0] == 0
    code, _, said = call(
        "apply", "prune-context", "--model", adapter, "--data", text, "--output", "out", "--total", "9"
    )
    assert code == 2
    assert "has an adapter, which would be saved without its model; merge it first" in said
