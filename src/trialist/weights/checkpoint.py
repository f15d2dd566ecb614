"""A saved model of which any stretch of any tensor can be read without reading the rest.

Bytes come through plain reads into a buffer of the caller's size. A memory map would be as lazy, but its pages stay
counted as resident for as long as the file is open, so a pass over a model would end up with the model in memory.
"""

from __future__ import annotations

import functools
import json
import os
import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from trialist.models.loading import model_source

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64,
    "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip
CODES = {dtype: code for code, dtype in DTYPES.items()}
QUANTISED_NAMES = (
    ".qweight",
    ".qzeros",
    ".absmax",
    ".quant_map",
    ".weight_scale",
    ".weight_scale_inv",
    ".weight_packed",
)
TEXT_FILES = ("*.json", "*.jinja", "*.txt", "*.model", "*.py", "additional_chat_templates/*")
"""What is fetched of a Hub repository beside the weights that its index names"""


@dataclass(frozen=True)
class Stored:
    """Where a tensor lies: `start` is the place of its first byte in `file`."""

    file: Path
    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int

    @property
    def elements(self) -> int:
        return int(np.prod(self.shape, dtype=np.int64))

    @property
    def bytes(self) -> int:
        return self.elements * self.dtype.itemsize


class Checkpoint:
    """The safetensors files of one saved model, and what stands beside them.

    name: as the user gave it. tensors: name -> `Stored`, in the order of the files. config: the content of config.json.
    """

    def __init__(self, name: str, folder: Path, files: Sequence[Path], tensors: dict[str, Stored]) -> None:
        self.name, self.folder, self.files, self.tensors = name, folder, tuple(files), tensors
        self.config: dict[str, Any] = read_json(folder / "config.json", name)

    def read(self, tensor: str, start: int = 0, stop: int | None = None) -> Tensor:
        """Elements `start` to `stop` of the flattened tensor, (stop - start,), in a buffer of their own."""
        stored = self.tensors[tensor]
        stop = stored.elements if stop is None else stop
        block = torch.empty(stop - start, dtype=stored.dtype)
        self._fill(stored, start, block)
        return block

    def rows(self, tensor: str, ids: Tensor) -> Tensor:
        """Rows `ids` of a tensor, (len(ids), ...); neighbours are read together."""
        stored = self.tensors[tensor]
        width = stored.elements // max(stored.shape[0], 1)
        block = torch.empty(len(ids), width, dtype=stored.dtype)
        for first, last in runs(ids.numpy()):
            self._fill(stored, int(ids[first]) * width, block[first:last].view(-1))
        return block.view(len(ids), *stored.shape[1:])

    def _fill(self, stored: Stored, start: int, block: Tensor) -> None:
        view = memoryview(block.view(torch.uint8).numpy())
        place = stored.start + start * stored.dtype.itemsize
        while view:
            count = os.preadv(self._descriptors[stored.file], [view], place)
            if count == 0:
                raise ValueError(f"{stored.file} ends before its header says; save or download it again")
            view, place = view[count:], place + count

    @functools.cached_property
    def _descriptors(self) -> dict[Path, int]:
        return {file: os.open(file, os.O_RDONLY) for file in self.files}

    def close(self) -> None:
        for descriptor in self.__dict__.pop("_descriptors", {}).values():
            os.close(descriptor)

    def __enter__(self) -> Checkpoint:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


def runs(ids: np.ndarray) -> Iterator[tuple[int, int]]:
    """Stretches `first, last` of the array within which ids follow one another."""
    if len(ids):
        breaks = np.flatnonzero(np.diff(ids) != 1) + 1
        yield from zip((0, *breaks.tolist()), (*breaks.tolist(), len(ids)))


def open_checkpoint(model: str) -> Checkpoint:
    """A model's files by Hub id, local folder or asset name, headers read and checked, no weight read.

    Raises ValueError for what has no safetensors weights, for damaged or incomplete files (with their names), adapters and
    quantised models; FileNotFoundError for an asset that was not fetched yet.
    """
    folder = _folder(model)
    if (folder / "adapter_config.json").is_file():
        raise ValueError(
            f"model {model!r} is an adapter, or has one beside its weights; merge it into its model first "
            "(PEFT: merge_and_unload) and save the whole"
        )
    _refuse_quantised(model, read_json(folder / "config.json", model))
    files = _weight_files(model, folder)
    tensors: dict[str, Stored] = {}
    for file in files:
        for name, stored in _header(model, file).items():
            if name in tensors:
                raise ValueError(
                    f"model {model!r} holds {name} twice, in {tensors[name].file.name} and {file.name}; save it again"
                )
            tensors[name] = stored
    if not tensors:
        raise ValueError(f"model {model!r} holds no tensors; save or download it again")
    _same_as_index(model, folder, tensors)
    return Checkpoint(model, folder, files, tensors)


