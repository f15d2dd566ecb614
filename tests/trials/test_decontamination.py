from __future__ import annotations

import dataclasses
import json
import math

import pytest
import torch

from tests.trials.conftest import arm_of
from trialist.data.corpora import Documents
from trialist.engine.context import Context
from trialist.engine.contract import Items, Outcome
from trialist.trials import _planted_models
from trialist.trials._planted_models import CLEAN, MIXED, NOTHING, OTHERS, PlantedModels, inflations
from trialist.trials._planted_text import Item, bits_per_byte_of
from trialist.trials._removal import RULES
from trialist.trials.decontamination import DecontaminationTrial

SMALL = {
    "items": 5, "item_words": 12, "train_bytes": 6_000, "tokenizer": "bytes", "layers": 1, "width": 16, "heads": 2,
    "length": 128, "batch": 2, "steps": 4,
}  # fmt: skip


@pytest.fixture
def trial(text_file):
    return DecontaminationTrial(data=text_file, **SMALL)


@pytest.fixture
def measurable(monkeypatch) -> None:
    """Whatever planting taught in four steps is enough."""
    monkeypatch.setattr(_planted_models, "SURE", -math.inf)


@pytest.fixture
def questions(tmp_path) -> dict[str, str]:
    """Rows of question and answer, and a benchmark of others, under columns of their own names."""
    found = {"columns": "question=asked,answer=told"}
    for name, count in (("data", 30), ("benchmark", 9)):
        rows = [
            {"asked": " ".join(f"{name[0]}{row}{letter}" for letter in "abcdefghij"), "told": f"{row} or {row + 1}"}
            for row in range(count)
        ]
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        found[name] = str(tmp_path / f"{name}.jsonl")
    return found


@pytest.fixture
def models(trial, tmp_path) -> PlantedModels:
    return PlantedModels(trial, Context(0, tmp_path / "run", tmp_path / "stages"))


@pytest.mark.parametrize("setting", [MIXED, OTHERS])
def test_arms_take_the_same_steps_and_only_their_rows_differ(trial, run_arm, measurable, setting) -> None:
    names = (NOTHING, "tulu3", *(("full-string", CLEAN) if setting == MIXED else ()))
    outcomes = {name: run_arm(trial, arm_of(trial, name, setting)) for name in names}
    assert {outcome.cost.steps for outcome in outcomes.values()} == {4}
    assert len({outcome.items["inflation_left"].ids for outcome in outcomes.values()}) == 1
    left = {name: outcome.metrics["planted_rows_left"] for name, outcome in outcomes.items()}
    assert left[NOTHING] == 1.0
    if setting == MIXED:
        assert (
            left[CLEAN] == outcomes[CLEAN].metrics["inflation_left"] == 0.0 < left["tulu3"] < left["full-string"] < 1.0
        )
        assert outcomes[NOTHING].metrics["inflation_left"] == pytest.approx(1.0)


def test_a_run_is_a_pure_function_of_its_seed(trial, run_arm, measurable) -> None:
    arm = arm_of(trial, "tulu3", MIXED)
    first, again, other = run_arm(trial, arm), run_arm(trial, arm), run_arm(trial, arm, seed=1)
    assert (first.metrics, first.curves) == (again.metrics, again.curves)
    assert first.metrics != other.metrics
    assert first.items["inflation_left"].ids == other.items["inflation_left"].ids


def test_a_model_that_is_kept_is_that_of_the_arm(trial, run_arm, measurable) -> None:
    arm = arm_of(trial, NOTHING, MIXED)
    assert run_arm(trial, arm).metrics == run_arm(trial, arm, keep_model=True).metrics


def test_at_coverage_one_the_treatment_removes_nothing(trial, run_arm, measurable) -> None:
    neutral = dataclasses.replace(trial, coverage=1.0)
    treated, control = (run_arm(neutral, arm_of(neutral, name, MIXED)) for name in ("tulu3", NOTHING))
    assert treated.metrics == control.metrics


