"""A classifier that tells from a prompt's last keys and values how many steps of decoding need the higher precision.

Architecture: arXiv 2410.13461. Departures from its code: it is trained on what it reads when it serves, the keys and values of a
prompt; one softmax, within the cross entropy; any batch, with padding masked; no row is repeated to balance classes, and the
report is on prompts that neither training nor the choice of the epoch saw, beside what the frequencies of the classes alone
would reach.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import Cache

# R rows, P columns of prompts, H key-value heads, D their width, C classes

SHARES = (0.7, 0.15)
"""Of the prompts, for training and for the choice of the epoch; the others are for the report"""
LEAST_PROMPTS = 20
"""Prompts below which no split leaves something to report"""


class PrecisionClassifier(nn.Module):
    """H x H learned queries attend to the keys of a prompt, averaged over its heads; an MLP reads what they find."""

    def __init__(self, heads: int, width: int, classes: int, dropout: float = 0.1) -> None:
        super().__init__()
        self.heads, self.width, self.classes, self.rate = heads, width, classes, dropout
        self.probes = nn.Parameter(torch.empty(heads, heads, width))
        nn.init.xavier_normal_(self.probes)
        self.dropout = nn.Dropout(dropout)
        whole = heads * width
        self.mlp = nn.Sequential(nn.LayerNorm(whole), nn.Linear(whole, whole), nn.ReLU(), nn.Linear(whole, classes))

    @property
    def sizes(self) -> dict[str, float]:
        """What it is built from."""
        return {"heads": self.heads, "width": self.width, "classes": self.classes, "dropout": self.rate}

    def forward(self, keys: Tensor, values: Tensor, mask: Tensor) -> Tensor:
        """Logits (R, C).

        keys, values: (R, P, D), means over heads. mask: (R, P), 0 where there is padding.
        """
        keys, values = keys.float(), values.float()
        scores = torch.einsum("hqd,rpd->rhqp", self.probes, keys) / math.sqrt(self.width)
        weights = scores.masked_fill(~mask.bool()[:, None, None], -math.inf).softmax(-1)
        found = torch.einsum("rhqp,rpd->rhqd", self.dropout(weights), values).mean(2)  # (R, H, D)
        return self.mlp(found.transpose(1, 2).flatten(1))


def last_layer(cache: Cache | None, rows: int, columns: int) -> tuple[Tensor, Tensor]:
    """Keys and values (R, H, n, D) of the last layer of a cache that holds prompts of `columns` tokens and nothing more; n is
    less than that in a layer with a sliding window. Raises ValueError for any other cache."""
    from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer, StaticLayer

    layer = None if cache is None or not cache.layers else cache.layers[-1]
    if type(layer) not in (DynamicLayer, DynamicSlidingWindowLayer, StaticLayer):
        kind = "no cache" if layer is None else type(layer).__name__
        raise ValueError(
            f"a learned schedule reads the keys and values of the prompt from an ordinary cache, and here is {kind}; use a "
            "static schedule with this cache"
        )
    keys, values = layer.keys, layer.values  # type: ignore[union-attr]
    if keys is None or values is None or len(keys) != rows:
        raise ValueError(
            f"a learned schedule reads one row of the cache for each of the {rows} rows of the batch, and the cache has "
            f"{0 if keys is None else len(keys)} (guidance keeps those of all contexts); use a static schedule"
        )
    if type(layer) is StaticLayer:
        keys, values = keys[:, :, :columns], values[:, :, :columns]
    elif type(layer) is DynamicLayer and keys.shape[2] != columns:
        raise ValueError(f"the cache holds {keys.shape[2]} tokens of a prompt of {columns}; use a static schedule")
    return keys, values


@dataclass(frozen=True, eq=False)
class PromptExample:
    """A prompt as the classifier sees it, and the class it should find."""

    keys: Tensor
    """(P, D) float32"""
    values: Tensor
    label: int
    prompt: str
    """What tells prompts apart: equal ones are never split between training and report"""


@dataclass(frozen=True)
class ClassifierReport:
    """What a classifier says of prompts that it was not trained on, against the frequencies of the classes."""

    train: int
    validation: int
    test: int
    counts: tuple[int, ...]
    """Prompts of each class"""
    nats: float
    """Mean cross entropy on the test prompts"""
    prior_nats: float
    accuracy: float
    prior_accuracy: float
    gain_low: float | None
    """95 % interval of prior_nats - nats over the test prompts; None where there are too few"""
    gain_high: float | None

    @property
    def better_than_prior(self) -> bool:
        return self.gain_low is not None and self.gain_low > 0

    def words(self) -> str:
        spread = (
            "no interval" if self.gain_low is None else f"95 % interval {self.gain_low:+.3f} to {self.gain_high:+.3f}"
        )
        head = "better than prior" if self.better_than_prior else "no better than prior"
        return (
            f"{head}: {self.prior_nats - self.nats:+.3f} nats ({spread}), accuracy {self.accuracy:.2f} against "
            f"{self.prior_accuracy:.2f}, on {self.test} test prompts; classes {list(self.counts)}"
        )


def fit_classifier(
    examples: Sequence[PromptExample],
    *,
    heads: int,
    classes: int,
    epochs: int = 60,
    learning_rate: float = 1e-3,
    weight_decay: float = 0.01,
    dropout: float = 0.1,
    batch: int = 32,
    seed: int = 0,
    say: Callable[[str], None] | None = None,
) -> tuple[PrecisionClassifier, ClassifierReport]:
    """The classifier of the epoch with the least cross entropy on validation prompts, in eval mode, and its report.

    Raises ValueError for fewer than 20 different prompts, and for labels that are no class.
    """
    if wrong := [example.label for example in examples if not 0 <= example.label < classes]:
        raise ValueError(f"label {wrong[0]}: classes are 0 to {classes - 1}")
    train, validation, test = _split(examples, seed)
    device = examples[0].keys.device
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        model = PrecisionClassifier(heads, examples[0].keys.shape[1], classes, dropout).to(device)
        best, state = math.inf, {name: x.clone() for name, x in model.state_dict().items()}
        optimizer = torch.optim.AdamW(model.parameters(), learning_rate, weight_decay=weight_decay)
        for epoch in range(epochs):
            model.train()
            for part in torch.randperm(len(train)).split(batch):
                keys, values, mask, labels = _collated([train[at] for at in part.tolist()])
                optimizer.zero_grad()
                nn.functional.cross_entropy(model(keys, values, mask), labels).backward()
                optimizer.step()
            found = float(_nats(model, validation, batch)[0].mean())
            if found < best:
                best, state = found, {name: x.clone() for name, x in model.state_dict().items()}
            if say is not None and (epoch + 1) % max(1, epochs // 5) == 0:
                say(
                    f"epoch {epoch + 1} of {epochs}: {found:.4f} nats on {len(validation)} validation prompts, best {best:.4f}"
                )
    model.load_state_dict(state)
    return model.eval(), _report(model, classes, train, validation, test, examples, batch)


def _split(examples: Sequence[PromptExample], seed: int) -> tuple[list[PromptExample], ...]:
    """Training, validation and test, prompt by prompt."""
    prompts = sorted({example.prompt for example in examples})
    if len(prompts) < LEAST_PROMPTS:
        raise ValueError(
            f"{len(prompts)} different prompts are too few to train on and to report on; give {LEAST_PROMPTS} or more"
        )
    order = torch.randperm(len(prompts), generator=torch.Generator().manual_seed(seed)).tolist()
    first = round(SHARES[0] * len(prompts))
    second = first + max(1, round(SHARES[1] * len(prompts)))
    part_of = {prompts[at]: (place >= first) + (place >= second) for place, at in enumerate(order)}
    return tuple([example for example in examples if part_of[example.prompt] == part] for part in range(3))


def _collated(examples: Sequence[PromptExample]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Keys, values (R, P, D), mask (R, P) and labels (R,), padded on the right."""
    pad = nn.utils.rnn.pad_sequence
    keys, values = (pad([getattr(e, name) for e in examples], batch_first=True) for name in ("keys", "values"))
    mask = pad([torch.ones(len(e.keys), device=e.keys.device) for e in examples], batch_first=True)
    return keys, values, mask, torch.tensor([e.label for e in examples], device=keys.device)


