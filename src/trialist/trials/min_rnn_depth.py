"""Does a minimal RNN need depth to select by context? Selective copying by number of layers, at equal parameters."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

if TYPE_CHECKING:
    from trialist.data.memory_tasks import MemoryTask

from trialist.engine.context import Context
from trialist.engine.contract import Arm, Budget, Claim, Endpoint, Outcome, Trial, Tuning
from trialist.engine.hardware import resolve_device
from trialist.trials._equal_parameters import parameters, widened
from trialist.trials._language_model import PRELOAD, VERSIONS, check_inputs, new_decoder, train
from trialist.trials._symbols import accuracy, mean_loss

FACTORS = (0.5, 1.0, 2.0)
"""Of the learning rate, tried for every arm"""
VALIDATION, EVALUATION = 31_001, 31_002
"""Seeds of the generated items that tune and that decide; the same items for every seed and arm"""
MIXERS = ("min_gru", "min_lstm")


@dataclass(frozen=True)
class MinRNNDepthTrial(Trial):
    """Does a stack of minGRU layers copy selectively where one layer of equal parameters cannot?"""

    claim = Claim(
        statement="Gates that see the input only cannot select by context in one layer: at equal parameters, and against one "
        "layer of twice the parameters, a stack of minGRU layers solves more of selective copying.",
        source="arXiv:2410.01201",
        reported="accuracy with 1, 2 and 3 layers 37.0, 96.8 and 99.5 % (minGRU) and 37.7, 85.7 and 96.0 % (minLSTM), at 4096 "
        "tokens with 16 values",
        endpoint=Endpoint("accuracy", unit="share of answers", better="higher", margin=0.1),
    )
    budget = Budget("tokens")
    tuning = Tuning(tries=3, metric=Endpoint("validation_loss", unit="nats", better="lower"))
    presets = {
        "tiny": dict(seeds=3, about="about 10 minutes for the copying and 2 for parity on 2 cores"),
        "gpu": dict(layers=3, length=512, values=16, batch=64, steps=10_000, test_items=2048, seeds=6,
                    about="an hour on one GPU"),
        "paper": dict(layers=3, expansion=6.0, length=4096, values=16, symbols=14, spread_memories=False, batch=64,
                      learning_rate=3e-4, steps=400_000, test_items=2048, seeds=3,
                      about="the paper's sizes, start and learning rate, without its dropout and convolution; GPU days"),
    }  # fmt: skip
    preload = (*PRELOAD, "trialist.data.memory_tasks")
    versions = VERSIONS
    usage = (
        "from trialist.models import ModularDecoderConfig, ModularDecoderForCausalLM\n"
        'config = ModularDecoderConfig(num_hidden_layers=3, layer_types=["min_gru"] * 3)\n'
        "model = ModularDecoderForCausalLM(config)"
    )

    mixer: str = "min_gru"
    """`min_gru` or `min_lstm`"""
    layers: int = 3
    """Layers of the treatment; the controls have one"""
    width: int = 64
    """Width of the residual stream"""
    expansion: float = 2.0
    """State over stream width in the treatment"""
    length: int = 128
    """Tokens among which the values stand"""
    values: int = 12
    """Values to copy"""
    symbols: int = 8
    """Of how many a value is one"""
    spread_memories: bool = True
    """Start with memories spread from 2 to `length` tokens, not as the paper, where all forget half at every token"""
    bits: int = 64
    """Bits of the negative control, parity; the second half of them is asked"""
    batch: int = 32
    """Sequences in a step"""
    steps: int = 600
    """Training steps"""
    learning_rate: float = 6e-3
    """Peak learning rate where nothing was tuned; tuning tries half and double too"""
    test_items: int = 512
    """Test sequences"""
    device: str = "auto"
    """`auto`, `cpu` or `cuda`"""
    dtype: str = "float32"
    """float32, or bfloat16 for autocast"""

    def check(self) -> None:
        check_inputs(
            "decoder", self.dtype, 0, width=self.width, length=self.length, values=self.values, bits=self.bits,
            batch=self.batch, steps=self.steps, test_items=self.test_items,
        )  # fmt: skip
        if self.mixer not in MIXERS:
            raise ValueError(f"--mixer {self.mixer!r}: one of {', '.join(MIXERS)}")
        if self.layers < 2:
            raise ValueError(f"--layers {self.layers} must be at least 2: the controls have one layer")
        if self.values > self.length:
            raise ValueError(f"--values {self.values} do not fit into --length {self.length}")
        if self.symbols < 2:
            raise ValueError(f"--symbols {self.symbols} must be at least 2: a value is one of them, and so is a bit")
        if self.width % 8:
            raise ValueError(f"--width {self.width} must be a multiple of 8")
        if not self.expansion > 0:
            raise ValueError(f"--expansion {self.expansion} must be above 0")

    def digests(self) -> Mapping[str, str]:
        return {"device": resolve_device(self.device)}

    def arms(self) -> Iterator[Arm]:
        def arm(name: str, role: str, setting: str, about: str, **options: Any) -> Arm:
            rates = tuple(factor * self.learning_rate for factor in FACTORS)
            return Arm(
                name, role, setting, setting == "parity", about=about,  # type: ignore[arg-type]
                options={"layers": 1, "times": 1.0, "mixer": self.mixer, "learning_rate": self.learning_rate, **options},
                tune={"learning_rate": rates} if setting == "selective-copying" else None,
            )  # fmt: skip

        for setting in ("selective-copying", "parity"):
            copying = setting == "selective-copying"
            yield arm("one-layer", "control", setting, "one layer as wide as it takes for the parameters of `deep`")
            if copying:
                yield arm("one-layer-double", "control", setting, "one layer of twice the parameters", times=2.0)
                if self.layers > 2:
                    yield arm("two-layers", "reference", setting, "two layers with the parameters of `deep`", layers=2)
            yield arm("deep", "treatment", setting, f"{self.layers} layers", layers=self.layers)
            yield arm("gru", "reference", setting, "one layer of GRU, whose gates see its state", mixer="gru")
            if copying:
                yield arm(
                    "attention", "reference", setting, "two layers of attention", layers=2, mixer="full_attention"
                )

    def run(self, arm: Arm, seed: int, context: Context) -> Outcome:
        from trialist.data.memory_tasks import MemoryBatches

        device = resolve_device(self.device)
        model = new_decoder(context, device=device, **self.architecture(arm["layers"], arm["mixer"], arm["times"]))
        parity = arm.setting == "parity"
        length = self.bits if parity else self.length

        def items(batch: int, seed: int, first: int = 1) -> MemoryBatches:
            return MemoryBatches(cast("MemoryTask", arm.setting), batch, seed, length, self.values, first, self.symbols)

        def batch_of(source: MemoryBatches, step: int) -> dict[str, Any]:
            return {name: tensor.to(device) for name, tensor in source(step).items()}

        training = items(self.batch, context.stream("data_order"))
        late = self.bits // 2 if parity else 1
        test = items(min(self.batch, self.test_items), EVALUATION, first=late)
        validation = items(self.batch, VALIDATION, first=late)

        def score(_: Any) -> dict[str, float]:
            count = -(-self.test_items // test.batch_size)
            return {"accuracy": sum(accuracy(model, batch_of(test, step)) for step in range(count)) / count}

        outcome, last = train(
            model,
            lambda step: batch_of(training, step),
            context,
            steps=self.steps,
            learning_rate=arm["learning_rate"],
            dtype=self.dtype,
            evaluate=score,
            evaluations=5,
        )
        if outcome.diverged is not None:
            return outcome
        loss = mean_loss(model, [batch_of(validation, step) for step in range(16)])
        notes = (remark,) if parity and (remark := remark_on_parity(arm, last["accuracy"])) else ()
        return dataclasses.replace(outcome, metrics={**last, "validation_loss": loss}, notes=notes)

    def architecture(self, layers: int, mixer: str, times: float) -> dict[str, Any]:
        """What `new_decoder` builds: `times` the parameters of the treatment, whatever the number of layers."""
        from trialist.data.memory_tasks import vocabulary_size

        def recurrence(mixer: str, wider: float) -> dict[str, Any] | None:
            if mixer == "full_attention":
                return None
            # a convolution would let the gates see their neighbours
            settings: dict[str, Any] = {"expansion": self.expansion * wider, "conv_kernel": None}
            if mixer in MIXERS and self.spread_memories:
                # from the paper's start, which forgets half of the state at every token, one layer learns later still
                settings["gate_bias_init"] = [2, max(2, self.length)]
            return settings

        def fields(layers: int, mixer: str, wider: float) -> dict[str, Any]:
            return {
                "vocab_size": vocabulary_size(self.symbols),
                "hidden_size": self.width,
                "intermediate_size": round(2 * self.width * wider),
                "num_hidden_layers": layers,
                "num_attention_heads": 4,
                "layer_types": [mixer] * layers,
                "min_rnn": recurrence(mixer, wider),
                "max_position_embeddings": self.length + self.values + self.bits + 1,
            }

        deep = fields(self.layers, self.mixer, 1.0)
        if (layers, mixer, times) == (self.layers, self.mixer, 1.0):
            return deep
        wanted = round(times * parameters(deep))
        wider = times * self.layers / layers
        chosen = fields(layers, mixer, wider)
        while parameters(chosen) > wanted:  # a GRU has weights on its state too
            wider *= 0.98
            chosen = fields(layers, mixer, wider)
        return widened(chosen, least=wanted)


def remark_on_parity(arm: Arm, accuracy: float) -> str | None:
    """What the negative control shows only where it holds: minimal RNNs at chance, and a GRU that learns it."""
    if arm["mixer"] in MIXERS and accuracy > 0.6:
        return (
            f"the negative control is none: {arm.name} answered {accuracy:.2f} of parity, which its gates cannot track"
        )
    if arm["mixer"] == "gru" and accuracy < 0.95:
        return f"the negative control says little: gru, which can learn parity, answered {accuracy:.2f} of it in so few steps"
    return None
