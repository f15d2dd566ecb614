from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path

import pytest
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from tests.trials.conftest import arm_of
from trialist.data.tokenizers import byte_tokenizer
from trialist.engine.context import Context
from trialist.engine.contract import Outcome
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


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory) -> dict[tuple[str, str], Outcome]:
    """Of every arm, by setting and arm."""
    trial, folder = D2POTrial(**SMALL), tmp_path_factory.mktemp("d2po")
    return {
        (arm.setting, arm.name): trial.run(arm, 0, Context(0, folder / f"{arm.setting}-{arm.name}", folder / "stages"))
        for arm in trial.arms()
    }


@pytest.mark.parametrize("setting", ["first", "last"])
def test_all_arms_of_a_setting_spend_the_same_tokens(trial: D2POTrial, outcomes, setting: str) -> None:
    found = [outcome for (place, name), outcome in outcomes.items() if place == setting and name != "before"]
    assert len({outcome.cost.tokens for outcome in found}) == 1
    for outcome in found:
        assert set(outcome.metrics) == {endpoint.name for endpoint in trial.claim.endpoints}
        assert outcome.metrics["length_drift"] == abs(outcome.metrics["length_inflation"])


def test_a_run_is_a_pure_function_of_its_seed(trial: D2POTrial, outcomes, run_arm) -> None:
    assert run_arm(trial, arm_of(trial, "sampo", "first")).metrics == outcomes["first", "sampo"].metrics


def test_d2po_at_gamma_one_is_the_dpo_arm(trial: D2POTrial, outcomes, run_arm) -> None:
    neutral = arm_of(trial, "d2po", "first").with_options(gamma=1.0)
    assert run_arm(trial, neutral).metrics == outcomes["first", "dpo"].metrics


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
    found = right_beginnings(model, [preference_row(pair) for pair in pairs], 2, None)
    assert found == pytest.approx(np.mean(expected), rel=1e-4)


def test_every_arm_gets_the_same_number_of_tries(trial: D2POTrial, own: D2POTrial) -> None:
    from trialist.engine.tuning import grid

    for each, tries in ((trial, 12), (own, 2)):
        assert {len(grid(arm)) for arm in each.arms() if arm.tune} == {tries}
        assert each.tuning is not None
        assert each.tuning.tries == tries


def test_beta_is_tuned_for_each_arm_and_gamma_over_the_papers_value(trial: D2POTrial, own: D2POTrial) -> None:
    for each, setting in ((trial, "first"), (own, "own")):
        tuned = [arm for arm in each.arms() if arm.setting == setting and arm.role != "reference"]
        assert all(len(arm.tune["beta"]) > 1 for arm in tuned)
    assert 0.98 in arm_of(trial, "d2po", "first").tune["gamma"]
    assert arm_of(own, "dpo", "own").tune == arm_of(own, "d2po", "own").tune  # nothing else for one arm alone


@pytest.mark.parametrize("setting", ["first", "last"])
def test_the_model_before_training_is_the_zero_point_of_every_arm(outcomes, setting: str) -> None:
    before, after = outcomes[setting, "before"], outcomes[setting, "simpo"]
    assert (before.metrics["length_drift"], before.metrics["held_out_preference_accuracy"]) == (0.0, 0.5)
    assert before.cost.tokens == 0
    moved = after.metrics["answer_length"] - before.metrics["answer_length"]
    assert moved == pytest.approx(after.metrics["length_inflation"])
    for name in ("answer_length", "accuracy"):
        assert after.curves[name] == ((0.0, before.metrics[name]), (after.cost.tokens, after.metrics[name]))


def test_only_methods_with_a_reference_pay_for_its_passes(trial: D2POTrial, outcomes) -> None:
    costs = {name: outcomes["first", name].cost for name in ("simpo", "dpo")}
    assert costs["simpo"].sequence_forwards == 2 * trial.batch * trial.steps
    assert costs["dpo"].sequence_forwards == 2 * trial.batch * trial.steps + 2 * trial.pairs
    assert all(0 < cost.generated_tokens <= trial.test_items * trial.answer for cost in costs.values())


def test_answers_are_counted_without_their_end_and_cut_ones_are_told(trial: D2POTrial, run_arm, monkeypatch) -> None:
    from trialist.data.preference_task import END
    from trialist.trials._preference_models import PreferenceModels

    rows = [[20, 21, END], [END], [20] * 9, *[[20, END]] * 8]  # one of 11 reaches the most of 9
    monkeypatch.setattr(PreferenceModels, "answers", lambda self, model: rows)
    outcome = run_arm(trial, arm_of(trial, "before", "first"))
    assert outcome.metrics["answer_length"] == pytest.approx((2 + 0 + 9 + 8) / 11)
    assert outcome.metrics["capped_answers"] == pytest.approx(1 / 11)
    assert outcome.cost.generated_tokens == 3 + 1 + 9 + 16
    assert any("more than 5% of the sampled answers reach 9 tokens" in note for note in outcome.notes)
    monkeypatch.setattr(PreferenceModels, "answers", lambda self, model: [[20, END]] * 11)
    assert run_arm(dataclasses.replace(trial, steps=2, pairs=21), arm_of(trial, "before", "first")).notes == ()


def test_answers_do_not_depend_on_the_size_of_a_training_batch(own: D2POTrial, run_arm) -> None:
    wide = dataclasses.replace(own, batch=2)
    found = [run_arm(each, arm_of(each, "before", "own")).metrics for each in (own, wide)]
    assert found[0] == found[1]


