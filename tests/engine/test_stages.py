from __future__ import annotations

import multiprocessing
import time
from pathlib import Path

import pytest

from trialist.engine.context import Context
from trialist.engine.stages import clean_stages, list_stages, stage


def build_slowly(folder: Path) -> None:
    time.sleep(0.2)
    (folder / "made.txt").write_text(str(time.time_ns()))


def ask(root: Path, inputs: tuple = (1,), build=build_slowly, source: str = "s") -> Path:
    return stage(root, "base", inputs, build, source=source, versions={})


def test_a_stage_is_built_once_and_shared_by_those_who_ask_at_the_same_time(tmp_path):
    processes = [multiprocessing.get_context("fork").Process(target=ask, args=(tmp_path,)) for _ in range(3)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    folder = ask(tmp_path)
    first = (folder / "made.txt").read_text()
    assert (ask(tmp_path) / "made.txt").read_text() == first
    assert len(list_stages(tmp_path)) == 1


def test_other_inputs_or_another_source_make_another_stage(tmp_path):
    folders = {ask(tmp_path), ask(tmp_path, (2,)), ask(tmp_path, source="t")}
    assert len(folders) == 3


def test_a_build_that_fails_leaves_nothing_that_looks_finished(tmp_path):
    def fail(folder: Path) -> None:
        (folder / "half.txt").write_text("half")
        raise RuntimeError("no more")

    with pytest.raises(RuntimeError, match="no more"):
        ask(tmp_path, build=fail)
    assert list_stages(tmp_path) == []
    assert not list(tmp_path.glob("base-*"))


def test_its_cost_is_recorded_and_cleaning_frees_its_bytes(tmp_path):
    ask(tmp_path)
    entry = list_stages(tmp_path)[0]
    assert entry["wall_seconds"] >= 0.2
    assert entry["bytes"] > 0
    assert clean_stages(tmp_path) == entry["bytes"]
    assert list_stages(tmp_path) == []


def test_every_run_bears_the_cost_of_the_stages_it_used_whoever_built_them_and_once(tmp_path, monkeypatch):
    now = [0.0]
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])
    monkeypatch.setattr(time, "process_time", lambda: now[0] / 2)

    def passes(seconds: float) -> None:
        now[0] += seconds

    def data(folder: Path) -> None:
        passes(30.0)

    def run(own: float) -> tuple[float, tuple[float, float]]:
        context = Context(0, tmp_path, tmp_path / "stages")
        began = now[0]
        for _ in range(2):
            context.stage("model", (), lambda _: (context.stage("data", (), data), passes(20.0)))
        passes(own)
        return now[0] - began, context.elsewhere

    assert run(10.0) == (60.0, (0.0, 0.0))
    assert run(15.0) == (15.0, (50.0, 25.0))
    assert {entry["name"]: entry["wall_seconds"] for entry in list_stages(tmp_path / "stages")} == {
        "model": 50.0,
        "data": 30.0,
    }
    another = Context(
        0, tmp_path, tmp_path / "stages"
    )  # the data are there already: a model of them must still bear them
    another.stage("other", (), lambda _: (another.stage("data", (), data), passes(5.0)))
    assert another.elsewhere == (30.0, 15.0)


def test_streams_depend_on_seed_and_name_only(tmp_path):
    def context(seed: int) -> Context:
        return Context(seed, tmp_path, tmp_path)

    assert context(1).stream("init") == context(1).stream("init")
    assert len({context(seed).stream(name) for seed in (1, 2) for name in ("init", "data_order")}) == 4
    assert 0 <= context(1).stream("init") < 2**63


def test_cleaning_removes_what_a_killed_build_left_and_nothing_that_is_not_ours(tmp_path):
    folder = ask(tmp_path)
    left = tmp_path / f".{folder.name}.building"
    for other in (left, tmp_path / "theirs", tmp_path / ".git"):
        other.mkdir()
        (other / "file").write_text("content")
    clean_stages(tmp_path)
    assert {path.name for path in tmp_path.iterdir() if path.is_dir()} == {"theirs", ".git"}


def test_a_stage_whose_record_is_damaged_is_built_again(tmp_path):
    folder = ask(tmp_path)
    (folder / "stage.json").write_text("{")
    assert list_stages(tmp_path) == []
    assert ask(tmp_path) == folder
    assert len(list_stages(tmp_path)) == 1


def test_a_build_that_fails_gives_its_space_back(tmp_path):
    def fill(folder: Path) -> None:
        (folder / "large.bin").write_bytes(bytes(1000))
        raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="No space left"):
        ask(tmp_path, build=fill)
    assert not [path for path in tmp_path.rglob("*") if path.suffix != ".lock"]


def test_who_waits_for_a_stage_gives_signs_of_life(tmp_path, monkeypatch):
    monkeypatch.setattr("trialist.engine.stages.SECONDS_BETWEEN_SIGNS", 0.05)
    builder = multiprocessing.get_context("fork").Process(target=ask, args=(tmp_path,))
    builder.start()
    while not list(tmp_path.glob(".*.building")):
        time.sleep(0.005)
    signs: list[float] = []
    stage(tmp_path, "base", (1,), build_slowly, source="s", versions={}, waiting=lambda: signs.append(time.monotonic()))
    builder.join()
    assert len(signs) >= 2