def read_json(file: Path, model: str) -> dict[str, Any]:
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ValueError(f"model {model!r} has no {file.name}; give a folder that save_pretrained wrote") from None
    except ValueError as error:
        raise ValueError(f"model {model!r}: {file.name} is no JSON ({error}); save or download it again") from error
    if not isinstance(content, dict):
        raise ValueError(f"model {model!r}: {file.name} is no JSON object; save or download it again")
    return content


def _folder(model: str) -> Path:
    source = model_source(model)
    if Path(source).is_dir():
        return Path(source)
    from huggingface_hub import snapshot_download

    try:
        folder = Path(snapshot_download(source, allow_patterns=list(TEXT_FILES)))
        index = folder / INDEX
        wanted = sorted(set(read_json(index, model)["weight_map"].values())) if index.is_file() else [SINGLE]
        folder = Path(snapshot_download(source, allow_patterns=[*TEXT_FILES, *wanted]))
    except (OSError, KeyError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ValueError(
            f"model {model!r} is no local folder and no built-in name, and could not be had from the Hugging Face Hub ({reason})"
        ) from error
    if not any(folder.glob("*.safetensors")):
        raise ValueError(f"model {model!r} has no safetensors weights on the Hub; pickled weights are not loaded")
    return folder


def _weight_files(model: str, folder: Path) -> list[Path]:
    index = folder / INDEX
    if index.is_file():
        mapping = read_json(index, model).get("weight_map")
        if not isinstance(mapping, dict) or not mapping:
            raise ValueError(f"model {model!r}: {INDEX} has no weight_map; save or download it again")
        files = [folder / name for name in sorted(set(mapping.values()))]
        if missing := [file.name for file in files if not file.is_file()]:
            raise ValueError(f"model {model!r} lacks {listed(missing)}, which {INDEX} names; download them")
        return files
    found = sorted(folder.glob("*.safetensors"))
    if (folder / SINGLE).is_file():
        return [folder / SINGLE]
    if len(found) == 1:
        return found
    raise ValueError(
        f"model {model!r} has {len(found)} safetensors files ({listed([file.name for file in found])}), but neither {SINGLE} "
        f"nor {INDEX} says which belong to it; save it again with save_pretrained"
    )


def _header(model: str, file: Path) -> dict[str, Stored]:
    """Tensors of a file in the order of their bytes; the safetensors library checks that the header fits the file."""
    try:
        with safe_open(file, framework="pt"), open(file, "rb") as handle:
            (length,) = struct.unpack("<Q", handle.read(8))
            entries = json.loads(handle.read(length))
    except SafetensorError as error:
        raise ValueError(
            f"model {model!r}: {file.name} is damaged or cut off ({error}); save or download it again"
        ) from error
    entries.pop("__metadata__", None)
    foreign = sorted(name for name, entry in entries.items() if entry["dtype"] not in DTYPES)
    if foreign:
        kinds = sorted({entries[name]["dtype"] for name in foreign})
        raise ValueError(
            f"model {model!r} is quantised: {len(foreign)} tensors are stored as {', '.join(kinds)} ({listed(foreign)}); "
            "give the model in float32, bfloat16 or float16"
        )
    if marked := sorted(name for name in entries if name.endswith(QUANTISED_NAMES)):
        raise ValueError(
            f"model {model!r} is quantised: it holds {listed(marked)}; give the model in float32, bfloat16 or float16"
        )
    ordered = sorted(entries.items(), key=lambda item: item[1]["data_offsets"][0])
    return {
        name: Stored(file, DTYPES[entry["dtype"]], tuple(entry["shape"]), 8 + length + entry["data_offsets"][0])
        for name, entry in ordered
    }


def _refuse_quantised(model: str, config: dict[str, Any]) -> None:
    if (settings := config.get("quantization_config")) is not None:
        method = settings.get("quant_method", "unknown method") if isinstance(settings, dict) else settings
        raise ValueError(
            f"model {model!r} is quantised ({method}); weights cannot be added there: give the model in float32, "
            "bfloat16 or float16"
        )


def _same_as_index(model: str, folder: Path, tensors: dict[str, Stored]) -> None:
    if not (folder / INDEX).is_file():
        return
    mapping = read_json(folder / INDEX, model)["weight_map"]
    wrong = [name for name, file in mapping.items() if name not in tensors or tensors[name].file.name != file]
    wrong += [name for name in tensors if name not in mapping]
    if wrong:
        raise ValueError(
            f"model {model!r}: {INDEX} and the files disagree about {len(wrong)} tensors: {listed(sorted(wrong))}; download "
            "the model again"
        )


def listed(names: Sequence[str], most: int = 10, separator: str = ", ") -> str:
    """The first names, and how many there are if these are not all."""
    more = f"{separator}... ({len(names)} in all)" if len(names) > most else ""
    return separator.join(names[:most]) + more