def test_policy_and_reference_compute_in_the_same_type(own: D2POTrial, tmp_path: Path) -> None:
    import torch

    from trialist.data.collation import stack_or_pad
    from trialist.objectives import Preference
    from trialist.objectives.preference_rows import answer_logprobs
    from trialist.trials._preference_models import PreferenceModels

    trial = dataclasses.replace(own, dtype="bfloat16", lora=0)
    models = PreferenceModels(trial, Context(0, tmp_path / "run", tmp_path / "stages"), "own")
    model, objective = models.model(), Preference("dpo", 1.0)
    batch = stack_or_pad(models.rows("validation", objective))

    def off(enabled: bool) -> float:
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            scores = answer_logprobs(model, batch["input_ids"], batch["segments"], share_prompt=models.shares(model))
        return float((scores.float() - batch["ref_logprobs"]).abs().sum())

    assert off(True) < 0.1 * off(False)
    assert models.rankings(model, objective)[0]["held_out_preference_accuracy"] == pytest.approx(0.5, abs=0.1)


def test_before_its_first_step_a_model_with_dropout_is_its_reference(own: D2POTrial, run_arm, tmp_path: Path) -> None:
    folder = tmp_path / "gpt2"
    GPT2LMHeadModel(GPT2Config(vocab_size=259, n_embd=8, n_layer=1, n_head=2, n_positions=64)).save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    trial = dataclasses.replace(own, model=str(folder), lora=0, steps=1)
    outcome = run_arm(trial, arm_of(trial, "dpo", "own").with_options(beta=1.0))
    assert outcome.curves["train_loss"][0][1] == pytest.approx(math.log(2), abs=1e-4)


def test_a_given_model_learns_from_the_users_pairs(own: D2POTrial, run_arm) -> None:
    own.check()
    assert [(arm.name, arm.role) for arm in own.arms()] == [
        ("before", "reference"), ("dpo", "control"), ("d2po", "treatment"),
    ]  # fmt: skip
    outcome = run_arm(own, arm_of(own, "d2po", "own"))
    assert outcome.cost.tokens
    assert set(outcome.metrics) == {endpoint.name for endpoint in own.claim.endpoints}
    assert 0 <= outcome.metrics["accuracy"] <= 1
    assert any("needs gold" in remark for remark in own.remarks())


def test_a_given_model_may_first_imitate_the_chosen_answers_once_for_all_seeds(own: D2POTrial, tmp_path: Path) -> None:
    import torch

    from trialist.trials._preference_models import PreferenceModels

    first = dataclasses.replace(own, imitation_steps=8, learning_rate=1e-2, lora=0)

    def models(trial: D2POTrial, seed: int) -> PreferenceModels:
        return PreferenceModels(trial, Context(seed, tmp_path / "run", tmp_path / "stages"), "own")

    one, other = models(first, 0), models(first, 1)
    assert (one.base, one.reference) == (other.base, other.reference)
    assert one.reference != models(own, 0).reference
    assert models(dataclasses.replace(first, learning_rate=1e-3), 0).base != one.base

    def likelihood(of: PreferenceModels) -> float:
        ids = torch.tensor([[*of.pairs["train"][0].prompt, *of.pairs["train"][0].chosen]])
        with torch.no_grad():
            return -float(of.model().eval()(input_ids=ids, labels=ids).loss)

    assert likelihood(one) > likelihood(models(own, 0)) + 0.01


def test_rows_that_were_cut_or_left_out_are_told(own: D2POTrial, run_arm, tmp_path: Path) -> None:
    rows = [json.loads(line) for line in Path(own.data).read_text().splitlines()]
    rows[3]["prompt"], rows[4]["chosen"] = "w" * 40, "v" * 40
    file = tmp_path / "long.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    notes = run_arm(dataclasses.replace(own, data=str(file)), arm_of(own, "before", "own")).notes
    assert any("in 1 of 60 rows prompts fill 40 tokens: left out" in note for note in notes)
    assert any("in 1 of 60 rows answers go beyond 40 tokens" in note for note in notes)
    assert any("pairs to train on: chosen answers have" in note for note in notes)


def test_a_prompt_beyond_the_models_context_is_refused_before_anything_starts(own: D2POTrial, tmp_path: Path) -> None:
    rows = [json.loads(line) for line in Path(own.data).read_text().splitlines()]
    rows[3]["prompt"] = "w" * 70
    file = tmp_path / "long.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(ValueError, match=r"row 4: its prompt has 7\d tokens and the model takes 64"):
        dataclasses.replace(own, data=str(file)).check()


def test_the_lengths_of_pairs_are_held_against_the_claim() -> None:
    from trialist.data.preferences import PreferencePair
    from trialist.trials._own_preferences import about_lengths

    pairs = [PreferencePair([1], [2] * n, [3, 3], 0) for n in (1, 3, 5)]
    assert about_lengths(pairs) == (
        "3 pairs to train on: chosen answers have 3.0 tokens, rejected ones 2.0, and in 67% of the pairs the chosen one is longer"
    )
    assert "the claim is about pairs where it tends to be" in about_lengths(pairs[:2])


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"gamma": 0.0}, r"--gamma must be in \(0, 1\], not 0.0; 1 is DPO"),
        ({"data": "prefs.jsonl"}, "name a --model"),
        ({"model": "smollm2-135m-instruct"}, "needs --data with preferences"),
        ({"width": 15}, "--width 15 must be a multiple"),
        ({"imitation_steps": 3}, "the built-in decoder has --base-steps"),
        ({"imitation_steps": -1}, "--imitation-steps must be at least 0, not -1"),
        ({"beta": 0.0}, "--beta and --learning-rate must be > 0"),
    ],
)
def test_inputs_that_cannot_work_are_refused(options: dict, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        D2POTrial(**{**SMALL, **options}).check()
