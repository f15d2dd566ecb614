from __future__ import annotations

import json
import math
import random
from pathlib import Path
from typing import Any

import pytest
from scipy import stats

from trialist.engine.compare import compare_files
from trialist.engine.pairs import render_comparison


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def pair(tmp_path: Path, a: list[Any], b: list[Any], **fields: Any) -> tuple[Path, Path]:
    """Two files with a score per item; `b` in another order of rows."""
    files = [
        [
            {"id": f"q{i}", "acc": score, **{name: values[i] for name, values in fields.items()}}
            for i, score in enumerate(scores)
        ]
        for scores in (a, b)
    ]
    return write(tmp_path / "a.jsonl", files[0]), write(tmp_path / "b.jsonl", files[1][::-1])


def lm_eval(path: Path, scores: list[float], filters: tuple[str, ...] = ("none",), **more: Any) -> Path:
    """Rows as lm-eval writes them with --log_samples."""
    rows = [
        {
            "doc_id": i,
            "doc": {"question": f"What is {i}?", "passage": i // 2},
            "target": str(i),
            "arguments": {"gen_args_0": {"arg_0": f"Q: {i}"}},
            "resps": [["1"]],
            "filtered_resps": ["1"],
            "filter": name,
            "metrics": ["exact_match"],
            "doc_hash": f"d{i}",
            "prompt_hash": f"p{i}",
            "target_hash": f"t{i}",
            "exact_match": score if name != "strict-match" else 0.0,
            **more,
        }
        for i, score in enumerate(scores)
        for name in filters
    ]
    return write(path, rows)


def test_the_effect_is_the_paired_difference_with_students_interval_below_twenty_items(tmp_path: Path) -> None:
    a, b = [0.1, 0.5, 0.3, 0.9, 0.2], [0.4, 0.45, 0.7, 0.95, 0.6]
    result = compare_files(*pair(tmp_path, a, b))
    expected = stats.ttest_rel(b, a).confidence_interval(0.95)
    assert result["effect"] == pytest.approx(sum(y - x for x, y in zip(a, b)) / 5)
    assert (result["low"], result["high"]) == pytest.approx((expected.low, expected.high))
    assert (result["mean_a"], result["mean_b"]) == pytest.approx((0.4, 0.62))
    assert (result["won"], result["lost"], result["tied"]) == (4, 1, 0)
    assert result["mcnemar_p"] is None
    assert result["verdict"] is None


def test_lower_is_better_turns_the_sign(tmp_path: Path) -> None:
    files = pair(tmp_path, [0.1, 0.5, 0.3, 0.9], [0.4, 0.45, 0.7, 0.95])
    higher, lower = compare_files(*files), compare_files(*files, better="lower")
    assert lower["effect"] == pytest.approx(-higher["effect"])
    assert (lower["won"], lower["lost"]) == (higher["lost"], higher["won"])


def test_binary_scores_get_the_exact_mcnemar_p_of_their_flips(tmp_path: Path) -> None:
    a = [1] * 10 + [0] * 9 + [True] * 2
    b = [1] * 10 + [1] * 9 + [False] * 2
    result = compare_files(*pair(tmp_path, a, b))
    assert (result["won"], result["lost"], result["tied"]) == (9, 2, 10)
    by_hand = 2 * sum(math.comb(11, k) for k in range(3)) / 2**11
    assert result["mcnemar_p"] == pytest.approx(by_hand)
    assert [flip["id"] for flip in result["flips"]["lost"]] == ["q19", "q20"]


@pytest.mark.parametrize(
    ("shift", "spread", "word"),
    [
        (0.5, 0.1, "supported"),
        (0.05, 0.05, "small"),
        (-0.5, 0.1, "contradicted"),
        (0.0, 0.02, "no effect"),
        (-0.6, 2.0, "inconclusive"),
    ],
)
def test_a_margin_brings_a_verdict(tmp_path: Path, shift: float, spread: float, word: str) -> None:
    noise = random.Random(5)
    a = [noise.random() for _ in range(40)]
    result = compare_files(*pair(tmp_path, a, [x + shift + noise.gauss(0, spread) for x in a]), margin=0.2)
    assert result["verdict"] == word
    assert word in render_comparison(result).splitlines()[0]


def test_clusters_widen_the_interval_and_fewer_than_three_give_no_verdict(tmp_path: Path) -> None:
    b = [0.0, 0.1, 0.05, 1.0, 1.1, 1.05]
    files = pair(tmp_path, [0.0] * 6, b, passage=["x", "x", "x", "y", "y", "y"])
    alone, grouped = compare_files(*files, margin=0.1), compare_files(*files, margin=0.1, cluster="passage")
    assert grouped["n"] == grouped["clusters"] == 2
    assert grouped["high"] - grouped["low"] > alone["high"] - alone["low"]
    assert alone["verdict"] is not None
    assert grouped["verdict"] is None
    assert any("too few: no verdict below 3" in remark for remark in grouped["remarks"])
    assert "too few" in render_comparison(grouped)


def test_two_equal_files_have_no_interval_and_say_why(tmp_path: Path) -> None:
    result = compare_files(*pair(tmp_path, [1, 0, 1, 1], [1, 0, 1, 1]), margin=0.1)
    assert (result["effect"], result["low"]) == (0.0, None)
    assert result["reason"]
    assert result["verdict"] == "inconclusive"
    assert "without an interval" in render_comparison(result)


def test_lm_eval_logs_need_no_option_and_a_cluster_may_sit_inside_the_document(tmp_path: Path) -> None:
    a = lm_eval(tmp_path / "a.jsonl", [1.0, 0.0, 0.0, 1.0, 0.0, 1.0, 0.0])
    b = lm_eval(tmp_path / "b.jsonl", [1.0, 1.0, 0.0, 1.0, 1.0, 0.0, 1.0])
    result = compare_files(a, b)
    assert (result["metric"], result["id_field"], result["filter"]) == ("exact_match", "doc_id", "none")
    assert (result["won"], result["lost"]) == (3, 1)
    assert compare_files(a, b, cluster="doc.passage")["clusters"] == 4


def test_several_filters_must_be_chosen_from(tmp_path: Path) -> None:
    filters = ("strict-match", "flexible-extract")
    a = lm_eval(tmp_path / "a.jsonl", [1.0, 0.0, 0.0, 1.0], filters)
    b = lm_eval(tmp_path / "b.jsonl", [1.0, 1.0, 0.0, 0.0], filters)
    with pytest.raises(ValueError, match=r"--metric: exact_match,flexible-extract, exact_match,strict-match"):
        compare_files(a, b, metric="exact_match")
    assert compare_files(a, b, metric="exact_match,flexible-extract")["won"] == 1
    assert compare_files(a, b, metric="exact_match,strict-match")["won"] == 0
    with pytest.raises(ValueError, match=r"no filter 'loose'"):
        compare_files(a, b, metric="exact_match,loose")


def test_other_documents_are_an_error_and_other_prompts_a_remark(tmp_path: Path) -> None:
    scores = [1.0, 0.0, 0.0, 1.0]
    a = lm_eval(tmp_path / "a.jsonl", scores)
    with pytest.raises(ValueError, match=r"item 0: the document differs .*a\.jsonl line 1.*on 4 of 4 items"):
        compare_files(a, lm_eval(tmp_path / "b.jsonl", scores, doc_hash="other"))
    with pytest.raises(ValueError, match="gold answer differs"):
        compare_files(a, lm_eval(tmp_path / "b.jsonl", scores, target_hash="other"))
    result = compare_files(a, lm_eval(tmp_path / "b.jsonl", scores[::-1], prompt_hash="other"))
    assert "prompt differs on 4 of 4 items" in result["remarks"][0]


def test_different_items_are_an_error_with_counts_and_examples(tmp_path: Path) -> None:
    a = write(tmp_path / "a.jsonl", [{"id": i, "acc": 1} for i in range(5)])
    b = write(tmp_path / "b.jsonl", [{"id": i, "acc": 1} for i in range(2, 9)])
    with pytest.raises(
        ValueError,
        match=r"3 in both, 2 only in .*a\.jsonl \(for example 0, 1\), 4 only in .*b\.jsonl \(for example 5, 6, 7\)",
    ):
        compare_files(a, b)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"id": 1, "acc": 1}\n\n{"id": 2, "acc"\n', r"b\.jsonl line 3: not JSON"),
        ('{"id": 1, "acc": 1}\n[2]\n', r"b\.jsonl line 2: expected a JSON object, found list"),
        ('{"id": 1, "acc": 1}\n{"id": 1, "acc": 0}\n', r"id 1 stands on lines 1 and 2.*--cluster"),
        ('{"id": 1, "acc": 1}\n{"id": null, "acc": 0}\n', r"b\.jsonl line 2: id is None"),
        ("\n", r"b\.jsonl holds no rows"),
        ("[\n{}]", r"line 1: not JSON .*one object per line"),
    ],
)
def test_a_broken_row_is_named_with_file_and_line(tmp_path: Path, text: str, message: str) -> None:
    a = write(tmp_path / "a.jsonl", [{"id": 1, "acc": 1}, {"id": 2, "acc": 0}])
    (tmp_path / "b.jsonl").write_text(text)
    with pytest.raises(ValueError, match=message):
        compare_files(a, tmp_path / "b.jsonl")


