"""n-gram overlap of benchmark items with training rows, held against sets of tuples."""

from __future__ import annotations

import random
import re
import tracemalloc

import numpy as np
import pytest

from trialist.data import overlap
from trialist.data.benchmark_items import Items
from trialist.data.overlap import OverlapIndex
from trialist.data.scan import Rule, Scan, scan_rows
from trialist.data.scan_state import load_scan, save_scan
from trialist.data.streams import Place, RowTexts
from trialist.data.tokenizers import byte_tokenizer
from trialist.data.words import TokenWords, Words
from trialist.kernels import ngrams

POOL = "the cat sat on a mat; Dog, ran? far (away) x+y İstanbul naïve ﬁne 北京 e\u0301tude \u2014".split()  # noqa: SIM905
Row = list[str]


def items_of(*texts: str | tuple[str, ...], name: str = "bench") -> Items:
    rows = tuple((text,) if isinstance(text, str) else text for text in texts)
    return Items(name, tuple("abc"[: len(rows[0])]), tuple(f"i{n}" for n in range(len(rows))), rows)


def scanned(
    items: Items | list[Items], rows: list[Row], rule: Rule | None = None, *, portions: int = 0, **given
) -> Scan:
    benchmarks = items if isinstance(items, list) else [items]
    scan = Scan(OverlapIndex(benchmarks, **given), rule or Rule(), list_rows=True)
    places = [Place("train.jsonl", number, "line") for number in range(1, len(rows) + 1)]
    size = portions or len(rows) or 1
    for start in range(0, len(rows), size):
        scan.add(places[start : start + size], rows[start : start + size])
    return scan


def split(text: str) -> list[str]:
    return [word for word in re.split(r'[\s,.?!:;()"\\-]+', text.lower()) if word]


def grams(words: list[str], n: int) -> set[tuple[str, ...]]:
    return {tuple(words[at : at + n]) for at in range(len(words) - n + 1)}


def covered(words: list[str], n: int, found: set[tuple[str, ...]]) -> list[bool]:
    """Which words lie in an n-gram that is found; texts of fewer than n words are one phrase."""
    size = min(n, len(words))
    marks = [False] * len(words)
    for at in range(len(words) - size + 1) if words else ():
        if tuple(words[at : at + size]) in found:
            marks[at : at + size] = [True] * size
    return marks


def naive(items: Items, rows: list[Row], n: int, gone: frozenset[tuple[str, ...]] = frozenset()) -> dict[str, dict]:
    """For each item: best coverage and longest run over rows, coverage by all rows, number of rows that share an n-gram.

    gone: n-grams that do not count.
    """
    texts = [[split(text) for text in row] for row in rows]
    sizes = {min(n, len(split(field))) for fields in items.texts for field in fields} - {0}
    found = [set().union(*(grams(words, size) for words in row for size in sizes), set()) - gone for row in texts]
    result = {}
    everything = set().union(*found, set())
    for name, fields in zip(items.ids, items.texts):
        words = [split(field) for field in fields if split(field)]
        marks = [[covered(field, n, here) for field in words] for here in found]
        left = [sum(covered(field, n, grams(field, min(n, len(field))) - gone)) for field in words]
        shares = [of_item(words, [sum(m) for m in row], left, n) for row in marks]
        runs = [of_item(words, [longest_run(m) for m in row], left, n) for row in marks]
        union = of_item(words, [sum(covered(field, n, everything)) for field in words], left, n)
        result[name] = {
            "coverage": max(shares, default=0.0),
            "longest": max(runs, default=0.0),
            "union": union,
            "sharing": sum(share > 0 for share in shares),
            "exceeding": sum(share > 0.5 for share in shares),
            "left": sum(count for count, field in zip(left, words) if len(field) >= n),
        }
    return result


def of_item(words: list[list[str]], covered: list[int], left: list[int], n: int) -> float:
    """The mean over fields; a short one has the mean of the others where it is found, and 1 where there are none but such."""
    long = [at for at, field in enumerate(words) if len(field) >= n and left[at]]
    short = [at for at, field in enumerate(words) if len(field) < n]
    if not long:
        return sum(covered[at] > 0 for at in short) / len(words) if len(short) == len(words) > 0 else 0.0
    shares = [covered[at] / left[at] for at in long]
    shares += [sum(shares) / len(long) if covered[at] else 0.0 for at in short]
    return sum(shares) / len(shares)


