"""What the trials of recurrent depth share: their inputs, and models that learn to walk through a graph."""

from __future__ import annotations

import dataclasses
import functools
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trialist.engine.context import Context
from trialist.engine.contract import Cost, Outcome, Trial
from trialist.engine.hardware import resolve_device
from trialist.trials._language_model import (
    BUILT_IN,
    check_inputs,
    check_length,
    given_model,
    model_inputs,
    new_decoder,
    train,
)
from trialist.trials._walk_readings import right, share_right

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel

    from trialist.data.walks import Graph, Task, WalkBatches

VALIDATION, EVALUATION = 40_001, 40_002
"""Seeds of the generated items that tune and that decide"""
QUESTIONS = 4
"""Questions in a row of the negative control"""


@dataclass(frozen=True)
class Walker:
    """One model and its training, as fields that identify it."""

    model: str
    kind: str
    """`recurrent`; `once`, the same layers run once; `stack`, distinct layers of the training FLOPs of `recurrent`;
    `deep-stack`, of the FLOPs that `recurrent` takes to answer in twice its mean steps"""
    task: Task
    layers: tuple[int, int, int]
    """Of prelude, core and coda"""
    width: int
    heads: int
    recurrence: int
    backprop: int
    nodes: int
    letters: int
    hops: int
    batch: int
    steps: int
    learning_rate: float
    device: str
    dtype: str
    lora: int

    def graph(self, context: Context) -> Graph:
        from trialist.data.walks import Graph

        return Graph(self.nodes, self.letters, seed=context.stream("graph"))

    def batches(self, context: Context, seed: int, *, longest: int, rise: int = 0) -> WalkBatches:
        from trialist.data.walks import WalkBatches

        hops = longest if self.task == "walks" else QUESTIONS
        return WalkBatches(self.task, self.graph(context), self.batch, seed, hops, rise)

    def build(self, context: Context, longest: int) -> PreTrainedModel:
        """A fresh decoder, or a given model of which some layers are made a loop."""
        settings = {
            **dict(zip(("prelude_layers", "core_layers", "coda_layers"), self.layers, strict=True)),
            "mean_recurrence": 1 if self.kind == "once" else self.recurrence,
            "backprop_depth": self.backprop,
            "train_recurrence": "fixed" if self.kind == "once" else "poisson_lognormal",
            "seed": context.stream("recurrence"),
        }
        if self.model != BUILT_IN:
            return self._given(context, settings)
        decoder = functools.partial(
            new_decoder, context, device=self.device, vocab_size=self.graph(context).size, hidden_size=self.width,
            num_attention_heads=self.heads, norm_style="sandwich", max_position_embeddings=longest + 2,
        )  # fmt: skip
        if self.kind in ("recurrent", "once"):
            return decoder(num_hidden_layers=sum(self.layers), depth="recurrent", recurrent=settings)
        from trialist.models.flops import flops_per_token

        settings |= {"num_steps": 2 * self.recurrence}
        recurrent = decoder(num_hidden_layers=sum(self.layers), depth="recurrent", recurrent=settings)
        wanted = flops_per_token(recurrent, longest, training=self.kind == "stack")
        one, two = (flops_per_token(decoder(num_hidden_layers=layers), longest) for layers in (1, 2))
        return decoder(num_hidden_layers=1 + math.ceil((wanted - one) / (two - one)))

    def _given(self, context: Context, settings: Mapping[str, Any]) -> PreTrainedModel:
        import torch

        from trialist.models.recurrent_depth.convert import to_recurrent

        plain = given_model(context, self.model, device=self.device, lora=0 if self.kind != "stack" else self.lora)
        if self.kind == "stack":
            return plain
        further = {name: value for name, value in settings.items() if not name.endswith("_layers")}
        converted = to_recurrent(plain, *self.layers, **further)
        if not self.lora:
            return converted
        from peft import LoraConfig, get_peft_model

        torch.manual_seed(context.stream("init"))
        lora = LoraConfig(r=self.lora, lora_alpha=2 * self.lora, target_modules="all-linear")
        return get_peft_model(converted, lora)

    def symbols(self, model: PreTrainedModel, context: Context) -> Tensor:
        """The model's token id of each token of the task."""
        from trialist.trials._symbols import symbol_ids

        return symbol_ids(model.config.vocab_size, self.graph(context).size)

    def named(self, batch: Mapping[str, Tensor], symbols: Tensor) -> dict[str, Tensor]:
        labels = batch["labels"]
        named = {
            "input_ids": symbols[batch["input_ids"]],
            "labels": symbols[labels.clamp(min=0)].where(labels >= 0, labels),
        }
        return {name: tensor.to(resolve_device(self.device)) for name, tensor in named.items()}

    def train(self, context: Context, longest: int) -> tuple[PreTrainedModel, Outcome]:
        """The trained model and the outcome of its training, without metrics. Walks grow to `hops` during half of the steps."""
        model = self.build(context, longest)
        symbols = self.symbols(model, context)
        training = self.batches(context, context.stream("data_order"), longest=self.hops, rise=self.steps // 2)
        held_out = self.items(context, VALIDATION, 256, self.hops)
        outcome, _ = train(
            model,
            lambda step: self.named(training(step), symbols),
            context,
            steps=self.steps,
            learning_rate=self.learning_rate,
            dtype=self.dtype,
            evaluate=lambda trained: {"accuracy_trained_hops": share_right(right(trained, held_out, symbols))},
            evaluations=5,
        )
        return model, outcome

    def items(self, context: Context, seed: int, count: int, longest: int) -> dict[str, Tensor]:
        """At least `count` items of `longest` hops."""
        import torch

        source = self.batches(context, seed, longest=longest)
        parts = [source(step) for step in range(-(-count // self.batch))]
        return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}

    def stage(self, context: Context, longest: int) -> Path:
        """The folder of the trained model and `training.json`, shared by the arms that read it in different ways."""
        inputs = (*(getattr(self, field.name) for field in dataclasses.fields(self)), context.seed, longest)
        return context.stage("walker", inputs, functools.partial(build_stage, self, context, longest))


@dataclass(frozen=True)
class WalkTrial(Trial):
    """The inputs of a trial that trains models to walk."""

    model: str = BUILT_IN
    """Hub id, local folder or asset of a Llama, Mistral or Qwen2 of which some layers are made a loop; `decoder` trains a small
    model from scratch"""
    layers: str = "1,1,1"
    """Layers before, in and after the loop"""
    width: int = 64
    """Width of the built-in decoder"""
    heads: int = 4
    """Attention heads of the built-in decoder"""
    recurrence: int = 8
    """Mean number of steps in training; the test gives twice as many"""
    backprop: int = 4
    """Steps that gradients flow through"""
    nodes: int = 8
    """Nodes of the graph"""
    letters: int = 4
    """Letters, each a permutation of the nodes"""
    hops: int = 8
    """Most hops of a training walk; the test asks for up to twice as many"""
    batch: int = 64
    """Sequences in a step"""
    steps: int = 900
    """Training steps"""
    learning_rate: float = 1.5e-3
    """Peak learning rate; where a small decoder's is tuned, the middle one of those tried"""
    test_items: int = 512
    """Test walks, each with an answer after every hop"""
    device: str = "auto"
    """`auto`, `cpu` or `cuda`"""
    dtype: str = "float32"
    """float32, or bfloat16 for autocast"""
    lora: int = 0
    """Rank of LoRA adapters for a given model; 0 trains all weights"""

    @property
    def longest(self) -> int:
        """Hops of a test walk."""
        return self.hops

    def check(self) -> None:
        check_inputs(
            self.model, self.dtype, self.lora, width=self.width, heads=self.heads, recurrence=self.recurrence,
            backprop=self.backprop, letters=self.letters, hops=self.hops, batch=self.batch, steps=self.steps,
            test_items=self.test_items,
        )  # fmt: skip
        layer_numbers(self.layers)
        if self.nodes < 2:
            raise ValueError(f"--nodes must be at least 2, not {self.nodes}")
        if self.model != BUILT_IN:
            check_length(self.model, self.longest + 2)
        elif self.width % self.heads:
            raise ValueError(f"--width {self.width} must be a multiple of --heads {self.heads}")

    def digests(self) -> Mapping[str, str]:
        return model_inputs(self.model, self.device)

    def walker_of(self, task: Task, kind: str, learning_rate: float, **changes: Any) -> Walker:
        names = {field.name for field in dataclasses.fields(Walker)} & set(self.__dataclass_fields__)
        given = {name: getattr(self, name) for name in names}
        given |= {"layers": layer_numbers(self.layers), "device": resolve_device(self.device)}
        return Walker(**{**given, "task": task, "kind": kind, "learning_rate": learning_rate, **changes})


def layer_numbers(text: str) -> tuple[int, int, int]:
    """`prelude,core,coda`."""
    parts = text.split(",")
    if len(parts) != 3 or not all(part.strip().isdigit() for part in parts) or int(parts[1]) < 1:
        raise ValueError(
            f"--layers {text!r}: three numbers, before, in and after the loop, such as 1,2,1; at least 1 in it"
        )
    prelude, core, coda = (int(part) for part in parts)
    return prelude, core, coda


def build_stage(walker: Walker, context: Context, longest: int, folder: Path) -> None:
    """Trains and stores; a divergence is stored as well."""
    model, outcome = walker.train(context, longest)
    if outcome.diverged is None:
        merged: Any = model.merge_and_unload() if hasattr(model, "merge_and_unload") else model
        merged.save_pretrained(folder)
    stored = {"diverged": outcome.diverged, "cost": outcome.cost.as_dict(), "curves": dict(outcome.curves)}
    (folder / "training.json").write_text(json.dumps(stored))


def load_stage(folder: Path, device: str) -> tuple[PreTrainedModel | None, Outcome]:
    """The trained model, None where training diverged, and the outcome of its training."""
    from trialist.models.loading import load_model

    stored = json.loads((folder / "training.json").read_text())
    curves = {name: tuple((x, y) for x, y in points) for name, points in stored["curves"].items()}
    outcome = Outcome(curves=curves, cost=Cost(**stored["cost"]), diverged=stored["diverged"])
    if outcome.diverged is not None:
        return None, outcome
    return load_model(str(folder), device=resolve_device(device)), outcome
