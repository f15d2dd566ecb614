from __future__ import annotations

import random
from pathlib import Path

import numpy as np
import pytest
from scipy.sparse.csgraph import connected_components

from trialist.data.corpora import Documents, load_documents, stdlib_module
from trialist.data.splits import load_splits, near_duplicate_groups, split_documents


def words(count: int, seed: int) -> str:
    draw = random.Random(seed)
    return " ".join("".join(draw.choices("abcdefghijklmnop", k=draw.randint(2, 9))) for _ in range(count))


def corpus(count: int, size: int = 40) -> Documents:
    return Documents(tuple(f"d{i}" for i in range(count)), tuple(words(size, seed=i) for i in range(count)), "made up")


def jaccard(left: str, right: str) -> float:
    first, second = ({text[i : i + 16] for i in range(len(text) - 15)} for text in (left, right))
    return len(first & second) / len(first | second)


def test_the_split_is_a_partition_with_the_asked_shares():
    documents = corpus(307)
    splits = split_documents(documents)
    ids = [*splits.train.ids, *splits.validation.ids, *splits.test.ids]
    assert sorted(ids) == sorted(documents.ids)
    assert (len(splits.validation), len(splits.test)) == (31, 31)
    sizes = splits.sizes()
    assert sizes["test_bytes"] == sum(len(text) for text in splits.test.texts)
    assert f"test 31 documents ({sizes['test_bytes']:,} bytes)" in str(splits)


def test_the_split_depends_on_contents_and_not_on_order_or_ids():
    documents = corpus(60)
    order = list(range(60))
    random.Random(3).shuffle(order)
    shuffled = Documents(tuple(f"other {i}" for i in order), tuple(documents.texts[i] for i in order), "elsewhere")
    first, second = split_documents(documents), split_documents(shuffled)
    for part in ("train", "validation", "test"):
        assert set(getattr(first, part).texts) == set(getattr(second, part).texts)


def test_near_duplicates_are_found_and_different_texts_are_not():
    texts = [words(60, seed=i) for i in range(50)]
    copies = [
        texts[3].upper(),
        texts[4].replace(" ", "\n  "),
        texts[5] + " and a tail",
        texts[6].replace(texts[6].split()[20], "changed", 1),
    ]
    assert all(jaccard(texts[i], copy) > 0.85 for i, copy in ((5, copies[2]), (6, copies[3])))
    groups = near_duplicate_groups(texts + copies)
    assert [groups[50 + i] for i in range(4)] == [groups[3 + i] for i in range(4)]
    assert len(set(groups.tolist())) == 50


def test_groups_agree_with_exact_jaccard_similarity_over_every_pair():
    draw = random.Random(0)
    texts = []
    for seed in range(12):
        base = words(300, seed=100 + seed).split()
        for _ in range(3):
            changed = list(base)
            for place in draw.sample(range(300), draw.choice([1, 2, 120])):
                changed[place] = words(1, seed=draw.randrange(10**6))
            texts.append(" ".join(changed))
    groups = near_duplicate_groups(texts)
    similarity = np.array([[jaccard(left, right) for left in texts] for right in texts])
    same = groups[:, None] == groups
    assert same[similarity > 0.88].all()
    assert (similarity > 0.88).sum() > len(texts) + 20
    joined = connected_components(similarity > 0.5)[1]
    assert not same[joined[:, None] != joined].any()


def test_short_texts_that_differ_in_a_digit_stay_apart_and_equal_ones_together():
    texts = ["What is 3+5?", "What is 3+7?", "what is  3+5? ", "a", "b", "", "A"]
    groups = near_duplicate_groups(texts).tolist()
    assert groups[0] == groups[2] != groups[1]
    assert groups[3] == groups[6] != groups[4]


def test_near_duplicates_share_a_split():
    base = corpus(40)
    texts = [*base.texts, *(text + " end" for text in base.texts), *(text.title() for text in base.texts)]
    splits = split_documents(Documents(tuple(map(str, range(120))), tuple(texts), "copies"))
    cores = [
        {text.lower().removesuffix(" end") for text in part.texts}
        for part in (splits.train, splits.validation, splits.test)
    ]
    assert not cores[0] & cores[1]
    assert not cores[0] & cores[2]
    assert not cores[1] & cores[2]


def test_a_common_template_does_not_swallow_the_data():
    template = words(120, seed=0)
    texts = tuple(f"{template} {i} and {i * 7}" for i in range(50)) + (f"{template} 0 and 0",)
    splits = split_documents(Documents(tuple(map(str, range(51))), texts, "templated"))
    assert len(splits.test) == 5
    assert any("51 of 51 documents share most of their text" in note for note in splits.notes)
    assert sum(f"{template} 0 and 0" in part.texts for part in (splits.train, splits.validation, splits.test)) == 1


