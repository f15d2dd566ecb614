"""The command line, with the torch-free trial of the test package."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

from trialist.cli.main import VERBS, main

FAST = ("--throws", "40", "--seeds", "4")


@pytest.fixture
def here(coins, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("TRIALIST_HOME")
    return tmp_path


@pytest.fixture(scope="module")
def finished(plugin_path, tmp_path_factory):
    """A folder in which `trialist run coins` has finished."""
    folder = tmp_path_factory.mktemp("finished")
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(plugin_path))
        patch.chdir(folder)
        patch.delenv("TRIALIST_HOME", raising=False)
        assert main(["run", "coins", *FAST]) == 0
    return folder


@pytest.fixture
def after_a_run(here, finished):
    shutil.copytree(finished, here, dirs_exist_ok=True)
    return here


def call(capsys, *arguments: str) -> tuple[int, str, str]:
    try:
        code = main(arguments)
    except SystemExit as stop:
        code = int(stop.code or 0)
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def test_run_prints_verdict_intervals_and_report_and_goes_on_where_it_was(here, capsys):
    code, out, err = call(capsys, "run", "coins", *FAST)
    assert code == 0
    assert "SUPPORTED" in out
    assert "[24/24]" in err
    report = here / ".trialist" / "reports" / "coins-tiny.html"
    assert str(report) in out
    assert "<html" in report.read_text()
    code, again, err = call(capsys, "run", "coins", *FAST)
    assert "24 of them already in the ledger" in err
    assert again == out


def test_run_says_the_full_trial_after_a_demo(here, capsys):
    _, out, _ = call(capsys, "run", "coins", "--preset", "demo", "--bias", "0.3")
    assert "trialist run coins --preset tiny --seeds 6 --bias 0.3" in out


def test_a_fair_coin_against_itself_is_never_supported(here, capsys):
    code, out, _ = call(capsys, "run", "coins", *FAST, "--bias", "0", "--hand", "0")
    assert code == 0
    assert "INCONCLUSIVE" in out


def test_failed_runs_exit_with_1_and_their_traceback_can_be_read(here, capsys):
    code, out, _ = call(capsys, "run", "coins", *FAST, "--crash", "weighted")
    assert code == 1
    assert "VOID" in out
    assert "4 runs failed" in out
    code, out, _ = call(capsys, "runs", "--status", "failed", "--errors")
    assert code == 0
    assert "the coin rolled under the sofa" in out
    assert "Traceback" in out


def test_fewer_than_three_seeds_give_no_verdict_and_say_so(here, capsys):
    code, out, _ = call(capsys, "run", "coins", "--throws", "40", "--seeds", "2")
    assert code == 0
    assert "INCONCLUSIVE" in out
    assert "at least 3" in out


def test_tuning_gives_every_arm_the_same_tries_and_chooses_on_its_own_metric(here, capsys):
    code, _, err = call(capsys, "run", "coins", *FAST, "--tuned")
    assert code == 0
    assert "tuning: 12 runs" in err
    assert "tuned weighted: spin 0" in err
    rows = json.loads(call(capsys, "runs", "--json")[1])
    tries = [row for row in rows if row["purpose"] == "tuning"]
    assert {row["seed"] for row in tries} == {1001, 1002}
    assert {row["setting"] for row in tries} == {"table"}


def test_a_failed_tuning_run_stops_the_trial_before_values_are_chosen(here, capsys):
    code, out, err = call(capsys, "run", "coins", *FAST, "--tuned", "--crash", "weighted")
    assert code == 1
    assert "4 of 12 tuning runs failed, so the values cannot be chosen fairly" in " ".join(err.split())
    assert "VOID" not in out
    assert {row["purpose"] for row in json.loads(call(capsys, "runs", "--json")[1])} == {"tuning"}


def test_runs_as_json_hold_what_a_script_needs(after_a_run, capsys):
    rows = json.loads(call(capsys, "runs", "--json")[1])
    assert len(rows) == 24
    assert {"id", "trial", "setting", "arm", "seed", "status"} <= set(rows[0])


def test_looking_early_stops_when_it_is_decided(here, capsys):
    _, out, err = call(capsys, "run", "coins", "--throws", "40", "--until-decided", "--looks", "3,5,8")
    assert "SUPPORTED" in out
    assert "seeds 0 to 2" in err
    assert "seeds 0 to 7" not in err


def test_verify_finds_the_same_numbers_again(after_a_run, capsys):
    run = json.loads(call(capsys, "runs", "--json")[1])[0]["id"]
    code, out, _ = call(capsys, "verify", run[:8])
    assert code == 0
    assert "equal" in out


def test_verify_refuses_a_run_whose_inputs_changed(here, capsys):
    (here / "coin.txt").write_text("0.4")
    call(capsys, "run", "coins", *FAST, "--data", "coin.txt")
    run = json.loads(call(capsys, "runs", "--json")[1])[0]["id"]
    (here / "coin.txt").write_text("0.5")
    code, _, err = call(capsys, "verify", run)
    assert code == 2
    assert "not what they were" in " ".join(err.split())


def test_export_of_a_trial_without_a_model_says_so(after_a_run, capsys):
    run = json.loads(call(capsys, "runs", "--json")[1])[0]["id"]
    code, _, err = call(capsys, "export", run, "--to", "model")
    assert code == 2
    assert "was not kept" in err
    code, _, err = call(capsys, "export", run, "--to", "model", "--yes")
    assert code == 2
    assert "trains no model" in err


def test_cleaning_leaves_folders_that_are_not_of_this_ledger(after_a_run, capsys):
    home = after_a_run / ".trialist"
    run = json.loads(call(capsys, "runs", "--json")[1])[0]["id"]
    for name in (run, "of another program"):
        (home / "runs" / name).mkdir(parents=True)
        (home / "runs" / name / "events").write_text("x")
    assert call(capsys, "runs", "--clean")[0] == 0
    assert [folder.name for folder in (home / "runs").iterdir()] == ["of another program"]
    code, _, err = call(capsys, "runs", "--clean", "--ledger", str(home / "none.db"))
    assert code == 2
    assert "no ledger" in err


@pytest.mark.parametrize("form", ["html", "md", "json"])
def test_report_in_every_format(after_a_run, capsys, form):
    code, out, _ = call(capsys, "report", "coins", "--format", form, "--output", "-")
    assert code == 0
    assert "heads" in out
    if form == "json":
        assert json.loads(out)["verdict"] == "supported"
    assert call(capsys, "report", "--format", form, "--output", "-")[0] == 0


def test_evidence_is_written_on_request_and_rendered(here, capsys):
    code, _, _ = call(capsys, "run", "coins", "--preset", "demo", "--save-evidence")
    assert code == 0
    document = json.loads((here / "evidence" / "coins" / "demo.json").read_text())
    assert document["schema"] == 1
    assert document["verdict"] == "supported"
    assert document["command"].startswith("trialist")
    assert call(capsys, "evidence")[0] == 0
    assert "coins" in (here / "EVIDENCE.md").read_text()
    assert call(capsys, "evidence", "--check")[0] == 0
    (here / "EVIDENCE.md").write_text("by hand")
    assert call(capsys, "evidence", "--check")[0] == 1
    assert "demo: supported" in " ".join(call(capsys, "list")[1].split())


def test_plan_times_the_arms_and_trains_nothing(here, capsys):
    code, out, _ = call(capsys, "plan", "coins", *FAST, "--json")
    assert code == 0
    plan = json.loads(out)
    assert (plan["runs"], plan["runs_finished"]) == (24, 0)
    assert plan["minutes"] > 0
    assert not (here / ".trialist" / "ledger.db").exists()


def test_show_and_list_as_json(here, capsys):
    shown = json.loads(call(capsys, "show", "coins", "--json")[1])
    assert shown["claim"]["endpoint"]["margin"] == 0.05
    assert {arm["role"] for arm in shown["arms"]} == {"control", "treatment"}
    assert "coins" in [row["name"] for row in json.loads(call(capsys, "list", "--json")[1])]


def test_help_of_a_trial_shows_its_options_with_their_defaults(here, capsys):
    code, out, _ = call(capsys, "run", "coins", "--help")
    assert code == 0
    assert "--throws INT" in out
    assert "default: 400" in out
    assert "--until-decided" in out


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("rum", "coins"), "Did you mean 'run'"),
        (("run", "coin"), "Did you mean 'coins'"),
        (("run",), "which trial?"),
        (("run", "coins", "--data", "none.txt"), "no such file"),
        (("run", "coins", "--seeds", "0"), "at least 1"),
        (("run", "coins", "--preset", "big"), "no preset 'big'"),
        (("run", "coins", "--endpoint", "x"), "--margin"),
        (("run", "coins", "--save-evidence", "--throws", "3"), "NAME"),
        (("run", "coins", "--seeds", "99999999999"), "at most 10000"),
        (("run", "coins", "--arms", "fair", "old"), "without a treatment"),
        (("run", "coins", "--bias", "nan"), "--bias must be a finite number"),
        (("run", "coins", "--save-evidence", "../../x"), "not a path"),
        (("run", "coins", "--data", "\udcff.txt"), "is not valid UTF-8"),
        (("run", "coins", "--ledger", "."), "is a folder"),
        (("runs", "--limit", "-1"), "at least 0"),
        (("report",), "run a trial first"),
        (("assets", "fetch", "smollm2-135m"), "Did you mean 'smollm2-135m-instruct'"),
        (("assets", "fetch"), "which asset?"),
        (("compare", "a.jsonl", "b.jsonl"), "a.jsonl"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
)
def test_bad_usage_exits_with_2_and_says_the_way_out(here, capsys, arguments, words):
    code, out, err = call(capsys, *arguments)
    assert code == 2
    assert words in " ".join(err.split())
    assert "Traceback" not in out + err
    assert not (here / "evidence").exists()


def test_an_unknown_option_exits_with_2(here, capsys):
    code, out, err = call(capsys, "run", "coins", "--throw", "3")
    assert code == 2
    assert "--throws" in out + err


def test_every_verb_has_help(here, capsys):
    for verb in VERBS:
        code, out, _ = call(capsys, verb, "--help")
        assert code == 0
        assert f"trialist {verb}" in out


def test_python_dash_m_is_the_command_and_help_is_instant():
    start = time.perf_counter()
    result = subprocess.run([sys.executable, "-m", "trialist", "--help"], capture_output=True, text=True, check=True)
    assert "usage: trialist" in result.stdout
    assert time.perf_counter() - start < 2.0  # 0.1 s on a quiet machine


def test_the_python_call_gives_the_same_verdict(after_a_run, capsys):
    import trialist

    _, out, _ = call(capsys, "run", "coins", *FAST)
    verdict = trialist.run("coins", throws=40, seeds=4)
    assert verdict.word == "supported"
    assert verdict.sentence in out
    assert Path(verdict.report(str(after_a_run / "report.html"))).is_file()
    assert "supported" in verdict._repr_html_()
