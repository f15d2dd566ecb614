"""What the trials that train language models share: the model of an arm, and its training as an outcome.

An arm says `attention` ("standard" or "selective") and, for the built-in decoder, `heads`, how many times the attention
heads of the baseline it has at the same head width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trialist.engine.context import Context
from trialist.engine.contract import Arm, Cost, Outcome
from trialist.engine.hardware import resolve_device

if TYPE_CHECKING:
    from torch import Tensor, nn
    from transformers import PreTrainedModel

BUILT_IN = "decoder"
DTYPES = ("float32", "bfloat16")
PRELOAD = ("torch", "transformers", "trialist.models", "trialist.training", "trialist.objectives")
VERSIONS = ("torch", "transformers")
LEARNING_RATES_GIVEN_MODEL = (1e-5, 5e-5, 2e-4)


def attention_arms(
    model: str, settings: tuple[str, str], *, learning_rate: float, learning_rates: tuple[float, ...]
) -> Iterator[Arm]:
    """Standard attention, also with twice the heads, against selective attention, in a setting and in a null setting.

    learning_rate, learning_rates: default and tries for the built-in decoder; a given model is trained more gently. A given
    model cannot get more heads, and the null setting, which decides nothing between the controls, does without that arm.
    """
    scratch = model == BUILT_IN
    if not scratch:
        learning_rate, learning_rates = LEARNING_RATES_GIVEN_MODEL[1], LEARNING_RATES_GIVEN_MODEL
    for setting, null in zip(settings, (False, True), strict=True):
        tune = None if null else {"learning_rate": learning_rates}
        standard = {"learning_rate": learning_rate, "attention": "standard", "heads": 1}
        yield Arm("standard", "control", setting, null, options=standard, tune=tune, about="standard attention")
        if scratch and not null:
            yield Arm("double-heads", "control", setting, null, options={**standard, "heads": 2}, tune=tune,
                      about="standard attention, twice the heads, attention parameters doubled")  # fmt: skip
        yield Arm("selective", "treatment", setting, null, options={**standard, "attention": "selective"}, tune=tune,
                  about="selective attention, no parameter more than `standard`")  # fmt: skip


def arm_remarks(model: str) -> tuple[str, ...]:
    if model == BUILT_IN:
        return ()
    return ("the control with twice the heads is left out: heads cannot be added to a given model",)


def check_inputs(model: str, dtype: str, lora: int, **positive: int) -> None:
    """Raises ValueError or FileNotFoundError for inputs of a training trial that cannot work."""
    check_positive(**positive)
    if dtype not in DTYPES:
        raise ValueError(f"--dtype {dtype!r}: one of {', '.join(DTYPES)}")
    if lora < 0:
        raise ValueError(f"--lora is a rank, at least 0 (0 trains all weights), not {lora}")
    if lora and model == BUILT_IN:
        raise ValueError("--lora adapts a given model; the built-in decoder is trained from scratch, so leave it 0")


def check_positive(**positive: int) -> None:
    """Raises ValueError that names the option which is below 1."""
    for name, value in positive.items():
        if value < 1:
            raise ValueError(f"--{name.replace('_', '-')} must be at least 1, not {value}")


def check_length(model: str, length: int) -> None:
    """Raises ValueError where sequences are longer than a given model takes, or where it has no tokenizer or configuration."""
    most = model_context(model)
    if most is not None and length > most:
        raise ValueError(f"sequences of {length} tokens are longer than {model} takes ({most}); lower the length")


def model_context(model: str) -> int | None:
    """Tokens that a given model takes at most; None where its configuration does not say."""
    from trialist.models import loading

    return loading.model_context(model)


def model_inputs(model: str, device: str) -> dict[str, str]:
    """Digests of the inputs `model` and `device`."""
    resolved = {"device": resolve_device(device)}
    if model == BUILT_IN:
        return resolved
    from trialist.models.loading import model_digest

    return {**resolved, "model": model_digest(model)}


def arm_model(
    arm: Arm,
    context: Context,
    model: str,
    *,
    device: str,
    lora: int,
    vocab_size: int,
    layers: int,
    width: int,
    heads: int,
    length: int,
) -> PreTrainedModel:
    """A fresh decoder, or the given model, with the arm's attention."""
    selective = arm["attention"] == "selective"
    if model != BUILT_IN:
        return given_model(context, model, device=device, lora=lora, adapt=selective_in_place if selective else None)
    return new_decoder(
        context,
        device=device,
        vocab_size=vocab_size,
        hidden_size=width,
        num_hidden_layers=layers,
        num_attention_heads=heads * arm["heads"],
        head_dim=width // heads,
        layer_types=["selective_attention" if selective else "full_attention"] * layers,
        max_position_embeddings=length,
    )


