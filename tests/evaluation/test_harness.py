"""Standard benchmarks through lm-eval, on a small made-up asset."""

from __future__ import annotations

import json
import math

import pytest
import torch

from trialist.evaluation.harness import Harness
from trialist.evaluation.published import PUBLISHED, published

pytest.importorskip("lm_eval", reason="the extra `eval` is not installed")


def log_prob(model, tokenizer, prompt: str, continuation: str) -> tuple[float, bool]:
    """Sum over the continuation's tokens, one sequence at a time, and whether each is the most probable one."""
    start = len(tokenizer(prompt)["input_ids"])
    ids = torch.tensor([tokenizer(prompt + continuation)["input_ids"]])
    with torch.no_grad():
        log_p = model(ids, use_cache=False).logits[0].double().log_softmax(-1)
    places = range(start, ids.shape[1])
    total = sum(float(log_p[place - 1, ids[0, place]]) for place in places)
    return total, all(int(log_p[place - 1].argmax()) == int(ids[0, place]) for place in places)


def test_multiple_choice_equals_naive_scoring_of_the_published_prompt(benchmarks, scored_model):
    model, tokenizer = scored_model
    result = Harness("arc_easy")(model, tokenizer, batch=5)
    plain, normed = [], []
    for doc in PUBLISHED["arc_easy"].rows()["test"]:
        prompt = f"Question: {doc['question']}\nAnswer:"
        choices = doc["choices"]["text"]
        sums = [log_prob(model, tokenizer, prompt, f" {choice}")[0] for choice in choices]
        gold = doc["choices"]["label"].index(doc["answerKey"])
        plain.append(float(max(range(len(sums)), key=lambda i: sums[i]) == gold))
        normed.append(float(max(range(len(sums)), key=lambda i: sums[i] / len(choices[i])) == gold))
    assert len(plain) == 9
    assert result.scores == {"acc_norm": tuple(normed), "acc": tuple(plain)}
    assert 0 < result.metrics["acc"] < 1
    assert result.metrics["acc"] == pytest.approx(sum(plain) / 9)


def test_hellaswag_cleans_its_text_and_marks_scenes_of_one_film(benchmarks, scored_model):
    model, tokenizer = scored_model
    result = Harness("hellaswag", limit=7)(model, tokenizer)
    expected = []
    for row in PUBLISHED["hellaswag"].rows()["validation"][:7]:
        prompt = f"Walking: {row['ctx_a']} He"
        sums = [log_prob(model, tokenizer, prompt, f" {ending}")[0] for ending in row["endings"]]
        expected.append(float(max(range(4), key=lambda i: sums[i]) == int(row["label"])))
    assert result.scores["acc"] == tuple(expected)
    assert [result.clusters.index(cluster) for cluster in result.clusters] == [0, 0, 2, 2, 4, 4, 6]


@pytest.mark.parametrize("batch", [1, 3, 16])
def test_the_batch_size_changes_nothing(benchmarks, scored_model, batch):
    model, tokenizer = scored_model
    assert Harness("arc_easy")(model, tokenizer, batch=batch).scores == Harness("arc_easy")(model, tokenizer).scores


def test_the_aggregates_are_those_of_lm_eval(benchmarks, scored_model):
    from lm_eval.evaluator import evaluate
    from lm_eval.models.huggingface import HFLM

    model, tokenizer = scored_model
    for name in ("arc_easy", "hellaswag", "lambada"):
        ours = Harness(name)(model, tokenizer, batch=4).metrics
        tasks = {"tasks": Harness(name).tasks(), "groups": {}, "group_map": {}}
        reference = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=2)
        theirs = evaluate(reference, tasks, bootstrap_iters=0)["results"][name]
        for metric in ("acc", "acc_norm", "perplexity"):
            if f"{metric},none" in theirs:
                assert ours[metric] == pytest.approx(theirs[f"{metric},none"], rel=1e-5), (name, metric)


def test_lambada_asks_for_the_greedy_word_and_keeps_the_log_probability(benchmarks, scored_model):
    model, tokenizer = scored_model
    result = Harness("lambada")(model, tokenizer, batch=3)
    rows = [row["text"].rpartition(" ") for row in PUBLISHED["lambada"].rows()["test"]]
    expected = [log_prob(model, tokenizer, context, f" {word}") for context, _, word in rows]
    assert result.scores["log_likelihood"] == pytest.approx([total for total, _ in expected], abs=1e-4)
    assert result.scores["acc"] == tuple(float(greedy) for _, greedy in expected)
    assert result.metrics["perplexity"] == pytest.approx(math.exp(-sum(t for t, _ in expected) / 8), rel=1e-4)


