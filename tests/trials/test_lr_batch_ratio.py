from __future__ import annotations

import dataclasses
import json
import math
import random
from pathlib import Path

import pytest
import torch

from tests.engine.decided import run as record
from tests.trials.conftest import arm_of, model_folder
from trialist.engine.contract import Endpoint, Outcome
from trialist.engine.effects import Cell, slope
from trialist.engine.intervals import Undefined
from trialist.engine.verdict import decide
from trialist.trials import _lr_batch_effects as effects
from trialist.trials._lr_batch_cells import answered, tuned
from trialist.trials._lr_batch_grid import PASSES, RULES, Point, grid, points
from trialist.trials._lr_batch_tasks import GENERATED, UNEQUAL_TWINS, OwnTask
from trialist.trials.lr_batch_ratio import MAIN, NULL, LearningRateBatchTrial

SMALL = {
    "layers": 1, "width": 16, "heads": 2, "digits": 5, "letters": 8, "hops": 2, "pretraining": 3, "batch": 4, "steps": 5,
    "test_items": 9, "device": "cpu",
}  # fmt: skip
MIDDLE = Point(1e-3, 16, 96)
BEFORE = -9.0
"""Log-odds of every task before fine-tuning, where a test plants them"""
CENTRE = LearningRateBatchTrial().middle


@pytest.fixture
def trial():
    return LearningRateBatchTrial(**SMALL)


def share(log_odds):
    return 1 / (1 + math.exp(-log_odds))


def cells(log_odds, setting=MAIN, metrics=lambda value: {"score": value}):
    """Cells of a setting at the sizes of `tiny`; `log_odds(task, lr, batch, steps)` in doublings from the middle."""
    made = []
    for arm in LearningRateBatchTrial().arms():
        if arm.setting != setting:
            continue
        if not arm["steps"]:
            made.append(Cell(arm, 0, Outcome(metrics=metrics(BEFORE))))
            continue
        r, b, s = (math.log2(arm[name] / getattr(CENTRE, name)) for name in ("learning_rate", "batch", "steps"))
        t = r + s
        covariates = {
            "log_lr": r, "log_batch": b, "log_ratio": r - b, "log_lr_time": t, "log_lr_time_squared": t**2,
        }  # fmt: skip
        made.append(Cell(arm, 0, Outcome(metrics=metrics(log_odds(arm["task"], r, b, s)), covariates=covariates)))
    random.Random(0).shuffle(made)
    return made


def decided(log_odds, seeds=3, noise=0.01, further=lambda value: {}, **options):
    """The verdict over planted scores in every setting."""
    trial, generator = LearningRateBatchTrial(), random.Random(1)
    arms, records = list(trial.arms()), []

    def metrics(value):
        noisy = [share(value + noise * generator.gauss(0, 1)) for _ in range(2)]
        return {"score": noisy[0], "validation_score": noisy[1], **further(value)}

    for setting in dict.fromkeys(arm.setting for arm in arms):
        for seed in range(seeds):
            for cell in cells(log_odds, setting, metrics):
                outcome = cell.outcome
                records.append(
                    record(cell.arm.name, seed, outcome.metrics, setting=setting, covariates=outcome.covariates)
                )
    return decide(trial, arms, records, **options)


def reading(verdict, effect):
    return next(found for found in verdict.readings if found.control == effect.label)


# the grid


def test_each_rule_holds_equal_what_it_is_named_after():
    grids = {rule: list(points(rule, MIDDLE, 2.0)) for rule in RULES}
    assert {point.rows for point in grids["equal-epochs"]} == {16 * 96}
    assert {point.steps for point in grids["equal-steps"]} == {96}
    assert {round(point.learning_rate * point.steps, 9) for point in grids["equal-lr-time"]} == {0.096}
    for cells_of_rule in grids.values():
        assert len(set(cells_of_rule)) == 15
        assert {point.batch for point in cells_of_rule} == {4, 16, 64}
        assert len({point.learning_rate for point in cells_of_rule}) == 5
    with pytest.raises(ValueError, match="rule 'equal' is unknown"):
        list(points("equal", MIDDLE, 2.0))


