from __future__ import annotations

import json
from pathlib import Path

import pytest
from transformers import LlamaConfig, LlamaForCausalLM

from tests.trials.conftest import arm_of
from trialist.trials.d2po import D2POTrial

SMALL = {
    "layers": 1,
    "width": 16,
    "heads": 2,
    "base_steps": 4,
    "pairs": 20,
    "steps": 3,
    "batch": 5,
    "answer": 9,
    "test_items": 11,
}


@pytest.fixture
def trial() -> D2POTrial:
    return D2POTrial(**SMALL)


@pytest.fixture
def own(tmp_path: Path, llama_folder: str) -> D2POTrial:
    words = ["sun", "moon", "star", "rain", "wind", "snow", "leaf", "tree", "rock", "sand", "fish", "bird"]
    rows = [
        {
            "prompt": f"{words[i % 12]} {words[(5 * i + i // 12) % 12]} {i}?",
            "chosen": words[i % 7] * (1 + i % 2),
            "rejected": "no no",
        }
        for i in range(60)
    ]
    file = tmp_path / "prefs.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return D2POTrial(model=llama_folder, data=str(file), lora=2, **{**SMALL, "length": 40})


def test_all_arms_of_a_setting_spend_the_same_tokens(trial: D2POTrial, run_arm) -> None:
    for setting in ("first", "last"):
        outcomes = [run_arm(trial, arm) for arm in trial.arms() if arm.setting == setting]
        assert len({outcome.cost.tokens for outcome in outcomes}) == 1
        for outcome in outcomes:
            assert set(outcome.metrics) == {endpoint.name for endpoint in trial.claim.endpoints}
            assert outcome.metrics["length_drift"] == abs(outcome.metrics["length_inflation"])


def test_a_run_is_a_pure_function_of_its_seed(trial: D2POTrial, run_arm) -> None:
    arm = arm_of(trial, "sampo", "first")
    assert run_arm(trial, arm).metrics == run_arm(trial, arm).metrics


def test_d2po_at_gamma_one_is_the_dpo_arm(trial: D2POTrial, run_arm) -> None:
    dpo, d2po = arm_of(trial, "dpo", "first"), arm_of(trial, "d2po", "first")
    assert run_arm(trial, dpo).metrics == run_arm(trial, d2po.with_options(gamma=1.0)).metrics


def test_the_probability_of_right_content_is_that_of_its_tokens_one_by_one() -> None:
    import numpy as np
    import torch

    from trialist.data.preference_task import SIGNAL, VOCABULARY, PreferenceTask
    from trialist.objectives.preference_rows import preference_row
    from trialist.trials._preference_models import right_beginnings

    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2
    )
    torch.manual_seed(0)
    model = LlamaForCausalLM(config).eval()
    pairs = PreferenceTask("first", 0).pairs(5, 1, longer=0.5)
    expected = []
    for pair in pairs:
        ids = [*pair.prompt, *pair.chosen]
        log_p = model(input_ids=torch.tensor([ids])).logits[0].log_softmax(-1).detach()
        start = len(pair.prompt)
        expected.append(np.exp(sum(float(log_p[start + i - 1, ids[start + i]]) for i in range(SIGNAL))))
    found = right_beginnings(model, [preference_row(pair) for pair in pairs], 2)
    assert found == pytest.approx(np.mean(expected), rel=1e-4)


def test_every_arm_gets_the_same_number_of_tries(trial: D2POTrial, own: D2POTrial) -> None:
    from trialist.engine.tuning import grid

    for each, tries in ((trial, 8), (own, 2)):
        assert {len(grid(arm)) for arm in each.arms() if arm.tune} == {tries}
        assert each.tuning is not None
        assert each.tuning.tries == tries


def test_a_given_model_learns_from_the_users_pairs(own: D2POTrial, run_arm) -> None:
    own.check()
    assert [(arm.name, arm.setting) for arm in own.arms()] == [("dpo", "own"), ("d2po", "own")]
    outcome = run_arm(own, arm_of(own, "d2po", "own"))
    assert outcome.cost.tokens
    assert 0 <= outcome.metrics["accuracy"] <= 1
    assert any("needs gold" in remark for remark in own.remarks())


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"gamma": 0.0}, r"--gamma must be in \(0, 1\], not 0.0; 1 is DPO"),
        ({"data": "prefs.jsonl"}, "name a --model"),
        ({"model": "smollm2-135m-instruct"}, "needs --data with preferences"),
        ({"width": 15}, "--width 15 must be a multiple"),
        ({"beta": 0.0}, "--beta and --learning-rate must be > 0"),
    ],
)
def test_inputs_that_cannot_work_are_refused(options: dict, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        D2POTrial(**{**SMALL, **options}).check()
