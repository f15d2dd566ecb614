from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest

from tests.trials.conftest import arm_of
from trialist.trials import opad
from trialist.trials._guided import Request, cut, distinct, likelier, log_likelihoods, write
from trialist.trials.opad import OPADTrial

SMALL = {"layers": 1, "width": 16, "heads": 2, "batch": 8, "steps": 6, "texts": 12}
ROWS = [
    {"prompt": f"Say hello to {name}.", "principle": "Use capital letters only.", "key": name,
     "instruction_id_list": ["change_case:english_capital"], "kwargs": [{}]}
    for name in ("Ada", "Bob", "Eve")
]  # fmt: skip


@pytest.fixture
def trial(monkeypatch):
    monkeypatch.setattr(opad, "RANGE", (-4.0, -2.0))
    monkeypatch.setattr(opad, "TEMPERATURES", (1.0, 0.2))
    return OPADTrial(**SMALL)


@pytest.fixture
def given(llama_folder, tmp_path):
    file = tmp_path / "requests.jsonl"
    file.write_text("\n".join(map(json.dumps, ROWS)))
    return OPADTrial(model=llama_folder, data=str(file), batch=2, new_tokens=8)


def test_arms_read_one_trained_model_and_guided_ones_run_two_rows_a_token(trial, run_arm) -> None:
    outcomes = {arm.name: run_arm(trial, arm) for arm in trial.arms() if arm.setting == "tags"}
    assert len({outcome.cost.tokens for outcome in outcomes.values()}) == 1
    rows = {name: o.cost.sequence_forwards / o.cost.generated_tokens for name, o in outcomes.items()}
    assert rows["sharpened"] == rows["prompted"] == 1.0
    assert rows["two-step"] == rows["token"] == 2.0
    assert rows["best-of-2"] > 1.5
    first, again = outcomes["sharpened"], outcomes["prompted"]
    assert first.metrics == again.metrics  # at a nucleus of everything they are the same
    for outcome in outcomes.values():
        assert {"adherence", "fluency", "length"} <= outcome.metrics.keys()
        found = {"adherence_at_equal_fluency", "distinct_at_equal_fluency"}
        assert found <= outcome.metrics.keys() | outcome.undefined.keys()


def test_a_run_is_repeatable_and_seeds_of_tuning_read_nothing_of_the_verdict(trial, run_arm) -> None:
    arm = arm_of(trial, "two-step", "tags")
    assert run_arm(trial, arm).metrics == run_arm(trial, arm).metrics
    tuned = run_arm(trial, arm, seed=1001)
    assert tuned.metrics.keys() | tuned.undefined.keys() == {"validation_adherence"}


def test_without_strength_the_treatment_writes_what_the_prompted_model_writes(trial, run_arm) -> None:
    still = arm_of(trial, "two-step", "tags").with_options(strength=0.0)
    prompted = run_arm(trial, arm_of(trial, "prompted", "tags"))
    assert run_arm(trial, still).metrics == prompted.metrics


def test_the_negative_control_has_tags_that_say_nothing(trial, run_arm) -> None:
    nulls = [arm for arm in trial.arms() if arm.null]
    assert [arm.name for arm in nulls] == ["sharpened", "best-of-2", "two-step"]
    assert {arm.setting for arm in nulls} == {"random-tags"}
    context = type("C", (), {"stream": lambda self, name: 3})()
    assert trial.language(context, "random-tags").noise == 0.75
    assert trial.language(context, "tags").noise == 0.35
    run_arm(trial, nulls[2])


def test_tries_of_tuning_are_equal(trial) -> None:
    tried = {arm.name: arm.tune for arm in trial.arms() if arm.tune}
    assert tried.keys() == {"sharpened", "best-of-2", "two-step", "token"}
    assert {len(values) for knob in tried.values() for values in knob.values()} == {trial.tuning.tries}