def test_the_cells_of_a_rule_are_those_that_name_it():
    together = grid(MIDDLE, 2.0)
    assert together[MIDDLE] == RULES
    for rule in RULES:
        assert {point for point, rules in together.items() if rule in rules} == set(points(rule, MIDDLE, 2.0))


def test_no_cell_passes_its_rows_more_than_twice():
    for preset in LearningRateBatchTrial.presets.values():
        chosen = {name: value for name, value in preset.items() if name not in ("seeds", "about")}
        trial = LearningRateBatchTrial(**chosen)
        most = max(point.rows for point in grid(trial.middle, trial.factor))
        assert most / PASSES <= trial.counts["train"] < most / PASSES + 1


# what is fitted


TASTES = {"reasoning": 0.9, "pattern": -0.4, "format": 0.1, "long-format": 0.6}


def bent(task, time):
    """What a task makes of learning-rate time: neither linear nor of second order."""
    return math.exp(TASTES[task] * time / 3) + math.sin(time)


def test_training_harder_looks_like_a_ratio_effect_and_vanishes_given_learning_rate_time():
    made = cells(lambda task, r, b, s: bent(task, r + s))
    assert abs(effects.PUBLISHED(made, "score")) > 0.05
    for effect in (effects.CONTROLLED, effects.EQUAL_STEPS, effects.EQUAL_TIME):
        assert effect(made, "score") == pytest.approx(0, abs=1e-9)
    assert effects.TakenAway()(made, "score") == pytest.approx(effects.PUBLISHED(made, "score"))


@pytest.mark.parametrize("effect", [effects.CONTROLLED, effects.EQUAL_STEPS, effects.EQUAL_TIME], ids=lambda e: e.where)
def test_a_planted_interaction_is_found_beyond_learning_rate_time(effect):
    made = cells(lambda task, r, b, s: bent(task, r + s) + TASTES[task] * (r - b))
    expected = TASTES["reasoning"] - (TASTES["pattern"] + TASTES["format"]) / 2
    assert effect(made, "score") == pytest.approx(expected)


def test_at_equal_epochs_ratio_and_learning_rate_time_cannot_be_told_apart():
    made = effects.trained(cells(lambda task, r, b, s: r), ("equal-epochs",))
    with pytest.raises(Undefined, match="do not determine"):
        slope("log_ratio", "score", given=("log_lr_time",))(made, "score")


@pytest.mark.parametrize("task", GENERATED)
def test_the_pure_ratio_law_is_a_sum_of_slopes_of_zero(task):
    law = effects.RatioLaw(task)
    assert law(cells(lambda task, r, b, s: 0.3 * (r - b)), "score") == pytest.approx(0)
    assert law(cells(lambda task, r, b, s: 0.3 * (r + s)), "score") == pytest.approx(0.3)
    assert law(cells(lambda task, r, b, s: 0.3 * r - 0.15 * b), "score") == pytest.approx(0.15)


def test_the_best_of_a_grid_is_chosen_on_validation_and_told_on_the_test():
    def metrics(value):
        return {"score": -value, "validation_score": value}

    made = cells(lambda task, r, b, s: (r - b if task == "reasoning" else b - r) + 0.01 * r, metrics=metrics)
    ratios = [math.log2(p.learning_rate / p.batch) for p in points("equal-steps", CENTRE, 2.0)]
    assert effects.BestRatio("equal-steps")(made, "score") == pytest.approx(max(ratios) - min(ratios))
    told = effects.BestScore("reasoning", "equal-steps")(made, "score")
    assert told == min(cell.value("score") for cell in made if "equal-steps" in cell.arm["rules"].split())