def longest_run(marks: list[bool]) -> int:
    return max(map(len, "".join("x" if mark else " " for mark in marks).split()), default=0)


def random_case(seed: int) -> tuple[Items, list[Row], int]:
    """Items and rows with planted overlaps: copies of parts, other case and punctuation, templates, duplicates, empty ones."""
    chance = random.Random(seed)
    n = chance.choice((1, 2, 3, 5, 8))
    template = " ".join(chance.choices(POOL, k=4))

    def words(most: int) -> str:
        return " ".join(chance.choices(POOL, k=chance.randrange(most)))

    fields = [
        tuple(f"{template} {words(25)}" if chance.random() < 0.3 else words(25) for _ in range(2)) for _ in range(12)
    ]
    rows: list[Row] = [[words(60) for _ in range(chance.randrange(4))] for _ in range(15)]
    for row in rows:
        for _ in range(chance.randrange(3)):
            source = chance.choice(chance.choice(fields)).split()
            start = chance.randrange(len(source) + 1)
            piece = source[start : start + chance.randrange(20)]
            if chance.random() < 0.5:
                piece = [word.upper() if word.isascii() else word for word in piece]
            row.append(f"{words(6)}, {chance.choice((' ', ' - ', '. ')).join(piece)}! {words(6)}")
    return items_of(*fields), rows + rows[:2], n


@pytest.mark.parametrize("bits", [64, 2], ids=["good hashes", "two bits"])
@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_every_measure_is_that_of_sets_of_tuples(backend, bits, monkeypatch):
    monkeypatch.setattr(ngrams, "HASH_BITS", bits)
    monkeypatch.setattr(overlap, "EXPANDED", 50)
    partly = 0
    for seed in range(15):
        items, rows, n = random_case(seed)
        scan = scanned(items, rows, n=n, backend=backend, portions=4)
        union = scan.union()
        for at, (name, expected) in enumerate(naive(items, rows, n).items()):
            assert scan.coverage[at] == pytest.approx(expected["coverage"]), (seed, name)
            assert scan.longest[at] == pytest.approx(expected["longest"]), (seed, name)
            assert union[at] == pytest.approx(expected["union"]), (seed, name)
            assert scan.sharing[at] == expected["sharing"], (seed, name)
            if not scan.index.item_short[at]:
                assert scan.exceeding[at] == expected["exceeding"], (seed, name)
            partly += 0 < expected["coverage"] < 1  # type: ignore[operator]
    assert partly > 25


def test_shares_are_of_the_words_that_are_left_when_ngrams_are_ignored():
    partly = 0
    for seed in range(20):
        items, rows, n = random_case(seed)
        ignored = [
            " ".join(split(field)[: n + 2]) for fields in items.texts[:4] for field in fields if len(split(field)) >= n
        ]
        gone = frozenset().union(*(grams(split(text), n) for text in ignored))
        scan = scanned(items, rows, n=n, ignored=ignored)
        for at, (name, expected) in enumerate(naive(items, rows, n, gone).items()):
            assert scan.coverage[at] == pytest.approx(expected["coverage"]), (seed, name)
            assert scan.longest[at] == pytest.approx(expected["longest"]), (seed, name)
            assert scan.index.item_left[at] == expected["left"], (seed, name)
            assert scan.index.item_ignored[at] == (
                expected["left"] == 0 and any(len(split(field)) >= n for field in items.texts[at])
            )
            partly += 0 < expected["left"] < scan.index.item_words[at] and expected["coverage"] > 0
    assert partly > 10


def test_brute_force_over_two_hundred_items_and_rows_gives_the_same():
    chance = random.Random(5)
    words = [f"w{number}" for number in range(400)]
    rows = [[" ".join(chance.choices(words, k=60))] for _ in range(200)]
    texts = []
    for number in range(200):
        own = chance.choices(words, k=40)
        start = chance.randrange(40)
        texts.append(" ".join([*own[:20], *rows[number % 50][0].split()[start : start + 20], *own[20:]]))
    items = items_of(*texts)
    scan, expected = scanned(items, rows), naive(items, rows, 8)
    assert scan.coverage.tolist() == pytest.approx([entry["coverage"] for entry in expected.values()])
    assert 100 < np.count_nonzero(scan.coverage) <= 200


