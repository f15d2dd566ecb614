"""At how many bits the weights of a nested model are read while it generates."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor
from transformers import GenerationMixin

from trialist.decoding.options import Slot, around_loop
from trialist.models.nested.precision import precision


@dataclass(frozen=True)
class Precision:
    """Generates with weights of `bits` bits, prompt included; afterwards the model is read as before.

    Neutral at None: the precision that the model is at. Raises ValueError in `prepare` for a model that is not nested, with the
    command that makes one, and for bits that it does not have.
    """

    bits: int | None = None

    slot: ClassVar[Slot] = "weights"

    def prepare(self, model: GenerationMixin, generate_kwargs: Mapping[str, Any]) -> dict[str, Any]:
        if self.bits is None:
            return dict(generate_kwargs)
        bits = self.bits
        with precision(model, bits):  # type: ignore[arg-type]
            pass  # refused before anything runs

        def around(loop: Any, model: Any, input_ids: Tensor, **kwargs: Any) -> Any:
            with precision(model, bits):
                return loop(model, input_ids, **kwargs)

        return around_loop(generate_kwargs, around)
