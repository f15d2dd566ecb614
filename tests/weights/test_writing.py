"""The output is there whole or not at all, whatever happens, and a pass over a model takes little memory."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from tests.weights.conftest import configure, tensors
from trialist.weights import apply_param_delta
from trialist.weights.streaming import Files
from trialist.weights.writing import TensorFile, folder_written_whole


def test_a_tensor_file_is_what_the_safetensors_library_reads_whatever_the_pieces(tmp_path):
    content = {"a": torch.randn(3, 5), "b": torch.arange(7), "scalar": torch.tensor(2.5), "none": torch.empty(0, 4)}
    content |= {"flags": torch.tensor([True, False, True]), "half": torch.randn(5).bfloat16()}
    file = TensorFile(tmp_path / "x.safetensors", [(name, t.dtype, tuple(t.shape)) for name, t in content.items()])
    for tensor in content.values():
        for piece in tensor.flatten().split(4):
            file.write(piece)
    file.close()
    with safe_open(tmp_path / "x.safetensors", framework="pt") as opened:
        assert opened.metadata() == {"format": "pt"}
        for name, tensor in content.items():
            assert torch.equal(opened.get_tensor(name), tensor)


def test_a_tensor_file_that_lacks_bytes_does_not_close(tmp_path):
    file = TensorFile(tmp_path / "x.safetensors", [("a", torch.float32, (3,))])
    file.write(torch.ones(2))
    with pytest.raises(RuntimeError, match="4 bytes of its tensors were not written"):
        file.close()


def apply(members, out, **options):
    return apply_param_delta(members["new"], [(members["post"], members["base"], 1.0)], out, **options)


def test_a_folder_that_holds_something_and_a_file_are_left_alone(family, tmp_path):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "note").write_text("mine")
    (tmp_path / "file").write_text("mine")
    with pytest.raises(ValueError, match=r"full is not empty; give a new folder"):
        apply(family, tmp_path / "full")
    with pytest.raises(ValueError, match=r"file is a file; give a new folder"):
        apply(family, tmp_path / "file")
    assert sorted(os.listdir(tmp_path)) == ["file", "full"]
    (tmp_path / "empty").mkdir()
    apply(family, tmp_path / "empty")
    assert (tmp_path / "empty" / "config.json").is_file()


def test_an_error_in_the_middle_leaves_nothing(family, tmp_path, monkeypatch):
    write, count = Files.write, []

    def fail(self, part, piece):
        count.append(part)
        if len(count) == 7:
            raise OSError(28, "No space left on device")
        write(self, part, piece)

    monkeypatch.setattr(Files, "write", fail)
    with pytest.raises(OSError, match="No space left"):
        apply(family, tmp_path / "out")
    assert os.listdir(tmp_path) == []


def test_a_disk_that_is_too_small_is_told_before_anything_is_written(family, tmp_path, monkeypatch):
    monkeypatch.setattr("shutil.disk_usage", lambda place: type("Usage", (), {"free": 1000}))
    with pytest.raises(
        OSError, match=r"has 0.0 GB free and the model takes .* GB; free space or choose another --output"
    ):
        apply(family, tmp_path / "out")
    assert os.listdir(tmp_path) == []


def test_ctrl_c_leaves_nothing(family, tmp_path):
    def interrupt(done, total):
        if done > total / 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        apply(family, tmp_path / "out", progress=interrupt)
    assert os.listdir(tmp_path) == []


STOPS = """
import sys, time
from trialist.weights import apply_param_delta
calls = []
def wait(done, total):
    calls.append(done)
    if len(calls) == 5:
        print("waits", flush=True)
        time.sleep(600)
apply_param_delta(sys.argv[1], [(sys.argv[2], sys.argv[3], 1.0)], sys.argv[4], progress=wait)
"""


def test_a_killed_process_leaves_no_output_and_the_next_one_clears_up(family, tmp_path):
    ends = {"terminated": signal.SIGTERM, "killed": signal.SIGKILL}
    command = [sys.executable, "-c", STOPS, family["new"], family["post"], family["base"]]
    running = {
        name: subprocess.Popen([*command, str(tmp_path / name)], stdout=subprocess.PIPE, text=True) for name in ends
    }
    for name, process in running.items():
        assert process.stdout is not None
        assert process.stdout.readline() == "waits\n"
        assert len(list(tmp_path.glob(f".{name}.*.partial/*.safetensors"))) == 1
        with pytest.raises(BlockingIOError), folder_written_whole(tmp_path / name, 0) as other:
            raise BlockingIOError(other)  # another attempt does not take away what is being written
        assert len(list(tmp_path.glob(f".{name}.*.partial/*.safetensors"))) == 1
        process.send_signal(ends[name])
        assert process.wait(timeout=60) != 0
    assert not list(tmp_path.glob(".terminated.*"))
    assert not any((tmp_path / name).exists() for name in ends)
    apply(family, tmp_path / "killed")
    assert os.listdir(tmp_path) == ["killed"]
    assert tensors(tmp_path / "killed").keys() == tensors(family["new"]).keys()


MEASURED = """
import sys
from pathlib import Path
from trialist.weights import apply_param_delta
from trialist.weights import streaming
def resident(field):
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field)) / 1024
streaming.BLOCK = 1 << 16
base, post, new, small, out = sys.argv[1:]
apply_param_delta(small, [(small, small, 1.0)], out + "-small")  # what every first pass loads
before = resident("VmRSS")
apply_param_delta(new, [(post, base, 1.0)], out)
print(resident("VmHWM") - before)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="peak memory is read from /proc")
def test_peak_memory_is_a_few_stretches_however_large_the_tensors(tmp_path):
    """Three models of 48 MB, most of it in one tensor, go through in stretches of 256 KB."""
    generator = torch.Generator().manual_seed(0)
    weights = {
        "large": torch.randn(3000, 3500, generator=generator),
        "small": torch.randn(1000, 2000, generator=generator),
    }
    for name, shift in (("base", 0.0), ("post", 1e-3), ("new", 1e-2)):
        (tmp_path / name).mkdir()
        moved = {key: value + shift for key, value in weights.items()}
        save_file(moved, tmp_path / name / "model.safetensors")
        configure(tmp_path / name, model_type="probe")
    (tmp_path / "tiny").mkdir()
    save_file({"w": torch.randn(300, 300, generator=generator)}, tmp_path / "tiny" / "model.safetensors")
    configure(tmp_path / "tiny", model_type="probe")
    places = [str(tmp_path / name) for name in ("base", "post", "new", "tiny", "out")]
    done = subprocess.run([sys.executable, "-c", MEASURED, *places], capture_output=True, text=True, check=True)
    assert float(done.stdout) < 42 / 2  # MB; one of the tensors alone has 42, what the allocator keeps about 10


def test_the_record_says_what_was_done(family, tmp_path):
    began = time.time()
    report = apply(family, tmp_path / "out")
    record = json.loads((tmp_path / "out" / "param_delta.json").read_text())
    assert record["deltas"] == [{"post": family["post"], "base": family["base"], "alpha": 1.0}]
    assert record["base_new"] == family["new"]
    assert record["forced"] is False
    assert {line["name"] for line in record["tensors"]} == tensors(tmp_path / "out").keys()
    assert record["totals"][0]["delta_norm"] == pytest.approx(report.totals[0].delta ** 0.5)
    assert set(record["versions"]) == {"trialist", "torch", "transformers", "safetensors"}
    assert record["date"][:4] == time.strftime("%Y", time.gmtime(began))
