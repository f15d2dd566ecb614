from __future__ import annotations

import logging
import subprocess
import sys

import pytest
import torch

from trialist.kernels import compile as compiling
from trialist.kernels import selective, selective_cpu
from trialist.kernels.selective import selective_attention

needs_compiler = pytest.mark.skipif(not selective_cpu.available(), reason="no C compiler")
SOURCE = "int seven(void) { return 7; }\n"


@pytest.fixture
def room(tmp_path, monkeypatch):
    """A folder that stands for kernels/, with one small source, and an empty cache."""
    (tmp_path / "small.c").write_text(SOURCE)
    monkeypatch.setattr(compiling, "__file__", str(tmp_path / "compile.py"))
    monkeypatch.setenv("TRIALIST_CACHE", str(tmp_path / "cache"))
    compiling.load_library.cache_clear()
    yield tmp_path
    compiling.load_library.cache_clear()


def built(room):
    return sorted(path.name for path in (room / "cache" / "kernels").glob("*.so"))


@needs_compiler
def test_a_source_is_compiled_once_and_again_when_it_changes(room, monkeypatch):
    assert compiling.load_library("small.c").seven() == 7
    first = built(room)
    compiling.load_library.cache_clear()
    with monkeypatch.context() as patch:
        patch.setattr(compiling.os, "replace", lambda *_: pytest.fail("compiled a second time"))
        assert compiling.load_library("small.c").seven() == 7
    (room / "small.c").write_text(SOURCE.replace("7", "8"))
    compiling.load_library.cache_clear()
    assert compiling.load_library("small.c").seven() == 8
    assert len(first) == 1
    assert len(built(room)) == 2


@needs_compiler
def test_processes_that_compile_at_once_leave_one_library(room):
    program = (
        "import sys, trialist.kernels.compile as c; c.__file__ = sys.argv[1]; print(c.load_library('small.c').seven())"
    )
    command = [sys.executable, "-c", program, str(room / "compile.py")]
    running = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(3)]
    assert [process.communicate(timeout=60)[0] for process in running] == ["7\n"] * 3
    assert len(built(room)) == 1
    assert not [path for path in (room / "cache" / "kernels").iterdir() if path.is_dir()]


@needs_compiler
def test_a_source_that_does_not_compile_is_reported_with_the_compilers_words(room, caplog):
    (room / "small.c").write_text("int seven(void) { return seven_is_unknown; }\n")
    assert compiling.load_library("small.c") is None
    assert "seven" in caplog.text
    assert built(room) == []


@needs_compiler
def test_a_cache_that_cannot_be_written_is_reported(room, monkeypatch, caplog):
    (room / "cache").write_text("a file stands where the folder should")
    assert compiling.load_library("small.c") is None
    assert "PyTorch" in caplog.text


def test_without_a_compiler_pytorch_answers_and_says_so_once(monkeypatch, caplog):
    monkeypatch.setenv("PATH", "")
    monkeypatch.delenv("CC", raising=False)
    compiling.load_library.cache_clear()
    try:
        q, k, v = (torch.randn(1, 2, 20, 4) for _ in range(3))
        with caplog.at_level(logging.INFO):
            selective._say.cache_clear()
            first, _ = selective_attention(q, k, v, scaling=0.5)
            selective_attention(q, k, v, scaling=0.5)
        assert torch.equal(first, selective_attention(q, k, v, scaling=0.5, backend="torch")[0])
        (warning,) = [record for record in caplog.records if record.levelno == logging.WARNING]
        assert "no C compiler found" in warning.getMessage()
        assert caplog.text.count("runs through backend 'torch'") == 1
        with pytest.raises(ValueError, match="could not be compiled"):
            selective_attention(q, k, v, scaling=0.5, backend="c")
    finally:
        compiling.load_library.cache_clear()


@needs_compiler
def test_the_automatic_choice_takes_c_and_says_so_once(caplog):
    q, k, v = (torch.randn(1, 2, 20, 4) for _ in range(3))
    selective._say.cache_clear()
    with caplog.at_level(logging.INFO):
        for _ in range(2):
            chosen, _ = selective_attention(q, k, v, scaling=0.5)
    assert torch.equal(chosen, selective_attention(q, k, v, scaling=0.5, backend="c")[0])
    assert caplog.text.count("runs through backend 'c'") == 1
