from __future__ import annotations

import collections
import itertools
import json
import random
from pathlib import Path

import datasets
import pytest

from trialist.data.augment_preferences import AugmentPreferences, augment_preferences, choose_donors, final_turn

KINDS_OF = {
    1: {"original": 1, "non_contextual": 4, "neutral": 1},
    2: {"original": 1, "non_contextual": 8, "neutral": 6},
}


def rows_of(count: int, prompts: int | None = None) -> list[dict]:
    """Answers that name their prompt, so that an answer tells where it comes from."""
    prompts = prompts or count
    return [
        {
            "prompt": f"topic {n % prompts}?",
            "chosen": f"good {n} of {n % prompts}",
            "rejected": f"bad {n} of {n % prompts}",
        }
        for n in range(count)
    ]


def said(role: str, text: str) -> dict[str, str]:
    return {"role": role, "content": text}


def whole(rows, **options):
    return augment_preferences(rows, **{"sample_fraction": 1.0, **options})


def contents(pairs) -> list[tuple]:
    return sorted((p["prompt"], *sorted([(p["chosen"], p["label_prob"]), (p["rejected"], 1 - p["label_prob"])]), p["pair_type"])
                  for p in pairs)  # fmt: skip


@pytest.mark.parametrize("donors", [1, 2])
def test_every_anchor_has_all_its_pairs_of_every_kind_once(donors):
    for index, pairs in itertools.groupby(whole(rows_of(7), num_donors=donors), key=lambda pair: pair["source_index"]):
        pairs = list(pairs)
        assert collections.Counter(pair["pair_type"] for pair in pairs) == KINDS_OF[donors]
        answers = {answer for pair in pairs for answer in (pair["chosen"], pair["rejected"])}
        assert len(answers) == 2 + 2 * donors
        compared = {frozenset((pair["chosen"], pair["rejected"])) for pair in pairs}
        assert (
            len(compared) == len(pairs) == len(answers) * (len(answers) - 1) // 2
        )  # every two of them, none with itself
        assert {pair["prompt"] for pair in pairs} == {f"topic {index}?"}


@pytest.mark.parametrize("donors", [1, 2])
def test_labels_add_up_to_the_certain_pairs_and_half_of_the_ties(donors):
    kinds = KINDS_OF[donors]
    total = sum(pair["label_prob"] for pair in whole(rows_of(5), num_donors=donors))
    assert total == 5 * (kinds["original"] + kinds["non_contextual"] + kinds["neutral"] / 2)


def test_a_scorer_that_knows_the_prompt_agrees_with_every_pair():
    def score(prompt, answer):
        return float(answer.rpartition(" ")[2] == prompt.removesuffix("?").rpartition(" ")[2])

    for pair in whole(rows_of(40, prompts=11)):
        gap = score(pair["prompt"], pair["chosen"]) - score(pair["prompt"], pair["rejected"])
        assert gap == {"original": 0.0, "non_contextual": 1.0, "neutral": 0.0}[pair["pair_type"]]
        assert pair["pair_type"] == "original" or pair["label_prob"] == {1.0: 1.0, 0.0: 0.5}[gap]


def test_indices_say_which_row_each_text_comes_from():
    rows = rows_of(9)
    for pair in whole(rows):
        assert pair["prompt"] == rows[pair["source_index"]]["prompt"]
        for name in ("chosen", "rejected"):
            assert pair[name] in (rows[pair[f"{name}_index"]]["chosen"], rows[pair[f"{name}_index"]]["rejected"])


@pytest.mark.parametrize(("count", "prompts"), [(3, 3), (4, 3), (7, 4), (30, 10), (31, 9), (50, 50)])
@pytest.mark.parametrize("seed", range(5))
def test_anchor_and_donors_have_different_prompts_and_every_row_donates_once(count, prompts, seed):
    rows = rows_of(count, prompts)
    texts = [row["prompt"] for row in rows]
    for number in (1, 2):
        donors = choose_donors(texts, [(row["chosen"],) for row in rows], num_donors=number, seed=seed)
        for index, given in enumerate(donors):
            assert len({texts[index], *(texts[donor] for donor in given)}) == number + 1
        most = max(collections.Counter(texts).values())
        if (number + 1) * most <= count:
            for place in range(number):
                assert sorted(given[place] for given in donors) == list(range(count))


def test_a_prompt_with_most_of_the_rows_gets_donors_from_all_the_others():
    texts = ["common"] * 50 + [f"rare {n}" for n in range(8)]
    donors = choose_donors(texts, [(str(n),) for n in range(58)], num_donors=2, seed=3)
    assert all(len({texts[i], *(texts[d] for d in given)}) == 3 for i, given in enumerate(donors))
    used = collections.Counter(donor for given in donors[:50] for donor in given)
    assert set(used) == set(range(50, 58))
    assert max(used.values()) <= 2 * min(used.values())


