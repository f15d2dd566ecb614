"""The command-line option of reading nested weights at a precision."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class PrecisionFlags:
    """At how many bits the weights of a nested model are read."""

    bits: int | None = None
    """Bits a weight, of those that a model made by `trialist apply quantize` has; without it as stored"""

    def options(self, model: Any, tokenizer: Any, prompts: Sequence[Any]) -> Sequence[Any]:
        if self.bits is None:
            return ()
        from trialist.decoding.precision.option import Precision
        from trialist.models.nested.precision import precision

        try:
            with precision(model, self.bits):
                pass
        except ValueError as error:
            raise ValueError(f"--bits {self.bits}: {error}") from error
        return (Precision(self.bits),)
