"""The transforms `selective-attention` and `prune-context`: options, progress, and what is shown at the end."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from trialist.weights.context_text import ModelAndText, bits_per_byte, nats_per_token, rows_for

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Say = Callable[[str], None]


@dataclass(frozen=True, kw_only=True)
class SelectiveAttentionTransform(ModelAndText):
    """Give a model selective attention: one head a layer says which tokens the others need no longer see.

    No weight is added or changed; the settings stand in config.json, and load_model opens the folder with them. A pretrained
    model gets worse at first, as its heads were not trained to select: train it on, for example with `trialist train sft`.
    """

    output: str
    """New folder for the model"""
    selector_head: tuple[int, ...] | Literal["auto"] = (0,)
    """Head that selects, one for all layers or one a layer; auto takes in each layer the one that would hide least of the data"""
    layers: tuple[int, ...] | None = None
    """Layers that get it; without it all"""
    protect_bos: bool = True
    """Never hide the first token of a text"""
    data: str | None = None
    """Text on which `auto` chooses, and on which bits per byte are measured before and after: Hub id, local file or folder"""

    def __call__(self, say: Say = print) -> Mapping[str, Any]:
        """Writes the folder and returns what to show: the heads, and what the change costs on the text."""
        from trialist.data.samples import sample_text
        from trialist.models import enable_selective_attention

        if self.selector_head == "auto" and self.data is None:
            raise ValueError("--selector-head auto chooses the heads on a text; name one with --data")
        length = self.row_length()
        documents = None if self.data is None else self.documents(self.data)
        model, tokenizer = self.loaded()
        with saved_to(self.output, model) as save:
            heads = (
                self.selector_head
                if self.selector_head == "auto" or len(self.selector_head) > 1
                else self.selector_head[0]
            )
            choices: dict[str, Any] = {"protect_bos": self.protect_bos, "layers": self.layers}
            shown = {}
            if documents is None:
                enable_selective_attention(model, heads, **choices)
            else:
                sample = sample_text(documents, tokenizer, tokens=self.tokens, length=length)
                rows = rows_for(model, sample)
                say(f"{sample.rows.scored:,} tokens of {self.data}")
                before = bits_per_byte(model, rows, sample.bytes, batch=self.batch)
                enable_selective_attention(model, heads, **choices, inputs=rows["input_ids"][: self.batch])
                after = bits_per_byte(model, rows, sample.bytes, batch=self.batch)
                shown["bits per byte"] = f"{before:.4f} before, {after:.4f} after"
            save(tokenizer)
        chosen = model.config.selective_attention
        pairs = ", ".join(f"{layer}: {head}" for layer, head in zip(chosen["layers"], chosen["selector_head"]))
        return {"selector head of layer": pairs, **shown, "model": self.output}


@dataclass(frozen=True, kw_only=True)
class PruneContext(ModelAndText):
    """Find how few tokens each layer can keep in its cache, on a text of yours, and save the model with these budgets.

    Budgets are found greedily on one half of the text that is read and checked on the other. Give text of the kind that the
    model was trained on, at least as long as the contexts to come, and none that results are reported on.
    """

    data: str
    """Text: Hub id, local .txt, .jsonl or .parquet file or folder, or a built-in name (python-stdlib, enwik8)"""
    output: str
    """New folder for the model"""
    total: int | None = None
    """Cut until so many tokens are left, summed over the layers"""
    target: float | None = None
    """Cut as long as the model stays at so many bits per byte or below, such as those of a model without pruning"""
    within: float | None = None
    """Cut as long as the model loses at most so many bits per byte"""
    policy: Literal["selective", "h2o", "recency"] | None = None
    """What goes first: what selective attention masked most; what received least attention; the oldest. Without it selective
    where the model has selective attention, else h2o"""
    sinks: int = 4
    """First tokens that stay under recency"""
    recent_share: float = 0.5
    """Share of the budget that goes to the most recent tokens under h2o"""
    step: int = 8
    """Smallest cut of a layer's budget, in tokens"""
    search: Literal["lazy", "greedy"] = "lazy"
    """Greedy tries every layer before every cut, each a pass over the text; lazy only those that can be the next one, by what
    their last try did"""

    def __post_init__(self) -> None:
        super().__post_init__()
        goals = {name: getattr(self, name) for name in ("total", "target", "within")}
        given = [f"--{name}" for name, value in goals.items() if value is not None]
        if len(given) != 1:
            raise ValueError(f"give exactly one of --total, --target and --within, not {' and '.join(given) or 'none'}")
        for name, value in goals.items():
            if value is not None and not value > 0:
                raise ValueError(f"--{name} must be > 0, not {value}")
        if self.step < 1:
            raise ValueError(f"--step must be at least 1, not {self.step}")

    def __call__(self, say: Say = print) -> Mapping[str, Any]:
        """Writes the folder and returns what to show: the budgets, and cache and bits per byte with everything and with them."""
        from trialist.data.samples import sample_halves
        from trialist.models import calibrate_budgets, kv_bytes, set_budgets

        length, documents = self.row_length(), self.documents(self.data)
        model, tokenizer = self.loaded()
        with saved_to(self.output, model) as save:
            fitted, checked = sample_halves(documents, tokenizer, tokens=self.tokens, length=length)
            rows, others = rows_for(model, fitted), rows_for(model, checked)
            say(
                f"{fitted.rows.scored:,} tokens of {self.data} to find budgets on, {checked.rows.scored:,} others to check them "
                f"on, in rows of {length}"
            )
            self.choose_policy(model)
            set_budgets(model, None)
            goal: dict[str, Any] = {"total": self.total}
            if self.total is None:
                full = bits_per_byte(model, rows, fitted.bytes, batch=self.batch)
                bits = self.target if self.within is None else full + self.within
                assert bits is not None
                if full > bits:
                    raise ValueError(
                        f"--target {bits}: the model is at {full:.4f} bits per byte with everything in its cache; give more"
                    )
                goal = {"target": nats_per_token(bits, rows, fitted.bytes)}
            row = rows["input_ids"][:1]
            sizes, qualities = [kv_bytes(model, row)], [bits_per_byte(model, others, checked.bytes, batch=self.batch)]
            calibrate_budgets(
                model, rows, **goal, step=self.step, batch_size=self.batch, search=self.search, progress=tenths(say)
            )
            sizes.append(kv_bytes(model, row))
            qualities.append(bits_per_byte(model, others, checked.bytes, batch=self.batch))
            save(tokenizer)
        return {
            **{f"layer {layer}": f"keeps {budget_words(budget)}" for layer, budget in budgets_by_layer(model).items()},
            "bytes of cache": f"{sizes[1]:,.0f} instead of {sizes[0]:,.0f} after {row.shape[1]:,} tokens, "
            f"{sizes[0] / sizes[1]:.1f} times fewer",
            "bits per byte": f"{qualities[1]:.4f} instead of {qualities[0]:.4f}, on text that no budget was found on",
            "model": self.output,
        }

    def choose_policy(self, model: PreTrainedModel) -> None:
        """Enables the policy in the model, in place of what it evicted by before."""
        from trialist.models import disable_eviction, enable_eviction, get_budgets

        if getattr(model.config, "eviction", None) is not None and self.policy is not None:
            disable_eviction(model)
        able = bool(get_budgets(model))
        if self.policy == "selective" and not able:
            raise ValueError(
                f"--policy selective: {self.model} has no selective attention; give it some with `trialist apply "
                "selective-attention` and train it, or choose h2o or recency"
            )
        if self.policy in ("h2o", "recency") or not able:
            policy = self.policy or "h2o"
            options: dict[str, Any] = (
                {"sinks": self.sinks} if policy == "recency" else {"recent_share": self.recent_share}
            )
            enable_eviction(model, policy, **options)


