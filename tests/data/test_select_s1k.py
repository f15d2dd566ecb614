from __future__ import annotations

import json
import random
from collections import Counter

import pytest

from trialist.data.select_s1k import STEP, SelectS1K, defect, select_s1k


def rows_of(sizes: dict[str, int], **more) -> list[dict]:
    return [
        {"question": f"{domain} {number}", "trace": "w " * (number + 1), "domain": domain, "solved_by": [], **more}
        for domain, size in sizes.items()
        for number in range(size)
    ]


def selected(rows, **options):
    given = {
        "solved": lambda row: bool(row["solved_by"]),
        "domain": lambda row: row["domain"],
        "length": lambda row: len(row["trace"].split()),
        **options,
    }
    return select_s1k(rows, **given)


def test_each_step_leaves_what_it_should_and_is_counted():
    rows = rows_of({"a": 5, "b": 3})
    rows[0]["error"] = "timed out"
    rows[1]["question"] = "see ![x](y.png)"
    rows[2]["source"] = rows[3]["source"] = "gpqa"
    rows[3]["correct"] = rows[3]["solved_by"] = ["small"]
    rows[5]["solved_by"] = ["small"]
    found = selected(
        rows, count=4, broken=lambda row: "error" in row, defective=lambda row: defect([row["question"]]) is not None,
        trusted=lambda row: row.get("source") == "gpqa" and "correct" in row,
    )  # fmt: skip
    assert found.counts == {
        "rows": 8, "without errors": 7, "without defects": 6, "taken at once": 1, "difficult": 4, "domains": 2, "selected": 4,
    }  # fmt: skip
    assert found.rows[0][STEP] == "quality"
    assert found.rows[0]["question"] == "a 3"  # also though a model solves it
    assert all(row[STEP] == "diversity" and not row["solved_by"] for row in found.rows[1:])


def test_the_same_rows_in_any_order_of_the_file():
    rows = rows_of({"a": 9, "b": 4, "c": 7})
    for row in rows:
        row["trace"] = "w " * (len(row["trace"].split()) // 3)  # many of equal length
    first = selected(rows, count=6, seed=3).rows
    random.Random(0).shuffle(rows)
    assert selected(rows, count=6, seed=3).rows == first
    assert selected(rows, count=6, seed=4).rows != first
    assert len({row["question"] for row in first}) == 6


def test_domains_are_uniform_and_lengths_have_weights_of_halves():
    rows = rows_of({"large": 4, "small": 2})
    draws = 4000
    first = Counter(selected(rows, count=1, seed=seed).rows[0]["question"] for seed in range(draws))
    # a domain by half, the longest of 4 by 8/15, the longest of 2 by 2/3
    expected = {
        "large 3": 8 / 30,
        "large 2": 4 / 30,
        "large 1": 2 / 30,
        "large 0": 1 / 30,
        "small 1": 1 / 3,
        "small 0": 1 / 6,
    }
    for question, share in expected.items():
        assert first[question] / draws == pytest.approx(share, abs=4 * (share * (1 - share) / draws) ** 0.5)


def test_a_domain_that_is_used_up_leaves_the_draw():
    found = selected(rows_of({"a": 2, "b": 50}), count=40)
    assert Counter(row["domain"] for row in found.rows) == {"a": 2, "b": 38}
    assert len(selected(rows_of({"a": 2, "b": 1}), count=40).rows) == 3


def test_after_a_number_of_rows_domains_follow_their_weights():
    rows = rows_of({"a": 60, "b": 60, "c": 60})
    weights = {"a": 3.0, "b": 1.0}
    early, late = Counter(), Counter()
    for seed in range(60):
        names = [
            row["domain"] for row in selected(rows, count=40, uniform_until=20, domain_weights=weights, seed=seed).rows
        ]
        early.update(names[:20])
        late.update(names[20:])
    assert late["c"] == 0
    assert late["a"] / late.total() == pytest.approx(0.75, abs=4 * (0.75 * 0.25 / 1200) ** 0.5)
    assert early["c"] / early.total() == pytest.approx(1 / 3, abs=4 * (2 / 9 / 1200) ** 0.5)
    same = [selected(rows, count=40, **more).rows for more in ({}, {"uniform_until": 40, "domain_weights": weights})]
    assert same[0] == same[1]


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("What is ![a](b)?", "an image"),
        ("plot [asy] draw(0); [/asy]", "an image"),
        ("a\n+-----+\n|     |\n+-----+\nb", "a drawing in characters"),
        ("as we saw, p1. says so", "a reference to a part that is not there"),
        ("The angle in the figure is 3.", "a reference to a part that is not there"),
        ("Let p1 = 3 and x - y = 4.\nThen x = y + 4.", None),
        ("- one\n- two\n- three\n---\nx", None),
    ],
)
def test_defects_of_format_are_named(text, name):
    assert defect(["fine", text]) == name


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"count": 0}, "count must be at least 1"),
        ({"uniform_until": 3}, "go together"),
        ({"uniform_until": 9, "domain_weights": {"a": 1}, "count": 4}, "from 0 to count=4"),
        ({"uniform_until": 1, "domain_weights": {"a": -1.0}, "count": 4}, "domain_weights must be at least 0"),
        ({"trusted": lambda row: True, "count": 2}, "3 rows are trusted, more than the 2"),
    ],
)
def test_arguments_that_cannot_work_are_refused(options, words):
    with pytest.raises(ValueError, match=words):
        selected(rows_of({"a": 3}), **options)


