"""`trialist generate` and `trialist serve` from their command lines, on a tiny model in a folder."""

from __future__ import annotations

import functools
import io
import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.cli.test_cli import call
from tests.decoding.conftest import CHAT_TEMPLATE
from tests.evaluation.benchmark_asset import save_model
from tests.test_house import modules_after
from trialist.decoding import flags

SCRIPTED = "tests.decoding.fake_technique:ScriptedFlags"
PROMPTS = ["a longer prompt than the others, which is read first", "b", "some words", "x", "four words in it"]


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> Path:
    """A folder with a model that chats, and one that goes on with text."""
    folder = tmp_path_factory.mktemp("models")
    save_model(folder / "plain", context=256)
    save_model(folder / "chat", context=256)
    (folder / "chat" / "chat_template.jinja").write_text(CHAT_TEMPLATE)
    for name in ("plain", "chat"):  # its own end would come at random
        config = folder / name / "generation_config.json"
        config.write_text(json.dumps(json.loads(config.read_text()) | {"max_new_tokens": 12}))
    return folder


@pytest.fixture
def here(models, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(flags.FLAGS, "scripted", SCRIPTED)
    monkeypatch.setattr(sys, "stdin", io.StringIO(""))
    return models


def answers(capsys: Any, folder: Path, *arguments: str, model: str = "plain") -> tuple[str, str]:
    code, out, err = call(capsys, "generate", "--model", str(folder / model), *arguments)
    assert code == 0, err
    return out, err


@functools.cache
def loaded_model(folder: str) -> Any:
    from trialist.models import load_model

    return load_model(folder)


def plainly(folder: Path, text: str, model: str = "plain", **arguments: Any) -> list[int]:
    """What `generate` of the model itself says."""
    loaded = loaded_model(str(folder / model))
    ids = torch.tensor([list(text.encode())])
    return loaded.generate(ids, max_new_tokens=12, **arguments)[0, ids.shape[1] :].tolist()


def as_text(tokens: list[int]) -> str:
    return bytes(token for token in tokens if token < 256).decode("utf-8", "replace")


def test_one_prompt_is_streamed_as_plain_generate_says_it_with_statistics_apart(here, capsys):
    out, err = answers(capsys, here, "--prompt", "once upon")
    tokens = plainly(here, "once upon")
    assert out == as_text(tokens) + "\n"
    assert f"9 prompt tokens, {len(tokens)} new in" in err
    assert "tokens/s); greedy search; ended by" in err
    assert "cache 0.0 MB" in err
    sampled, err = answers(capsys, here, "--prompt", "once upon", "--temperature", "0.8", "--top-k", "0", "--seed", "4")
    torch.manual_seed(4)
    assert sampled == as_text(plainly(here, "once upon", do_sample=True, temperature=0.8, top_k=0)) + "\n"
    assert "sampling at temperature 0.8; seed 4" in err


def test_a_model_with_a_chat_template_is_asked_through_it_unless_raw(here, capsys):
    asked = answers(capsys, here, "--prompt", "hi", "--system", "be brief", model="chat")[0]
    assert asked == as_text(plainly(here, "system: be brief\nuser: hi\nassistant:")) + "\n"
    raw = answers(capsys, here, "--prompt", "hi", "--raw", model="chat")[0]
    assert raw == as_text(plainly(here, "hi")) + "\n" != asked


def test_the_prompt_may_come_on_standard_input(here, capsys, monkeypatch):
    expected = answers(capsys, here, "--prompt", "once upon")[0]
    for arguments in ((), ("--prompt", "-")):
        monkeypatch.setattr(sys, "stdin", io.StringIO("once upon\n"))
        assert answers(capsys, here, *arguments)[0] == expected


def test_several_prompts_are_numbered_and_json_holds_all_that_was_measured(here, capsys):
    out, err = answers(capsys, here, "--prompt", "once upon", "--prompt", "b", "--say", "yes", "--max-new-tokens", "9")
    assert out == "[1] yes\n[2] yes\n"
    assert "10 prompt tokens, 8 new" in err
    assert "2 ended by stop" in err
    assert "script length 4" in err
    out, err = answers(capsys, here, "--prompt", "once upon", "--prompt", "b", "--say", "yes", "--num-sequences", "2",
                       "--temperature", "1", "--json")  # fmt: skip
    found = json.loads(out)
    assert [(row["row"], row["sample"], row["text"]) for row in found["results"]] == [
        (0, 0, "yes"), (0, 1, "yes"), (1, 0, "yes"), (1, 1, "yes"),
    ]  # fmt: skip
    assert found["options"] == {"say": "yes"}
    assert (
        found["results"][0] | {"prompt": "once upon", "finish_reason": "stop", "tokens": 4, "script_length": 4}
        == (found["results"][0])
    )
    assert isinstance(found["seed"], int)
    assert found["statistics"]["tokens"] == 16
    assert found["statistics"]["average_place"] == 1.5
    assert err == ""


def test_stop_strings_and_limits_end_a_text(here, capsys):
    said = ("--prompt", "x", "--say", "one two three")
    assert answers(capsys, here, *said, "--stop", "zero", "--stop", "o t")[0] == "one tw\n"
    assert answers(capsys, here, *said, "--max-new-tokens", "5")[0] == "one t\n"


def write_prompts(folder: Path) -> Path:
    rows = [{"prompt": text, "id": at} for at, text in enumerate(PROMPTS)]
    path = folder / "prompts.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_a_file_of_prompts_becomes_a_file_of_continuations_in_its_order(here, capsys, tmp_path):
    path = write_prompts(tmp_path)
    out, err = answers(capsys, here, "--file", str(path), "--output", "out.jsonl", "--batch", "2")
    assert out == ""
    rows = [json.loads(line) for line in Path("out.jsonl").read_text().split("\n")[:-1]]
    assert [row["row"] for row in rows] == list(range(5))
    assert [row["prompt"] for row in rows] == PROMPTS
    assert [row["text"] for row in rows] == [as_text(plainly(here, text)) for text in PROMPTS]
    assert f"5 prompts; {sum(map(len, PROMPTS))} prompt tokens" in err
    _, err = answers(capsys, here, "--file", str(path), "--output", "out.jsonl", "--batch", "2")
    assert "5 of 5 prompts were in out.jsonl already" in err
    piped = [json.loads(line) for line in answers(capsys, here, "--file", str(path))[0].splitlines()]
    assert {row["row"]: row["text"] for row in piped} == {row["row"]: row["text"] for row in rows}
    assert piped[0]["row"] == 0  # the longest first


def test_text_and_conversations_are_prompts_too(here, capsys, tmp_path):
    (tmp_path / "p.txt").write_text("one\u2028line\n\n  \ntwo\r\n")
    rows = [json.loads(line) for line in answers(capsys, here, "--file", "p.txt")[0].split("\n")[:-1]]
    assert sorted(row["prompt"] for row in rows) == ["one\u2028line", "two"]
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}, {"role": "user", "content": "c"}]
    lines = [{"messages": turns}, {"prompt": turns[:1]}, {"prompt": "a"}]
    (tmp_path / "c.jsonl").write_text("\n".join(map(json.dumps, lines)))
    found = json.loads("[" + answers(capsys, here, "--file", "c.jsonl", model="chat")[0].replace("}\n{", "},\n{") + "]")
    texts = {row["row"]: row["text"] for row in found}
    assert texts[0] == as_text(plainly(here, "user: a\nassistant: b\nuser: c\nassistant:"))
    assert texts[1] == texts[2]


