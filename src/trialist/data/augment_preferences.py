"""Counterfactual pairs for reward models: answers to other prompts as losers, and as ties among themselves.

Ordinary pairs hold two answers to one prompt, so a reward model may learn whatever tells them apart, also what has nothing to do
with the prompt (length, format, phrases). Against answers to another prompt such artefacts are worth nothing:
every answer to the prompt beats them, and none of them beats another (arXiv 2409.13156).
"""

from __future__ import annotations

import hashlib
import itertools
import json
import random
import re
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from trialist.data.preferences import DIALOGUE_MARK, read_preferences
from trialist.data.reward_groups import label_of

Kind = Literal["original", "non_contextual", "neutral"]
KINDS: tuple[Kind, ...] = ("original", "non_contextual", "neutral")
LABELS = {"non_contextual": 1.0, "neutral": 0.5}
TURN_MARK = re.compile(r"\n\n(?:Human|Assistant):")
"""Begins a turn where a whole dialogue is one string, as in HH-RLHF"""


def augment_preferences(
    rows: Iterable[Mapping[str, Any]],
    *,
    num_donors: int = 2,
    include: Collection[str] = KINDS,
    sample_fraction: float = 0.5,
    seed: int = 0,
    avoid_similar: bool = False,
    among: Sequence[int] | None = None,
    say: Callable[[str], None] = print,
) -> list[dict[str, Any]]:
    """The pairs of each row (an anchor) with the answers of `num_donors` other rows, anchor by anchor.

    With its own two answers and those of two donors an anchor has six answers to its prompt and C(6, 2) = 15 pairs:

    - `original`, 1: chosen beats rejected, label_prob 1 (or the row's own `label_prob`), with all columns of the row.
    - `non_contextual`, 8: chosen and rejected each beat the four answers of the donors, label_prob 1.
    - `neutral`, 6: among the answers of the donors none is better, label_prob 0.5.

    One donor makes 6 pairs: 1, 4 and 1. Columns: `prompt`, `chosen`, `rejected`, `label_prob`, `pair_type`, and from which
    row prompt and answers come, from 0: `source_index`, `chosen_index`, `rejected_index`. System messages stay with the
    prompt. A donor gives its final turn of the assistant alone; turns that both answers of a row begin with belong to its
    prompt. Left out, and told to `say`, are added pairs of two answers with the same words, and non-contextual ones of an own
    answer that still has several turns: their number would tell it from a donated one.

    rows: of preferences, what `read_preferences` takes.   include: kinds of pairs that are made.
    sample_fraction: share of the pairs that are not original that is kept, drawn at random; in (0, 1].
    avoid_similar: prompts that are nearly the same text count as the same prompt, too.
    among: places of the rows to take, from 0; others are neither anchors nor donors. None takes all.

    Anchor and donors have three different prompts (two with one donor). Each row donates once for each donor number, unless
    one prompt has more than a third (half) of the rows: then some donate more often. Which row donates to which depends on
    contents and `seed` alone, not on the order of the rows.
    Raises ValueError for fewer than num_donors + 1 distinct prompts, a label_prob outside [0, 1], arguments out of range, and
    rows that are augmented already; and the errors of `read_preferences`.
    """
    return list(
        augmented_pairs(
            rows, num_donors=num_donors, include=include, sample_fraction=sample_fraction, seed=seed,
            avoid_similar=avoid_similar, among=among, say=say,
        )
    )  # fmt: skip


def augmented_pairs(
    rows: Iterable[Mapping[str, Any]],
    *,
    num_donors: int,
    include: Collection[str],
    sample_fraction: float,
    seed: int,
    avoid_similar: bool,
    among: Sequence[int] | None,
    say: Callable[[str], None],
) -> Iterator[dict[str, Any]]:
    """What `augment_preferences` returns, pair by pair as they are asked for; the errors come at once."""
    if num_donors not in (1, 2):
        raise ValueError(f"num_donors must be 1 or 2, not {num_donors}")
    if not 0 < sample_fraction <= 1:
        raise ValueError(f"sample_fraction must be above 0 and at most 1, not {sample_fraction}")
    if unknown := sorted(set(include) - set(KINDS)):
        raise ValueError(f"include: {unknown[0]!r} is no kind of pair; choose from {', '.join(KINDS)}")
    read = read_preferences(rows)
    for number, row in enumerate(read, start=1):
        if row.get("pair_type") is not None:
            raise ValueError(f"row {number} has a pair_type ({row['pair_type']!r}): these rows are augmented already")
        label_of(row, f"row {number}")
    taken = list(range(len(read))) if among is None else list(among)
    anchors = {index: _with_shared_turns_asked(read[index]) for index in taken}
    chosen = choose_donors(
        [prompt_text(row) for row in anchors.values()],
        [_identity(row) for row in anchors.values()],
        num_donors=num_donors,
        seed=seed,
        avoid_similar=avoid_similar,
    )
    donors = {index: [taken[place] for place in given] for index, given in zip(taken, chosen, strict=True)}

    def pairs() -> Iterator[dict[str, Any]]:
        made = equal = turns = 0
        for index, given in donors.items():
            draw = random.Random(_hash(seed, "sample", *_identity(anchors[index])))
            for pair in _pairs_of(anchors, index, given, include, sample_fraction, draw):
                made += 1
                if pair["pair_type"] == "non_contextual" and final_turn(pair["chosen"]) != pair["chosen"]:
                    turns += 1
                elif pair["pair_type"] != "original" and _words(pair["chosen"]) == _words(pair["rejected"]):
                    equal += 1
                else:
                    yield pair
        if equal:
            say(f"{equal:,} of {made:,} pairs have the same words in both answers: left out")
        if turns:
            say(
                f"in {turns:,} of {made:,} pairs the row's own answer has several turns, which would tell it from an answer of "
                "another row: left out"
            )

    return pairs()