def test_a_copy_covers_all_and_unrelated_text_nothing():
    text = "One two three four five six seven eight nine ten."
    scan = scanned(items_of(text, "a b c d e f g h i j"), [[f"before {text.upper()} behind"]])
    assert scan.coverage.tolist() == [1.0, 0.0]
    assert scan.contaminated().tolist() == [True, False]


def test_seven_shared_words_cover_nothing_and_eight_cover_eight():
    item = items_of("a b c d e f g h i j")
    assert scanned(item, [["a b c d e f g X"]]).coverage.tolist() == [0.0]
    assert scanned(item, [["a b c d e f g h X"]]).coverage.tolist() == [0.8]


def test_two_rows_that_cover_a_third_each_contaminate_by_union_only():
    words = [f"w{number}" for number in range(27)]
    item = items_of(" ".join(words))
    rows = [[" ".join(words[:9])], [" ".join(words[9:18])]]
    assert [
        scanned(item, rows, Rule(name)).contaminated().tolist() for name in ("tulu3", "longest", "union", "any")
    ] == [
        [False],
        [False],
        [True],
        [True],
    ]


def test_the_longest_run_is_less_than_the_coverage_of_two_runs():
    words = [f"w{number}" for number in range(20)]
    scan = scanned(items_of(" ".join(words)), [[" ".join(words[:8]), " ".join(words[11:])]], Rule("longest", 0.45))
    assert (scan.coverage.tolist(), scan.longest.tolist()) == ([0.85], [0.45])
    assert not scan.contaminated()[0]
    assert scanned(items_of(" ".join(words)), [[" ".join(words[11:])]], Rule("longest", 0.44)).contaminated()[0]


def test_the_threshold_is_strict_and_at_one_nothing_is_contaminated():
    words = [f"w{number}" for number in range(16)]
    item, half, whole = items_of(" ".join(words)), [[" ".join(words[:8])]], [[" ".join(words)]]
    assert not scanned(item, half, Rule(coverage=0.5)).contaminated()[0]
    assert scanned(item, half, Rule(coverage=0.49)).contaminated()[0]
    for name in ("tulu3", "any", "longest", "union"):
        scan = scanned([item, items_of("too short", name="b")], [*whole, ["too short"]], Rule(name, 1.0, "count"))
        assert not scan.contaminated().any(), name
        assert not scan.found


def test_the_order_the_portions_and_the_merging_of_rows_change_nothing(tmp_path):
    items, rows, n = random_case(3)
    rows += rows[::-1]
    places = [Place("train.jsonl", number) for number in range(len(rows))]
    results = []
    index, rule = OverlapIndex([items], n), Rule("tulu3", 0.3)
    for seed in range(6):
        order = list(range(len(rows)))
        random.Random(seed).shuffle(order)
        scan = Scan(index, rule, list_rows=True)
        size = (1, 3, 100, 100, 7, 11)[seed]
        for start in range(0, len(order), size):
            part = order[start : start + size]
            there = scan if seed < 4 else Scan(index, rule, list_rows=True)
            there.add([places[at] for at in part], [rows[at] for at in part])
            if seed == 4:
                scan.merge(there)
            elif seed == 5:
                save_scan(there, tmp_path / "part.npz")
                scan.merge(load_scan(tmp_path / "part.npz", index, rule, list_rows=True))
        found = sorted((row.place, row.item, row.share, row.excerpt) for row in scan.found)
        results.append(
            (
                (scan.rows, scan.empty, scan.characters, scan.rows_sharing, scan.rows_contaminating),
                scan.coverage.tolist(),
                scan.longest.tolist(),
                scan.sharing.tolist(),
                scan.exceeding.tolist(),
                scan.frequency.tolist(),
                scan.union().tolist(),
                dict(sorted(scan.matches.items())),
                found,
            )
        )
    assert results[0][-1]
    assert all(result == results[0] for result in results)


