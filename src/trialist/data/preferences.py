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

from trialist.data.columns import column_sources, listed, rename_rows
from trialist.data.corpora import is_saved_dataset, kind_of, load_rows, parse_columns
from trialist.data.files import files_of_split, json_rows, suffix_of

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

REQUIRED = ("chosen", "rejected")
DIALOGUE_MARK = "\n\nAssistant:"
"""Begins each answer where a whole dialogue is one string, as in HH-RLHF"""
CHUNK = 1000
"""Rows tokenized at a time"""


@dataclass(frozen=True)
class PreferencePair:
    """Token ids of a prompt and of two answers to it. An answer that was not cut ends with the end-of-sequence token."""

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
) -> list[dict[str, Any]]:
    """Rows with `prompt`, `chosen` and `rejected`: three strings, or three lists of messages. Other columns are kept.

    path_or_rows: a local .jsonl, .json or .parquet file or folder, a Hub id, or the rows themselves.
    columns: our columns under other names, `chosen=better,rejected=worse`. split, max_examples: as in `load_rows`.
    A prompt that is not there is what chosen and rejected have in common at their start: whole messages, or characters, in
    dialogues like those of HH-RLHF up to the last `\\n\\nAssistant:`. A string prompt beside answers of messages must be
    their first message.
    Raises ValueError that names the row: chosen or rejected missing, empty or of another kind than the other or than the
    rows before, chosen equal to rejected, broken messages; and the errors of `load_rows`.
    """
    if max_examples is not None and max_examples < 1:
        raise ValueError(f"max_examples must be at least 1, not {max_examples}")
    placed = _placed_rows(path_or_rows, parse_columns(columns), split, max_examples)
    if not placed:
        raise ValueError(f"{_name(path_or_rows)} holds no rows")
    checked = []
    kind: str | None = None
    for place, row in placed:
        found, row_kind = _checked(row, place)
        kind = kind or row_kind
        if row_kind != kind:
            raise ValueError(f"{place} holds {row_kind}, while the rows before hold {kind}; give one kind")
        checked.append(found)
    return checked