def choose_donors(
    prompts: Sequence[str],
    identities: Sequence[tuple[str, ...]],
    *,
    num_donors: int,
    seed: int,
    avoid_similar: bool = False,
) -> list[tuple[int, ...]]:
    """For each row the rows that donate to it: prompts of a row and its donors all differ.

    The rows lie on a circle, those of one prompt beside each other, prompts and rows in an order drawn from contents and seed.
    A donor stands a fixed way ahead that is longer than the largest stretch of one prompt, so that every row donates
    once. Where a prompt has too many rows for that, donors are counted off among the rows of other prompts.
    """
    keys: list[str] = [" ".join(text.split()) for text in prompts]
    if avoid_similar:
        from trialist.data.splits import near_duplicate_groups

        groups = near_duplicate_groups(prompts)
        first: dict[int, str] = {}
        for group, key in sorted(zip(groups.tolist(), keys)):  # the least text names the group, whatever the order
            first.setdefault(group, key)
        keys = [first[group] for group in groups.tolist()]
    distinct = len(set(keys))
    if distinct < num_donors + 1:
        raise ValueError(
            f"{len(prompts)} rows have {distinct} distinct prompts; with num_donors={num_donors} at least {num_donors + 1} are "
            "needed, as an answer to the same prompt is no answer to another one; bring more rows, or take fewer donors"
        )
    circle = sorted(
        range(len(keys)), key=lambda i: (_hash(seed, keys[i]), keys[i], _hash(seed, *identities[i]), identities[i])
    )
    count = len(circle)
    stretches: dict[str, tuple[int, int]] = {}  # begin and length of the rows of a prompt on the circle
    for place, row in enumerate(circle):
        begin, length = stretches.get(keys[row], (place, 0))
        stretches[keys[row]] = (begin, length + 1)
    longest = max(length for _, length in stretches.values())
    draw = random.Random(_hash(seed, "rotation"))
    chosen: list[tuple[int, ...]] = [()] * count
    if count >= (num_donors + 1) * longest:
        ways = _ways(count, longest, num_donors, draw)
        for place, row in enumerate(circle):
            chosen[row] = tuple(circle[(place + way) % count] for way in ways)
        return chosen
    offsets = [draw.randrange(count) for _ in range(num_donors)]
    for place, row in enumerate(circle):
        taken = [keys[row]]
        donors = []
        for offset in offsets:
            open_rows = count - sum(stretches[key][1] for key in taken)
            at = (place + offset) % open_rows
            for begin, length in sorted(stretches[key] for key in taken):  # step over what is taken
                at += length if at >= begin else 0
            donors.append(circle[at])
            taken.append(keys[circle[at]])
        chosen[row] = tuple(donors)
    return chosen


def _ways(count: int, longest: int, num_donors: int, draw: random.Random) -> list[int]:
    """Ways ahead on a circle of `count` places that lead from any stretch of at most `longest` into others, and not into the
    same one; drawn among all."""
    if num_donors == 1:
        return [draw.randint(longest, count - longest)]
    spare = count - 3 * longest
    cuts = sorted((draw.randint(0, spare), draw.randint(0, spare)))
    ways = [longest + cuts[0], 2 * longest + cuts[1]]
    draw.shuffle(ways)
    return ways


def _pairs_of(
    anchors: Mapping[int, Mapping[str, Any]],
    index: int,
    donors: Sequence[int],
    include: Collection[str],
    sample_fraction: float,
    draw: random.Random,
) -> list[dict[str, Any]]:
    row = anchors[index]
    own = [(row[name], index) for name in ("chosen", "rejected")]
    given = [(final_turn(anchors[donor][name]), donor) for donor in donors for name in ("chosen", "rejected")]
    kinds = {"non_contextual": itertools.product(own, given), "neutral": itertools.combinations(given, 2)}
    made = []
    if "original" in include:
        made.append({**row, **_pair(row, index, own[0], own[1], "original", label_of(row, f"row {index + 1}"))})
    for kind, pairs in kinds.items():
        for first, second in pairs:
            kept = draw.random() < sample_fraction  # drawn for every pair, so that `include` changes no other draw
            if kind == "neutral" and draw.random() < 0.5:
                first, second = second, first
            if kept and kind in include:
                made.append(_pair(row, index, first, second, kind, LABELS[kind]))
    return made