def test_every_rule_meets_the_treatment_where_the_verdict_is_made(trial) -> None:
    roles = {arm.name: arm.role for arm in trial.arms() if arm.setting == MIXED}
    assert roles.keys() == {NOTHING, "random", CLEAN, *RULES}
    assert {name for name, role in roles.items() if role != "control"} == {"tulu3", "datatrove", "longest", CLEAN}
    assert {arm.setting for arm in trial.arms() if arm.null} == {OTHERS}
    assert len([arm for arm in trial.arms() if arm.role == "treatment"]) == len({arm.setting for arm in trial.arms()})


def test_as_many_rows_go_at_random_as_the_treatment_removes(trial, models) -> None:
    rows, planted = models.rows(MIXED)
    treated, random = (models.kept(arm, rows, planted) for arm in ("tulu3", "random"))
    assert treated.sum() == random.sum() < len(rows)
    assert (treated != random).any()


def test_in_the_negative_control_no_tested_item_is_planted(models) -> None:
    _, items = models.texts
    for setting, part, absent in ((OTHERS, "others", "planted"), (MIXED, "planted", "others")):
        rows, planted = models.rows(setting)
        copies = [row for row, copy in zip(rows, planted) if copy]
        assert {item.texts for item in items[part]} <= set(copies)
        assert not {item.texts for item in items[absent]} & set(rows)
        groups = [{item.group for item in items[name]} for name in (part, absent, "kept out")]
        assert sum(map(len, groups)) == len(set().union(*groups))


def outcome_with(*bits: float) -> Outcome:
    return Outcome(items={"planted_bits_per_byte": Items(tuple("abc"), bits, tuple("xxy"))})


def test_what_is_left_is_the_gain_over_the_clean_model_as_a_share_of_the_whole_gain() -> None:
    clean, most = outcome_with(3.0, 4.0, 5.0), outcome_with(2.0, 3.0, 3.0)  # gained 1, 1 and 2
    scores, undefined = inflations(outcome_with(2.5, 4.0, 4.5), clean, most)
    assert undefined == {}
    assert scores["inflation"].scores == (0.5, 0.0, 0.5)
    assert scores["inflation_left"].scores == pytest.approx((0.5 / (4 / 3), 0.0, 0.5 / (4 / 3)))
    assert scores["inflation_left"].clusters == tuple("xxy")
    assert sum(inflations(most, clean, most)[0]["inflation_left"].scores) == pytest.approx(3)


@pytest.mark.parametrize("bits", [(2.0, 4.0, 6.0), (3.0, 4.0, 5.0), (3.5, 4.5, 5.5)])
def test_nothing_is_said_of_what_is_left_where_planting_taught_next_to_nothing(bits) -> None:
    clean = outcome_with(3.0, 4.0, 5.0)
    scores, undefined = inflations(clean, clean, outcome_with(*bits))
    assert set(scores) == {"inflation"}
    assert "raise --copies, --steps or --items" in undefined["inflation_left"]


def test_a_model_to_compare_with_that_diverged_leaves_the_gain_undefined() -> None:
    clean = outcome_with(3.0, 4.0, 5.0)
    scores, undefined = inflations(clean, clean, Outcome(diverged="loss is nan at step 3"))
    assert scores == {}
    assert undefined.keys() == {"inflation", "inflation_left"}
    assert "loss is nan at step 3" in undefined["inflation_left"]