def test_a_word_that_greedy_decoding_gives_counts_as_right(benchmarks, scored_model):
    from trialist.evaluation.harness_model import HarnessModel

    model, tokenizer = scored_model
    prompt = tokenizer("ba coro")["input_ids"]
    with torch.no_grad():
        first = int(model(torch.tensor([prompt])).logits[0, -1].argmax())
        second = int(model(torch.tensor([[*prompt, first]])).logits[0, -1].argmax())
    scorer = HarnessModel(model, tokenizer, batch=2, progress=lambda done, total: None)
    found = scorer._loglikelihood_tokens([("", prompt, [first, second]), ("", prompt, [first, (second + 1) % 256])])
    assert [greedy for _, greedy in found] == [True, False]


def test_mmlu_joins_its_subjects_with_five_examples_in_their_order(benchmarks, scored_model):
    model, tokenizer = scored_model
    result = Harness("mmlu", shots=5)(model, tokenizer)
    assert set(result.metrics) == {"acc", "acc/anatomy", "acc/virology"}
    assert len(result.ids) == 12
    assert result.ids[7].startswith("virology 1#")
    expected = []
    for subject in ("anatomy", "virology"):
        rows = published(f"mmlu_{subject}")[f"mmlu_{subject}"].rows()
        shown = "".join(f"{asked(row)} {'ABCD'[row['answer']]}\n\n" for row in rows["dev"])
        about = f"The following are multiple choice questions (with answers) about {subject}.\n\n"
        for row in rows["test"]:
            sums = [log_prob(model, tokenizer, about + shown + asked(row), f" {letter}")[0] for letter in "ABCD"]
            expected.append(float(max(range(4), key=lambda i: sums[i]) == row["answer"]))
    assert result.scores["acc"] == tuple(expected)


def asked(row: dict) -> str:
    choices = "\n".join(f"{letter}. {choice}" for letter, choice in zip("ABCD", row["choices"]))
    return f"{row['question']}\n{choices}\nAnswer:"


def test_few_shot_examples_come_from_the_validation_split_and_follow_the_seed(benchmarks):
    prompts = [[instance.args[0] for instance in built(Harness("arc_easy", shots=2), seed)] for seed in (0, 0, 1)]
    assert prompts[0] == prompts[1] != prompts[2]
    shown = {row["question"] for row in PUBLISHED["arc_easy"].rows()["validation"]}
    examples = [part.split("\n")[0].removeprefix("Question: ") for part in prompts[0][0].split("\n\n")[:-1]]
    assert len(examples) == 2
    assert set(examples) <= shown


def built(harness: Harness, seed: int) -> list:
    (task,) = harness.tasks(seed).values()
    task.build_all_requests(limit=3, rank=0, world_size=1)
    return task.instances


@pytest.mark.parametrize(
    ("name", "right", "metrics"),
    [
        ("gsm8k", "Add them. The answer is {}.", ["math_verify", "exact_match,strict-match", "exact_match,flexible-extract"]),
        ("math500", "It is $\\boxed{{{0}}}$. Final Answer: The final answer is ${0}$. I hope it is correct.",
         ["math_verify", "exact_match"]),
    ],
)  # fmt: skip
def test_generated_answers_are_judged_item_by_item(benchmarks, scored_model, monkeypatch, name, right, metrics):
    from trialist.evaluation.harness_model import HarnessModel

    rows = PUBLISHED[name].rows()["test"]
    gold = [int(row["answer"].split("#### ")[-1]) for row in rows]

    def scripted(self, requests, **_):
        texts = [right.format(value if at % 2 else value + 1) for at, value in enumerate(gold)]
        return [texts[request.doc_id] for request in requests]

    monkeypatch.setattr(HarnessModel, "generate_until", scripted)
    result = Harness(name)(*scored_model)
    assert list(result.scores) == metrics
    for metric in metrics:
        assert result.scores[metric] == (0.0, 1.0, 0.0, 1.0, 0.0), metric


