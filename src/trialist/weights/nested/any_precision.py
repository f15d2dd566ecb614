"""Reads a packed checkpoint of the official Any-Precision code, whose bytes are shuffled for its GPU kernel.

There a plane of a row is packed eight weights a byte, the first one highest; within each block of 128 bytes (32 threads of 4)
byte i stands at 4 (i mod 32) + (i div 32 xor 3), and a last block of R bytes counts R / 4 threads; four bytes are an int32.
"""

from __future__ import annotations

import json
import re
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from trialist.kernels.nested import TABLES, pack_planes
from trialist.models.nested.quantizer import METHOD, NestedQuantConfig

BLOCK = 128
WEIGHTS = "model.safetensors"


def import_any_precision(path: str | Path, output: str | Path | None = None) -> PreTrainedModel:
    """The model of a folder that the official code packed, as one of ours; `output` keeps it as a folder too.

    Its tensors `X.qweight` int32 `(P, N, K / 32)` and `X.lut3`, `X.lut4`, ... `(N, 2^b)` must lie in safetensors files: those
    that are unpickled may run code and are refused. Raises FileNotFoundError for a folder without config.json or weights,
    ValueError for tensors that do not fit together, naming the layer, and for an output that is not empty.
    """
    from trialist.weights.writing import folder_written_whole

    source = Path(path)
    if not (source / "config.json").is_file():
        raise FileNotFoundError(f"{source} has no config.json; give the folder that the official code packed")
    files = sorted(source.glob("*.safetensors"))
    if not files:
        pickled = [file.name for file in sorted(source.glob("*.bin"))]
        raise FileNotFoundError(
            f"{source} has no *.safetensors"
            + (
                f", and {', '.join(pickled)} would be unpickled, which may run code; where you trust it, write its state "
                "dictionary with safetensors.torch.save_file"
                if pickled
                else ""
            )
        )
    state: dict[str, Tensor] = {}
    for file in files:
        state |= load_file(file)
    converted, config = convert_state(state)
    document = json.loads((source / "config.json").read_text())
    document.pop("anyprec", None)
    document["quantization_config"] = config.to_dict()
    size = sum(tensor.nbytes for tensor in converted.values())
    with tempfile.TemporaryDirectory() as scratch:
        target = Path(output) if output is not None else Path(scratch) / "model"
        with folder_written_whole(target, size) as folder:
            save_file(converted, folder / WEIGHTS, metadata={"format": "pt"})
            (folder / "config.json").write_text(json.dumps(document, indent=2))
            for file in sorted(source.iterdir()):
                told_anew = file.name == "config.json" or file.name.endswith("index.json")
                if file.is_file() and file.suffix in (".json", ".model", ".jinja", ".txt") and not told_anew:
                    shutil.copy2(file, folder / file.name)
        model = AutoModelForCausalLM.from_pretrained(target, dtype="auto")
    return model.eval()


def convert_state(state: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], NestedQuantConfig]:
    """Our tensors, and the configuration that goes with them."""
    converted = {name: x for name, x in state.items() if not re.search(r"\.(qweight|lut\d)$", name)}
    names = [name.removesuffix(".qweight") for name in state if name.endswith(".qweight")]
    if not names:
        raise ValueError("no tensor is called qweight; is this a packed checkpoint of the official code?")
    seen: set[tuple[int, ...]] = set()
    for name in names:
        packed = state[f"{name}.qweight"]
        tables = {b: state[f"{name}.lut{b}"] for b in range(1, 9) if f"{name}.lut{b}" in state}
        fits = packed.dim() == 3 and packed.dtype == torch.int32 and tables and max(tables) == len(packed)
        if not fits or any(x.shape != (packed.shape[1], 1 << b) or x.dtype not in TABLES for b, x in tables.items()):
            raise ValueError(
                f"{name}: qweight {packed.dtype} {tuple(packed.shape)} and tables "
                f"{[tuple(x.shape) for x in tables.values()]} do not fit; wanted int32 (P, N, K / 32) and float16 (N, 2^b)"
            )
        seen.add(tuple(tables))
        converted[f"{name}.qweight"] = pack_planes(official_codes(packed), len(packed))
        converted |= {f"{name}.lut{b}": x.contiguous() for b, x in tables.items()}
    if len(seen) > 1 or (bits := seen.pop()) != tuple(range(bits[0], bits[-1] + 1)):
        raise ValueError(f"the layers have tables for different bits, or with gaps: {sorted(seen) or [bits]}")
    dtype = str(next(x.dtype for name, x in converted.items() if re.search(r"\.lut\d$", name))).removeprefix("torch.")
    config = NestedQuantConfig(
        seed_bits=bits[0], parent_bits=bits[-1], table_dtype=dtype, nested_modules=names,  # type: ignore[arg-type]
        seed_init="kmeans++",
    )  # fmt: skip
    assert config.quant_method == METHOD
    return converted, config


def official_codes(packed: Tensor) -> Tensor:
    """Codes `(N, K)` uint8 of official planes `(P, N, K / 32)` int32."""
    _, N, words = packed.shape
    size = 4 * words
    raw = packed.contiguous().view(torch.uint8)  # (P, N, K / 8), least byte of a word first
    i = torch.arange(size)
    start = i // BLOCK * BLOCK
    threads = (torch.full_like(i, size) - start).clamp(max=BLOCK) // 4
    within = i - start
    place = start + 4 * (within % threads) + ((within // threads) ^ 3)
    bits = raw[:, :, place, None] >> torch.arange(7, -1, -1, dtype=torch.uint8) & 1  # (P, N, K / 8, 8)
    codes = torch.zeros(N, 8 * size, dtype=torch.uint8)
    for plane in bits.flatten(2):
        codes = codes << 1 | plane
    return codes