def test_a_given_model_answers_requests_and_they_are_the_replicates(given, run_arm) -> None:
    given.check()
    assert given.replicates_over() == "item"
    outcomes = {(arm.setting, arm.name): run_arm(given, arm) for arm in given.arms()}
    assert {setting for setting, _ in outcomes} == {"principles", "empty-principle"}
    assert len({outcome.cost.tokens for outcome in outcomes.values()}) == 1
    for outcome in outcomes.values():
        assert outcome.items["adherence"].ids == ("Ada", "Bob", "Eve")
        assert outcome.metrics["fluency"] == pytest.approx(sum(outcome.items["fluency"].scores) / 3)
        assert {e.name for e in given.claim.endpoints} <= outcome.metrics.keys()


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"noise": 0.75}, "--noise 0.75"),
        ({"strength": 0.0}, "--strength 0.0"),
        ({"mask": 2.0}, "mask_alpha=2.0"),
        ({"data": "my.jsonl"}, "add --model"),
        ({"width": 18}, "--width 18"),
        ({"texts": 0}, "--texts"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_inputs_that_cannot_work_are_refused_early(trial, changes, words) -> None:
    with pytest.raises(ValueError, match=words):
        dataclasses.replace(trial, **changes).check()


def test_a_given_model_needs_requests(llama_folder) -> None:
    with pytest.raises(ValueError, match="columns of IFEval"):
        OPADTrial(model=llama_folder).check()


def test_the_likelier_of_two_is_the_one_with_the_larger_log_ratio(llama_folder) -> None:
    from trialist.models import load_model

    model = load_model(llama_folder)
    requests = [Request((5, 6), (9, 10, 5, 6)), Request((7,), (11, 7))]
    texts = [[20, 21, 22], [30], [40, 41], [50, 51, 52]]
    twice = [requests[0], requests[0], requests[1], requests[1]]
    gains = [
        log_likelihoods(model, [request.context], [text], 0)[0] - log_likelihoods(model, [request.plain], [text], 0)[0]
        for request, text in zip(twice, texts)
    ]
    wanted = [texts[0] if gains[0] >= gains[1] else texts[1], texts[2] if gains[2] >= gains[3] else texts[3]]
    assert likelier(model, requests, texts, 0) == wanted


def test_log_likelihoods_are_those_of_single_rows_from_the_logits(llama_folder) -> None:
    import torch

    from trialist.models import load_model

    model = load_model(llama_folder)
    prompts, texts = [[5, 6, 7], [8]], [[20, 21], [30, 31, 32]]
    found = log_likelihoods(model, prompts, texts, 0)
    for prompt, text, value in zip(prompts, texts, found):
        with torch.no_grad():
            log_p = model(torch.tensor([prompt + text])).logits[0].log_softmax(-1)
        single = sum(float(log_p[len(prompt) - 1 + place, token]) for place, token in enumerate(text))
        assert value == pytest.approx(single, abs=1e-4)


def test_texts_end_with_their_end_token_and_bigrams_are_counted() -> None:
    assert cut([4, 2, 2, 0], {2}) == [4, 2]
    assert cut([4, 5], {2}) == [4, 5]
    assert distinct([[1, 2, 1, 2], [1, 2]]) == 2 / 4
    assert distinct([[1]]) == 0.0


def test_a_batch_is_written_as_its_parts_in_greedy_limits(llama_folder, trial) -> None:
    from trialist.models import load_model

    model = load_model(llama_folder)
    requests = [Request((5, 6), (9, 10, 5, 6)), Request((7,), (11, 7)), Request((8, 9, 10), (12, 8, 9, 10))]
    arm = arm_of(trial, "two-step", "tags").with_options(top_p=1e-6)  # a nucleus of one token
    settings = {"temperature": 1.0, "mask": 0.0, "most": 5, "end": 2, "pad": 0, "seed": 1}
    whole = write(model, requests, arm, batch=3, **settings)
    parts = write(model, requests, arm, batch=1, **settings)
    assert whole.texts == parts.texts
    assert whole.forwards == parts.forwards == 2 * sum(map(len, whole.texts))


def test_models_are_kept_on_demand(trial, run_arm, tmp_path: Path) -> None:
    run_arm(trial, arm_of(trial, "token", "tags"), keep_model=True)
    assert list(tmp_path.glob("*/model/config.json"))