def test_chat_shows_every_example_as_a_turn_of_its_own(benchmarks, scored_model, monkeypatch):
    from trialist.evaluation.harness_model import HarnessModel

    model, tokenizer = scored_model
    prompts = []

    def noted(self, requests, **_):
        prompts.extend(request.args[0] for request in requests)
        return [""] * len(requests)

    monkeypatch.setattr(HarnessModel, "generate_until", noted)
    with pytest.raises(ValueError, match="has no chat template"):
        Harness("math500", shots=1, limit=1, chat=True)(model, tokenizer)
    template = (
        "{% for m in messages %}[[{{ m.role }}]]{{ m.content }}{% endfor %}"
        "{% if add_generation_prompt %}[[bot]]{% endif %}"
    )
    monkeypatch.setattr(tokenizer, "chat_template", template)
    result = Harness("math500", shots=1, limit=1, chat=True)(model, tokenizer)
    asked = PUBLISHED["math500"].rows()["test"][0]["problem"]
    (prompt,) = prompts
    assert [part.split("]]")[0] for part in prompt.split("[[")[1:]] == ["user", "assistant", "user", "bot"]
    assert prompt.endswith(f"[[user]]Problem:\n{asked}\n\nSolution:[[bot]]")
    assert result.notes[0].endswith("through the chat template")


def test_generation_reads_the_prompt_of_the_task_file_and_stops_where_it_says(benchmarks, scored_model, monkeypatch):
    model, tokenizer = scored_model
    monkeypatch.setattr("trialist.evaluation.harness.TO_GENERATE", 5)
    monkeypatch.setattr(type(model), "generate", shortened(type(model).generate))
    result = Harness("math500", shots=0, limit=2)(model, tokenizer, batch=2)
    assert result.scores["math_verify"] == (0.0, 0.0)
    assert result.tokens == sum(
        len(f"Problem:\n{row['problem']}\n\nSolution:") for row in PUBLISHED["math500"].rows()["test"][:2]
    )


def shortened(generate):
    def few(self, *positional, max_length, **named):
        return generate(self, *positional, max_length=named["input_ids"].shape[1] + 5, **named)

    return few


def test_a_prompt_longer_than_the_context_is_refused_with_its_item(benchmarks, scored_model, tmp_path):
    from tests.evaluation.benchmark_asset import save_model
    from trialist.models.loading import load_model

    _, tokenizer = scored_model
    short = load_model(str(save_model(tmp_path / "short", context=24)))
    message = r"arc_easy item \d \(and \d more\) takes \d+ tokens with this tokenizer, and the model's context is 24"
    with pytest.raises(ValueError, match=message):
        Harness("arc_easy")(short, tokenizer)
    with pytest.raises(ValueError, match=message):
        Harness("arc_easy").check_fit(tokenizer, 24)
    longest = max(len(prompt) + len(more) for prompt, more in (i.args for i in Harness("arc_easy").requests()))
    Harness("arc_easy").check_fit(tokenizer, longest - 1)
    with pytest.raises(ValueError, match="takes"):
        Harness("arc_easy").check_fit(tokenizer, longest - 2)


def test_the_missing_extra_and_the_missing_asset_are_named(monkeypatch, tmp_path):
    monkeypatch.setenv("TRIALIST_CACHE", str(tmp_path))
    with pytest.raises(FileNotFoundError, match="trialist assets fetch benchmarks"):
        Harness("piqa").check()
    monkeypatch.setattr("trialist.evaluation.harness.EXTRA", ("lm_eval", "no_such_module"))
    with pytest.raises(ImportError, match=r"no_such_module is not installed: pip install 'trialist\[eval\]'"):
        Harness("piqa").check()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(task="arc_easy", shots=-1), "--shots must be at least 0"),
        (dict(task="arc_easy", limit=0), "--limit must be at least 1"),
        (dict(task="gsm8k", shots=9), "gsm8k has 8 examples"),
        (dict(task="arc_easy", shots=8), "arc_easy has 7 examples, the validation split"),
        (dict(task="hellaswag", shots=12), "hellaswag has 11 examples"),
        (dict(task="mmlu", shots=6), "has 5 examples"),
        (dict(task="mmlu_magic"), "no MMLU subject 'magic'; there is anatomy, virology"),
    ],
)
def test_options_that_cannot_work_are_refused(benchmarks, options, message):
    with pytest.raises(ValueError, match=message):
        Harness(**options).check()


@pytest.mark.asset
@pytest.mark.parametrize("name", [name for name in PUBLISHED if name != "mmlu"])
def test_every_benchmark_of_the_real_asset_builds_its_prompts(name):
    from trialist.data.assets import path

    try:
        path("benchmarks")
    except FileNotFoundError as error:
        pytest.skip(str(error))
    asked = Harness(name, limit=2).requests()
    assert len({instance.doc_id for instance in asked}) == 2
    assert all(isinstance(instance.args[0], str) for instance in asked)
    assert json.dumps(PUBLISHED[name].rows()[PUBLISHED[name].split][:1])