def test_given_groups_stay_together_and_large_ones_go_to_training():
    groups = ["big"] * 40 + [f"g{i // 3}" for i in range(60)]
    splits = split_documents(corpus(100), groups=groups)
    where = {}
    for part in ("train", "validation", "test"):
        for name in getattr(splits, part).ids:
            where.setdefault(groups[int(name[1:])], set()).add(part)
    assert all(len(parts) == 1 for parts in where.values())
    assert where["big"] == {"train"}
    assert 8 <= len(splits.test) <= 13


def test_a_group_that_would_overfill_a_held_out_split_is_passed_on():
    splits = split_documents(corpus(105), groups=[f"g{i // 7}" for i in range(105)])
    assert (len(splits.train), len(splits.validation), len(splits.test)) == (91, 7, 7)


def test_the_standard_library_is_split_by_module():
    splits = split_documents(load_documents("python-stdlib"))
    modules = [{stdlib_module(name) for name in part.ids} for part in (splits.train, splits.validation, splits.test)]
    assert not modules[0] & modules[1]
    assert not modules[0] & modules[2]
    assert not modules[1] & modules[2]
    sizes = splits.sizes()
    total = sum(sizes[f"{part}_bytes"] for part in ("train", "validation", "test"))
    assert sizes["test_bytes"] > 0.04 * total
    assert sizes["train_bytes"] > 0.7 * total


def test_three_documents_make_three_splits_and_two_make_an_error():
    splits = split_documents(corpus(3))
    assert (len(splits.train), len(splits.validation), len(splits.test)) == (1, 1, 1)
    assert splits.notes == ("only 1 test items (fewer than 100)",)
    with pytest.raises(ValueError, match=r"made up: 2 documents in 2 groups .* without an empty one"):
        split_documents(corpus(2))
    with pytest.raises(ValueError, match="5 documents in 1 groups"):
        split_documents(Documents(tuple("abcde"), ("same text",) * 5, "copies"))


def test_every_split_has_a_document_for_any_number_and_grouping():
    draw = np.random.default_rng(0)
    for count in (4, 5, 9, 17, 33):
        groups = [str(group) for group in draw.integers(0, 4, count)] if count > 5 else None
        splits = split_documents(corpus(count), groups=groups)
        assert min(len(splits.train), len(splits.validation), len(splits.test)) >= 1


def test_wrong_fractions_and_group_counts_are_refused():
    with pytest.raises(ValueError, match="sum to 1"):
        split_documents(corpus(9), fractions=(0.8, 0.1, 0.2))
    with pytest.raises(ValueError, match="expected one a document, 9, found 2"):
        split_documents(corpus(9), groups=["a", "b"])


def write_texts(folder: Path, name: str, texts: list[str]) -> None:
    folder.mkdir(exist_ok=True)
    (folder / name).write_text("".join(f'{{"text": "{text}"}}\n' for text in texts))


def test_a_test_split_of_the_data_is_kept_and_its_copies_leave_training(tmp_path: Path):
    folder = tmp_path / "data"
    train, test = [words(20, seed=i) for i in range(50)], [words(20, seed=1_000 + i) for i in range(7)]
    write_texts(folder, "train.jsonl", [*train, test[2].upper()])
    write_texts(folder, "test.jsonl", test)
    splits = load_splits(str(folder))
    assert splits.test.texts == tuple(test)
    assert sorted(splits.train.texts + splits.validation.texts) == sorted(train)
    assert len(splits.validation) == 5
    assert "1 training documents left out: copies of test documents" in splits.notes


def test_the_split_option_chooses_the_test_split_or_the_only_one(tmp_path: Path):
    folder = tmp_path / "data"
    for name, first in (("train", 0), ("validation", 100), ("test", 200)):
        write_texts(folder, f"{name}.jsonl", [words(20, seed=first + i) for i in range(30)])
    texts = {name: load_documents(str(folder), split=name).texts for name in ("train", "validation", "test")}
    whole = load_splits(str(folder))
    assert (whole.train.texts, whole.validation.texts, whole.test.texts) == tuple(texts.values())
    held_out = load_splits(str(folder), split="validation")
    assert held_out.test.texts == texts["validation"]
    assert set(held_out.train.texts + held_out.validation.texts) == set(texts["train"])
    only = load_splits(str(folder), split="train")
    assert set(only.train.texts + only.validation.texts + only.test.texts) == set(texts["train"])
    assert len(load_splits(str(folder), max_examples=11).test) == 11
    with pytest.raises(ValueError, match="has no split 'dev'"):
        load_splits(str(folder), split="dev")
    with pytest.raises(ValueError, match="python-stdlib has no split 'test': it has none"):
        load_splits("python-stdlib", split="test")
