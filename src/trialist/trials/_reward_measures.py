"""What a reward model is measured by: accuracy where an artefact is in the worse, in the better and in neither answer."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from statistics import fmean
from typing import Any

from trialist.engine.contract import Items
from trialist.trials._reward_data import Choice, Pairs, RewardData

Scores = Mapping[str, Sequence[float]]
CROSSED = {"inserted_accuracy": "phrase", "lengthened_accuracy": "long", "relevance_accuracy": "relevance"}
AT_ONCE = 4
"""Sequences in a pass that only scores, for each that training puts into a step"""


def scored(model: Any, data: RewardData, *, batch: int) -> dict[str, list[float]]:
    """Each pair of each test: 1 where the better answer has the higher reward, 1/2 where the rewards are equal, 0 else."""
    return {name: right(model, pairs, batch=batch) for name, pairs in data.tests.items()}


def right(model: Any, pairs: Pairs, *, batch: int) -> list[float]:
    return [1.0 if a > b else 0.5 if a == b else 0.0 for a, b in rewards_of(model, pairs, batch=batch)[0]]


def rewards_of(model: Any, pairs: Pairs, *, batch: int) -> tuple[list[tuple[float, float]], int]:
    """The rewards of both answers of each pair, and how many sequences were scored."""
    from trialist.models.reward_model import pair_rewards

    with evaluating(model) as padding:
        return pair_rewards(model, pairs, pad_token_id=padding, batch=AT_ONCE * batch)


@contextmanager
def evaluating(model: Any) -> Iterator[int]:
    """Evaluation mode for a while; gives the padding token."""
    was_training = model.training
    model.eval()
    try:
        yield model.config.get_text_config().pad_token_id
    finally:
        model.train(was_training)


def accuracies(scores: Scores, inserted: Sequence[str]) -> dict[str, float]:
    """The trial's accuracies, as far as there are tests for them.

    inserted: tests whose artefact was put in on purpose, which decide.
    An artefact is in the worse answer as often as in the better one, and the mean of both is taken: what rewarding it gains in
    the one it loses in the other, at least, and so it is with punishing it. The best is to be indifferent.
    """
    of = {name: fmean(values) for name, values in scores.items()}
    against, along = (fmean(of[f"{test}_{side}"] for test in inserted) for side in ("worse", "better"))
    crossed = {
        measure: (of[f"{test}_worse"] + of[f"{test}_better"]) / 2
        for measure, test in CROSSED.items()
        if {f"{test}_worse", f"{test}_better"} <= of.keys()
    }
    return {
        "crossed_accuracy": (against + along) / 2,
        "clean_accuracy": of["clean"],
        "against_artefacts": against,
        "with_artefacts": along,
        "artefact_pull": along - against,
        **crossed,
        "off_topic_accuracy": of["off_topic"],
        "annotated_accuracy": of["annotated"],
    }


def items_of(scores: Scores, prompts: Sequence[str]) -> dict[str, Items]:
    """Scores of the deciding measures for each row of the user's own; rows of one prompt are a cluster."""
    ids = tuple(str(number) for number in range(len(prompts)))
    places = {prompt: str(number) for number, prompt in enumerate(dict.fromkeys(prompts))}
    clusters = tuple(places[prompt] for prompt in prompts)
    crossed = tuple((a + b) / 2 for a, b in zip(scores["phrase_worse"], scores["phrase_better"], strict=True))
    return {
        "crossed_accuracy": Items(ids, crossed, clusters),
        "clean_accuracy": Items(ids, tuple(scores["clean"]), clusters),
    }


def best_of(model: Any, choices: list[Choice], *, batch: int) -> dict[str, float]:
    """Mean quality, and share of artefacts, of the answers with the highest reward."""
    if not choices:
        return {}
    from trialist.models.reward_model import sequence_rewards

    sequences = [sequence for choice in choices for sequence in choice.sequences]
    with evaluating(model) as padding:
        rewards = sequence_rewards(model, sequences, pad_token_id=padding, batch=AT_ONCE * batch).tolist()
    quality, artefacts = [], []
    for number, choice in enumerate(choices):
        own = rewards[number * len(choice.sequences) : (number + 1) * len(choice.sequences)]
        best = own.index(max(own))
        quality.append(choice.quality[best])
        artefacts.append(choice.artefacts[best])
    return {"best_of_16_quality": fmean(quality), "best_of_16_artefacts": fmean(artefacts)}
