"""Does freezing experts and growing new ones keep old facts while new facts are learned?"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trialist.engine.context import Context
from trialist.engine.contract import Arm, Budget, Claim, Endpoint, Outcome, Trial, Tuning
from trialist.engine.hardware import resolve_device
from trialist.trials._facts import as_tokens, fact_decoder, recall, swap_in_experts
from trialist.trials._language_model import BUILT_IN, PRELOAD, VERSIONS, check_inputs, given_model, model_inputs, train
from trialist.trials._symbols import symbol_ids

if TYPE_CHECKING:
    from torch import Tensor

    from trialist.data.key_facts import FactVocabulary

LEARNING_RATES = (3e-4, 6e-4, 1.2e-3, 2.4e-3, 5e-3, 1e-2)
GIVEN_LEARNING_RATES = (1e-5, 3e-5, 1e-4, 3e-4, 1e-3, 3e-3)
BASE_LEARNING_RATE, GIVEN_BASE_LEARNING_RATE = 5e-3, 3e-4
LOOKS = 20
"""Readings of both recalls during training"""
BASE = "base"
"""Stream names that every run of a seed shares, so that the base is trained once"""


@dataclass(frozen=True)
class LifelongExpertsTrial(Trial):
    """Does freezing a PEER layer's experts and growing new ones keep old facts while new ones are learned?"""

    claim = Claim(
        statement="A trained model that learns new facts in newly grown experts, with all else frozen, has forgotten fewer old "
        "facts when it knows the new ones than a model that trains on.",
        source="arXiv:2407.04153",
        reported="suggested in the paper (lifelong learning by adding experts), without numbers",
        endpoint=Endpoint("kept", unit="share of facts", better="higher", margin=0.1),
        secondary=(
            Endpoint("old_recall", unit="share of facts", better="higher"),
            Endpoint("new_recall", unit="share of facts", better="higher"),
        ),
    )
    budget = Budget("tokens")
    tuning = Tuning(tries=6, metric=Endpoint("kept", unit="share of facts", better="higher"))
    presets = {
        "tiny": dict(seeds=3, about="about a minute a run on one core, and two for the base of each seed"),
        "real": dict(model="smollm2-135m-instruct", old_facts=3_000, new_facts=1_000, batch=64, base_steps=600, steps=200,
                     experts=16_384, grown=25_600, expert_heads=8, top_k=16, key_dim=128, expert_scale=10.0, seeds=3,
                     about="continued training of a given model, hours on 2 cores"),
        "gpu": dict(layers=4, width=256, heads=8, keys=1024, old_facts=300_000, new_facts=100_000, batch=8192, base_steps=4_000,
                    steps=1_500, experts=65_536, grown=102_400, expert_heads=8, top_k=16, key_dim=128, seeds=6,
                    about="under an hour on one GPU"),
    }  # fmt: skip
    preload = (*PRELOAD, "trialist.data.key_facts")
    versions = VERSIONS
    usage = (
        "from trialist.models import PEER\n"
        "layer = PEER(hidden_size=256, num_experts=64**2)  # train it, then\n"
        'layer.freeze("experts+keys+query")\n'
        "layer.grow(96)"
    )

    model: str = BUILT_IN
    """Hub id, local folder or asset of a model that learns the old facts first, with a PEER layer put into it; `decoder` trains
    small ones from scratch"""
    layer: int | None = None
    """Layer of a given model whose feed-forward is swapped; by default the middle one (in the built-in decoder the last)"""
    layers: int = 2
    """Layers of the built-in decoder"""
    width: int = 64
    """Width of the built-in decoder"""
    heads: int = 4
    """Attention heads of the built-in decoder"""
    experts: int = 4096
    """Experts when the old facts are learned, a perfect square"""
    grown: int = 9216
    """Experts after growth, a perfect square"""
    expert_heads: int = 4
    """Retrieval heads of the PEER layer"""
    top_k: int = 8
    """Experts that each retrieval head uses for a token"""
    key_dim: int = 32
    """Width of a retrieval query, even"""
    old_facts: int = 16_000
    """Facts that the base learns"""
    new_facts: int = 4_000
    """Facts that are learned afterwards, without the old ones"""
    keys: int = 256
    """Symbols of each of the two keys of a fact"""
    classes: int = 16
    """There are classes^2 values"""
    batch: int = 1024
    """Facts in a step"""
    base_steps: int = 800
    """Training steps on the old facts"""
    steps: int = 400
    """Training steps on the new facts, most of them"""
    learned: float = 0.9
    """Recall of the new facts at which the recall of the old ones is read"""
    base_learning_rate: float | None = None
    """Peak learning rate on the old facts; by default 5e-3 for the built-in decoder and 3e-4 for a given model"""
    learning_rate: float = 1e-3
    """Peak learning rate on the new facts where nothing was tuned"""
    expert_scale: float = 4.0
    """Learning rate of the experts over that of all else"""
    device: str = "auto"
    """`auto`, `cpu` or `cuda`"""
    dtype: str = "float32"
    """float32, or bfloat16 for autocast"""

    @property
    def vocabulary(self) -> FactVocabulary:
        from trialist.data.key_facts import FactVocabulary

        return FactVocabulary(self.keys, self.classes)

    @property
    def settings(self) -> dict[str, Any]:
        return {"num_experts": self.experts, "num_heads": self.expert_heads, "top_k": self.top_k, "key_dim": self.key_dim,
                "learning_rate_scale": self.expert_scale}  # fmt: skip

    def check(self) -> None:
        check_inputs(
            self.model, self.dtype, 0, layers=self.layers, width=self.width, heads=self.heads, old_facts=self.old_facts,
            new_facts=self.new_facts, batch=self.batch, base_steps=self.base_steps, steps=self.steps,
        )  # fmt: skip
        if self.model == BUILT_IN and self.width % self.heads:
            raise ValueError(f"--width {self.width} must be a multiple of --heads {self.heads}")
        if self.old_facts + self.new_facts > self.keys**2:
            raise ValueError(
                f"--old-facts {self.old_facts} and --new-facts {self.new_facts}: {self.keys} keys make only {self.keys**2} pairs"
            )
        if not 0 < self.learned < 1:
            raise ValueError(f"--learned must be between 0 and 1, not {self.learned}")
        if self.classes < 2:
            raise ValueError(f"--classes must be at least 2, not {self.classes}")
        from trialist.models.peer.layer import check_peer, sides_of

        check_peer(**self.settings)
        if sides_of(self.grown, None)[0] <= math.isqrt(self.experts):
            raise ValueError(f"--grown {self.grown} must be more than --experts {self.experts}")

    def digests(self) -> Mapping[str, str]:
        return model_inputs(self.model, self.device)

    def arms(self) -> Iterator[Arm]:
        tune = {"learning_rate": LEARNING_RATES if self.model == BUILT_IN else GIVEN_LEARNING_RATES}
        controls = {
            "fine-tune": (False, "all", "everything goes on training"),
            "fine-tune-grown": (True, "all", "new experts, and everything goes on training"),
            "experts-only": (
                True,
                "experts",
                "new experts; old and new experts and sub-keys train, all else is frozen",
            ),
        }
        for setting, null in (("new facts", False), ("old facts again", True)):
            for name, (grow, trained, about) in controls.items():
                if not null or name == "fine-tune":
                    options = {"learning_rate": self.learning_rate, "grow": grow, "trained": trained}
                    yield Arm(name, "control", setting, null, options=options, tune=None if null else tune, about=about)
            options = {"learning_rate": self.learning_rate, "grow": True, "trained": "new"}
            yield Arm("freeze-and-grow", "treatment", setting, null, options=options, tune=None if null else tune,
                      about="new experts and sub-keys train, all that was there is frozen")  # fmt: skip

    def facts(self, context: Context) -> list[Tensor]:
        from trialist.data.key_facts import draw_facts

        return draw_facts([self.old_facts, self.new_facts], seed=context.stream("facts"), vocabulary=self.vocabulary)

    def train_on(
        self,
        model: Any,
        facts: Tensor,
        context: Context,
        *,
        stream: str,
        steps: int,
        learning_rate: float,
        evaluate: Any,
        evaluations: int = 1,
    ) -> tuple[Outcome, Mapping[str, float]]:
        from trialist.data.key_facts import FactBatches

        device, symbols = resolve_device(self.device), self.symbols(model)
        batches = FactBatches(facts, self.batch, context.stream(stream))
        return train(
            model, lambda step: as_tokens(batches(step), symbols, device), context, steps=steps, learning_rate=learning_rate,
            dtype=self.dtype, evaluate=evaluate, evaluations=evaluations,
        )  # fmt: skip

    def symbols(self, model: Any) -> Any:
        """A token id for each symbol of the facts."""
        return symbol_ids(model.config.get_text_config(decoder=True).vocab_size, self.vocabulary.size)

    def untrained(self, context: Context) -> Any:
        """What learns the old facts: a fresh decoder, or the given model, with a PEER layer."""
        if self.model != BUILT_IN:
            return given_model(
                context, self.model, device=self.device, lora=0,
                adapt=lambda model: swap_in_experts(model, self.layer, self.settings, context.stream("init")),
            )  # fmt: skip
        return fact_decoder(
            context, device=self.device, vocab_size=self.vocabulary.size, layers=self.layers, width=self.width,
            heads=self.heads, ffn_types=["swiglu"] * (self.layers - 1) + ["peer"], peer=self.settings,
        )  # fmt: skip

    def build_base(self, context: Context, folder: Path) -> None:
        """Fills a stage with a model that knows the old facts."""
        model = self.untrained(context)
        rate = self.base_learning_rate or (BASE_LEARNING_RATE if self.model == BUILT_IN else GIVEN_BASE_LEARNING_RATE)
        scratch = dataclasses.replace(context, folder=folder / "training", keep_model=False)
        outcome, _ = self.train_on(
            model, self.facts(context)[0], scratch, stream=f"{BASE} data_order", steps=self.base_steps,
            learning_rate=rate, evaluate=lambda _: {},
        )  # fmt: skip
        if outcome.diverged is not None:
            raise ValueError(f"the base diverged ({outcome.diverged}); lower --base-learning-rate, which is {rate}")
        model.save_pretrained(folder / "model")

    def run(self, arm: Arm, seed: int, context: Context) -> Outcome:
        from trialist.models.loading import load_model

        device, afterwards = resolve_device(self.device), {"steps", "learned", "learning_rate", "grown"}
        fields = [name for name in self.__dataclass_fields__ if name not in {"model", "device", *afterwards}]
        inputs = (seed, *model_inputs(self.model, self.device).values(), *(getattr(self, name) for name in fields))
        base = context.stage(BASE, inputs, functools.partial(self.build_base, context))
        model = load_model(str(base / "model"), device=device)
        symbols = self.symbols(model)
        old, new = self.facts(context)
        of_base = recall(model, old, symbols, device)["recall"]
        self.prepare(model, arm, context.stream("init"))

        def evaluate(trained: Any) -> dict[str, float]:
            return {
                f"{name}_recall": recall(trained, facts, symbols, device)["recall"]
                for name, facts in (("old", old), ("new", new))
            }

        before = evaluate(model)
        outcome, last = self.train_on(
            model, old if arm.null else new, context, stream="data_order", steps=self.steps,
            learning_rate=arm["learning_rate"], evaluate=evaluate, evaluations=LOOKS,
        )  # fmt: skip
        if outcome.diverged is not None:
            return outcome
        grown = f", {before['old_recall']:.3f} once grown" if arm["grow"] else ""
        note = f"{arm.name}, seed {seed}: recall of the old facts was {of_base:.3f} before{grown}"
        outcome = dataclasses.replace(outcome, metrics=last, notes=(note,))
        if arm.null:
            return dataclasses.replace(outcome, metrics={**last, "kept": last["old_recall"]})
        olds, news = (
            [before[name], *(value for _, value in outcome.curves[name])] for name in ("old_recall", "new_recall")
        )
        kept = when_learned(olds, news, self.learned)
        if kept is None:
            reason = f"the recall of the new facts ended at {last['new_recall']:.3f}, below --learned {self.learned}"
            return dataclasses.replace(outcome, undefined={"kept": reason})
        return dataclasses.replace(outcome, metrics={**last, "kept": kept})

    def prepare(self, model: Any, arm: Arm, seed: int) -> None:
        """Grows the pool and freezes what the arm does not train."""
        import torch

        from trialist.models.peer.feed_forward import grow_experts, peer_layers

        layers = peer_layers(model).values()
        if arm["trained"] != "all":
            model.requires_grad_(False)
            for layer in layers:
                layer.freeze("experts+keys+query")
        if arm["grow"]:
            grow_experts(model, math.isqrt(self.grown), torch.Generator().manual_seed(seed))
        if arm["trained"] == "experts":
            for layer in layers:
                for parameter in (*layer.keys, *layer.down, *layer.up):
                    parameter.requires_grad_(True)


def when_learned(old: Sequence[float], new: Sequence[float], learned: float) -> float | None:
    """Recall of the old facts where that of the new ones first reaches `learned`, between two looks on a straight line; None
    where it never does."""
    for at, value in enumerate(new):
        if value >= learned:
            if at == 0:
                return old[0]
            share = (learned - new[at - 1]) / (value - new[at - 1])
            return old[at - 1] + share * (old[at] - old[at - 1])
    return None