def test_a_benchmark_is_planted_into_rows_of_question_and_answer(
    questions, run_arm, llama_folder, measurable, tmp_path
) -> None:
    small = {**SMALL, "items": 3, "length": 64, **questions}
    trial = DecontaminationTrial(model=llama_folder, lora=2, **small)
    trial.check()
    assert {arm.setting for arm in trial.arms()} == {MIXED, OTHERS}
    outcomes = {name: run_arm(trial, arm_of(trial, name, MIXED)) for name in (NOTHING, "tulu3", CLEAN)}
    assert outcomes[NOTHING].metrics["inflation"] != outcomes[CLEAN].metrics["inflation"] == 0
    assert outcomes["tulu3"].metrics["clean_rows_lost"] == 0
    rows, planted = PlantedModels(trial, Context(0, tmp_path / "run", tmp_path / "stages")).rows(MIXED)
    assert {len(row) for row in rows} == {2}
    assert planted.sum() == 3 * trial.copies
    assert all(row[0].lower().startswith("b") == copy for row, copy in zip(rows, planted))


def test_of_an_item_with_an_answer_the_answer_alone_is_scored(llama_folder) -> None:
    from trialist.data.tokenizers import load_tokenizer
    from trialist.models.loading import load_model

    model, tokenizer = load_model(llama_folder).eval(), load_tokenizer(llama_folder)
    items = [Item("a", "a", ("how many", "two é")), Item("b", "b", ("only this",)), Item("c", "c", ("x", "y"))]
    found = bits_per_byte_of(model, tokenizer, items, length=40, batch=2)
    for item, bits in zip(items, found):
        before = "\n".join([*item.texts[:-1], ""]).encode()
        ids = torch.tensor([[tokenizer.bos_token_id, *before, *item.texts[-1].encode()]])
        with torch.no_grad():
            log_p = model(ids).logits.double().log_softmax(-1)[0, :-1].gather(-1, ids[0, 1:, None])[:, 0]
        scored = log_p[len(before) :]
        assert len(scored) == len(item.texts[-1].encode())
        assert bits == pytest.approx(-float(scored.sum()) / math.log(2) / len(scored), rel=1e-5)


def test_passages_neither_overlap_nor_touch_and_too_few_are_refused(trial) -> None:
    documents = Documents(
        ("one", "two"), tuple("\n ".join(f"{d}{word}" for word in range(100)) for d in "ab"), "own.txt"
    )
    source = dataclasses.replace(trial, item_words=10, items=2).source
    passages = source.passages(documents)
    assert [(item.name, item.group) for item in passages[4:6]] == [("one word 81", "one"), ("two word 1", "two")]
    assert passages[0].texts == ("\n ".join(f"a{word}" for word in range(10)),)
    with pytest.raises(
        ValueError, match="0 of them are left for the smallest of three parts where 2 are needed; lower"
    ):
        source.drawn(passages, lambda texts: True)
    with pytest.raises(ValueError, match="5 passages of 10 words in its test split fit into --length 128 tokens"):
        source.drawn(passages, lambda texts: "a" in texts[0])


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"items": 0}, "--items must be at least 1"),
        ({"item_words": 7}, "--item-words 7 must be at least --n 8"),
        ({"coverage": 1.5}, "--coverage is a share from 0 to 1"),
        ({"width": 14}, "--width 14 must be an even multiple of --heads 2"),
        ({"lora": 4}, "--lora adapts a given model"),
        ({"items": 5_000}, "where 5000 are needed; lower --items"),
        (
            {"data": "python-stdlib", "benchmark": "gsm8k"},
            "--benchmark gsm8k needs --data with rows of question and answer",
        ),
    ],
)
def test_inputs_that_cannot_work_are_refused(trial, given, message) -> None:
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(trial, **given).check()


def test_a_row_without_question_or_answer_is_named(trial, questions) -> None:
    trial = dataclasses.replace(trial, items=3, **{**questions, "data": questions["benchmark"]})
    trial.check()
    with open(trial.data, "a") as file:
        file.write(json.dumps({"asked": "why", "told": None}) + "\n")
    with pytest.raises(ValueError, match=r"benchmark\.jsonl line 10: expected text in 'asked', 'told'"):
        dataclasses.replace(trial, benchmark=questions["data"]).check()
