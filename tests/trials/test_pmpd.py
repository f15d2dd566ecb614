from __future__ import annotations

import json
import shutil

import pytest
import torch

from tests.trials.conftest import arm_of
from trialist.engine.contract import Arm
from trialist.trials._precision_models import RECALL, PrecisionModels, Prompts, _Gumbel, with_fillers
from trialist.trials.pmpd import PMPDTrial, binned, schedules

SMALL = {
    "layers": 1, "width": 16, "heads": 2, "steps": 4, "batch": 4, "length": 64, "items": 3, "prompt_length": 12,
    "decode_steps": 6, "calibration_rows": 2, "recall_steps": 2, "fillers": 3, "test_bytes": 4096,
}  # fmt: skip


@pytest.fixture(autouse=True)
def _small_recall(monkeypatch):
    for name, value in {"layers": 1, "width": 16, "heads": 2, "most": 4, "learning_rate": 1e-4}.items():
        monkeypatch.setitem(RECALL, name, value)


@pytest.fixture
def trial(text_file):
    return PMPDTrial(data=text_file, **SMALL)


def orders(*names: str) -> dict[str, list[tuple[float, list[int]]]]:
    arms = {name: Arm(name, "control", options={"order": name, "high": 4, "low": 2}) for name in names}
    return {name: [(w, s.over(6)) for w, s in schedules(arm, 6, seed=3)] for name, arm in arms.items()}


def test_the_order_of_bits_is_that_of_the_worked_case():
    found = orders("forward", "reversed", "mixed", "high", "low", "uniform", "alternating high", "alternating low")
    assert found == {
        "forward": [(1.0, [4, 4, 4, 2, 2, 2])],
        "reversed": [(1.0, [2, 2, 2, 4, 4, 4])],
        "mixed": [(0.5, [4] * 6), (0.5, [2] * 6)],
        "high": [(1.0, [4] * 6)],
        "low": [(1.0, [2] * 6)],
        "uniform": [(1.0, [3] * 6)],
        "alternating high": [(1.0, [4, 2, 4, 2, 4, 2])],
        "alternating low": [(1.0, [2, 4, 2, 4, 2, 4])],
    }
    ((weight, drawn),) = orders("random")["random"]
    assert weight == 1.0
    assert sorted(drawn) == [2, 2, 2, 4, 4, 4]


def test_treatment_and_controls_have_the_same_average_bits_in_every_setting(trial):
    spent: dict[str, dict[str, float]] = {}
    for arm in trial.arms():
        bits = (
            sum(w * sum(s.over(trial.decode_steps)) for w, s in schedules(arm, trial.decode_steps, 1))
            / trial.decode_steps
        )
        if arm.role != "reference":
            spent.setdefault(arm.setting, {})[arm.name] = bits
    assert {setting: set(bits.values()) for setting, bits in spent.items()} == {
        "text": {2.5}, "wide": {3.0}, "shuffled": {2.5}, "alternating": {2.5},
    }  # fmt: skip


def test_arms_share_their_models_and_the_mixed_arm_is_the_mean_of_the_two_precisions(trial, run_arm, tmp_path):
    found = {name: run_arm(trial, arm_of(trial, name, "text")) for name in ("mixed", "high", "low", "forward")}
    for metric in ("divergence", "divergence_with_prompt_low", "divergence_of_sampled", "rouge_l", "recall"):
        mean = (found["high"].metrics[metric] + found["low"].metrics[metric]) / 2
        assert found["mixed"].metrics[metric] == pytest.approx(mean, rel=1e-4, abs=1e-9)
    assert found["high"].metrics["divergence"] < found["forward"].metrics["divergence"]
    assert found["forward"].metrics["divergence"] < found["low"].metrics["divergence"]
    assert found["low"].metrics["divergence_with_prompt_low"] != found["low"].metrics["divergence"]
    assert len(found["forward"].items["divergence"].scores) == 3
    assert {name: outcome.cost.bits for name, outcome in found.items()} == {
        "mixed": 2.5,
        "high": 3,
        "low": 2,
        "forward": 2.5,
    }
    names = sorted(path.name.split("-")[0] for path in (tmp_path / "stages").iterdir() if path.is_dir())
    assert sorted(set(names)) == names  # each was built once
    high = dict(found["high"].curves["divergence_by_position"])
    both = dict(found["forward"].curves["divergence_by_position"])
    assert both[1.0] == pytest.approx(high[1.0], rel=1e-4)  # the first half of the steps is at high precision


def test_a_run_is_a_pure_function_of_its_seed(trial, run_arm, tmp_path):
    arm = arm_of(trial, "random", "shuffled")
    first = run_arm(trial, arm)
    shutil.rmtree(tmp_path / "stages")
    again = run_arm(trial, arm)
    assert (again.metrics, again.curves) == (first.metrics, first.curves)
    assert run_arm(trial, arm, seed=1).metrics != first.metrics


