"""A preference pair in one row, and the log-probabilities of its two answers, from two sequences or from one.

    row             prompt | chosen | rejected | padding
    two sequences   prompt | chosen   and   prompt | rejected
    one sequence    prompt without its last token | last, chosen | last, rejected

In the one sequence the branches do not see each other, and the positions of the second go on from the prompt as those of the
first do. The prompt's last token stands at the head of both, as it is what predicts their first tokens.

Sequences are packed: as many behind each other as fit into the length of the longest, none of which sees another. Lengths of
pairs differ so much that padded to the longest about half of the work would be padding.

B pairs, L tokens of a row; N packed rows, T tokens of such a row
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from trialist.data.packing import IGNORED, pack_whole
from trialist.data.preferences import PreferencePair
from trialist.models.attention_interface import plain_model
from trialist.models.documents import keeps_documents_apart
from trialist.models.flops import flops_per_token
from trialist.models.scoring import selected_logprobs

PROMPT, CHOSEN, REJECTED = 1, 2, 3
"""Values of `segments`; 0 is padding"""
PROBE = (5, 4, 3), (2, 2, 2), (1, 2, 2)
"""Tokens of prompt, chosen and rejected of the pairs that are tried out; the last two fit into a row behind each other"""

Row = dict[str, np.ndarray]


def preference_row(pair: PreferencePair) -> Row:
    """`input_ids` and `segments`, int64 of equal length: prompt, chosen, rejected."""
    parts = (pair.prompt, pair.chosen, pair.rejected)
    return {
        "input_ids": np.concatenate([np.asarray(part, np.int64) for part in parts]),
        "segments": np.repeat((PROMPT, CHOSEN, REJECTED), [len(part) for part in parts]),
    }


def answer_logprobs(model: nn.Module, input_ids: Tensor, segments: Tensor, *, share_prompt: bool = False) -> Tensor:
    """log p of every answer token given its prompt and the answer before it, in nats, at the token's place in `(B, L)`;
    0 elsewhere.

    input_ids, segments: `(B, L)`, in each row prompt, chosen, rejected, padding on either side.
    share_prompt: from one sequence for each pair. Else from two, which are padded where the model does not keep packed ones
        apart.
    Raises ValueError that names the row where a prompt has no token, and for `share_prompt` with a model that is not one of
    those that `shares_prompts` finds able to.
    """
    if segments.shape != input_ids.shape:
        raise ValueError(
            f"segments have shape {tuple(segments.shape)}, input_ids {tuple(input_ids.shape)}; give equal shapes"
        )
    if share_prompt and not shares_prompts(model):
        raise ValueError(
            f"share_prompt: {type(plain_model(model)).__name__} cannot compute a prompt once for both answers (recurrent "
            "layers, an attention window, or a kernel that takes no mask of its own); set share_prompt to False"
        )
    return _logprobs(model, input_ids, segments, share_prompt, share_prompt or packs_sequences(model))


def shares_prompts(model: nn.Module) -> bool:
    """Whether the model scores pairs from one sequence as it does from two: tried out once on three short pairs.

    Not so: recurrent layers, attention windows, kernels that take no mask of their own; and models so far from any text that
    seeing the other answer makes no difference, which cannot tell.
    """
    return _tried(model, _shares)


def packs_sequences(model: nn.Module) -> bool:
    """Whether the model keeps packed sequences apart by positions that restart: tried out once."""
    return _tried(model, _packs)


def sharing_cost(model: nn.Module, rows: Sequence[Mapping[str, np.ndarray]], batch: int = 1) -> float:
    """FLOPs of scoring rows from one sequence a pair over those from two sequences, `batch` neighbours at a time.

    The one has fewer tokens, but each attends over a longer row: with short prompts and long answers it is above 1. Where
    `flops_per_token` has no rule for a layer, tokens are counted.
    """
    sizes = np.array([np.bincount(row["segments"], minlength=REJECTED + 1)[PROMPT:] for row in rows])
    prompt, chosen, rejected = sizes.T  # (rows,)
    try:
        body = plain_model(model).base_model
        whole = flops_per_token(body, 1)
        seen = flops_per_token(body, 2) - whole  # of a token, for each token of the row that it stands in
    except ValueError:
        whole, seen = 1.0, 0.0
    starts = np.arange(0, len(sizes), batch)

    def cost(tokens: np.ndarray, lengths: np.ndarray) -> float:
        longest = np.maximum.reduceat(lengths, starts)
        return float((np.add.reduceat(tokens, starts) * (whole + seen * (longest - 1))).sum())

    one = sizes.sum(-1) + 1
    return cost(one, one) / cost(one - 1 + prompt, prompt + np.maximum(chosen, rejected))


# sequences in rows


@dataclass(frozen=True)
class PackedSequences:
    """Sequences of a batch of pairs, in rows; each `(N, T)`."""

    places: np.ndarray
    """Where a token stands in the flattened batch, int64"""
    sequence: np.ndarray
    """Which sequence it belongs to; -1 is padding"""
    branch: np.ndarray
    """Whether all of its sequence behind it may see it (`PROMPT`), or that of its own answer"""
    position: np.ndarray
    """Position in its sequence, in branches counted on from the prompt; 0 in padding"""
    scored: np.ndarray
    """bool, the tokens of answers"""


def _packed(segments: np.ndarray, share: bool, together: bool) -> PackedSequences:
    """together: several sequences in a row, else one, padded to the longest."""
    found: list[tuple[np.ndarray, np.ndarray, np.ndarray]] = []  # places, branches, positions of each sequence
    for row, kinds in enumerate(segments):
        prompt, *answers = (np.flatnonzero(kinds == kind) for kind in (PROMPT, CHOSEN, REJECTED))
        size = len(prompt)
        if size == 0:
            raise ValueError(f"row {row}: its prompt has no token, so nothing predicts the first of an answer")
        first = row * len(kinds)
        if share:
            chosen, rejected = answers
            places = np.concatenate([prompt, chosen, prompt[-1:], rejected])
            lengths = (size - 1, 1 + len(chosen), 1 + len(rejected))
            branches = np.repeat((PROMPT, CHOSEN, REJECTED), lengths)
            positions = np.concatenate([np.arange(size + len(chosen)), size - 1 + np.arange(1 + len(rejected))])
            found.append((first + places, branches, positions))
        else:
            for answer in answers:
                places = np.concatenate([prompt, answer])
                found.append((first + places, np.full(len(places), PROMPT), np.arange(len(places))))
    places, branches, positions = (np.concatenate(column) for column in zip(*found, strict=True))
    slots, sequence = _rows([len(one) for one, _, _ in found], together)
    real = sequence >= 0
    return PackedSequences(
        places[slots],
        sequence,
        branches[slots],
        positions[slots] * real,
        (segments.ravel()[places] > PROMPT)[slots] & real,
    )


def _rows(sizes: Sequence[int], together: bool) -> tuple[np.ndarray, np.ndarray]:
    """For sequences behind each other: which of their tokens stands in a slot (any in padding), and which sequence."""
    ends = np.cumsum(sizes)
    if together:
        packed = pack_whole([np.arange(end - size, end) for size, end in zip(sizes, ends, strict=True)], max(sizes))
        return packed.tokens.astype(np.int64), packed.documents.numpy()
    inside = np.arange(max(sizes))
    real = inside < np.array(sizes)[:, None]  # (N, T)
    return np.where(real, (ends - sizes)[:, None] + inside, 0), np.where(real, np.arange(len(sizes))[:, None], -1)


def _logprobs(model: nn.Module, input_ids: Tensor, segments: Tensor, share: bool, together: bool) -> Tensor:
    packed = _packed(segments.cpu().numpy(), share, together)

    def there(values: np.ndarray) -> Tensor:
        return torch.from_numpy(values).to(input_ids.device)

    ids, scored = input_ids.flatten()[there(packed.places)], there(packed.scored)  # (N, T)
    if share:
        mask = branch_mask(there(packed.branch), there(packed.sequence), _dtype_of_mask(model))
        logps = selected_logprobs(model, ids, mask, scored, position_ids=there(packed.position))  # (N, T - 1)
    elif together:
        labels = ids.masked_fill(~scored, IGNORED)
        logps = selected_logprobs(model, ids, position_ids=there(packed.position), labels=labels)
    else:
        logps = selected_logprobs(model, ids, there(packed.sequence >= 0).long(), scored)
    slots = there(np.flatnonzero(packed.scored[:, 1:]))
    places = there(packed.places[:, 1:][packed.scored[:, 1:]])
    found = logps.new_zeros(input_ids.numel()).scatter(0, places, logps.flatten()[slots])
    return found.view(input_ids.shape)


def branch_mask(branch: Tensor, sequence: Tensor, dtype: torch.dtype) -> Tensor:
    """Who sees whom, `(N, 1, T, T)`: what came before in its sequence, of the prompt and of the own branch. Padding sees
    itself alone.

    dtype: bool, or that of a mask to be added.
    """
    T = branch.shape[1]
    query, key = branch[:, :, None], branch[:, None, :]
    sees = torch.ones(T, T, dtype=torch.bool, device=branch.device).tril()
    sees = sees & (sequence[:, :, None] == sequence[:, None, :]) & (sequence >= 0)[:, None, :]
    sees &= (key == PROMPT) | (key == query)
    sees |= torch.eye(T, dtype=torch.bool, device=branch.device)
    if dtype == torch.bool:
        return sees[:, None]
    return torch.zeros(sees.shape, dtype=dtype, device=sees.device).masked_fill(~sees, torch.finfo(dtype).min)[:, None]


def _text_config(model: nn.Module) -> Any:
    """That of the language model, which models of several modalities keep inside their own."""
    return plain_model(model).config.get_text_config(decoder=True)


def _dtype_of_mask(model: nn.Module) -> torch.dtype:
    """Kernels of torch choose by a bool mask; eager attention adds the mask up."""
    eager = getattr(_text_config(model), "_attn_implementation", None) == "eager"
    return next(model.parameters()).dtype if eager else torch.bool


# what a model can do, tried out

Probe = Callable[[Any], bool]
_TRIED: weakref.WeakKeyDictionary[nn.Module, dict[tuple[Probe, Any], bool]] = weakref.WeakKeyDictionary()


def _tried(model: nn.Module, probe: Probe) -> bool:
    """What the probe finds in eval mode, without gradients, in the precision of the weights; found once for a model and an
    implementation of attention."""
    plain = plain_model(model)
    known, key = _TRIED.setdefault(plain, {}), (probe, getattr(_text_config(plain), "_attn_implementation", None))
    if key not in known:
        device = next(plain.parameters()).device
        modes = {module: module.training for module in plain.modules()}
        plain.eval()
        try:
            with (
                torch.no_grad(),
                torch.autocast(device.type, enabled=False),
                torch.random.fork_rng(devices=[device] if device.type == "cuda" else []),
            ):
                known[key] = probe(plain)
        finally:
            for module, mode in modes.items():
                module.training = mode
    return known[key]


def _shares(model: Any) -> bool:
    if _windowed(model):
        return False
    embedding = model.get_input_embeddings().weight
    rows = [np.repeat((PROMPT, CHOSEN, REJECTED), sizes) for sizes in PROBE]
    longest = max(map(len, rows))
    segments = torch.from_numpy(np.stack([np.pad(row, (0, longest - len(row))) for row in rows])).to(embedding.device)
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(_vocabulary(model), segments.shape, generator=generator).to(embedding.device)
    two = _logprobs(model, ids, segments, share=False, together=False)
    try:
        one = _logprobs(model, ids, segments, share=True, together=True)
    except (TypeError, RuntimeError, ValueError):  # a model that takes no positions, or no such mask
        return False
    joined = selected_logprobs(model, ids, (segments > 0).long(), segments > PROMPT)  # rejected answers see chosen ones
    behind = (segments[:, 1:] == REJECTED) & (
        segments[:, :-1] == REJECTED
    )  # the first also has another token before it
    leak = float((joined - two[:, 1:])[behind].abs().max())
    return leak > 8 * torch.finfo(embedding.dtype).eps and float((one - two).abs().max()) <= 0.05 * leak


def _packs(model: Any) -> bool:
    return keeps_documents_apart(model, _vocabulary(model) - 1, model.get_input_embeddings().weight.device)


def _vocabulary(model: Any) -> int:
    """Tokens that can be read; of embeddings whose rows are spread over ranks too."""
    embeddings = model.get_input_embeddings()
    return getattr(embeddings, "num_embeddings", None) or len(embeddings.weight)


def _windowed(model: nn.Module) -> bool:
    """Whether some layer sees a window only: a whole mask takes its place, and short probes cannot tell."""
    config = _text_config(model)
    kinds: Iterable[str] = getattr(config, "layer_types", None) or getattr(config, "attention_layers", None) or ()
    window = getattr(config, "sliding_window", None) and getattr(config, "use_sliding_window", True)
    return any(word in kind for kind in kinds for word in ("sliding", "chunked", "local")) if kinds else bool(window)
