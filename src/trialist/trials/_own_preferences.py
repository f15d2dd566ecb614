"""The user's own preferences in a trial: read, cut to a length, split by prompt; and what a reader should know of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import TYPE_CHECKING, Any

from trialist.trials._language_model import model_context

if TYPE_CHECKING:
    from trialist.data.preferences import PreferencePair
    from trialist.trials.d2po import D2POTrial

Pairs = Mapping[str, "list[PreferencePair]"]


def own_pairs(trial: D2POTrial, tokenizer: Any) -> tuple[Pairs, tuple[str, ...]]:
    """The user's rows, split by prompt, at most `pairs` to train on and `test_items` of each other part; and what is to be
    said of them.

    Raises what `read_preferences` and `encode_preferences` raise, and ValueError for rows too few to be split.
    """
    from trialist.data.corpora import Documents
    from trialist.data.preferences import encode_preferences, notes, read_preferences
    from trialist.data.splits import split_documents

    rows = read_preferences(trial.data, columns=trial.columns, split=trial.split, max_examples=trial.max_examples)
    found, counts = encode_preferences(
        rows, tokenizer, max_length=trial.length, context=model_context(trial.model), source=trial.data
    )
    texts = tuple(tokenizer.decode(pair.prompt) for pair in found)
    splits = split_documents(Documents(tuple(map(str, range(len(found)))), texts, trial.data))
    most = {"train": trial.pairs, "validation": trial.test_items, "test": trial.test_items}
    pairs = {part: [found[int(index)] for index in getattr(splits, part).ids[:size]] for part, size in most.items()}
    told = (f"{trial.data}: {note}" for note in (*notes(counts, trial.length), *splits.notes))
    return pairs, (*told, about_lengths(pairs["train"]))


def about_lengths(pairs: Sequence[PreferencePair]) -> str:
    """How the pairs stand to what the claim speaks of."""
    chosen, rejected = ([len(getattr(pair, side)) for pair in pairs] for side in ("chosen", "rejected"))
    longer = fmean([better > worse for better, worse in zip(chosen, rejected, strict=True)])
    words = (
        f"{len(pairs):,} pairs to train on: chosen answers have {fmean(chosen):.1f} tokens, rejected ones "
        f"{fmean(rejected):.1f}, and in {longer:.0%} of the pairs the chosen one is longer"
    )
    return words if longer > 0.5 else f"{words}; the claim is about pairs where it tends to be"