def test_null_settings_are_independent_tokens_and_precisions_in_turns(trial):
    null = {(arm.setting, arm.name): arm for arm in trial.arms() if arm.null}
    assert {setting for setting, _ in null} == {"shuffled", "alternating"}
    assert all(arm.role != "reference" and arm.tune is None for arm in null.values())
    assert {name for setting, name in null if setting == "shuffled"} == {"forward", "reversed", "random", "mixed"}


def test_a_given_model_is_quantised_as_it_is_and_generalises_over_prompts(llama_folder, text_file, tmp_path, run_arm):
    file = tmp_path / "prompts.jsonl"
    file.write_text("".join(json.dumps({"prompt": f"say {n}"}) + "\n" for n in range(5)))
    given = PMPDTrial(
        **{**SMALL, "length": 48, "prompt_length": 8}, data=text_file, model=llama_folder, prompts=str(file)
    )
    given.check()
    assert given.replicates_over() == "item"
    assert {arm.setting for arm in given.arms()} == {"text", "wide", "alternating"}
    outcome = run_arm(given, arm_of(given, "forward", "text"))
    assert outcome.items["divergence"].ids == ("prompt 0", "prompt 1", "prompt 2")
    assert "recall" in outcome.undefined
    assert outcome.metrics["divergence"] > 0
    assert {"model", "data", "prompts"} <= set(given.digests())


def test_texts_of_the_full_model_are_drawn_from_its_distribution_with_common_random_numbers():
    scores = torch.tensor([[0.0, 1.0, 2.0], [2.0, 0.0, -1.0]])
    count, counts = 4000, torch.zeros(2, 3)
    processor = _Gumbel(5, first=0, length=4)
    for step in range(count):
        ids = torch.zeros(2, 4 + step, dtype=torch.long)
        counts[torch.arange(2), processor(ids, scores).argmax(-1)] += 1
    torch.testing.assert_close(counts / count, scores.softmax(-1), atol=0.03, rtol=0)
    ids = torch.zeros(2, 9, dtype=torch.long)
    assert torch.equal(processor(ids, scores), _Gumbel(5, 0, 4)(ids, scores))
    assert not torch.equal(processor(ids, scores), _Gumbel(5, 8, 4)(ids, scores))


def test_questions_stand_behind_fillers_and_end_with_the_last_value():
    rows = with_fillers(6, 4, 3, [7])
    tokens, labels = rows["input_ids"], rows["labels"]
    assert tokens.shape == (6, 1 + 8 + 3 + 2)
    separator = 15
    for row, wanted in zip(tokens.tolist(), labels.tolist()):
        assert row[9:12] == [separator] * 3
        values = dict(zip(row[1:9:2], row[2:9:2]))  # later pairs overwrite
        assert row[-1] == values[row[-2]] == wanted[-1]
        assert set(wanted[:-1]) == {-100}


def test_prompts_of_unequal_lengths_are_padded_on_the_left():
    prompts = Prompts(("a", "b"), None, ((5,), (6, 7, 8)))
    tokens, mask = prompts.padded(slice(0, 2), "cpu")
    assert tokens.tolist() == [[0, 0, 5], [6, 7, 8]]
    assert mask.tolist() == [[0, 0, 1], [1, 1, 1]]


def test_the_curve_has_the_means_of_equal_parts():
    assert binned([1.0, 2.0, 3.0]) == ((1.0, 1.0), (2.0, 2.0), (3.0, 3.0))
    parts = binned([float(n) for n in range(20)])
    assert parts[0] == (2.0, 1.0)
    assert len(parts) == 7


def test_diverged_training_is_an_outcome(trial, run_arm, monkeypatch):
    from trialist.engine.contract import Outcome

    monkeypatch.setattr(PrecisionModels, "subject", lambda self: Outcome(diverged="loss is nan at step 3"))
    assert run_arm(trial, arm_of(trial, "forward", "text")).diverged == "loss is nan at step 3"


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"decode_steps": 7}, "--decode-steps 7: an even number"),
        ({"fillers": 4}, "--fillers 4: an odd number"),
        ({"high": 5}, "1 <= lowest < high <= parent <= 8"),
        ({"lowest": 3}, "1 <= lowest < high <= parent <= 8"),
        ({"prompt_length": 60}, "more than the --length 64"),
        ({"prompts": "gsm8k"}, "--prompts are for a given --model"),
        ({"items": 0}, "--items must be at least 1"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_inputs_that_cannot_work_are_refused(text_file, changes, words):
    with pytest.raises(ValueError, match=words):
        PMPDTrial(**{**SMALL, "data": text_file, **changes}).check()


def test_too_little_test_text_for_the_items_is_refused(text_file, run_arm):
    trial = PMPDTrial(**{**SMALL, "items": 400}, data=text_file)
    with pytest.raises(ValueError, match=r"windows of 12 tokens for --items 400; raise --test-bytes"):
        run_arm(trial, arm_of(trial, "forward", "text"))
