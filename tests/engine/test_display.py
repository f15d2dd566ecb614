from __future__ import annotations

import io

import pytest
from rich.console import Console

from trialist.engine.display import Display, Forecast, Row, duration
from trialist.engine.execute import Event
from trialist.engine.records import PlannedRun


def planned(name: str) -> PlannedRun:
    return PlannedRun(name, name, "s", "c", "coins", "main", "fair", 0, {})


def running(seconds: float, done: float, first: tuple[float, float] | None) -> Row:
    return Row(planned("a"), "running", done=done, total=100.0, seconds=seconds, first=first)


def test_the_pace_leaves_out_what_came_before_the_first_report():
    row = running(seconds=30.0, done=21.0, first=(20.0, 1.0))  # 20 s of start-up, then 2 units a second
    assert row.seconds_left == pytest.approx(39.5)
    assert row.seconds_in_all == pytest.approx(69.5)


def test_no_forecast_before_the_pace_is_known():
    assert running(seconds=21.0, done=2.0, first=(20.0, 1.0)).seconds_left is None
    assert Forecast(2).seconds_left([running(21.0, 2.0, (20.0, 1.0)), Row(planned("b"))]) is None


def test_work_that_stands_still_or_begins_anew_tells_no_pace():
    assert running(seconds=60.0, done=1.0, first=(20.0, 1.0)).seconds_left is None
    display = Display(Console(file=io.StringIO(), force_terminal=False))
    display.add([planned("a")], {"a": "a"}, {"a": "queued"}, 1, "trial")
    display(Event("started", "a"))
    for seconds, done, total in ((10.0, 0.0, 200.0), (50.0, 200.0, 200.0), (60.0, 0.0, 4.0), (90.0, 0.0, 4.0)):
        display(Event("progress", "a", done, total, {}, seconds))
    assert display.rows["a"].seconds_left is None
    display(Event("progress", "a", 1.0, 4.0, {}, 100.0))
    assert display.rows["a"].seconds_left == pytest.approx(120.0)  # 40 s for each of three: not the pace of the 200


def test_time_left_counts_waiting_runs_and_workers():
    rows = [Row(planned("a"), "done", seconds=10.0), *(Row(planned(name)) for name in "bcde")]
    assert Forecast(2).seconds_left(rows) == pytest.approx(20.0)


def test_off_a_terminal_every_end_is_one_clean_line():
    stream = io.StringIO()
    display = Display(Console(file=stream, force_terminal=False, width=40))
    runs = [planned("a"), planned("b")]
    display.add(runs, {"a": "a", "b": "b"}, {"a": "queued", "b": "done"}, 1, "trial")
    display(Event("started", "a"))
    display(Event("progress", "a", 1.0, 10.0, {"loss": 3.0}, 1.0))
    display(Event("done", "a", numbers={"accuracy": 0.51234}, seconds=41.0))
    lines = stream.getvalue().splitlines()
    assert lines[0] == "trial: 2 runs, 1 of them already in the ledger, 1 at a time"
    assert lines[1] == "[2/2] main · fair · seed 0: done, accuracy 0.5123, 41 s"
    assert len(lines) == 2


def test_off_a_terminal_a_long_silence_is_said_whenever_it_has_doubled():
    stream = io.StringIO()
    display = Display(Console(file=stream, force_terminal=False, width=80))
    display.add([planned("a")], {"a": "a"}, {"a": "queued"}, 1, "trial")
    display(Event("started", "a"))
    for minute in range(61):
        display(Event("alive", "a", seconds=60.0 * minute, silent=60.0 * minute))
    lines = stream.getvalue().splitlines()[1:]
    assert lines == [f"main · fair · seed 0: silent for {minutes} min" for minutes in (10, 20, 40)]


def test_on_a_terminal_the_time_goes_on_while_a_run_is_silent():
    stream = io.StringIO()
    display = Display(Console(file=stream, force_terminal=True, width=120, height=30))
    with display:
        display.add([planned("a")], {"a": "a"}, {"a": "queued"}, 1, "trial")
        display(Event("started", "a"))
        display._drawn = 0.0
        display(Event("alive", "a", seconds=400.0, silent=390.0))
    assert "silent for 6 min" in stream.getvalue()
    assert "7 min" in stream.getvalue()


def test_on_a_terminal_the_table_shows_a_row_a_run():
    stream = io.StringIO()
    display = Display(Console(file=stream, force_terminal=True, width=120, height=30))
    with display:
        display.add([planned("a"), planned("b")], {"a": "a", "b": "b"}, {"a": "queued", "b": "queued"}, 1, "trial")
        display(Event("started", "a"))
        display(Event("progress", "a", 5.0, 10.0, {"loss": 3.25}, 1.0))
        display(Event("failed", "b", message="RuntimeError: no"))
    text = stream.getvalue()
    assert "loss 3.25" in text
    assert "RuntimeError: no" in text
    assert "1 of 2 runs finished" in text


@pytest.mark.parametrize(("seconds", "text"), [(None, ""), (41.2, "41 s"), (360, "6 min"), (9000, "2.5 h")])
def test_durations_read_like_a_person_says_them(seconds, text):
    assert duration(seconds) == text