DRAWN = ("--temperature", "1", "--seed", "3", "--num-sequences", "2")


@pytest.mark.parametrize(
    ("left", "sampling"),
    [("whole lines", ()), ("half a line", DRAWN), ("only half a line", ())],
    ids=["whole lines", "half a line of samples", "only half a line"],
)
def test_a_file_goes_on_after_a_kill_and_then_is_as_if_there_had_been_none(here, capsys, tmp_path, left, sampling):
    arguments = ("--file", str(write_prompts(tmp_path)), "--batch", "2", *sampling)
    answers(capsys, here, *arguments, "--output", "whole.jsonl")
    lines = Path("whole.jsonl").read_text().splitlines(keepends=True)
    per_prompt = 2 if sampling else 1
    longest = [line for line in lines if json.loads(line)["row"] in (0, 4)]  # the first batch
    assert len(longest) == 2 * per_prompt
    kept = {
        "whole lines": "".join(longest),
        "half a line": "".join(longest) + lines[1][:50],
        "only half a line": lines[0][:30],
    }
    Path("cut.jsonl").write_text(kept[left])
    _, err = answers(capsys, here, *arguments, "--output", "cut.jsonl")
    assert Path("cut.jsonl").read_text() == "".join(lines)
    assert ("2 of 5 prompts were in cut.jsonl already" in err) == (left != "only half a line")
    assert not list(tmp_path.glob("*.unfinished"))