def test_a_diverged_cell_is_never_the_best_one():
    made = cells(lambda task, r, b, s: r, metrics=lambda value: {"score": value, "validation_score": value})
    best = effects.chosen(effects.by_task(made)["format"], "equal-steps")
    left = [
        dataclasses.replace(cell, outcome=dataclasses.replace(cell.outcome, metrics={"score": -9.0}))
        if cell is best
        else cell
        for cell in made
    ]
    assert effects.chosen(effects.by_task(left)["format"], "equal-steps").arm != best.arm


# the verdict


DIFFICULTIES = [
    {"reasoning": -4, "pattern": 0, "format": 0, "long-format": -4},
    {"reasoning": 0, "pattern": -3, "format": 0, "long-format": -3},
    {"reasoning": 2, "pattern": 0, "format": -1, "long-format": 1},
]


def one_law(difficulty):
    """Time and examples act alike on every task, and so does the ratio; what differs is where a task begins."""
    return lambda task, r, b, s: difficulty[task] + 0.8 * (r + s) + 0.5 * (b + s)


@pytest.mark.parametrize("difficulty", DIFFICULTIES, ids=str)
def test_tasks_that_differ_in_difficulty_alone_show_no_effect(difficulty):
    found = decided(one_law(difficulty))
    assert found.word == "no effect", found.sentence
    assert [effect.null_word for effect in found.null_effects] == ["shown null"]


def test_the_null_setting_catches_a_measure_that_takes_difficulty_for_an_effect():
    raw = Endpoint("score", unit="share", margin=0.01)
    harder = {"reasoning": -2, "pattern": 0, "format": 0, "long-format": -2}
    found = decided(one_law(harder), endpoint=raw)
    assert found.effects[0].low > 0.01  # a harder task lies lower and is flatter as a share
    assert found.word == "void"
    assert [effect.null_word for effect in found.null_effects] == ["effect shown"]


def test_what_is_learning_rate_time_alone_is_no_effect_beside_a_published_one():
    found = decided(lambda task, r, b, s: 0.4 * bent(task, r + s))
    assert found.word == "no effect"
    assert reading(found, effects.PUBLISHED).low > 0
    assert reading(found, effects.TakenAway()).low > 0
    for effect in (effects.EQUAL_STEPS, effects.EQUAL_TIME):
        assert reading(found, effect).low < 0 < reading(found, effect).high
    assert reading(found, effects.RatioLaw("reasoning")).low > 0  # not a pure ratio law


def test_the_sentence_tells_the_effect_with_control_and_without_and_their_difference():
    found = decided(lambda task, r, b, s: (0.3 if task == "reasoning" else 0.1) * (r - b))
    difference = reading(found, effects.TakenAway())
    assert difference.effect == pytest.approx(
        reading(found, effects.PUBLISHED).effect - found.effects[0].effect, abs=1e-12
    )
    assert difference.low < difference.effect < difference.high
    for words in ("given learning-rate time", "at equal epochs, without control", "that the control takes away"):
        assert words in found.sentence


def test_a_ratio_that_counts_for_reasoning_is_supported():
    found = decided(lambda task, r, b, s: 0.2 * (r + s) + (0.3 if task == "reasoning" else 0.0) * (r - b))
    assert found.word == "supported"
    assert found.effects[0].effect == pytest.approx(0.3, abs=0.01)
    assert "the odds of score is a factor of 1.3" in found.sentence
    assert "per doubling (95 % interval" in found.sentence
    assert found.effects[0].unit == "log odds per doubling"


def test_a_task_at_its_floor_in_most_cells_leaves_the_verdict_open_and_is_named():
    def floored(task, r, b, s):
        free = 0.8 * (r + s) + 0.5 * (b + s)
        return max(BEFORE, free - 9) if task == "pattern" else free

    found = decided(floored, noise=0.001)
    assert found.word == "inconclusive"
    assert "score of pattern with seed 0 lies at a floor or a ceiling" in found.sentence
    assert reading(found, effects.InReach("pattern")).effect < 0.5 < reading(found, effects.InReach("format")).effect