def encode_preferences(
    rows: Sequence[Mapping[str, Any]],
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_length: int,
    context: int | None = None,
    source: str = "data",
) -> tuple[list[PreferencePair], dict[str, int]]:
    """Token ids of rows that `read_preferences` returned, and how many of them met what.

    Prompt and answer are tokenized together, as TRL does, and the prompt ends where the tokens of prompt, prompt with
    chosen, and prompt with rejected part. Conversations go through the tokenizer's chat template.

    max_length: most tokens of a prompt with an answer; longer answers lose their end. Rows whose prompt leaves no room for
        an answer, and rows whose answers are the same tokens (as when what tells them apart was cut), are left out.
    context: tokens that the model takes; a prompt that fills it is an error. None: it is left out like others.
    source: what errors call the data.
    The counts: `rows`, `pairs`, `cut` (pairs with an answer that lost its end), `long_prompts` and `equal` (left out),
    `merged` (a token spans the end of the prompt and counts as answer), `endless` (answers of conversations that do not
    end in the end-of-sequence token).
    Raises ValueError that names the row for a prompt longer than the context, an empty prompt where the tokenizer has no
    token to begin with, conversations that the chat template does not take; and when no pair is left.
    """
    if max_length < 2:
        raise ValueError(f"max_length must be at least 2 tokens, a prompt's and an answer's, not {max_length}")
    counts = dict.fromkeys(("rows", "pairs", "cut", "long_prompts", "equal", "merged", "endless"), 0)
    counts["rows"] = len(rows)
    pairs = []
    for start in range(0, len(rows), CHUNK):
        part = rows[start : start + CHUNK]
        for number, ids in enumerate(_tokens(part, tokenizer, start, source, counts), start):
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
    words = {
        "cut": f"answers go beyond {max_length:,} tokens: their end was cut off",
        "long_prompts": f"prompts fill {max_length:,} tokens: left out",
        "equal": f"chosen and rejected are the same tokens, within {max_length:,}: left out",
        "merged": "a token spans the end of the prompt and counts as answer (a prompt that ends in a space?)",
        "endless": "an answer does not end in the tokenizer's end of sequence: generation may not stop by itself",
    }
    return tuple(
        f"in {counts[name]:,} of {counts['rows']:,} rows {text}" for name, text in words.items() if counts[name]
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
    prompt, chosen, rejected = (row.get(name) for name in ("prompt", "chosen", "rejected"))
    if isinstance(chosen, str) != isinstance(rejected, str):
        raise ValueError(
            f"{place}: 'chosen' is {_kind(chosen)} and 'rejected' is {_kind(rejected)}; give two strings or two lists of "
            "messages"
        )
    if isinstance(chosen, str) and isinstance(rejected, str):
        if prompt is not None and not isinstance(prompt, str):
            raise ValueError(f"{place}: 'prompt' is {_kind(prompt)}, its answers are strings; give one kind")
        for name, text in (("chosen", chosen), ("rejected", rejected)):
            if not text:
                raise ValueError(f"{place}: {name!r} is empty; drop the row or fill it in")
        if chosen == rejected:
            raise ValueError(f"{place}: 'chosen' equals 'rejected', so it says nothing; drop the row")
        if prompt is None:
            cut = _common_start(chosen, rejected)
            prompt, chosen, rejected = chosen[:cut], chosen[cut:], rejected[cut:]
        return {**row, "prompt": prompt, "chosen": chosen, "rejected": rejected}, "strings"
    better, worse = _messages(chosen, "chosen", place), _messages(rejected, "rejected", place)
    if better == worse:
        raise ValueError(f"{place}: 'chosen' equals 'rejected', so it says nothing; drop the row")
    if prompt is None or isinstance(prompt, str):
        shared = next((n for n, (a, b) in enumerate(zip(better, worse)) if a != b), min(len(better), len(worse)))
        if isinstance(prompt, str) and not (shared and better[0]["content"] == prompt):
            raise ValueError(
                f"{place}: 'prompt' is a string, its answers are lists of messages that do not begin with it; give three "
                "strings or three lists of messages"
            )
        asked, better, worse = better[:shared], better[shared:], worse[shared:]
        if not asked:
            raise ValueError(
                f"{place} has no 'prompt', and 'chosen' and 'rejected' share no first message; add the prompt"
            )
    else:
        asked = _messages(prompt, "prompt", place)
    for name, messages in (("chosen", better), ("rejected", worse)):
        if not messages or messages[-1]["role"] != "assistant":
            raise ValueError(
                f"{place}: {name!r} does not end with a message of the assistant; drop the row or fill it in"
            )
    return {**row, "prompt": asked, "chosen": better, "rejected": worse}, "conversations"


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
    return next((n for n, column in enumerate(zip(*sequences)) if len(set(column)) > 1), shortest)


def _messages(value: Any, column: str, place: str) -> list[dict[str, Any]]:
    if not isinstance(value, Sequence) or isinstance(value, str) or not value:
        raise ValueError(f"{place}: {column!r} must be a string or a list of messages, not {_kind(value)}")
    messages = []
    for index, entry in enumerate(value, start=1):
        where = f"{place}: {column!r}, message {index}"
        if not isinstance(entry, Mapping) or not isinstance(entry.get("role"), str):
            raise ValueError(f"{where}: expected {{'role': ..., 'content': ...}}, found {_kind(entry)}")
        message = {key: item for key, item in entry.items() if item is not None}
        content = message.get("content", "")
        if not isinstance(content, str):
            parts = content if isinstance(content, Sequence) else ()
            if not parts or any(
                not isinstance(part, Mapping) or not isinstance(part.get("text"), str) for part in parts
            ):
                raise ValueError(f"{where}: only text is learnt; its content is {_kind(content)}")
            content = "".join(part["text"] for part in parts)
        if message["role"] == "assistant" and not content.strip() and not message.get("tool_calls"):
            raise ValueError(f"{where} is empty; drop the row or fill it in")
        messages.append({**message, "content": content})
    return messages


def _kind(value: Any) -> str:
    if value is None:
        return "missing"
    if isinstance(value, str):
        return "a string"
    if isinstance(value, Mapping):
        return f"an object with {listed(value)}"
    return "a list of messages" if isinstance(value, list | tuple) and value else f"a {type(value).__name__} {value!r}"


# tokens


def _tokens(
    rows: Sequence[Mapping[str, Any]],
    tokenizer: Any,
    first: int,
    source: str,
    counts: dict[str, int],
) -> Iterable[tuple[list[int], list[int], list[int]]]:
    """Prompt, chosen and rejected of each row, uncut."""
    talks = not isinstance(rows[0]["chosen"], str)
    if talks and not tokenizer.chat_template:
        raise ValueError(
            f"{source} has conversations, and the tokenizer has no chat template; use an instruct model, or give strings"
        )
    texts = []
    for number, row in enumerate(rows, first + 1):
        if talks:
            texts.append(_rendered(row, tokenizer, f"{source} row {number}"))
        else:
            texts.append((row["prompt"], row["prompt"] + row["chosen"], row["prompt"] + row["rejected"]))
    flat = [text for three in texts for text in three]
    special = not talks  # a template writes its special tokens itself
    encoded = tokenizer(flat, add_special_tokens=special, return_attention_mask=False, verbose=False)["input_ids"]
    end, begin = tokenizer.eos_token_id, tokenizer.bos_token_id
    for index in range(len(rows)):
        prompt, *answers = (list(ids) for ids in encoded[3 * index : 3 * index + 3])
        if special and prompt[-1:] == [end] and answers[0][len(prompt) - 1 : len(prompt)] != [end]:
            prompt.pop()  # this tokenizer ends every text
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
    from jinja2.exceptions import TemplateError

    tools, prompt = row.get("tools") or None, row["prompt"]
    continues = prompt[-1]["role"] == "assistant"
    try:
        return (
            tokenizer.apply_chat_template(
                prompt,
                tools=tools,
                tokenize=False,
                add_generation_prompt=not continues,
                continue_final_message=continues,
            ),
            tokenizer.apply_chat_template([*prompt, *row["chosen"]], tools=tools, tokenize=False),
            tokenizer.apply_chat_template([*prompt, *row["rejected"]], tools=tools, tokenize=False),
        )
    except TemplateError as error:
        roles = ", ".join(message["role"] for message in [*prompt, *row["chosen"]])
        raise ValueError(
            f"{place}: the chat template does not take this conversation ({error}); roles are {roles}"
        ) from error
