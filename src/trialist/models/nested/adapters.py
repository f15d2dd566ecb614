"""Adapters over nested layers: PEFT is told of them only where it is used, as it takes long to import."""

from __future__ import annotations

from typing import TYPE_CHECKING

from trialist.models.nested.layer import NestedLinear

if TYPE_CHECKING:
    from peft import PeftConfig


def nested_lora(config: PeftConfig) -> PeftConfig:
    """The same LoRA configuration, with which PEFT puts adapters over nested layers too; name them in `target_modules`, as
    "all-linear" finds dense layers only. Returns `config`. Raises ValueError for another kind of adapter."""
    from peft import LoraConfig

    from trialist.models.nested.lora import NestedLora

    if not isinstance(config, LoraConfig):
        raise ValueError(f"{type(config).__name__} is no LoRA; over nested weights only LoRA adapters work")
    config._register_custom_module({NestedLinear: NestedLora})
    return config