def test_a_task_that_learns_nothing_has_no_cell_in_its_reach():
    made = cells(lambda task, r, b, s: BEFORE - 1 if task == "format" else r)
    assert effects.share_in_reach(effects.by_task(made)["format"], "score") == 0
    with pytest.raises(Undefined, match="score of format"):
        effects.CONTROLLED(made, "score")


def test_the_endpoint_that_was_asked_for_decides():
    def further(value):
        return {"greedy": 0.5}  # the same in every cell

    law = lambda task, r, b, s: 0.2 * (r + s) + (0.3 if task == "reasoning" else 0.0) * (r - b)  # noqa: E731
    found = decided(law, further=further, endpoint=Endpoint("greedy", unit="share of answers", margin=0.01))
    assert found.effects[0].endpoint == "greedy"
    assert found.word == "inconclusive"

    def other(value):
        return {"greedy": 0.5 + 0.02 * value}

    found = decided(law, further=other, endpoint=Endpoint("greedy", unit="share of answers", margin=0.001))
    assert found.effects[0].effect == pytest.approx(0.3 * 0.02)


def test_secondary_endpoints_are_fitted_too():
    found = decided(one_law(DIFFICULTIES[0]), further=lambda value: {"greedy": 0.5 + 0.02 * value})
    by_name = {effect.endpoint: effect for effect in found.secondary}
    assert list(by_name) == ["validation_score", "greedy", "sampled"]
    assert abs(by_name["validation_score"].effect) < 0.01
    assert by_name["greedy"].effect == pytest.approx(0, abs=1e-9)
    assert by_name["greedy"].unit == "share of answers per doubling"
    assert "no metric" in by_name["sampled"].reason


def test_every_reading_has_a_label_of_its_own():
    labels = [effect.label for effect in (effects.CONTROLLED, *LearningRateBatchTrial().readings())]
    assert len(set(labels)) == len(labels)


# runs


def test_settings_share_the_training_of_equal_cells(trial, run_arm):
    task = UNEQUAL_TWINS[1]
    name = next(arm.name for arm in trial.arms() if arm["task"] == task and arm["steps"])
    first, second = (run_arm(trial, arm_of(trial, name, setting)) for setting in (MAIN, NULL))
    assert first.metrics == second.metrics
    assert first.cost == second.cost


def test_learning_rate_time_is_that_of_the_recipes_schedule(trial, run_arm):
    trial = dataclasses.replace(trial, steps=40, digits=8)
    arm = next(arm for arm in trial.arms() if arm["steps"] == 40)
    outcome = run_arm(trial, arm)
    warm, rest = 2, 38  # three hundredths of the steps, rounded up, then down to 0 in a line
    shares = [k / warm for k in range(warm)] + [1 - k / rest for k in range(rest)]
    assert outcome.covariates["lr_time"] == pytest.approx(arm["learning_rate"] * math.fsum(shares))
    assert outcome.covariates["log_lr_time"] == pytest.approx(math.log2(outcome.covariates["lr_time"]))
    assert outcome.covariates["log_ratio"] == pytest.approx(math.log2(arm["learning_rate"] / arm["batch"]))
    assert outcome.cost.steps == 40


def test_fine_tuning_is_adamw_without_weight_decay(trial, monkeypatch, tmp_path):
    import trialist.trials._lr_batch_cells as module
    from trialist.engine.context import Context

    seen = []
    monkeypatch.setattr(
        module, "train", lambda model, batches, context, **given: (seen.append(given), (Outcome(), {}))[1]
    )
    tuned(trial, Context(0, tmp_path, tmp_path), torch.nn.Linear(2, 2), "format", Point(1e-3, 4, 5))
    group = seen[0]["optimizer"].param_groups[0]
    assert (group["weight_decay"], group["betas"], group["lr"]) == (0.0, (0.9, 0.999), 1e-3)