def test_prompts_that_differ_in_white_space_are_one_prompt():
    rows = [
        {"prompt": "a  b", "chosen": "1", "rejected": "2"}, {"prompt": "a b\n", "chosen": "3", "rejected": "4"},
        {"prompt": "c", "chosen": "5", "rejected": "6"},
    ]  # fmt: skip
    made = whole(rows, num_donors=1)
    assert {(p["source_index"], p["rejected_index"]) for p in made if p["pair_type"] == "non_contextual"} == {
        (0, 2), (1, 2), *((2, n) for n in {p["rejected_index"] for p in made if p["source_index"] == 2} - {2}),
    }  # fmt: skip


def test_nearly_equal_prompts_can_be_kept_from_donating_to_each_other():
    long = "Please write a short story about " + ", ".join(
        f"a fox of {n} years that lives at mill {n * n}" for n in range(20)
    )
    rows = [
        {"prompt": text, "chosen": f"good {n}", "rejected": f"bad {n}"}
        for n, text in enumerate((long, f"{long}!", "How far away is the moon from the earth?"))
    ]
    assert len(whole(rows, num_donors=2)) == 45
    with pytest.raises(ValueError, match="3 rows have 2 distinct prompts"):
        whole(rows, num_donors=2, avoid_similar=True)
    donors = {p["source_index"]: p["rejected_index"] for p in whole(rows, num_donors=1, avoid_similar=True)
              if p["pair_type"] == "non_contextual"}  # fmt: skip
    assert donors[0] == donors[1] == 2


def test_the_order_of_the_rows_does_not_matter():
    rows = rows_of(23, prompts=9)
    shuffled = random.Random(5).sample(rows, len(rows))
    for options in ({}, {"sample_fraction": 0.5}, {"num_donors": 1, "seed": 4}):
        assert contents(whole(rows, **options)) == contents(whole(shuffled, **options))
    crowded = [{**row, "prompt": "common" if n < 20 else f"rare {n}"} for n, row in enumerate(rows_of(29))]
    shuffled = random.Random(3).sample(crowded, len(crowded))
    for options in ({}, {"avoid_similar": True}):
        assert contents(whole(crowded, **options)) == contents(whole(shuffled, **options))


def test_the_seed_decides_donors_and_sample():
    rows = rows_of(20)
    assert whole(rows, seed=1) == whole(rows, seed=1)
    assert contents(whole(rows, seed=1)) != contents(whole(rows, seed=2))


def test_a_sample_keeps_every_original_and_that_share_of_the_others():
    made = augment_preferences(rows_of(300), sample_fraction=0.25)
    kinds = collections.Counter(pair["pair_type"] for pair in made)
    assert kinds["original"] == 300
    assert kinds["non_contextual"] == pytest.approx(0.25 * 2400, abs=4 * (2400 * 0.25 * 0.75) ** 0.5)
    assert kinds["neutral"] == pytest.approx(0.25 * 1800, abs=4 * (1800 * 0.25 * 0.75) ** 0.5)
    everything = set(contents(whole(rows_of(300))))
    assert set(contents(made)) < everything


def test_leaving_a_kind_out_changes_no_other_pair():
    rows = rows_of(30)
    made = augment_preferences(rows)
    without = augment_preferences(rows, include=("original", "non_contextual"))
    assert contents(without) == contents([pair for pair in made if pair["pair_type"] != "neutral"])


def test_a_tie_among_original_rows_stays_one_and_its_answers_still_beat_those_of_others():
    rows = [{**row, "label_prob": 0.5 if n == 2 else 0.9} for n, row in enumerate(rows_of(4))]
    made = [pair for pair in whole(rows) if pair["source_index"] == 2]
    assert [p["label_prob"] for p in made if p["pair_type"] == "original"] == [0.5]
    assert {p["label_prob"] for p in made if p["pair_type"] == "non_contextual"} == {1.0}


def test_a_donor_of_a_long_conversation_gives_its_last_turn_and_system_messages_stay_with_the_prompt():
    rows = [
        {
            "prompt": [said("system", f"rule {n}"), said("user", f"question {n}")],
            "chosen": [said("assistant", f"first {n}"), said("user", "go on"), said("assistant", f"good {n}")],
            "rejected": [said("assistant", f"bad {n}")],
        }
        for n in range(4)
    ]
    for pair in whole(rows):
        index = pair["source_index"]
        assert pair["prompt"] == rows[index]["prompt"]
        for name in ("chosen", "rejected"):
            if pair[f"{name}_index"] == index:
                assert pair[name] in (rows[index]["chosen"], rows[index]["rejected"])
            else:
                assert len(pair[name]) == 1
                assert pair[name][0]["content"] in (f"good {pair[f'{name}_index']}", f"bad {pair[f'{name}_index']}")


