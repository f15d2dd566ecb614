"""Turning dataclasses into command-line options, the same way for every verb."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import field, fields, make_dataclass
from pathlib import Path
from typing import Any, TypeVar

import tyro
from rich.console import Console

from trialist.engine.contract import Trial
from trialist.engine.options import RunOptions
from trialist.engine.plan import choose_preset, preset_fields, presets_of
from trialist.engine.registry import load_trial

Options = TypeVar("Options")


def parse(options: type[Options], verb: str, arguments: Sequence[str]) -> Options:
    """Parses the arguments of a verb into a dataclass; prints help or the error and exits (0 or 2) as argparse does."""
    config = (tyro.conf.FlagCreatePairsOff, tyro.conf.PositionalMetavarFromFieldName, tyro.conf.DisallowNone)
    return tyro.cli(options, prog=f"trialist {verb}", args=list(arguments), config=config)


def parse_trial(verb: str, arguments: Sequence[str]) -> tuple[str, dict[str, Any], RunOptions]:
    """`NAME [inputs of the trial] [run options]` -> name, field values, options; defaults are those of the preset."""
    arguments = list(arguments)
    if not arguments or arguments[0].startswith("-"):
        if arguments and arguments[0] in ("-h", "--help"):
            print(
                f"usage: trialist {verb} NAME [options]\n\n`trialist {verb} NAME --help` shows the options of a trial."
            )
            raise SystemExit(0)
        raise ValueError(f"which trial? `trialist {verb} NAME`; `trialist list` shows all")
    name, rest = arguments[0], fill_optional_value(arguments[1:], "--save-evidence")
    cls = load_trial(name)
    preset = choose_preset(name, cls, _value_of(rest, "--preset"))
    defaults = cls(**preset_fields(cls, preset))
    flat = tyro.conf.OmitArgPrefixes
    both = make_dataclass(
        "Arguments",
        [
            ("trial", flat[cls], field(default=defaults)),
            ("run", flat[RunOptions], field(default=RunOptions(preset=preset))),
        ],  # type: ignore[misc]
    )
    both.__doc__ = describe(cls, preset)
    parsed: Any = parse(both, f"{verb} {name}", rest)
    values = {key: getattr(parsed.trial, key) for key in (entry.name for entry in fields(cls))}
    return name, values, parsed.run


def describe(cls: type[Trial], preset: str) -> str:
    entries = presets_of(cls).items()
    presets = ", ".join(f"{name} ({about})" if (about := entry.get("about")) else name for name, entry in entries)
    question = (cls.__doc__ or "").strip()
    return f"{question}\n\n{cls.claim.statement} ({cls.claim.source})\nPresets: {presets}. Defaults below: {preset}."


def fill_optional_value(arguments: list[str], flag: str) -> list[str]:
    """Lets a flag stand without its value: `--save-evidence` alone takes the preset's name."""
    if flag in arguments:
        at = arguments.index(flag) + 1
        if at == len(arguments) or arguments[at].startswith("--"):
            return [*arguments[:at], "", *arguments[at:]]
    return arguments


def _value_of(arguments: Sequence[str], flag: str) -> str | None:
    for at, argument in enumerate(arguments):
        if argument == flag and at + 1 < len(arguments):
            return arguments[at + 1]
        if argument.startswith(flag + "="):
            return argument.partition("=")[2]
    return None


def ledger_path(given: str | None) -> Path:
    from trialist.engine.home import home_folder

    return Path(given) if given else home_folder() / "ledger.db"


def print_json(document: Any) -> None:
    sys.stdout.write(json.dumps(document, indent=2, allow_nan=False, default=str) + "\n")


def console() -> Console:
    """Where results are printed; progress and errors go to stderr."""
    piped = not sys.stdout.isatty()
    return Console(soft_wrap=piped, width=200 if piped else None, highlight=False)  # ids are not cut in a pipe