def test_before_fine_tuning_nothing_is_spent_and_no_place_is_had(trial, run_arm):
    outcome = run_arm(trial, arm_of(trial, "format before", MAIN))
    assert (outcome.cost.steps, outcome.cost.tokens, dict(outcome.covariates)) == (0, 0, {})
    assert 0 < outcome.metrics["score"] < 1


def test_a_run_is_a_pure_function_of_its_seed(trial, run_arm):
    arm = next(arm for arm in trial.arms() if arm.setting == NULL and arm["steps"])
    first, again, other = (run_arm(trial, arm, seed=seed) for seed in (0, 0, 1))
    assert first.metrics == again.metrics
    assert first.metrics["score"] != other.metrics["score"]


# a given model and one's own rows


@pytest.fixture(scope="module")
def own_rows(tmp_path_factory):
    """Two kinds of rows, of which two do not ask the same."""
    folder, generator = tmp_path_factory.mktemp("rows"), random.Random(3)
    for name, sign in (("sums", "+"), ("copies", "")):
        lines = []
        for _ in range(100):
            a, b = generator.randrange(10**8), generator.randrange(10**8)
            answer = str(a + b) if sign else f"{a} {b}"
            lines.append(json.dumps({"question": f"{a}{sign}{b}=", "completion": answer}))
        (folder / f"{name}.jsonl").write_text("\n".join(dict.fromkeys(lines)))
    return folder


@pytest.fixture
def own(llama_folder, own_rows):
    return LearningRateBatchTrial(
        model=llama_folder, data=f"{own_rows}/sums.jsonl,{own_rows}/copies.jsonl", columns="prompt=question", length=48, batch=4,
        steps=4, factor=1.4, test_items=4, device="cpu",
    )  # fmt: skip


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("lora", [0, 2])
def test_a_given_model_is_fine_tuned_on_ones_own_rows(own, lora, run_arm, tmp_path):
    trial = dataclasses.replace(own, lora=lora)
    trial.check()
    arms = list(trial.arms())
    assert {arm["task"]: arm["favoured"] for arm in arms} == {"sums": True, "copies": False}
    assert not any(arm.null for arm in arms)
    arm = next(arm for arm in arms if arm["steps"])
    outcome = run_arm(trial, arm, keep_model=True)
    assert set(outcome.metrics) == {"score", "greedy", "sampled", "validation_score"}
    assert (model_folder(tmp_path) / "config.json").is_file()
    assert "the null setting is left out" in " ".join(trial.remarks())


@pytest.mark.parametrize(("lora", "most"), [(0, 2e-4), (8, 2e-3)])
def test_a_given_model_is_trained_gently_by_default(own, lora, most):
    trial = dataclasses.replace(own, lora=lora)
    assert max(arm["learning_rate"] for arm in trial.arms()) <= most
    assert max(arm["learning_rate"] for arm in LearningRateBatchTrial().arms()) > most


