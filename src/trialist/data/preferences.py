"""Rows of preferences (a prompt with a chosen and a rejected answer) checked, and as token ids.

The formats are those of TRL: `prompt`, `chosen`, `rejected` as strings or as lists of messages; without a prompt it is what
chosen and rejected have in common at their start.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trialist.data.chat import Message, checked_messages, kind, render
from trialist.data.columns import column_sources, listed, rename_rows
from trialist.data.corpora import is_saved_dataset, kind_of, load_rows, parse_columns
from trialist.data.files import files_of_split, json_rows, suffix_of

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

REQUIRED = ("chosen", "rejected")
DIALOGUE_START, DIALOGUE_MARK = "\n\nHuman:", "\n\nAssistant:"
"""Begin the turns where a whole dialogue is one string, as in HH-RLHF"""
NOTES = {
    "cut": "answers go beyond {:,} tokens: their end was cut off",
    "long_prompts": "prompts fill {:,} tokens: left out",
    "equal": "chosen and rejected are the same tokens, within {:,}: left out",
    "merged": "a token spans the end of the prompt and counts as answer (a prompt that ends in a space?)",
    "opened": "the chat template writes into the answer before its first word: these tokens count as its first",
    "turns": "an answer has several turns: those of the user count as answer, too",
    "endless": "an answer does not end in the tokenizer's end of sequence: generation may not stop by itself",
}
CHUNK = 1000
"""Rows tokenized at a time"""


@dataclass(frozen=True)
class PreferencePair:
    """Token ids of a prompt and of two answers to it. An answer that was not cut ends with the end-of-sequence token, or with
    what a chat template writes behind it."""

    prompt: list[int]
    chosen: list[int]
    rejected: list[int]
    row: int
    """Place of the row in the data, from 0"""


def read_preferences(
    path_or_rows: str | Path | Iterable[Mapping[str, Any]],
    *,
    columns: str = "",
    split: str | None = None,
    max_examples: int | None = None,
    chat: bool = False,
) -> list[dict[str, Any]]:
    """Rows with `prompt`, `chosen` and `rejected`: three strings, or three lists of messages. Other columns are kept.

    path_or_rows: a local .jsonl, .json or .parquet file or folder, a Hub id, or the rows themselves.
    columns: our columns under other names, `chosen=better,rejected=worse`. split, max_examples: as in `load_rows`.
    chat: strings become a turn of the user and one of the assistant.
    A prompt that is not there is what chosen and rejected have in common at their start: whole messages, or characters, in
    dialogues like those of HH-RLHF up to the last `\\n\\nAssistant:`. A prompt that both answers repeat (its messages, or
    within whole dialogues) is taken off them. A string prompt beside answers of messages must be their first message.
    Raises ValueError that names the row: chosen or rejected missing, blank behind the prompt, or of another kind than the
    other or than the rows before, chosen equal to rejected, broken messages, a prompt that one answer repeats; and the
    errors of `load_rows`.
    """
    if max_examples is not None and max_examples < 1:
        raise ValueError(f"max_examples must be at least 1, not {max_examples}")
    placed = _placed_rows(path_or_rows, parse_columns(columns), split, max_examples)
    if not placed:
        raise ValueError(f"{_name(path_or_rows)} holds no rows")
    checked = []
    first: str | None = None
    for place, row in placed:
        found, held = _checked(row, place)
        first = first or held
        if held != first:
            raise ValueError(f"{place} holds {held}, while the rows before hold {first}; give one kind")
        checked.append(found)
    _require_answers(checked, [place for place, _ in placed])
    return [_as_turns(row) for row in checked] if chat and first == "strings" else checked


def encode_preferences(
    rows: Sequence[Mapping[str, Any]],
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_length: int,
    context: int | None = None,
    source: str = "data",
    whole: bool = False,
) -> tuple[list[PreferencePair], dict[str, int]]:
    """Token ids of rows that `read_preferences` returned, and how many of them met what.

    Prompt and answer are tokenized together, as TRL does, and the prompt ends where the tokens of prompt, prompt with
    chosen, and prompt with rejected part. Conversations go through the tokenizer's chat template.

    max_length: most tokens of a prompt with an answer; longer answers lose their end. Rows whose prompt leaves no room for
        an answer, and rows whose answers are the same tokens (as when what tells them apart was cut), are left out.
    context: tokens that the model takes; a prompt that fills it is an error. None: it is left out like others.
    source: what errors call the data.
    whole: keep what a chat template writes behind the end of the last turn, often a line break, as a reward model reads
        conversations; else an answer ends where it ends when it is generated.
    The counts: `rows`, `pairs`, `cut` (pairs with an answer that lost its end), `long_prompts` and `equal` (left out),
    `merged` (a token spans the end of the prompt and counts as answer), `opened` (the template writes into the answer before
    its first word), `turns` (an answer of several turns), `endless` (answers of conversations that do not end in the
    end-of-sequence token).
    All tokens behind the prompt are the answer, t = 0, 1, ..., and its length: in conversations also what the template writes
    into it, and turns of others within it.
    Raises ValueError that names the row for a prompt longer than the context, an empty prompt where the tokenizer has no
    token to begin with, conversations that the chat template does not take; and when no pair is left.
    """
    if max_length < 2:
        raise ValueError(f"max_length must be at least 2 tokens, a prompt's and an answer's, not {max_length}")
    counts = dict.fromkeys(("rows", "pairs", *NOTES), 0)
    counts["rows"] = len(rows)
    pairs = []
    for start in range(0, len(rows), CHUNK):
        part = rows[start : start + CHUNK]
        for number, ids in enumerate(_tokens(part, tokenizer, start, source, whole, counts), start):
            prompt, chosen, rejected = ids
            if context is not None and len(prompt) >= context:
                raise ValueError(
                    f"{source} row {number + 1}: its prompt has {len(prompt):,} tokens and the model takes {context:,}; shorten "
                    "or drop the row"
                )
            room = max_length - len(prompt)
            if room < 1:
                counts["long_prompts"] += 1
            elif chosen[:room] == rejected[:room]:
                counts["equal"] += 1
            else:
                counts["cut"] += max(len(chosen), len(rejected)) > room
                pairs.append(PreferencePair(prompt, chosen[:room], rejected[:room], number))
    counts["pairs"] = len(pairs)
    if not pairs:
        raise ValueError(
            f"{source}: no pair is left of {len(rows):,} rows: {counts['long_prompts']:,} prompts fill {max_length:,} tokens, "
            f"{counts['equal']:,} rows have the same tokens in chosen and rejected; raise max_length"
        )
    return pairs, counts


def notes(counts: Mapping[str, int], max_length: int) -> tuple[str, ...]:
    """The counts of `encode_preferences` in words, as far as there is something to tell."""
    return tuple(
        f"in {counts[name]:,} of {counts['rows']:,} rows {text.format(max_length)}"
        for name, text in NOTES.items()
        if counts[name]
    )


# reading


def _name(path_or_rows: Any) -> str:
    return str(path_or_rows) if isinstance(path_or_rows, str | Path) else "data"


def _placed_rows(
    path_or_rows: Any, columns: Mapping[str, str], split: str | None, max_examples: int | None
) -> list[tuple[str, dict[str, Any]]]:
    """(how errors call the row, row), with `chosen` and `rejected` in each."""
    if not isinstance(path_or_rows, str | Path):
        return _given_rows(islice(path_or_rows, max_examples), columns)
    data = str(path_or_rows)
    if kind_of(data) == "local":
        files = [] if is_saved_dataset(Path(data)) else files_of_split(data, split)
        if files and all(
            suffix_of(file) in (".jsonl", ".json") for file in files
        ):  # not as a table, which has no places
            placed = []
            for file in files:
                found = json_rows(file)
                renamed = rename_rows(found, file, columns, REQUIRED)
                placed += [(f"{file} {place}", row) for (place, _), row in zip(found, renamed, strict=True)]
            return placed[:max_examples]
    table = load_rows(data, required=REQUIRED, columns=columns, split=split, max_examples=max_examples)
    return [(f"{data} row {number}", dict(row)) for number, row in enumerate(table, start=1)]  # type: ignore[call-overload]


def _given_rows(rows: Iterable[Mapping[str, Any]], columns: Mapping[str, str]) -> list[tuple[str, dict[str, Any]]]:
    given = [dict(row) for row in rows]
    found = tuple(dict.fromkeys(column for row in given for column in row))
    sources = column_sources(found, columns, REQUIRED, "data") if given else {}
    placed = []
    for number, row in enumerate(given, start=1):
        renamed = {ours: row.get(theirs) for ours, theirs in sources.items()}
        rest = {name: value for name, value in row.items() if name not in sources and name not in sources.values()}
        for ours in REQUIRED:
            if renamed[ours] is None:
                raise ValueError(f"data row {number}: {sources[ours]!r} is missing; the row has {listed(row)}")
        placed.append((f"data row {number}", {**rest, **renamed}))
    return placed


def _checked(row: Mapping[str, Any], place: str) -> tuple[dict[str, Any], str]:
    """The row with its prompt made explicit, and its kind."""
    prompt, (chosen, rejected) = row.get("prompt"), (row[name] for name in REQUIRED)
    if isinstance(chosen, str) != isinstance(rejected, str):
        raise ValueError(
            f"{place}: 'chosen' is {kind(chosen)} and 'rejected' is {kind(rejected)}; give two strings or two lists of "
            "messages"
        )
    talks = not isinstance(chosen, str)
    if talks:
        chosen, rejected = (
            checked_messages(row[name], f"{place}: {name!r}", "a string or a list of messages") for name in REQUIRED
        )
    if chosen == rejected:
        raise ValueError(f"{place}: 'chosen' equals 'rejected', so it says nothing; drop the row")
    prompt, chosen, rejected = (_talk if talks else _text)(prompt, chosen, rejected, place)
    found = {**row, "prompt": prompt, "chosen": chosen, "rejected": rejected}
    return found, "conversations" if talks else "strings"


def _text(prompt: Any, chosen: str, rejected: str, place: str) -> tuple[str, str, str]:
    if prompt is not None and not isinstance(prompt, str):
        raise ValueError(f"{place}: 'prompt' is {kind(prompt)}, its answers are strings; give one kind")
    cut = _common_start(chosen, rejected)
    whole = chosen[:cut].startswith(DIALOGUE_START) and chosen[:cut].endswith(DIALOGUE_MARK)
    if prompt is None or (whole and prompt.strip() in chosen[:cut]):
        return chosen[:cut], chosen[cut:], rejected[cut:]
    return prompt, chosen, rejected


def _talk(prompt: Any, chosen: list[Message], rejected: list[Message], place: str) -> tuple[list[Message], ...]:
    shared = _common([chosen, rejected])
    if prompt is None or isinstance(prompt, str):
        if prompt is not None and not (shared and chosen[0]["content"] == prompt):
            raise ValueError(
                f"{place}: 'prompt' is a string, its answers are lists of messages that do not begin with it; give three "
                "strings or three lists of messages"
            )
        if not shared:
            raise ValueError(
                f"{place} has no 'prompt', and 'chosen' and 'rejected' share no first message; add the prompt"
            )
        asked, repeated = chosen[:shared], shared
    else:
        asked = checked_messages(prompt, f"{place}: 'prompt'", "a string or a list of messages")
        begins = [answer[: len(asked)] == asked for answer in (chosen, rejected)]
        if begins[0] != begins[1]:
            raise ValueError(
                f"{place}: {REQUIRED[begins[1]]!r} begins with the messages of 'prompt', {REQUIRED[begins[0]]!r} does not; "
                "give the answers alone, or both with the prompt"
            )
        repeated = len(asked) if all(begins) else 0
    answers = chosen[repeated:], rejected[repeated:]
    for name, messages in zip(REQUIRED, answers, strict=True):
        if not messages or messages[-1]["role"] != "assistant":
            raise ValueError(
                f"{place}: {name!r} does not end with a message of the assistant; drop the row or fill it in"
            )
    return asked, *answers


def _as_turns(row: Mapping[str, Any]) -> dict[str, Any]:
    answers = {name: [{"role": "assistant", "content": row[name]}] for name in REQUIRED}
    return {**row, "prompt": [{"role": "user", "content": row["prompt"]}], **answers}


def _require_answers(rows: Sequence[Mapping[str, Any]], places: Sequence[str]) -> None:
    """Raises ValueError that names the first row with a blank answer, and says how many there are."""
    blank = [
        (place, name)
        for place, row in zip(places, rows, strict=True)
        for name in REQUIRED
        if isinstance(row[name], str) and not row[name].strip()
    ]
    if blank:
        place, name = blank[0]
        more = f", and {len(blank) - 1:,} more in the data" if len(blank) > 1 else ""
        raise ValueError(f"{place}: {name!r} is empty behind the prompt{more}; drop the row or fill it in")


def _common_start(chosen: str, rejected: str) -> int:
    """Characters of the prompt that two whole dialogues share."""
    shared = chosen[: _common([chosen, rejected])]
    mark = shared.rfind(DIALOGUE_MARK)
    if mark >= 0:  # answers that begin alike stay whole, so that their tokens are counted from the first
        return mark + len(DIALOGUE_MARK)
    return len(shared) - (shared.endswith(" ") and len(shared) > 1)  # the space belongs to the word behind it


def _common(sequences: Sequence[Sequence[Any]]) -> int:
    """How many elements they share at their start."""
    shortest = min(map(len, sequences))
    return next((n for n, column in enumerate(zip(*sequences)) if column.count(column[0]) < len(column)), shortest)


# tokens


def _tokens(
    rows: Sequence[Mapping[str, Any]],
    tokenizer: Any,
    first: int,
    source: str,
    whole: bool,
    counts: dict[str, int],
) -> Iterable[tuple[list[int], list[int], list[int]]]:
    """Prompt, chosen and rejected of each row, uncut."""
    talks = not isinstance(rows[0]["chosen"], str)
    if talks and not tokenizer.chat_template:
        raise ValueError(
            f"{source} has conversations, and the tokenizer has no chat template; use an instruct model, pass "
            "--chat-template FILE, or give strings, without --chat"
        )
    texts = []
    for number, row in enumerate(rows, first + 1):
        if talks:
            texts.append(_rendered(row, tokenizer, f"{source} row {number}"))
            counts["opened"] += _opened(row, texts[-1])
            counts["turns"] += any(m["role"] == "user" for name in REQUIRED for m in row[name])
        else:
            texts.append((row["prompt"], row["prompt"] + row["chosen"], row["prompt"] + row["rejected"]))
    distinct = list(dict.fromkeys(text for three in texts for text in three))  # one answer may be in many pairs
    special = not talks  # a template writes its special tokens itself
    encoded = tokenizer(distinct, add_special_tokens=special, return_attention_mask=False, verbose=False)["input_ids"]
    ids_of = dict(zip(distinct, encoded, strict=True))
    end, begin = tokenizer.eos_token_id, tokenizer.bos_token_id
    for index in range(len(rows)):
        prompt, *answers = (list(ids_of[text]) for text in texts[index])
        if special and prompt[-1:] == [end] and answers[0][len(prompt) - 1 : len(prompt)] != [end]:
            prompt.pop()  # this tokenizer ends every text
        if not (talks and whole):
            answers = [_ended(ids, len(prompt), end, talks) for ids in answers]
            counts["endless"] += end is not None and any(ids[-1:] != [end] for ids in answers)
        own = _common([prompt, *answers])
        counts["merged"] += own < len(prompt)
        if own == 0:
            start = end if begin is None else begin
            if start is None:
                raise ValueError(
                    f"{source} row {first + index + 1}: its prompt is empty, and the tokenizer has no token to begin with; "
                    "drop the row"
                )
            yield [start], answers[0], answers[1]
        else:
            yield answers[0][:own], answers[0][own:], answers[1][own:]


def _ended(ids: list[int], prompt: int, end: int | None, talks: bool) -> list[int]:
    """With one end of sequence behind the answer, and nothing behind that."""
    if end is None:
        return ids
    if not talks:
        return ids if ids[-1:] == [end] else [*ids, end]
    last = next((place for place in range(len(ids) - 1, prompt - 1, -1) if ids[place] == end), None)
    return ids if last is None else ids[: last + 1]  # templates write a line break behind the end of a turn


def _rendered(row: Mapping[str, Any], tokenizer: Any, place: str) -> tuple[str, str, str]:
    prompt = row["prompt"]
    continues = prompt[-1]["role"] == "assistant"
    begin = {"add_generation_prompt": not continues, "continue_final_message": continues}
    return (
        render(tokenizer, prompt, row, place, tokenize=False, **begin),
        render(tokenizer, [*prompt, *row["chosen"]], row, place, tokenize=False),
        render(tokenizer, [*prompt, *row["rejected"]], row, place, tokenize=False),
    )


def _opened(row: Mapping[str, Any], texts: tuple[str, str, str]) -> bool:
    """Whether the template writes something between the prompt and the words of the answer."""
    prompt, answer, _ = texts
    words = str(row["chosen"][0]["content"]).strip()
    return bool(words) and answer.startswith(prompt) and answer[len(prompt) :].lstrip().find(words) > 0