@pytest.mark.slow
def test_a_killed_process_leaves_a_file_that_goes_on(here, tmp_path):
    path = tmp_path / "many.txt"
    path.write_text("\n".join(f"prompt number {number} " * (number % 7 + 1) for number in range(120)))
    command = [sys.executable, "-m", "trialist", "generate", "--model", str(here / "plain"), "--file", str(path),
               "--batch", "1", "--output", "out.jsonl", "--max-new-tokens", "60"]  # fmt: skip
    process = subprocess.Popen(command, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while not (Path("out.jsonl").exists() and Path("out.jsonl").read_text().count("\n") > 5):
        assert process.poll() is None, "it ended before it could be killed"
        assert time.monotonic() < deadline
        time.sleep(0.02)
    process.kill()
    process.wait()
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert "of 120 prompts were in out.jsonl already" in result.stderr
    assert [json.loads(line)["row"] for line in Path("out.jsonl").read_text().splitlines()] == list(range(120))


def test_an_interrupted_text_ends_cleanly(here, capsys, monkeypatch):
    import trialist.decoding.running as running

    real = running.Continuation.push

    def push(self: Any, token: int, *rest: Any) -> None:
        if len(self.tokens) == 5:
            raise KeyboardInterrupt
        real(self, token, *rest)

    monkeypatch.setattr(running.Continuation, "push", push)
    code, out, err = call(capsys, "generate", "--model", str(here / "plain"), "--prompt", "x", "--say", "hello world")
    assert (code, out, err.splitlines()[-1]) == (130, "hello\n", "interrupted")
    path = write_prompts(Path.cwd())
    code, _, err = call(capsys, "generate", "--model", str(here / "plain"), "--file", str(path), "--output", "o.jsonl")
    assert code == 130
    assert "the same command goes on" in err


def test_a_terminal_without_a_prompt_is_a_chat_that_remembers(here, capsys, monkeypatch):
    said = iter(["hi", "", "and you?"])

    def read(mark: str) -> str:
        for text in said:
            return text
        raise EOFError

    monkeypatch.setattr("builtins.input", read)
    monkeypatch.setattr(sys, "stdin", type("Terminal", (io.StringIO,), {"isatty": lambda self: True})())
    code, out, _ = call(capsys, "generate", "--model", str(here / "chat"))
    assert code == 0
    first = as_text(plainly(here, "user: hi\nassistant:"))
    second = as_text(plainly(here, f"user: hi\nassistant: {first}\nuser: and you?\nassistant:"))
    assert out == f"{first}\n{second}\n\n"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--prompt", "x"), "which model? trialist generate --model MODEL"),
        (("--model", "./nowhere", "--prompt", "x"), "does not exist"),
        (("--model", "{m}/plain"), "the prompt is empty on standard input"),
        (("--model", "{m}/plain", "--prompt", "a", "--prompt", " "), "the prompt is empty (the 2. --prompt)"),
        (("--model", "{m}/plain", "--prompt", "x", "--dtype", "int3"), "--dtype 'int3': one of float32"),
        (("--model", "{m}/plain", "--prompt", "x", "--device", "warp"), "--device 'warp' cannot be used here"),
        (("--model", "{m}/plain", "--prompt", "x", "--device", "meta"), "--device 'meta' cannot be used here"),
        (("--model", "{m}/plain", "--prompt", "x" * 300), "the prompt has 300 tokens and the model's context is 256"),
        (("--model", "{m}/plain", "--prompt", "x", "--max-new-tokens", "256"), "with 256 new ones that is more than"),
        (("--model", "{m}/plain", "--prompt", "x", "--max-new-tokens", "0"), "--max-new-tokens must be at least 1"),
        (("--model", "{m}/plain", "--prompt", "x", "--num-sequences", "2"), "would all be the same"),
        (("--model", "{m}/plain", "--prompt", "x", "--system", "s"), "--system is an instruction of the chat template"),
        (("--model", "{m}/plain", "--prompt", "x", "--file", "y"), "give one of them"),
        (("--model", "{m}/plain", "--prompt", "x", "--output", "y"), "--output is for the continuations of --file"),
        (("--model", "{m}/plain", "--file", "none.jsonl"), "no such file: none.jsonl"),
        (("--model", "{m}/plain", "--file", "bad.jsonl"), "bad.jsonl line 2: a column `prompt` or `messages`"),
        (("--model", "{m}/plain", "--file", "empty.txt"), "empty.txt holds no prompts"),
        (("--model", "{m}/plain", "--file", "long.txt"), "prompt 2: the prompt has 400 tokens"),
        (("--model", "{m}/plain", "--file", "talk.jsonl"), "talk.jsonl line 1: the prompt is a conversation"),
        (("--model", "{m}/plain", "--file", "good.txt", "--output", "other.txt"), "holds something else than results"),
        (("--model", "{m}/plain", "--file", "good.txt", "--output", "no/o.jsonl"), "its folder does not exist"),
        (("--model", "{m}/plain", "--prompt", "x", "--step-seconds=-1"), "--step-seconds must be at least 0"),
        (("--model", "{m}/plain", "--prompt", "x", "--batch", "0"), "--batch must be at least 1"),
    ],
)
def test_wrong_use_exits_with_2_and_says_what_to_do(here, capsys, tmp_path, arguments, words):
    (tmp_path / "bad.jsonl").write_text('{"prompt": "a"}\n{"text": "b"}\n')
    (tmp_path / "empty.txt").write_text("\n \n")
    (tmp_path / "good.txt").write_text("a\nb\n")
    (tmp_path / "long.txt").write_text("a\n" + "x" * 400 + "\n")
    (tmp_path / "other.txt").write_text("my notes\n")
    (tmp_path / "talk.jsonl").write_text(json.dumps({"messages": [{"role": "user", "content": "a"}]}))
    code, _, err = call(capsys, "generate", *(argument.format(m=here) for argument in arguments))
    assert code == 2
    assert words in " ".join(err.split())
    assert (tmp_path / "other.txt").read_text() == "my notes\n"