def test_parts_of_ones_own_rows_ask_different_things(own):
    task = OwnTask.of(own, "sums")
    asked = {part: {row["prompt"] for row in rows} for part, rows in task.parts.items()}
    assert not asked["train"] & asked["test"]
    assert not asked["validation"] & asked["test"]
    assert [len(own_part) for own_part in (task.rows(own, "train"), task.rows(own, "test"))] == [own.counts["train"], 4]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"data": ""}, "needs --data with two or three kinds of rows"),
        ({"data": "sums.jsonl"}, "needs --data with two or three kinds of rows"),
        ({"data": "a/sums.jsonl,b/sums.jsonl"}, "of different names"),
        ({"columns": "prompt=a;prompt=b;prompt=c"}, "one list for all of --data, or 2"),
        ({"steps": 400}, "to train on, and the largest cell of the grid needs"),
        ({"length": 65}, "--length 65 is longer"),
        ({"lora": -1}, "--lora is a rank"),
    ],
)
def test_own_rows_that_cannot_serve_are_refused(own, change, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(own, **change).check()


# words and measures


def test_the_differences_on_the_page_follow_from_the_numbers_beside_them():
    page = (Path(__file__).parents[2] / "docs" / "techniques" / "smoltulu.md").read_text()
    lines = [
        [cell.strip() for cell in line.strip("|").split("|")] for line in page.splitlines() if line.startswith("| ")
    ]
    names = next(line for line in lines if "GSM8K" in line)[2:]
    rows = {line[0]: dict(zip(names, map(float, line[2:]))) for line in lines if line[0].startswith(("Smol", "1130"))}
    high, low, public = rows["SmolTulu 1130"], rows["SmolTulu 1207"], rows["SmolLM2 1.7B Instruct"]
    assert rows["1130 minus 1207"] == pytest.approx({name: high[name] - low[name] for name in names})
    abstract = {
        "IFEval": high["IFEval"],
        "GSM8K": high["GSM8K"],
        "ARC": low["ARC"],
    }  # what it reports over the public model
    gains = {name: value - public[name] for name, value in abstract.items()}
    assert gains == pytest.approx({"IFEval": 11.0, "GSM8K": 3.4, "ARC": 5.4})


class Fixed(torch.nn.Module):
    """Says the given logits."""

    def __init__(self, logits):
        super().__init__()
        self.logits, self.device = logits, torch.device("cpu")
        self.config = type("Config", (), {"vocab_size": logits.shape[-1]})

    def forward(self, input_ids, use_cache, attention_mask=None):
        return type("Output", (), {"logits": self.logits[:, : input_ids.shape[1]]})


def test_an_answer_is_right_when_every_token_of_it_is_the_most_probable():
    labels = [[-100, -100, 2, 1], [-100, 3, 1], [-100, -100, 0, 1]]  # the second row is shorter, and padded
    chosen = torch.tensor([[0, 2, 1, 0], [3, 1, 0, 0], [0, 0, 3, 0]])  # both right, both right, second wrong
    logits = torch.nn.functional.one_hot(chosen, 4) * torch.log(torch.tensor(9.0))  # 9 : 1 : 1 : 1
    rows = [{"input_ids": torch.tensor(row).clamp(min=0), "labels": torch.tensor(row)} for row in labels]
    found = answered(Fixed(logits), rows)
    assert found["greedy"] == pytest.approx(2 / 3)
    assert found["sampled"] == pytest.approx((81 + 81 + 9) / 144 / 3)
    assert found["score"] == pytest.approx((9**5 / 12**6) ** (1 / 6))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"batch": 6}, "--batch must be a multiple of 4"),
        ({"factor": 1.0}, "--factor must be above 1"),
        ({"steps": 3}, "--steps 3 leaves no step"),
        ({"width": 15}, "--width 15 must be a multiple of --heads 2"),
        ({"learning_rate": 0.0}, "--learning-rate must be > 0"),
        ({"digits": 1}, "expected digits >= 2"),
        ({"digits": 2}, "different questions of reasoning for"),
        ({"pretraining": 0}, "--pretraining must be at least 1"),
        ({"lora": 4}, "--lora adapts a given model"),
        ({"data": "rows.jsonl"}, "--data are for a given model"),
    ],
)
def test_inputs_that_cannot_work_are_refused(trial, change, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(trial, **change).check()


def test_a_grid_says_that_nothing_is_held_equal_over_its_cells(trial):
    from trialist.cli.show import held_equal
    from trialist.trials.selective_recall import SelectiveRecallTrial

    assert held_equal(trial).startswith("nothing over all cells of the grid; steps are measured")
    assert held_equal(SelectiveRecallTrial()).endswith("(measured), tolerance 0%")
