"""Reading a nested model at a precision: from now on, for a block of code, or step by step through its dials."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass

from torch import nn

from trialist.models.nested.layer import NestedLinear, PrecisionDial


def nested_layers(model: nn.Module) -> dict[str, NestedLinear]:
    """The nested layers of a model by name, those within adapters and compiled wrappers too."""
    return {name: module for name, module in model.named_modules() if isinstance(module, NestedLinear)}


def precision_dials(model: nn.Module) -> list[PrecisionDial]:
    """What the layers read their precision from, usually one object for all: hold on to it where precision changes at every
    step, as `dial.set(3)` costs nothing. Raises ValueError for a model without nested layers, saying how to get some."""
    found = list({id(layer.dial): layer.dial for layer in nested_layers(model).values()}.values())
    if not found:
        name = getattr(getattr(model, "config", None), "name_or_path", "") or "MODEL"
        raise ValueError(
            f"{type(model).__name__} has no nested weights, so there is no precision to choose; make a nested model with "
            f"`trialist apply quantize --model {name} --method nested --bits 2-4 --output DIR`"
        )
    return found


def available_bits(model: nn.Module) -> tuple[int, ...]:
    """Precisions that all nested layers have, ascending."""
    first, *others = (dial.available for dial in precision_dials(model))
    return tuple(bits for bits in first if all(bits in available for available in others))


def get_precision(model: nn.Module) -> int:
    """Bits that the weights are read at. Raises ValueError where layers differ."""
    present = {dial.bits for dial in precision_dials(model)}
    if len(present) > 1:
        raise ValueError(f"the layers are read at different precisions, {sorted(present)} bits; set one for all")
    return present.pop()


def set_precision(model: nn.Module, bits: int) -> None:
    """Reads all nested weights at `bits` from now on. Raises ValueError for bits that the model does not have, naming those that
    it has, and for a model that is not nested."""
    dials = precision_dials(model)
    _refuse_unknown(dials, bits)
    for dial in dials:
        dial.set(bits)


@contextlib.contextmanager
def precision(model: nn.Module, bits: int) -> Iterator[None]:
    """Reads all nested weights at `bits` within the block, and as before behind it. Raises the errors of `set_precision`."""
    dials = precision_dials(model)
    _refuse_unknown(dials, bits)
    before = [dial.bits for dial in dials]
    try:
        for dial in dials:
            dial.bits = bits
        yield
    finally:
        for dial, previous in zip(dials, before, strict=True):
            dial.bits = previous


def _refuse_unknown(dials: list[PrecisionDial], bits: int) -> None:
    for dial in dials:
        if bits not in dial.available:
            raise ValueError(f"the weights cannot be read at {bits} bits; they can at {dial.listed}")


def train_around(model: nn.Module) -> None:
    """Lets forward passes in training mode through: gradients reach what stands before and behind nested layers, biases and
    adapters, and the nested weights stay as they are."""
    for dial in precision_dials(model):
        dial.trained_around = True


@dataclass(frozen=True)
class NestedBytes:
    """Bytes that a model really stores, by part."""

    codes: int
    """Bit-planes of all precisions"""
    tables: int
    """Values of the codes, of all precisions"""
    untouched: int
    """Everything else, parameters that several modules share once: embeddings, output layer, norms, biases"""

    @property
    def total(self) -> int:
        return self.codes + self.tables + self.untouched


def nested_bytes(model: nn.Module, bits: int | None = None) -> NestedBytes:
    """What a model stores, or with `bits` what a model of that precision alone would: its planes and its table."""
    layers = nested_layers(model).values()
    wanted = None if bits is None else [f"lut{bits}"]
    codes = sum(layer.qweight[:bits].nbytes for layer in layers)
    tables = sum(
        buffer.nbytes
        for layer in layers
        for name, buffer in layer.named_buffers(recurse=False)
        if name.startswith("lut") and (wanted is None or name in wanted)
    )
    own = {id(buffer) for layer in layers for buffer in layer.buffers(recurse=False)}
    state = {id(x): x for x in (*model.parameters(), *model.buffers()) if id(x) not in own}
    return NestedBytes(codes, tables, sum(x.nbytes for x in state.values()))