def test_the_number_of_turns_tells_no_own_answer_from_a_donated_one():
    rows = [
        {
            "prompt": [said("user", f"question {n}")],
            "chosen": [said("assistant", f"a {n}"), said("user", "more"), said("assistant", f"b {n}")],
            "rejected": [said("assistant", f"c {n}"), *([said("user", "more"), said("assistant", f"d {n}")] * (n % 2))],
        }
        for n in range(8)
    ]
    told: list[str] = []
    made = whole(rows, say=told.append)
    added = [pair for pair in made if pair["pair_type"] != "original"]
    assert {len(pair[name]) for pair in added for name in ("chosen", "rejected")} == {1}
    assert collections.Counter(pair["pair_type"] for pair in made) == {
        "original": 8,
        "non_contextual": 16,
        "neutral": 48,
    }
    assert told == [
        "in 48 of 120 pairs the row's own answer has several turns, which would tell it from an answer of another row: left out"
    ]


def test_turns_that_both_answers_begin_with_belong_to_the_prompt():
    talks = [
        {
            "prompt": [said("user", f"question {n}")],
            "chosen": [said("assistant", f"a {n}"), said("user", "more"), said("assistant", f"b {n}")],
            "rejected": [said("assistant", f"a {n}"), said("user", "more"), said("assistant", f"c {n}")],
        }
        for n in range(4)
    ]
    dialogues = [
        {
            "prompt": f"\n\nHuman: question {n}\n\nAssistant:",
            "chosen": f" a {n}\n\nHuman: more\n\nAssistant: b {n}",
            "rejected": f" a {n}\n\nHuman: more\n\nAssistant: c {n}",
        }
        for n in range(4)
    ]
    for rows in (talks, dialogues):
        told: list[str] = []
        made = whole(rows, say=told.append)
        assert len(made) == 60
        assert not told
        for pair in made:
            row = rows[pair["source_index"]]
            if pair["pair_type"] == "original":
                assert all(pair["prompt"] + pair[name] == row["prompt"] + row[name] for name in ("chosen", "rejected"))
            if isinstance(pair["prompt"], list):
                assert [m["role"] for m in pair["prompt"]] == ["user", "assistant", "user"]
                assert len(pair["chosen"]) == len(pair["rejected"]) == 1
            else:
                assert pair["prompt"].endswith(" more\n\nAssistant:")
                assert "Human" not in pair["chosen"] + pair["rejected"]


def test_an_original_pair_keeps_all_columns_and_added_ones_those_of_their_prompt():
    rows = [
        {**row, "margin": 2.0 + n, "id": f"r{n}", "tools": '[{"name": "t"}]', "chat_template_kwargs": {"think": False}}
        for n, row in enumerate(rows_of(4))
    ]
    for pair in whole(rows):
        row = rows[pair["source_index"]]
        assert (pair["tools"], pair["chat_template_kwargs"]) == (row["tools"], row["chat_template_kwargs"])
        own = {"margin": row["margin"], "id": row["id"]} if pair["pair_type"] == "original" else {}
        assert {name: pair[name] for name in ("margin", "id") if name in pair} == own


def test_an_answer_is_tokenized_once_however_many_pairs_it_is_in():
    from trialist.data.preferences import encode_preferences
    from trialist.data.tokenizers import byte_tokenizer

    class Counting:
        def __init__(self):
            self.tokenizer, self.texts = byte_tokenizer(), []

        def __getattr__(self, name):
            return getattr(self.tokenizer, name)

        def __call__(self, texts, **options):
            self.texts += texts
            return self.tokenizer(texts, **options)

    tokenizer, rows = Counting(), whole(rows_of(5))
    pairs, _ = encode_preferences(rows, tokenizer, max_length=90)
    assert len(pairs) == 75
    assert len(tokenizer.texts) == len(set(tokenizer.texts)) == 5 * 7  # a prompt alone, and with six answers


def test_rows_that_are_not_named_neither_get_answers_nor_give_them():
    rows, among = rows_of(9), [1, 3, 4, 8]
    made = whole(rows, among=among)
    for name in ("source_index", "chosen_index", "rejected_index"):
        assert {pair[name] for pair in made} == set(among)
    assert contents(made) == contents(whole([rows[index] for index in among]))
    assert all(pair["prompt"] == rows[pair["source_index"]]["prompt"] for pair in made)