def test_results_of_other_settings_prompts_or_models_are_not_mixed(here, capsys, tmp_path):
    (tmp_path / "p.txt").write_text("a\nb\n")
    arguments = ("generate", "--model", str(here / "plain"), "--file", "p.txt", "--output", "o.jsonl")
    assert call(capsys, *arguments)[0] == 0
    before = Path("o.jsonl").read_text()
    code, _, err = call(capsys, *arguments, "--max-new-tokens", "5")
    assert code == 2
    assert "results of another model or other settings" in " ".join(err.split())
    (tmp_path / "p.txt").write_text("a\nc\n")
    code, _, err = call(capsys, *arguments)
    assert code == 2
    assert "results of other prompts (line 2)" in " ".join(err.split())
    assert Path("o.jsonl").read_text() == before


def test_flags_of_all_techniques_stand_in_groups_of_their_names(here, capsys):
    for verb in ("generate", "serve"):
        code, out, _ = call(capsys, verb, "--help")
        assert code == 0
        for technique in flags.FLAGS:
            assert f"{technique} options" in out
        assert "--say STR" in out
        assert "--temperature FLOAT" in out


@pytest.mark.parametrize("verb", ["generate", "serve"])
def test_help_loads_no_heavy_library(verb):
    code = f"from trialist.cli.main import main\ntry: main(['{verb}', '--help'])\nexcept SystemExit: pass"
    assert not {"torch", "transformers", "sqlalchemy", "datasets", "fastapi", "uvicorn"} & modules_after(code)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ((), "which model? trialist serve --model MODEL"),
        (("--model", "{m}/plain", "--port", "70000"), "--port must be 0 to 65535"),
        (("--model", "{m}/plain", "--port", "{used}"), "is in use; give another --port"),
        (("--model", "{m}/plain", "--host", "no such host", "--port", "0"), "is no address of this machine"),
        (("--model", "{m}/plain", "--queue", "0"), "--queue must be at least 1"),
        (("--model", "{m}/plain", "--port", "0", "--api-key", " "), "--api-key (or TRIALIST_API_KEY) must be"),
        (("--model", "{m}/plain", "--port", "0", "--system", "x"), "--system is an instruction of the chat template"),
        (("--model", "{m}/plain", "--port", "0", "--failing"), "the script is lost"),
    ],
)
def test_a_server_that_cannot_start_says_why(here, capsys, arguments, words):
    pytest.importorskip("uvicorn", reason="the extra `serve` is not installed")
    with socket.socket() as used:
        used.bind(("127.0.0.1", 0))
        used.listen()
        given = (argument.format(m=here, used=used.getsockname()[1]) for argument in arguments)
        if words == "the script is lost":
            with pytest.raises(RuntimeError, match=words):
                call(capsys, "serve", *given)
            return
        code, _, err = call(capsys, "serve", *given)
    assert code == 2
    assert words in " ".join(err.split())