@pytest.mark.parametrize("value", ["yes", None, [1, 2]])
def test_a_score_that_is_no_number_is_named_with_file_and_line(tmp_path: Path, value: Any) -> None:
    a, b = pair(tmp_path, [1, 0, 1], [1, value, 1])
    with pytest.raises(ValueError, match=r"b\.jsonl line 2: acc is .*one finite number"):
        compare_files(a, b, metric="acc")
    (tmp_path / "b.jsonl").write_text('{"id": "q0", "acc": NaN}\n{"id": "q1", "acc": 1}\n{"id": "q2", "acc": 1}\n')
    with pytest.raises(ValueError, match=r"b\.jsonl line 1: acc is nan"):
        compare_files(a, b)


def test_ambiguous_columns_are_named(tmp_path: Path) -> None:
    rows = [{"id": i, "acc": 1, "f1": 0.5} for i in range(4)]
    a = write(tmp_path / "a.jsonl", rows)
    with pytest.raises(ValueError, match=r"acc, f1 could all be the score.*--metric"):
        compare_files(a, a)
    with pytest.raises(ValueError, match=r"line 1: no field 'bleu'; it has id, acc, f1"):
        compare_files(a, a, metric="bleu")
    with pytest.raises(ValueError, match=r"no field 'topic' for --cluster"):
        compare_files(a, a, metric="acc", cluster="topic")
    b = write(tmp_path / "b.jsonl", [{"id": i, "doc_id": -i, "acc": 1} for i in range(4)])
    with pytest.raises(ValueError, match=r"doc_id, id could all name the item"):
        compare_files(b, b)
    c = write(tmp_path / "c.jsonl", [{"name": str(i), "acc": 1} for i in range(4)])
    with pytest.raises(ValueError, match=r"no field names the item.*found name, acc"):
        compare_files(c, c)