def test_a_donor_of_a_dialogue_in_one_string_gives_what_the_assistant_said_last():
    assert final_turn(" Yes.\n\nHuman: why?\n\nAssistant: So it is.") == " So it is."
    assert final_turn(" Yes.\n\nHuman: why?\n\nAssistant: So.\n\nHuman: and?") == " So."
    assert final_turn(" Just an answer.") == " Just an answer."


def test_answers_with_the_same_words_are_not_compared_and_counted():
    rows = rows_of(5)
    rows[0]["rejected"] = rows[1]["rejected"] = rows[2]["rejected"] = "I cannot help"
    rows[3]["rejected"] = " I  cannot help\n"
    said: list[str] = []
    made = whole(rows, say=said.append)
    assert all(" ".join(p["chosen"].split()) != " ".join(p["rejected"].split()) for p in made)
    assert len(made) < 75
    assert said == [f"{75 - len(made)} of 75 pairs have the same words in both answers: left out"]
    assert whole(rows_of(5), say=said.append)
    assert len(said) == 1


@pytest.mark.parametrize(
    ("rows", "options", "message"),
    [
        (rows_of(9, prompts=2), {}, "9 rows have 2 distinct prompts; with num_donors=2 at least 3 are needed"),
        (rows_of(4, prompts=1), {"num_donors": 1}, "4 rows have 1 distinct prompts; with num_donors=1 at least 2"),
        (rows_of(4), {"num_donors": 3}, "num_donors must be 1 or 2, not 3"),
        (rows_of(4), {"sample_fraction": 0.0}, "sample_fraction must be above 0 and at most 1, not 0.0"),
        (rows_of(4), {"include": ("neutrals",)}, "'neutrals' is no kind of pair; choose from original, non_contextual"),
        ([*rows_of(4), {**rows_of(1)[0], "label_prob": 1.5}], {}, "row 5: label_prob is 1.5"),
        ([*rows_of(4), {**rows_of(1)[0], "label_prob": "0.5"}], {}, "row 5: label_prob is '0.5'"),
        ([*rows_of(4), {**rows_of(1)[0], "pair_type": "neutral"}], {}, "row 5 has a pair_type .* augmented already"),
        ([{"prompt": "a", "chosen": "b"}], {}, "rejected"),
    ],
    ids=["few prompts", "one prompt", "donors", "fraction", "kind", "label", "no number", "twice", "no rejected"],
)
def test_what_cannot_work_is_said(rows, options, message):
    with pytest.raises(ValueError, match=message):
        augment_preferences(rows, **options)


@pytest.mark.parametrize("name", ["pairs.jsonl", "pairs.parquet"])
def test_apply_writes_the_pairs_and_counts_them(tmp_path, name):
    source = tmp_path / "rows.jsonl"
    source.write_text("".join(json.dumps(row) + "\n" for row in rows_of(6)))
    shown = AugmentPreferences(str(source), str(tmp_path / name), sample_fraction=1.0)(say=lambda text: None)
    assert {key: shown[key] for key in ("original", "non-contextual", "neutral", "pairs")} == {
        "original": "6", "non-contextual": "48", "neutral": "36", "pairs": "90 of 6 rows",
    }  # fmt: skip
    if name.endswith("jsonl"):
        read = [json.loads(line) for line in (tmp_path / name).read_text().splitlines()]
    else:
        read = list(datasets.Dataset.from_parquet(str(tmp_path / name), cache_dir=str(tmp_path)))
    assert contents(read) == contents(whole(rows_of(6)))


def test_nothing_is_overwritten_and_nothing_half_written_stays(tmp_path):
    source = tmp_path / "rows.jsonl"
    source.write_text("".join(json.dumps(row) + "\n" for row in rows_of(6, prompts=2)))
    with pytest.raises(ValueError, match=r"rows\.jsonl exists"):
        AugmentPreferences(str(source), str(source))()
    with pytest.raises(ValueError, match=r"end the path in one of them"):
        AugmentPreferences(str(source), str(tmp_path / "out.txt"))()
    with pytest.raises(ValueError, match="2 distinct prompts"):
        AugmentPreferences(str(source), str(tmp_path / "out.jsonl"))()
    assert [path.name for path in tmp_path.iterdir()] == ["rows.jsonl"]


def test_real_dialogues_are_augmented(shared_data: Path):
    from trialist.data.preferences import read_preferences

    rows = read_preferences(str(shared_data / "hh_rlhf" / "test.jsonl.gz"), max_examples=60)
    made = whole(rows)
    kinds = collections.Counter(pair["pair_type"] for pair in made)
    assert kinds["original"] == 60
    assert 0.95 * 60 * 14 < kinds["non_contextual"] + kinds["neutral"] <= 60 * 14
    assert not any("\n\nHuman:" in pair["rejected"] for pair in made if pair["pair_type"] != "original")
