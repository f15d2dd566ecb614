"""Contamination analyses that are interrupted, go on, and run in several processes."""

from __future__ import annotations

import json
import os
from pathlib import Path
from types import SimpleNamespace

import pytest

from tests.analysis.contamination_data import analysed
from trialist.analysis.contamination import ContaminationAnalysis
from trialist.cli.main import main


def interrupt(monkeypatch, module: str, at: int) -> None:
    """Makes the call number `at` of os.replace in a module an interruption."""
    whole, calls = os.replace, []

    def replace(*given):
        calls.append(given)
        if len(calls) == at:
            raise KeyboardInterrupt
        whole(*given)

    monkeypatch.setattr(f"trialist.data.{module}.os", SimpleNamespace(replace=replace, getpid=os.getpid))


@pytest.mark.parametrize("at", [1, 2, 3])
def test_the_files_of_a_report_are_there_together_or_not_at_all(here, monkeypatch, at):
    before = sorted(here.rglob("*"))
    with monkeypatch.context() as patch:
        interrupt(patch, "subset", at)
        assert main(["analyze", "contamination", "--train", "train.jsonl", "--benchmarks", "items.jsonl"]) == 130
    kept = set(here.rglob("*")) - set(before)
    assert {path.relative_to(here).parts[0] for path in kept} == {"contamination.scanned"}
    lines: list[str] = []
    ContaminationAnalysis(train=("train.jsonl",), benchmarks=("items.jsonl",))(say=lines.append)
    assert "train.jsonl: 1 of 1 shards were scanned before" in lines
    assert sorted(path.name for path in set(here.rglob("*")) - set(before)) == [
        "contamination.html", "contamination.json", "contamination.tsv"
    ]  # fmt: skip


def test_an_interrupted_analysis_goes_on_and_reports_the_same(here, monkeypatch):
    monkeypatch.setattr("trialist.data.shards.SIZE", 100)
    expected = analysed()
    lines: list[str] = []
    with monkeypatch.context() as patch:
        interrupt(patch, "scan_state", 2)
        with pytest.raises(KeyboardInterrupt):
            analysed(lines.append)
    report = analysed(lines.append)
    assert "train.jsonl: 1 of 4 shards were scanned before" in lines
    assert without_times(report) == without_times(expected)


def test_what_was_scanned_of_other_data_or_by_other_options_is_not_taken_up(here, monkeypatch):
    with monkeypatch.context() as patch:
        interrupt(patch, "subset", 1)
        with pytest.raises(KeyboardInterrupt):
            analysed()
    lines: list[str] = []
    with monkeypatch.context() as patch:
        interrupt(patch, "subset", 1)
        with pytest.raises(KeyboardInterrupt):
            analysed(lines.append, n=7)
    Path("train.jsonl").write_text(json.dumps({"prompt": "quite other text"}) + "\n")
    assert analysed(lines.append)["train"][0]["rows"] == 1
    assert not any("before" in line for line in lines)


@pytest.mark.slow
def test_processes_find_the_same_as_one(here, monkeypatch, capsys):
    monkeypatch.setattr("trialist.data.shards.SIZE", 100)
    expected = analysed(output="one")
    command = ["analyze", "contamination", "--train", "train.jsonl", "--benchmarks", "items.jsonl", "--jobs", "2"]
    assert main(command) == 0
    assert without_times(json.loads(Path("contamination.json").read_text())) == without_times(expected)
    assert "4 of 4 shards are done" in capsys.readouterr().err
    Path("train.jsonl").write_text(Path("train.jsonl").read_text() + "{}\n")
    with pytest.raises(ValueError, match=r"train\.jsonl line 5: no column of the roles"):
        analysed(jobs=2)


def without_times(report: dict) -> dict:
    trains = [{**train, "seconds": 0} for train in report["train"]]
    return {**report, "train": trains, "date": ""}
