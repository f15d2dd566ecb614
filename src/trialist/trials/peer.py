"""Does a PEER layer store more facts than a dense feed-forward of equal FLOPs, the routing counted?"""

from __future__ import annotations

import dataclasses
import functools
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from trialist.engine.context import Context
from trialist.engine.contract import Arm, Budget, Claim, Endpoint, Outcome, Trial, Tuning
from trialist.engine.hardware import resolve_device
from trialist.trials._facts import LENGTH, SCORED, as_tokens, dense_width, fact_decoder, recall, swap_in_experts
from trialist.trials._language_model import BUILT_IN, PRELOAD, VERSIONS, check_inputs, given_model, model_inputs, train
from trialist.trials._symbols import symbol_ids

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from trialist.data.key_facts import FactVocabulary, Kind

LEARNING_RATES = (1e-3, 2e-3, 4e-3, 8e-3, 1.6e-2, 3.2e-2)
PEER_LEARNING_RATES, EXPERT_SCALES = (2e-3, 5e-3, 1.2e-2), (1.0, 4.0)
POOL = 4
"""Times the experts in the reference with more of them; a square"""
GIVEN_LEARNING_RATES = (1e-5, 3e-5, 1e-4, 3e-4, 1e-3, 3e-3)
GIVEN_PEER_LEARNING_RATES, GIVEN_EXPERT_SCALES = (3e-5, 1e-4, 3e-4), (1.0, 10.0)