def test_turns_and_fields_are_not_joined():
    item = items_of(("a b c d e", "f g h i j"))
    assert scanned(item, [["a b c d", "e f g h i j"]], short="skip").coverage.tolist() == [0.0]
    assert scanned(items_of("a b c d e f g h"), [["a b c d", "e f g h"]]).coverage.tolist() == [0.0]
    assert scanned(items_of("a b c d e f g h"), [["a b c d e f g h", "x"]]).coverage.tolist() == [1.0]


def test_fields_are_averaged_and_a_short_one_that_is_found_has_the_share_of_the_others():
    passage, question = "p q r s t u v w x y", "is it so"
    item = items_of((passage, question), (passage, ""), ("", ""))
    assert scanned(item, [[passage]]).coverage.tolist() == [0.5, 1.0, 0.0]
    assert scanned(item, [[passage, "but is it so now"]]).coverage.tolist() == [1.0, 1.0, 0.0]
    assert scanned(item, [[passage], ["is it so"]]).coverage.tolist() == [0.5, 1.0, 0.0]
    assert scanned(item, [["p q r s t u v w", "is it so"]]).coverage.tolist() == [0.8, 0.8, 0.0]


@pytest.mark.parametrize("name", ["tulu3", "any", "whole", "longest", "union"])
def test_a_short_field_contaminates_nothing_by_itself(name):
    passage = " ".join(f"p{number}" for number in range(300))
    items = items_of((passage, "Why?"))
    scan = scanned(items, [["Explain why the sky is blue."]], Rule(name))
    assert not scan.contaminated().any()
    assert (scan.rows_sharing, scan.sharing.tolist(), scan.found, scan.matches) == (0, [0], [], {})
    scan = scanned(items, [["Why is it that " + " ".join(f"p{number}" for number in range(8))]], Rule(name))
    assert scan.contaminated().tolist() == [name == "any"]
    assert (scan.rows_sharing, scan.sharing.tolist()) == (1, [1])
    assert scanned(items, [[f"{passage} Why?"]], Rule(name)).contaminated().all()


def test_whole_items_stand_word_for_word_in_one_row():
    item = items_of("a b c d e f g h i j", ("the passage of the item is this one", "is it so"), "a b a b a")
    rows = [["x A b, c d e f g h i j y"], ["the passage of the item is this one"], ["Is it so?"]]
    scan = scanned(item, rows, Rule("whole"))
    assert scan.contaminated().tolist() == [True, False, False]
    assert [row.place.number for row in scan.found] == [1]
    assert scanned(item, [[" ".join(rows[1] + rows[2])]], Rule("whole")).contaminated().tolist() == [False, True, False]
    assert scanned(item, [["a b a b a"]], Rule("whole", short="count"), short="count").contaminated()[2]
    # every pair of words is there, in pieces
    scan = scanned(items_of("a b c d e"), [["b c d a b c", "c d e"], ["a b c d e"]], Rule("whole"), n=3)
    assert (scan.coverage.tolist(), [row.place.number for row in scan.found]) == ([1.0], [2])


def test_short_and_empty_items_are_told_apart_and_stay_in_the_denominator():
    items = items_of("who was it", "a b c d e f g h", "", " ... ", "never there")
    rows = [["and WHO was it, then?"], ["a b c d e f g h"]]
    for short, contaminated, found in (
        ("exact", [0, 1, 0, 0, 0], [1, 0, 0, 0, 0]),
        ("count", [1, 1, 0, 0, 0], [1, 0, 0, 0, 0]),
        ("skip", [0, 1, 0, 0, 0], [0, 0, 0, 0, 0]),
    ):
        scan = scanned(items, rows, Rule(short=short), short=short)
        assert scan.contaminated().astype(int).tolist() == contaminated, short
        assert scan.found_short().astype(int).tolist() == found, short
        assert scan.index.item_short.astype(int).tolist() == [1, 0, 0, 0, 1]
        assert scan.index.item_empty.astype(int).tolist() == [0, 0, 1, 1, 0]