@contextlib.contextmanager
def saved_to(output: str, model: PreTrainedModel) -> Iterator[Callable[[Any], None]]:
    """A function that saves the model with a tokenizer; the folder `output` is refused at the start or there whole at the end."""
    from trialist.weights.writing import folder_written_whole

    if getattr(model, "_hf_peft_config_loaded", False):
        raise ValueError(f"{model.name_or_path} has an adapter, which would be saved without its model; merge it first")
    size = sum(parameter.nbytes for parameter in model.parameters())
    with folder_written_whole(Path(output), size) as folder:

        def save(tokenizer: Any) -> None:
            model.save_pretrained(folder)
            tokenizer.save_pretrained(folder)

        yield save


def budgets_by_layer(model: PreTrainedModel) -> dict[int, int | None]:
    """Layer -> tokens that it keeps, None for all, of the layers that can evict."""
    from trialist.models import get_budgets
    from trialist.models.eviction.policies import evicting_modules

    return dict(zip((int(module.layer_idx) for module in evicting_modules(model)), get_budgets(model), strict=True))


def budget_words(budget: int | None) -> str:
    return "everything" if budget is None else f"{budget:,} tokens"


def tenths(say: Say) -> Callable[[float, float, Mapping[str, float]], None]:
    """A report of the calibration that is said at every tenth of the way."""
    told = [0]

    def report(done: float, total: float, numbers: Mapping[str, float]) -> None:
        if total and int(10 * done / total) > told[0]:
            told[0] = int(10 * done / total)
            say(f"{numbers['tokens']:,.0f} tokens left over all layers, {numbers['loss']:.4f} nats a token")

    return report
