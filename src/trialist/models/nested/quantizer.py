"""Nested weights as a quantisation of transformers: `AutoModelForCausalLM.from_pretrained` builds the layers that were saved.

Registered when `trialist.models` is imported.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from trialist.models.nested.layer import NestedLinear, PrecisionDial
from trialist.models.nested.precision import nested_layers, precision_dials

METHOD = "nested"
MOST_BITS = 8
TABLE_DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16}
CHOICES: dict[str, tuple[str, ...]] = {
    "sensitivity": ("fisher", "activation", "none"),
    "nesting": ("greedy", "joint"),
    "seed_init": ("dp", "kmeans++"),
    "table_dtype": tuple(TABLE_DTYPES),
}

Sensitivity = Literal["fisher", "activation", "none"]
Nesting = Literal["greedy", "joint"]
SeedInit = Literal["dp", "kmeans++"]
TableDtype = Literal["float16", "bfloat16"]


@register_quantization_config(METHOD)
class NestedQuantConfig(QuantizationConfigMixin):
    """How the weights of a model became nested, and which of its layers are.

    seed_bits, parent_bits: the lowest and the highest precision, 1 <= seed <= parent <= 8. sensitivity: what an error of a
    weight counts: "fisher", the mean square of its gradient; "activation", that of its input; "none", the same for all.
    nesting: "greedy" splits each cluster at its best; "joint" moves the borders of all precisions together, and is never worse
    in their weighted sum. seed_init: "dp" finds the best seed clusters; "kmeans++" draws and improves them, which is faster for
    more than 3 seed bits. calibration_samples, calibration_length: sequences and tokens in each. modules_to_not_convert: layers
    to leave alone by name, or by a last part of it; None leaves the output layer alone. table_dtype: "float16" or "bfloat16".
    nested_modules: the layers that are nested; `quantize_nested` fills it in.

    Raises ValueError for values that cannot be.
    """

    def __init__(
        self,
        *,
        seed_bits: int = 2,
        parent_bits: int = 4,
        sensitivity: Sensitivity = "fisher",
        nesting: Nesting = "greedy",
        seed_init: SeedInit = "dp",
        calibration_samples: int = 100,
        calibration_length: int = 512,
        modules_to_not_convert: Sequence[str] | None = None,
        table_dtype: TableDtype = "float16",
        seed: int = 0,
        nested_modules: Sequence[str] = (),
        **_: Any,
    ) -> None:
        self.quant_method = METHOD  # type: ignore[assignment]
        self.seed_bits, self.parent_bits = seed_bits, parent_bits
        self.sensitivity, self.nesting, self.seed_init = sensitivity, nesting, seed_init
        self.calibration_samples, self.calibration_length = calibration_samples, calibration_length
        self.modules_to_not_convert = None if modules_to_not_convert is None else list(modules_to_not_convert)
        self.table_dtype, self.seed = table_dtype, seed
        self.nested_modules = list(nested_modules)
        whole = isinstance(seed_bits, int) and isinstance(parent_bits, int)
        if not whole or not 1 <= seed_bits <= parent_bits <= MOST_BITS:
            raise ValueError(
                f"seed_bits is {seed_bits!r} and parent_bits {parent_bits!r}; wanted 1 <= seed_bits <= parent_bits <= {MOST_BITS}"
            )
        for name, choices in CHOICES.items():
            if getattr(self, name) not in choices:
                raise ValueError(f"{name} is {getattr(self, name)!r}; choose one of {', '.join(choices)}")
        for name in ("calibration_samples", "calibration_length"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, not {getattr(self, name)}")

    @property
    def bits(self) -> tuple[int, ...]:
        """Precisions that the weights can be read at, ascending."""
        return tuple(range(self.seed_bits, self.parent_bits + 1))


@register_quantizer(METHOD)
class NestedQuantizer(HfQuantizer):
    """Builds the nested layers of a saved model. A model is made nested by `trialist.weights.nested.quantize_nested`."""

    requires_calibration = True
    quantization_config: NestedQuantConfig

    def _process_model_before_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> PreTrainedModel:
        if not self.quantization_config.nested_modules:
            raise ValueError(
                "the configuration names no nested layers; make a model nested with `trialist apply quantize`"
            )
        dial = PrecisionDial(self.quantization_config.bits, self.quantization_config.parent_bits)
        saved = set(self.quantization_config.nested_modules)
        prefix = f"{model.base_model_prefix}."
        for name, module in list(model.named_modules()):
            if not is_linear(module) or not {name, prefix + name, name.removeprefix(prefix)} & saved:
                continue
            with torch.device("meta"):
                model.set_submodule(name, like(module, self.quantization_config, dial))
        return model

    def _dequantize(self, model: PreTrainedModel, dtype: torch.dtype | str | None = None) -> PreTrainedModel:
        """Dense layers with the weights at the present precision."""
        wanted = (
            getattr(torch, dtype) if isinstance(dtype, str) else dtype or model.dtype
        )  # transformers hands over both
        for name, layer in nested_layers(model).items():
            model.set_submodule(name, dense(layer, wanted))
        return model

    def is_serializable(self, *_: Any, **__: Any) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        """Through adapters."""
        return True

    @property
    def is_compileable(self) -> bool:
        return True


def is_linear(module: nn.Module) -> bool:
    """Whether a module is a plain linear layer, or the Conv1D of GPT-2."""
    return type(module) in (nn.Linear, Conv1D)


def sizes(module: nn.Module) -> tuple[int, int]:
    """Inputs and outputs of a linear layer."""
    weight = module.weight
    assert isinstance(weight, torch.Tensor)
    return tuple(weight.shape if isinstance(module, Conv1D) else weight.shape[::-1])  # type: ignore[return-value]


def like(module: nn.Module, config: NestedQuantConfig, dial: PrecisionDial) -> NestedLinear:
    """A nested layer, still without codes, in place of a linear one; its bias is handed over."""
    built = NestedLinear(*sizes(module), config.bits, table_dtype=TABLE_DTYPES[config.table_dtype], dial=dial)
    built.transposed = isinstance(module, Conv1D)
    built.bias = module.bias  # type: ignore[assignment]
    return built.train(module.training)


def dense(layer: NestedLinear, dtype: torch.dtype) -> nn.Module:
    """The ordinary layer with the weights that `layer` reads at present."""
    weight = layer.dequantize().to(dtype)
    built: Any
    if layer.transposed:
        built = Conv1D(layer.out_features, layer.in_features)
        built.weight = nn.Parameter(weight.T.contiguous())
        built.bias = nn.Parameter(torch.zeros(layer.out_features, dtype=dtype)) if layer.bias is None else layer.bias
    else:
        built = nn.Linear(layer.in_features, layer.out_features, bias=False, device="meta")
        built.weight = nn.Parameter(weight)
        built.bias = layer.bias
    return built.train(layer.training)


def mark_quantized(model: PreTrainedModel, config: NestedQuantConfig) -> None:
    """Tells transformers what a model became, as if it had been loaded so."""
    quantizer: Any = NestedQuantizer(config)
    model.hf_quantizer = quantizer
    model.is_quantized = True  # type: ignore[assignment]
    model.quantization_method = METHOD  # type: ignore[assignment]
    quantizer.postprocess_model(model)
    assert precision_dials(model)