def test_rows_that_are_there_twice_are_refused():
    rows = rows_of({"a": 3})
    with pytest.raises(ValueError, match="rows 1 and 4 are the same"):
        selected([*rows, dict(rows[0])], count=2)


@pytest.fixture
def data(tmp_path):
    rows = rows_of({"geometry": 6, "number theory": 4}, source="web", correct=True)
    rows[0] |= {"source": "aime", "trace": "w " * 30}
    rows[1] |= {"source": "aime"}
    rows[2] |= {"trace": None, "error": "HTTP 500"}
    rows[3] |= {"solved_by": ["large"]}
    file = tmp_path / "traces.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def test_the_command_writes_the_selection_with_its_counts(data, tmp_path):
    output, lines = tmp_path / "s1k.jsonl", []
    transform = SelectS1K(str(data), str(output), count=5, trust=("aime:20",), solvers=("small",))
    shown = transform(lines.append)
    rows = [json.loads(line) for line in output.read_text().splitlines()]
    assert len(rows) == 5
    assert [row["question"] for row in rows if row[STEP] == "quality"] == ["geometry 0"]
    assert set(rows[0]) == {"question", "trace", "domain", "solved_by", "source", "correct", "error", STEP}
    assert (shown["without errors"], shown["taken at once"], shown["difficult"]) == ("9", "1", "8")
    assert "selected: 5" in lines
    SelectS1K(str(data), str(tmp_path / "any.jsonl"), count=9, solvers=())(lambda text: None)
    assert "geometry 3" not in (tmp_path / "any.jsonl").read_text()


def test_weights_come_from_a_file(data, tmp_path):
    weights = tmp_path / "weights.json"
    weights.write_text('{"number theory": 2}')
    SelectS1K(str(data), str(tmp_path / "out.jsonl"), count=3, uniform_until=0, domain_weights=str(weights))(
        lambda text: None
    )
    assert all(
        json.loads(line)["domain"] == "number theory" for line in (tmp_path / "out.jsonl").read_text().splitlines()
    )


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"columns": "domain=nothing"}, "nothing"),
        ({"trust": ("aime:long",)}, "--trust aime:long"),
        ({"defect": ("(",)}, "no regular expression"),
        ({"uniform_until": 1, "domain_weights": "no.json"}, "--domain-weights no.json: no such file"),
    ],
)
def test_bad_options_leave_no_file(data, tmp_path, changes, words):
    output = tmp_path / "out.jsonl"
    with pytest.raises((ValueError, FileNotFoundError), match=words):
        SelectS1K(str(data), str(output), **changes)(lambda text: None)
    assert not output.exists()


def test_columns_that_are_not_there_are_named(tmp_path):
    file = tmp_path / "rows.jsonl"
    file.write_text('{"question": "q", "reasoning": "r", "domain": "d"}\n')
    with pytest.raises(ValueError, match=r"expected the columns trace, solved_by, found .*reasoning.*--columns trace="):
        SelectS1K(str(file), str(tmp_path / "out.jsonl"))(lambda text: None)


def test_a_row_without_a_label_is_named(tmp_path):
    file = tmp_path / "rows.jsonl"
    rows = rows_of({"a": 3})
    rows[1]["solved_by"] = None
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(ValueError, match="row 2: 'solved_by' is missing"):
        SelectS1K(str(file), str(tmp_path / "out.jsonl"))(lambda text: None)
