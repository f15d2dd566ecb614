"""What the trial of guided decoding does with a model: texts by every way of decoding, and readings of them.

An arm says `way`: "sharpened" (the model in the context at a temperature), "best-of-2" (two such texts, of which the one stays
that the context makes more likely), "token" or "two_step" (guided, with `strength`); and `top_p`, the nucleus that it samples.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from trialist.engine.contract import Arm

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class Request:
    """A prompt without and with its principle, as token ids."""

    plain: tuple[int, ...]
    context: tuple[int, ...]


@dataclass(frozen=True)
class Written:
    """The texts, up to and with their end token where they have one, and the rows that forward passes decoded for them."""

    texts: list[list[int]]
    forwards: int


def write(
    model: PreTrainedModel,
    requests: Sequence[Request],
    arm: Arm,
    *,
    temperature: float,
    mask: float,
    most: int,
    batch: int,
    end: int | Sequence[int],
    pad: int,
    seed: int,
    told: Callable[[int], None] = lambda done: None,
) -> Written:
    """A text for each request, of at most `most` tokens.

    mask: share of the largest probability that candidates of guided arms have. told: is called with the number of texts that are
    done. All arms sample with the same random numbers.
    """
    import torch

    from trialist.decoding.options import generate

    ends = {end} if isinstance(end, int) else set(end)
    sampled = {
        "do_sample": True, "temperature": temperature, "top_k": 0, "top_p": arm["top_p"], "max_new_tokens": most,
        "eos_token_id": sorted(ends), "pad_token_id": pad, "num_return_sequences": 2 if arm["way"] == "best-of-2" else 1,
        "repetition_penalty": 1.0, "use_cache": True,
    }  # fmt: skip
    texts: list[list[int]] = []
    forwards = 0
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        for start in range(0, len(requests), batch):
            part = requests[start : start + batch]
            option = guidance(arm, [request.context for request in part], mask)
            inputs = padded([request.plain for request in part], pad, model.device)
            found = generate(model, [option], **inputs, **sampled)[:, inputs["input_ids"].shape[1] :]
            own = [cut(row, ends) for row in found.tolist()]
            forwards += sum(map(len, own)) * sum(option.needed)
            if arm["way"] == "best-of-2":
                forwards += len(own)
                own = likelier(model, part, own, pad)
            texts += own
            told(len(texts))
    return Written(texts, forwards)


def guidance(arm: Arm, contexts: Sequence[Sequence[int]], mask: float) -> Any:
    """The option with which an arm decodes."""
    from trialist.decoding.guidance.option import ContrastiveGuidance

    if arm["way"] in ("sharpened", "best-of-2"):
        return ContrastiveGuidance([contexts], 0.0)
    return ContrastiveGuidance([contexts], arm["strength"], reward=arm["way"], mask_alpha=mask)


def likelier(
    model: PreTrainedModel, requests: Sequence[Request], texts: Sequence[list[int]], pad: int
) -> list[list[int]]:
    """Of two texts a request the one with the larger log-ratio in the context and without: the evidence that guidance uses."""
    twice = [request for request in requests for _ in range(2)]
    contexts, plain = ([getattr(request, name) for request in twice] for name in ("context", "plain"))
    gains = [
        a - b
        for a, b in zip(
            log_likelihoods(model, contexts, texts, pad), log_likelihoods(model, plain, texts, pad), strict=True
        )
    ]
    return [texts[2 * row + (gains[2 * row + 1] > gains[2 * row])] for row in range(len(requests))]


def log_likelihoods(
    model: PreTrainedModel, prompts: Sequence[Sequence[int]], texts: Sequence[Sequence[int]], pad: int
) -> list[float]:
    """Log-probability of each text after its prompt, in nats."""
    import torch

    from trialist.models.scoring import selected_logprobs

    inputs = padded([[*prompt, *text] for prompt, text in zip(prompts, texts, strict=True)], pad, model.device)
    T = inputs["input_ids"].shape[1]
    lengths = torch.tensor([len(text) for text in texts], device=model.device)
    scored = torch.arange(T, device=model.device) >= T - lengths[:, None]  # texts stand at the right
    with torch.no_grad():
        found = selected_logprobs(model, **inputs, completion_mask=scored)
    return found.sum(-1).tolist()


def padded(rows: Sequence[Sequence[int]], pad: int, device: Any) -> dict[str, Any]:
    """`input_ids` and `attention_mask`, padded on the left."""
    import torch

    T = max(map(len, rows))
    ids = torch.tensor([[pad] * (T - len(row)) + list(row) for row in rows], device=device)
    mask = torch.tensor([[0] * (T - len(row)) + [1] * len(row) for row in rows], device=device)
    return {"input_ids": ids, "attention_mask": mask}


def cut(row: Sequence[int], ends: set[int]) -> list[int]:
    """The tokens up to the first end token, which stays."""
    for place, token in enumerate(row):
        if token in ends:
            return list(row[: place + 1])
    return list(row)


def distinct(texts: Sequence[Sequence[int]], n: int = 2) -> float:
    """Share of different n-grams among those of all texts; 0 where there are none."""
    grams = [tuple(text[place : place + n]) for text in texts for place in range(len(text) - n + 1)]
    return len(set(grams)) / len(grams) if grams else 0.0