def test_a_known_id_that_repeats_gives_way_to_the_one_that_does_not(tmp_path: Path) -> None:
    rows = [{"task_id": "t", "id": i, "acc": i % 2} for i in range(4)]
    a, b = write(tmp_path / "a.jsonl", rows), write(tmp_path / "b.jsonl", [row | {"acc": 1} for row in rows])
    assert compare_files(a, b)["id_field"] == "id"


def test_missing_files_folders_and_margins_are_refused_in_words(tmp_path: Path) -> None:
    a, b = pair(tmp_path, [1, 0, 1], [1, 1, 1])
    with pytest.raises(FileNotFoundError, match=r"none\.jsonl"):
        compare_files(a, tmp_path / "none.jsonl")
    with pytest.raises(ValueError, match=r"is a folder.*a\.jsonl, b\.jsonl"):
        compare_files(tmp_path, b)
    with pytest.raises(ValueError, match="margin must be > 0"):
        compare_files(a, b, margin=0.0)
    with pytest.raises(ValueError, match="'higher' or 'lower'"):
        compare_files(a, b, better="up")  # type: ignore[arg-type]


def test_the_result_is_strict_json(tmp_path: Path) -> None:
    result = compare_files(*pair(tmp_path, [1, 0, 1, 0], [1, 1, 1, 0]), margin=0.1)
    assert json.loads(json.dumps(result, allow_nan=False)) == result