def test_a_repeated_ngram_covers_every_place_where_it_stands():
    scan = scanned(items_of("a b c x y z w v a b c q"), [["a b c"]], n=3)
    assert scan.coverage.tolist() == [0.5]
    assert scan.matches[0].spans == ((0, 0, 5), (0, 16, 21))


def test_equal_items_are_all_found_and_equal_rows_all_counted():
    text = "a b c d e f g h"
    scan = scanned(items_of(text, text, text.upper()), [[text], [text], ["other"]])
    assert scan.contaminated().tolist() == [True] * 3
    assert scan.exceeding.tolist() == [2, 2, 2]
    assert [row.place.number for row in scan.found] == [1, 2]
    assert scan.rows_contaminating == 2


def test_ignored_and_common_ngrams_do_not_count():
    header = "answer with one of the letters a b c or d"
    items = items_of(*(f"{header} item number {number} {'xyz'[number]} and more words" for number in range(3)))
    rows = [[f"{header} something else"]]
    assert scanned(items, rows, Rule("any")).contaminated().all()
    assert not scanned(items, rows, Rule("any"), ignored=[header]).contaminated().any()
    assert not scanned(items, rows, Rule("any"), common=0.5).contaminated().any()
    own = [[f"{header} item number 1 y and more words"]]
    assert scanned(items, own, Rule("any"), common=0.5).contaminated().tolist() == [False, True, False]
    two = [items_of(f"{header} q"), items_of(f"{header} r", name="other")]
    assert scanned(two, rows, Rule("any"), common=0.5).contaminated().all()  # one item each: a template of neither
    short = items_of("one of the", header)
    assert scanned(short, [["take one of the books"]], ignored=[header]).found_short().tolist() == [True, False]
    with pytest.raises(ValueError, match=r"ignored text 2 \('too short'\) has 2 words, fewer than n = 8"):
        OverlapIndex([items], ignored=[header, "too short"])


@pytest.mark.parametrize("given", [{"common": 0.2}, {"ignored": [" ".join(f"t{number}" for number in range(30))]}])
def test_without_its_template_a_copy_still_covers_all_of_an_item(given):
    template = " ".join(f"t{number}" for number in range(30))
    items = items_of(*(f"{template} {' '.join(f'q{k}x{number}' for number in range(15))}" for k in range(7)), template)
    scan = scanned(items, [list(items.texts[3])], Rule("tulu3"), **given)
    assert scan.coverage.tolist() == [0, 0, 0, 1, 0, 0, 0, 0]
    assert scan.contaminated().tolist() == [number == 3 for number in range(8)]
    assert scan.index.item_left.tolist() == [22] * 7 + [
        0
    ]  # the last seven words of the template begin n-grams of the item
    assert scan.index.item_ignored.tolist() == [False] * 7 + [True]


def test_spans_and_excerpts_are_the_matching_text_as_it_is_written():
    item = "Élan: The İdea, of “it” came to me in the night; yes"
    row = "Before… the İDEA OF “it”: came to me -- in THE night, behind"
    for form in ("as-is", "nfkc", "unaccented"):
        scan = scanned(items_of(item), [["another turn", row]], words=Words("tulu3", form))
        match = scan.matches[0]
        assert [item[begin:end] for _, begin, end in match.spans] == ["The İdea, of “it” came to me in the night"], form
        assert [match.excerpt.text[a:b] for a, b in match.excerpt.marks] == [
            "the İDEA OF “it”: came to me -- in THE night"
        ], form
        assert (match.excerpt.text, match.excerpt.cut) == (row, (False, False))


def test_a_long_row_is_shown_around_its_longest_match(monkeypatch):
    words = [f"w{number}" for number in range(12)]
    row = "x " * 5_000 + " ".join(words[:8]) + " y" * 3_000 + " " + " ".join(words) + " z" * 5_000
    excerpt = scanned(items_of(" ".join(words)), [[row]]).matches[0].excerpt
    monkeypatch.setattr("trialist.data.scan.HELD", 100)
    assert scanned(items_of(" ".join(words)), [[row]]).matches[0].excerpt == excerpt
    assert len(excerpt.text) < 500
    assert [excerpt.text[a:b] for a, b in excerpt.marks] == [" ".join(words)]
    assert excerpt.cut == (True, True)