def _pair(
    row: Mapping[str, Any], index: int, first: tuple[Any, int], second: tuple[Any, int], kind: str, label_prob: float
) -> dict[str, Any]:
    return {
        "prompt": row["prompt"],
        "chosen": first[0],
        "rejected": second[0],
        "label_prob": label_prob,
        "pair_type": kind,
        "source_index": index,
        "chosen_index": first[1],
        "rejected_index": second[1],
        **{name: row[name] for name in ("tools", "chat_template_kwargs") if row.get(name)},
    }


def _with_shared_turns_asked(row: Mapping[str, Any]) -> Mapping[str, Any]:
    """The row with whole turns that both its answers begin with at the end of its prompt."""
    prompt, chosen, rejected = (row[name] for name in ("prompt", "chosen", "rejected"))
    cut = sum(1 for _ in itertools.takewhile(lambda both: both[0] == both[1], zip(chosen, rejected)))
    if isinstance(prompt, str):
        mark = chosen[:cut].rfind(DIALOGUE_MARK)
        cut = mark + len(DIALOGUE_MARK) if mark >= 0 else 0
    else:
        while cut and not all(answer[cut:] and answer[cut]["role"] == "assistant" for answer in (chosen, rejected)):
            cut -= 1
    return {**row, "prompt": prompt + chosen[:cut], "chosen": chosen[cut:], "rejected": rejected[cut:]} if cut else row


def final_turn(answer: Any) -> Any:
    """What the assistant said last: the last message, or in a dialogue within one string what stands behind its last mark."""
    if not isinstance(answer, str):
        return list(answer[-1:])
    _, mark, last = answer.rpartition(DIALOGUE_MARK)
    if not mark or not last.strip():
        return answer
    return TURN_MARK.split(last)[0]


def prompt_text(row: Mapping[str, Any]) -> str:
    """The prompt of a row as one text; a message's role is part of it."""
    prompt = row["prompt"]
    return prompt if isinstance(prompt, str) else "\n".join(f"{m['role']}: {m.get('content', '')}" for m in prompt)


def _words(answer: Any) -> str:
    text = answer if isinstance(answer, str) else json.dumps([[m["role"], m.get("content", "")] for m in answer])
    return " ".join(text.split())


def _identity(row: Mapping[str, Any]) -> tuple[str, ...]:
    return prompt_text(row), _words(row["chosen"]), _words(row["rejected"])


def _hash(seed: int, *texts: str) -> int:
    digest = hashlib.blake2b(str(seed).encode(), digest_size=8)
    for text in texts:
        content = text.encode("utf-8", "surrogatepass")
        digest.update(f"\0{len(content)}\0".encode())
        digest.update(content)
    return int.from_bytes(digest.digest(), "little")


@dataclass(frozen=True)
class AugmentPreferences:
    """Add pairs with answers to other prompts to preference rows, so that a reward model learns what depends on the prompt.

    For each row: its own two answers beat those of one or two other rows, and the latter tie. `trialist train reward` takes
    the result as it is; `trialist apply filter-preferences` leaves out what an earlier model has right.
    """

    data: str
    """Rows of preferences: Hub id, local .jsonl, .json or .parquet file or folder"""
    output: str
    """File for the pairs, .jsonl or .parquet"""
    donors: int = 2
    """Other rows whose answers each row gets, 1 or 2: up to 6 or 15 pairs a row"""
    include: tuple[Kind, ...] = KINDS
    """Kinds of pairs to write"""
    sample_fraction: float = 0.5
    """Share of the added pairs that is kept, drawn at random, above 0 and at most 1"""
    avoid_similar: bool = False
    """Take prompts that are nearly the same text for the same prompt, of which none donates to another"""
    columns: str = ""
    """Columns under other names, ours first: chosen=better,rejected=worse"""
    split: str | None = None
    """Split of the data; without it train, or all there is"""
    max_examples: int | None = None
    """Most rows to read"""
    seed: int = 0
    """Of donors and of the share that is kept"""

    def __call__(self, say: Callable[[str], None] = print) -> Mapping[str, Any]:
        """Writes the pairs and returns how many there are of each kind."""
        from trialist.data.preference_files import check_rows_output, write_rows

        output = check_rows_output(self.output)
        rows = read_preferences(self.data, columns=self.columns, split=self.split, max_examples=self.max_examples)
        say(f"{len(rows):,} rows of preferences")
        counts = dict.fromkeys(self.include, 0)

        def counted() -> Iterator[Mapping[str, Any]]:
            for pair in augmented_pairs(
                rows, num_donors=self.donors, include=self.include, sample_fraction=self.sample_fraction, seed=self.seed,
                avoid_similar=self.avoid_similar, among=None, say=say,
            ):  # fmt: skip
                counts[pair["pair_type"]] += 1
                yield pair
            if not any(counts.values()):
                raise ValueError("no pair is left; include more kinds, or raise --sample-fraction")

        write_rows(counted(), output)
        return {
            **{kind.replace("_", "-"): f"{count:,}" for kind, count in counts.items()},
            "pairs": f"{sum(counts.values()):,} of {len(rows):,} rows",
            "data": str(output),
        }
