"""What a user says about generation: plain sampling options and the flags of every technique, as one value.

`generate` and `serve` share it: as command-line options, as defaults of a server and, name by name, in the requests to it. No
heavy library is imported here.
"""

from __future__ import annotations

import dataclasses
import importlib
import math
import typing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from trialist.decoding.flags import FLAGS, Flags

MOST_TOKENS = 1024
"""Tokens of a continuation where neither the user nor the model's generation_config limits them"""


@dataclass(frozen=True)
class Sampling:
    """How tokens are chosen and when it ends; what is not given is as the model's generation_config says."""

    max_new_tokens: int | None = None
    """Tokens of a continuation at most. Without it those of the model's generation_config, or 1024, or what the context leaves"""
    temperature: float | None = None
    """0 is greedy search; above 0 sampling, the lower the more likely tokens. Without it the model's generation_config decides"""
    top_p: float | None = None
    """Sample among the most likely tokens that together have this probability, in [0, 1]; 1 is all of them"""
    top_k: int | None = None
    """Sample among so many most likely tokens; 0 is all of them"""
    repetition_penalty: float | None = None
    """Above 1 makes tokens less likely that were there before; 1 is none"""
    seed: int | None = None
    """Makes sampling repeatable; without it a new one is drawn and told"""
    num_beams: int = 1
    """Beams of beam search; 1 is none"""
    num_sequences: int = 1
    """Continuations of a prompt: samples, or the best of the beams"""
    stop: tuple[str, ...] = ()
    """Text that ends a continuation and is not part of it; may be given several times"""

    def __post_init__(self) -> None:
        def refuse(name: str, wanted: str) -> None:
            raise ValueError(f"--{name.replace('_', '-')} must be {wanted}, not {getattr(self, name)!r}")

        for name in ("max_new_tokens", "num_beams", "num_sequences"):
            if (number := getattr(self, name)) is not None and number < 1:
                refuse(name, "at least 1")
        if self.temperature is not None and not 0 <= self.temperature < math.inf:
            refuse("temperature", "0 (greedy search) or a number above it")
        if self.top_p is not None and not 0 <= self.top_p <= 1:
            refuse("top_p", "between 0 and 1")
        if self.top_k is not None and self.top_k < 0:
            refuse("top_k", "at least 0 (all tokens)")
        if self.repetition_penalty is not None and not 0 < self.repetition_penalty < math.inf:
            refuse("repetition_penalty", "a number above 0")
        if self.seed is not None and not -(2**63) <= self.seed < 2**63:
            refuse("seed", "a whole number of 64 bits")
        if "" in self.stop:
            refuse("stop", "text; an empty one is found everywhere")
        if self.num_beams > 1 and self.num_sequences > self.num_beams:
            refuse("num_sequences", f"at most --num-beams {self.num_beams}")

    def samples(self, model: Any) -> bool:
        """Whether tokens are drawn: said by a temperature, else implied by a choice of top-p or top-k, else the model's way."""
        if self.temperature is not None:
            return self.temperature > 0
        if self.top_p not in (None, 1.0) or self.top_k not in (None, 0):
            return True
        return bool(model.generation_config.do_sample)

    def arguments(self, model: Any) -> dict[str, Any]:
        """Arguments of `generate`, without lengths and stops. Raises ValueError for several sequences of greedy search."""
        samples = self.samples(model)
        if not samples and self.num_beams == 1 and self.num_sequences > 1:
            raise ValueError(
                f"{self.num_sequences} continuations of a prompt by greedy search would all be the same; sample them "
                "(--temperature above 0), search with --num-beams, or ask for one"
            )
        found: dict[str, Any] = {"do_sample": samples, "num_beams": self.num_beams}
        found["num_return_sequences"] = self.num_sequences
        if self.repetition_penalty is not None:
            found["repetition_penalty"] = self.repetition_penalty
        if not samples:  # what a generation_config says of sampling would be warned of
            return {**found, "temperature": 1.0, "top_p": 1.0, "top_k": 50}
        for name in ("temperature", "top_p", "top_k"):
            if getattr(self, name) is not None:
                found[name] = getattr(self, name)
        return found

    def describe(self, model: Any) -> str:
        """How tokens are chosen, in words: `greedy search`, `sampling at temperature 0.7, top-p 0.9`."""
        samples = self.samples(model)
        parts = [f"search with {self.num_beams} beams"] if self.num_beams > 1 else [] if samples else ["greedy search"]
        if samples:
            config = model.generation_config
            defaults = config._get_default_generation_params()
            said: dict[str, Any] = {}
            for name in ("temperature", "top_p", "top_k"):
                chosen = (getattr(self, name), getattr(config, name, None), defaults.get(name))
                said[name] = next(value for value in (*chosen, 0) if value is not None)
            parts.append(f"sampling at temperature {said['temperature']:g}")
            parts += [f"top-p {said['top_p']:g}"] if said["top_p"] < 1 else []
            parts += [f"top-k {said['top_k']}"] if said["top_k"] else []
        return ", ".join(parts)