def new_decoder(context: Context, *, device: str, hidden_size: int, **architecture: Any) -> PreTrainedModel:
    """A decoder to be trained from scratch; its initial weights depend on seed and parameter name only.

    architecture: further fields of `ModularDecoderConfig`.
    """
    from trialist.models.configuration import ModularDecoderConfig
    from trialist.models.decoder import ModularDecoderForCausalLM
    from trialist.models.initialization import initialize_

    defaults = {
        "intermediate_size": -(-8 * hidden_size // 3 // 8) * 8,
        # small models learn late, or not at all, from the usual 0.02 everywhere, and standard attention suffers most
        "initializer_range": hidden_size**-0.5,
        "embedding_initializer_range": 1.0,
        "tie_word_embeddings": False,
    }
    built = ModularDecoderForCausalLM(ModularDecoderConfig(hidden_size=hidden_size, **{**defaults, **architecture}))
    initialize_(built, context.stream("init"))
    return built.to(resolve_device(device))


def given_model(
    context: Context, model: str, *, device: str, lora: int, adapt: Callable[[PreTrainedModel], object] | None = None
) -> PreTrainedModel:
    """The user's model, changed in place by `adapt`, with LoRA adapters of rank `lora` where that is not 0."""
    import torch

    from trialist.models.loading import load_model

    loaded = load_model(model, device=resolve_device(device))
    if adapt is not None:
        adapt(loaded)
    if lora:
        from peft import LoraConfig, get_peft_model

        torch.manual_seed(context.stream("init"))
        loaded = get_peft_model(loaded, LoraConfig(r=lora, lora_alpha=2 * lora, target_modules="all-linear"))
    return loaded


def selective_in_place(model: PreTrainedModel) -> None:
    from trialist.models.selective_attention.swap import enable_selective_attention

    enable_selective_attention(model)


def train(
    model: PreTrainedModel,
    batches: Callable[[int], Mapping[str, Tensor]],
    context: Context,
    *,
    steps: int,
    learning_rate: float,
    dtype: str,
    evaluate: Callable[[nn.Module], Mapping[str, float]],
    evaluations: int,
    tokenizer: Any = None,
    objective: Callable[..., Any] | None = None,
    optimizer: Any = None,
    schedule: Any = None,
    over: str = "tokens",
) -> tuple[Outcome, Mapping[str, float]]:
    """Trains under a budget of steps; returns an outcome without metrics, and what `evaluate` said at the end.

    A checkpoint in the run's folder lets an interrupted run go on. evaluations: points on the learning curves.
    objective: None is cross entropy. optimizer: None is AdamW with `learning_rate`. schedule: None is a cosine after a
    twentieth of warm-up. over: unit of the cost that the curves lie over, that of the trial's budget.
    """
    from trialist.objectives import CrossEntropy
    from trialist.optimizers import adamw
    from trialist.training import Schedule, fit

    last: dict[str, float] = {}

    def remember(trained: nn.Module) -> Mapping[str, float]:
        last.clear()
        last.update(evaluate(trained))
        return dict(last)

    result = fit(
        model,
        batches,
        objective or CrossEntropy(),
        optimizer or adamw(model, learning_rate),
        schedule or Schedule("cosine", warmup=max(1, steps // 20)),
        {"steps": steps},
        evaluate=remember,
        evaluate_every=max(1, steps // evaluations),
        autocast=None if dtype == "float32" else dtype,
        checkpoint=context.folder / "checkpoint",
        checkpoint_every=max(1, steps // 5) if steps >= 1000 else None,
        seed=context.stream("dropout"),
        progress=context.progress,
    )
    if context.keep_model and result.diverged is None:
        save(model, tokenizer, context.model_folder)
    per_step = result.cost[over] / max(result.steps, 1)
    curves = {name: tuple((step * per_step, value) for step, value in points) for name, points in result.curves.items()}
    outcome = Outcome(
        curves=curves,
        cost=Cost(**{unit: value for unit, value in result.cost.items() if unit in Cost.__dataclass_fields__}),
        diverged=result.diverged,
    )
    return outcome, last


def save(model: PreTrainedModel, tokenizer: Any, folder: Path) -> None:
    """A Hugging Face folder; LoRA adapters are merged into the weights."""
    merged = model.merge_and_unload() if hasattr(model, "merge_and_unload") else model
    merged.save_pretrained(folder)
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)