def test_of_equal_matches_the_first_row_is_kept_and_a_better_one_later():
    text = "a b c d e f g h i j"
    scan = scanned(items_of(text), [["a b c d e f g h"], ["b c d e f g h i"], [text], [text]], portions=1)
    assert (scan.matches[0].place.number, scan.matches[0].share) == (3, 1.0)


def test_tokens_serve_as_words(tmp_path):
    byte_tokenizer().save_pretrained(tmp_path)
    words = TokenWords(str(tmp_path))
    scan = scanned(items_of("abcdefghij", "éa"), [["xx abcdefgh xx", "y"]], n=8, words=words)
    assert scan.coverage.tolist() == [0.8, 0.0]
    assert scan.matches[0].spans == ((0, 0, 8),)
    assert [scan.matches[0].excerpt.text[a:b] for a, b in scan.matches[0].excerpt.marks] == ["abcdefgh"]
    apart = scanned(items_of("abcdefghij"), [["abcd", "efgh"]], n=8, words=words)
    assert apart.coverage.tolist() == [0.0]


def test_frequencies_count_rows_that_hold_an_ngram():
    scan = scanned(items_of("a b c d"), [["a b c a b c"], ["a b c", "b c d"], ["b c"]], n=3)
    assert {scan.index.phrase_text(p): int(scan.frequency[p]) for p in range(scan.index.ngrams)} == {
        "a b c": 2,
        "b c d": 1,
    }


def test_rows_without_text_are_counted_and_progress_is_told(monkeypatch):
    monkeypatch.setattr("trialist.data.scan.EVERY", 0.0)
    monkeypatch.setattr("trialist.data.scan.CHUNK", 1000)
    rows = [(Place("t", number), {"text": None if number % 2 else "a b c d e f g h"}) for number in range(1, 11)]
    lines: list[str] = []
    scan = scan_rows(
        Scan(OverlapIndex([items_of("a b c d e f g h")])), iter(rows), RowTexts(), name="t", say=lines.append
    )
    assert (scan.rows, scan.empty, scan.characters) == (10, 5, 75)
    assert lines[0].startswith("t: 5 rows")
    assert "1 of 1 items share an n-gram" in lines[0]


def test_the_memory_of_a_scan_does_not_grow_with_the_rows(monkeypatch):
    monkeypatch.setattr("trialist.data.scan.CHUNK", 20_000)
    index = OverlapIndex([items_of(*(" ".join(f"w{number + at}" for at in range(12)) for number in range(50)))])

    def peak(rows: int) -> int:
        made = ((Place("t", n), {"text": f"{n} w{n % 50 + 1} " * 20 + " ".join(f"w{n % 60 + at}" for at in range(9))})
                for n in range(rows))  # fmt: skip
        tracemalloc.start()
        scan = scan_rows(Scan(index), made, RowTexts())
        most = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert (scan.rows, scan.rows_sharing) == (rows, sum(n % 60 < 54 for n in range(rows)))
        return most

    peak(100)
    assert peak(3_000) < 1.3 * peak(300)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"n": 0}, "n must be from 1 to 64 words, not 0"),
        ({"n": 65}, "n must be from 1 to 64 words, not 65"),
        ({"short": "no"}, "short 'no': one of exact, count, skip"),
        ({"common": 0.0}, "common is a share above 0"),
        ({"backend": "fortran"}, "backend 'fortran'"),
    ],
)
def test_impossible_settings_are_refused(given, message):
    with pytest.raises(ValueError, match=message):
        OverlapIndex([items_of("a b")], **given)


def test_no_items_and_impossible_rules_are_refused():
    with pytest.raises(ValueError, match="there are no benchmark items"):
        OverlapIndex([Items("b", ("a",), (), ())])
    with pytest.raises(ValueError, match="rule 'some'"):
        Rule("some")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"coverage is a share from 0 to 1, not 1\.5"):
        Rule(coverage=1.5)
    with pytest.raises(ValueError, match=r"coverage 0\.5: the rule 'any' asks for no share of an item"):
        Rule("any", 0.5)