@pytest.mark.slow
@pytest.mark.parametrize("signal_number", [signal.SIGINT, signal.SIGTERM])
def test_a_server_answers_and_ends_when_it_is_told_to(here, signal_number):
    pytest.importorskip("uvicorn", reason="the extra `serve` is not installed")
    command = [sys.executable, "-m", "trialist", "serve", "--model", str(here / "chat"), "--port", "0"]
    process = subprocess.Popen(
        command, stderr=subprocess.PIPE, text=True, env={**os.environ, "TRIALIST_API_KEY": "k"}, cwd=Path.cwd()
    )
    try:
        assert process.stderr is not None
        url = ""
        for line in process.stderr:
            if " on http://" in line:
                url = line.split(" on ")[1].split(" ")[0]
                break
        body = json.dumps({"model": "chat", "messages": [{"role": "user", "content": "hi"}]}).encode()
        headers = {"Content-Type": "application/json", "Authorization": "Bearer k"}
        request = urllib.request.Request(f"{url}/chat/completions", body, headers)
        answer = json.loads(
            urllib.request.build_opener(urllib.request.ProxyHandler({})).open(request, timeout=60).read()
        )
        assert answer["choices"][0]["message"]["content"] == as_text(plainly(here, "user: hi\nassistant:"))
        process.send_signal(signal_number)
        assert process.wait(30) in (0, -signal_number)
        assert "Traceback" not in process.stderr.read()
    finally:
        process.kill()
