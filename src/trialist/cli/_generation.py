"""What `generate` and `serve` share: their options, which are those of sampling and of every technique, and loading."""

from __future__ import annotations

import re
import sys
from collections.abc import Sequence
from dataclasses import field, fields, make_dataclass
from typing import Any, TypeVar

import tyro

from trialist.cli._arguments import parse
from trialist.decoding.settings import Sampling, Settings, flag_classes

Own = TypeVar("Own")


def parse_generation(own: type[Own], verb: str, arguments: Sequence[str]) -> tuple[Own, Settings]:
    """Parses options of a verb, of sampling and of all techniques, which help shows in groups of these names."""
    flat = tyro.conf.OmitArgPrefixes
    techniques = flag_classes()
    shared = {entry.name for cls in (Sampling, *techniques.values()) for entry in fields(cls)}  # type: ignore[arg-type]
    if both := shared & {entry.name for entry in fields(own)}:  # type: ignore[arg-type]
        raise ValueError(f"{verb} and generation options both have --{', --'.join(sorted(both)).replace('_', '-')}")
    parts: dict[str, Any] = {verb: own, "sampling": Sampling, **techniques}
    identifiers = {name: re.sub(r"\W", "_", name) for name in parts}
    entries = [
        (identifiers[name], flat[cls], field(default_factory=cls))  # type: ignore[misc]
        for name, cls in parts.items()
    ]
    merged = make_dataclass("Arguments", entries)
    merged.__doc__ = own.__doc__
    # --stop A --stop B: a list after one flag would swallow what follows
    repeated: Any = tyro.conf.UseAppendAction[merged]  # type: ignore[valid-type, misc]
    parsed: Any = parse(repeated, verb, arguments)
    own_values, sampling, *flags = (getattr(parsed, identifiers[name]) for name in parts)
    return own_values, Settings(sampling, dict(zip(techniques, flags)))


def require_model(model: str | None, verb: str) -> str:
    if not model:
        raise ValueError(f"which model? trialist {verb} --model MODEL (Hub id, local folder or asset)")
    return model


def load(model: str, dtype: str, device: str) -> tuple[Any, Any]:
    """Model and tokenizer. Raises ValueError or FileNotFoundError that say what is missing."""
    from transformers.utils import logging

    from trialist.data.tokenizers import load_tokenizer
    from trialist.engine.hardware import resolve_device
    from trialist.models.loading import DTYPES, load_model, model_source

    if dtype not in DTYPES:
        raise ValueError(f"--dtype {dtype!r}: one of {', '.join(DTYPES)}")
    if not sys.stderr.isatty():
        logging.disable_progress_bar()
    place = checked_device(resolve_device(device))
    model_source(model)  # its errors say more than those of a tokenizer that is missing
    tokenizer = load_tokenizer(model)
    return load_model(model, dtype=dtype, device=place), tokenizer


def checked_device(device: str) -> str:
    """The device, if this machine has it. Raises ValueError."""
    import torch

    try:
        if torch.empty(0, device=device).is_meta:
            raise RuntimeError("it holds no numbers")
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ValueError(f"--device {device!r} cannot be used here ({reason}); auto, cpu, cuda or cuda:1") from error
    return device
