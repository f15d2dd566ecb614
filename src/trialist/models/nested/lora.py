"""LoRA adapters of PEFT over nested layers, which PEFT does not know by itself."""

from __future__ import annotations

import warnings
from typing import Any

from peft.tuners.lora.layer import Linear as LoraLinear


class NestedLora(LoraLinear):
    """An adapter beside a nested layer. It cannot be merged into codes: `merge` raises ValueError that says what to do."""

    def __init__(self, base_layer: Any, *args: Any, **kwargs: Any) -> None:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Unsupported layer type")
            super().__init__(base_layer, *args, **kwargs)
        self.get_base_layer().dial.trained_around = True

    def resolve_lora_variant(self, *, use_dora: bool = False, config: Any = None, **kwargs: Any) -> None:
        if use_dora or getattr(config, "use_dora", False):
            raise ValueError("DoRA scales the weights themselves, which nested layers store as codes; use plain LoRA")

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        raise ValueError(
            "an adapter cannot be merged into nested weights, which are codes; keep it beside them, or merge it into the dense "
            "model and quantise that again"
        )