@dataclass(frozen=True)
class Settings:
    """Sampling and the flags of all techniques, by technique."""

    sampling: Sampling = Sampling()
    flags: Mapping[str, Flags] = field(default_factory=dict)

    def options(self, model: Any, tokenizer: Any, prompts: Sequence[Any]) -> list[Any]:
        """Generation options of all techniques for these prompts; none at neutral settings."""
        return [option for flags in self.flags.values() for option in flags.options(model, tokenizer, prompts)]

    def asked(self) -> dict[str, Any]:
        """Flags of techniques that are not at their neutral value, by name."""
        return {
            name: value
            for flags in self.flags.values()
            for name, value in _values(flags).items()
            if value != _values(type(flags)())[name]
        }

    def names(self) -> set[str]:
        """All that `replace` knows."""
        return set(_values(self.sampling)).union(*(_values(flags) for flags in self.flags.values()))

    def replace(self, changes: Mapping[str, Any]) -> Settings:
        """The same with other values, by name. Raises ValueError, naming the flag, for values out of range."""

        def replaced(part: Any) -> Any:
            own = {name: value for name, value in changes.items() if name in _values(part)}
            return dataclasses.replace(part, **own) if own else part

        return Settings(replaced(self.sampling), {name: replaced(flags) for name, flags in self.flags.items()})

    def replace_json(self, changes: Mapping[str, Any]) -> Settings:
        """`replace` with values as JSON has them. Raises ValueError, naming the field, for those of another type."""
        from pydantic import TypeAdapter, ValidationError
        from pydantic_core import to_json

        checked = {}
        for part in (self.sampling, *self.flags.values()):
            types = typing.get_type_hints(type(part))
            for name in changes.keys() & _values(part):
                try:
                    text = to_json(changes[name], inf_nan_mode="constants")
                    checked[name] = TypeAdapter(types[name]).validate_json(text, strict=True)
                except ValidationError as error:
                    reason = error.errors()[0]["msg"]
                    raise ValueError(f"{name}: {reason[0].lower()}{reason[1:]}, not {changes[name]!r}") from error
        return self.replace(checked)


def flag_classes() -> dict[str, type[Flags]]:
    """Technique -> the class of its flags. Raises ValueError where two of them, or one and `Sampling`, share a name."""
    found: dict[str, type[Flags]] = {}
    owners = {entry.name: "sampling" for entry in dataclasses.fields(Sampling)}
    for technique, path in FLAGS.items():
        module, _, attribute = path.partition(":")
        found[technique] = cls = getattr(importlib.import_module(module), attribute)
        for entry in dataclasses.fields(cls):  # type: ignore[arg-type]
            if entry.name in owners:
                raise ValueError(
                    f"the flag --{entry.name.replace('_', '-')} is of both {owners[entry.name]} and {technique}; rename one"
                )
            owners[entry.name] = technique
    return found


def neutral() -> Settings:
    """Settings at which everything is as plain `generate` does it."""
    return Settings(flags={technique: cls() for technique, cls in flag_classes().items()})


def _values(part: Any) -> dict[str, Any]:
    return {entry.name: getattr(part, entry.name) for entry in dataclasses.fields(part)}