@dataclass(frozen=True)
class PEERTrial(Trial):
    """Does a PEER layer, a mixture of a million experts of one neuron, store more facts than a dense layer of equal FLOPs?"""

    claim = Claim(
        statement="At equal FLOPs, the routing counted, a decoder with a PEER layer recalls more of the facts it was trained "
        "on than one with dense feed-forwards only.",
        source="arXiv:2407.04153",
        reported="C4 perplexity at equal FLOPs: dense 23.84 against PEER 20.63 (6e18), 18.31 against 16.45 (2e19); fact recall "
        "is our small stand-in, where what is stored is all that counts",
        endpoint=Endpoint("recall", unit="share of facts", better="higher", margin=0.05, floor=0.02),
        secondary=(
            Endpoint("loss", unit="nats per fact", better="lower"),
            Endpoint("usage", unit="share of experts", better="higher"),
            Endpoint("unevenness", unit="nats", better="lower"),
        ),
    )
    budget = Budget("flops")
    tuning = Tuning(tries=6, metric=Endpoint("loss", unit="nats per fact", better="lower"))
    presets = {
        "tiny": dict(seeds=3, about="about a minute a run on one core"),
        "real": dict(model="smollm2-135m-instruct", facts=4_000, batch=64, steps=500, experts=16_384, expert_heads=8, top_k=16,
                     key_dim=128, seeds=3, about="continued training of a given model, hours on 2 cores"),
        "gpu": dict(layers=4, width=256, heads=8, keys=1024, facts=600_000, batch=8192, steps=5_000, experts=65_536,
                    expert_heads=8, top_k=16, key_dim=128, seeds=6, about="under an hour on one GPU"),
    }  # fmt: skip
    preload = (*PRELOAD, "trialist.data.key_facts")
    versions = VERSIONS
    usage = (
        "from trialist.models import ModularDecoderConfig, ModularDecoderForCausalLM\n"
        'config = ModularDecoderConfig(num_hidden_layers=2, ffn_types=["swiglu", "peer"], peer={"num_experts": 4096})\n'
        "model = ModularDecoderForCausalLM(config)"
    )

    model: str = BUILT_IN
    """Hub id, local folder or asset of a model whose training is continued; `decoder` trains small ones from scratch"""
    layer: int | None = None
    """Layer of a given model whose feed-forward is swapped; by default the middle one (in the built-in decoder the last)"""
    layers: int = 2
    """Layers of the built-in decoder"""
    width: int = 64
    """Width of the built-in decoder"""
    heads: int = 4
    """Attention heads of the built-in decoder"""
    experts: int = 4096
    """Experts of the PEER layer, a perfect square"""
    expert_heads: int = 4
    """Retrieval heads of the PEER layer"""
    top_k: int = 8
    """Experts that each retrieval head uses for a token"""
    key_dim: int = 32
    """Width of a retrieval query, even"""
    facts: int = 30_000
    """Facts to be learned, at most keys^2"""
    keys: int = 256
    """Symbols of each of the two keys of a fact"""
    classes: int = 16
    """There are classes^2 values; in the null setting a value follows from the classes of its keys"""
    batch: int = 1024
    """Facts in a step"""
    steps: int = 600
    """Training steps"""
    learning_rate: float = 4e-3
    """Peak learning rate where nothing was tuned"""
    expert_scale: float = 4.0
    """Learning rate of the experts over that of all else, where nothing was tuned"""
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
        return {
            "num_experts": self.experts,
            "num_heads": self.expert_heads,
            "top_k": self.top_k,
            "key_dim": self.key_dim,
        }

    def check(self) -> None:
        check_inputs(
            self.model, self.dtype, 0, layers=self.layers, width=self.width, heads=self.heads, facts=self.facts,
            keys=self.keys, batch=self.batch, steps=self.steps,
        )  # fmt: skip
        if self.facts > self.keys**2:
            raise ValueError(f"--facts {self.facts}: {self.keys} keys make only {self.keys**2} pairs; raise --keys")
        if self.classes < 2:
            raise ValueError(f"--classes must be at least 2, not {self.classes}")
        if self.model == BUILT_IN and self.width % self.heads:
            raise ValueError(f"--width {self.width} must be a multiple of --heads {self.heads}")
        from trialist.models.peer.layer import check_peer

        check_peer(**self.settings)

    def digests(self) -> Mapping[str, str]:
        return model_inputs(self.model, self.device)

    def remarks(self) -> tuple[str, ...]:
        if self.model == BUILT_IN:
            return ()
        return ("the control is the given model as it is, with at least the FLOPs of the swapped one; arms of other dense widths "
                "and the references are left out",)  # fmt: skip

    def arms(self) -> Iterator[Arm]:
        scratch = self.model == BUILT_IN
        dense = {"learning_rate": LEARNING_RATES if scratch else GIVEN_LEARNING_RATES}
        sparse = {
            "learning_rate": PEER_LEARNING_RATES if scratch else GIVEN_PEER_LEARNING_RATES,
            "expert_scale": EXPERT_SCALES if scratch else GIVEN_EXPERT_SCALES,
        }
        common = {"learning_rate": self.learning_rate, "expert_scale": self.expert_scale, "experts": self.experts,
                  "query_norm": "batchnorm", "equal_seconds": False}  # fmt: skip
        treated = {**common, "ffn": "peer"}
        used = f"{self.expert_heads * self.top_k} used for a token"
        for setting, null in (("facts", False), ("rule", True)):
            kinds = ("swiglu", "gelu") if scratch and not null else ("swiglu",)
            for kind in kinds if scratch else ("dense",):
                about = f"dense feed-forwards ({kind}) of equal FLOPs" if scratch else "the given model"
                yield Arm(kind, "control", setting, null, options={**common, "ffn": kind}, tune=None if null else dense,
                          about=about)  # fmt: skip
            yield Arm("peer", "treatment", setting, null, options=treated, tune=None if null else sparse,
                      about=f"{self.experts} experts in one layer, {used}")  # fmt: skip
        if scratch:
            yield Arm("large", "reference", "facts", options={**common, "ffn": "large"}, tune=dense,
                      about="dense feed-forwards (swiglu) of equal parameters, at many times the FLOPs")  # fmt: skip
            yield Arm("longer", "reference", "facts", options={**common, "ffn": "swiglu", "equal_seconds": True},
                      tuned_as="swiglu", about="swiglu, trained for as many steps as fit into the seconds of peer")  # fmt: skip
            more = POOL * self.experts
            yield Arm("more-experts", "reference", "facts", options={**treated, "experts": more}, tuned_as="peer",
                      about=f"{more} experts, {used}, at a few more FLOPs for their sub-keys")  # fmt: skip
            yield Arm("no-query-norm", "reference", "facts", options={**treated, "query_norm": "none"},
                      tuned_as="peer", about="peer without batch normalisation of the queries")  # fmt: skip

    def build(self, arm: Arm, context: Context, device: str) -> PreTrainedModel:
        """The model of an arm, with initial weights."""
        from trialist.models.flops import flops_per_token
        from trialist.models.loading import count_parameters

        settings = {**self.settings, "num_experts": arm["experts"], "query_norm": arm["query_norm"],
                    "learning_rate_scale": arm["expert_scale"]}  # fmt: skip
        if self.model != BUILT_IN:
            adapt = self.swap(settings, context.stream("init")) if arm["ffn"] == "peer" else None
            return given_model(context, self.model, device=device, lora=0, adapt=adapt)
        size = {"vocab_size": self.vocabulary.size, "layers": self.layers, "width": self.width, "heads": self.heads}
        kinds = ["swiglu"] * (self.layers - 1) + ["peer"]
        treated = fact_decoder(context, device=device, **size, ffn_types=kinds, peer=settings)
        if arm["ffn"] == "peer":
            return treated
        kind = "gelu" if arm["ffn"] == "gelu" else "swiglu"
        quantity = count_parameters if arm["ffn"] == "large" else lambda model: flops_per_token(model, LENGTH)
        width = dense_width(kind, treated, quantity)
        return fact_decoder(context, device=device, **size, ffn_types=[kind] * self.layers, intermediate_size=width)

    def swap(self, settings: dict[str, Any], seed: int) -> Any:
        """What puts a PEER layer into a given model; ValueError where it would compute more than the layer that it replaces."""

        def adapt(model: PreTrainedModel) -> None:
            from trialist.models.flops import flops_per_token

            before = flops_per_token(model, LENGTH)
            layer = swap_in_experts(model, self.layer, settings, seed)
            if flops_per_token(model, LENGTH) > before:
                raise ValueError(
                    f"with --experts {self.experts} --expert-heads {self.expert_heads} --top-k {self.top_k} --key-dim "
                    f"{self.key_dim} the PEER layer needs more FLOPs than the feed-forward of layer {layer} of {self.model}; "
                    "lower some of them"
                )

        return adapt

    def steps_of(self, arm: Arm, context: Context, device: str) -> int:
        """Steps of an arm; one of equal seconds makes as many as fit into the time of the treatment on this machine."""
        if not arm["equal_seconds"]:
            return self.steps
        sizes = ("layers", "width", "heads", "experts", "expert_heads", "top_k", "key_dim", "keys", "classes", "batch",
                 "dtype")  # fmt: skip
        inputs = (device, context.threads, *(getattr(self, name) for name in sizes))
        folder = context.stage("pace", inputs, functools.partial(self.measure_pace, context, device))
        return max(1, round(self.steps * json.loads((folder / "pace.json").read_text())))

    def measure_pace(self, context: Context, device: str, folder: Path) -> None:
        """Fills a stage: the seconds of a step of the treatment over those of a dense decoder of equal FLOPs."""
        from trialist.data.key_facts import FactBatches, draw_facts
        from trialist.trials._pace import step_seconds

        arms = {arm.name: arm for arm in self.arms() if not arm.null}
        peer, dense = (self.build(arms[name], context, device) for name in ("peer", "swiglu"))
        (facts,) = draw_facts([self.facts], seed=context.stream("facts"), vocabulary=self.vocabulary)
        symbols = symbol_ids(self.vocabulary.size, self.vocabulary.size)
        batch = as_tokens(FactBatches(facts, self.batch, context.stream("data_order"))(0), symbols, device)
        ours, theirs = step_seconds([peer, dense], batch, self.dtype)
        (folder / "pace.json").write_text(json.dumps(ours / theirs))

    def run(self, arm: Arm, seed: int, context: Context) -> Outcome:
        from trialist.data.key_facts import FactBatches, draw_facts, fact_batch
        from trialist.models.peer.feed_forward import peer_metrics

        device = resolve_device(self.device)
        model = self.build(arm, context, device)
        symbols = symbol_ids(model.config.get_text_config(decoder=True).vocab_size, self.vocabulary.size)
        (facts,) = draw_facts(
            [self.facts], seed=context.stream("facts"), kind="rule" if arm.null else cast("Kind", "random"),
            vocabulary=self.vocabulary,
        )  # fmt: skip
        training = FactBatches(facts, self.batch, context.stream("data_order"))
        steps = self.steps_of(arm, context, device)
        outcome, last = train(
            model,
            lambda step: as_tokens(training(step), symbols, device),
            context,
            steps=steps,
            learning_rate=arm["learning_rate"],
            dtype=self.dtype,
            evaluate=lambda trained: recall(trained, facts, symbols, device),
            evaluations=4,
            over="flops",
        )
        if outcome.diverged is not None:
            return outcome
        notes: tuple[str, ...] = ()
        use = {"usage": 1.0, "unevenness": 0.0}  # of a dense layer, where every neuron has weight 1
        if arm["ffn"] == "peer":
            batches = (as_tokens(fact_batch(part), symbols, device) for part in facts.split(SCORED))
            (use,) = peer_metrics(model, batches).values()
            told = f"{use['usage']:.1%} of the experts used, unevenness {use['unevenness']:.2f} nats"
            notes = (f"{arm.name}, seed {seed}: {told}",)
        if arm["equal_seconds"]:
            notes = (f"{arm.name}, seed {seed}: {steps} steps in the time of {self.steps} of peer",)
        measured = {name: use[name] for name in ("usage", "unevenness")}
        return dataclasses.replace(outcome, metrics={**last, **measured}, notes=notes)