@torch.no_grad()
def _nats(model: PrecisionClassifier, examples: Sequence[PromptExample], batch: int) -> tuple[Tensor, Tensor]:
    """Cross entropy of each example, and whether its class is the most likely one, (R,) each."""
    model.eval()
    nats, right = [], []
    for start in range(0, len(examples), batch):
        keys, values, mask, labels = _collated(examples[start : start + batch])
        logits = model(keys, values, mask)
        nats.append(nn.functional.cross_entropy(logits, labels, reduction="none"))
        right.append(logits.argmax(-1) == labels)
    return torch.cat(nats).cpu(), torch.cat(right).cpu()


def _report(
    model: PrecisionClassifier, classes: int, train: Sequence[PromptExample], validation: Sequence[PromptExample],
    test: Sequence[PromptExample], examples: Sequence[PromptExample], batch: int,
) -> ClassifierReport:  # fmt: skip
    from scipy import stats

    seen = torch.bincount(torch.tensor([e.label for e in (*train, *validation)]), minlength=classes)
    prior = ((seen + 1) / (seen.sum() + classes)).log()  # an unseen class is not impossible
    labels = torch.tensor([e.label for e in test])
    nats, right = _nats(model, test, batch)
    gains = -prior[labels] - nats
    low = high = None
    if len(test) >= 3:
        half = float(gains.std() / math.sqrt(len(test)) * stats.t.ppf(0.975, len(test) - 1))
        low, high = float(gains.mean()) - half, float(gains.mean()) + half
    counts = torch.bincount(torch.tensor([e.label for e in examples]), minlength=classes)
    return ClassifierReport(
        len(train), len(validation), len(test), tuple(counts.tolist()), float(nats.mean()), float(-prior[labels].mean()),
        float(right.float().mean()), float((labels == seen.argmax()).float().mean()), low, high,
    )  # fmt: skip
