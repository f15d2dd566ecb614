from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from trialist.cli.main import main
from trialist.decoding.options import prepare
from trialist.decoding.precision.flags import PrecisionFlags
from trialist.decoding.precision.progressive import ProgressivePrecision
from trialist.decoding.precision.progressive_flags import ProgressivePrecisionFlags
from trialist.decoding.precision.schedules import (
    PiecewiseSchedule,
    StaticSchedule,
    load_schedule,
    save_schedule,
)
from trialist.models.nested.quantizer import NestedQuantConfig
from trialist.weights.nested import quantize_nested

from ..models.conftest import tokens
from .nested_model import dense_model, nested_model

RECIPE = ["train", "precision-schedule", "--steps", "5", "--batch", "2", "--shares", "0", "0.5", "--device", "cpu"]


@pytest.fixture(scope="module")
def nested() -> Any:
    return nested_model()


@pytest.fixture(scope="module")
def folder(byte_model: Any, chat_tokenizer: Any, tmp_path_factory: Any) -> Path:
    """A saved nested model of bytes with a tokenizer."""
    import copy

    place = tmp_path_factory.mktemp("nested") / "model"
    model = copy.deepcopy(byte_model)
    quantize_nested(model, NestedQuantConfig(seed_bits=2, parent_bits=4, sensitivity="none"))
    model.save_pretrained(place)
    chat_tokenizer.save_pretrained(place)
    return place


@pytest.fixture
def prompts(tmp_path: Path) -> str:
    file = tmp_path / "prompts.txt"
    file.write_text("".join(f"say {word}\n" for word in ("one", "two", "three", "four", "five", "six")))
    return str(file)


def test_without_flags_nothing_is_asked_for(nested):
    assert ProgressivePrecisionFlags().options(nested, None, []) == ()
    assert ProgressivePrecisionFlags().options(dense_model(), None, []) == ()


def test_words_and_a_folder_become_the_option(nested, tmp_path):
    (option,) = ProgressivePrecisionFlags("4@0,2@85", 3).options(nested, None, [])
    assert option == ProgressivePrecision(PiecewiseSchedule(((0, 4), (85, 2))), 3)
    (option,) = ProgressivePrecisionFlags("3@0,2@85").options(nested, None, [])
    assert option.prefill == 3
    save_schedule(StaticSchedule(4, 3, 9), tmp_path)
    (option,) = ProgressivePrecisionFlags(str(tmp_path), 4).options(nested, None, [])
    assert option == ProgressivePrecision(StaticSchedule(4, 3, 9), 4)


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (ProgressivePrecisionFlags(prefill_bits=3), "--prefill-bits 3 needs --bits-schedule"),
        (ProgressivePrecisionFlags("3"), "--bits-schedule 3: it is no folder"),
        (ProgressivePrecisionFlags("3@1"), "--bits-schedule 3@1: a schedule begins at step 0"),
        (ProgressivePrecisionFlags("6@0"), "the schedule asks for 6 bits, and the weights can be read at 2, 3, 4"),
        (ProgressivePrecisionFlags("3@0", 8), "the schedule asks for 8 bits"),
    ],
    ids=lambda value: "" if isinstance(value, str) else f"{value.bits_schedule} {value.prefill_bits}",
)
def test_flags_that_cannot_be_are_refused_by_their_names(nested, flags, words):
    with pytest.raises(ValueError, match=words):
        flags.options(nested, None, [])


def test_a_folder_without_a_schedule_is_refused(nested, tmp_path):
    with pytest.raises(ValueError, match=r"--bits-schedule .* holds no schedule.json"):
        ProgressivePrecisionFlags(str(tmp_path)).options(nested, None, [])


def test_a_model_that_is_not_nested_is_refused_with_the_command():
    with pytest.raises(ValueError, match=r"--bits-schedule 3@0: .*`trialist apply quantize --model"):
        ProgressivePrecisionFlags("3@0").options(dense_model(), None, [])


def test_both_bits_and_a_schedule_are_refused_with_both_names(nested):
    options = [
        *PrecisionFlags(3).options(nested, None, []),
        *ProgressivePrecisionFlags("4@0,2@3").options(nested, None, []),
    ]
    with pytest.raises(ValueError, match="Precision and ProgressivePrecision"):
        prepare(nested, options, {"input_ids": tokens(1, 4)})


def test_generate_takes_a_schedule_and_reports_average_bits(folder, capsys):
    arguments = ["--prompt", "abc", "--max-new-tokens", "6", "--temperature", "0", "--json", "--device", "cpu"]
    assert (
        main(["generate", "--model", str(folder), *arguments, "--bits-schedule", "4@0,2@2", "--prefill-bits", "3"]) == 0
    )
    (result,) = json.loads(capsys.readouterr().out)["results"]
    assert result["average_bits"] == pytest.approx((3 + 4 + 4 + 2 + 2 + 2) / 6)


def test_a_static_schedule_is_tuned_written_whole_and_used(folder, prompts, tmp_path, capsys):
    place = tmp_path / "schedule"
    arguments = [*RECIPE, "--model", str(folder), "--data", prompts, "--output", str(place)]
    assert main([*arguments, "--low", "2", "--tolerance", "1000"]) == 0
    out = capsys.readouterr().out
    assert "0 high steps" in out
    assert "chosen" in out
    assert load_schedule(place) == StaticSchedule(4, 2, 0)
    record = json.loads((place / "tuning.json").read_text())
    assert [row["high_steps"] for row in record["result"]["candidates"]] == [0, 2, 5]
    assert main([*arguments, "--low", "2"]) == 2  # nothing is overwritten
    assert "is not empty" in capsys.readouterr().err
    generation = ["--prompt", "abc", "--max-new-tokens", "4", "--device", "cpu", "--bits-schedule", str(place)]
    assert main(["generate", "--model", str(folder), *generation]) == 0


def test_a_learned_schedule_says_whether_it_is_better_than_the_prior(folder, tmp_path, capsys):
    file = tmp_path / "prompts.jsonl"
    file.write_text("".join(json.dumps({"prompt": f"count to {n}"}) + "\n" for n in range(20)))
    place = tmp_path / "learned"
    arguments = [*RECIPE, "--model", str(folder), "--data", str(file), "--output", str(place), "--raw"]
    assert main([*arguments, "--kind", "learned", "--epochs", "2"]) == 0
    out = capsys.readouterr().out
    assert "better than prior" in out
    schedule = load_schedule(place)
    assert (schedule.high, schedule.low, schedule.high_steps, schedule.prefill_bits) == (4, 3, (0, 2, 5), 4)
    torch.manual_seed(0)
    assert main(["generate", "--model", str(folder), "--prompt", "a", "--raw", "--max-new-tokens", "3", "--device", "cpu",
                 "--bits-schedule", str(place)]) == 0  # fmt: skip


def test_a_dense_model_and_bad_options_leave_no_folder(byte_model, chat_tokenizer, prompts, tmp_path, capsys):
    dense = tmp_path / "dense"
    byte_model.save_pretrained(dense)
    chat_tokenizer.save_pretrained(dense)
    place = tmp_path / "schedule"
    assert main([*RECIPE, "--model", str(dense), "--data", prompts, "--output", str(place)]) == 2
    assert "trialist apply quantize" in capsys.readouterr().err
    with pytest.raises(SystemExit) as ended:
        main([*RECIPE, "--model", str(dense), "--data", prompts, "--output", str(place), "--tolerance", "-1"])
    assert ended.value.code == 2
    assert "--tolerance must be at least 0" in capsys.readouterr().err
    assert not place.exists()
