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


def test_streams_depend_on_seed_and_name_only(tmp_path):
    def context(seed: int) -> Context:
        return Context(seed, tmp_path, tmp_path)

    assert context(1).stream("init") == context(1).stream("init")
    assert len({context(seed).stream(name) for seed in (1, 2) for name in ("init", "data_order")}) == 4
    assert 0 <= context(1).stream("init") < 2**63
